"""Coordinate check: the slope, the verdict, the models that must pass and the controls that must fail."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig

from hf_power import mup_init_, mup_param_groups
from hf_power.coordinates import MAX_SLOPE, CoordCheck, coord_check

pytestmark = pytest.mark.slow  # together


def llama(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "num_key_value_heads": 4, "tie_word_embeddings": False, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 4, "sliding_window": None}
    return MixtralConfig(**{**sizes, **experts, "tie_word_embeddings": False, **changes})


def power_law(exponents: dict[str, float], widths: tuple[int, ...] = (64, 128, 256, 512)) -> CoordCheck:
    rows = [
        {"module": module, "step": step, "width": width, "change": 0.3 * step * width**exponent}
        for module, exponent in exponents.items()
        for step in (1, 2)
        for width in widths
    ]
    return CoordCheck(rows)


class StandardParametrization:
    """One learning rate, one init std, none of the multipliers."""

    multipliers = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 16**-0.5}

    @staticmethod
    def init(model: Any) -> None:
        mup_init_(model)
        for tensor in model.parameters():
            if tensor.dim() > 1:
                nn.init.normal_(tensor, std=0.02)
        model.config.logits_scaling = 1.0

    @staticmethod
    def groups(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": list(model.parameters())}]


def groups_with_rate(model: nn.Module, lr: float, weight_decay: float, part: str, rate: float) -> list[dict[str, Any]]:
    """muP's groups, but for the tensors that have `part` in their name."""
    own = [tensor for name, tensor in model.named_parameters() if part in name]
    groups = mup_param_groups(model, lr=lr, weight_decay=weight_decay)
    for group in groups:
        group["params"] = [tensor for tensor in group["params"] if all(tensor is not o for o in own)]
    return [*groups, {"params": own, "lr": rate}]


