"""Run a grid of small models: rows of measurements, in an order that survives being killed."""

import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_power import data as hf_data
from hf_power.ensemble import Ensemble, rate_factors
from hf_power.files import replaced, write_json
from hf_power.fit import fit_law
from hf_power.flops import flops_per_token
from hf_power.grid import (
    SCHEDULES,
    Grid,
    Group,
    Job,
    belongs,
    branch_tokens,
    few_digits,
    horizon_tokens,
    job_tokens,
    next_job,
    row_id,
    row_rate,
    row_settings,
    sections,
    tail_tokens,
)
from hf_power.machine import hardware, keep_freed_memory, versions
from hf_power.rows import SCHEMA, append_rows, read_rows
from hf_power.settings import Settings, parse_tokens
from hf_power.text import load_text, require_datasets

ROWS_FILE = "sweep.jsonl"
GRID_FILE = "sweep.json"
LAW_SCHEDULE = "warmup_stable_decay"  # its optima make the law (eq. 6)
NO_LAW = {"a": 1.0, "b": 0.0, "batch_exponent": 0.0}  # of power's groups until it is fitted
POLL_SECONDS = 5.0
TRIAL_STEPS = 4
WORSE_THAN_GUESSING = 1.0  # nats above log(vocabulary) at which a finite loss counts as diverged


@dataclass
class Bench:
    """What every job of a process needs: the data, the device, where rows go, whom to tell of progress."""

    grid: Grid
    folder: Path
    tokenizer: Any
    blocks: Any
    held_out: Any
    data: dict[str, Any]
    device: torch.device
    tell: Callable[[int, int], None] = lambda tokens, more: None


