"""muP for Llama- and Mixtral-style models: config, initialization, parameter groups, optimizer.

Llama with muP's four multipliers is Granite, Mixtral with them is GraniteMoe, so no forward pass is patched and a
checkpoint loads everywhere without custom code. Rules: Shen et al. (arXiv:2408.13359, Table 1) after Yang et al.
(arXiv:2203.03466); depth: CompleteP (arXiv:2505.01618).
"""

import copy
import math
import re
from typing import Any

import torch
from torch import nn

from hf_power.records.errors import UserError

# Multipliers of the named presets. All three have m = width / base_width as logits_scaling.
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's Tables 1 and 4.
    "paper": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "initializer_range": 0.1},
    # The same numbers with the rules of IBM's training code, see _rules.
    "ibm": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "initializer_range": 0.1},
    # Export to plain Llama/Mixtral is bit-exact in bf16 (when m is a power of two as well).
    "power_of_two": {"embedding_multiplier": 8.0, "residual_multiplier": 0.25, "initializer_range": 0.1},
}
FAMILIES = {"llama": "GraniteConfig", "mixtral": "GraniteMoeConfig"}

# Role of a tensor by the end of its name; what matches none of these is an error, never a guess.
_ROLES = (
    ("vector", re.compile(r"(norm\.weight|layernorm\.weight|\.bias)$")),
    ("embedding", re.compile(r"(embed_tokens|lm_head)\.weight$")),
    ("router", re.compile(r"\.router\.weight$")),
    ("hidden", re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.weight$|\.experts\.(gate_up|down)_proj$")),
)
_OUTPUT_PROJECTION = re.compile(r"(o_proj\.weight|down_proj(\.weight)?)$")


def mup_config(
    config: Any,
    *,
    base_width: int = 256,
    base_intermediate_size: int | None = None,
    base_head_dim: int | None = None,
    base_num_layers: int | None = None,
    preset: str = "paper",
    embedding_multiplier: float | None = None,
    residual_multiplier: float | None = None,
    attention_multiplier: float | None = None,
    initializer_range: float | None = None,
) -> Any:
    """A Granite/GraniteMoe config that is the given Llama/Mixtral config under muP.

    With d = hidden_size and m = d / base_width::

        logits_scaling       = m
        attention_multiplier = 1 / head_dim                        presets "paper" and "ibm"
                             = sqrt(base_head_dim) / head_dim      preset "power_of_two", or with base_head_dim
        residual_multiplier  = preset's  (* base_num_layers / num_hidden_layers with base_num_layers: CompleteP)
        embedding_multiplier = preset's

    Args:
        config: LlamaConfig or MixtralConfig; it is not changed.
        base_width: d_base, the hidden_size at which muP changes nothing.
        base_intermediate_size: MLP width at base_width; by default in proportion, intermediate_size / m.
        base_head_dim: head size at which attention logits have Llama's scale.
        base_num_layers: depth at which residual_multiplier has its preset value; None leaves depth alone.
        preset: "paper", "ibm" (IBM's code: weight decay not corrected, router as a hidden matrix, output projections'
            init additionally / sqrt(2 * layers), eps not scaled) or "power_of_two".
        embedding_multiplier, residual_multiplier, attention_multiplier, initializer_range: win over the preset.

    Returns:
        GraniteConfig or GraniteMoeConfig; ``config.mup`` records how it was made and travels in config.json.

    Raises:
        ValueError: an architecture without a rule, a feature that Granite lacks, or sizes that do not divide.
    """
    import transformers

    if getattr(config, "mup", None) is not None:
        raise UserError(
            "this config has been through mup_config already: pass the Llama or Mixtral config it came from."
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"there is no muP rule for model_type {config.model_type!r}: use one of {', '.join(FAMILIES)} "
            "(LlamaConfig, MixtralConfig)."
        )
    if preset not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}.")
    _check_sizes(config, base_width)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    m = config.hidden_size / base_width
    base: dict[str, Any] = {
        "base_width": base_width,
        "base_intermediate_size": base_intermediate_size or config.intermediate_size / m,
        "base_head_dim": base_head_dim or head_dim,
        "base_num_layers": base_num_layers,
    }
    if attention_multiplier is None:
        keeps_scale = preset == "power_of_two" or base_head_dim is not None
        attention_multiplier = math.sqrt(base["base_head_dim"]) / head_dim if keeps_scale else 1.0 / head_dim
    numbers = dict(PRESETS[preset])
    given = {"embedding_multiplier": embedding_multiplier, "residual_multiplier": residual_multiplier}
    given["initializer_range"] = initializer_range
    numbers |= {name: float(value) for name, value in given.items() if value is not None}
    if base_num_layers is not None:
        numbers["residual_multiplier"] *= base_num_layers / config.num_hidden_layers

    family = getattr(transformers, FAMILIES[config.model_type])
    fields = {k: v for k, v in copy.deepcopy(config.to_dict()).items() if k not in _NOT_CARRIED}
    if head_dim * config.num_attention_heads != config.hidden_size:
        fields["head_dim"] = head_dim  # Granite's code reads it, its config class has no field for it
    if config._attn_implementation is not None:
        fields["attn_implementation"] = config._attn_implementation
    return family(
        **fields
        | numbers
        | {"logits_scaling": m, "attention_multiplier": attention_multiplier}
        | {"mup": {"preset": preset, "plain_model_type": config.model_type, **base}}
    )


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


