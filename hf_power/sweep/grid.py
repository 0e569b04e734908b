"""The grid of a sweep: what is to be trained, in which order, and which learning rate comes next."""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_power.mup import scale_width
from hf_power.records.errors import UserError
from hf_power.schedule import power_law
from hf_power.settings.settings import SECTIONS, Settings, flatten, parse_tokens, read_yaml, unknown_key

SCHEDULES = ("warmup_stable_decay", "power", "cosine", "linear", "inverse_sqrt")
LAW = ("a", "b", "batch_exponent")
FEW_DIGITS = 4  # significant digits of a learning rate or a scale: a row can be typed again


@dataclass(frozen=True)
class Grid:
    """A sweep: the ``sweep`` section of its YAML; the other sections are those of pretraining.

    Attributes:
        sections: model, mup, data and training, as pretraining takes them; the model's hidden_size is the first width.
        widths: hidden sizes, the shape scaled by `hf_power.mup.scale_width`.
        tokens_per_step: batch sizes, in tokens, multiples of block_size.
        tokens: horizons T, in tokens, decay included.
        seeds: of the initialization and the data order.
        schedules: name -> learning rates to begin with; for "power" scales, in multiples of the law's a.
        law: a, b and batch_exponent of the power runs; None: fitted on this sweep's warmup_stable_decay rows.
        warmup_tokens: linear warmup, the same for every horizon.
        decay_ratio: length of the tail over the horizon (warmup_stable_decay, power, inverse_sqrt).
        decay_shape: of the tail: linear, 1-sqrt or cosine.
        max_lr: the cap of the power runs.
        factor: between neighbouring learning rates where the sweep adds some.
        max_extensions: how often learning rates are added beyond an edge at which the best one lies; 0: never.
        start_exponent: another batch B begins at learning rates times (B / first batch)**start_exponent, in whole
            factors, because the optimum grows with the batch; only a start, the sweep extends from there.
        max_tokens: budget of the whole sweep; None: none.
    """

    sections: dict[str, dict[str, Any]]
    widths: tuple[int, ...]
    tokens_per_step: tuple[int, ...]
    tokens: tuple[int, ...]
    schedules: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (0,)
    law: dict[str, float] | None = None
    warmup_tokens: int = 0
    decay_ratio: float = 0.1
    decay_shape: str = "linear"
    max_lr: float = 0.02
    factor: float = 2.0
    max_extensions: int = 4
    start_exponent: float = 0.7
    max_tokens: int | None = None

    def groups(self, schedule: str, law: dict[str, float] | None = None) -> list["Group"]:
        """One group per width and batch, the widest and largest first; `law` for "power"."""
        groups = []
        for width in sorted(self.widths, reverse=True):
            for batch in sorted(self.tokens_per_step, reverse=True):
                shift = 0
                if schedule != "power" and self.max_extensions:
                    ratio = batch / self.tokens_per_step[0]
                    shift = round(self.start_exponent * math.log(ratio) / math.log(self.factor))
                scale = self.factor**shift if law is None else law["a"]
                values = tuple(sorted(few_digits(value * scale) for value in self.schedules[schedule]))
                groups.append(Group(schedule, width, batch, self.tokens, self.seeds, values, law))
        return groups


@dataclass(frozen=True)
class Group:
    """Cells that share trunks: one schedule, width and batch; `values` are learning rates, or a's of the power law."""

    schedule: str
    width: int
    tokens_per_step: int
    tokens: tuple[int, ...]
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    law: dict[str, float] | None = None
    max_tokens: int | None = None  # share of the sweep's budget

    @property
    def name(self) -> str:
        """For progress and file names."""
        return f"{self.schedule}-{self.width}-{self.tokens_per_step}"


@dataclass(frozen=True)
class Job:
    """Trunks of a group that are trained together: value -> its horizons, ascending; `extension` counts from 0."""

    group: Group
    extension: int
    horizons: dict[float, tuple[int, ...]]


