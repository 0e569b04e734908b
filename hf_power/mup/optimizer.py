"""AdamW under muP: mup_param_groups and MupAdamW, for both forms."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_power.mup.roles import plain_factors
from hf_power.mup.rules import RECORD, RULES, Factors, multiplier_factors, mup_record, unwrapped
from hf_power.records.errors import UserError, refused_by

# The names that transformers has for AdamW and its variants, the only optimizer for which muP has a rule here.
ADAMW = (
    *("adamw_torch_fused", "adamw_torch", "adamw_torch_8bit", "adamw_torch_4bit"),
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
)

# The hooks of `MupAdamW` by tensor, so that a second optimizer over the same model replaces them.
_HOOKS = WeakTensorKeyDictionary()


def factors_of(model: PreTrainedModel) -> dict[str, Factors]:
    """The factors of every tensor of a model under muP, by its name.

    Raises:
        UserError: a model that was not made under muP, or a trainable tensor for which there is no rule.
    """
    if mup_record(model) is not None:
        return multiplier_factors(model)
    if getattr(getattr(model, "config", None), RECORD, None) is not None:
        return plain_factors(model)
    raise UserError(
        f"{type(model).__name__} was not made under muP: initialize it with mup_init_(model, base_width=...), or build it "
        "from a muP config with AutoModelForCausalLM.from_config(mup_config(LlamaConfig(...)))."
    )


def mup_param_groups(
    model: PreTrainedModel, *, lr: float, weight_decay: float = 0.0, eps: float = 1e-8
) -> list[dict[str, Any]]:
    """Named parameter groups for AdamW under muP.

    With eta = lr, wd = weight_decay, r = fan_in / base fan_in of the tensor and m = hidden_size / base_width:

    ===============  ==========================  ========  ==================  ============
    group            tensors                     lr        weight decay        eps
    ===============  ==========================  ========  ==================  ============
    embedding        embedding, positions        eta       wd                  eps / m
    hidden           attention, MLP, experts     eta / r   wd * r              eps / m
    router           router                      eta / r   wd * r              eps / m
    vector           gains, biases               eta       0                   eps / m
    constant vector  of a size that never grows  eta       0                   eps
    constant matrix  of sizes that never grow    eta       wd                  eps
    head             lm_head                     eta       wd                  eps / m
    ===============  ==========================  ========  ==================  ============

    The multiplier form (`mup_config`) has the head in the group "embedding". The plain form (`mup_init_` with a base) folds
    a multiplier c into some tensors, whose group then has lr * c, wd / c, eps / c and the key "multiplier": the head has
    c = 1 / m, or if it is tied the final gain; where the model multiplies embeddings by sqrt(hidden_size), the
    embedding has m**-0.5, and so has the final gain if the head is tied.

    Group 0 has the base rate, which the Trainer logs. Groups of one role that differ have names such as ``hidden_r4``.
    Preset "ibm": weight decay wd and eps everywhere. With base_num_layers, eps of everything inside the blocks is also
    divided by layers / base_num_layers (CompleteP); the vectors outside are ``vector_outside_blocks``. Every trainable
    parameter is in exactly one group; shapes are global ones, so sharding does not change the groups.

    Args:
        model: its config has been through `mup_config`, or it has been through ``mup_init_(model, base_width=...)``.
        lr: eta, base learning rate (the cap of the Power schedule).
        weight_decay: AdamW's decoupled coefficient, as PyTorch multiplies it by the learning rate.
        eps: AdamW's epsilon at base width.

    Returns:
        List of dicts with name, params, lr, weight_decay, eps and, in the plain form, multiplier, in a fixed order.

    Raises:
        UserError: a model that was not made under muP, or a tensor for which there is no rule.
    """
    model, roles = unwrapped(model), list(RULES)
    found, trained = factors_of(model), {name: each for name, each in model.named_parameters() if each.requires_grad}
    groups: dict[tuple[object, ...], dict[str, Any]] = {}
    of_group: dict[tuple[object, ...], Factors] = {}
    plain = mup_record(model) is None
    for name, tensor in trained.items():
        own = found[name]
        decay = 0.0 if own.weight_decay is None else weight_decay * own.weight_decay
        new = {"name": own.role, "params": [], "lr": lr / own.lr, "weight_decay": decay, "eps": eps / own.eps}
        if plain:
            new["multiplier"] = own.multiplier
        key = (roles.index(own.role), own.r, -own.multiplier, own.eps)
        groups.setdefault(key, new)["params"].append(tensor)
        of_group.setdefault(key, own)
    base = next((key for key in sorted(groups) if of_group[key].lr == 1.0), None)
    keys = sorted(groups, key=lambda key: (key != base, key))
    _name_apart([(groups[key], of_group[key]) for key in keys])
    return [groups[key] for key in keys]


def _name_apart(groups: list[tuple[dict[str, Any], Factors]]) -> None:
    """Give groups of one role names of their own, by what they differ in."""
    for role in RULES:
        alike = [(group, own) for group, own in groups if own.role == role]
        for group, own in alike:
            if len({other.multiplier for _, other in alike}) > 1 and own.multiplier != 1:
                group["name"] += "_folded"
            if len({other.r for _, other in alike}) > 1:
                group["name"] += f"_r{own.r:g}"
            if len({other.in_block for _, other in alike}) > 1 and not own.in_block:
                group["name"] += "_outside_blocks"


class MupAdamW:
    """AdamW under muP for a Trainer: ``Trainer(..., optimizer_cls_and_kwargs=MupAdamW.for_trainer(args))``.

    The Trainer makes an instance and calls it with the model (``transformers`` calls this an optimizer factory).

    For a model of the plain form it also makes clipping that of the multiplier form: a tensor with a folded multiplier
    c gets a gradient hook that multiplies its gradient by c, so that ``max_grad_norm`` holds for the norm of c * g,
    as does the norm that a Trainer logs. AdamW divides by the gradient's size, so that nothing else changes; eps is times c.
    FSDP trains other tensors than those that it shards, which get their hooks when they are there. Under DeepSpeed's ZeRO 3
    the hooks are not known to be called, so that it is refused together with clipping.
    """

    def __init__(self, *parameters: object, **kwargs: object) -> None:
        if parameters:
            raise UserError(
                f"the Trainer of transformers {transformers.__version__} has no optimizer factories: pass "
                "optimizers=(hf_power.mup_adamw(model, args), None) to it."
            )

    @classmethod
    def for_trainer(cls, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
        """The pair that Trainer's optimizer_cls_and_kwargs takes, from TrainingArguments' own values.

        Raises:
            UserError: args.optim is no variant of AdamW, or one whose package is missing.

        Warns:
            UserWarning: weight decay and beta2 are both those that TrainingArguments have by default.
        """
        if args.weight_decay == 0 and args.adam_beta2 == 0.999:
            warnings.warn(
                "weight_decay 0 and adam_beta2 0.999 are the defaults of TrainingArguments, and not what muP's laws were tuned "
                "with: give TrainingArguments(weight_decay=0.1, adam_beta2=0.95), as hf-power pretrain has them.",
                stacklevel=2,
            )
        factory, kwargs = optimizer_of(args)
        return factory, kwargs

    def __call__(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = True,
        max_grad_norm: float = 0.0,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **variant: Any,
    ) -> torch.optim.Optimizer:
        """AdamW over `mup_param_groups`; its ``defaults["lr"]`` is the base learning rate.

        `max_grad_norm` is what whoever trains clips to, `optimizer` torch's or another package's AdamW, and `variant` what
        that one takes besides.
        """
        groups = mup_param_groups(model, lr=lr, weight_decay=weight_decay, eps=eps)
        multipliers = WeakTensorKeyDictionary()
        for group in groups:
            multiplier = group.get("multiplier", 1.0)
            group["eps"] *= multiplier
            for tensor in group["params"]:
                _multiply_gradient_(tensor, multiplier)
                if multiplier != 1.0:
                    multipliers[tensor] = multiplier
        if multipliers and max_grad_norm and is_deepspeed_zero3_enabled():
            raise UserError(
                f"max_grad_norm is {max_grad_norm}, but under DeepSpeed's ZeRO 3 the norm would not be that of muP, whose multipliers "
                "are folded into the weights: set max_grad_norm to 0, or take ZeRO 2 or FSDP2."
            )
        _follow_shards_(model, multipliers)
        if fused:
            variant["fused"] = True
        if variant.get("optim_bits") == 8:
            # As the Trainer does it for optimizers that it makes itself: moments of embeddings are not rounded.
            from bitsandbytes.optim import GlobalOptimManager

            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
        return optimizer(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **variant)


def optimizer_of(args: TrainingArguments) -> tuple[type[MupAdamW], dict[str, Any]]:
    """What `MupAdamW.for_trainer` returns, for whoever has chosen the numbers of AdamW himself."""
    name = str(getattr(args.optim, "value", args.optim))
    if name not in ADAMW:
        raise UserError(f"optim is {name}, but muP has a rule for AdamW alone: give one of {', '.join(ADAMW)}.")
    with refused_by(f"optim {name}"):
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    return MupAdamW, {
        "optimizer": optimizer,
        "weight_decay": args.weight_decay,
        "fused": False,
        "max_grad_norm": args.max_grad_norm,
        **kwargs,
    }


def mup_adamw(model: PreTrainedModel, args: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW under muP with the numbers of the arguments, for ``Trainer(..., optimizers=(mup_adamw(model, args), None))``.

    It does what `MupAdamW` does, and also with the Trainers before transformers 5.2, which take no optimizer factory.

    Raises:
        UserError: as `mup_param_groups` and `MupAdamW.for_trainer` do.
    """
    factory, kwargs = MupAdamW.for_trainer(args)
    optimizer: torch.optim.Optimizer = factory()(model, **kwargs)
    return optimizer


def _follow_shards_(model: nn.Module, multipliers: WeakTensorKeyDictionary) -> None:
    """Let the tensors that FSDP puts in the place of a module's own in a forward pass have the same hooks."""
    sharded = any(isinstance(tensor, DTensor) for tensor in model.parameters())
    if not sharded and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            if tensor in multipliers:
                module.register_forward_pre_hook(functools.partial(_hook_tensor, name, multipliers[tensor]))


def _hook_tensor(name: str, multiplier: float, module: nn.Module, _args: object) -> None:
    tensor = getattr(module, name)
    if tensor.requires_grad and tensor not in _HOOKS:
        _multiply_gradient_(tensor, multiplier)


def _multiply_gradient_(tensor: torch.Tensor, multiplier: float) -> None:
    """Multiply every gradient that a backward pass gives this tensor, in place of what an earlier call asked for."""
    if tensor in _HOOKS:
        _HOOKS.pop(tensor).remove()  # type: ignore[no-untyped-call]
    if multiplier != 1.0:

        @torch.utils.hooks.unserializable_hook  # type: ignore[untyped-decorator]
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * multiplier

        _HOOKS[tensor] = tensor.register_hook(hook)  # type: ignore[no-untyped-call]
