"""The plain form of muP: roles, factors by hand, what is refused before anything is changed, and what travels along."""

import copy
import math
import re
import warnings

import pytest
import torch
from sentences import refused
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    LlamaConfig,
    MambaConfig,
    Olmo2Config,
    OlmoConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_power import coord_check, mup_init_, mup_param_groups
from hf_power.mup.optimizer import factors_of
from hf_power.records.errors import UserError

SIZES = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "max_position_embeddings": 32}


def qwen3(**changes):
    return Qwen3Config(**SIZES | {"head_dim": 16} | changes)


def gemma2(**changes):
    return Gemma2Config(**SIZES | {"head_dim": 16} | changes)


def gpt2():
    return GPT2Config(vocab_size=48, n_embd=64, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1)


def qwen2_moe():
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    return Qwen2MoeConfig(**SIZES, num_experts_per_tok=2, tie_word_embeddings=False, **experts)


def gpt_oss():
    experts = {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return GptOssConfig(**SIZES | {"head_dim": 16}, tie_word_embeddings=False, **experts)


def deepseek():
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    }
    more = {"first_k_dense_replace": 0, "tie_word_embeddings": False, "num_key_value_heads": 4}
    return DeepseekV3Config(**SIZES | ranks | experts | more)


def build(config, base_width=16, **kwargs):
    torch.manual_seed(0)
    return mup_init_(AutoModelForCausalLM.from_config(config), base_width=base_width, **kwargs)


