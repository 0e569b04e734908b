"""Runs from elsewhere: the rows of a CSV file that a tracker or a spreadsheet has exported."""

import difflib
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from hf_power.fit.rows import by_cell
from hf_power.fit.table import Table, is_empty, number
from hf_power.fit.units import check_units
from hf_power.recipe import KnownHorizon
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.rows import Row, Status

SCHEDULES = (*get_args(KnownHorizon), "power")
# Nats between repeated runs; seeds of one model differ by so much now and then, but not at every learning rate.
MAX_SPREAD = 0.03
_NEEDED = ("learning_rate", "tokens_per_step", "tokens", "loss")
# Of two names that say one thing the file has either.
_INSTEAD = {"tokens_per_step": "batch", "tokens": "steps"}
_MAY = ("batch", "steps", "width", "parameters", "seed", "schedule", "state")
_NAMES = (*_NEEDED, *_MAY)
_TEXTS = ("schedule", "state")
# Columns that tell a run from others, in small letters without what is between them.
_RUN_NAMES = (
    "name",
    "run",
    "runid",
    "runname",
    "id",
    "sysid",
    "trial",
    "trialid",
    "number",
    "experiment",
    "job",
    "jobid",
)
_COUNTS = ("tokens_per_step", "batch", "tokens", "steps", "width", "parameters", "seed")
_STATES: dict[str, Status] = {
    **dict.fromkeys(
        ("finished", "completed", "complete", "success", "succeeded", "successful", "done", "ok"), "finished"
    ),
    **dict.fromkeys(("diverged", "nan"), "diverged"),
    **dict.fromkeys(
        (
            *("crashed", "failed", "failure", "killed", "error", "preempted", "preempting", "running", "queued"),
            *("pending", "stopped", "canceled", "cancelled", "aborted", "interrupted", "timeout", "oom", "scheduled"),
            *("fail", "pruned", "waiting", "terminated", "unfinished", "early_stopped", "early stopped"),
        ),
        "failed",
    ),
}


def read_csv(
    path: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    *,
    schedule: str | None = None,
    block_size: int | None = None,
) -> tuple[list[Row], list[str]]:
    """The rows of a sweep from elsewhere, CSV or TSV with a header or JSON, see `hf_power.fit.table.Table.read`.

    Args:
        path: the file.
        columns: our name -> the file's column; a name left out is looked for as it is, in any case. Needed are
            learning_rate; loss (nats per token); tokens, or steps; tokens_per_step, or batch (in sequences). A loss of
            nan or inf is a diverged run, an empty one a failed run. Where there are such columns: width and parameters
            of the model, seed, schedule, and state ("finished", "crashed" and so on).
        schedule: of all rows, where the file has no column for it; one of SCHEDULES.
        block_size: tokens of a sequence, with batch.

    Returns:
        Rows with the fields that the fit needs, each trunk one (schedule, model, batch, learning rate, seed), and a
        sentence for each thing that was passed over. Runs that agree in everything read, the loss included, are one run
        that was exported repeatedly. Without a column of seeds, other runs of one kind count as seeds 0, 1 and so on.

    Raises:
        NotFoundError: there is no such file.
        UserError: an unknown or missing column, a value that is no number, numbers whose unit is another one (see
            `hf_power.fit.units.check_units`), no schedule, or no row.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"there is no sweep at {path}: pass a CSV file with a header.")
    table = Table.read(Path(path))
    names = _columns(table, columns or {}, block_size)
    if not table.records:
        raise UserError(f"{path} has no row below its header: pass a CSV file with one line per run.")
    runs, num_bare = _runs(table, names)
    if not runs:
        raise UserError(f"{path} has no run with a learning rate, batch and tokens: fill them in.")
    rows, notes = _rows(runs, table.path, "seed" in names, schedule, block_size, num_bare)
    if all(row.schedule != "power" for row in rows):
        _check_history(table, names, rows[0].schedule)
    return rows, notes


@dataclass(frozen=True)
class _Run:
    """A line of the file: numbers by our name, and its texts."""

    where: str
    values: dict[str, float]
    status: Status
    schedule: str | None

    @property
    def key(self) -> tuple[object, ...]:
        return (self.status, self.schedule, *sorted(self.values.items()))


def _columns(table: Table, columns: Mapping[str, str], block_size: int | None) -> dict[str, str]:
    """Our name -> the file's column, for all that the file has."""
    if unknown := sorted(set(columns) - set(_NAMES)):
        raise UserError(f"columns maps {unknown[0]!r}, which no row has: choose from {', '.join(_NAMES)}.")
    by_case = {name.lower(): name for name in reversed(table.header)}
    names = {name: columns.get(name) or by_case.get(name, name) for name in _NAMES}
    names = {name: column for name, column in names.items() if name in columns or column in table.header}
    if "state" not in names and "status" in by_case:
        names["state"] = by_case["status"]
    for name, other in _INSTEAD.items():
        if other in columns or name not in names:
            names.pop(name, None)
        else:
            names.pop(other, None)
    if "batch" in names and not block_size:
        raise UserError(f"{table.path} gives the batch in sequences: pass block_size, the tokens of a sequence.")
    for name in _NEEDED:
        if name not in names and _INSTEAD.get(name) not in names:
            names[name] = name
    for name, column in names.items():
        if column not in table.header:
            near = difflib.get_close_matches(column, table.header, n=1)
            hint = f"did you mean {near[0]!r} of" if near else "it has"
            raise UserError(
                f"{table.path} has no column {column!r} for {name}, {hint} {', '.join(table.header)}: map {name} to a "
                "column."
            )
    return names


