"""Other widths of a config and small sizes, whatever a family calls them."""

import pytest
from sentences import refused
from transformers import (
    CONFIG_MAPPING,
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hf_power.mup.scale import scale_width
from hf_power.mup.shrink import shrink


def sizes(config, names):
    return {name: getattr(config, name) for name in names}


def test_sizes_of_each_family_grow_under_its_own_names():
    gpt2 = scale_width(GPT2Config(n_embd=64, n_head=4, n_inner=200), 128)
    assert sizes(gpt2, ("n_embd", "hidden_size", "n_head", "n_inner")) == {
        "n_embd": 128,
        "hidden_size": 128,
        "n_head": 8,
        "n_inner": 400,
    }
    mla = scale_width(DeepseekV3Config(), 2 * 7168)
    names = (
        "q_lora_rank",
        "kv_lora_rank",
        "moe_intermediate_size",
        "num_attention_heads",
        "qk_rope_head_dim",
        "n_routed_experts",
    )
    assert list(sizes(mla, names).values()) == [3072, 1024, 4096, 256, 64, 256]
    moe = scale_width(Qwen3MoeConfig(head_dim=128), 4096)
    assert (moe.moe_intermediate_size, moe.num_key_value_heads, moe.head_dim) == (1536, 8, 128)


def test_fixed_sizes_stay():
    config = Qwen3Config(
        hidden_size=1024, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072
    )
    wide = scale_width(config, 2048, fixed=("num_attention_heads", "num_key_value_heads"))
    assert list(
        sizes(wide, ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")).values()
    ) == [
        16,
        8,
        6144,
        128,
    ]
    assert config.hidden_size == 1024


@pytest.mark.parametrize(
    ("act", "parts"),
    [
        (lambda: scale_width(LlamaConfig(), 64), ("would become 0.5 at width 64", "steps of the head size 128")),
        (lambda: scale_width(LlamaConfig(), 8192, fixed=("width",)), ("fixed names 'width'", "hidden_size")),
        (
            lambda: scale_width(GPT2Config(), 1536, fixed=("num_attention_heads",)),
            ("that of gpt2 has none", "its heads would grow"),
        ),
        (lambda: scale_width(Gemma3Config(), 64), ("has no hidden_size", "that of the text alone")),
        (lambda: shrink(Gemma3Config()), ("has no hidden_size", "that of the text alone")),
    ],
)
def test_what_cannot_be_scaled_is_refused(act, parts):
    with refused(ValueError, *parts):
        act()


@pytest.mark.skipif(
    "gemma4_text" not in CONFIG_MAPPING or not hasattr(CONFIG_MAPPING["gemma4_text"](), "is_heterogeneous"),
    reason="this version of transformers has no layers with sizes of their own",
)
@pytest.mark.parametrize("act", [shrink, lambda config: scale_width(config, 2 * config.hidden_size)])
def test_layers_with_sizes_of_their_own_are_refused(act):
    with refused(
        ValueError, "the layers of gemma4_text have head_dim of their own", "take a model whose layers are alike"
    ):
        act(CONFIG_MAPPING["gemma4_text"]())


def test_small_sizes_keep_the_kind():
    config = Qwen3MoeConfig(
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8
    )
    small = shrink(config, tie_word_embeddings=True)
    assert type(small) is Qwen3MoeConfig
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts",
    )
    assert list(sizes(small, names).values()) == [64, 2, 4, 1, 16, 4]
    assert (small.num_experts_per_tok, small.tie_word_embeddings, config.num_experts) == (2, True, 128)


def test_factors_of_longrope_shrink_with_the_heads():
    """One factor for each pair of a head's features: 48 of the rotated 96 of Phi-4's 128, and 6 of 12 of 16."""
    rope = {"rope_type": "longrope", "long_factor": [1.0] * 48, "short_factor": [1.0] * 48, "rope_theta": 1e4}
    rope |= {"partial_rotary_factor": 0.75}
    config = Phi3Config(
        hidden_size=3072,
        num_attention_heads=24,
        num_key_value_heads=8,
        partial_rotary_factor=0.75,
        rope_parameters=rope,
    )
    small = shrink(config, vocab_size=64, pad_token_id=None)
    assert len(small.rope_parameters["long_factor"]) == len(small.rope_parameters["short_factor"]) == 6
