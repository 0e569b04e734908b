import copy
import doctest
import json
import pickle

import pytest
from sentences import refused
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from hf_power import Recipe
from hf_power.cli import parse_settings
from hf_power.models import flops_per_token
from hf_power.settings import sections
from hf_power.settings.read import load_yaml
from hf_power.settings.sections import ModelArguments, Tokens, parse_tokens
from hf_power.settings.settings import Settings

YAML = """
model: {hidden_size: 128, num_attention_heads: 4}
mup: {base_width: 64}
data: {block_size: 64}
run: {tokens: 30M}
training: {output_dir: runs/a, learning_rate: 2e-2, lr_scheduler_kwargs: {decay_ratio: 0.2}}
"""


@pytest.fixture
def recipe_yaml(tmp_path):
    def write(text=YAML):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *(("30M", 30_000_000), ("2.1B", 2_100_000_000), ("1T", 10**12), ("250k", 250_000), ("1e6", 10**6)),
        *(
            (4096, 4096),
            ("1_000", 1000),
            ("30,000,000", 30_000_000),
            ("2,100M", 2_100_000_000),
            ("1,000.5k", 1_000_500),
        ),
    ],
)
def test_tokens(text, tokens):
    assert parse_tokens(text, "tokens") == tokens


@pytest.mark.parametrize("text", ["", "M", "ten", "10%", "3 G", "inf", "nan", "2,1B", "2,1", "1,00", "1,0000M"])
def test_tokens_that_are_none(text):
    with pytest.raises(ValueError, match="tokens must be a number of tokens such as 30M or 2.1B, got"):
        parse_tokens(text, "tokens")


def test_command_line_wins_over_yaml_wins_over_defaults(recipe_yaml):
    settings = parse_settings([recipe_yaml(), "--hidden_size", "256", "--tokens=1M", "--bf16", "False"])
    assert (settings.model.hidden_size, settings.model.num_attention_heads) == (256, 4)
    assert (settings.run.tokens, settings.data.block_size, settings.mup.preset) == (1_000_000, 64, "paper")
    assert (settings.run.max_eval_tokens, str(settings.run.tokens)) == (200_000, "1M")
    assert settings.training.learning_rate == 0.02  # YAML reads 2e-2 as a string
    assert settings.training.lr_scheduler_type == "power"
    assert settings.training.weight_decay == 0.1
    assert settings.training.lr_scheduler_kwargs == {"decay_ratio": 0.2}
    assert settings.given >= {"hidden_size", "tokens", "bf16", "learning_rate"}
    assert "weight_decay" not in settings.given


def test_a_length_remembers_how_it_was_written():
    tokens = pickle.loads(pickle.dumps(copy.deepcopy(Tokens("2.1M"))))
    assert (tokens, str(tokens), repr(tokens), f"{tokens:,}", json.dumps(tokens)) == (
        *(2_100_000, "2.1M", "'2.1M'", "2,100,000"),
        "2100000",
    )
    assert [
        Settings.from_dict({"run": {"tokens": x}}).to_dict()["run"]["tokens"] for x in ("3e7", 3e7, 30_000_000)
    ] == [*("3e7", "30000000.0"), "30000000"]


