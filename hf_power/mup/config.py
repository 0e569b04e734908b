"""The muP form of a plain config, mup_config; uses private parts of transformers.

Llama with muP's four multipliers is Granite, Mixtral with them is GraniteMoe, so no forward pass is patched and a
checkpoint loads everywhere without custom code.
"""

import copy
import math

import transformers

from hf_power.compat import IS_4, PreTrainedConfig
from hf_power.models import FAMILIES, PLAIN_FAMILIES, head_dim
from hf_power.mup.rules import MupRecord
from hf_power.mup.scale import check_base_width
from hf_power.records.errors import UserError

# The multipliers of the named presets, beside logits_scaling, which is m = width / base_width in all of them.
PRESETS: dict[str, dict[str, float]] = {
    # The paper's Tables 1 and 4.
    "paper": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "initializer_range": 0.1},
    # The same numbers with the rules of IBM's training code.
    "ibm": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "initializer_range": 0.1},
    # Export to plain Llama or Mixtral is bit-exact in bf16 (when m is a power of two as well).
    "power_of_two": {"embedding_multiplier": 8.0, "residual_multiplier": 0.25, "initializer_range": 0.1},
}
# Fields of the plain configs that Granite lacks, or that muP sets.
_NOT_CARRIED = (
    "model_type",
    "architectures",
    "transformers_version",
    "head_dim",
    "pretraining_tp",
    "sliding_window",
    "router_jitter_noise",
    "initializer_range",
)


def mup_config(
    config: PreTrainedConfig,
    *,
    base_width: int = 256,
    base_intermediate_size: int | None = None,
    base_attention_width: int | None = None,
    base_head_dim: int | None = None,
    base_num_layers: int | None = None,
    preset: str = "paper",
    embedding_multiplier: float | None = None,
    residual_multiplier: float | None = None,
    attention_multiplier: float | None = None,
    initializer_range: float | None = None,
) -> PreTrainedConfig:
    """A Granite/GraniteMoe config that is the given Llama/Mixtral config under muP.

        logits_scaling       = m = hidden_size / base_width
        attention_multiplier = 1 / head_dim                        presets "paper" and "ibm"
                             = sqrt(base_head_dim) / head_dim      preset "power_of_two", or with base_head_dim
        residual_multiplier  = preset's  (* base_num_layers / num_hidden_layers with base_num_layers: CompleteP)
        embedding_multiplier = preset's

    Args:
        config: LlamaConfig or MixtralConfig; it is not changed.
        base_width: d_base, the hidden_size at which muP changes nothing.
        base_intermediate_size: MLP width at base_width; by default in proportion, intermediate_size / m.
        base_attention_width: heads x head size at base_width, o_proj's fan-in; by default in proportion.
        base_head_dim: head size at which attention logits have Llama's scale.
        base_num_layers: depth at which residual_multiplier has its preset value; None leaves depth alone.
        preset: "paper", "power_of_two" or "ibm", with the rules of IBM's code (`hf_power.mup.rules.IBM_RULES`).
        embedding_multiplier, residual_multiplier, attention_multiplier, initializer_range: win over the preset.

    Returns:
        GraniteConfig or GraniteMoeConfig; ``config.mup`` records how it was made and travels in config.json.

    Raises:
        UserError: an architecture without a rule, a feature that Granite lacks, or sizes that do not divide.
    """
    _check_plain(config, preset, base_width)
    m, size = config.hidden_size / base_width, head_dim(config)
    record: MupRecord = {
        "preset": preset,
        "plain_model_type": config.model_type,
        "base_width": base_width,
        "base_intermediate_size": base_intermediate_size or config.intermediate_size / m,
        "base_attention_width": base_attention_width or config.num_attention_heads * size / m,
        "base_head_dim": base_head_dim or size,
        "base_num_layers": base_num_layers,
    }
    _check_ibm(config, record)
    if attention_multiplier is None:
        keeps_scale = preset == "power_of_two" or base_head_dim is not None
        attention_multiplier = math.sqrt(record["base_head_dim"]) / size if keeps_scale else 1.0 / size
    given = {"embedding_multiplier": embedding_multiplier, "residual_multiplier": residual_multiplier}
    given["initializer_range"] = initializer_range
    numbers = PRESETS[preset] | {name: float(value) for name, value in given.items() if value is not None}
    if base_num_layers is not None:
        numbers["residual_multiplier"] *= base_num_layers / config.num_hidden_layers
    numbers |= {"logits_scaling": m, "attention_multiplier": attention_multiplier}
    return _twin_config(config, numbers, record)


def _twin_config(config: PreTrainedConfig, numbers: dict[str, float], record: MupRecord) -> PreTrainedConfig:
    """The config of the family with multipliers, which has everything else from the plain one."""
    fields = {k: v for k, v in copy.deepcopy(config.to_dict()).items() if k not in _NOT_CARRIED}
    if head_dim(config) * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = head_dim(config)  # Granite's code reads it, its config class has no field for it.
    if config._attn_implementation is not None:  # to_dict() leaves it out.
        fields["attn_implementation"] = config._attn_implementation
    return FAMILIES[FAMILIES[config.model_type].twin].config_class(**fields | numbers | {"mup": record})


def _check_ibm(config: PreTrainedConfig, record: MupRecord) -> None:
    """IBM's code divides by one m everywhere, so that other ratios cannot be had with its preset."""
    widths = {"base_intermediate_size": config.intermediate_size}
    widths["base_attention_width"] = config.num_attention_heads * head_dim(config)
    sizes = {"base_intermediate_size": record["base_intermediate_size"]}
    sizes["base_attention_width"] = record["base_attention_width"]
    m = config.hidden_size / record["base_width"]
    for name, size in sizes.items() if record["preset"] == "ibm" else ():
        if not math.isclose(widths[name] / size, m):
            raise UserError(
                f'preset "ibm" divides every hidden matrix by the same m = {m:g}, but {name} {size:g} makes a ratio of '
                f"{widths[name] / size:g}: leave {name} out, or take another preset."
            )


def _check_plain(config: PreTrainedConfig, preset: str, base_width: int) -> None:
    if getattr(config, "mup", None) is not None:
        raise UserError(
            "this config has been through mup_config already: pass the Llama or Mixtral config it came from."
        )
    if config.model_type not in PLAIN_FAMILIES:
        raise UserError(
            f"there is no muP rule for model_type {config.model_type!r}: use one of {', '.join(PLAIN_FAMILIES)} "
            "(LlamaConfig, MixtralConfig)."
        )
    if preset not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    check_base_width(base_width)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads and not getattr(config, "head_dim", None):
        raise UserError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}: change one of them."
        )
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: change one of them."
        )
    explicit = getattr(config, "head_dim", None) not in (None, config.hidden_size / heads)
    if config.model_type == "mixtral" and explicit and IS_4:
        raise UserError(
            f"head_dim is {config.head_dim} of {config.hidden_size} features and {heads} heads, but the GraniteMoe of transformers "
            f"{transformers.__version__} leaves out head_dim: take transformers 5, or heads that divide hidden_size."
        )
    for name in ("sliding_window", "router_jitter_noise"):
        if getattr(config, name, None):
            raise UserError(
                f"{name}={getattr(config, name)} has no counterpart in Granite, the muP form of this model: set it to "
                "None or 0."
            )
    if getattr(config, "pretraining_tp", 1) not in (None, 1):
        raise UserError(f"pretraining_tp={config.pretraining_tp} has no counterpart in Granite: set it to 1.")
