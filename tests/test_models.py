import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

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
