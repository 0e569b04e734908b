"""model_type any: what is read of a mapping or a config.json, what is refused, and which sizes grow."""

import json

import pytest
from sentences import refused
from transformers import AutoModelForCausalLM

from hf_power.mup.scale import scale_width
from hf_power.records.errors import NotFoundError, UserError
from hf_power.settings.settings import Settings

QWEN3 = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
QWEN3 |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
GEMMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
GEMMA |= {"num_key_value_heads": 1, "sliding_window": 16}
# As published files have them: ids of another tokenizer, a dtype, remote code, and names of older versions.
FILE = QWEN3 | {"bos_token_id": 151643, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "rope_theta": 5e5}
FILE |= {"auto_map": {"AutoConfig": "configuration_qwen.Config"}, "architectures": ["Qwen3ForCausalLM"], "of_others": 1}
FILE |= {"quantization_config": {"quant_method": "fp8"}}


@pytest.fixture
def settings(sections, tmp_path):
    def build(config, model=None, **mup):
        made = sections(tmp_path / "run")
        made["model"] = {"model_type": "any", "model_config": config, **(model or {})}
        made["mup"] = mup or {"base_width": 16}
        return Settings.from_dict(made)

    return build


def written(folder, content):
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def test_a_file_is_the_shape_of_a_model_alone(settings, tmp_path):
    made = settings(written(tmp_path, FILE), {"hidden_size": 64})
    config = made.model.config(vocab_size=400, bos_token_id=3, max_position_embeddings=32)
    assert (config.vocab_size, config.bos_token_id, config.pad_token_id, config.dtype) == (400, 3, None, None)
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 4, 160)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert not hasattr(config, "auto_map")
    assert not hasattr(config, "quantization_config")
    assert not hasattr(config, "of_others")
    assert made.model.family == "qwen3"
    # A record has the shape itself, so that a run goes on where the file is not.
    (tmp_path / "config.json").unlink()
    again = Settings.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again.model.config().to_dict() == made.model.config().to_dict()


def test_names_of_a_family_and_their_aliases_are_one(settings):
    gpt2 = {"model_type": "gpt2", "hidden_size": 32, "n_head": 2, "num_hidden_layers": 2, "vocab_size": 90}
    config = settings(gpt2).model.config(vocab_size=70, max_position_embeddings=64)
    assert (config.n_embd, config.n_layer, config.vocab_size, config.n_positions) == (32, 2, 90, 64)
    moe = QWEN3 | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 48}
    made = settings(moe)
    assert made.model.config().num_local_experts == 4
    assert made.model.config().head_dim == 16  # which the class of this config does not declare
    assert Settings.from_dict(made.to_dict()).model.config().num_experts == 4


@pytest.mark.slow
def test_of_several_models_the_text_s_is_taken(settings, tmp_path):
    content = {"model_type": "gemma3", "text_config": GEMMA, "vision_config": {"hidden_size": 16}}
    made = settings(written(tmp_path, content))
    assert made.model.family == "gemma3_text"
    assert (made.model.hidden_size, made.model.config().sliding_window) == (32, 16)
    made.check()


@pytest.mark.slow
def test_sizes_that_do_not_grow_are_those_of_two_configs(settings):
    """Heads stay, as in Qwen3 of 1024 and 2048; another width is scaled in the same way, and so is the base of a run."""
    base = QWEN3 | {"hidden_size": 16, "intermediate_size": 40}
    made = settings(QWEN3, {"hidden_size": 64}, base_config=base)
    config = made.model.config(vocab_size=400)
    assert (config.hidden_size, config.intermediate_size, config.num_attention_heads) == (64, 160, 2)
    of_base = made.mup.plain_arguments(made.model, config)["base_config"]
    assert (of_base.hidden_size, of_base.intermediate_size, of_base.vocab_size) == (16, 40, 400)
    expected = scale_width(config, 16, fixed=["num_attention_heads", "num_key_value_heads"])
    assert of_base.to_dict() == expected.to_dict()
    made.check()


MISTAKES = [
    ({**QWEN3, "num_hiden_layers": 3}, {}, "model_config.num_hiden_layers is unknown: did you mean num_hidden_layers?"),
    ({**QWEN3, "model_type": "qwen33"}, {}, "model_type 'qwen33' of model_config is unknown"),
    (
        {"model_type": "custom", "auto_map": {}},
        {},
        "model_type 'custom' of model_config brings its own code (auto_map)",
    ),
    ({"hidden_size": 32}, {}, "model_config needs a model_type"),
    ({"model_type": "t5"}, {}, "model_type t5 of model_config is no causal language model"),
    (
        {"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64},
        {},
        "is_decoder: true",
    ),
    ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}, {}, "there is no muP rule for the tensor"),
    ("nowhere.yaml", {}, "model_config must be a mapping of config arguments or a config.json"),
    ("[1]", {}, "model_config must be a mapping of config arguments or a config.json, got '[1]'"),
    (QWEN3, {"preset": "ibm"}, "preset belongs to the multipliers of muP"),
    (
        QWEN3,
        {"base_config": GEMMA | {"model_type": "gemma2"}},
        "base_config is of a gemma2, but model_config of a qwen3",
    ),
    (QWEN3, {"base_config": QWEN3, "base_width": 16}, "base_width stands beside base_config"),
    (QWEN3, {"base_config": QWEN3 | {"head_dim": 8, "hidden_size": 16}}, "the plain form keeps the head size"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "mup", "part"), MISTAKES, ids=lambda each: each[:24] if isinstance(each, str) else ""
)
def test_mistakes_before_any_data(settings, config, mup, part):
    with pytest.raises(UserError) as caught:
        settings(config, **mup).check()
    assert part in str(caught.value)


def test_what_stands_beside_is_refused(settings):
    with refused(UserError, "num_hidden_layers stands beside model_type any"):
        settings(QWEN3, {"num_hidden_layers": 3})
    with refused(UserError, "base_config has the hidden_size 32 of model_config"):
        settings(QWEN3, {"hidden_size": 64}, base_config=QWEN3).model.config()
    with refused(NotFoundError, "there is no config at"):
        settings("nowhere/config.json")
    with refused(UserError, "model_type 'qwen3' has no sizes here", "any"):
        Settings.from_dict({"model": {"model_type": "qwen3"}, "training": {"output_dir": "x"}}).model.config()


def test_no_row_of_the_embedding_is_for_padding(settings):
    """Gemma's config has the padding token 0, which is a token of text to another tokenizer and would stay zero."""
    model = AutoModelForCausalLM.from_config(settings(GEMMA | {"model_type": "gemma2"}).model.config(vocab_size=90))
    assert model.get_input_embeddings().padding_idx is None