def _runs(table: Table, names: Mapping[str, str]) -> tuple[list[_Run], int]:
    """The runs, and how many lines of failed runs lack what tells their cell."""
    columns = {name: column for name, column in names.items() if name not in _TEXTS}
    decimals = table.decimals(list(columns.values()))
    runs, num_bare = [], 0
    for line, record in table.records:
        where = f"line {line} of {table.path}"
        status = _status(record[names["state"]], where) if "state" in names else "finished"
        loss = record[columns["loss"]]
        if is_empty(loss):
            status = "failed"
        values, bare = {}, False
        for name, column in columns.items():
            if is_empty(record[column]) and (name == "loss" or status == "failed"):
                bare |= name != "loss"
                continue
            values[name] = _value(name, record[column], decimals[column], where)
        if bare:
            num_bare += 1
            continue
        if not math.isfinite(values.get("loss", 0.0)):
            status = "diverged"
        if status != "finished":
            values.pop("loss", None)
        runs.append(_Run(where, values, status, record[names["schedule"]] if "schedule" in names else None))
    return runs, num_bare


def _status(text: str, where: str) -> Status:
    if is_empty(text):
        return "finished"
    # An enumeration is printed with its name before the value, as TrialState.COMPLETE.
    state = text.lower().rpartition(".")[2]
    if state not in _STATES:
        raise UserError(f"{where}: state must be finished, diverged, crashed or the like, got {text!r}; mend the line.")
    return _STATES[state]


def _value(name: str, text: str, decimal: str, where: str) -> float:
    value = None if is_empty(text) else number(text, decimal)
    if value is None or (name != "loss" and not math.isfinite(value)):
        raise UserError(f"{where}: {name} must be a number, got {text!r}; mend or remove the line.")
    if name in _COUNTS and value < 0:
        raise UserError(f"{where}: {name} must not be negative, got {text!r}; mend the line.")
    return value


def _rows(
    runs: list[_Run], path: str, has_seed: bool, schedule: str | None, block_size: int | None, num_bare: int
) -> tuple[list[Row], list[str]]:
    batch = np.array([run.values.get("tokens_per_step") or run.values["batch"] * (block_size or 1) for run in runs])
    tokens = np.array(
        [run.values.get("tokens") or run.values.get("steps", 0.0) * b for run, b in zip(runs, batch, strict=True)]
    )
    rates = np.array([run.values["learning_rate"] for run in runs])
    losses = np.array([run.values["loss"] for run in runs if "loss" in run.values])
    check_units(path, rates, batch, tokens, losses)
    for run in runs:
        for name in _COUNTS:
            _whole(name, run)
    kinds = [_schedule(run.schedule, schedule, path) for run in runs]
    rows: list[Row] = []
    once: set[tuple[object, ...]] = set()
    seen: Counter[tuple[object, ...]] = Counter()
    for i, run in enumerate(runs):
        if run.key in once:
            continue
        once.add(run.key)
        width, size = (_whole(name, run) for name in ("width", "parameters"))
        kind = (kinds[i], *((width or 0,) if size is None else (width or 0, size)), round(batch[i]), float(rates[i]))
        repeated = (*kind, round(tokens[i]))
        seed = seen[repeated] if not has_seed else _whole("seed", run) or 0
        seen[repeated] += 1
        rows.append(
            Row(
                width=width or 0,
                parameters=size,
                schedule=kinds[i],
                learning_rate=float(rates[i]),
                tokens_per_step=round(batch[i]),
                tokens=round(tokens[i]),
                loss=run.values.get("loss"),
                status=run.status,
                seed=seed,
                trunk="/".join(str(part) for part in (*kind, seed)),
            )
        )
    notes = []
    if len(rows) < len(runs):
        notes.append(
            f"{len(runs) - len(rows)} of {len(runs)} rows repeat another one in all that is read, and count once"
        )
    if num_bare:
        notes.append(f"{num_bare} failed runs lack what tells their cell, and are passed over")
    _check_repeats(rows, path, has_seed)
    return rows, notes


