"""Run a grid of small models, side by side: rows of measurements, in an order that survives being killed."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_power.data.text import require_datasets
from hf_power.fit.fit import fit_law
from hf_power.records.errors import UserError
from hf_power.records.files import only_one, read_object, refuse_at_work, temporaries, write_json
from hf_power.records.machine import keep_freed_memory, refuse_alone
from hf_power.records.rows import ROWS_FILE, Row, load_rows
from hf_power.records.run import SCHEMA
from hf_power.schedule import Law
from hf_power.sweep.grid import SCHEDULES, Grid, few_digits
from hf_power.sweep.jobs import Group, groups_of, job_tokens, next_job, start_jobs
from hf_power.sweep.trunks import Bench, prepare, run_group, sweep_rows

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
    grid: Grid, folder: str | os.PathLike[str], *, workers: int | None = None, groups: Sequence[Group] | None = None
) -> list[Row]:
    """Train every row of the grid that is not in the folder's sweep.jsonl yet.

    Schedules other than power come first, since power's law is fitted on the rows of warmup_stable_decay. Groups (one
    schedule, width and batch) run side by side: on a CPU in one single-threaded process per core, on an accelerator
    as one ensemble after another; under `accelerate launch` each process takes its share of the groups, over several
    hosts by a shared folder.

    Args:
        grid: see `hf_power.sweep.reading.load_grid`.
        folder: sweep.json (the grid), sweep.jsonl (the rows), and while it runs the state of the trunks.
        workers: processes on a CPU; None means one per core.
        groups: instead of the grid's own, see `hf_power.sweep.jobs.groups_of`.

    Returns:
        All rows of the folder.

    Raises:
        UserError: a folder of another grid, a budget that is too small, too few rows to fit the law for power.
    """
    require_datasets()
    folder, state = Path(folder), PartialState()
    process: _Process = state
    refuse_alone(process.num_processes)
    refuse_at_work(folder, "wait for its end, or take another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    stages = within_budget(grid, [list(groups)] if groups is not None else stages_of(grid))
    # Two sweeps in a folder would train everything twice. Each process has a lock of its own, for over several hosts a
    # lock of one would keep out the others of the same sweep.
    with only_one(folder, f".lock-{process.process_index}"):
        with state.main_process_first():
            # Temporary files are those of a killed sweep, since the other processes have not begun.
            for path in temporaries(folder) if state.is_main_process else ():
                path.unlink()
            bench = prepare(grid, folder)
            _same_grid(bench)
        for stage in stages:
            stage = _with_law(stage, folder)
            run_groups(bench, stage[process.process_index :: process.num_processes], workers)
            # The law of the next stage needs the rows of all processes.
            while process.num_processes > 1 and any(next_job(grid, group, sweep_rows(folder)) for group in stage):
                time.sleep(POLL_SECONDS)
    return load_rows(folder / ROWS_FILE)[0]


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


def _with_law(stage: list[Group], folder: Path) -> list[Group]:
    """The groups of a stage; those of power that have no law yet get the one of the sweep's own rows."""
    if not stage or stage[0].schedule != "power" or stage[0].law is not None:
        return stage
    fitted = fit_law(load_rows(folder / ROWS_FILE)[0], schedule=LAW_SCHEDULE).law
    law = Law(few_digits(fitted.a), few_digits(fitted.b), few_digits(fitted.batch_exponent))
    return [group.with_law(law) for group in stage]


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
    write_json(path, made)


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


# Variables by which accelerate's launcher tells a process which one of them it is.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

Advance = Callable[[int, int], None]  # with tokens that were trained, and tokens that were added to the total


def run_groups(bench: Bench, groups: Sequence[Group], workers: int | None) -> None:
    """Run this process's groups, with a progress bar in tokens (learning rates that are added make it longer)."""
    rows = sweep_rows(bench.folder)
    jobs = [job for group in groups if (job := next_job(bench.grid, group, rows))]
    if not jobs:
        return
    total = sum(job_tokens(bench.grid, job) for job in jobs)
    # The dearest first, so that no worker is left alone with one at the end.
    jobs.sort(key=lambda job: job_tokens(bench.grid, job) * job.group.width**2, reverse=True)
    todo = [job.group for job in jobs]
    with tqdm(total=total, unit="tok", unit_scale=True, desc=f"Sweep, {len(jobs)} groups", dynamic_ncols=True) as bar:

        def advance(tokens: int, more: int) -> None:
            bar.total += more
            bar.update(tokens)

        if bench.device.type != "cpu" or workers == 1:
            _run_here(replace(bench, tell=advance), todo)
        else:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            _run_pool(bench, todo, workers or max(1, (os.cpu_count() or 1) // local), advance)


def _run_here(bench: Bench, groups: Sequence[Group]) -> None:
    threads = torch.get_num_threads()
    if bench.device.type == "cpu":
        # As in a worker: the order of sums, and with it the rows, must not depend on the number of workers.
        torch.set_num_threads(1)
    try:
        for group in groups:
            run_group(bench, group)
    finally:
        torch.set_num_threads(threads)


def _run_pool(bench: Bench, groups: Sequence[Group], workers: int, advance: Advance) -> None:
    # Spawned, because torch's threads of this process would be in an unknown state in a forked child.
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 2)  # tokens trained, tokens added to the total
    start = (bench.grid, str(bench.folder), counts)
    with ProcessPoolExecutor(min(workers, len(groups)), context, initializer=_start_worker, initargs=start) as pool:
        futures = {pool.submit(_work, group) for group in groups}
        shown = [0, 0]
        try:
            while futures:
                done, futures = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED)
                now = [counts[0], counts[1]]
                advance(now[0] - shown[0], now[1] - shown[1])
                shown = now
                for future in done:
                    future.result()
        # A bug of ours in one worker, or Ctrl-C, must not wait for the groups of the others. Their rows are written one
        # horizon at a time, so nothing is torn.
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


# Of a worker process, which loads the data once for all of its groups.
_bench: Bench | None = None


def _start_worker(grid: Grid, folder: str, counts: "SynchronizedArray[int]") -> None:
    global _bench
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in LAUNCHED:
        # A worker of one of accelerate's processes is none of them, and would wait for the others at the first barrier.
        os.environ.pop(name, None)
    # There are as many workers as cores, and the models are too small for a second thread.
    torch.set_num_threads(1)
    keep_freed_memory()
    import datasets

    datasets.disable_progress_bars()

    def tell(tokens: int, more: int) -> None:
        with counts.get_lock():
            counts[0] += tokens
            counts[1] += more

    _bench = replace(prepare(grid, folder), tell=tell)


def _end_with_parent() -> None:
    """End this process when the sweep was killed: an idle worker would wait for ever, a busy one meet the next sweep."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(group: Group) -> None:
    assert _bench is not None
    run_group(_bench, group)
