"""muP rules against tables written by hand, and Granite against plain Llama and Mixtral."""

import copy
import math
import re

import pytest
import torch
from sentences import refused
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_power.compat import IS_4
from hf_power.models import PLAIN_FAMILIES
from hf_power.mup.config import PRESETS, mup_config
from hf_power.mup.init import mup_init_
from hf_power.mup.optimizer import MupAdamW, mup_param_groups
from hf_power.mup.scale import scale_width

BASE = 16  # base width; head size 4 throughout


def llama(width, **kwargs):
    sizes = {"intermediate_size": 3 * width, "num_attention_heads": width // 4, "num_key_value_heads": width // 4}
    return LlamaConfig(**{"vocab_size": 48, "hidden_size": width, "num_hidden_layers": 1} | sizes | kwargs)


def gqa(width, **kwargs):
    return llama(width, num_key_value_heads=width // 8, **kwargs)


def mixtral(width, **kwargs):
    sizes = {"intermediate_size": 3 * width, "num_attention_heads": width // 4, "num_key_value_heads": width // 8}
    sizes |= {"num_local_experts": 4, "max_position_embeddings": 64}
    return MixtralConfig(**{"vocab_size": 48, "hidden_size": width, "num_hidden_layers": 1} | sizes | kwargs)


def build(config, **kwargs):
    return AutoModelForCausalLM.from_config(mup_config(config, **{"base_width": BASE} | kwargs))


LAYER = "model.layers.0."
ATTENTION = {LAYER + f"self_attn.{x}_proj.weight": "hidden" for x in "qkvo"}
NORMS = {LAYER + "input_layernorm.weight": "norm", LAYER + "post_attention_layernorm.weight": "norm"}
NORMS |= {"model.norm.weight": "norm"}
MLP = {LAYER + f"mlp.{x}_proj.weight": "hidden" for x in ("gate", "up", "down")}
TIED = {"model.embed_tokens.weight": "embedding", **ATTENTION, **MLP, **NORMS}
UNTIED = TIED | {"lm_head.weight": "embedding"}
BIASED = UNTIED | {LAYER + f"self_attn.{x}_proj.bias": "bias" for x in "qkvo"}
BIASED |= {LAYER + f"mlp.{x}_proj.bias": "bias" for x in ("gate", "up", "down")}
MOE = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "embedding", **ATTENTION, **NORMS}
MOE |= {LAYER + "block_sparse_moe.router.weight": "router"}
MOE |= {LAYER + f"block_sparse_moe.experts.{x}_proj": "hidden" for x in ("gate_up", "down")}

MODELS = {
    "tied": (llama, {"tie_word_embeddings": True}, TIED),
    "untied": (llama, {}, UNTIED),
    "biased": (llama, {"attention_bias": True, "mlp_bias": True}, BIASED),
    "gqa": (gqa, {}, UNTIED),
    "moe": (mixtral, {}, MOE),
}

# kind: {m: (group, lr / eta, weight decay / wd, eps / eps at base, init std / s)}; 0.7071 is 1 / sqrt(2)
PAPER = {
    "embedding": {1: ("embedding", 1, 1, 1, 1), 2: ("embedding", 1, 1, 0.5, 1), 4: ("embedding", 1, 1, 0.25, 1)},
    "hidden": {1: ("hidden", 1, 1, 1, 1), 2: ("hidden", 0.5, 2, 0.5, 0.5**0.5), 4: ("hidden", 0.25, 4, 0.25, 0.5)},
    "router": {1: ("router", 1, 1, 1, 1), 2: ("router", 0.5, 2, 0.5, 0.5), 4: ("router", 0.25, 4, 0.25, 0.25)},
    "norm": {1: ("vector", 1, 0, 1, None), 2: ("vector", 1, 0, 0.5, None), 4: ("vector", 1, 0, 0.25, None)},
    "bias": {1: ("vector", 1, 0, 1, None), 2: ("vector", 1, 0, 0.5, None), 4: ("vector", 1, 0, 0.25, None)},
}
IBM = {
    "embedding": dict.fromkeys((1, 2, 4), ("embedding", 1, 1, 1, 1)),
    "hidden": {1: ("hidden", 1, 1, 1, 1), 2: ("hidden", 0.5, 1, 1, 0.5**0.5), 4: ("hidden", 0.25, 1, 1, 0.5)},
    "router": {1: ("router", 1, 1, 1, 1), 2: ("router", 0.5, 1, 1, 0.5**0.5), 4: ("router", 0.25, 1, 1, 0.5)},
    "norm": dict.fromkeys((1, 2, 4), ("vector", 1, 0, 1, None)),
    "bias": dict.fromkeys((1, 2, 4), ("vector", 1, 0, 1, None)),
}
RULES = {"paper": PAPER, "power_of_two": PAPER, "ibm": IBM}


def group_of_each(model, **kwargs):
    """Name of each parameter: (group name, lr, weight decay, eps)."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = mup_param_groups(model, lr=0.5, weight_decay=0.125, eps=2.0**-30, **kwargs)
    found = [(names[id(p)], g["name"], g["lr"], g["weight_decay"], g["eps"]) for g in groups for p in g["params"]]
    assert len({row[0] for row in found}) == len(found), "a parameter is in two groups"
    return {name: rest for name, *rest in found}


@pytest.mark.slow
@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_group_and_factors_of_every_parameter(kind, m, preset):
    make, kwargs, expected = MODELS[kind]
    model = build(make(BASE * m, **kwargs), preset=preset)
    assert {name for name, _ in model.named_parameters()} == set(expected)
    rules = {name: RULES[preset][role][m] for name, role in expected.items()}
    assert group_of_each(model) == {
        name: [group, 0.5 * lr, 0.125 * wd, 2.0**-30 * eps] for name, (group, lr, wd, eps, _) in rules.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("preset", RULES)
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_init_of_every_parameter(kind, m, preset):
    """Wide enough to measure: at base width 64, a router of 8 experts has 512 numbers or more."""
    make, kwargs, expected = MODELS[kind]
    if kind == "moe":
        kwargs = kwargs | {"num_local_experts": 32}
    config = make(64 * m, vocab_size=512, num_hidden_layers=2, **kwargs)
    model = build(config, base_width=64, preset=preset)
    for p in model.parameters():
        nn.init.constant_(p, 7.0)
    torch.manual_seed(1)
    assert mup_init_(model) is model
    for name, p in model.named_parameters():
        role = expected[name.replace("layers.1.", "layers.0.")]
        if role in ("norm", "bias"):
            assert torch.equal(p, torch.full_like(p, 1.0 if role == "norm" else 0.0)), name
            continue
        std = 0.1 * RULES[preset][role][m][4]
        if preset == "ibm" and re.search("o_proj|down_proj", name):
            std /= 2.0  # sqrt(2 * 2 layers)
        spread = 5 * std / math.sqrt(2 * p.numel())  # five standard errors
        assert abs(p.std().item() - std) < spread, (name, p.std().item(), std)
        assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name


def test_init_draws_from_the_global_generator_and_every_expert_differs():
    model = build(mixtral(32))
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        mup_init_(model)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*weights, strict=True))
    experts = next(p for p in model.parameters() if p.ndim == 3)
    assert not torch.equal(experts[0], experts[1])


def test_init_leaves_the_padding_row_at_zero():
    model = mup_init_(build(llama(32, pad_token_id=5)))
    zero_rows = (model.get_input_embeddings().weight == 0).all(dim=1)
    assert zero_rows.nonzero().flatten().tolist() == [5]


def test_mlp_width_out_of_proportion_has_its_own_group():
    """Width x 4, MLP x 2 (32 to 64): down_proj has r = 2, everything else r = 4."""
    model = build(llama(64, intermediate_size=64), base_intermediate_size=32)
    groups = group_of_each(model)
    down = LAYER + "mlp.down_proj.weight"
    assert groups.pop(down) == ["hidden_r2", 0.25, 0.25, 2.0**-32]
    hidden = {name: row for name, row in groups.items() if name.endswith("_proj.weight")}
    assert len(hidden) == 6
    assert all(row == ["hidden_r4", 0.125, 0.5, 2.0**-32] for row in hidden.values())
    assert groups["model.norm.weight"] == ["vector", 0.5, 0, 2.0**-32]

    model = build(llama(256, intermediate_size=256), base_width=64, base_intermediate_size=128)
    torch.manual_seed(0)
    std = {name: p.std().item() / 0.1 for name, p in mup_init_(model).named_parameters()}
    assert std[down] == pytest.approx(0.5**0.5, rel=0.02)
    assert std[LAYER + "mlp.up_proj.weight"] == pytest.approx(0.5, rel=0.02)


def test_attention_that_does_not_grow_has_its_own_ratio():
    """16 heads of 4 at width 32 and at 64, as in Qwen3 from .6B to 1.7B: o_proj has the rates of its base."""
    heads = {"head_dim": 4, "num_attention_heads": 16, "num_key_value_heads": 8}
    groups = group_of_each(build(llama(64, **heads), base_width=32, base_attention_width=64))
    assert groups[LAYER + "self_attn.o_proj.weight"] == ["hidden_r1", 0.5, 0.125, 2.0**-31]
    for name in (
        *(f"self_attn.{x}_proj.weight" for x in "qkv"),
        *(f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    ):
        assert groups[LAYER + name] == ["hidden_r2", 0.25, 0.25, 2.0**-31], name
    in_proportion = group_of_each(build(llama(64, **heads), base_width=32))
    assert in_proportion[LAYER + "self_attn.o_proj.weight"] == ["hidden", 0.25, 0.25, 2.0**-31]


@pytest.mark.parametrize("given", [{"base_intermediate_size": 32}, {"base_attention_width": 64}])
def test_preset_ibm_has_one_ratio_for_all_hidden_matrices(given):
    """IBM's code knows no other, so that an argument that asks for one is refused, and one in proportion is not."""
    (name,) = given
    with refused(ValueError, "divides every hidden matrix by the same m = 4", name, "leave"):
        mup_config(llama(64), base_width=BASE, preset="ibm", **given)
    mup_config(llama(64), base_width=BASE, preset="ibm", base_intermediate_size=48, base_attention_width=16)


@pytest.mark.parametrize(("width", "base", "mlp"), [(960, 64, 1408), (1600, 64, 4266), (768, 256, 2048)])
def test_proportional_mlp_shares_one_group_in_spite_of_rounding(width, base, mlp):
    """1408 / (1408 / 15) is not 15 in floating point; two groups of the same name would be the result."""
    with torch.device("meta"):
        model = build(llama(width, intermediate_size=mlp), base_width=base)
    groups = mup_param_groups(model, lr=1.0)
    assert [g["name"] for g in groups] == ["embedding", "hidden", "vector"]


def test_depth_option_is_completep():
    """6 layers over a base of 2: residual multiplier / 3, and eps / 3 more for all inside the blocks.

    Table 1 of arXiv:2505.01618 has one eps for the residual blocks, gains and biases included, and another for the
    embedding and what comes after the blocks.
    """
    for plain in (mixtral(64, num_hidden_layers=6), llama(64, num_hidden_layers=6, attention_bias=True)):
        config = mup_config(plain, base_width=BASE, base_num_layers=2)
        assert config.residual_multiplier == pytest.approx(0.22 / 3)
        deep = group_of_each(AutoModelForCausalLM.from_config(config))
        flat = group_of_each(build(plain))
        assert deep.keys() == flat.keys()
        for name, (group, lr, wd, eps) in flat.items():
            if name == "model.norm.weight":
                group = "vector_outside_blocks"
            if name.startswith("model.layers."):
                eps /= 3
            assert deep[name] == [group, lr, wd, pytest.approx(eps, rel=1e-15)], name


@pytest.mark.parametrize(
    ("preset", "kwargs", "expected"),
    [  # embedding_multiplier, residual_multiplier, initializer_range, attention_multiplier, logits_scaling; head size 4
        ("paper", {}, (12, 0.22, 0.1, 0.25, 4)),
        ("ibm", {}, (12, 0.22, 0.1, 0.25, 4)),
        ("power_of_two", {}, (8, 0.25, 0.1, 0.5, 4)),
        ("power_of_two", {"base_head_dim": 16}, (8, 0.25, 0.1, 1.0, 4)),
        ("paper", {"base_head_dim": 1}, (12, 0.22, 0.1, 0.25, 4)),
        ("paper", {"base_head_dim": 4}, (12, 0.22, 0.1, 0.5, 4)),
        ("paper", {"base_width": 64}, (12, 0.22, 0.1, 0.25, 1)),
        ("paper", {"base_num_layers": 2}, (12, 0.44, 0.1, 0.25, 4)),
        ("ibm", {"embedding_multiplier": 3, "initializer_range": 0.02}, (3, 0.22, 0.02, 0.25, 4)),
        ("paper", {"attention_multiplier": 0.7}, (12, 0.22, 0.1, 0.7, 4)),
    ],
)
def test_multipliers(preset, kwargs, expected):
    config = mup_config(llama(64), **{"base_width": BASE, "preset": preset} | kwargs)
    names = ("embedding_multiplier", "residual_multiplier", "initializer_range", "attention_multiplier")
    assert tuple(getattr(config, x) for x in (*names, "logits_scaling")) == pytest.approx(expected, rel=1e-15)
    assert config.mup["preset"] == preset


@pytest.mark.parametrize(
    ("width", "mlp", "heads", "kv", "layers", "m"), [(1536, 4096, 24, 24, 40, 6), (2304, 9216, 36, 36, 40, 9)]
)
def test_dense_models_of_the_paper(width, mlp, heads, kv, layers, m):
    """Table 4; for PowerLM-3B it prints m = 8, but 2304 / 256 is 9."""
    shape = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": kv}
    config = mup_config(LlamaConfig(num_hidden_layers=layers, **shape))
    assert isinstance(config, GraniteConfig)
    assert (config.logits_scaling, config.attention_multiplier) == (m, 1 / 64)
    assert (config.embedding_multiplier, config.residual_multiplier, config.initializer_range) == (12, 0.22, 0.1)
    assert {k: getattr(config, k) for k in shape} == shape
    assert config.num_hidden_layers == layers


FIELDS = {"vocab_size": 50, "hidden_act": "gelu", "rms_norm_eps": 1e-4, "max_position_embeddings": 77}
FIELDS |= {"tie_word_embeddings": True, "attention_dropout": 0.25}
FIELDS |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 123.0}, "pad_token_id": 3}
FIELDS |= {"eos_token_id": [4, 5], "use_cache": False, "dtype": torch.bfloat16}
LLAMA_ONLY = {"attention_bias": True, "mlp_bias": True}
MIXTRAL_ONLY = {"num_experts_per_tok": 3, "output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize(("make", "extra"), [(llama, LLAMA_ONLY), (mixtral, MIXTRAL_ONLY)])
def test_everything_else_is_carried_over_and_the_input_is_untouched(make, extra):
    plain = make(32, **FIELDS | extra)
    before = copy.deepcopy(plain.to_dict())
    config = mup_config(plain, base_width=BASE)
    assert {k: getattr(config, k) for k in FIELDS | extra} == FIELDS | extra
    config.rope_parameters["rope_theta"] = 0.0
    assert plain.to_dict() == before


@pytest.mark.parametrize("make", [llama, mixtral])
def test_chosen_attention_is_carried_over(make):
    """config.to_dict() leaves it out."""
    assert mup_config(make(32, attn_implementation="eager"), base_width=BASE)._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (llama, {}),
        (llama, {"head_dim": 12}),
        pytest.param(
            mixtral, {"head_dim": 12}, marks=pytest.mark.skipif(IS_4, reason="refused, as GraniteMoe leaves it out")
        ),
    ],
)
def test_config_json_round_trip(make, kwargs, tmp_path):
    config = mup_config(make(32, **kwargs), base_width=BASE, base_num_layers=3, preset="ibm")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert loaded.mup == {
        "preset": "ibm",
        "plain_model_type": make(32).model_type,
        "base_width": 16,
        "base_intermediate_size": 48,
        "base_attention_width": 2 * kwargs.get("head_dim", 4) * 8 / 4 if "head_dim" in kwargs else 16,
        "base_head_dim": kwargs.get("head_dim", 4),
        "base_num_layers": 3,
    }
    model = AutoModelForCausalLM.from_config(loaded)
    rows = model.get_parameter(LAYER + "self_attn.q_proj.weight").shape[0]
    assert rows == 8 * kwargs.get("head_dim", 4)
    assert group_of_each(model) == group_of_each(AutoModelForCausalLM.from_config(config))


