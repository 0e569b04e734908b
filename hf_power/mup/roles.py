"""Roles of the tensors of any causal LM, from which of their dimensions grow with the width; the plain form's factors.

A dimension grows if it differs between two widths of one config, built on the meta device. The plain form changes no
forward pass: what the multiplier form multiplies by c, it folds into the weights, theta' = c * theta.
"""

import copy
import math
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import NotRequired

from hf_power.compat import PreTrainedConfig
from hf_power.mup.rules import RECORD, RULES, Factors
from hf_power.mup.scale import num_outputs_of_routers, scale_width
from hf_power.records.errors import UserError, refused_by

VERSION = 1
# What engines and compilers put into the names of parameters.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Raw parameters of state-space and other recurrent layers.
_RECURRENT = ("A_log", "A_logs", "dt_bias", "D", "time_decay", "time_first", "time_mix_key", "recurrent_param")
# What `_shapes` has found, by class and config: building a model takes a tenth of a second even without memory.
_SHAPES: dict[tuple[type, str], dict[str, torch.Size]] = {}


class PlainRecord(TypedDict):
    """What `mup_init_` writes into the model's config under RECORD.

    version: of the rules. base_width, or base_sizes: the values of the base config that differ from the model's.
    final_gain: name of the module before the head, None for none. gain_offset: 1 where the gain is 1 + weight. gain: its
    first value at base width, which is 2 in Nemotron's class.
    scaled_embeddings: whether the model multiplies embeddings by sqrt(hidden_size).
    embedding_multiplier: m_emb, by which embeddings are multiplied at every width.
    """

    version: int
    base_width: NotRequired[int]
    base_sizes: NotRequired[dict[str, object]]
    final_gain: str | None
    gain_offset: int
    gain: float
    scaled_embeddings: bool
    embedding_multiplier: float


@dataclass(frozen=True)
class Role:
    """The role of a tensor, a key of RULES, and r = fan_in / base fan_in."""

    name: str
    r: float = 1.0


@dataclass(frozen=True)
class Widths:
    """Two widths of one model: what a tensor's dimensions are to be compared with.

    Attributes:
        shapes: of the tensors at the other width.
        m: hidden_size over that of the base.
        is_base: whether the other width is the base, so that each dimension has a ratio of its own; otherwise every
            dimension that grows has the ratio m.
    """

    shapes: dict[str, torch.Size]
    m: float
    is_base: bool

    def ratios(self, name: str, tensor: torch.Tensor) -> list[float | None]:
        """Each dimension over that at the base; None for one that does not grow."""
        pairs = zip(tensor.shape, self.shapes[name], strict=True)
        return [None if own == other else own / other if self.is_base else self.m for own, other in pairs]


def clean(name: str) -> str:
    """The name that a parameter has in the model alone."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def other_width(
    model: PreTrainedModel, base_width: int | None = None, base_sizes: dict[str, object] | None = None
) -> Widths:
    """The width to compare a model with: its base, or where the base is a number alone, twice its own width.

    Raises:
        UserError: a base that is no other width of this model.
    """
    config = model.config
    if base_sizes is None:
        m = config.hidden_size / cast("int", base_width)
        return Widths(_shapes(model, scale_width(config, 2 * config.hidden_size)), m, is_base=False)
    with refused_by("base_config"):
        base = type(config).from_dict({**config.to_dict(), **base_sizes})
    shapes = _shapes(model, base)
    for name, tensor in model.named_parameters():
        if len(shapes.get(clean(name), ())) != tensor.ndim:
            raise UserError(
                f"base_config is no other width of this model, which has the tensor {name} of shape {tuple(tensor.shape)}: "
                "change nothing but sizes that grow with the width."
            )
    return Widths(shapes, config.hidden_size / base.hidden_size, is_base=True)


def _shapes(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Shapes of the model's tensors under another config, without memory."""
    key = (type(model), config.to_json_string(use_diff=False))
    if key not in _SHAPES:
        with refused_by("the model's config at another width"), torch.device("meta"):
            twin = type(model)(copy.deepcopy(config))
        _SHAPES[key] = {name: tensor.shape for name, tensor in twin.named_parameters(remove_duplicate=False)}
    return _SHAPES[key]


def roles_of(model: PreTrainedModel, widths: Widths) -> dict[str, Role]:
    """The role of every trainable tensor.

    Raises:
        UserError: a tensor that cannot be classified, by its name and shape.
    """
    modules = {clean(name): module for name, module in model.named_modules()}
    for name, tensor in model.named_parameters():
        owner = modules[clean(name).rpartition(".")[0]]
        if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d) or name.rpartition(".")[2] in _RECURRENT:
            raise _unknown(name, tensor, "there is none for state-space, recurrent and convolution layers")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = {}
    for name, tensor in model.named_parameters():
        if not tensor.requires_grad:
            continue
        if clean(name) not in widths.shapes:
            raise _unknown(name, tensor, "the class of the model does not make it: freeze it, or leave it out")
        owner, leaf = modules[clean(name).rpartition(".")[0]], name.rpartition(".")[2]
        ratios = widths.ratios(clean(name), tensor)
        if tensor is embedding.weight or isinstance(owner, nn.Embedding):
            found[name] = _embedding(name, tensor, ratios)
        elif "bias" in leaf or tensor.ndim < 2:
            found[name] = Role("vector" if any(ratios) else "constant vector")
        elif head is not None and owner is head:
            found[name] = Role("head")
        else:
            found[name] = _matrix(name, tensor, owner, ratios, model.config, widths)
    return found


