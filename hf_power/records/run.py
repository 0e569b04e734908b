"""run.json: what a run was told, how far it got, and what came of it; and the parts that it shares with other records."""

from dataclasses import dataclass, field
from typing import Annotated, Literal, TypedDict

from hf_power.records.files import Record
from hf_power.records.schema import UNTIL_KNOWN, Amount, Count, Finite, Interval, Json, Limit, Positive, PositiveNumber

SCHEMA = 1  # of every record; a file of another one is refused


class Data(TypedDict, total=False):
    """What text a run was trained or scored on, as its record says it.

    All documents are the empty, the skipped (those that could not be read), the training and the held-out ones, unless
    split or eval_split are slices. A stream has the number of those that it has skipped so far.
    """

    dataset: str | None
    config_name: str | None
    split: str | None
    eval_fraction: float | None
    local: bool | None
    fingerprint: str | None
    tokenizer: str | None
    held_out_tokens: Count | None
    train_tokens: Count | None
    documents: Count | None
    empty_documents: Count | None
    skipped_documents: Count | None
    train_documents: Count | None
    held_out_documents: Count | None
    block_size: Count | None


class MupSection(TypedDict, total=False):
    """The section mup of a run's settings; it may hold any other argument of `hf_power.mup_config`."""

    preset: str | None


class RunSection(TypedDict, total=False):
    """The section run of a run's settings; it may hold any other field of `RunArguments`."""

    license: str | None


class TrainingSection(TypedDict, total=False):
    """The section training of a run's settings; it may hold any other field of `TrainingArguments`."""

    weight_decay: Amount | None


class Sections(TypedDict, total=False):
    """The settings of a run as its record holds them; `hf_power.settings` reads them back."""

    model: dict[str, Json]
    mup: MupSection
    data: dict[str, Json]
    run: RunSection
    training: TrainingSection


class Hardware(TypedDict, total=False):
    """The device of a run, see `hf_power.records.machine.hardware`."""

    device: str
    device_name: str
    processes: Count
    cpu_cores: Count | None


class Model(TypedDict, total=False):
    """Whose weights were scored or exported."""

    name: str | None
    revision: str | None
    weights_step: Count | None
    weights_tokens: Count | None
    model_type: str | None
    parameters: Count | None
    weights_sha256: str | None


class Intervals(TypedDict, total=False):
    """The 95 % intervals of a law, as (low, high)."""

    a: Interval
    b: Interval
    batch_exponent: Interval
    critical_batch_tokens: Interval | None
    critical_batch_growth: Interval | None
    size_exponent: Interval | None


class PowerScale(TypedDict):
    """Power's own scale, measured on rows of its own, and its 95 % interval."""

    a: Finite
    interval: Interval


class Reach(TypedDict, total=False):
    """How far a fit may be trusted beyond what it has seen, and the standard deviation of log2 of its rate there."""

    tokens: Finite
    tokens_per_step: Finite
    sd_octaves: Finite


class Validity(TypedDict, total=False):
    """What a fit has seen: sizes, the least and largest batch and horizon, and where its law misfits its own cells."""

    widths: list[Finite]
    parameters: list[Finite]
    tokens_per_step: Interval
    tokens: Interval
    extrapolates_to: Reach
    misfit: list[str]


# A bootstrap draw of a fitted law: a, b, batch_exponent, and critical_batch_tokens, its growth and the size's exponent.
_DRAW = Limit(
    lambda words: words.replace(
        "a list", "a list [a > 0, b, batch_exponent, critical batch, its growth, size_exponent]"
    ),
    lambda draw: draw[0] > 0,
)
Sample = Annotated[tuple[Finite, Finite, Finite, PositiveNumber | None, Finite, Finite], _DRAW]


RUN_FILE = "run.json"


@dataclass(frozen=True)
class SkippedStep:
    """A step without a finite gradient, and what it read: [first, end) of the run's tokens and of its seeded blocks."""

    step: Count
    tokens: tuple[int, int]
    blocks: tuple[int, int]


@dataclass(frozen=True)
class LossSpike:
    """A logged loss that jumped above the `median` of the logs before it."""

    step: Count
    loss: float
    median: float


@dataclass(frozen=True)
class ParameterGroup:
    """A group of the optimizer: its rate at the cap, its weight decay and epsilon, and how many parameters it holds."""

    name: str = ""
    base_lr: float | None = None
    weight_decay: float | None = None
    eps: float | None = None
    parameters: Count | None = None


@dataclass(frozen=True)
class Change:
    """A value that a run went on with another than before, after so many of its steps and tokens.

    `name` is that of a setting, a package, or an entry of `Hardware`; None stands for what was not given.
    """

    step: Count
    tokens: Count
    name: str
    before: Json = None
    after: Json = None


@dataclass(frozen=True)
class SinceLog:
    """What a checkpoint between two logs has summed up for the next one.

    Attributes:
        steps: since the last log.
        loss: sum over them of the step's loss, of what is finite; the mean of all processes.
        skipped: steps without a finite gradient.
        losses: micro-batches of a process, and `finite` those with a finite loss.
    """

    steps: Count = 0
    loss: float = 0.0
    skipped: Count = 0
    losses: Count = 0
    finite: Amount = 0.0


