"""muP's rules: the role of each tensor, and what each role does to init, learning rate, weight decay and eps.

They are those of Shen et al. (arXiv:2408.13359, Table 1) after Yang et al. (arXiv:2203.03466); depth is CompleteP's
(arXiv:2505.01618).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from hf_power.models import kind_of
from hf_power.records.errors import UserError, refused_by

# The names that transformers has for AdamW and its variants, the only optimizer for which muP has a rule here.
ADAMW = (
    *("adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adamw_torch_4bit"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
)


class Rule(NamedTuple):
    """Exponents of one role, of r = fan_in / base fan_in of the tensor and m = hidden_size / base_width of the model.

    Attributes:
        std: the init is N(0, (initializer_range / r**std)**2); None for norms, which begin at 1, and biases, at 0.
        lr: the learning rate is divided by r**lr.
        weight_decay: the coefficient is multiplied by r**weight_decay, which keeps lr * weight_decay; None for no decay.
        eps: AdamW's epsilon is divided by m**eps, as gradients shrink with the width.
    """

    std: float | None
    lr: int
    weight_decay: int | None
    eps: int


RULES = {
    #                 std   lr  decay  eps
    "embedding": Rule(0.0, 0, 0, 1),
    "hidden": Rule(0.5, 1, 1, 1),
    "router": Rule(1.0, 1, 1, 1),
    "vector": Rule(None, 0, None, 1),
}
# IBM's training code takes a router for a hidden matrix and corrects neither weight decay nor eps.
IBM_RULES = {
    "embedding": Rule(0.0, 0, 0, 0),
    "hidden": Rule(0.5, 1, 0, 0),
    "router": Rule(0.5, 1, 0, 0),
    "vector": Rule(None, 0, None, 0),
}
_ATTENTION = ("query", "key or value", "attention output")
ROLES = {
    "embedding": ("embedding", "head"),
    "hidden": (*_ATTENTION, "MLP input", "MLP output", "experts' input", "experts' output"),
    "router": ("router",),
    "vector": ("norm", "final norm"),
}
_MLP_OUTPUTS = ("MLP output", "experts' output")  # Their fan-in is the MLP's width, that of all others hidden_size.
_ROLE_OF: dict[str | None, str] = {kind: role for role, kinds in ROLES.items() for kind in kinds}


class MupRecord(TypedDict):
    """What `mup_config` writes into the model's config under "mup"."""

    preset: str
    plain_model_type: str
    base_width: int
    base_intermediate_size: float
    base_head_dim: int
    base_num_layers: int | None


class TensorRule(NamedTuple):
    """The rule of one tensor: its role, the exponents, and its r = fan_in / base fan_in (1 for embeddings, vectors)."""

    role: str
    exponents: Rule
    r: float


def mup_record(model: PreTrainedModel) -> MupRecord:
    """How the model's config was made; a UserError where it has not been through `mup_config`."""
    record: MupRecord | None = getattr(getattr(model, "config", None), "mup", None)
    if record is None:
        raise UserError(
            f"{type(model).__name__} was not built from a muP config: build it with "
            "AutoModelForCausalLM.from_config(mup_config(LlamaConfig(...)))."
        )
    return record


def role_of(name: str) -> str | None:
    """The role of a tensor, a key of RULES; None where there is no rule for it, which is never guessed."""
    if name.endswith((".bias", "norm.weight")):
        return "vector"
    return _ROLE_OF.get(kind_of(name, wrapped=True))


def rule_of(name: str, tensor: torch.Tensor, config: PreTrainedConfig) -> TensorRule:
    """The rule of a tensor of a model whose config has been through `mup_config`; a UserError where there is none."""
    record: MupRecord = config.mup
    role = role_of(name)
    if role is None:
        raise UserError(
            f"there is no muP rule for the tensor {name} of shape {tuple(tensor.shape)}: freeze it, or leave it out of "
            "the model; rules exist for Llama's and Mixtral's tensors."
        )
    exponents = (IBM_RULES if record["preset"] == "ibm" else RULES)[role]
    if role in ("vector", "embedding"):
        return TensorRule(role, exponents, 1.0)
    width = config.hidden_size / record["base_width"]
    if kind_of(name, wrapped=True) not in _MLP_OUTPUTS:
        return TensorRule(role, exponents, width)
    # nn.Linear is (out, in), fused experts are (experts, out, in).
    r = tensor.shape[-1] / record["base_intermediate_size"]
    # Rounding must not make a group of its own: 1408 / (1408 / 15) is not 15.
    return TensorRule(role, exponents, width if math.isclose(r, width) else r)


def power(base: float, exponent: float) -> float:
    """base**exponent; roots are those of math.sqrt, from which ``**`` may differ in the last bit."""
    return math.sqrt(base) if exponent == 0.5 else base**exponent