def groups_without_experts(model: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return groups_with_rate(model, lr, weight_decay, ".experts.", lr)


def groups_with_head_twice(model: Any, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return groups_with_rate(model, lr, weight_decay, "lm_head", lr / model.config.logits_scaling)


def slope(check: CoordCheck, module: str, step: int = 1) -> float:
    return next(float(s["slope"]) for s in check.slopes if s["module"] == module and s["step"] == step)


@pytest.mark.parametrize("exponent", [-1.0, -0.5, 0.0, 0.2, 1.6])
def test_slope_is_the_exponent_of_a_power_law(exponent: float) -> None:
    check = power_law({"mlp": exponent})
    assert [s["slope"] for s in check.slopes] == pytest.approx([exponent, exponent])
    assert check.passed == (abs(exponent) < MAX_SLOPE)


def test_worst_is_the_slope_farthest_from_zero_on_either_side() -> None:
    check = power_law({"mlp": 0.1, "logits": -0.2, "router": 0.05})
    assert check.passed
    assert check.worst["module"] == "logits"


@pytest.mark.parametrize("change", [0.0, math.nan, math.inf])
def test_a_change_without_a_logarithm_fails(change: float) -> None:
    check = power_law({"mlp": 0.0, "logits": 1.0})
    check.rows[0]["change"] = change
    assert not check.passed
    assert check.worst["module"] == "mlp"
    assert math.isnan(check.worst["slope"])
    assert "nan" in check.table()


def test_table_has_every_slope_and_the_verdict() -> None:
    assert power_law({"layer 0 mlp": 0.1, "logits": -1.0}).table() == (
        "| module      | step 1    | step 2    |\n"
        "|-------------|----------:|----------:|\n"
        "| layer 0 mlp |     +0.10 |     +0.10 |\n"
        "| logits      | **-1.00** | **-1.00** |\n"
        "\n"
        "FAILED: worst slope -1.00 (logits, step 1), limit 0.25, widths 64, 128, 256, 512"
    )
    assert power_law({"mlp": 0.1}).verdict.startswith("passed: worst slope +0.10 (mlp, step ")


def test_dense_passes_and_every_module_is_measured() -> None:
    check = coord_check(llama())
    assert check.passed, check.table()
    layers = [f"layer {i} {part}" for i in (0, 1) for part in ("attention", "mlp")]
    assert list(dict.fromkeys(row["module"] for row in check.rows)) == ["embedding", *layers, "final norm", "logits"]
    assert {(row["step"], row["width"]) for row in check.rows} == {
        (s, w) for s in (1, 2, 3, 4) for w in (64, 128, 256, 512)
    }


def test_standard_parametrization_fails() -> None:
    sp = StandardParametrization
    check = coord_check(llama(), init=sp.init, param_groups=sp.groups, steps=1, **sp.multipliers)
    assert not check.passed
    assert check.worst["slope"] > 1.0, check.table()
    assert slope(check, "logits") > 0.5, check.table()


def test_head_counted_twice_fails_in_the_logits_alone() -> None:
    check = coord_check(llama(), param_groups=groups_with_head_twice, steps=1)
    assert not check.passed
    assert slope(check, "logits") < -0.35, check.table()
    assert all(abs(s["slope"]) < MAX_SLOPE for s in check.slopes if s["module"] != "logits")


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [llama(num_key_value_heads=2), llama(num_key_value_heads=1), llama(tie_word_embeddings=True), mixtral()],
    ids=["gqa2", "gqa4", "tied", "moe"],
)
def test_other_models_pass(config: Any) -> None:
    check = coord_check(config, steps=2)
    assert check.passed, check.table()


def test_moe_measures_router_and_experts() -> None:
    check = coord_check(mixtral(), widths=(64, 128, 192, 256), steps=1, seeds=(0,))
    assert {"layer 0 router", "layer 0 moe", "layer 1 router", "layer 1 moe"} <= {row["module"] for row in check.rows}


@pytest.mark.slow
def test_experts_left_out_fails() -> None:
    check = coord_check(mixtral(), param_groups=groups_without_experts, steps=1)
    assert not check.passed
    assert slope(check, "layer 0 moe") > 1.0, check.table()


def test_hidden_init_without_width_fails() -> None:
    def same_init_at_every_width(model: Any) -> None:
        mup_init_(model)
        for name, tensor in model.named_parameters():
            if "_proj" in name:
                nn.init.normal_(tensor, std=model.config.initializer_range)

    check = coord_check(llama(), init=same_init_at_every_width, steps=1)
    assert not check.passed
    assert slope(check, "layer 0 mlp") > 0.5, check.table()


def test_global_random_state_is_left_alone_and_results_repeat() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    few: dict[str, Any] = {"widths": (64, 80, 96, 112), "steps": 1, "seeds": (0,)}
    first, second = coord_check(llama(), **few), coord_check(llama(), **few)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.rows == second.rows


def test_config_is_not_changed_and_its_special_tokens_do_not_matter() -> None:
    config = llama(vocab_size=32000, pad_token_id=31999, eos_token_id=31998)
    before = config.to_dict()
    coord_check(config, widths=(64, 80, 96, 112), steps=1, seeds=(0,))
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (64, 128, 128, 256)}, "a slope needs at least 4 different widths, got [64, 128, 256]: add widths."),
        ({"steps": 0}, "steps must be from 1 to 10, got 0: choose a number in that range."),
        ({"steps": 11}, "steps must be from 1 to 10, got 11: choose a number in that range."),
        ({"seeds": ()}, "seeds must hold at least one seed, got none: pass for example seeds=(0, 1, 2)."),
        ({"vocab_size": 1}, "vocab_size must be at least 2, got 1: the default is 64."),
    ],
)
def test_errors_are_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        coord_check(llama(), **arguments)
    assert str(caught.value) == message


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="choose widths in steps of the head size 16"):
        coord_check(llama(), widths=(64, 100, 128, 256))