def _check_repeats(rows: list[Row], path: str, has_seed: bool) -> None:
    """Refuse runs of one cell that are of several models: at each of four rates or more they differ by 0.03 nats.

    Runs of several seeds may do so, if the file says that they are, and runs of one seed may not.
    """
    for key, inside in by_cell(rows).items():
        losses: dict[tuple[float, int], list[float]] = {}
        for row in inside:
            if row.loss is not None:
                losses.setdefault((row.learning_rate, row.seed if has_seed else 0), []).append(row.loss)
        spreads = {run: max(each) - min(each) for run, each in losses.items() if len(each) > 1}
        if len(spreads) >= 4 and min(spreads.values()) > MAX_SPREAD:
            run = min(spreads)
            found = " and ".join(f"{loss:.4g}" for loss in sorted(losses[run])[:: len(losses[run]) - 1])
            said = f", seed {run[1]}," if has_seed else ""
            raise UserError(
                f"{path}: runs of {key.tokens_per_step:,} tokens per step, {key.tokens:,} tokens{said} and learning rate "
                f"{run[0]:g} have the losses {found}, and at other rates they differ likewise, more than {'one does' if has_seed else 'seeds do'}: map "
                f"parameters= or width= if they are other models,{'' if has_seed else ' seed= if they are not,'} or fit each kind "
                "alone."
            )


def _check_history(table: Table, names: Mapping[str, str], schedule: str) -> None:
    """Refuse several rows of one run under a schedule that is planned for its horizon: only its last row is a result.

    A column of names tells them, in which most values stand in several rows, each with its own learning rate and batch.
    """
    constant = [names[name] for name in names if name not in ("loss", "tokens", "steps", "state")]
    counted = names.get("tokens") or names["steps"]
    for column in table.header:
        if re.sub(r"[^a-z]", "", column.lower()) not in _RUN_NAMES or column in names.values():
            continue
        of_run: dict[str, list[Mapping[str, str]]] = {}
        for _, record in table.records:
            of_run.setdefault(record[column], []).append(record)
        of_run.pop("", None)
        alike = all(len({tuple(row[name] for name in constant) for row in rows}) == 1 for rows in of_run.values())
        several = [run for run, rows in of_run.items() if len({row[counted] for row in rows}) > 1]
        if alike and 2 * len(several) > len(of_run):
            raise UserError(
                f"{table.path}: the run {several[0]!r} of column {column!r} has {len(of_run[several[0]])} rows with other tokens, but under "
                f"{schedule} only the last one of a run is its result: keep that one, or leave the column out if they are runs of "
                "one name."
            )


def _whole(name: str, run: _Run) -> int | None:
    value = run.values.get(name)
    if value is not None and abs(value - round(value)) > 1e-6 * value:
        raise UserError(f"{run.where}: {name} must be whole, got {value:g}; mend the line.")
    return None if value is None else round(value)


def _schedule(text: str | None, given: str | None, path: str) -> str:
    kind = given if text is None else text.strip().lower()
    if kind is None:
        raise UserError(
            f"{path} does not say which learning-rate schedule its runs had: pass --schedule, one of {', '.join(SCHEDULES)}."
        )
    if kind not in SCHEDULES:
        raise UserError(f"{path}: the schedule must be one of {', '.join(SCHEDULES)}, got {kind!r}.")
    return kind
