"""Run a grid of small models: rows of measurements, in an order that survives being killed."""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_power.data.text import require_datasets
from hf_power.fit.fit import fit_law
from hf_power.records.errors import UserError
from hf_power.records.files import only_one, temporaries, write_json
from hf_power.records.machine import keep_freed_memory
from hf_power.records.rows import ROWS_FILE, SCHEMA, read_rows
from hf_power.records.schema import read_object
from hf_power.sweep.grid import SCHEDULES, Grid, Group, Job, few_digits, job_tokens, next_job
from hf_power.sweep.trunks import Bench, prepare, run_group, sweep_rows

GRID_FILE = "sweep.json"
LAW_SCHEDULE = "warmup_stable_decay"  # its optima make the law (eq. 6)
NO_LAW = {"a": 1.0, "b": 0.0, "batch_exponent": 0.0}  # of power's groups until it is fitted
POLL_SECONDS = 5.0


def run_sweep(
    grid: Grid, folder: str | os.PathLike[str], *, workers: int | None = None, groups: Sequence[Group] | None = None
) -> list[dict[str, Any]]:
    """Train every row of the grid that is not in the folder's sweep.jsonl yet.

    Schedules other than power come first, since power's law is fitted on the rows of warmup_stable_decay. Groups (one
    schedule, width and batch) run side by side: on a CPU in one single-threaded process per core, on an accelerator
    as one ensemble after another; under `accelerate launch` each process takes its share of the groups, over several
    hosts by a shared folder.

    Args:
        grid: see `hf_power.sweep.grid.load_grid`.
        folder: sweep.json (the grid), sweep.jsonl (the rows), and while it runs the state of the trunks.
        workers: processes on a CPU; None: one per core.
        groups: instead of the grid's own, see `Grid.groups`.

    Returns:
        All rows of the folder.

    Raises:
        ValueError: a folder of another grid, a budget that is too small, too few rows to fit the law for power.
    """
    require_datasets()
    folder, state = Path(folder), PartialState()
    folder.mkdir(parents=True, exist_ok=True)
    stages = [list(groups)] if groups is not None else stages_of(grid)
    check_budget(grid, stages)
    with only_one(folder, f".lock-{state.process_index}"):  # two would train everything twice
        with state.main_process_first():
            for path in temporaries(folder) if state.is_main_process else ():
                path.unlink()  # the others have not begun
            bench = prepare(grid, folder)
            _same_grid(bench)
        for stage in stages:
            stage = _with_law(stage, folder)
            _run_groups(bench, stage[state.process_index :: state.num_processes], workers)
            while state.num_processes > 1 and any(_pending(grid, group, folder) for group in stage):
                time.sleep(POLL_SECONDS)
    return read_rows(folder / ROWS_FILE)[0]


def start_jobs(grid: Grid, groups: Sequence[Group]) -> list[Job]:
    """The jobs that are certain: the values to begin with."""
    return [Job(group, 0, {value: group.tokens for value in group.values}) for group in groups]


def stages_of(grid: Grid) -> list[list[Group]]:
    """Groups that may run side by side; those of power without a law come last and get theirs then."""
    first = [group for name in SCHEDULES if name in grid.schedules and name != "power" for group in grid.groups(name)]
    if "power" not in grid.schedules:
        return [first]
    if grid.law is not None:
        return [first + grid.groups("power", grid.law)]
    return [first, grid.groups("power", NO_LAW)]


def _with_law(stage: list[Group], folder: Path) -> list[Group]:
    """The groups of a stage; those of power that have no law yet get the one of the sweep's own rows."""
    if not stage or stage[0].law != NO_LAW:
        return stage
    law = fit_law(read_rows(folder / ROWS_FILE)[0], schedule=LAW_SCHEDULE).law
    known = {name: few_digits(law[name]) for name in NO_LAW}
    return [
        replace(group, law=known, values=tuple(few_digits(scale * known["a"]) for scale in group.values))
        for group in stage
    ]