def run_sweep(
    grid: Grid, folder: str | os.PathLike[str], *, workers: int | None = None, groups: Sequence[Group] | None = None
) -> list[dict[str, Any]]:
    """Train every row of the grid that is not in the folder's sweep.jsonl yet.

    Schedules other than power come first, since power's law is fitted on the rows of warmup_stable_decay. Groups (one
    schedule, width and batch) run side by side: on a CPU in one single-threaded process per core, on an accelerator
    as one ensemble after another; under `accelerate launch` each process takes its share of the groups, over several
    hosts by a shared folder.

    Args:
        grid: see `hf_power.grid.load_grid`.
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
    stages = [list(groups)] if groups is not None else _stages(grid)
    _check_budget(grid, stages)
    with _only_one(folder, state.process_index):
        with state.main_process_first():
            bench = prepare(grid, folder)
            _same_grid(bench)
        for stage in stages:
            stage = _with_law(stage, folder)
            _run_stage(bench, stage, stage[state.process_index :: state.num_processes], workers)
            while state.num_processes > 1 and any(_pending(grid, group, folder) for group in stage):
                time.sleep(POLL_SECONDS)
    return read_rows(folder / ROWS_FILE)[0]


def prepare(grid: Grid, folder: str | os.PathLike[str]) -> Bench:
    """Load the data of a grid."""
    base = Settings.from_dict(grid.sections)
    train_text, held_out_text = load_text(base.data)
    tokenizer = hf_data.load_tokenizer(base.data, train_text)
    block, processes = base.data.block_size, base.data.num_proc
    blocks = hf_data.pack(train_text, tokenizer, block_size=block, num_proc=processes)
    held_out = hf_data.pack(held_out_text, tokenizer, block_size=block, num_proc=processes)
    wanted = max(1, parse_tokens(base.run.max_eval_tokens, "max_eval_tokens") // block)
    held_out = hf_data.spread_blocks(held_out, wanted)
    data = {
        "dataset": base.data.dataset,
        "fingerprint": hf_data.fingerprint(blocks),
        "tokenizer": hf_data.tokenizer_fingerprint(tokenizer),
        "held_out_tokens": len(held_out) * block,
    }
    return Bench(grid, Path(folder), tokenizer, blocks, held_out, data, base.training.device)


def start_jobs(grid: Grid, groups: Sequence[Group]) -> list[Job]:
    """The jobs that are certain: the values to begin with."""
    return [Job(group, 0, {value: group.tokens for value in group.values}) for group in groups]


def _stages(grid: Grid) -> list[list[Group]]:
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


def _check_budget(grid: Grid, stages: list[list[Group]]) -> None:
    if grid.max_tokens is None:
        return
    groups = [group for stage in stages for group in stage]
    start = [job_tokens(grid, job) for job in start_jobs(grid, groups)]
    if sum(start) > grid.max_tokens:
        raise ValueError(
            f"the grid needs {sum(start):,} tokens, more than its budget max_tokens of {grid.max_tokens:,}: raise it, or "
            "take fewer widths, batches, horizons, learning rates or seeds."
        )
    for stage in stages:
        stage[:] = [
            replace(group, max_tokens=int(grid.max_tokens * job_tokens(grid, job) / sum(start)))
            for group, job in zip(stage, start_jobs(grid, stage), strict=True)
        ]


@contextmanager
def _only_one(folder: Path, rank: int) -> Iterator[None]:
    """Hold the folder's lock: two sweeps in one folder would train everything twice."""
    with open(folder / f".lock-{rank}", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another sweep is running in {folder}: wait for it, or take another folder.") from error
        yield


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
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in json.loads(json.dumps(made)).items():
            if before.get(key) != value:
                raise ValueError(
                    f"{bench.folder} holds a sweep with another {key} ({before.get(key)!r} there, {value!r} now): take "
                    "another folder, its rows cannot be fitted together with these."
                )
    write_json(path, made)


def _pending(grid: Grid, group: Group, folder: Path) -> bool:
    rows = _rows(folder)
    return next_job(grid, group, rows) is not None and not _has_failed(group, rows)


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / ROWS_FILE
    if not path.exists() or b"\n" not in path.read_bytes():  # nothing yet, or killed in its first line
        return []
    return read_rows(path)[0]


def _has_failed(group: Group, rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["status"] == "failed" and belongs(row, group) for row in rows)


def _run_stage(bench: Bench, stage: Sequence[Group], groups: Sequence[Group], workers: int | None) -> None:
    """Run this process's groups, with a progress bar in tokens (learning rates that are added make it longer)."""
    rows = _rows(bench.folder)
    jobs = [job for group in groups if (job := next_job(bench.grid, group, rows)) and not _has_failed(group, rows)]
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


def run_group(bench: Bench, group: Group) -> None:
    """Train a group until its rows are complete; an error becomes rows that say so."""
    while (job := next_job(bench.grid, group, rows := _rows(bench.folder))) is not None:
        if _has_failed(group, rows):
            return
        if job.extension:
            bench.tell(0, job_tokens(bench.grid, job))
        have = {row["id"] for row in rows}
        by_horizons: dict[tuple[int, ...], list[float]] = {}
        for value, horizons in job.horizons.items():
            by_horizons.setdefault(horizons, []).append(value)
        for horizons, values in by_horizons.items():
            trunks = Trunks(bench, job, tuple(values), horizons, have)
            try:
                trunks.run()
            except (RuntimeError, ValueError, ArithmeticError) as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                for horizon in horizons:
                    trunks.write(horizon, "failed", reason)
                return


class Trunks:
    """The trunks of one ensemble and their branches, a branch per horizon.

    A trunk follows the schedule of the longest horizon. Another horizon's schedule is the same up to some step (its
    decay, or for cosine and linear the end of the warmup): there the trunk's state is put by, the horizon is trained to
    its end and measured, and the trunk goes on from what was put by.
    """

    def __init__(
        self, bench: Bench, job: Job, values: tuple[float, ...], horizons: tuple[int, ...], have: set[str]
    ) -> None:
        self.bench, self.group, self.extension, self.horizons = bench, job.group, job.extension, horizons
        self.members = [(value, seed) for value in values for seed in job.group.seeds]
        self.have = have
        keys = [(member, horizon) for member in self.members for horizon in horizons]
        self.settings = {(m, t): row_settings(bench.grid, job.group, *m, t) for m, t in keys}
        self.ids = {key: row_id(settings, bench.data) for key, settings in self.settings.items()}
        # Named by all that makes it: another grid in this folder may have other learning rates of the same number.
        trunk = row_id({"members": [self.ids[member, max(horizons)] for member in self.members]}, bench.data)
        self._state_path = bench.folder / f".trunk-{job.group.name}-{trunk}.pt"
        self._tokens = horizon_tokens(bench.grid, job.group, horizons)
        self._ensemble: Ensemble | None = None
        self._flops_per_token, self._seconds = 0.0, 0.0

    def run(self) -> None:
        """Train all horizons, ascending, and write their rows."""
        if not any(self._missing(horizon) for horizon in self.horizons):
            return
        batch, block = self.group.tokens_per_step, len(self.bench.blocks[0]["input_ids"])
        settings = {key: Settings.from_dict(made) for key, made in self.settings.items()}
        factors = {
            t: np.array([rate_factors(settings[m, t], batch, t // batch) for m in self.members]) for t in self.horizons
        }
        longest = max(self.horizons)
        ensemble = self._ensemble = Ensemble(
            [settings[m, longest] for m in self.members],
            self.bench.tokenizer,
            self.bench.blocks,
            self.bench.held_out,
            num_sequences=batch // block,
            device=self.bench.device,
        )
        self._flops_per_token = flops_per_token(ensemble.models[0].config, block)
        if self._state_path.exists():
            ensemble.load_state(torch.load(self._state_path, weights_only=True, map_location=self.bench.device))
            self.bench.tell(ensemble.position * batch * len(self.members), 0)
        for horizon in sorted(self.horizons):
            branch = horizon // batch
            if horizon != longest:
                branch = branch_tokens(self.bench.grid, self.group, horizon) // batch
            if ensemble.position > branch:
                continue  # this horizon was measured before the sweep was stopped
            started = time.perf_counter()
            self._train(factors[longest], branch)
            if horizon != longest:
                state = ensemble.state()
                with replaced(self._state_path) as temporary:
                    torch.save(state, temporary)
            if self._missing(horizon):
                self._train(factors[horizon], horizon // batch)
                self._seconds = time.perf_counter() - started
                self.write(horizon)
            if horizon != longest:
                ensemble.load_state(state)
        self._state_path.unlink(missing_ok=True)

    def _train(self, factors: np.ndarray, stop: int) -> None:
        ensemble, tokens = self._ensemble, self.group.tokens_per_step * len(self.members)
        assert ensemble is not None
        while ensemble.position < stop:
            if any(ensemble.alive):
                ensemble.step(factors[:, ensemble.position])
            else:
                ensemble.position += 1
            self.bench.tell(tokens, 0)

    def _missing(self, horizon: int) -> bool:
        return any(self.ids[member, horizon] not in self.have for member in self.members)

    def write(self, horizon: int, status: str = "finished", reason: str | None = None) -> None:
        """Append the rows of a horizon that are not there; without an ensemble (an error) they have no losses."""
        losses = trained = [math.nan] * len(self.members)
        if status == "finished" and self._ensemble is not None:
            losses, trained = self._ensemble.held_out_losses(), self._ensemble.train_losses()
        rows = []
        for member, loss, train_loss in zip(self.members, losses, trained, strict=True):
            if self.ids[member, horizon] in self.have:
                continue
            row = self._row(member, horizon) | {"status": status, "reason": reason, "loss": None, "train_loss": None}
            if status == "finished":
                worst = math.log(len(self.bench.tokenizer)) + WORSE_THAN_GUESSING
                if not loss < worst:
                    row["status"] = "diverged"
                    row["reason"] = (
                        f"held-out loss {loss:.3f} is more than {WORSE_THAN_GUESSING:g} nat above that of guessing"
                        if math.isfinite(loss)
                        else "the training loss was not finite"
                    )
                else:
                    row |= {"loss": loss, "train_loss": train_loss}
            rows.append(row)
        append_rows(self.bench.folder / ROWS_FILE, rows)
        self.have |= {row["id"] for row in rows}

    def _row(self, member: tuple[float, int], horizon: int) -> dict[str, Any]:
        """Everything of a row but its result."""
        bench, group, (value, seed) = self.bench, self.group, member
        settings = self.settings[member, horizon]
        law = None if group.law is None else {**group.law, "a": value}
        parsed = Settings.from_dict(settings)
        args, batch = parsed.training, group.tokens_per_step
        trunk = [group.schedule, group.width, batch, value, seed, group.law, self.extension]
        model: Any = self._ensemble.models[0] if self._ensemble is not None else None
        return {
            "schema": SCHEMA,
            "id": self.ids[member, horizon],
            "model_type": settings["model"]["model_type"],
            "width": group.width,
            "parameters": model.num_parameters() if model is not None else 0,
            "parameters_without_embeddings": model.num_parameters(exclude_embeddings=True) if model is not None else 0,
            "tokens_per_step": batch,
            "tokens": horizon,
            "schedule": group.schedule,
            "learning_rate": row_rate(group, value, horizon),
            "law": law,
            "max_lr": bench.grid.max_lr if law else value,
            "warmup_tokens": args.get_warmup_steps(horizon // batch) * batch,
            "decay_tokens": tail_tokens(bench.grid, horizon, batch),
            "decay_shape": bench.grid.decay_shape,
            "weight_decay": args.weight_decay,
            "seed": seed,
            "extension": self.extension,
            "trunk": hashlib.sha256(json.dumps(trunk).encode()).hexdigest()[:16],
            "trained_tokens": self._tokens[horizon],
            "flops_per_token": self._flops_per_token,
            "seconds": round(self._seconds / len(self.members), 3),
            "block_size": parsed.data.block_size,
            "settings": settings,
            "data": bench.data,
            "versions": versions(),
            "hardware": hardware(args) | {"processes": 1},  # under accelerate too each row is one process's
        }


def estimate(grid: Grid, folder: str | os.PathLike[str], workers: int | None = None) -> dict[str, Any]:
    """What a sweep will cost, from a few steps of every width and batch: the rows of ``--dry-run``.

    Learning rates that the sweep may add are not in it.

    Returns:
        {"groups": [{"name", "runs", "tokens", "flops", "seconds"}], "runs", "tokens", "tokens_without_sharing",
        "flops", "seconds" (wall time with the workers), "bytes", "workers"}.
    """
    bench = prepare(grid, folder)
    stages = _stages(grid)
    _check_budget(grid, stages)
    workers = 1 if bench.device.type != "cpu" else workers or os.cpu_count() or 1
    threads = torch.get_num_threads()
    if bench.device.type == "cpu":
        torch.set_num_threads(1)
    block = len(bench.blocks[0]["input_ids"])
    measured: dict[tuple[int, int, int], tuple[float, float, float, int]] = {}
    rows: list[dict[str, Any]] = []
    for job in start_jobs(grid, [group for stage in stages for group in stage]):
        group, members = job.group, len(job.group.values) * len(job.group.seeds)
        key = (group.width, group.tokens_per_step, members)
        if key not in measured:
            measured[key] = _trial(bench, group, members)
        per_token, per_eval, flops, state = measured[key]
        tokens, runs = job_tokens(grid, job), members * len(group.tokens)
        seconds = tokens * per_token + runs * per_eval
        rows.append({"name": group.name, "runs": runs, "tokens": tokens, "flops": tokens * flops, "seconds": seconds})
        rows[-1] |= {"without_sharing": members * sum(group.tokens), "state": state}
    torch.set_num_threads(threads)
    busiest = max(row["seconds"] for row in rows)
    return {
        "groups": rows,
        "runs": sum(row["runs"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_without_sharing": sum(row["without_sharing"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "seconds": max(busiest, sum(row["seconds"] for row in rows) / workers),
        "bytes": sum(row["runs"] for row in rows) * 3000 + workers * max(row["state"] for row in rows),
        "workers": workers,
        "block_size": block,
    }


def estimate_text(cost: dict[str, Any]) -> str:
    """The result of `estimate` as text."""
    saved = 1 - cost["tokens"] / cost["tokens_without_sharing"]
    lines = [f"{'group':<36} {'runs':>5} {'tokens':>12} {'FLOP':>9} {'minutes':>8}"]
    for row in cost["groups"]:
        lines.append(
            f"{row['name']:<36} {row['runs']:>5} {row['tokens']:>12,} {row['flops']:>9.1e} {row['seconds'] / 60:>8.1f}"
        )
    lines.append(
        f"{cost['runs']} runs, {cost['tokens']:,} tokens (shared trunks save {saved:.0%} of "
        f"{cost['tokens_without_sharing']:,}), {cost['flops']:.1e} FLOP, about {cost['seconds'] / 60:.1f} minutes with "
        f"{cost['workers']} worker(s), {cost['bytes'] / 1e6:.0f} MB of disk; learning rates that the sweep adds beyond "
        "an edge come on top."
    )
    return "\n".join(lines)


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


def _trial(bench: Bench, group: Group, members: int) -> tuple[float, float, float, int]:
    """Seconds per trained token and per evaluation, FLOPs per token, bytes of a trunk's state."""
    base = sections(bench.grid, group.width, group.tokens_per_step)
    settings = Settings.from_dict(base)
    block = len(bench.blocks[0]["input_ids"])
    ensemble = Ensemble(
        [settings] * members,
        bench.tokenizer,
        bench.blocks,
        bench.held_out,
        num_sequences=group.tokens_per_step // block,
        device=bench.device,
    )
    for _ in range(2):
        ensemble.step([1e-3] * members)
    started = time.perf_counter()
    for _ in range(TRIAL_STEPS):
        ensemble.step([1e-3] * members)
    ensemble.check_alive()
    trained = time.perf_counter()
    ensemble.held_out_losses()
    per_eval = (time.perf_counter() - trained) / members
    per_token = (trained - started) / (TRIAL_STEPS * members * group.tokens_per_step)
    state: int = 12 * ensemble.models[0].num_parameters() * members
    return per_token, per_eval, flops_per_token(ensemble.models[0].config, block), state