def _check_sizes(config: Any, base_width: int) -> None:
    if base_width < 1:
        raise UserError(f"base_width must be a positive number of features, got {base_width}.")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if config.hidden_size % heads and not getattr(config, "head_dim", None):
        raise UserError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}: change one of them."
        )
    if heads % kv_heads:
        raise UserError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: change one of them."
        )
    for name in ("sliding_window", "router_jitter_noise"):
        if getattr(config, name, None):
            raise UserError(
                f"{name}={getattr(config, name)} has no counterpart in Granite, the muP form of this model: set it to "
                "None or 0."
            )
    if getattr(config, "pretraining_tp", 1) not in (None, 1):
        raise UserError(f"pretraining_tp={config.pretraining_tp} has no counterpart in Granite: set it to 1.")


def scale_width(config: Any, hidden_size: int) -> Any:
    """The same Llama/Mixtral shape at another width: head size, heads per KV head and MLP ratio are kept.

    Raises:
        ValueError: if heads, KV heads or the MLP width would not be whole numbers.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"num_attention_heads": config.num_attention_heads * hidden_size / config.hidden_size}
    sizes["num_key_value_heads"] = config.num_key_value_heads * hidden_size / config.hidden_size
    sizes["intermediate_size"] = config.intermediate_size * hidden_size / config.hidden_size
    for name, value in sizes.items():
        if value < 1 or value != int(value):
            raise UserError(
                f"{name} {getattr(config, name)} of width {config.hidden_size} would become {value:g} at width "
                f"{hidden_size}: choose widths in steps of the head size {head_dim} that keep it whole."
            )
    scaled = copy.deepcopy(config)
    for name, value in {**sizes, "hidden_size": hidden_size, "head_dim": head_dim}.items():
        setattr(scaled, name, int(value))
    return scaled


def mup_init_(model: nn.Module) -> nn.Module:
    """Initialize the weights in place under muP, from torch's global random numbers.

    With s = initializer_range and r = fan_in / base fan_in: embeddings and lm_head N(0, s**2); hidden matrices and
    experts N(0, s**2 / r); router N(0, (s / r)**2); norms 1; biases 0. Preset "ibm": router as a hidden matrix, and
    output projections additionally / sqrt(2 * layers).

    Args:
        model: made by ``AutoModelForCausalLM.from_config(mup_config(...))``.

    Returns:
        The model.

    Raises:
        ValueError: a model without ``config.mup``, or a tensor for which there is no rule.
    """
    config = _mup_model_config(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if not tensor.requires_grad and not any(pattern.search(name) for _, pattern in _ROLES):
                continue
            role, r = _rule(name, tensor, config)
            if role == "vector":
                nn.init.constant_(tensor, 0.0 if name.endswith("bias") else 1.0)
                continue
            std = config.initializer_range
            if role == "hidden":
                std /= math.sqrt(r)
            elif role == "router":
                std /= math.sqrt(r) if config.mup["preset"] == "ibm" else r
            if config.mup["preset"] == "ibm" and _OUTPUT_PROJECTION.search(name):
                std /= math.sqrt(2 * config.num_hidden_layers)
            nn.init.normal_(tensor, mean=0.0, std=std)
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        if embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx].zero_()
    return model


def mup_param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, eps: float = 1e-8
) -> list[dict[str, Any]]:
    """Named parameter groups for AdamW under muP.

    With eta = lr, wd = weight_decay, r = fan_in / base fan_in and m = hidden_size / base_width:

    ===========  =======================  ========  ==================  ============
    group        tensors                  lr        weight decay        eps
    ===========  =======================  ========  ==================  ============
    embedding    embedding, lm_head       eta       wd                  eps / m
    hidden       q k v o, MLP, experts    eta / r   wd * r              eps / m
    router       router                   eta / r   wd * r              eps / m
    vector       norms, biases            eta       0                   eps / m
    ===========  =======================  ========  ==================  ============

    Group 0 is "embedding", the one at the base learning rate, which the Trainer logs. Hidden matrices whose r differ
    form groups of their own (``hidden_r4``). Preset "ibm": weight decay wd and eps everywhere. With base_num_layers,
    eps of hidden matrices is also divided by layers / base_num_layers (CompleteP). Every trainable parameter is in
    exactly one group; shapes are global ones, so sharding does not change the groups.

    Args:
        model: its config has been through `mup_config`.
        lr: eta, base learning rate (the cap of the Power schedule).
        weight_decay: AdamW's decoupled coefficient, as PyTorch multiplies it by the learning rate.
        eps: AdamW's epsilon at base width.

    Returns:
        List of dicts with name, params, lr, weight_decay and eps, in a fixed order.

    Raises:
        ValueError: a model without ``config.mup``, or a tensor for which there is no rule.
    """
    config = _mup_model_config(model)
    ibm = config.mup["preset"] == "ibm"
    scale = 1.0 if ibm else config.hidden_size / config.mup["base_width"]
    depth = config.num_hidden_layers / (config.mup["base_num_layers"] or config.num_hidden_layers)
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    order = ("embedding", "hidden", "router", "vector")
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        role, r = _rule(name, tensor, config)
        key = (order.index(role), r)
        if key not in groups:
            decay = {"vector": 0.0, "embedding": weight_decay}.get(role, weight_decay * (1.0 if ibm else r))
            group_eps = eps / scale / (depth if role in ("hidden", "router") else 1.0)
            groups[key] = {"name": role, "params": [], "lr": lr / r, "weight_decay": decay, "eps": group_eps}
        groups[key]["params"].append(tensor)
    ordered = [groups[key] for key in sorted(groups)]
    if (0, 1.0) not in groups:  # embeddings are frozen: the vectors have the base rate
        ordered.sort(key=lambda group: group["name"] != "vector")
    names = [group["name"] for group in ordered]
    for key, group in groups.items():
        if names.count(group["name"]) > 1:
            group["name"] = f"{group['name']}_r{key[1]:g}"
    return ordered


class MupAdamW:
    """AdamW under muP for a Trainer: ``Trainer(..., optimizer_cls_and_kwargs=MupAdamW.for_trainer(args))``.

    The Trainer makes an instance and calls it with the model (``transformers`` calls this an optimizer factory).
    """

    @classmethod
    def for_trainer(cls, args: Any) -> tuple[type["MupAdamW"], dict[str, Any]]:
        """The pair that Trainer's optimizer_cls_and_kwargs takes, from TrainingArguments' own values."""
        return cls, {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }

    def __call__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = True,
    ) -> torch.optim.AdamW:
        """AdamW over `mup_param_groups`; its ``defaults["lr"]`` is the base learning rate."""
        groups = mup_param_groups(model, lr=lr, weight_decay=weight_decay, eps=eps)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def _rule(name: str, tensor: torch.Tensor, config: Any) -> tuple[str, float]:
    """Role of a tensor and its r = fan_in / base fan_in (1 for embeddings and vectors)."""
    role = next((role for role, pattern in _ROLES if pattern.search(name)), None)
    if role is None:
        raise UserError(
            f"there is no muP rule for the tensor {name} of shape {tuple(tensor.shape)}: freeze it, or leave it out of "
            "the model; rules exist for Llama's and Mixtral's tensors."
        )
    if role in ("vector", "embedding"):
        return role, 1.0
    fan_in = tensor.shape[-1]  # nn.Linear is (out, in), fused experts are (experts, out, in)
    width = config.hidden_size / config.mup["base_width"]
    if re.search(r"down_proj(\.weight)?$", name):
        r = fan_in / config.mup["base_intermediate_size"]
        return role, width if math.isclose(r, width) else r  # rounding must not make a group of its own
    return role, width


def _mup_model_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if getattr(config, "mup", None) is None:
        raise UserError(
            f"{type(model).__name__} was not built from a muP config: build it with "
            "AutoModelForCausalLM.from_config(mup_config(LlamaConfig(...)))."
        )
    return config