@dataclass(frozen=True)
class Average:
    """Of which checkpoints the weights are the mean.

    Attributes:
        kind: "uniform", "ema" or "decay", see `hf_power.checkpoints.average.shares`; "window" of a mean that was kept in
            training (`hf_power.AverageWeights`), whose one entry is the end of it.
        tokens: that each checkpoint had seen, oldest first.
        shares: of each in the mean.
        decay_shape: of the tail that "decay" stands for.
    """

    kind: str
    tokens: list[Count]
    shares: list[Finite]
    decay_shape: str | None = None


class Computation(TypedDict, total=False):
    """How a run computes, as its Trainer, optimizer and model say it.

    Class, betas and variant of the optimizer, type of the weights, type that products are cast to ("no" for none), and
    kind of attention.
    """

    optimizer: str
    betas: tuple[float, float]
    fused: bool
    weights: str
    mixed_precision: str
    attention: str


class ScheduleRecord(TypedDict, total=False):
    """The numbers of a run's power schedule, lengths in tokens: see `hf_power.schedule.Schedule.to_dict`."""

    a: float | None
    b: float | None
    batch_exponent: float | None
    critical_batch_tokens: Amount | None
    critical_batch_growth: Amount
    tokens_per_step: Amount | None
    max_lr: float | None
    warmup_tokens: Amount | None
    warmup_to: str | None
    decay_start_tokens: Amount | None
    decay_tokens: Amount | None
    decay_shape: str | None
    min_lr_ratio: Amount | None
    total_tokens: Amount | None


@dataclass(frozen=True)
class Run(Record):
    """The record of a run. A change makes a new one, by `dataclasses.replace`.

    An empty text, and 0 for a length, stand for what a file does not say; `load` asks for what its caller needs.

    Attributes:
        kind: "pretrain", "anneal", or "average" of a run's checkpoints.
        status: "running", "finished", "stopped" or "failed".
        lineage: an id that a run shares with its checkpoints, its tails and their exports.
        parent: FOLDER/checkpoint-N that a tail began at, or the last one of an average.
        average: of an averaged model, of which checkpoints; of a run that went on from one, too.
        tokens_seen: tokens trained, those of the trunk and of skipped steps included.
        weights_step, weights_tokens: after how many steps and tokens of the run the weights beside the record were
            saved: fewer than `steps` under load_best_model_at_end, and where a finished run trains on; None without weights.
        settings: the sections that were given, see `hf_power.settings`; of a run that went on with other ones, the last.
        changes: what was another in an earlier part of the run.
        since_log: of a checkpoint between two logs.
        started, finished: times in UTC, in ISO 8601.
        loss_curve: what was logged: step and tokens, loss or eval_loss, and what else the Trainer's log holds.
        parameters: None until the model is built.
        schedule: None under another schedule than power, or before the first step.
        held_out_loss: nats per token; None until the run has ended.
    """

    FILE = RUN_FILE
    REMEDY = "take a folder that hf_power wrote"

    kind: str = ""
    name: str = ""
    status: str = ""
    lineage: str | None = None
    parent: str | None = None
    average: Average | None = field(default=None, metadata=UNTIL_KNOWN)
    tokens_seen: Count = 0
    total_tokens: Count = 0
    tokens_per_step: Positive = 0
    steps: Count = 0
    weights_step: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    weights_tokens: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    train_seconds: Amount = 0.0
    seed: int | None = None
    settings: Sections = field(default_factory=Sections)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)
    started: str | None = field(default=None, metadata=UNTIL_KNOWN)
    loss_curve: list[dict[str, float]] = field(default_factory=list)
    skipped_steps: list[SkippedStep] = field(default_factory=list)
    loss_spikes: list[LossSpike] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    since_log: SinceLog | None = field(default=None, metadata=UNTIL_KNOWN)
    data: Data | None = field(default=None, metadata=UNTIL_KNOWN)
    parameters: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    parameters_without_embeddings: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    flops_per_token: Amount | None = field(default=None, metadata=UNTIL_KNOWN)
    groups: list[ParameterGroup] | None = field(default=None, metadata=UNTIL_KNOWN)
    computation: Computation | None = field(default=None, metadata=UNTIL_KNOWN)
    schedule: ScheduleRecord | None = field(default=None, metadata=UNTIL_KNOWN)
    held_out_loss: float | None = field(default=None, metadata=UNTIL_KNOWN)
    finished: str | None = field(default=None, metadata=UNTIL_KNOWN)

    @property
    def stage(self) -> Literal["", "trunk", "decaying", "decayed", "averaged"]:
        """Where its weights stand in the power schedule's decay; "" under another schedule or before the first token.

        "averaged" are the weights that `hf-power average` has made of a trunk's.
        """
        if self.kind == "average":
            return "averaged"
        seen = self.tokens_of_weights
        if self.schedule is None or not seen:
            return ""
        start = self.schedule.get("decay_start_tokens")
        if start is None or seen <= start:
            return "trunk"
        return "decayed" if seen >= start + (self.schedule.get("decay_tokens") or 0) else "decaying"

    @property
    def tokens_of_weights(self) -> int:
        """Tokens that the weights beside the record have seen."""
        return self.tokens_seen if self.weights_tokens is None else self.weights_tokens

    @property
    def step_of_weights(self) -> int:
        """Steps of the run after which the weights beside the record were saved."""
        return self.steps if self.weights_step is None else self.weights_step

    @property
    def license(self) -> str | None:
        """Of the model, by the run's settings."""
        return self.settings.get("run", {}).get("license")