def load_grid(path: str) -> Grid:
    """Read and check the YAML of a sweep.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown or missing key, an empty or doubled axis, or a value out of its range.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("sweep"), dict):
        raise UserError(f"{path} lacks the section sweep: a grid has it beside {', '.join(SECTIONS)}.")
    flatten({name: values for name, values in content.items() if name != "sweep"}, path)
    return parse_grid(content, path)


def parse_grid(content: dict[str, Any], source: str) -> Grid:
    """A `Grid` of the sections of a YAML, every value checked; `source` names it in errors."""
    values = dict(content["sweep"])
    known = [f.name for f in dataclasses.fields(Grid) if f.name != "sections"]
    for key in values:
        if key not in known:
            raise UserError(unknown_key(f"{source}: sweep.{key}", str(key), known))
    for key in ("widths", "tokens_per_step", "tokens", "schedules"):
        if not values.get(key):
            raise UserError(f"{source}: sweep.{key} is missing or empty: name at least one.")
    parsed: dict[str, Any] = {"sections": {k: dict(v) for k, v in content.items() if k != "sweep"}}
    for key in ("widths", "tokens_per_step", "tokens", "seeds"):
        if key in values:
            parsed[key] = _axis(values[key], f"{source}: sweep.{key}", smallest=0 if key == "seeds" else 1)
    parsed["schedules"] = _schedules(values["schedules"], source)
    for key in ("warmup_tokens", "max_tokens"):
        if values.get(key) is not None:
            parsed[key] = parse_tokens(values[key], f"{source}: sweep.{key}")
            if parsed[key] < 0:
                raise UserError(f"{source}: sweep.{key} must not be negative, got {values[key]!r}: correct it.")
    ranges = {"decay_ratio": (0, 1), "max_lr": (1e-12, 1e6), "factor": (1.01, 100), "start_exponent": (-2, 2)}
    for key, (low, high) in ranges.items():
        if key in values:
            parsed[key] = _number(values[key], f"{source}: sweep.{key}", low, high)
    if "max_extensions" in values:
        parsed["max_extensions"] = int(_number(values["max_extensions"], f"{source}: sweep.max_extensions", 0, 100))
    parsed["decay_shape"] = values.get("decay_shape", "linear")
    if parsed["decay_shape"] not in ("linear", "1-sqrt", "cosine"):
        raise UserError(f"{source}: sweep.decay_shape must be linear, 1-sqrt or cosine, got {parsed['decay_shape']!r}.")
    if values.get("law") is not None:
        parsed["law"] = _law(values["law"], source)
    grid = Grid(**parsed)
    _check(grid, source)
    return grid


def _axis(values: Any, name: str, smallest: int) -> tuple[int, ...]:
    axis = tuple(parse_tokens(value, name) for value in (values if isinstance(values, list) else [values]))
    if not axis:
        raise UserError(f"{name} is empty: name at least one.")
    if len(set(axis)) < len(axis):
        raise UserError(f"{name} names a value twice, got {list(axis)}: name each once.")
    if min(axis) < smallest:
        raise UserError(f"{name} must be at least {smallest}, got {min(axis)}: correct it.")
    return axis


def _number(value: Any, name: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not low <= number <= high:
        raise UserError(f"{name} must be a number between {low:g} and {high:g}, got {value!r}.")
    return number


def _schedules(schedules: Any, source: str) -> dict[str, tuple[float, ...]]:
    if not isinstance(schedules, dict):
        raise UserError(f"{source}: sweep.schedules must map names to learning rates, got {schedules!r}.")
    parsed = {}
    for name, values in schedules.items():
        if name not in SCHEDULES:
            raise UserError(unknown_key(f"{source}: sweep.schedules.{name}", str(name), list(SCHEDULES)))
        what = f"{source}: sweep.schedules.{name}"
        rates = [_number(v, what, 1e-12, 1e6) for v in (values if isinstance(values, list) else [values])]
        if not rates:
            raise UserError(f"{what} is empty: name learning rates{' (scales of a)' if name == 'power' else ''}.")
        if len({few_digits(rate) for rate in rates}) < len(rates):
            raise UserError(f"{what} names a learning rate twice, got {rates}: name each once.")
        parsed[name] = tuple(rates)
    return parsed


def _law(law: Any, source: str) -> dict[str, float]:
    if not isinstance(law, dict) or set(law) != set(LAW):
        raise UserError(f"{source}: sweep.law must have the keys {', '.join(LAW)}, got {law!r}.")
    ranges = {"a": (1e-12, 1e12), "b": (-10, -1e-6), "batch_exponent": (-10, 10)}
    return {key: _number(law[key], f"{source}: sweep.law.{key}", *ends) for key, ends in ranges.items()}


def _check(grid: Grid, source: str) -> None:
    base = Settings.from_dict(grid.sections)
    if not base.mup.mup:
        raise UserError(f"{source}: a sweep needs muP (mup: true): without it nothing carries over widths.")
    if base.run.recipe is not None:
        raise UserError(f"{source}: a sweep makes a recipe and takes none, got {base.run.recipe!r}: remove run.recipe.")
    if base.training.torch_compile:
        raise UserError(
            f"{source}: a sweep compiles nothing, since its small models would compile longer than they train: remove "
            "training.torch_compile."
        )
    block = base.data.block_size
    if base.data.streaming:
        raise UserError(f"{source}: a sweep reads its data many times over: set streaming to false.")
    for batch in grid.tokens_per_step:
        if batch % block:
            raise UserError(f"{source}: tokens_per_step {batch} is not a multiple of block_size {block}: round it.")
        for horizon in grid.tokens:
            if horizon % batch or grid.warmup_tokens + tail_tokens(grid, horizon, batch) >= horizon:
                raise UserError(
                    f"{source}: {horizon:,} tokens are no whole number of steps of {batch:,}, or leave no room between "
                    f"a warmup of {grid.warmup_tokens:,} tokens and the decay: change one of them."
                )
    for width in grid.widths:
        sections(grid, width, grid.tokens_per_step[0])
    if "power" in grid.schedules and grid.law is None and "warmup_stable_decay" not in grid.schedules:
        raise UserError(f"{source}: power needs a law: give sweep.law, or sweep warmup_stable_decay to fit it on.")
    if "power" in grid.schedules and grid.law is None and min(len(grid.tokens), len(grid.tokens_per_step)) < 2:
        raise UserError(
            f"{source}: power's law is fitted on two horizons and two batches or more, got {len(grid.tokens)} and "
            f"{len(grid.tokens_per_step)}: add some, or give sweep.law."
        )


def few_digits(value: float) -> float:
    """The value at FEW_DIGITS significant digits."""
    return float(f"{value:.{FEW_DIGITS}g}")


def tail_tokens(grid: Grid, horizon: int, tokens_per_step: int) -> int:
    """Length of the decay, in tokens, whole steps and at least one."""
    return max(1, round(grid.decay_ratio * horizon / tokens_per_step)) * tokens_per_step


def branch_tokens(grid: Grid, group: Group, horizon: int) -> int:
    """Tokens up to which a horizon's learning rates are those of any longer one: its decay, or the end of the warmup."""
    if group.schedule in ("cosine", "linear"):
        return grid.warmup_tokens // group.tokens_per_step * group.tokens_per_step
    return horizon - tail_tokens(grid, horizon, group.tokens_per_step)


