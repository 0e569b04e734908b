"""The jobs of a sweep: which runs share their trunks, which values come next, and a row's learning rate at every step."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_power.records.rows import Row, RowLaw
from hf_power.schedule import Law, Schedule
from hf_power.sweep.grid import Grid, Sections, few_digits


@dataclass(frozen=True)
class Group:
    """Cells that share trunks: one schedule (of `hf_power.sweep.grid.SCHEDULES`), width and batch, in tokens.

    The values are learning rates to begin with; for power they are a's of its law, or scales of it until the law is
    fitted. `max_tokens` is the group's share of the sweep's budget.
    """

    schedule: str
    width: int
    tokens_per_step: int
    tokens: tuple[int, ...]
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    law: Law | None = None
    max_tokens: int | None = None

    @property
    def name(self) -> str:
        """For progress and file names."""
        return f"{self.schedule}-{self.width}-{self.tokens_per_step}"

    def law_of(self, value: float) -> Law | None:
        """The law of a row that is made with the value; None where the value is a learning rate."""
        return None if self.law is None else replace(self.law, a=value)

    def with_law(self, law: Law) -> "Group":
        """A group of power that gets its law: its scales become a's."""
        return replace(self, law=law, values=tuple(few_digits(scale * law.a) for scale in self.values))


@dataclass(frozen=True)
class Job:
    """Trunks of a group that are trained together: value -> its horizons, ascending; `extension` counts from 0."""

    group: Group
    extension: int
    horizons: dict[float, tuple[int, ...]]


def groups_of(grid: Grid, schedule: str, law: Law | None = None) -> list[Group]:
    """One group per width and batch, the widest and largest first; `law` for "power", once it is known."""
    groups = []
    for width in sorted(grid.widths, reverse=True):
        for batch in sorted(grid.tokens_per_step, reverse=True):
            shift = 0
            # Power's law has the batch in it already. Without extensions the user's values are all that there is.
            if schedule != "power" and grid.max_extensions:
                ratio = batch / grid.tokens_per_step[0]
                shift = round(grid.start_exponent * math.log(ratio) / math.log(grid.factor))
            scale = grid.factor**shift if law is None else law.a
            values = tuple(sorted(few_digits(value * scale) for value in grid.schedules[schedule]))
            groups.append(Group(schedule, width, batch, grid.tokens, grid.seeds, values, law))
    return groups


def start_jobs(groups: Sequence[Group]) -> list[Job]:
    """The jobs that are certain: the values to begin with."""
    return [Job(group, 0, {value: group.tokens for value in group.values}) for group in groups]


def branch_tokens(grid: Grid, group: Group, horizon: int) -> int:
    """Tokens up to which a horizon's learning rates are those of any longer one: its decay, or the end of the warmup."""
    # These two fall from the end of the warmup, at a pace that the horizon sets.
    if group.schedule in ("cosine", "linear"):
        return grid.warmup_tokens // group.tokens_per_step * group.tokens_per_step
    return horizon - grid.tail_tokens(horizon, group.tokens_per_step)


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


def next_job(grid: Grid, group: Group, rows: Sequence[Row]) -> Job | None:
    """The first job of the group of which a row is missing; None when the group is complete or a run of it failed.

    Job 0 has the values to begin with, at every horizon. Job k adds, for each horizon whose best mean loss so far lies on
    an edge, the next value beyond it (and runs it up to the longest horizon that asks for it), until no horizon does,
    max_extensions is reached, or the group's share of the budget has no room for them. A job follows from the rows of
    the jobs before it alone, so a killed sweep goes on with exactly the job that it was in.
    """
    mine = [row for row in rows if belongs(row, group)]
    # Whoever reads the reason of a failure deletes its rows, and they are made again. By itself it would fail again.
    if any(row.status == "failed" for row in mine):
        return None
    for extension in range(grid.max_extensions + 1):
        # Rows of later jobs are left out, so that a job is the same one however far the sweep had come.
        before = [row for row in mine if row.extension is not None and row.extension < extension]
        if extension == 0:
            horizons = {value: tuple(sorted(group.tokens)) for value in group.values}
        else:
            horizons = _beyond_edges(before, group, grid.factor)
        if not horizons:
            return None
        job = Job(group, extension, horizons)
        if extension and group.max_tokens is not None:
            spent = sum(row.trained_tokens for row in before)
            if spent + job_tokens(grid, job) > group.max_tokens:
                return None
        if missing(job, mine):
            return job
    return None


def missing(job: Job, rows: Sequence[Row]) -> bool:
    """Whether a run of the job has no row."""
    have = {(row_value(row), row.seed, row.tokens) for row in rows if belongs(row, job.group)}
    wanted = {(v, seed, tokens) for v, ts in job.horizons.items() for tokens in ts for seed in job.group.seeds}
    return bool(wanted - have)


def belongs(row: Row, group: Group) -> bool:
    """Whether a row was made for the group."""
    law = Law.from_dict(row.law) if row.law else None
    return (row.schedule, row.width, row.tokens_per_step, law) == (
        group.schedule,
        group.width,
        group.tokens_per_step,
        group.law_of(row_value(row)),
    )


def row_value(row: Row) -> float:
    """The value that a row was made with: its learning rate, or the a of its law."""
    return float(row.law["a"]) if row.law else row.learning_rate


