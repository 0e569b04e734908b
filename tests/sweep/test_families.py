"""The families of STOCK_BLOCKS compute on a block what the faster passes and the stacked form of a sweep take them to compute."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_power.models import FAMILIES, STOCK_BLOCKS, attends_to_all
from hf_power.pretrain.speed import ATTENTION, attend_to_blocks_, chunk_loss_
from hf_power.sweep.cost import Estimate, GroupCost, estimate_text
from hf_power.sweep.stacked import can_be_stacked, stack

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
SHAPE |= {"num_key_value_heads": 2, "pad_token_id": None, "sliding_window": None}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
OWN = {
    **{kind: {"head_dim": 16} for kind in ("qwen3", "glm4", "ernie4_5")},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "deepseek_v3": {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 48, "head_dim": 8},
}
WITHOUT_STACK = ("gpt_neox", "qwen3_moe", "olmoe", "deepseek_v3")


def models(kind):
    """Two models of the family whose gains are not 1, so that nothing about them is taken for granted."""
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **OWN.get(kind, {})}))
        with torch.no_grad():
            for tensor in (p for p in model.parameters() if p.ndim == 1):
                tensor.add_(0.1 * torch.randn_like(tensor))
        made.append(model.eval())
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in STOCK_BLOCKS if kind not in FAMILIES])
def test_a_family_of_stock_blocks(kind):
    two, ids = models(kind), torch.randint(4, 300, (4, 24))
    with torch.no_grad():
        expected = torch.cat([model(input_ids=part).logits for model, part in zip(two, ids.split(2), strict=True)])
    told = [attend_to_blocks_(copy.deepcopy(model)) for model in two]
    assert told[0].config._attn_implementation == ATTENTION
    with torch.no_grad():
        assert torch.allclose(told[0](input_ids=ids[:2]).logits, expected[:2], atol=1e-6)
    losses = [
        model(input_ids=ids, labels=ids).loss for model in (two[0], chunk_loss_(copy.deepcopy(two[0]).train(), 4))
    ]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    assert can_be_stacked(told[0]) == (kind not in WITHOUT_STACK)
    if kind not in WITHOUT_STACK:
        with torch.no_grad():
            assert torch.allclose(stack(told)[0](input_ids=ids).logits, expected, atol=1e-5)


def test_windows_and_other_families_take_the_stock_path():
    """Gemma3 has windows, and a gain of 1 + weight that the stacked norm would take for the weight."""
    gemma = AutoConfig.for_model("gemma3_text", **{**SHAPE, "head_dim": 16, "sliding_window": 8})
    assert not attends_to_all(gemma)
    model = attend_to_blocks_(AutoModelForCausalLM.from_config(gemma))
    assert model.config._attn_implementation == "sdpa"
    assert not can_be_stacked(model)
    windows = AutoConfig.for_model("mistral", **{**SHAPE, "sliding_window": 8})
    assert not attends_to_all(windows)
    assert not can_be_stacked(AutoModelForCausalLM.from_config(windows))


def test_the_cost_says_what_is_trained_one_after_another():
    group = GroupCost("g", 1, 10, 10, 1.0, 1.0, 1, stackable=False)
    assert "one after another" in estimate_text(Estimate.of([group], 1))
