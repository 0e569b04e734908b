"""Trunks and their branches: one ensemble after another, from a job to its rows."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch

from hf_power.data.packing import pack_both
from hf_power.data.text import load_text
from hf_power.data.tokenizer import load_tokenizer
from hf_power.models import flops_per_token
from hf_power.records.errors import UserError
from hf_power.records.files import replaced
from hf_power.records.machine import hardware, versions
from hf_power.records.rows import ROWS_FILE, Row, Status, append_rows, load_rows
from hf_power.records.run import Sections as RecordedSections
from hf_power.settings.settings import Settings
from hf_power.sweep import jobs
from hf_power.sweep.ensemble import Ensemble, Member
from hf_power.sweep.grid import Grid
from hf_power.sweep.jobs import Group, Job, branch_tokens, horizon_tokens, job_tokens, next_job, row_settings
from hf_power.sweep.stacked import SweepData

if TYPE_CHECKING:
    from datasets import Dataset

# Nats above log(vocabulary) at which a finite loss counts as diverged: such a run is on its way to no number at all, and
# its loss would bend the parabola of its cell.
WORSE_THAN_GUESSING = 1.0
# On a CPU torch has no error of its own for a full memory, only a RuntimeError that names its allocator.
CPU_ALLOCATOR = "DefaultCPUAllocator"


class Result(NamedTuple):
    """What came out of a run; the losses are None unless it has finished."""

    status: Status
    reason: str | None
    loss: float | None = None
    train_loss: float | None = None


@dataclass(frozen=True)
class Bench:
    """What every job of a process needs: the data, the device, where rows go, and whom to tell of progress."""

    grid: Grid
    folder: Path
    data: SweepData
    device: torch.device
    tell: Callable[[int, int], None] = lambda tokens, more: None


def prepare(grid: Grid, folder: str | os.PathLike[str]) -> Bench:
    """Load the data of a grid."""
    base = grid.settings
    texts = load_text(base.data)
    tokenizer = load_tokenizer(base.data, texts.train)
    base.model_config_for(tokenizer)  # An id without an embedding is refused before the text is tokenized.
    packed = pack_both(base.data, tokenizer, texts, base.run.max_eval_tokens)
    blocks = cast("Dataset", packed.train)  # A grid cannot ask for a stream.
    data = SweepData(tokenizer, blocks, packed.held_out, packed.about())
    return Bench(grid, Path(folder), data, base.training.device)


def sweep_rows(folder: Path) -> list[Row]:
    """The intact rows of a folder; none before the first."""
    path = folder / ROWS_FILE
    # Without a whole line nothing was measured yet, or the sweep was killed in its first line.
    if not path.exists() or b"\n" not in path.read_bytes():
        return []
    return load_rows(path)[0]


def run_group(bench: Bench, group: Group) -> None:
    """Train a group until its rows are complete.

    What the user or the machine is at fault for becomes rows that say so, and the other groups go on. Everything else is
    a bug, which ends the sweep; the rows before it are kept.
    """
    while (job := next_job(bench.grid, group, sweep_rows(bench.folder))) is not None:
        if job.extension:
            bench.tell(0, job_tokens(bench.grid, job))
        if not run_job(bench, job):
            return


def run_job(bench: Bench, job: Job) -> bool:
    """Train the runs of a job that have no rows yet; whether it went without a failure, of which the rows say the reason."""
    have = {row.id for row in sweep_rows(bench.folder)}
    by_horizons: dict[tuple[int, ...], list[float]] = {}
    # Members of an ensemble take all steps together, so their trunks must have one length and the same branches.
    for value, horizons in job.horizons.items():
        by_horizons.setdefault(horizons, []).append(value)
    for horizons, values in by_horizons.items():
        trunks = Trunks(bench, job, tuple(values), horizons, have)
        try:
            trunks.run()
        except (UserError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not memory_is_full(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            for horizon in horizons:
                trunks.write(horizon, failure=reason)
            return False
    return True


def memory_is_full(error: RuntimeError) -> bool:
    """Whether an error of torch says that the memory of the device, or of the machine, is too small."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


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
        self.ids = {key: jobs.row_id(settings, bench.data.record) for key, settings in self.settings.items()}
        # Named by all that makes it: another grid in this folder may have other learning rates of the same number.
        trunk = jobs.digest([{"members": [self.ids[m, max(horizons)] for m in self.members]}, bench.data.record])
        self._state_path = bench.folder / f".trunk-{job.group.name}-{trunk}.pt"
        self._tokens = horizon_tokens(bench.grid, job.group, horizons)
        self._ensemble: Ensemble | None = None
        self._flops_per_token, self._seconds = 0.0, 0.0

    @cached_property
    def _shared(self) -> Settings:
        """The settings of the first row; the others differ from them in the learning rate, the seed and the length."""
        return Settings.from_dict(self.settings[self.members[0], self.horizons[0]])

    def run(self) -> None:
        """Train all horizons, ascending, and write their rows."""
        if not any(self._missing(horizon) for horizon in self.horizons):
            return
        grid, group, batch, longest = self.bench.grid, self.group, self.group.tokens_per_step, max(self.horizons)
        factors = {
            t: np.array([jobs.rate_factors(grid, group, value, t) for value, _ in self.members]) for t in self.horizons
        }
        ensemble = self._ensemble = self._built()
        if self._state_path.exists():
            ensemble.load_state(torch.load(self._state_path, weights_only=True, map_location=self.bench.device))
            self.bench.tell(ensemble.position * batch * len(self.members), 0)
        for horizon in sorted(self.horizons):
            branch = horizon // batch
            if horizon != longest:
                branch = branch_tokens(grid, group, horizon) // batch
            # Past its branch, a horizon was measured before the sweep was stopped.
            if ensemble.position > branch:
                continue
            started = time.perf_counter()
            self._train(ensemble, factors[longest], branch)
            # The state is on the disk before the branch is trained: killed in it, the sweep goes on from here.
            if horizon != longest:
                state = ensemble.state()
                with replaced(self._state_path) as temporary:
                    torch.save(state, temporary)
            if self._missing(horizon):
                self._train(ensemble, factors[horizon], horizon // batch)
                self._seconds = time.perf_counter() - started
                self.write(horizon)
            if horizon != longest:
                ensemble.load_state(state)
        self._state_path.unlink(missing_ok=True)

    def _built(self) -> Ensemble:
        # Power's rows have one cap, and their values are scales of the law.
        cap = self.bench.grid.max_lr if self.group.law else None
        members = [Member(cap or value, seed) for value, seed in self.members]
        ensemble = Ensemble(self._shared, members, self.bench.data, device=self.bench.device)
        self._flops_per_token = flops_per_token(ensemble.models[0].config, self._shared.data.block_size)
        return ensemble

    def _train(self, ensemble: Ensemble, factors: np.ndarray, stop: int) -> None:
        tokens = self.group.tokens_per_step * len(self.members)
        while ensemble.position < stop:
            if any(ensemble.alive):
                ensemble.step(factors[:, ensemble.position])
            # Nothing is left to train, but the position says which horizons are done.
            else:
                ensemble.position += 1
            self.bench.tell(tokens, 0)

    def _missing(self, horizon: int) -> bool:
        return any(self.ids[member, horizon] not in self.have for member in self.members)

    def write(self, horizon: int, failure: str | None = None) -> None:
        """Append the rows of a horizon that are not there; those of a failed run have the reason and no losses."""
        results = [Result("failed", failure)] * len(self.members) if failure is not None else self._results()
        rows = [
            self._row(member, horizon, result)
            for member, result in zip(self.members, results, strict=True)
            if self.ids[member, horizon] not in self.have
        ]
        append_rows(self.bench.folder / ROWS_FILE, rows)
        self.have |= {row.id for row in rows}

    def _results(self) -> list[Result]:
        assert self._ensemble is not None
        worst = math.log(len(self.bench.data.tokenizer)) + WORSE_THAN_GUESSING
        results = []
        for loss, train_loss in zip(self._ensemble.held_out_losses(), self._ensemble.train_losses(), strict=True):
            if loss < worst:
                results.append(Result("finished", None, loss, train_loss))
            elif math.isfinite(loss):
                reason = f"held-out loss {loss:.3f} is more than {WORSE_THAN_GUESSING:g} nat above that of guessing"
                results.append(Result("diverged", reason))
            else:
                results.append(Result("diverged", "the training loss was not finite"))
        return results

    def _row(self, member: tuple[float, int], horizon: int, result: Result) -> Row:
        bench, group, (value, seed), batch = self.bench, self.group, member, self.group.tokens_per_step
        model = self._ensemble.models[0] if self._ensemble is not None else None
        args = self._shared.training
        law = group.law_of(value)
        trunk = [group.schedule, group.width, batch, value, seed, group.law and jobs.row_law(group.law), self.extension]
        return Row(
            id=self.ids[member, horizon],
            model_type=self._shared.model.family,
            width=group.width,
            parameters=model.num_parameters() if model is not None else 0,
            parameters_without_embeddings=model.num_parameters(exclude_embeddings=True) if model is not None else 0,
            tokens_per_step=batch,
            tokens=horizon,
            schedule=group.schedule,
            learning_rate=jobs.row_rate(group, value, horizon),
            law=jobs.row_law(law) if law else None,
            max_lr=bench.grid.max_lr if law else value,
            warmup_tokens=bench.grid.warmup_tokens // batch * batch,
            decay_tokens=bench.grid.tail_tokens(horizon, batch),
            decay_shape=bench.grid.decay_shape,
            weight_decay=args.weight_decay,
            seed=seed,
            extension=self.extension,
            trunk=jobs.digest(trunk),
            trained_tokens=0 if result.status == "failed" else self._tokens[horizon],  # Of a failure it is not known.
            flops_per_token=self._flops_per_token,
            seconds=round(self._seconds / len(self.members), 3),
            block_size=self._shared.data.block_size,
            settings=cast(RecordedSections, self.settings[member, horizon]),
            data=bench.data.record,
            versions=versions(),
            hardware=hardware(args.device),  # Under accelerate, too, each row is one process's.
            status=result.status,
            reason=result.reason,
            loss=result.loss,
            train_loss=result.train_loss,
        )