def horizon_tokens(grid: Grid, group: Group, horizons: Sequence[int]) -> dict[int, int]:
    """Horizon -> tokens trained for it beyond those of the horizons before it."""
    tokens, trunk = {}, 0
    for horizon in sorted(horizons):
        tokens[horizon] = horizon - trunk
        trunk = branch_tokens(grid, group, horizon)
    return tokens


def job_tokens(grid: Grid, job: Job) -> int:
    """Tokens that a job trains: trunks once, a tail per horizon; cosine and linear share the warmup only."""
    each = (sum(horizon_tokens(grid, job.group, horizons).values()) for horizons in job.horizons.values())
    return sum(each) * len(job.group.seeds)


def sections(grid: Grid, width: int, tokens_per_step: int) -> dict[str, dict[str, Any]]:
    """The grid's sections at a width and batch, without a schedule."""
    result = copy.deepcopy(grid.sections)
    model = Settings.from_dict({"model": result.get("model", {})}).model
    scaled = scale_width(model.config(), width)
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    result["model"] = dataclasses.asdict(model) | {name: getattr(scaled, name) for name in names}
    training = result.setdefault("training", {})
    block = Settings.from_dict({"data": result.get("data", {})}).data.block_size
    training["per_device_train_batch_size"] = tokens_per_step // block
    training["gradient_accumulation_steps"] = 1
    return result