def mup_init_(model: PreTrainedModel) -> PreTrainedModel:
    """Initialize the weights in place under muP, from torch's global random numbers.

    With s = initializer_range and r = fan_in / base fan_in: embeddings and lm_head N(0, s**2); hidden matrices and
    experts N(0, s**2 / r); router N(0, (s / r)**2); norms 1; biases 0. Preset "ibm": router as a hidden matrix, and
    output projections additionally / sqrt(2 * layers).

    Args:
        model: made by ``AutoModelForCausalLM.from_config(mup_config(...))``.

    Returns:
        The model.

    Raises:
        UserError: a model without ``config.mup``, or a tensor for which there is no rule; then nothing is changed.
    """
    ibm, config = mup_record(model)["preset"] == "ibm", model.config
    # Every rule is looked up first, so that a model with a tensor of no rule, such as an adapter's, stays as it is.
    rules = [
        (name, tensor, rule_of(name, tensor, config))
        for name, tensor in model.named_parameters()
        if tensor.requires_grad or role_of(name) is not None
    ]
    with torch.no_grad():
        for name, tensor, (_, exponents, r) in rules:
            if exponents.std is None:
                nn.init.constant_(tensor, 0.0 if name.endswith("bias") else 1.0)
                continue
            std = config.initializer_range / power(r, exponents.std)
            if ibm and kind_of(name, wrapped=True) in ("attention output", *_MLP_OUTPUTS):
                std /= math.sqrt(2 * config.num_hidden_layers)
            nn.init.normal_(tensor, mean=0.0, std=std)
        embedding = model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx].zero_()
    return model


def new_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model for causal language modeling as transformers initializes it; dtype None takes the config's."""
    kwargs = {} if dtype is None else {"dtype": dtype}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **kwargs)
    return model


def mup_param_groups(
    model: PreTrainedModel, *, lr: float, weight_decay: float = 0.0, eps: float = 1e-8
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
        UserError: a model without ``config.mup``, or a tensor for which there is no rule.
    """
    record, config, roles = mup_record(model), model.config, list(RULES)
    width = config.hidden_size / record["base_width"]
    depth = config.num_hidden_layers / (record["base_num_layers"] or config.num_hidden_layers)
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        role, exponents, r = rule_of(name, tensor, config)
        decay = 0.0 if exponents.weight_decay is None else weight_decay * power(r, exponents.weight_decay)
        own_eps = eps / power(width, exponents.eps) / (depth if role in ("hidden", "router") else 1.0)
        new = {"name": role, "params": [], "lr": lr / power(r, exponents.lr), "weight_decay": decay, "eps": own_eps}
        groups.setdefault((roles.index(role), r), new)["params"].append(tensor)
    ordered = [groups[key] for key in sorted(groups)]
    if (0, 1.0) not in groups:  # The embeddings are frozen, and the vectors are those at the base rate.
        ordered.sort(key=lambda group: group["name"] != "vector")
    names = [group["name"] for group in ordered]
    for (_, r), group in groups.items():
        if names.count(group["name"]) > 1:
            group["name"] = f"{group['name']}_r{r:g}"
    return ordered


class MupAdamW:
    """AdamW under muP for a Trainer: ``Trainer(..., optimizer_cls_and_kwargs=MupAdamW.for_trainer(args))``.

    The Trainer makes an instance and calls it with the model (``transformers`` calls this an optimizer factory).
    """

    @classmethod
    def for_trainer(cls, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """The pair that Trainer's optimizer_cls_and_kwargs takes, from TrainingArguments' own values.

        Raises:
            UserError: args.optim is no variant of AdamW, or one whose package is missing.
        """
        name = str(getattr(args.optim, "value", args.optim))
        if name not in ADAMW:
            raise UserError(f"optim is {name}, but muP has a rule for AdamW alone: give one of {', '.join(ADAMW)}.")
        with refused_by(f"optim {name}"):
            optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        return cls, {"optimizer": optimizer, "weight_decay": args.weight_decay, "fused": False, **kwargs}

    def __call__(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = True,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **variant: Any,
    ) -> torch.optim.Optimizer:
        """AdamW over `mup_param_groups`; its ``defaults["lr"]`` is the base learning rate.

        `optimizer` is torch's or another package's AdamW, and `variant` what that one takes besides.
        """
        groups = mup_param_groups(model, lr=lr, weight_decay=weight_decay, eps=eps)
        if fused:
            variant["fused"] = True
        if variant.get("optim_bits") == 8:
            # As the Trainer does it for optimizers that it makes itself: moments of embeddings are not rounded.
            from bitsandbytes.optim import GlobalOptimManager

            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
        return optimizer(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **variant)