# Up to transformers 4 a mixture has the matrices of each expert by themselves.
ONE_BY_ONE = re.compile(r"mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")
FUSED = {"gate": "mlp.experts.gate_up_proj", "up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}


def rows(model):
    """(lr, weight decay, eps) of each tensor, over the base's; None for the std of what is no matrix."""
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    found, stds = {}, factors_of(model)
    for group in mup_param_groups(model, lr=1.0, weight_decay=1.0, eps=1.0):
        for tensor in group["params"]:
            name = names.pop(id(tensor))
            std = stds[name].std
            row = (None if std is None else 1 / std, group["lr"], group["weight_decay"], group["eps"])
            short = name.replace("model.layers.0.", "").replace("transformer.h.0.", "")
            short = ONE_BY_ONE.sub(lambda match: FUSED[match[1]], short)
            assert found.setdefault(short, row) == row
    assert not names, "left out"
    return found


# m = 4: std / s, lr / eta, weight decay / wd, eps / eps at base.
EMBEDDING, HIDDEN, ROUTER = (1, 1, 1, 1 / 4), (1 / 2, 1 / 4, 4, 1 / 4), (1 / 4, 1 / 4, 4, 1 / 4)
HEAD, VECTOR, CONSTANT = (1 / 4, 1 / 4, 4, 1), (None, 1, 0, 1 / 4), (None, 1, 0, 1)
ATTENTION = {f"self_attn.{x}_proj.weight": HIDDEN for x in "qkvo"}
MLP = {f"mlp.{x}_proj.weight": HIDDEN for x in ("gate", "up", "down")}
NORMS = {"input_layernorm.weight": VECTOR, "post_attention_layernorm.weight": VECTOR}
QWEN3 = {"model.embed_tokens.weight": EMBEDDING, **ATTENTION, **MLP, **NORMS}
QWEN3 |= {"self_attn.q_norm.weight": CONSTANT, "self_attn.k_norm.weight": CONSTANT}
POST = {"pre_feedforward_layernorm.weight": VECTOR, "post_feedforward_layernorm.weight": VECTOR}
GEMMA2 = {"model.embed_tokens.weight": (1 / 2, 1 / 2, 2, 1 / 2), **ATTENTION, **MLP, **NORMS, **POST}
GPT2 = {"transformer.wte.weight": EMBEDDING, "transformer.wpe.weight": EMBEDDING}
GPT2 |= {f"{x}.weight": HIDDEN for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
GPT2 |= {f"{x}.bias": VECTOR for x in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2")}
GPT2 |= {"ln_1.weight": VECTOR, "ln_2.weight": VECTOR}
FINAL = (None, 1 / 4, 0, 1)  # c = 1 / 4 in a gain: eps / m / c
GPT2 |= {"transformer.ln_f.weight": FINAL, "transformer.ln_f.bias": FINAL}
MOE = {
    "model.embed_tokens.weight": EMBEDDING,
    "lm_head.weight": HEAD,
    "model.norm.weight": VECTOR,
    **ATTENTION,
    **NORMS,
}
QWEN2_MOE = MOE | {f"self_attn.{x}_proj.bias": VECTOR for x in "qkv"}
QWEN2_MOE |= {"mlp.gate.weight": ROUTER, "mlp.shared_expert_gate.weight": ROUTER}
QWEN2_MOE |= {"mlp.experts.gate_up_proj": HIDDEN, "mlp.experts.down_proj": HIDDEN}
QWEN2_MOE |= {f"mlp.shared_expert.{x}_proj.weight": HIDDEN for x in ("gate", "up", "down")}
GPT_OSS = MOE | {f"self_attn.{x}_proj.bias": VECTOR for x in "qkvo"} | {"self_attn.sinks": VECTOR}
GPT_OSS |= {"mlp.router.weight": ROUTER, "mlp.router.bias": CONSTANT}
GPT_OSS |= {f"mlp.experts.{x}_proj": HIDDEN for x in ("gate_up", "down")}
GPT_OSS |= {f"mlp.experts.{x}_proj_bias": VECTOR for x in ("gate_up", "down")}
MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
DEEPSEEK = {name: row for name, row in MOE.items() if "self_attn" not in name}
DEEPSEEK |= {f"self_attn.{x}.weight": HIDDEN for x in MLA}
DEEPSEEK |= {"self_attn.q_a_layernorm.weight": VECTOR, "self_attn.kv_a_layernorm.weight": VECTOR}
DEEPSEEK |= {"mlp.gate.weight": ROUTER, "mlp.experts.gate_up_proj": HIDDEN, "mlp.experts.down_proj": HIDDEN}
DEEPSEEK |= {f"mlp.shared_experts.{x}_proj.weight": HIDDEN for x in ("gate", "up", "down")}
FAMILIES = {
    "tied": (qwen3(tie_word_embeddings=True), QWEN3 | {"model.norm.weight": FINAL}),
    "untied": (qwen3(tie_word_embeddings=False), QWEN3 | {"model.norm.weight": VECTOR, "lm_head.weight": HEAD}),
    "scaled embeddings, tied": (
        gemma2(tie_word_embeddings=True),
        GEMMA2 | {"model.norm.weight": (None, 1 / 2, 0, 1 / 2)},
    ),
    "scaled embeddings, untied": (
        gemma2(tie_word_embeddings=False),
        GEMMA2 | {"model.norm.weight": VECTOR, "lm_head.weight": HEAD},
    ),
    "Conv1D and positions": (gpt2(), GPT2),
    "shared expert": (qwen2_moe(), QWEN2_MOE),
    "transposed and biased experts": (gpt_oss(), GPT_OSS),
    "low ranks": (deepseek(), DEEPSEEK),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_factors_of_every_tensor(kind):
    config, expected = FAMILIES[kind]
    model = build(config)
    assert rows(model) == expected
    groups = mup_param_groups(model, lr=0.5)
    assert groups[0]["lr"] == 0.5
    assert len({group["name"] for group in groups}) == len(groups)


def test_first_weights_and_the_gain_that_is_one_plus_its_weight():
    config = gemma2(tie_word_embeddings=True, hidden_size=256, num_attention_heads=16, vocab_size=512)
    own = AutoModelForCausalLM.from_config(
        config
    ).model.norm.weight  # 0, a gain of 1; transformers 4 has 1, a gain of 2
    model = build(config)
    s, weights = 0.02, dict(model.named_parameters())
    assert weights["model.embed_tokens.weight"].std().item() == pytest.approx(s / 4, rel=0.02)
    assert weights["model.layers.0.mlp.down_proj.weight"].std().item() == pytest.approx(s / 4, rel=0.02)
    assert torch.equal(weights["model.norm.weight"], (1 + own) / 4 - 1)
    assert torch.equal(weights["model.layers.0.input_layernorm.weight"], own)
    gpt = dict(build(gpt2()).named_parameters())
    assert torch.equal(gpt["transformer.ln_f.weight"], torch.full((64,), 1 / 4))
    assert torch.equal(gpt["transformer.ln_f.bias"], torch.zeros(64))


def test_own_fan_in_ratio_with_a_base_config():
    """16 heads of 16 at width 32 and at 64, and an MLP that grows by 4: o_proj r = 1, down_proj r = 4, all others 2."""
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(qwen3(intermediate_size=256, **heads))
    base = qwen3(hidden_size=32, intermediate_size=64, **heads)
    found = {
        name: own.r for name, own in factors_of(mup_init_(model, base_config=base)).items() if own.role == "hidden"
    }
    expected = {"o_proj": 1.0, "down_proj": 4.0}
    assert {name.split(".")[-2]: r for name, r in found.items()} == expected | dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 2.0
    )


def test_at_base_width_nothing_but_the_groups_differs():
    model = build(qwen3(tie_word_embeddings=True), base_width=64)
    assert {(row[1], row[3]) for row in rows(model).values()} == {(1, 1)}
    assert torch.equal(model.model.norm.weight, torch.ones(64))


def frozen(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, copy.deepcopy(model.config.to_dict())


STATE_SPACE = "there is none for state-space, recurrent and convolution layers"
HYBRID = {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2}
REFUSED = {
    "mamba": (MambaConfig(vocab_size=48, hidden_size=32, num_hidden_layers=1), {}, STATE_SPACE),
    "hybrid": (JambaConfig(**SIZES | HYBRID, num_experts=2, use_mamba_kernels=False), {}, STATE_SPACE),
    "tied without gain": (OlmoConfig(**SIZES, tie_word_embeddings=True), {}, "has no final gain"),
    "no base": (qwen3(), {}, "give one of base_width"),
    "two bases": (qwen3(), {"base_width": 16, "base_config": qwen3()}, "give one of base_width"),
    "width 0": (qwen3(), {"base_width": 0}, "base_width must be a positive number"),
    "no multiplier": (
        qwen3(),
        {"base_width": 16, "embedding_multiplier": 0},
        "embedding_multiplier must be a positive",
    ),
    "other family": (qwen3(), {"base_config": gemma2()}, "base_config must be a Qwen3Config"),
    "other depth": (qwen3(), {"base_config": qwen3(num_hidden_layers=2)}, "base_config has num_hidden_layers 2"),
    "other vocabulary": (qwen3(), {"base_config": qwen3(vocab_size=50)}, "base_config has vocab_size 50"),
    "other head size": (qwen3(), {"base_config": qwen3(head_dim=8)}, "base_config has head_dim 8"),
    "other heads": (
        gpt2(),
        {
            "base_config": GPT2Config(
                vocab_size=48, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=1
            )
        },
        "base_config has heads of 8 features",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_rule_is_refused_before_anything_is_changed(kind):
    config, given, why = REFUSED[kind]
    model = AutoModelForCausalLM.from_config(config)
    model.train()
    before, state = frozen(model), torch.get_rng_state()
    with refused(ValueError, why):
        mup_init_(model, **given if kind in ("no base", "two bases") or given else {"base_width": 16})
    after = frozen(model)
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tensor_that_the_class_does_not_make_is_refused_unless_it_is_frozen():
    model = AutoModelForCausalLM.from_config(qwen3())
    model.model.adapter = torch.nn.Parameter(torch.ones(3, 3))
    with refused(ValueError, "no muP rule for the tensor model.adapter of shape (3, 3)", "freeze it"):
        mup_init_(model, base_width=16)
    model.model.adapter.requires_grad_(False)
    mup_init_(model, base_width=16)
    assert torch.equal(model.model.adapter, torch.ones(3, 3))


class Narrow(Qwen3ForCausalLM):
    """A stock model with a matrix from hidden_size to 100."""

    def __init__(self, config):
        super().__init__(config)
        self.model.side = torch.nn.Linear(config.hidden_size, 100)


def test_a_matrix_whose_output_does_not_grow_is_refused_by_name():
    with refused(ValueError, "model.side.weight of shape (100, 64)", "its output size 100 does not grow"):
        mup_init_(Narrow(qwen3()), base_width=16)


@pytest.mark.parametrize("kind", ["tied", "scaled embeddings, tied", "low ranks"])
def test_the_record_travels_and_a_loaded_model_has_the_same_groups(kind, tmp_path):
    model = build(FAMILIES[kind][0])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert again.config.hf_power_mup == model.config.hf_power_mup
    assert rows(again) == rows(model)
    assert again.config.hf_power_mup["base_width"] == 16


def test_logits_are_divided_by_m_in_a_tied_model():
    """Twice the base's width, every weight at one constant: m = 2 halves the logits of the same weights with a gain of 1."""
    model = build(qwen3(tie_word_embeddings=True), base_width=32)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model.model.norm.weight.fill_(1.0)
        assert torch.allclose(model(input_ids=ids).logits / 2, logits, atol=1e-6)
    assert math.isfinite(float(logits.sum()))


def told(config, **arguments):
    """What mup_init_ says of a model at its base, of 64."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mup_init_(AutoModelForCausalLM.from_config(config), base_width=64, **arguments)
    return [str(each.message) for each in caught if "drown" in str(each.message) or "normalizes" in str(each.message)]


POST_NORM = Olmo2Config(**SIZES, initializer_range=0.1)


def test_a_model_whose_blocks_drown_the_embedding_is_named():
    """What such a block adds has a deviation of about sqrt(2), the attention's 1 and the MLP's; the embedding one of .1."""
    (sentence,) = told(POST_NORM)
    assert "Olmo2ForCausalLM normalizes what its blocks add" in sentence
    assert "give an embedding_multiplier of 1 / initializer_range, 10, with" in sentence
    assert told(POST_NORM, embedding_multiplier=10) == []


@pytest.mark.parametrize("config", [qwen3(initializer_range=0.02), gemma2()], ids=("pre", "scaled"))
def test_a_model_that_normalizes_before_its_blocks_or_scales_its_embeddings_is_not(config):
    assert told(config) == []


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_multiplier_is_folded_as_if_the_forward_pass_had_it(tied):
    """m_emb = 8: s, lr and eps times 8, weight decay over 8; in a tied model 1 / 8 in the final gain."""
    model = AutoModelForCausalLM.from_config(qwen3(tie_word_embeddings=tied))
    found = rows(mup_init_(model, base_width=16, embedding_multiplier=8))
    assert found["model.embed_tokens.weight"] == pytest.approx((8, 8, 1 / 8, 1 / 32))
    assert found["model.norm.weight"][1] == pytest.approx(1 / 32 if tied else 1)
    deviation = float(model.model.embed_tokens.weight.detach().std())
    assert deviation == pytest.approx(8 * model.config.initializer_range, rel=0.05)


def test_a_coordinate_check_says_it_of_the_init_of_the_config():
    """The check has an init of its own, of .02."""
    with pytest.warns(UserWarning, match=r"1 / initializer_range, 10, with") as caught:
        coord_check(POST_NORM, widths=[64, 128, 192, 256], steps=1, seeds=[0])
    assert len(caught) == 1


def test_heads_of_keys_and_values_that_stay_are_told():
    """No rule is exact for them; where both grow, or neither does, there is nothing to say."""
    llama = {**SIZES, "head_dim": 16, "num_hidden_layers": 1}
    told = "FalconForCausalLM keeps its number of heads of keys and values"
    with pytest.warns(UserWarning, match=told):
        build(FalconConfig(vocab_size=48, hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    wide = LlamaConfig(**llama | {"hidden_size": 128, "num_attention_heads": 8})
    model = AutoModelForCausalLM.from_config(wide)
    with pytest.warns(UserWarning, match="LlamaForCausalLM keeps"):
        mup_init_(model, base_config=LlamaConfig(**llama))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mup_init_(model, base_config=LlamaConfig(**llama | {"num_key_value_heads": 1}))
        mup_init_(model, base_config=LlamaConfig(**llama | {"num_attention_heads": 8}))
        mup_init_(model, base_width=64)


def test_wrappers_are_looked_through():
    """The groups of a compiled or data-parallel model are those of the model, and so are its first weights."""
    torch.manual_seed(0)
    expected = mup_init_(AutoModelForCausalLM.from_config(qwen3()), base_width=32)
    for wrap in (lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel):
        torch.manual_seed(0)
        wrapped = wrap(AutoModelForCausalLM.from_config(qwen3()))
        assert mup_init_(wrapped, base_width=32) is wrapped
        pairs = zip(wrapped.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
        of_both = [mup_param_groups(model, lr=0.1) for model in (wrapped, expected)]
        names = [[(group["name"], group["lr"], len(group["params"])) for group in groups] for groups in of_both]
        assert names[0] == names[1]


@pytest.mark.parametrize("base", ["32", True, 0, 31.5])
def test_a_base_width_that_is_no_width(base):
    with refused(UserError, f"base_width must be a positive number of features, got {base!r}"):
        mup_init_(AutoModelForCausalLM.from_config(qwen3()), base_width=base)


def test_weights_without_values_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(qwen3())
    with refused(UserError, "are on the meta device, where they have no values"):
        mup_init_(model, base_width=32)
    assert not hasattr(model.config, "hf_power_mup")
