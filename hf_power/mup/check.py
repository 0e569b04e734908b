"""Does an optimizer have muP's learning rates? Seen where a schedule is made for a muP model; uses only public parts."""

import math
from typing import cast

import torch
from transformers import PreTrainedModel

from hf_power.mup.optimizer import mup_param_groups
from hf_power.mup.rules import RECORD, mup_record
from hf_power.records.errors import UserError


def rates_beside_mup(model: torch.nn.Module, optimizer: object) -> str | None:
    """One sentence about an optimizer that trains a muP model at rates that are not muP's; None where all is well.

    A tensor's rate is compared as its ratio to ``optimizer.defaults["lr"]``, with that of `mup_param_groups`. Tensors
    that an engine has replaced (flattened shards) are not compared, and a model with trainable tensors without a rule
    (adapters) is not either.
    """
    whole = cast("PreTrainedModel", model)
    is_mup = mup_record(whole) is not None or hasattr(getattr(model, "config", None), RECORD)
    # accelerate has a stand-in for DeepSpeed's optimizer, which has no groups.
    if not is_mup or not isinstance(optimizer, torch.optim.Optimizer):
        return None
    try:
        groups = mup_param_groups(whole, lr=1.0)
    except UserError:
        return None
    ratios = {id(tensor): group["lr"] for group in groups for tensor in group["params"]}
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    base = float(optimizer.defaults["lr"])
    factors = {
        names[id(tensor)]: rate / base / ratios[id(tensor)]
        for group in optimizer.param_groups
        if (rate := float(group.get("initial_lr", group["lr"])))  # A rate of zero freezes its tensors on purpose.
        for tensor in group["params"]
        if id(tensor) in ratios
    }
    worst = max(factors, key=lambda name: abs(math.log(factors[name])), default=None)
    if worst is None or math.isclose(factors[worst], 1, rel_tol=0.01):
        return None
    return (
        f"this model was made under muP, but the optimizer trains {worst} at {factors[worst]:.3g} times its muP "
        "learning rate: pass optimizer_cls_and_kwargs=MupAdamW.for_trainer(args) to the Trainer, or build the optimizer "
        "over mup_param_groups(model, lr=...)."
    )
