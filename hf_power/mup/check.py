"""Is there a rule for a model, and does an optimizer have muP's learning rates? Both are asked before a training begins."""

import math
from typing import cast

import torch
from transformers import PreTrainedModel

from hf_power.compat import PreTrainedConfig
from hf_power.models import without_memory
from hf_power.mup.init import base_sizes, mup_init_, new_model
from hf_power.mup.optimizer import mup_param_groups
from hf_power.mup.roles import other_width, roles_of
from hf_power.mup.rules import RECORD, mup_record
from hf_power.mup.shrink import WIDTH, shrink
from hf_power.records.errors import UserError
from hf_power.scheduler import chosen_rate

# Beyond so many times the rate that is usual for a model of its size a peak is said to be high.
HIGH = 4.0


def rates_beside_mup(model: torch.nn.Module, optimizer: object) -> str | None:
    """One sentence about an optimizer that trains a muP model at rates that are not muP's; None where all is well.

    A tensor's rate is compared as its ratio to the optimizer's base rate, with that of `mup_param_groups`. Tensors
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
    base = chosen_rate(optimizer)
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


def refuse_without_rule(
    config: PreTrainedConfig,
    *,
    base_width: int | None = None,
    base_config: PreTrainedConfig | None = None,
    embedding_multiplier: float | None = None,
) -> None:
    """Refuse a config of the plain form before its data are read: by the shapes of its tensors, and a small model's passes.

    Raises:
        UserError: what `mup_init_` says against the model, or a model in which a token sees those that come after it.
    """
    model = without_memory(config)
    sizes = None if base_config is None else base_sizes(config, base_config)
    roles_of(model, other_width(model, base_width, sizes))
    try:
        small_config = shrink(config, vocab_size=64, pad_token_id=None)
    except UserError:  # What a forward pass shows is then seen on the model itself.
        return
    with torch.random.fork_rng(devices=[]):
        small = new_model(small_config, dtype=torch.float32)
        mup_init_(small, base_width=WIDTH, embedding_multiplier=embedding_multiplier)
        tokens = torch.arange(8)[None]
        other = tokens.clone()
        other[0, -1] = 0
        with torch.no_grad():
            before, after = (small.eval()(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (tokens, other))
    if not torch.allclose(before, after, atol=1e-4 * float(before.abs().max())):
        raise UserError(
            f"in a {config.model_type} a token sees those that come after it, so that it cannot be trained to tell the next "
            "one: take a causal model (is_decoder: true, where its config has that)."
        )


def rate_without_mup(model: torch.nn.Module | None, peak: float) -> str | None:
    """What speaks against a peak where muP is absent: it is far above what is usual for the model's size.

    The usual rate is ``.003239 - .0001395 ln N`` with N the number of parameters (Kaplan et al. 2020, arXiv:2001.08361,
    eq. D.1), which was found for AdamW and cosine in standard parameterization, at N up to 1.5e9.
    """
    config = getattr(model, "config", None)
    if (
        model is None
        or mup_record(cast("PreTrainedModel", model)) is not None
        or getattr(config, RECORD, None) is not None
    ):
        return None
    size = sum(parameter.numel() for parameter in model.parameters())
    usual = 0.003239 - 0.0001395 * math.log(min(max(size, 1), 1.5e9))
    if peak <= HIGH * usual:
        return None
    return (
        f"the rate rises to {peak:.3g}, {peak / usual:.3g} times what is usual for {size:,} parameters without muP "
        f"({usual:.2g}): if the loss does not fall, give the best peak of cosine that you know as "
        'lr_scheduler_kwargs={"peak_lr": ...}, warm up longer, or train under muP (hf_power.mup_init_)'
    )
