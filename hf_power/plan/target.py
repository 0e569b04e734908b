"""What is planned for: the model and length of a run, the machine that it runs on, and how it uses the memory there."""

import math
from dataclasses import dataclass

from hf_power.compat import PreTrainedConfig
from hf_power.models import usual_utilisation
from hf_power.records.errors import UserError

SHARDINGS = ("none", "optimizer", "full")
PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class Target:
    """A run to come.

    Attributes:
        tokens: length of the run, rounded up to whole steps.
        tokens_per_step: tokens of one optimizer step over all processes.
        config: of the model, any causal LM; or
        parameters: its size alone, those that a token passes (active ones), without embeddings but with the head.
        block_size: tokens per sequence.

    Raises:
        UserError: neither or both of config and parameters, or a number that is not positive.
    """

    tokens: int
    tokens_per_step: int
    config: PreTrainedConfig | None = None
    parameters: int | None = None
    block_size: int = 4096

    def __post_init__(self) -> None:
        if (self.config is None) == (self.parameters is None):
            raise UserError("the target needs a config or its number of parameters: pass one of them.")
        check_positive(tokens=self.tokens, tokens_per_step=self.tokens_per_step, block_size=self.block_size)
        if self.parameters is not None:
            check_positive(parameters=self.parameters)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.tokens / self.tokens_per_step)

    @property
    def total_tokens(self) -> int:
        """Tokens of the run in whole steps."""
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Machine:
    """The accelerators of a run.

    Attributes:
        devices: how many.
        flops_per_device: peak of one of them in FLOP/s; the default is an H100's in bf16 without sparsity.
        utilisation: share of the peak that a run reaches, in (0, 1]; None: see `hf_power.models.usual_utilisation`.
        device_memory: bytes of one device.

    Raises:
        UserError: a number out of range.
    """

    devices: int = 8
    flops_per_device: float = 989e12
    utilisation: float | None = None
    device_memory: float = 80e9

    def __post_init__(self) -> None:
        check_positive(devices=self.devices, flops_per_device=self.flops_per_device, device_memory=self.device_memory)
        if self.utilisation is not None:
            check_positive(utilisation=self.utilisation)
            if self.utilisation > 1:
                raise UserError(f"utilisation must be at most 1, got {self.utilisation}: pass 0.4 for 40 %.")

    def utilisation_of(self, config: PreTrainedConfig | None) -> float:
        """The share of the peak that a run of this model reaches."""
        return usual_utilisation(config) if self.utilisation is None else self.utilisation

    def days(self, flops: float, config: PreTrainedConfig | None) -> float:
        """Days that the FLOPs of a run take."""
        return flops / (self.devices * self.flops_per_device * self.utilisation_of(config) * 86_400)


@dataclass(frozen=True)
class Layout:
    """How a run keeps its numbers in memory.

    Attributes:
        precision: "bf16" (autocast under none and optimizer, FSDP2's policy under full) or "fp32".
        sharding: "none" is DDP, "optimizer" divides AdamW's moments between the devices, "full" (FSDP2, a unit per
            layer, resharded after forward) weights, gradients and moments.
        activation_checkpointing: each layer keeps its input alone and is computed again in the backward pass.

    Raises:
        UserError: an unknown precision or sharding.
    """

    precision: str = "bf16"
    sharding: str = "full"
    activation_checkpointing: bool = True

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("sharding", self.sharding, SHARDINGS)

    @property
    def compute(self) -> str:
        """The precision of a forward pass, see `hf_power.plan.footprint.activation_bytes`."""
        if self.precision == "fp32":
            return "fp32"
        return "bf16" if self.sharding == "full" else "autocast"


def check_positive(**numbers: float) -> None:
    """Raise a UserError for the first number that is not positive and finite."""
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive, got {value!r}: correct it.")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a UserError for a value that is not among those allowed."""
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}: correct it.")
