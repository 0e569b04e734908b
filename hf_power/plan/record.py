"""The plan of a run as a value, the content of plan.json, and its table: the run on several numbers of devices."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hf_power.compat import PreTrainedConfig
from hf_power.models import flops_per_token
from hf_power.plan.footprint import footprint
from hf_power.plan.loss import PlannedLoss
from hf_power.plan.target import SHARDINGS, Layout, Machine, Target, check_positive
from hf_power.records.errors import UserError
from hf_power.records.files import Record
from hf_power.records.run import Intervals
from hf_power.records.schema import UNTIL_KNOWN
from hf_power.records.summary import Summarized, Summary, frame_of
from hf_power.schedule import Law

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class ScaleRow:
    """A run on a number of devices; `bytes` (on each device) and `fits` are by sharding."""

    devices: int
    per_device_batch_size: int
    gradient_accumulation_steps: int
    bytes: dict[str, int]
    fits: dict[str, bool]
    checkpoint_bytes: int
    steps: int
    days: float


def scale_table(
    config: PreTrainedConfig,
    target: Target,
    *,
    per_device_batch_size: int,
    devices: Sequence[int] = (8, 64, 512),
    machine: Machine | None = None,
    layout: Layout | None = None,
) -> list[ScaleRow]:
    """A row for each number of devices.

    ::

        days = ceil(tokens / tokens_per_step) * tokens_per_step * flops_per_token
               / (devices * flops_per_device * utilisation * 86400)

    Communication is in the utilisation alone, so that days fall as 1 / devices: an assumption.

    Args:
        config: of a Llama, Mixtral, Granite or GraniteMoe model.
        target: its tokens_per_step must be a multiple of block_size times devices.
        per_device_batch_size: the most sequences of a micro-step; a row takes the largest one that divides its share.
        devices: one row each, whatever those of the machine and the sharding of the layout.
        machine, layout: see there.

    Raises:
        UserError: a number out of range, or a batch that the block size or the devices do not divide.
    """
    machine, layout = machine or Machine(), layout or Layout()
    check_positive(per_device_batch_size=per_device_batch_size)
    sequences, left = divmod(target.tokens_per_step, target.block_size)
    if left:
        raise UserError(
            f"{target.tokens_per_step} tokens per step are no whole number of blocks of {target.block_size}: correct one."
        )
    machines = []
    for count in devices:
        machines.append(replace(machine, devices=count))
        if sequences % count:
            raise UserError(
                f"{count} devices do not divide the {sequences} sequences of a step: choose a divisor of it."
            )
    flops = flops_per_token(config, target.block_size) * target.total_tokens
    rows = []
    for each in machines:
        share = sequences // each.devices
        batch = max(n for n in range(1, min(share, per_device_batch_size) + 1) if share % n == 0)
        shape = {"block_size": target.block_size, "per_device_batch_size": batch}
        layouts = {sharding: replace(layout, sharding=sharding) for sharding in SHARDINGS}
        prints = {name: footprint(config, **shape, machine=each, layout=one) for name, one in layouts.items()}
        memory = {name: one.bytes.total for name, one in prints.items()}
        fits, size = {name: one.fits for name, one in prints.items()}, prints["none"].checkpoint_bytes
        days = each.days(flops, config)
        rows.append(ScaleRow(each.devices, batch, share // batch, memory, fits, size, target.steps, days))
    return rows


def table_text(rows: Sequence[ScaleRow]) -> str:
    """Rows of `scale_table` as text for people; memory that does not fit has an exclamation mark."""
    lines = ["  devices  batch x accum.  GB none  GB optimizer  GB full  GB checkpoint      steps            time"]
    for row in rows:
        none, optimizer, full = (f"{row.bytes[name] / 1e9:.1f}{' ' if row.fits[name] else '!'}" for name in SHARDINGS)
        batch = f"{row.per_device_batch_size} x {row.gradient_accumulation_steps}"
        lines.append(
            f"  {row.devices:>7,}  {batch:>14}  {none:>7}  {optimizer:>12}  {full:>7}  "
            f"{row.checkpoint_bytes / 1e9:>13.1f}  {row.steps:>9,}  {duration(row.days):>14}"
        )
    return "\n".join(lines)


def duration(days: float) -> str:
    """A time for people, in the largest unit of which there is at least one; below a second, that."""
    for unit, length in (("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440), ("seconds", 1 / 86_400)):
        if days >= length:
            number = days / length
            said = f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"
            return f"{said} {unit.removesuffix('s') if said == '1' else unit}"
    return "under a second"


PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class PlannedTarget:
    """The run: its model, of which the number of parameters alone may be known, and its length in whole steps."""

    model_type: str | None = field(metadata=UNTIL_KNOWN)
    hidden_size: int | None = field(metadata=UNTIL_KNOWN)
    parameters: int
    parameters_without_embeddings: int | None = field(metadata=UNTIL_KNOWN)
    active_parameters: int | None = field(metadata=UNTIL_KNOWN)
    tokens: int
    steps: int
    block_size: int


@dataclass(frozen=True)
class CappedLaw:
    """The law of the recipe, at the size of the target, and its cap."""

    a: float
    b: float
    batch_exponent: float
    critical_batch_tokens: float | None = field(metadata=UNTIL_KNOWN)
    max_lr: float
    critical_batch_growth: float = 0.0

    @property
    def formula(self) -> str:
        """The law as text."""
        critical = self.critical_batch_tokens, self.critical_batch_growth
        return Law(self.a, self.b, self.batch_exponent, *critical).formula(self.max_lr)


@dataclass(frozen=True)
class Point:
    """The learning rate after `tokens` tokens, with its 95 % interval; a milestone has a name."""

    what: str | None = field(metadata=UNTIL_KNOWN)
    tokens: int
    lr: float
    low: float
    high: float


@dataclass(frozen=True)
class Timescale:
    """AdamW's timescale at a point of the run, as a share of the run.

    Its weights are an average of the last ``1 / (eta * weight_decay)`` steps (Wang & Aitchison, arXiv:2405.13698), so

        tokens_per_step / (eta * weight_decay * tokens)
    """

    what: str
    tokens: int
    share_of_run: float


@dataclass(frozen=True)
class Compute:
    """FLOPs of the run, and the days that they take on a machine."""

    flops_per_token: float
    flops: float
    devices: int
    flops_per_device: float
    utilisation: float
    days: float


@dataclass(frozen=True)
class ProxyCost:
    """What the sweep took, beside runs of full length at the target, which a sweep without transfer takes at the least."""

    tokens: int
    flops: float
    direct_sweep_flops: float
    share_of_direct_sweep: float


@dataclass(frozen=True, repr=False)
class Plan(Summarized, Record):
    """The recipe at a target: learning rates with their intervals, cost, and what to beware of.

    Attributes:
        beta: tokens_per_step / 4096.
        intervals: 95 %, of the law's numbers, as the recipe has them.
        decay_start_tokens: None without a tail.
        cap_ends_tokens: where the law falls to its cap; None unless that lies between warmup and tail.
        peak_lrs: of schedules that know their horizon; peak_intervals are the 95 % intervals of a new cell.
        weight_decay: None where the recipe does not know that of its sweep.
        proxies: None where the recipe does not say what its sweep took.
        loss: at the end; None where the recipe has no forecast of it, or one that does not reach so far.
        scale: the run on several numbers of devices; None where the target's config is not known.
    """

    FILE = PLAN_FILE
    REMEDY = "write it with hf-power plan"

    target: PlannedTarget
    tokens_per_step: int
    beta: float
    law: CappedLaw
    intervals: Intervals
    warmup_tokens: int
    decay_start_tokens: int | None
    decay_shape: str
    cap_ends_tokens: int | None
    milestones: tuple[Point, ...]
    peak_lrs: dict[str, float]
    weight_decay: float | None = field(metadata=UNTIL_KNOWN)
    timescales: tuple[Timescale, ...]
    compute: Compute
    proxies: ProxyCost | None
    curve: tuple[Point, ...]
    warnings: tuple[str, ...]
    loss: PlannedLoss | None = field(default=None, metadata=UNTIL_KNOWN)
    scale: tuple[ScaleRow, ...] | None = field(default=None, metadata=UNTIL_KNOWN)
    peak_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def headline(self) -> str:
        """The plan in one sentence: steps, the rate, the time, and how many warnings follow."""
        target, compute = self.target, self.compute
        top = max(self.milestones, key=lambda point: point.lr)
        between = f" ({top.low:.2g} to {top.high:.2g})" if top.low < top.high else ""
        beware = len(self.warnings)
        warned = f"; {beware} warning{'s' if beware > 1 else ''} below" if beware else ""
        return (
            f"{target.tokens:,} tokens are {target.steps:,} steps of {self.tokens_per_step:,}, {duration(compute.days)} on "
            f"{compute.devices} devices; Power peaks at {top.lr:.2g}{between}{warned}"
        )

    def summary(self) -> Summary:
        """The headline, the rates on the way, and what to beware of."""
        numbers = [("schedule", self.law.formula), ("compute", f"{self.compute.flops:.3g} FLOP")]
        if self.loss is not None:
            numbers.append(("loss at the end", f"{self.loss.loss:.3f} ({self.loss.low:.3f} to {self.loss.high:.3f})"))
        for point in self.milestones:
            numbers.append(
                (f"{point.what}, {point.tokens:,} tokens", f"{point.lr:.3g} ({point.low:.3g} to {point.high:.3g})")
            )
        return Summary(self.headline, numbers + [("beware", warning) for warning in self.warnings])

    def to_frame(self) -> "DataFrame":
        """The rate over the tokens with its 95 % interval; `what` names the milestones."""
        points = {point.tokens: point for point in (*self.curve, *self.milestones)}
        return frame_of(points[tokens] for tokens in sorted(points))
