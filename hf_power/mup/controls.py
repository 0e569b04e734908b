"""Parameterizations that are wrong on purpose, or a baseline: what a coordinate check or a transfer sweep is held against."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_power.mup.init import initializer_range, mup_init_
from hf_power.mup.optimizer import factors_of, mup_param_groups
from hf_power.mup.roles import PlainRecord, is_tied
from hf_power.mup.rules import RECORD, Factors, mup_record
from hf_power.records.errors import UserError

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Control:
    """One of CONTROLS: what it is, its first weights (None: muP's), its groups, and whether it is the stock model."""

    text: str
    init: Callable[[PreTrainedModel], object] | None
    groups: Callable[..., Groups]
    is_standard: bool = False


@torch.no_grad()
def standard_init_(model: PreTrainedModel) -> None:
    """Every matrix N(0, initializer_range**2), whatever its width; a final gain of 1. The model is of the plain form.

    An embedding_multiplier is a constant of the model, and is kept.
    """
    record, kept = cast("PlainRecord", getattr(model.config, RECORD)), _at_base(model)
    for name, own in factors_of(model).items():
        tensor = model.get_parameter(name)
        multiplier = kept.get(id(tensor), 1.0)
        if own.std is not None:
            nn.init.normal_(tensor, std=initializer_range(model.config) * multiplier)
        elif own.multiplier != 1.0 and not name.endswith("bias"):
            nn.init.constant_(tensor, record["gain"] * multiplier - record["gain_offset"])


def standard_groups(model: PreTrainedModel, *, lr: float, weight_decay: float = 0.0) -> Groups:
    """One learning rate for all, and no weight decay of gains and biases, as the Trainer has it."""
    return _split(model, lr, weight_decay, ())


def embedding_rate_groups(model: PreTrainedModel, *, lr: float, weight_decay: float = 0.0) -> Groups:
    """MuP's rate for the embedding, lr, and for all else the one rate lr / m, with m = hidden_size / base_width.

    The one rate of standard parameterization falls with the width because of its hidden matrices, and muP's embedding does
    not follow it; Kalra and Barkeshli (arXiv:2605.21486) say that most of muP's gain under AdamW is that.
    """
    m, embedding = width_ratio(model), model.get_input_embeddings().weight
    c = _at_base(model).get(id(embedding), 1.0)
    first = {"name": "embedding", "params": [embedding], "lr": lr * c, "weight_decay": weight_decay / c}
    return [first, *_split(model, lr / m, weight_decay * m, (embedding,))]


def _split(model: PreTrainedModel, lr: float, weight_decay: float, without: Sequence[object]) -> Groups:
    """Groups of the trainable tensors that muP decays, with this coefficient, and of the others, with none."""
    found, left_out, kept = factors_of(model), {id(tensor) for tensor in without}, _at_base(model)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad or id(tensor) in left_out:
            continue
        c, is_decayed = kept.get(id(tensor), 1.0), found[name].weight_decay is not None
        new: dict[str, Any] = {"name": "decayed" if is_decayed else "not decayed", "params": [], "lr": lr * c}
        new |= {"weight_decay": weight_decay / c if is_decayed else 0.0}
        groups.setdefault((c, is_decayed), new)["params"].append(tensor)
    return list(groups.values())


def _at_base(model: PreTrainedModel) -> dict[int, float]:
    """The multipliers that tensors of the plain form have at every width, by the tensor's id: those of m_emb."""
    record = cast("PlainRecord | None", getattr(model.config, RECORD, None))
    if record is None:
        return {}
    found = {id(model.get_input_embeddings().weight): record["embedding_multiplier"]}
    if is_tied(model):
        final = model.get_submodule(cast("str", record["final_gain"]))
        found |= {id(tensor): 1 / record["embedding_multiplier"] for tensor in final.parameters()}
    return found


def width_ratio(model: PreTrainedModel) -> float:
    """hidden_size over that of the base, of a model under muP."""
    record = mup_record(model)
    if record is not None:
        return float(model.config.hidden_size / record["base_width"])
    own = cast("PlainRecord", getattr(model.config, RECORD))
    base = own.get("base_width") or cast("int", own["base_sizes"].get("hidden_size", model.config.hidden_size))
    return float(model.config.hidden_size / base)


def experts_left_out(model: PreTrainedModel, *, lr: float, weight_decay: float = 0.0) -> Groups:
    """muP, but for the experts, which have the base rate at every width."""
    return _with_rate(model, lr, weight_decay, "experts", lambda name, own: own.lr if ".experts." in name else 1.0)


def head_counted_twice(model: PreTrainedModel, *, lr: float, weight_decay: float = 0.0) -> Groups:
    """muP, but for the head, whose rate is divided by m once more."""
    if is_tied(model):
        raise UserError("the control head_counted_twice needs a head of its own: set tie_word_embeddings to False.")
    head, m = model.get_output_embeddings().weight, width_ratio(model)
    name = next(name for name, tensor in model.named_parameters() if tensor is head)
    return _with_rate(model, lr, weight_decay, "head", lambda each, own: 1 / m if each == name else 1.0)


@torch.no_grad()
def hidden_size_init_(model: PreTrainedModel) -> None:
    """MuP's first weights, but with hidden_size's ratio m in the place of each hidden matrix's own fan-in ratio."""
    mup_init_(model)
    for name, own in factors_of(model).items():
        if own.role == "hidden":
            model.get_parameter(name).mul_(math.sqrt(own.r / width_ratio(model)))


def hidden_size_for_all(model: PreTrainedModel, *, lr: float, weight_decay: float = 0.0) -> Groups:
    """muP, but hidden_size's ratio m in the place of each hidden matrix's own fan-in ratio."""
    m = width_ratio(model)
    return _with_rate(
        model, lr, weight_decay, "matrix with another fan-in", lambda _, own: own.r / m if own.role == "hidden" else 1.0
    )


def _with_rate(
    model: PreTrainedModel, lr: float, weight_decay: float, what: str, factor: Callable[[str, Factors], float]
) -> Groups:
    """MuP's groups with the rates of some tensors multiplied."""
    found, names = factors_of(model), {id(tensor): name for name, tensor in model.named_parameters()}
    groups, changed = [], False
    for group in mup_param_groups(model, lr=lr, weight_decay=weight_decay):
        for tensor in group["params"]:
            name = names[id(tensor)]
            times = factor(name, found[name])
            changed = changed or times != 1.0
            groups.append({**group, "params": [tensor], "lr": group["lr"] * times})
    if not changed and width_ratio(model) != 1.0:
        raise UserError(f"this control changes the rate of each {what}, and this model has none: leave it out.")
    return groups


BASELINE = "embedding_rate"  # It is a rival of muP, which need not fail.
CONTROLS = {
    "standard": Control("standard parameterization", standard_init_, standard_groups, is_standard=True),
    BASELINE: Control(
        "standard parameterization with muP's embedding rate only",
        standard_init_,
        embedding_rate_groups,
        is_standard=True,
    ),
    "experts_left_out": Control("the experts at the base rate", None, experts_left_out),
    "head_counted_twice": Control("the head's rate divided by m twice", None, head_counted_twice),
    "hidden_size_for_all": Control("one ratio m for matrices of every fan-in", hidden_size_init_, hidden_size_for_all),
}


def control_of(name: str | None) -> Control | None:
    """The control of a name; a UserError for one that is none."""
    if name is not None and name not in CONTROLS:
        raise UserError(f"control must be one of {', '.join(CONTROLS)}, got {name!r}.")
    return None if name is None else CONTROLS[name]
