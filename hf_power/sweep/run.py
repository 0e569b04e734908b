"""Run a grid of small models, side by side: rows of measurements, in an order that survives being killed."""

import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from accelerate import PartialState

from hf_power.data.text import require_datasets
from hf_power.fit.fit import fit_law
from hf_power.fit.validity import check_falling
from hf_power.records.errors import UserError
from hf_power.records.files import only_one, read_object, refuse_at_work, temporaries, write_json
from hf_power.records.machine import refuse_alone
from hf_power.records.rows import ROWS_FILE, Row, load_rows
from hf_power.records.run import SCHEMA
from hf_power.records.sweep import Sweep
from hf_power.schedule import Law
from hf_power.sweep.aim import Aim
from hf_power.sweep.choice import aimed_fit, next_answer
from hf_power.sweep.crew import Crew
from hf_power.sweep.grid import SCHEDULES, Grid, few_digits
from hf_power.sweep.jobs import Group, groups_of, job_tokens, missing, next_job, start_jobs
from hf_power.sweep.trunks import Bench, prepare, sweep_rows

GRID_FILE = "sweep.json"
# Its optima make the law (eq. 6).
LAW_SCHEDULE = "warmup_stable_decay"
# Between two looks at what other processes, perhaps on other hosts, have written.
POLL_SECONDS = 5.0


class _Process(Protocol):
    """One of the processes that accelerate launched; its PartialState leaves these attributes without a type."""

    process_index: int
    num_processes: int


