import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MixtralConfig

from hf_power import mup_config
from hf_power.models import count_parameters, flops_per_token

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 300}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def shapes():
    for tied in (True, False):
        for plain in (
            LlamaConfig(**SHAPE, tie_word_embeddings=tied),
            MixtralConfig(**SHAPE, **EXPERTS, tie_word_embeddings=tied),
        ):
            yield plain
            yield mup_config(plain, base_width=32)


@pytest.mark.slow
@pytest.mark.parametrize("config", list(shapes()), ids=lambda c: f"{c.model_type}-{c.tie_word_embeddings}")
def test_flops_are_those_that_torch_counts(config):
    """Forward and backward of the real model; torch counts all pairs of positions, a causal token has half of them."""
    config._attn_implementation = config._experts_implementation = "eager"  # whose products torch's counter knows
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 300, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    causal_half = 6 * 3 * 64 * 48
    assert flops_per_token(config, 48) == pytest.approx(counter.get_total_flops() / 96 - causal_half, rel=1e-3)


OTHERS = {
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 96},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    "gpt_oss": {**EXPERTS, "head_dim": 16},
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    }
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48}
    | {"first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sizes"), OTHERS.items(), ids=list(OTHERS))
def test_flops_of_other_families_are_those_that_torch_counts(kind, sizes):
    """Latent attention has scores of 24 features and values of 12; shared experts, biases and projections are in it too."""
    shape = {"vocab_size": 300} if kind == "gpt2" else SHAPE
    config = AutoConfig.for_model(kind, **{**shape, "pad_token_id": None, **sizes})
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(300, (2, 48))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    heads = 4 * {"deepseek_v3": 18, "qwen3": 32}.get(kind, 16)
    causal_half = 6 * 3 * heads * 48
    assert flops_per_token(config, 48) == pytest.approx(counter.get_total_flops() / 96 - causal_half, rel=1e-6)


def test_a_window_costs_what_is_in_it():
    """A token attends to w - w**2 / (2 * block) earlier ones on average, here 16 - 2.67 instead of 24, in half of the layers."""
    sizes = {**SHAPE, "head_dim": 16, "num_hidden_layers": 2}
    whole, windows = (AutoConfig.for_model("gemma2", **sizes, sliding_window=w) for w in (48, 16))
    saved = 6 * 64 * 2 * (24 - (16 - 16**2 / 96))
    assert flops_per_token(whole, 48) - flops_per_token(windows, 48) == pytest.approx(saved)


def test_flops_of_a_llama_by_hand():
    """Per layer q and o 64 x 64, k and v 64 x 32, MLP 3 x 64 x 96; head 64 x 300; attention 4 heads x 16 x 128."""
    matrices = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) + 64 * 300
    assert flops_per_token(LlamaConfig(**SHAPE), 128) == 6 * matrices + 6 * 3 * 64 * 128


@pytest.mark.parametrize("config", list(shapes()), ids=lambda c: f"{c.model_type}-{c.tie_word_embeddings}")
def test_parameters_without_memory_are_those_of_the_model(config):
    model, counted = AutoModelForCausalLM.from_config(config), count_parameters(config)
    assert counted["parameters"] == sum(p.numel() for p in model.parameters())
    assert counted["parameters_without_embeddings"] == model.num_parameters(exclude_embeddings=True)
    idle = 3 * 3 * 2 * 64 * 96 if hasattr(config, "num_local_experts") else 0  # two of four experts in three layers
    assert counted["active_parameters"] == counted["parameters"] - idle