def test_a_changed_copy_leaves_the_settings_as_they_were(recipe_yaml):
    settings = parse_settings([recipe_yaml(), "--seed", "3"])
    before = settings.to_dict()
    training = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {}, "learning_rate": 0.5}
    other = settings.changed(training=training, model={"hidden_size": 64}, run={"tokens": 2560}, mup={"preset": None})
    assert other == Settings.from_dict(
        {
            "model": {"hidden_size": 64, "num_attention_heads": 4},
            "mup": {"base_width": 64},
            "data": {"block_size": 64},
            "run": {"tokens": "2560"},
            "training": {**training, "seed": 3, "output_dir": "runs/a"},
        }
    ).changed(mup={"preset": None})
    assert other.to_dict()["training"] == {"learning_rate": 0.5, "lr_scheduler_type": "cosine", **{"seed": 3}} | {
        "lr_scheduler_kwargs": {}
    }
    assert other.training.device == settings.training.device
    assert settings.to_dict() == before
    with pytest.raises(AttributeError):
        settings.changed(training={"sed": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e3", 1000.0), ("-5.1e-1", -0.51), ("1E3", 1000.0), ("1_000", 1000), ("1e+3", 1000.0), (".5", 0.5), ("2.", 2.0)],
)
def test_a_number_is_one_wherever_it_stands_in_yaml(text, value, recipe_yaml):
    """PyYAML takes most of these for texts."""
    training = load_yaml(
        recipe_yaml(f"training: {{lr_scheduler_kwargs: {{b: {text}, more: [{text}, {{x: {text}}}]}}}}")
    )
    assert training == {"lr_scheduler_kwargs": {"b": value, "more": [value, {"x": value}]}}
    assert load_yaml(recipe_yaml(f"model: {{model_config: {{rope_theta: {text}}}}}"))["model_config"] == {
        "rope_theta": value
    }


@pytest.mark.parametrize("text", ["1k", "none", "1e", "e3", "1.2.3", "linear", "_", "1e3x"])
def test_what_is_no_number_stays_a_text(text, recipe_yaml):
    found = load_yaml(recipe_yaml(f"training: {{lr_scheduler_kwargs: {{b: '{text}'}}}}\ndata: {{dataset: '1e3'}}"))
    assert found == {"lr_scheduler_kwargs": {"b": text}, "dataset": "1e3"}


def test_lengths_of_the_schedule_may_have_units(recipe_yaml):
    settings = parse_settings(
        [recipe_yaml(), "--lr_scheduler_kwargs", '{"warmup_tokens": "1k", "decay_tokens": "2.5M"}']
    )
    assert settings.training.lr_scheduler_kwargs == {"warmup_tokens": 1000, "decay_tokens": 2_500_000}
    with refused(ValueError, "lr_scheduler_kwargs.warmup_tokens must be a number of tokens", "'soon'"):
        Settings.from_dict({"training": {"lr_scheduler_kwargs": {"warmup_tokens": "soon"}}})
    with refused(ValueError, "lr_scheduler_kwargs must be a mapping such as", "'a=16'"):
        parse_settings(["--lr_scheduler_kwargs", "a=16"])
    with refused(ValueError, "--lr_scheduler_kwargs is not JSON", "write it with double quotes"):
        parse_settings(["--lr_scheduler_kwargs", "{'a': 16}"])


def test_settings_survive_run_json(recipe_yaml):
    settings = parse_settings([recipe_yaml(), "--lr_scheduler_kwargs", '{"a": 3.0}', "--preset", "ibm"])
    record = settings.to_dict()
    assert record["training"] == {"learning_rate": 0.02, "lr_scheduler_kwargs": {"a": 3.0}}  # no output path
    again = Settings.from_dict(record)
    assert again.to_dict() == record
    assert all(getattr(again, x) == getattr(settings, x) for x in ("mup", "model", "data", "run"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {hiden_size: 3}", r"run.yaml: model.hiden_size is unknown: did you mean hidden_size\?"),
        ("training: {learning_rat: 3}", r"training.learning_rat is unknown: did you mean learning_rate\?"),
        ("trainin: {}", r"section trainin is unknown: did you mean training\?"),
        ("model: {zzz: 3}", r"model.zzz is unknown: use one of "),
        ("model: {hidden_size: wide}", "model.hidden_size must be int, got 'wide'"),
        ("model: {hidden_size: 1.5}", "model.hidden_size must be int, got 1.5"),
        ("model: {hidden_size: true}", "model.hidden_size must be int, got True"),
        ("model: {tie_word_embeddings: 3}", "model.tie_word_embeddings must be bool, got 3"),
        ("training: {learning_rate: fast}", "training.learning_rate must be float, got 'fast'"),
        ("data: {dataset: [a]}", r"data.dataset must be str, got \['a'\]"),
        ("model: 3", "section model must hold keys and values, got 3"),
        ("- a", "must hold the sections model, mup, data, run, training, got list"),
        ("a: [", "run.yaml is not YAML: while parsing"),
    ],
)
def test_bad_yaml_is_one_sentence(text, message, recipe_yaml):
    with pytest.raises(ValueError, match=message) as caught:
        load_yaml(recipe_yaml(text))
    assert "\n" not in str(caught.value)


def test_missing_yaml():
    with pytest.raises(FileNotFoundError, match="there is no settings file at nowhere.yaml: pass one of"):
        load_yaml("nowhere.yaml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hiden_size", "4"], r"--hiden_size is unknown: did you mean hidden_size\?"),
        (["--hidden_size", "wide"], "command line: .*hidden_size.*invalid int value: 'wide'"),
        (["--hidden_size"], "command line: .*hidden_size.*expected one argument"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(flags)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"output_dir": None}}, "output_dir is missing: name the run folder"),
        ({"run": {"tokens": None}}, "tokens is missing: give the length of the run"),
        ({"training": {"lr_scheduler_kwargs": {"decy_ratio": 1}}}, r"decy_ratio is unknown: did you mean decay_ratio"),
        ({"model": {"hidden_size": 130}}, "hidden_size 130 is not a multiple of num_attention_heads 4: change one"),
        ({"model": {"num_key_value_heads": 3}}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"model": {"model_type": "gpt2"}}, "model_type 'gpt2' has no sizes here: use llama or mixtral, or any"),
        ({"model": {"model_config": {"rope_thet": 1}}}, "model_config.rope_thet is unknown"),
        ({"mup": {"preset": "papr"}}, "preset must be one of paper, ibm, power_of_two, got 'papr'"),
        ({"run": {"max_eval_tokens": "some"}}, "max_eval_tokens must be a number of tokens"),
    ],
)
def test_checks_before_any_data(sections, message):
    good = {"run": {"tokens": "1M"}, "training": {"output_dir": "x"}, "model": {"num_attention_heads": 4}}
    good |= {name: good.get(name, {}) | values for name, values in sections.items()}
    with pytest.raises(ValueError, match=message) as caught:
        Settings.from_dict(good).check()
    assert "\n" not in str(caught.value)


