"""Other widths of a config: scale_width, which knows what the families of transformers call their sizes."""

import copy
from collections.abc import Iterator, Sequence

from hf_power.compat import PreTrainedConfig
from hf_power.models import NUM_EXPERTS, head_dim
from hf_power.records.errors import UserError

# Attributes that grow with hidden_size. A config has some of them, and their aliases are the same attribute.
KV_HEADS: tuple[str, ...] = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads")
KV_HEADS += ("num_global_key_value_heads",)
HEADS: tuple[str, ...] = ("num_attention_heads", *KV_HEADS, "decoder_attention_heads", "swa_num_attention_heads")
MLPS: tuple[str, ...] = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "decoder_ffn_dim",
    "ffn_hidden_size",
    "dff",
    "dim_ff",
)
MLPS += ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size")
MLPS += ("moe_shared_expert_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size")
MLPS += ("expert_ffn_hidden_size", "prefix_dense_intermediate_size", "mlp_intermediate_size")
RANKS: tuple[str, ...] = ("q_lora_rank", "kv_lora_rank", "o_lora_rank", "word_embed_proj_dim")
GROWING = ("hidden_size", *HEADS, *MLPS, *RANKS)


def num_outputs_of_routers(config: PreTrainedConfig) -> set[int]:
    """The sizes that the output of a router, or of a gate of a shared expert, may have."""
    sizes = {1}
    for part in _parts(config):
        for name in NUM_EXPERTS:
            value = getattr(part, name, None)
            sizes |= {value} if isinstance(value, int) else set(value) if isinstance(value, list | tuple) else set()
    return sizes


def scale_width(config: PreTrainedConfig, hidden_size: int, *, fixed: Sequence[str] = ()) -> PreTrainedConfig:
    """The same shape at another width: head size, heads per KV head, MLP ratio and the ratios of low ranks are kept.

    Args:
        config: of any causal LM; it is not changed.
        hidden_size: the new width.
        fixed: names of sizes to leave as they are, e.g. num_attention_heads and num_key_value_heads for an attention
            width that does not grow, as in Qwen3 (16 heads of 128 at hidden_size 1024 and at 2048).

    Raises:
        UserError: a size that would not be a whole number, a name in `fixed` that is none of the config's sizes, or a config
            whose layers have sizes of their own.
    """
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise UserError(
            f"the config of {config.model_type} has no hidden_size, so that it cannot be scaled: if it is of several models, "
            "take that of the text alone."
        )
    refuse_sizes_per_layer(config)
    scaled = copy.deepcopy(config)
    known = [name for part in _parts(config) for name in GROWING if getattr(part, name, None) is not None]
    for name in fixed:
        if name not in known:
            raise UserError(f"fixed names {name!r}, which is none of the sizes of this config: use {', '.join(known)}.")
    keeps_heads = hasattr(config, "head_dim") and not isinstance(getattr(type(config), "head_dim", None), property)
    if keeps_heads:
        scaled.head_dim = head_dim(config)
    elif "num_attention_heads" in fixed:
        raise UserError(
            f"num_attention_heads can only be fixed where the config has a head_dim, and that of {config.model_type} has "
            "none: its heads would grow with the width."
        )
    for old, new in zip(_parts(config), _parts(scaled), strict=True):
        # All are read before one is written, because one may be an alias of another.
        sizes = {name: getattr(old, name, None) for name in GROWING if name not in fixed}
        for name, size in sizes.items():
            if size is not None and not isinstance(size, bool):
                setattr(new, name, _scaled(name, size, config, hidden_size))
    heads = getattr(scaled, "num_attention_heads", None)
    for name in fixed if isinstance(heads, int) else ():
        shared = getattr(scaled, name)
        if name in KV_HEADS and heads % shared:
            raise UserError(
                f"{name} stays at {shared}, of which {heads} heads of width {hidden_size} are no multiple: choose another width."
            )
    return scaled


def refuse_sizes_per_layer(config: PreTrainedConfig) -> None:
    """Raise a UserError where layers have sizes of their own, as Gemma 4's have; reading such a size is an error there."""
    if getattr(config, "is_heterogeneous", False):
        raise UserError(
            f"the layers of {config.model_type} have {', '.join(sorted(config.per_layer_attributes or ()))} of their own, for which "
            "the plain form of muP has no rule: take a model whose layers are alike."
        )


def check_base_width(value: object) -> None:
    """Raise a UserError for what is no width."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value % 1:
        raise UserError(f"base_width must be a positive number of features, got {value!r}.")


def head_size(config: PreTrainedConfig) -> float | None:
    """Features of an attention head; None where the config does not tell."""
    explicit, heads = getattr(config, "head_dim", None), getattr(config, "num_attention_heads", None)
    if explicit is not None or not isinstance(heads, int):
        return explicit
    return float(config.hidden_size / heads)


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and those that it holds, such as DBRX's of its MLP."""
    yield config
    yield from (part for _, part in sorted(vars(config).items()) if isinstance(part, PreTrainedConfig))


def _scaled(name: str, size: object, config: PreTrainedConfig, hidden_size: int) -> object:
    if isinstance(size, list | tuple):
        return type(size)(_scaled(name, each, config, hidden_size) for each in size)
    value = size * hidden_size / config.hidden_size  # type: ignore[operator]
    if (value < 1 and size) or value != int(value):
        steps = f"steps of the head size {head_size(config):g}" if head_size(config) else "steps"
        other = ", or give a base_config in which it stays" if name in KV_HEADS else ""
        raise UserError(
            f"{name} {size} of width {config.hidden_size} would become {value:g} at width {hidden_size}: choose widths in "
            f"{steps} that keep it whole{other}."
        )
    return int(value)
