"""Who trains: a process per core on a CPU, this one on an accelerator; with one progress bar for all that a sweep does."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType

import torch
from tqdm.auto import tqdm

from hf_power.records.machine import keep_freed_memory
from hf_power.records.rows import ROWS_FILE, Row
from hf_power.register import register_power_scheduler
from hf_power.sweep.ensemble import BATCHED_CPU_TOKENS
from hf_power.sweep.grid import Grid
from hf_power.sweep.jobs import Group, Job, job_tokens, missing, next_job
from hf_power.sweep.trunks import Bench, prepare, run_group, run_job, sweep_rows

# Variables by which accelerate's launcher tells a process which one of them it is.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

# A group is trained until its rows are complete, a job once.
Task = Group | Job


class Crew:
    """Trains groups and jobs side by side, as a context manager that ends its workers.

    The bar counts tokens, of all that is expected and not trained yet; learning rates that are added make it longer. It
    shows the best learning rate of the cell that was measured last.

    Workers take single runs, so that one group keeps all of them busy; up to BATCHED_CPU_TOKENS tokens per step the runs of
    a group are computed as one and stay together. The rows are the same either way.

    Args:
        bench: the grid, its data and its folder.
        workers: processes on a CPU; None means one per core.
    """

    def __init__(self, bench: Bench, workers: int | None) -> None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.workers = workers or max(1, (os.cpu_count() or 1) // local)
        self._here = bench.device.type != "cpu" or workers == 1
        self.bench = replace(bench, tell=self._advance)
        self._expected: dict[str, int] = {}
        self._bar: tqdm[None] | None = None
        self._pool: ProcessPoolExecutor | None = None
        # Spawned, because torch's threads of this process would be in an unknown state in a forked child.
        self._context = multiprocessing.get_context("spawn")
        self._trained: Synchronized[int] = self._context.Value("q")  # tokens
        self._shown, self._size = 0, -1

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._pool is None:
            return
        # A bug of ours in one worker, or Ctrl-C, must not wait for the groups of the others. Their rows are written one
        # horizon at a time, so nothing is torn.
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        for process in multiprocessing.active_children() if kind is not None else ():
            process.terminate()

    def expect(self, groups: Sequence[Group]) -> None:
        """Count what these groups will train, whenever they come, into the length of the bar."""
        self._expected = {group.name: self._tokens(self._parts(group)) for group in groups}
        self._lengthen(sum(self._expected.values()))

    def run(self, tasks: Sequence[Task]) -> None:
        """Train what is missing of these; the dearest first, so that no worker is left alone with one at the end."""
        costs = [(self._tokens(self._parts(task)), task) for task in tasks]
        todo = [(tokens, task) for tokens, task in costs if tokens]
        names = [task.name for task in tasks if isinstance(task, Group)]
        known = sum(self._expected.pop(name, 0) for name in names)
        self._lengthen(sum(tokens for tokens, _ in todo) - known)
        todo.sort(key=lambda each: each[0] * _width(each[1]) ** 2, reverse=True)
        if self._here:
            self._run_here([task for _, task in todo])
        elif todo:
            self._run_pool([task for _, task in todo])

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        tqdm.write(line)

    def _parts(self, task: Task) -> list[Job]:
        """What is missing of a job, or of the next job of a group, in parts that can be trained side by side."""
        rows = sweep_rows(self.bench.folder)
        job = next_job(self.bench.grid, task, rows) if isinstance(task, Group) else task
        return [part for part in parts_of(job) if missing(part, rows)] if job else []

    def _tokens(self, parts: Sequence[Job]) -> int:
        return sum(job_tokens(self.bench.grid, part) for part in parts)

    def _lengthen(self, tokens: int) -> None:
        if self._bar is None and tokens:
            # In a log file each refresh is a line.
            pause = 0.1 if sys.stderr.isatty() else 30.0
            self._bar = tqdm(total=0, unit="tok", unit_scale=True, desc="Sweep", dynamic_ncols=True, mininterval=pause)
        if self._bar is not None:
            self._bar.total += tokens

    def _advance(self, tokens: int, more: int) -> None:
        if self._bar is None:
            return
        self._bar.total += more
        self._bar.update(tokens)
        path = self.bench.folder / ROWS_FILE
        size = path.stat().st_size if path.exists() else 0
        if size != self._size:
            self._size = size
            self._bar.set_postfix_str(best_text(sweep_rows(self.bench.folder)), refresh=False)

    def _run_here(self, tasks: Sequence[Task]) -> None:
        threads = torch.get_num_threads()
        if self.bench.device.type == "cpu":
            # As in a worker: the order of sums, and with it the rows, must not depend on the number of workers.
            torch.set_num_threads(1)
        try:
            for task in tasks:
                if isinstance(task, Group):
                    run_group(self.bench, task)
                else:
                    run_job(self.bench, task)
        finally:
            torch.set_num_threads(threads)

    def _run_pool(self, tasks: Sequence[Task]) -> None:
        if self._pool is None:
            start = (self.bench.grid, str(self.bench.folder), self._trained)
            self._pool = ProcessPoolExecutor(self.workers, self._context, initializer=_start_worker, initargs=start)
        parts = [(part, task) for task in tasks for part in self._parts(task)]
        # A job that stays whole takes as long as many runs, and comes before them.
        parts.sort(key=lambda each: self._tokens([each[0]]) * each[0].group.width ** 2, reverse=True)
        of_task: dict[Future[None], Task] = {self._pool.submit(_work, part): task for part, task in parts}
        while of_task:
            done, _ = wait(of_task, timeout=0.5, return_when=FIRST_COMPLETED)
            now = self._trained.value
            self._advance(now - self._shown, 0)
            self._shown = now
            for future in done:
                task = of_task.pop(future)
                future.result()
                # Which learning rates a group adds follows from all rows of those before.
                if isinstance(task, Group) and task not in of_task.values():
                    more = self._parts(task)
                    self._lengthen(self._tokens(more))
                    of_task |= {self._pool.submit(_work, part): task for part in more}


def parts_of(job: Job) -> list[Job]:
    """A job's runs one by one, or the job as it is where they are computed as one."""
    group = job.group
    if group.tokens_per_step <= BATCHED_CPU_TOKENS:
        return [job]
    return [
        Job(replace(group, seeds=(seed,)), job.extension, {value: horizons})
        for value, horizons in job.horizons.items()
        for seed in group.seeds
    ]