NEUTRAL = {"embedding_multiplier": 1, "residual_multiplier": 1, "initializer_range": 0.02}


def neutral(plain):
    head_dim = plain.head_dim or plain.hidden_size // plain.num_attention_heads
    return mup_config(plain, base_width=plain.hidden_size, attention_multiplier=head_dim**-0.5, **NEUTRAL)


@pytest.mark.parametrize(
    "plain",
    [
        llama(32, num_hidden_layers=2),
        llama(32, num_hidden_layers=2, tie_word_embeddings=True),
        gqa(32, num_hidden_layers=2, attention_bias=True, mlp_bias=True),
        llama(32, num_hidden_layers=2, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ],
    ids=("untied", "tied", "gqa_biased", "head_dim"),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_granite_with_neutral_multipliers_is_llama_bit_for_bit(plain, dtype):
    torch.manual_seed(0)
    there = AutoModelForCausalLM.from_config(plain).to(dtype).eval()
    for p in there.parameters():
        nn.init.normal_(p, std=0.3)
    here = AutoModelForCausalLM.from_config(neutral(plain)).to(dtype).eval()
    here.load_state_dict(there.state_dict())  # strict: the names are the same
    ids = torch.randint(0, 48, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    logits = there(ids, attention_mask=mask).logits
    assert logits.std() > 0.1
    assert torch.equal(here(ids, attention_mask=mask).logits, logits)


# What GraniteMoe and Mixtral call a part of a mixture up to transformers 5.12, and what both call it since.
OLDER = {"input_linear.weight": "experts.gate_up_proj", "output_linear.weight": "experts.down_proj"}
OLDER |= {"router.layer.weight": "router.weight"}


def fused(state):
    """Mixtral's tensors under GraniteMoe's names of today, with the experts in one tensor, which transformers 4 has one by one."""
    found, single = {}, {}
    for name, tensor in state.items():
        name = name.replace("mlp.", "block_sparse_moe.").replace("moe.gate.", "moe.router.")
        layer, one_by_one, rest = name.partition("experts.")
        if one_by_one and rest.count("."):
            i, which, _ = rest.split(".")
            single[layer, int(i), which] = tensor
        else:
            found[name] = tensor
    for layer in {layer for layer, _, _ in single}:
        for part, own in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
            experts = [torch.cat([single[layer, i, which] for which in own]) for i in range(4)]
            found[f"{layer}experts.{part}"] = torch.stack(experts)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_granitemoe_with_neutral_multipliers_is_mixtral(tied):
    torch.manual_seed(0)
    plain = mixtral(32, num_hidden_layers=2, tie_word_embeddings=tied)
    there = AutoModelForCausalLM.from_config(plain).eval()
    for p in there.parameters():
        nn.init.normal_(p, std=0.3)
    config = neutral(plain)
    assert isinstance(config, GraniteMoeConfig)
    here = AutoModelForCausalLM.from_config(config).eval()
    state = fused(there.state_dict())
    for name in here.state_dict():
        layer, _, part = name.rpartition("block_sparse_moe.")
        if part in OLDER:
            state[name] = state.pop(f"{layer}block_sparse_moe.{OLDER[part]}")
    here.load_state_dict(state)
    ids = torch.randint(0, 48, (3, 11))
    logits = there(ids).logits
    torch.testing.assert_close(here(ids).logits, logits, rtol=1e-4, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_in_one_group_in_a_fixed_order(kind):
    make, kwargs, _ = MODELS[kind]
    models = [build(make(64, num_hidden_layers=3, **kwargs)) for _ in range(2)]
    groups = [mup_param_groups(model, lr=1.0) for model in models]
    expected = ["embedding", "hidden", "router", "vector"] if kind == "moe" else ["embedding", "hidden", "vector"]
    layout = []
    for model, rows in zip(models, groups, strict=True):
        name_of = {id(p): name for name, p in model.named_parameters()}
        layout.append([[name_of.pop(id(p)) for p in group["params"]] for group in rows])
        assert not name_of, "left out"
    assert layout[0] == layout[1]
    for rows in groups:
        assert [g["name"] for g in rows] == expected
        assert rows[0]["lr"] == 1.0


def test_group_0_has_the_base_rate_when_the_embeddings_are_frozen():
    """The Trainer logs group 0, as the base learning rate."""
    model = build(llama(64, tie_word_embeddings=True))
    model.get_input_embeddings().requires_grad_(False)
    groups = mup_param_groups(model, lr=1.0)
    assert sum(len(g["params"]) for g in groups) == len(TIED) - 1
    assert not any(p is model.get_input_embeddings().weight for g in groups for p in g["params"])
    assert groups[0]["lr"] == 1.0


@pytest.mark.parametrize("act", [lambda m: mup_param_groups(m, lr=1.0), mup_init_])
@pytest.mark.parametrize("shape", [(32, 32), (32,)])
def test_unknown_tensor_is_an_error(act, shape):
    model = build(llama(32))
    model.model.layers[0].self_attn.adapter = nn.Parameter(torch.ones(shape))
    before = copy.deepcopy(model.state_dict())
    with refused(ValueError, f"no muP rule for the tensor {LAYER}self_attn.adapter of shape {shape}", "freeze it"):
        act(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_init_refuses_a_model_with_lora_before_it_changes_anything():
    """The layout of peft: the matrix moves into base_layer, and two small ones come beside it."""
    model = build(llama(32))
    attention = model.model.layers[-1].self_attn
    adapted = nn.Module()
    adapted.base_layer, adapted.lora_A = attention.q_proj.requires_grad_(False), nn.Linear(32, 4, bias=False)
    attention.q_proj = adapted
    wrapped = nn.Module()
    wrapped.base_model, wrapped.config = model, model.config
    before = copy.deepcopy(wrapped.state_dict())
    with refused(ValueError, "no muP rule for the tensor base_model.model.layers.0.self_attn.q_proj.lora_A.weight"):
        mup_init_(wrapped)
    assert all(torch.equal(before[name], value) for name, value in wrapped.state_dict().items())


def test_unknown_tensor_that_is_frozen_is_left_alone():
    """As the error says: freeze it."""
    model = build(llama(32))
    model.model.layers[0].self_attn.adapter = nn.Parameter(torch.ones(3), requires_grad=False)
    assert len(mup_param_groups(model, lr=1.0)) == 3
    mup_init_(model)
    assert torch.equal(model.model.layers[0].self_attn.adapter, torch.ones(3))


def losses_of(model, groups, num_steps=20):
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(num_steps):
        ids = torch.randint(0, 48, (4, 12), generator=generator)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("plain", [llama(32), gqa(32, tie_word_embeddings=True), llama(32, mlp_bias=True)])
def test_at_base_width_mup_trains_as_plain_llama_does(plain):
    """20 steps of AdamW, loss for loss: Granite in groups, Granite in one group, Llama in one group."""
    torch.manual_seed(0)
    here = mup_init_(AutoModelForCausalLM.from_config(neutral(plain)))
    twin, there = copy.deepcopy(here), AutoModelForCausalLM.from_config(plain)
    there.load_state_dict(here.state_dict())
    losses = losses_of(here, mup_param_groups(here, lr=0.01))
    assert losses[-1] != losses[0]
    assert losses == losses_of(twin, twin.parameters()) == losses_of(there, there.parameters())


def test_away_from_base_width_the_groups_matter():
    """The control of the test above: at m = 2 one group trains differently."""
    torch.manual_seed(0)
    here = mup_init_(build(llama(32)))
    twin = copy.deepcopy(here)
    assert losses_of(here, mup_param_groups(here, lr=0.01))[1:] != losses_of(twin, twin.parameters())[1:]


class RateLog(TrainerCallback):
    def __init__(self):
        self.used, self.logged = [], []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.used.append({g["name"]: g["lr"] for g in optimizer.param_groups})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "learning_rate" in logs:
            self.logged.append(logs["learning_rate"])


@pytest.mark.slow
def test_adamw_in_a_trainer_under_the_power_schedule(tmp_path):
    args = TrainingArguments(
        str(tmp_path),
        lr_scheduler_type="power",
        lr_scheduler_kwargs={"a": 0.02},
        learning_rate=0.02,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.9,
        adam_epsilon=1e-6,
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        use_cpu=True,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        ignore_data_skip=True,
    )
    data = [{"input_ids": list(range(i, i + 16)), "labels": list(range(i, i + 16))} for i in range(16)]
    logs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        torch.manual_seed(0)
        log, model = RateLog(), mup_init_(build(mixtral(64)))
        pair = MupAdamW.for_trainer(args)
        trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=pair, callbacks=[log])
        trainer.train(resume_from_checkpoint=resume)
        logs.append(log)
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.02, (0.8, 0.9))
    rows = {g["name"]: (g["weight_decay"], g["eps"], g["betas"]) for g in optimizer.param_groups}
    assert rows == {
        "embedding": (0.1, 1e-6 / 4, (0.8, 0.9)),
        "hidden": (0.4, 1e-6 / 4, (0.8, 0.9)),
        "router": (0.4, 1e-6 / 4, (0.8, 0.9)),
        "vector": (0.0, 1e-6 / 4, (0.8, 0.9)),
    }
    factor = {"embedding": 1, "hidden": 1 / 4, "router": 1 / 4, "vector": 1}
    eta = [min(0.02, 0.02 * 32 / 4096 * (32 * k) ** -0.51) if k else 0.02 for k in range(6)]
    for step, used in enumerate(logs[0].used):  # the tail begins at token 173, after the last step has begun
        for name, lr in used.items():
            assert lr == pytest.approx(eta[step] * factor[name], rel=1e-12), (step, name)
            assert lr == used["embedding"] * factor[name]  # exact: a power of two
    assert logs[1].used == logs[0].used[3:]
    assert logs[0].logged == [used["embedding"] for used in logs[0].used]


def test_adamw_defaults_and_unknown_models():
    model = build(llama(32))
    optimizer = MupAdamW()(model, lr=0.02, weight_decay=0.1)
    assert optimizer.defaults["lr"] == 0.02
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("embedding", 0.02, 0.1),
        ("hidden", 0.01, 0.2),
        ("vector", 0.02, 0.0),
    ]


def test_scale_width_keeps_the_shape():
    plain = LlamaConfig(hidden_size=2304, intermediate_size=9216, num_attention_heads=36, num_key_value_heads=12)
    before = copy.deepcopy(plain.to_dict())
    small = scale_width(plain, 192)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    assert [getattr(small, x) for x in sizes] == [192, 768, 3, 1, 64]
    assert all(type(getattr(small, x)) is int for x in sizes)
    assert plain.to_dict() == before
    assert {k for k in before if small.to_dict()[k] != before[k]} == set(sizes) - {"head_dim"}
    assert scale_width(small, 2304).to_dict() == before


def test_scale_width_keeps_a_head_size_of_its_own_and_of_mixtral():
    assert scale_width(llama(32, head_dim=12), 64).head_dim == 12
    wide = scale_width(mixtral(32), 64)
    assert (wide.head_dim, wide.num_attention_heads, wide.num_key_value_heads) == (4, 16, 8)


@pytest.mark.parametrize(
    ("width", "heads", "to", "to_heads"), [(1600, 25, 448, 7), (960, 15, 704, 11), (1408, 22, 960, 15)]
)
def test_scale_width_does_not_trip_over_rounding(width, heads, to, to_heads):
    """25 * (448 / 1600) is not 7 in floating point."""
    plain = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_attention_heads=heads, num_key_value_heads=heads
    )
    wide = scale_width(plain, to)
    assert (wide.num_attention_heads, wide.intermediate_size) == (to_heads, 4 * to)


@pytest.mark.parametrize(
    ("plain", "to", "parts"),
    [
        (llama(32), 30, ("num_attention_heads 8 of width 32 would become 7.5 at width 30", "steps of the head size 4")),
        (gqa(32), 4, ("num_key_value_heads 4 of width 32 would become 0.5 at width 4", "keep it whole")),
        (llama(32, intermediate_size=33), 16, ("intermediate_size 33 of width 32 would become 16.5", "choose widths")),
        (llama(32), 0, ("hidden_size 32 of width 32 would become 0 at width 0",)),
    ],
)
def test_scale_width_refuses_what_does_not_divide(plain, to, parts):
    with refused(ValueError, *parts):
        scale_width(plain, to)


def changed(config, **kwargs):
    """Attributes that the config's own constructor would refuse."""
    for name, value in kwargs.items():
        setattr(config, name, value)
    return config


ERRORS = (  # config, arguments; what, got, what to do
    (GPT2Config(), {}, "no muP rule for model_type 'gpt2'", "use one of llama, mixtral", "LlamaConfig, MixtralConfig"),
    (GraniteConfig(), {}, "no muP rule for model_type 'granite'", "use one of llama, mixtral"),
    (llama(32), {"preset": "yang"}, "preset must be one of paper, ibm, power_of_two", "got 'yang'"),
    (llama(32), {"base_width": 0}, "base_width must be a positive number", "got 0"),
    (llama(32), {"base_width": -256}, "base_width must be a positive number", "got -256"),
    (mixtral(32, num_attention_heads=5, num_key_value_heads=5), {}, "hidden_size 32 is not a multiple", "heads 5"),
    (llama(32, num_key_value_heads=3), {}, "num_attention_heads 8 is not a multiple", "key_value_heads 3", "change"),
    (mixtral(32, sliding_window=64), {}, "sliding_window=64 has no counterpart in Granite", "set it to None or 0"),
    (mixtral(32, router_jitter_noise=0.1), {}, "router_jitter_noise=0.1 has no counterpart", "set it to None or 0"),
    (llama(32, pretraining_tp=2), {}, "pretraining_tp=2 has no counterpart in Granite", "set it to 1"),
    (mup_config(llama(32)), {}, "has been through mup_config already", "pass the Llama or Mixtral config"),
)


@pytest.mark.parametrize(("config", "kwargs", "parts"), [(row[0], row[1], row[2:]) for row in ERRORS])
def test_errors(config, kwargs, parts):
    with refused(ValueError, *parts):
        mup_config(config, **kwargs)


@pytest.mark.parametrize("act", [lambda m: mup_param_groups(m, lr=1.0), lambda m: MupAdamW()(m, lr=1.0)])
@pytest.mark.parametrize("make", [lambda: AutoModelForCausalLM.from_config(llama(32)), lambda: nn.Linear(2, 2)])
def test_model_without_mup_is_refused(act, make):
    model = make()
    with refused(ValueError, f"{type(model).__name__} was not made under muP", "mup_init_(model, base_width="):
        act(model)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AutoModelForCausalLM.from_config(llama(32)), "mup_init_ needs the base of LlamaForCausalLM"),
        (lambda: nn.Linear(2, 2), "mup_init_ takes a model of transformers for causal language modeling, got Linear"),
    ],
)
def test_what_cannot_be_initialized_under_mup_is_refused(make, said):
    with refused(ValueError, said):
        mup_init_(make())


def test_presets_are_those_of_the_paper_and_powers_of_two():
    assert PRESETS["paper"] == {"embedding_multiplier": 12, "residual_multiplier": 0.22, "initializer_range": 0.1}
    exact = PRESETS["power_of_two"]
    assert all(math.frexp(exact[x])[0] == 0.5 for x in ("embedding_multiplier", "residual_multiplier"))
    assert PLAIN_FAMILIES == ("llama", "mixtral")
