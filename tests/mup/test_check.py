"""The coordinate check of the plain form: families that must pass, controls that must fail, and the verb."""

import json

import pytest
import yaml
from sentences import refused
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hf_power import coord_check, mup_init_, mup_param_groups
from hf_power.cli import main
from hf_power.coordinates import MAX_SLOPE
from hf_power.mup.controls import CONTROLS

pytestmark = pytest.mark.slow  # together

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
QUICK = {"widths": (64, 128, 192, 256), "steps": 1, "lr": 0.001, "seeds": (0, 1)}
FAMILIES = {
    "Qwen3, tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "Gemma 2, tied": Gemma2Config(**SIZES, tie_word_embeddings=True),
    "OLMo 2, own head": Olmo2Config(**SIZES),
    "GPT-2, own head": GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=32, tie_word_embeddings=False
    ),
}
# With the small init the norms after the branches of a post-norm family see next to nothing.
SETTINGS = {"OLMo 2, own head": QUICK | {"lr": 0.003, "initializer_range": 0.06}}
FIXED = ("num_attention_heads", "num_key_value_heads")


def slopes(check, part):
    return [s["slope"] for s in check.slopes if part in s["module"]]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_passes_and_standard_parameterization_fails(kind):
    settings = SETTINGS.get(kind, QUICK)
    check = coord_check(FAMILIES[kind], **settings)
    assert check.passed, check.table()
    wrong = coord_check(FAMILIES[kind], control="standard", **settings)
    assert wrong.worst["slope"] > 1, wrong.table()


def test_controls_of_experts_and_head():
    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    twice = coord_check(config, control="head_counted_twice", **QUICK | {"steps": 2})
    assert max(slopes(twice, "logits")) < -MAX_SLOPE, twice.table()
    left_out = coord_check(config, control="experts_left_out", **QUICK | {"steps": 2})
    assert max(slopes(left_out, "mlp")) > 0.5, left_out.table()


@pytest.mark.parametrize("config", [FAMILIES["Qwen3, tied"], LlamaConfig(**SIZES)], ids=("plain", "multiplier"))
def test_an_attention_width_that_does_not_grow(config):
    """With the ratio of hidden_size for o_proj, what attention adds falls with the width."""
    right = coord_check(config, fixed=FIXED, **QUICK)
    assert right.passed, right.table()
    wrong = coord_check(config, fixed=FIXED, control="hidden_size_for_all", **QUICK)
    assert max(slopes(wrong, "attention")) < -0.3, wrong.table()


def test_the_baseline_is_better_than_standard_parameterization_and_no_muP():  # noqa: N802
    standard, baseline = (
        coord_check(FAMILIES["Qwen3, tied"], control=x, **QUICK) for x in ("standard", "embedding_rate")
    )
    assert MAX_SLOPE < max(slopes(baseline, "mlp")) < max(slopes(standard, "mlp"))


@pytest.mark.parametrize("name", ["standard", "embedding_rate"])
def test_at_its_base_width_a_baseline_is_muP_itself(name):  # noqa: N802
    """So one run at the base serves all of a transfer measurement, and gains are decayed nowhere."""
    model = AutoModelForCausalLM.from_config(FAMILIES["Gemma 2, tied"])
    mup_init_(model, base_width=64, embedding_multiplier=4.0)
    own, mup = (
        {tensor: (group["lr"], group["weight_decay"]) for group in groups for tensor in group["params"]}
        for groups in (make(model, lr=0.01, weight_decay=0.1) for make in (CONTROLS[name].groups, mup_param_groups))
    )
    assert own == mup


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"control": "sp"}, ("control must be one of standard, embedding_rate", "got 'sp'")),
        ({"form": "both"}, ("form must be one of multiplier, plain", "got 'both'")),
        ({"preset": "ibm"}, ("preset belongs to mup_config", "leave it out")),
        ({"fixed": FIXED, "base_width": 32}, ("base_width must be the smallest width 64",)),
        ({"control": "experts_left_out"}, ("this control changes the rate of each experts", "leave it out")),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, parts):
    with refused(ValueError, *parts):
        coord_check(FAMILIES["Qwen3, tied"], **QUICK | arguments)


def test_the_verb_takes_a_config_of_any_size_and_its_controls(tmp_path, capsys):
    large = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    large |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **large}))
    widths = ["--widths", "64", "128", "192", "256", "--steps", "1"]
    assert main(["coord-check", str(tmp_path), *widths, "--controls"]) == 0
    told = capsys.readouterr().out
    assert "checked on a qwen3 of the same kind with small sizes: 2 layers, hidden_size 64, 4 heads" in told
    assert "control standard (standard parameterization): FAILED" in told
    assert "control embedding_rate" in told
    assert "control experts_left_out" not in told


def test_the_verb_takes_any_model_in_yaml(tmp_path, capsys):
    model = {"model_type": "any", "model_config": {"model_type": "qwen3", **SIZES}}
    (tmp_path / "any.yaml").write_text(yaml.safe_dump({"model": model}))
    arguments = ["coord-check", str(tmp_path / "any.yaml"), "--widths", "64", "128", "192", "256", "--steps", "1"]
    assert main([*arguments, "--control", "standard"]) == 1
    assert "FAILED" in capsys.readouterr().out
    (tmp_path / "any.yaml").write_text(yaml.safe_dump({"model": {"model_type": "any"}}))
    assert main(arguments) == 2
    assert "model_type any needs a model_config" in capsys.readouterr().err
    assert main(["coord-check", str(tmp_path / "none.json")]) == 2
    assert "there is no config at" in capsys.readouterr().err
    (tmp_path / "mamba.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2}))
    assert main(["coord-check", str(tmp_path / "mamba.json")]) == 2
    assert "state-space" in capsys.readouterr().err