def best_text(rows: Sequence[Row]) -> str:
    """The best learning rate of the cell that was measured last, with its loss; empty before the first."""
    finished = [row for row in rows if row.loss is not None]
    if not finished:
        return ""
    last = finished[-1]
    cell = (last.schedule, last.width, last.tokens_per_step, last.tokens)
    inside = [row for row in finished if (row.schedule, row.width, row.tokens_per_step, row.tokens) == cell]
    best = min(inside, key=lambda row: row.loss or 0.0)
    return (
        f"best at {last.tokens:,} tokens and {last.tokens_per_step:,} a step: {best.learning_rate:.3g}, loss "
        f"{best.loss:.3f}"
    )


def _width(task: Task) -> int:
    return task.width if isinstance(task, Group) else task.group.width


# Of a worker process, which loads the data once for all of its groups.
_bench: Bench | None = None


def _start_worker(grid: Grid, folder: str, trained: "Synchronized[int]") -> None:
    global _bench
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # A worker of the command line has its parent's words, and so `import hf_power` has left this to us.
    register_power_scheduler()
    for name in LAUNCHED:
        # A worker of one of accelerate's processes is none of them, and would wait for the others at the first barrier.
        os.environ.pop(name, None)
    # There are as many workers as cores, and the models are too small for a second thread.
    torch.set_num_threads(1)
    keep_freed_memory()
    import datasets

    datasets.disable_progress_bars()

    def tell(tokens: int, more: int) -> None:
        with trained.get_lock():
            trained.value += tokens

    _bench = replace(prepare(grid, folder), tell=tell)


def _end_with_parent() -> None:
    """End this process when the sweep was killed: an idle worker would wait for ever, a busy one meet the next sweep."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Job) -> None:
    assert _bench is not None
    run_job(_bench, job)