def check_budget(grid: Grid, stages: list[list[Group]]) -> None:
    """Refuse a grid beyond its budget, and give every group its share of it, in proportion to what is certain."""
    if grid.max_tokens is None:
        return
    groups = [group for stage in stages for group in stage]
    start = [job_tokens(grid, job) for job in start_jobs(grid, groups)]
    if sum(start) > grid.max_tokens:
        raise UserError(
            f"the grid needs {sum(start):,} tokens, more than its budget max_tokens of {grid.max_tokens:,}: raise it, or "
            "take fewer widths, batches, horizons, learning rates or seeds."
        )
    for stage in stages:
        stage[:] = [
            replace(group, max_tokens=int(grid.max_tokens * job_tokens(grid, job) / sum(start)))
            for group, job in zip(stage, start_jobs(grid, stage), strict=True)
        ]


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
        "data": bench.data,
    }
    path = bench.folder / GRID_FILE
    if path.exists():
        before = read_object(path, schema=None, remedy="restore it, or name another --output_dir")
        for key, value in json.loads(json.dumps(made)).items():
            if before.get(key) != value:
                raise UserError(
                    f"{bench.folder} holds a sweep with another {key} ({before.get(key)!r} there, {value!r} now): take "
                    "another folder, its rows cannot be fitted together with these."
                )
    write_json(path, made)


def _pending(grid: Grid, group: Group, folder: Path) -> bool:
    return next_job(grid, group, sweep_rows(folder)) is not None


def _run_groups(bench: Bench, groups: Sequence[Group], workers: int | None) -> None:
    """Run this process's groups, with a progress bar in tokens (learning rates that are added make it longer)."""
    rows = sweep_rows(bench.folder)
    jobs = [job for group in groups if (job := next_job(bench.grid, group, rows))]
    if not jobs:
        return
    total = sum(job_tokens(bench.grid, job) for job in jobs)
    jobs.sort(key=lambda job: job_tokens(bench.grid, job) * job.group.width**2, reverse=True)
    with tqdm(total=total, unit="tok", unit_scale=True, desc=f"Sweep, {len(jobs)} groups", dynamic_ncols=True) as bar:
        if bench.device.type != "cpu" or workers == 1:
            bench.tell = lambda tokens, more: _advance(bar, tokens, more)
            threads = torch.get_num_threads()
            if bench.device.type == "cpu":
                torch.set_num_threads(1)  # so that the sums, and the rows, are those of any number of workers
            try:
                for job in jobs:
                    run_group(bench, job.group)
            finally:
                torch.set_num_threads(threads)
            return
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        _run_pool(bench, [job.group for job in jobs], workers or max(1, (os.cpu_count() or 1) // local), bar)


def _advance(bar: Any, tokens: int, more: int) -> None:
    bar.total += more
    bar.update(tokens)


def _run_pool(bench: Bench, groups: Sequence[Group], workers: int, bar: Any) -> None:
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
                _advance(bar, now[0] - shown[0], now[1] - shown[1])
                shown = now
                for future in done:
                    future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


_bench: Bench | None = None  # of a worker process


def _start_worker(grid: Grid, folder: str, counts: Any) -> None:
    global _bench
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)  # a worker of one of accelerate's processes is none of them
    torch.set_num_threads(1)
    keep_freed_memory()
    import datasets

    datasets.disable_progress_bars()

    def tell(tokens: int, more: int) -> None:
        with counts.get_lock():
            counts[0] += tokens
            counts[1] += more

    _bench = prepare(grid, folder)
    _bench.tell = tell


def _end_with_parent() -> None:
    """End this process when the sweep was killed: an idle worker would wait for ever, a busy one meet the next sweep."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(group: Group) -> None:
    assert _bench is not None
    run_group(_bench, group)


def rows_text(rows: Sequence[dict[str, Any]]) -> str:
    """What a sweep has measured, and what went wrong, as text."""
    by_status = {
        status: [row for row in rows if row["status"] == status] for status in ("finished", "diverged", "failed")
    }
    trained, nominal = sum(row["trained_tokens"] for row in rows), sum(row["tokens"] for row in rows)
    lines = [
        f"{len(rows)} rows: " + ", ".join(f"{len(each)} {status}" for status, each in by_status.items()),
        f"{trained:,} tokens trained; shared trunks saved {1 - trained / nominal:.0%} of {nominal:,}",
    ]
    for row in by_status["failed"]:
        lines.append(
            f"failed: {row['schedule']}, width {row['width']}, {row['tokens_per_step']} tokens per step, seed "
            f"{row['seed']}: {row['reason']} (delete its line to try it again)"
        )
    return "\n".join(lines)