def _embedding(name: str, tensor: torch.Tensor, ratios: list[float | None]) -> Role:
    if ratios[0]:
        raise _unknown(name, tensor, "its number of rows grows with the width: give both configs the same vocab_size")
    return Role("embedding" if ratios[-1] else "constant matrix")


def _matrix(
    name: str,
    tensor: torch.Tensor,
    owner: nn.Module,
    ratios: list[float | None],
    config: PreTrainedConfig,
    widths: Widths,
) -> Role:
    """A matrix, or the matrices of all experts in one tensor."""
    is_known = isinstance(owner, nn.Linear | Conv1D)
    if tensor.ndim > 3 or (tensor.ndim == 3 and (ratios[0] or is_known)):
        raise _unknown(name, tensor, "it is neither a matrix nor one of several experts")
    incoming, outgoing = (-2, -1) if _is_transposed(owner, tensor, config, ratios) else (-1, -2)
    into, out = ratios[incoming], ratios[outgoing]
    if not into and not out:
        return Role("constant matrix")
    if into and not out and tensor.shape[outgoing] in num_outputs_of_routers(config):
        return Role("router", into)
    if into and not out and not widths.is_base:
        raise _unknown(name, tensor, f"its output size {tensor.shape[outgoing]} does not grow with the width")
    if tensor.ndim == 2 and not is_known and (into or not out):
        raise _unknown(name, tensor, "it belongs to no linear layer, so that nothing tells its fan-in")
    # A matrix of which the output alone grows has the rule of hidden ones with r = 1. One into an attention of fixed width
    # would be an output by the letter of Yang et al., with an init of s / r, but its block's changes then fall with the
    # width as m**-0.5, and as m**-0.1 with that of hidden matrices. Keys and values of a number of heads that stays, while
    # that of the queries grows, are between the two: what attention adds then changes as m**0.3 with the rule of hidden
    # matrices, because each value gathers the gradients of all query heads, and as m**-0.4 with that of outputs. The rule of
    # arXiv:2605.15290, a rate times (1 + sqrt(q)) / 2 for q times the queries per head, goes the other way: of a Llama with one
    # such head at widths 32 to 256 it makes +.19 into +.26. A rate over sqrt(q) leaves -.13 to +.13 there, but has no source and
    # was not trained with. `kept_kv_heads` warns of such models.
    return Role("hidden", _near(into or 1.0, widths.m))


def _near(r: float, m: float) -> float:
    """Rounding must not make a group of its own."""
    return m if math.isclose(r, m) else r


def _is_transposed(
    owner: nn.Module, tensor: torch.Tensor, config: PreTrainedConfig, ratios: list[float | None]
) -> bool:
    """Whether a matrix is stored as (in, out)."""
    if isinstance(owner, Conv1D):
        return True
    if tensor.ndim == 2:
        return False
    known = getattr(owner, "is_transposed", None)
    if known is not None or ratios[-1] == ratios[-2]:
        return bool(known)
    raise UserError(
        f"nothing tells whether the experts' tensor of shape {tuple(tensor.shape)} is stored as (in, out) or (out, in), "
        f"and its dimensions grow at different rates: scale all sizes of {config.model_type} in proportion."
    )


def _unknown(name: str, tensor: torch.Tensor, why: str) -> UserError:
    return UserError(f"there is no muP rule for the tensor {name} of shape {tuple(tensor.shape)}: {why}.")


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def plain_factors(model: PreTrainedModel) -> dict[str, Factors]:
    """The factors of every trainable tensor of a model of the plain form, by its name."""
    record = cast("PlainRecord", getattr(model.config, RECORD))
    widths = other_width(model, record.get("base_width"), record.get("base_sizes"))
    return {name: _folded(name, role, model, record, widths.m) for name, role in roles_of(model, widths).items()}


def _folded(name: str, role: Role, model: PreTrainedModel, record: PlainRecord, m: float) -> Factors:
    """The factors of a tensor with the multiplier that is folded into it.

    With a head of its own: c = 1 / m in it, and in embeddings m_emb, times m**-0.5 where the model multiplies them by
    sqrt(hidden_size). With a tied one, the final gain has what is left of 1 / m.
    """
    of_embeddings = record["embedding_multiplier"] * (m**-0.5 if record["scaled_embeddings"] else 1.0)
    tied, c = is_tied(model), 1.0
    if role.name == "embedding" and name == _embedding_name(model):
        c = of_embeddings
    elif role.name == "head":
        c = 1.0 / m
    elif tied and clean(name).rpartition(".")[0] == record["final_gain"]:
        c = 1.0 / (m * of_embeddings)
    return Factors.of(role.name, RULES[role.name], r=role.r, m=m, multiplier=c)


def _embedding_name(model: PreTrainedModel) -> str | None:
    """The name under which the embedding is listed, which may be the head's where they are tied."""
    weight = model.get_input_embeddings().weight
    return next((name for name, tensor in model.named_parameters() if tensor is weight), None)


def final_gain_of(model: PreTrainedModel) -> tuple[str | None, float]:
    """The name of the module with the final gain, and the multiplier that is folded into it; (None, 1) without one."""
    record = cast("PlainRecord | None", getattr(model.config, RECORD, None))
    if record is None:
        return "model.norm", 1.0
    name = record["final_gain"]
    factors = plain_factors(model)
    return name, 1.0 if name is None else factors[f"{name}.weight"].multiplier
