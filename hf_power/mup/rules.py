"""muP's rules: what a role does to the init, learning rate, weight decay and eps of a tensor, for both forms of muP.

They are those of Shen et al. (arXiv:2408.13359, Table 1) after Yang et al. (arXiv:2203.03466); depth is CompleteP's
(arXiv:2505.01618, Table 1).
"""

import math
from typing import NamedTuple, TypedDict

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel

from hf_power.compat import PreTrainedConfig
from hf_power.models import kind_of
from hf_power.records.errors import UserError

RECORD = "hf_power_mup"  # Where a config says how its model of the plain form was made; no library takes such a name.


class Rule(NamedTuple):
    """Exponents of one role, of r = fan_in / base fan_in of the tensor and m = hidden_size / base_width of the model.

    Attributes:
        std: the init is N(0, (initializer_range / r**std)**2); None for gains and biases, which have constants.
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
    "head": Rule(0.0, 0, 0, 1),
    "hidden": Rule(0.5, 1, 1, 1),
    "router": Rule(1.0, 1, 1, 1),
    "vector": Rule(None, 0, None, 1),
    # Tensors of which no dimension grows, such as the gains of a QK norm, which all heads share.
    "constant vector": Rule(None, 0, None, 0),
    "constant matrix": Rule(0.0, 0, 0, 0),
}
# IBM's training code takes a router for a hidden matrix, has one m for all hidden matrices, corrects neither weight decay nor
# eps, and divides the init of output projections by sqrt(2 * layers) as well.
IBM_RULES = {
    "embedding": Rule(0.0, 0, 0, 0),
    "hidden": Rule(0.5, 1, 0, 0),
    "router": Rule(0.5, 1, 0, 0),
    "vector": Rule(None, 0, None, 0),
}
ROLES = {
    "embedding": ("embedding", "head"),  # The multiplier form divides the logits by m, so its head is an embedding.
    "hidden": (
        *("query", "key or value", "attention output"),
        *("MLP input", "MLP output", "experts' input", "experts' output"),
    ),
    "router": ("router",),
    "vector": ("norm", "final norm"),
}
MLP_OUTPUTS = ("MLP output", "experts' output")
_ROLE_OF: dict[str | None, str] = {kind: role for role, kinds in ROLES.items() for kind in kinds}


class MupRecord(TypedDict):
    """What `mup_config` writes into the model's config under "mup"."""

    preset: str
    plain_model_type: str
    base_width: int
    base_intermediate_size: float
    base_attention_width: float
    base_head_dim: int
    base_num_layers: int | None


class Factors(NamedTuple):
    """What muP does to one tensor theta, of which the plain form stores theta' = c * theta.

    Attributes:
        role: a key of RULES.
        r: fan_in / base fan_in, 1 where the role does not depend on it.
        std: the init's standard deviation is initializer_range / std; None where the init is a constant.
        lr: the learning rate is eta / lr.
        weight_decay: the coefficient is wd * weight_decay; None for no decay.
        eps: AdamW's epsilon is eps / this.
        multiplier: c, 1 but for the tensors into which the plain form folds a multiplier.
        in_block: whether depth changes its eps.
    """

    role: str
    r: float
    std: float | None
    lr: float
    weight_decay: float | None
    eps: float
    multiplier: float = 1.0
    in_block: bool = False

    @classmethod
    def of(
        cls,
        role: str,
        rule: Rule,
        *,
        r: float = 1.0,
        m: float,
        depth: float = 1.0,
        multiplier: float = 1.0,
        in_block: bool = False,
    ) -> "Factors":
        """The factors of a rule; with theta' = c * theta, std and lr are times c, weight decay and eps over c."""
        return cls(
            role=role,
            r=r,
            std=None if rule.std is None else power(r, rule.std) / multiplier,
            lr=power(r, rule.lr) / multiplier,
            weight_decay=None if rule.weight_decay is None else power(r, rule.weight_decay) / multiplier,
            eps=power(m, rule.eps) * depth * multiplier,
            multiplier=multiplier,
            in_block=in_block,
        )


def power(base: float, exponent: float) -> float:
    """base**exponent; roots are those of math.sqrt, from which ``**`` may differ in the last bit."""
    return math.sqrt(base) if exponent == 0.5 else base**exponent


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, inside of what torch.compile and data parallelism wrap it in; its tensors are the same."""
    inner: PreTrainedModel = extract_model_from_parallel(model, keep_torch_compile=False)
    return model if inner is model else unwrapped(inner)


def mup_record(model: PreTrainedModel) -> MupRecord | None:
    """How `mup_config` made the model's config; None where it did not."""
    record: MupRecord | None = getattr(getattr(model, "config", None), "mup", None)
    # A config of transformers may come to have a truth value of this name.
    return record if isinstance(record, dict) else None


def multiplier_factors(model: PreTrainedModel) -> dict[str, Factors]:
    """The factors of every tensor of a model whose config has been through `mup_config`, by its name.

    Raises:
        UserError: a trainable tensor for which there is no rule; one that is frozen is left out.
    """
    found = {}
    for name, tensor in model.named_parameters():
        role = _role_of(name)
        if role is not None:
            found[name] = _factors_of(name, role, tensor, model.config)
        elif tensor.requires_grad:
            raise UserError(
                f"there is no muP rule for the tensor {name} of shape {tuple(tensor.shape)}: freeze it, or leave it out of "
                "the model; rules exist for Llama's and Mixtral's tensors."
            )
    return found


def _role_of(name: str) -> str | None:
    """The role of a tensor, a key of RULES; None where there is no rule for it, which is never guessed."""
    if name.endswith((".bias", "norm.weight")):
        return "vector"
    return _ROLE_OF.get(kind_of(name, wrapped=True))


def _factors_of(name: str, role: str, tensor: torch.Tensor, config: PreTrainedConfig) -> Factors:
    """The factors of one tensor of the multiplier form: r is of its own fan-in, and 1 for embeddings and vectors."""
    record: MupRecord = config.mup
    m, in_block = config.hidden_size / record["base_width"], "layers." in name
    depth = config.num_hidden_layers / (record["base_num_layers"] or config.num_hidden_layers) if in_block else 1.0
    rule = (IBM_RULES if record["preset"] == "ibm" else RULES)[role]
    kind, r = kind_of(name, wrapped=True), 1.0
    if role in ("hidden", "router"):
        # nn.Linear is (out, in), fused experts are (experts, out, in).
        bases = {"attention output": record["base_attention_width"]}
        bases |= dict.fromkeys(MLP_OUTPUTS, record["base_intermediate_size"])
        r = tensor.shape[-1] / bases[kind] if kind in bases else m
        # Rounding must not make a group of its own: 1408 / (1408 / 15) is not 15.
        r = m if math.isclose(r, m) else r
    return Factors.of(role, rule, r=r, m=m, depth=depth, in_block=in_block)