def row_settings(grid: Grid, group: Group, value: float, seed: int, tokens: int) -> dict[str, dict[str, Any]]:
    """What pretraining takes to train one row of the sweep from scratch."""
    result = sections(grid, group.width, group.tokens_per_step)
    batch, tail = group.tokens_per_step, tail_tokens(grid, tokens, group.tokens_per_step)
    training = result["training"]
    training |= {"seed": seed, "learning_rate": value, "lr_scheduler_type": group.schedule, "lr_scheduler_kwargs": {}}
    training["warmup_steps"] = grid.warmup_tokens // batch
    if group.schedule == "warmup_stable_decay":
        training["lr_scheduler_kwargs"] = {"num_decay_steps": tail // batch, "decay_type": grid.decay_shape}
    elif group.schedule == "power":
        assert group.law is not None
        training["learning_rate"] = grid.max_lr
        training["lr_scheduler_kwargs"] = {
            **group.law,
            "a": value,
            "decay_tokens": tail,
            "decay_shape": grid.decay_shape,
        }
    elif group.schedule == "inverse_sqrt":
        # lr * sqrt(warmup / n) is transformers' schedule of this name, which has no tail; as a power law it has one.
        warmup = max(1, training["warmup_steps"]) * batch
        law = {"a": value * math.sqrt(warmup), "b": -0.5, "batch_exponent": 0.0}
        training["lr_scheduler_type"] = "power"
        training["lr_scheduler_kwargs"] = {**law, "decay_tokens": tail, "decay_shape": grid.decay_shape}
    result.setdefault("run", {})["tokens"] = str(tokens)
    return result


def row_rate(group: Group, value: float, tokens: int) -> float:
    """A row's learning_rate: the peak, or for power the uncapped law at the horizon."""
    if group.law is None:
        return value
    return power_law(tokens, tokens_per_step=group.tokens_per_step, **{**group.law, "a": value})


def row_id(settings: dict[str, Any], data: dict[str, Any]) -> str:
    """16 hexadecimal digits that stand for everything that makes a row."""
    return digest([settings, data])


def digest(content: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of the content as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def next_job(grid: Grid, group: Group, rows: Sequence[dict[str, Any]]) -> Job | None:
    """The first job of the group of which a row is missing; None when the group is complete or a run of it failed.

    Job 0 has the values to begin with, at every horizon. Job k adds, for each horizon whose best mean loss so far lies on
    an edge, the next value beyond it (and runs it up to the longest horizon that asks for it), until no horizon does,
    max_extensions is reached, or the group's share of the budget has no room for them. A job follows from the rows of
    the jobs before it alone, so a killed sweep goes on with exactly the job that it was in.
    """
    mine = [row for row in rows if belongs(row, group)]
    if any(row["status"] == "failed" for row in mine):
        return None
    have = {(row_value(row), row["seed"], row["tokens"]) for row in mine}
    for extension in range(grid.max_extensions + 1):
        if extension == 0:
            horizons = {value: tuple(sorted(group.tokens)) for value in group.values}
        else:
            before = [row for row in mine if row["extension"] < extension]
            horizons = _beyond_edges(before, group, grid.factor)
        if not horizons:
            return None
        job = Job(group, extension, horizons)
        if extension and group.max_tokens is not None:
            spent = sum(row["trained_tokens"] for row in before)
            if spent + job_tokens(grid, job) > group.max_tokens:
                return None
        wanted = {(v, seed, tokens) for v, ts in horizons.items() for tokens in ts for seed in group.seeds}
        if wanted - have:
            return job
    return None


def belongs(row: dict[str, Any], group: Group) -> bool:
    """Whether a row was made for the group."""
    law = None if group.law is None else {**group.law, "a": row_value(row)}
    return bool(
        row["schedule"] == group.schedule
        and row["width"] == group.width
        and row["tokens_per_step"] == group.tokens_per_step
        and row["law"] == law
    )


def row_value(row: dict[str, Any]) -> float:
    """The value that a row was made with: its learning rate, or the a of its law."""
    return float(row["law"]["a"] if row["law"] else row["learning_rate"])


def edges(rows: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Lowest, best and highest value of one cell's rows, by the mean loss over seeds; a diverged row makes it infinite."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        losses.setdefault(row_value(row), []).append(math.inf if row["loss"] is None else row["loss"])
    means = {value: sum(each) / len(each) for value, each in losses.items()}
    return min(means), min(sorted(means), key=lambda value: means[value]), max(means)


def _beyond_edges(rows: Sequence[dict[str, Any]], group: Group, factor: float) -> dict[float, tuple[int, ...]]:
    longest: dict[float, int] = {}
    for tokens in group.tokens:
        cell = [row for row in rows if row["tokens"] == tokens]
        if not cell:
            continue
        lowest, best, highest = edges(cell)
        for edge, beyond in ((lowest, lowest / factor), (highest, highest * factor)):
            if best == edge:
                value = few_digits(beyond)
                longest[value] = max(tokens, longest.get(value, 0))
    return {v: tuple(t for t in sorted(group.tokens) if t <= longest[v]) for v in sorted(longest)}