def edges(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Lowest, best and highest value of one cell's rows, by the mean loss over seeds; a diverged row makes it infinite."""
    losses: dict[float, list[float]] = {}
    for row in rows:
        losses.setdefault(row_value(row), []).append(math.inf if row.loss is None else row.loss)
    means = {value: sum(each) / len(each) for value, each in losses.items()}
    # Sorted, so that of two equal losses the lower value is the best one whatever the order of the rows.
    return min(means), min(sorted(means), key=lambda value: means[value]), max(means)


def _beyond_edges(rows: Sequence[Row], group: Group, factor: float) -> dict[float, tuple[int, ...]]:
    longest: dict[float, int] = {}
    for tokens in group.tokens:
        cell = [row for row in rows if row.tokens == tokens]
        if not cell:
            continue
        lowest, best, highest = edges(cell)
        for edge, beyond in ((lowest, lowest / factor), (highest, highest * factor)):
            if best == edge:
                value = few_digits(beyond)
                longest[value] = max(tokens, longest.get(value, 0))
    # The shorter horizons lie on the way of a trunk, and cost only their tails.
    return {v: tuple(t for t in sorted(group.tokens) if t <= longest[v]) for v in sorted(longest)}


def row_settings(grid: Grid, group: Group, value: float, seed: int, tokens: int) -> Sections:
    """What pretraining takes to train one row of the sweep from scratch; the row's id is a hash of it."""
    result = grid.sections_at(group.width, group.tokens_per_step)
    training = {"learning_rate": value, "lr_scheduler_type": group.schedule}
    training["lr_scheduler_kwargs"] = _tail_keywords(grid, group, tokens)
    if (power := _power(grid, group, value)) is not None:
        law, cap = power
        tail = {"decay_tokens": grid.tail_tokens(tokens, group.tokens_per_step), "decay_shape": grid.decay_shape}
        training |= {"learning_rate": cap, "lr_scheduler_type": "power"}
        training["lr_scheduler_kwargs"] = {**row_law(law), **tail}
    result["training"] |= {"seed": seed, **training, "warmup_steps": grid.warmup_tokens // group.tokens_per_step}
    # A text, as the first sweeps had it: with a number the id would be another one, and a sweep that was begun would
    # train everything again.
    result.setdefault("run", {})["tokens"] = str(tokens)
    return result


def rate_factors(grid: Grid, group: Group, value: float, tokens: int) -> np.ndarray:
    """eta(step) / eta_max at every step of a run to a horizon, shape (steps,)."""
    batch = group.tokens_per_step
    if (power := _power(grid, group, value)) is None:
        return _factors_of_transformers(grid, group, tokens)
    law, cap = power
    tail = grid.tail_tokens(tokens, batch)
    schedule = Schedule(
        law=law,
        tokens_per_step=batch,
        max_lr=cap,
        warmup_tokens=grid.warmup_tokens // batch * batch,
        decay_start_tokens=tokens - tail,
        decay_tokens=tail,
        decay_shape=grid.decay_shape,
        total_tokens=tokens,
    )
    return np.array([schedule.lr(step * batch) / cap for step in range(tokens // batch)])


def _power(grid: Grid, group: Group, value: float) -> tuple[Law, float] | None:
    """Law and cap of the runs that are trained under the Power schedule; None for a schedule of transformers."""
    if group.schedule == "inverse_sqrt":
        # lr * sqrt(warmup / n) is transformers' schedule of this name, which has no tail; as a power law it has one.
        batch = group.tokens_per_step
        warmup = max(1, grid.warmup_tokens // batch) * batch
        return Law(value * math.sqrt(warmup), -0.5, 0.0), value
    law = group.law_of(value)
    return None if law is None else (law, grid.max_lr)


def _tail_keywords(grid: Grid, group: Group, tokens: int) -> dict[str, object]:
    """What a schedule of transformers is told beside its warmup and its length."""
    if group.schedule != "warmup_stable_decay":
        return {}
    batch = group.tokens_per_step
    return {"num_decay_steps": grid.tail_tokens(tokens, batch) // batch, "decay_type": grid.decay_shape}


def _factors_of_transformers(grid: Grid, group: Group, tokens: int) -> np.ndarray:
    """The factors of a schedule that transformers alone knows.

    Its schedulers multiply base rates with a function of the step, which is what is wanted here. It makes them for an
    optimizer only, so there is one that never takes a step.
    """
    steps = tokens // group.tokens_per_step
    scheduler = get_scheduler(
        group.schedule,
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0),
        num_warmup_steps=grid.warmup_tokens // group.tokens_per_step,
        num_training_steps=steps,
        scheduler_specific_kwargs=_tail_keywords(grid, group, tokens),
    )
    assert isinstance(scheduler, LambdaLR)
    return np.array([scheduler.lr_lambdas[0](step) for step in range(steps)])


def row_rate(group: Group, value: float, tokens: int) -> float:
    """A row's learning_rate: the peak, or for power the uncapped law at the horizon."""
    law = group.law_of(value)
    return value if law is None else law.lr(tokens, group.tokens_per_step)


def row_law(law: Law) -> RowLaw:
    """A law as a row has it, and as arguments of the schedule; rows do not name a critical batch that is not there."""
    said: RowLaw = {"a": law.a, "b": law.b, "batch_exponent": law.batch_exponent}
    if law.critical_batch_tokens is not None:
        said["critical_batch_tokens"] = law.critical_batch_tokens
    if law.critical_batch_growth:
        said["critical_batch_growth"] = law.critical_batch_growth
    return said


def row_id(settings: Sections, data: object) -> str:
    """16 hexadecimal digits that stand for everything that makes a row."""
    return digest([settings, data])


def digest(content: object) -> str:
    """16 hexadecimal digits of the SHA-256 of the content as JSON."""
    # Sorted, because the order of the keys in a YAML makes no other run.
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