def test_model_config():
    llama = ModelArguments(hidden_size=64, num_attention_heads=2, model_config={"rms_norm_eps": 1e-4}).config(
        vocab_size=9
    )
    assert isinstance(llama, LlamaConfig)
    assert (llama.hidden_size, llama.num_key_value_heads, llama.rms_norm_eps, llama.vocab_size) == (64, 2, 1e-4, 9)
    moe = ModelArguments(
        model_type="mixtral", num_local_experts=6, num_experts_per_tok=3, num_key_value_heads=1
    ).config()
    assert isinstance(moe, MixtralConfig)
    assert (moe.num_local_experts, moe.num_experts_per_tok, moe.num_key_value_heads) == (6, 3, 1)


@pytest.fixture
def tuned(tmp_path):
    """Settings of a run with a recipe in which every number differs from the defaults."""
    recipe = Recipe(
        a=0.5,
        b=-0.3,
        batch_exponent=0.7,
        critical_batch_tokens=65_536.0,
        max_lr=0.03,
        model_type="llama",
        warmup_tokens=4096,
        decay_ratio=0.25,
        decay_shape="linear",
        base_num_layers=2,
        attention_multiplier=0.05,
    )
    recipe.save(tmp_path / "recipe.json")

    def build(model=None, mup=None, **training):
        run = {"tokens": "1M", "recipe": str(tmp_path)}
        training = {"output_dir": "x", **training}
        return Settings.from_dict({"run": run, "training": training, "model": model or {}, "mup": mup or {}})

    return build


def test_recipe_brings_law_critical_batch_warmup_tail_and_mup(tuned):
    settings = tuned()
    recipe = settings.apply_recipe()
    assert settings.training.lr_scheduler_kwargs == {
        "a": 0.5,
        "b": -0.3,
        "batch_exponent": 0.7,
        "critical_batch_tokens": 65_536.0,
        "warmup_tokens": 4096,
        "decay_ratio": 0.25,
        "decay_shape": "linear",
    }
    assert (settings.training.learning_rate, settings.mup.base_num_layers) == (0.03, 2)
    assert settings.mup.base_head_dim is None
    assert Settings.from_dict(settings.to_dict()).mup == settings.mup  # the record holds the recipe's numbers
    assert recipe == Recipe.load(settings.run.recipe)
    assert Settings.from_dict({}).apply_recipe() is None
    assert Settings.from_dict(settings.to_dict()).training.lr_scheduler_kwargs == settings.training.lr_scheduler_kwargs


