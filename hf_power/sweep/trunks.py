"""Trunks and their branches: one ensemble after another, from a job to its rows."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_power.data import blocks as hf_data
from hf_power.data.text import load_text
from hf_power.models import flops_per_token
from hf_power.records.files import replaced
from hf_power.records.machine import hardware, versions
from hf_power.records.rows import ROWS_FILE, SCHEMA, append_rows, read_rows
from hf_power.settings.settings import Settings, parse_tokens
from hf_power.sweep.ensemble import Ensemble, rate_factors
from hf_power.sweep.grid import (
    Grid,
    Group,
    Job,
    branch_tokens,
    digest,
    horizon_tokens,
    job_tokens,
    next_job,
    row_id,
    row_rate,
    row_settings,
    tail_tokens,
)

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


def prepare(grid: Grid, folder: str | os.PathLike[str]) -> Bench:
    """Load the data of a grid."""
    base = Settings.from_dict(grid.sections)
    train_text, held_out_text = load_text(base.data)
    tokenizer = hf_data.load_tokenizer(base.data, train_text)
    max_eval_tokens = parse_tokens(base.run.max_eval_tokens, "max_eval_tokens")
    blocks, held_out, data = hf_data.pack_both(base.data, tokenizer, train_text, held_out_text, max_eval_tokens)
    return Bench(grid, Path(folder), tokenizer, blocks, held_out, data, base.training.device)


def sweep_rows(folder: Path) -> list[dict[str, Any]]:
    """The intact rows of a folder; none before the first."""
    path = folder / ROWS_FILE
    if not path.exists() or b"\n" not in path.read_bytes():  # nothing yet, or killed in its first line
        return []
    return read_rows(path)[0]


def run_group(bench: Bench, group: Group) -> None:
    """Train a group until its rows are complete; an error becomes rows that say so."""
    while (job := next_job(bench.grid, group, rows := sweep_rows(bench.folder))) is not None:
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
            if status == "failed":
                row["trained_tokens"] = 0  # not known
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
            "trunk": digest(trunk),
            "trained_tokens": self._tokens[horizon],
            "flops_per_token": self._flops_per_token,
            "seconds": round(self._seconds / len(self.members), 3),
            "block_size": parsed.data.block_size,
            "settings": settings,
            "data": bench.data,
            "versions": versions(),
            "hardware": hardware(args) | {"processes": 1},  # under accelerate too each row is one process's
        }