def run_sweep(
    grid: Grid,
    folder: str | os.PathLike[str],
    *,
    workers: int | None = None,
    groups: Sequence[Group] | None = None,
    aim: Aim | None = None,
) -> Sweep:
    """Train every row of the grid that is not in the folder's sweep.jsonl yet, or with an aim as many as it takes.

    Schedules other than power come first, since power's law is fitted on the rows of warmup_stable_decay. Groups (one
    schedule, width and batch) run side by side: on a CPU in one single-threaded process per core, on an accelerator
    as one ensemble after another; under `accelerate launch` each process takes its share of the groups, over several
    hosts by a shared folder.

    Args:
        grid: see `hf_power.sweep.reading.load_grid`.
        folder: sweep.json (the grid), sweep.jsonl (the rows), and while it runs the state of the trunks.
        workers: processes on a CPU; None means one per core.
        groups: instead of the grid's own, see `hf_power.sweep.jobs.groups_of`.
        aim: the rate to find out; then only runs of `aimed_schedule` are trained, in rounds, until it is known, see
            `hf_power.sweep.choice.next_answer`.

    Returns:
        All rows of the folder.

    Raises:
        UserError: a folder of another grid, a budget that is too small, too few rows to fit the law for power; an aim of
            several processes, or a grid that could not tell it.
    """
    require_datasets()
    folder, state = Path(folder), PartialState()
    process: _Process = state
    refuse_alone(process.num_processes)
    refuse_at_work(folder, "wait for its end, or take another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    if aim is not None:
        check_aim(grid, process.num_processes)
    stages = within_budget(grid, [list(groups)] if groups is not None else stages_of(grid)) if aim is None else []
    # Two sweeps in a folder would train everything twice. Each process has a lock of its own, for over several hosts a
    # lock of one would keep out the others of the same sweep.
    with only_one(folder, f".lock-{process.process_index}"):
        with state.main_process_first():
            # Temporary files are those of a killed sweep, since the other processes have not begun.
            for path in temporaries(folder) if state.is_main_process else ():
                path.unlink()
            bench = prepare(grid, folder)
            _same_grid(bench)
        with Crew(bench, workers) as crew:
            _run_stages(crew, stages, process)
            if aim is not None:
                _run_rounds(crew, bench, aim)
    return Sweep.load(folder)


def _run_stages(crew: Crew, stages: Sequence[list[Group]], process: _Process) -> None:
    """Train this process's share of each stage in turn."""
    grid, folder = crew.bench.grid, crew.bench.folder
    mine = [stage[process.process_index :: process.num_processes] for stage in stages]
    # So that the bar is one, and its time left that of the whole sweep.
    crew.expect([group for groups in mine for group in groups])
    for stage, share in zip(stages, mine, strict=True):
        law = _law_for(stage, folder)
        crew.run([group.with_law(law) for group in share] if law else share)
        # The law of the next stage needs the rows of all processes.
        while process.num_processes > 1 and any(next_job(grid, each, sweep_rows(folder)) for each in stage):
            time.sleep(POLL_SECONDS)


def stages_of(grid: Grid) -> list[list[Group]]:
    """Groups that may run side by side; those of power without a law come last and get theirs then."""
    first = [
        group for name in SCHEDULES if name in grid.schedules and name != "power" for group in groups_of(grid, name)
    ]
    if "power" not in grid.schedules:
        return [first]
    power = groups_of(grid, "power", grid.law)
    return [first, power] if grid.law is None else [first + power]


def within_budget(grid: Grid, stages: list[list[Group]]) -> list[list[Group]]:
    """The groups with their shares of the grid's budget, in proportion to what is certain, which must be within it."""
    if grid.max_tokens is None:
        return stages
    certain = [[job_tokens(grid, job) for job in start_jobs(stage)] for stage in stages]
    total = sum(map(sum, certain))
    if total > grid.max_tokens:
        raise UserError(
            f"the grid needs {total:,} tokens, more than its budget max_tokens of {grid.max_tokens:,}: raise it, or "
            "take fewer widths, batches, horizons, learning rates or seeds."
        )
    return [
        [
            replace(group, max_tokens=int(grid.max_tokens * tokens / total))
            for group, tokens in zip(stage, of_stage, strict=True)
        ]
        for stage, of_stage in zip(stages, certain, strict=True)
    ]


def aimed_schedule(grid: Grid) -> str:
    """The schedule whose rate an aim is about: the law's, or the only one of the grid but power."""
    others = [name for name in grid.schedules if name != "power"]
    return LAW_SCHEDULE if LAW_SCHEDULE in others or len(others) != 1 else others[0]


def check_aim(grid: Grid, num_processes: int = 1) -> None:
    """Refuse a grid whose runs could never tell the aim, and several processes, whose rounds would have to wait."""
    if aimed_schedule(grid) not in grid.schedules:
        raise UserError(
            f"a sweep with --until needs runs of {LAW_SCHEDULE}: name its learning rates in sweep.schedules."
        )
    if min(len(grid.tokens), len(grid.tokens_per_step)) < 2:
        raise UserError(
            f"a sweep with --until needs two horizons and two batches or more to choose from, got {len(grid.tokens)} and "
            f"{len(grid.tokens_per_step)}: add some to the grid."
        )
    if num_processes > 1:
        raise UserError(
            f"a sweep with --until chooses its runs in rounds and has one process, got {num_processes}: start it without a "
            "launcher, with --workers on a CPU."
        )


def _run_rounds(crew: Crew, bench: Bench, aim: Aim) -> None:
    """Train round after round, until the aim is reached or the grid has no run left that would tell more."""
    groups = groups_of(bench.grid, aimed_schedule(bench.grid))
    for number in itertools.count():
        rows = sweep_rows(bench.folder)
        answer = next_answer(bench.grid, groups, rows, aim, number)
        if not answer.jobs:
            return
        if answer.rate is not None:
            crew.say(f"round {number}: the rate is {answer.rate:.3g}, known to {answer.octaves:.2f} octaves")
        if any(missing(job, rows) for job in answer.jobs):
            crew.run(answer.jobs)


def _law_for(stage: list[Group], folder: Path) -> Law | None:
    """For groups of power that have no law yet, the one of the sweep's own rows; None for others."""
    if not stage or stage[0].schedule != "power" or stage[0].law is not None:
        return None
    fit = fit_law(load_rows(folder / ROWS_FILE)[0], schedule=LAW_SCHEDULE)
    check_falling(fit)
    fitted = fit.law
    return Law(few_digits(fitted.a), few_digits(fitted.b), few_digits(fitted.batch_exponent))


def _same_grid(bench: Bench) -> None:
    """Write sweep.json, or refuse a folder whose rows were made with other settings or data; axes may grow."""
    grid = bench.grid
    made = {
        "schema": SCHEMA,
        "sections": grid.sections,
        "warmup_tokens": grid.warmup_tokens,
        "decay_ratio": grid.decay_ratio,
        "decay_shape": grid.decay_shape,
        "max_lr": grid.max_lr,
        "data": bench.data.record,
    }
    path = bench.folder / GRID_FILE
    if path.exists():
        before = read_object(path, schema=None, remedy="restore it, or name another --output_dir")
        # Through JSON, under which a tuple is a list.
        for key, value in json.loads(json.dumps(made)).items():
            if before.get(key) != value:
                raise UserError(
                    f"{bench.folder} holds a sweep with another {key} ({before.get(key)!r} there, {value!r} now): take "
                    "another folder, its rows cannot be fitted together with these."
                )
    # A horizon is rounded to whole steps of every batch, so that further batches may move it.
    step = math.lcm(*grid.tokens_per_step)
    for tokens in sorted({row.tokens for row in sweep_rows(bench.folder)} - set(grid.tokens)):
        if near := next((horizon for horizon in grid.tokens if abs(horizon - tokens) < step), None):
            raise UserError(
                f"{bench.folder} has runs of {tokens:,} tokens where whole steps of this grid's batches make {near:,}: take "
                f"batches that divide {tokens:,}, or another folder."
            )
    write_json(path, made)


def aim_text(grid: Grid, rows: Sequence[Row], aim: Aim) -> str:
    """Whether the aim is reached, and what that took beside the whole grid."""
    schedule = aimed_schedule(grid)
    used = [row for row in rows if row.schedule == schedule]
    fit = aimed_fit(used, schedule, aim)
    where = f"at {aim.tokens:,} tokens and {aim.tokens_per_step:,} per step"
    if fit is None:
        said = f"the rate {where} is not known: the grid's runs carry no law, widen its learning rates or add seeds"
    else:
        rate, low, high = fit.predict(aim.tokens, aim.tokens_per_step, aim.width)
        octaves = math.log2(high / low) / 2
        said = f"{where} the rate is {rate:.3g} ({low:.3g} to {high:.3g}), known to {octaves:.2f} octaves"
        if octaves > aim.octaves:
            said += (
                f", not to {aim.octaves:g}: the grid has no more runs that tell, add seeds, batches or horizons to it"
            )
    trained = sum(row.trained_tokens for row in used)
    jobs = start_jobs(groups_of(grid, schedule))
    whole = sum(job_tokens(grid, job) for job in jobs)
    runs = sum(len(job.horizons) * len(job.group.tokens) * len(job.group.seeds) for job in jobs)
    saved = f"saved {1 - trained / whole:.0%}" if trained < whole else "nothing is saved"
    others = [name for name in grid.schedules if name != schedule]
    lines = [
        said,
        f"used: {len(used):,} runs and {trained:,} tokens; the whole grid has {runs:,} and {whole:,} at least, before "
        f"learning rates beyond an edge: {saved}",
    ]
    return "\n".join(lines + ([f"not run with --until: {', '.join(others)}"] if others else []))


def rows_text(rows: Sequence[Row]) -> str:
    """What a sweep has measured, and what went wrong, as text."""
    by_status = {status: [row for row in rows if row.status == status] for status in ("finished", "diverged", "failed")}
    trained, nominal = sum(row.trained_tokens for row in rows), sum(row.tokens for row in rows)
    lines = [
        f"{len(rows)} rows: " + ", ".join(f"{len(each)} {status}" for status, each in by_status.items()),
        f"{trained:,} tokens trained; shared trunks saved {1 - trained / nominal:.0%} of {nominal:,}",
    ]
    for row in by_status["failed"]:
        lines.append(
            f"failed: {row.schedule}, width {row.width}, {row.tokens_per_step} tokens per step, seed "
            f"{row.seed}: {row.reason} (delete its line to try it again)"
        )
    return "\n".join(lines)