@pytest.mark.parametrize(
    ("training", "lengths"),
    [
        ({"warmup_steps": 7}, {"decay_ratio": 0.25, "decay_shape": "linear"}),
        ({"lr_scheduler_kwargs": {"warmup_tokens": 9}}, {"warmup_tokens": 9, "decay_ratio": 0.25}),
        ({"lr_scheduler_kwargs": {"decay_ratio": 0.0}}, {"warmup_tokens": 4096, "decay_ratio": 0.0}),
        ({"lr_scheduler_kwargs": {"decay_tokens": 99}}, {"warmup_tokens": 4096, "decay_tokens": 99}),
        ({"lr_scheduler_kwargs": {"decay_start_tokens": 99}}, {"decay_start_tokens": 99, "decay_shape": "linear"}),
        ({"lr_scheduler_kwargs": {"decay_shape": "cosine"}}, {"decay_ratio": 0.25, "decay_shape": "cosine"}),
    ],
)
def test_given_lengths_win_over_the_recipe_s(training, lengths, tuned):
    settings = tuned(**training)
    settings.apply_recipe()
    kwargs = settings.training.lr_scheduler_kwargs
    assert kwargs == kwargs | lengths
    assert ("warmup_tokens" in kwargs) == ("warmup_steps" not in training)
    assert len({"decay_ratio", "decay_tokens", "decay_start_tokens"} & set(kwargs)) == 1
    settings.check()


def test_a_schedule_that_knows_its_horizon_gets_no_law_of_power(tuned):
    settings = tuned(lr_scheduler_type="cosine", learning_rate=0.004)
    settings.apply_recipe()
    assert (settings.training.learning_rate, settings.training.lr_scheduler_kwargs) == (0.004, None)
    assert (settings.training.weight_decay, settings.mup.base_num_layers) == (0.1, 2)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"model_type": "mixtral"}}, "model_type is mixtral in the settings but llama in the recipe: leave"),
        ({"mup": {"mup": False}}, "mup is False in the settings, but a recipe's numbers hold under muP only"),
        ({"mup": {"attention_multiplier": 0.1}}, "attention_multiplier is 0.1 in the settings but 0.05 in the recipe"),
        ({"learning_rate": 0.01}, "learning_rate is 0.01 in the settings but 0.03 in the recipe: leave it out"),
        ({"mup": {"base_width": 64}}, "base_width is 64 in the settings but 256 in the recipe"),
        ({"lr_scheduler_kwargs": {"a": 4.0}}, "lr_scheduler_kwargs.a is 4.0 in the settings but 0.5 in the"),
        ({"weight_decay": 0.2}, "weight_decay is 0.2 in the settings but 0.1 in the recipe"),
        (
            {"lr_scheduler_kwargs": {"critical_batch_tokens": 9}},
            "lr_scheduler_kwargs.critical_batch_tokens is 9 in the settings but 65536.0 in the recipe",
        ),
    ],
)
def test_what_contradicts_the_recipe_is_refused(sections, message, tuned):
    with refused(ValueError, message):
        tuned(**sections).apply_recipe()


def test_a_layer_is_checked_without_from_config(monkeypatch):
    """Which under DeepSpeed's ZeRO 3 partitions the tensors, and there are none on the meta device."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *args, **kwargs: 1 / 0)
    sections = {"run": {"tokens": "1M"}, "training": {"output_dir": "none"}}
    Settings.from_dict(sections).check()
    assert flops_per_token(Settings.from_dict(sections).model.config(), 32) > 0


def test_documented_values():
    failed, attempted = doctest.testmod(sections)
    assert (failed, attempted) == (0, 3)
