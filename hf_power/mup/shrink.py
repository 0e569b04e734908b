"""The same kind of model with small sizes, shrink, for a coordinate check of a config that is too large for one."""

import copy
from typing import cast

from hf_power.compat import PreTrainedConfig
from hf_power.models import EXPERTS_PER_TOKEN, NUM_EXPERTS, without_memory
from hf_power.mup.scale import HEADS, MLPS, RANKS, head_size, refuse_sizes_per_layer
from hf_power.records.errors import UserError, refused_by

WIDTH, HEAD, LAYERS, EXPERTS = 64, 16, 2, 4
# Sizes of heads, and of the part of them that is rotated.
_HEAD_SIZES = {"head_dim": HEAD, "qk_nope_head_dim": HEAD, "v_head_dim": HEAD, "qk_rope_head_dim": HEAD // 2}
_HEAD_SIZES |= {"rotary_dim": HEAD // 2, "query_pre_attn_scalar": HEAD, "global_head_dim": HEAD, "kv_channels": HEAD}
_HEAD_SIZES |= {"swa_head_dim": HEAD, "swa_v_head_dim": HEAD, "qk_head_dim": HEAD + HEAD // 2}
_GROUPS = ("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers")


def shrink(config: PreTrainedConfig, **changes: object) -> PreTrainedConfig:
    """A config of the same kind with hidden_size 64, heads of 16, a layer of each type and 4 experts.

    What decides which rules are needed is kept: biases, norms, tying, kinds of layers, groups of KV heads, low ranks, experts
    and shared experts, and roughly the ratio of the MLP.

    Args:
        config: of a causal LM; it is not changed.
        changes: more values of the config.

    Raises:
        UserError: a config without a hidden_size, one whose layers have sizes of their own, or one whose class or code
            refuses the small sizes.
    """
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise UserError(
            f"the config of {config.model_type} has no hidden_size, so that it cannot be made small: if it is of several "
            "models, take that of the text alone."
        )
    refuse_sizes_per_layer(config)
    values = copy.deepcopy(config.to_dict())
    chosen = _layers(config)
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == config.num_hidden_layers and name != "layers":
            values[name] = [value[i] for i in chosen]
    sizes = _sizes(config) | {"num_hidden_layers": len(chosen)} | changes
    renamed = getattr(type(config), "attribute_map", {})
    for name, value in sizes.items():
        values[renamed.get(name, name)] = value
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if isinstance(rope, dict) and head_size(config):
        head = sizes.get("head_dim") or WIDTH / cast("int", sizes.get("num_attention_heads", WIDTH // HEAD))
        _shorten_(rope, cast("float", head) / cast("float", head_size(config)))
    with refused_by("the config with small sizes"):
        small = type(config).from_dict({name: v for name, v in values.items() if name != "transformers_version"})
    without_memory(small)  # Much of a config is only refused by the model's own code.
    return small


def _shorten_(rope: dict[str, object], share: float) -> None:
    """Leave as many of the factors that longrope has for each pair of a head's features as smaller heads have."""
    for name, value in rope.items():
        if isinstance(value, dict):
            _shorten_(value, share)
        elif name.endswith("_factor") and isinstance(value, list):
            rope[name] = value[: round(len(value) * share)]


def _layers(config: PreTrainedConfig) -> list[int]:
    """The first layer of each type, and at least LAYERS of them."""
    types = getattr(config, "layer_types", None) or getattr(config, "mlp_layer_types", None) or []
    firsts = sorted({types.index(kind) for kind in types})
    return firsts if len(firsts) >= LAYERS else list(range(min(LAYERS, config.num_hidden_layers)))


def _sizes(config: PreTrainedConfig) -> dict[str, object]:
    sizes: dict[str, object] = {"hidden_size": WIDTH}
    heads = getattr(config, "num_attention_heads", None)
    own = {
        name: getattr(config, name, None)
        for name in (*HEADS, *MLPS, *RANKS, *NUM_EXPERTS, *EXPERTS_PER_TOKEN, *_GROUPS)
    }
    given = {
        name: value for name, value in own.items() if isinstance(value, int) and not isinstance(value, bool) and value
    }
    for name, value in given.items():
        if name in HEADS:
            share = value / heads if isinstance(heads, int) else 1.0
            sizes[name] = max(1, round(WIDTH // HEAD * share))
        elif name in MLPS:
            sizes[name] = HEAD * max(1, min(16, round(value / config.hidden_size * WIDTH / HEAD)))
        elif name in RANKS:
            sizes[name] = WIDTH // 2 if "rank" in name else WIDTH
        else:
            sizes[name] = min(value, {**dict.fromkeys(NUM_EXPERTS, EXPERTS), **dict.fromkeys(_GROUPS, 1)}.get(name, 2))
    for name, value in _HEAD_SIZES.items():
        if isinstance(getattr(config, name, None), int) and not isinstance(getattr(type(config), name, None), property):
            sizes[name] = min(value, int(getattr(config, name)))
    fields = config.to_dict()
    if getattr(config, "head_dim", None) and config.head_dim == getattr(config, "qk_rope_head_dim", None):
        sizes["head_dim"] = sizes["qk_rope_head_dim"]  # What DeepSeek's code rotates.
    elif "head_dim" in fields:
        sizes["head_dim"] = HEAD
    if fields.get("num_key_value_heads", heads) is None:
        sizes["num_key_value_heads"] = WIDTH // HEAD
    return sizes
