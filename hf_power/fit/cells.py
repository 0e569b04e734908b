"""The optimal learning rate of each cell of a sweep: one schedule, width, batch and horizon, several learning rates."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_power.records.errors import UserError

WINDOW_OCTAVES = 2.0
Array = NDArray[np.float64]


class Run(NamedTuple):
    """One run in a cell's parabola: its trunk and seed, log2 of its learning rate, and its scatter.

    The scatter is the residual over sqrt(1 - leverage), in nats, so that its mean square is the noise's variance (HC2);
    0 where the parabola goes through the point.
    """

    trunk: str
    seed: int
    log2_lr: float
    scatter: float


@dataclass(frozen=True)
class Cell:
    """What one cell says about its optimum; what could not be found is None.

    Attributes:
        schedule, width, tokens_per_step, tokens: which cell; tokens is the horizon.
        learning_rates: those of finished runs, rising.
        losses: mean over the seeds at each of them, nats per token.
        num_seeds: runs at each of them.
        loss_sd: scatter between seeds, nats, pooled over the learning rates; None with one seed each.
        optimum_lr: where the parabola is lowest.
        optimum_interval: 95 % interval of it.
        optimum_sd_octaves: standard deviation of its log2.
        curvature: nats per octave**2.
        min_loss: of the parabola, nats per token; the lowest mean where there is none.
        used: has a bracketed optimum.
        reason: why it has none, a sentence.
        law_lr, residual_octaves, regret: the law's rate here, log2 of the optimum over it, and the nats that it costs.
        runs: the runs within the parabola; not in files.
        noise_known: the standard deviation comes from scatter; False: from the spacing alone. Not in files.
    """

    schedule: str
    width: int
    tokens_per_step: int
    tokens: int
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    num_seeds: tuple[int, ...]
    loss_sd: float | None = None
    optimum_lr: float | None = None
    optimum_interval: tuple[float, float] | None = None
    optimum_sd_octaves: float | None = None
    curvature: float | None = None
    min_loss: float | None = None
    used: bool = False
    reason: str | None = None
    law_lr: float | None = None
    residual_octaves: float | None = None
    regret: float | None = None
    runs: tuple[Run, ...] = field(default=(), repr=False)
    noise_known: bool = field(default=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The content of fit.json's "cells"."""
        names = [f.name for f in fields(self) if f.name not in ("runs", "noise_known")]
        values = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def name(self) -> str:
        """The cell in words."""
        width = f"width {self.width}, " if self.width else ""
        return f"{self.schedule}, {width}{self.tokens_per_step:,} tokens per step, {self.tokens:,} tokens"


def regret(cell: Cell, learning_rate: float) -> float:
    """Nats above the cell's optimum at a learning rate, by its parabola: ``curvature * log2(lr / optimum)**2``.

    Raises:
        ValueError: the cell has no optimum.
    """
    if cell.optimum_lr is None or cell.curvature is None:
        raise UserError(f"the cell {cell.name()} has no optimum to compare with: {cell.reason}.")
    return cell.curvature * math.log2(learning_rate / cell.optimum_lr) ** 2


def fit_cells(rows: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """A parabola ``loss = min_loss + curvature * (log2 lr - log2 optimum)**2`` in each cell, by least squares.

    It is fitted to all finished runs, weighted equally, with a min_loss for each seed (runs of one seed share their
    initialization and data, and a part of their luck), within two octaves of the learning rate with the lowest
    mean (and to its neighbours, where the spacing is wider): the loss rises faster towards divergence than towards small
    rates, and a far flank would bend the parabola away from the optimum. A learning rate at which a run diverged counts
    as higher than every finished one and is not in the parabola. The optimum is used if the lowest mean has a higher one
    on both sides, the curvature is positive, and the optimum lies between those neighbours.

    The standard deviation is by the delta method, with the noise of a run pooled over the cells of the schedule, for the
    few runs of one cell tell little about their own scatter. Where no cell has more runs than the parabola has
    coefficients, it is that of a uniform distribution within half a step around the lowest mean.

    Args:
        rows: of `hf_power.records.rows`; failed ones are passed over.

    Returns:
        Cells by schedule, width, batch and horizon.
    """
    grouped: dict[tuple[str, int, int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["status"] != "failed":
            grouped[row["schedule"], row["width"], row["tokens_per_step"], row["tokens"]].append(row)
    measured = [_Parabola.of_rows(key, grouped[key]) for key in sorted(grouped)]
    cells = []
    for one in measured:
        same = [p for p in measured if p.cell.schedule == one.cell.schedule and p.cell.used]
        cells.append(one.with_interval(sum(p.squares for p in same), sum(p.freedom for p in same)))
    return cells


def rates_near(rates: Sequence[float], lowest: int) -> list[float]:
    """The rates that a parabola is fitted to: within WINDOW_OCTAVES of number `lowest`, and its neighbours."""
    return [
        rate
        for i, rate in enumerate(rates)
        if abs(i - lowest) <= 1 or abs(math.log2(rate) - math.log2(rates[lowest])) <= WINDOW_OCTAVES + 1e-6
    ]


@dataclass(frozen=True)
class _Parabola:
    """A cell before its noise is known, in z = log2(lr) - log2(lowest lr): loss = p0 + p1 z + p2 z**2."""

    cell: Cell
    half_step: tuple[float, float] = (0.0, 0.0)  # log2 of the middles between the lowest mean and its neighbours
    variance: float = 0.0  # of log2 of the optimum, for a noise of 1 nat
    squares: float = 0.0
    freedom: int = 0

    @classmethod
    def of_rows(cls, key: tuple[str, int, int, int], rows: Sequence[Mapping[str, Any]]) -> "_Parabola":
        diverged = sorted({float(row["learning_rate"]) for row in rows if row["status"] == "diverged"})
        runs: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            if row["learning_rate"] not in diverged:
                runs[float(row["learning_rate"])].append(row)
        rates = sorted(runs)
        means = [sum(run["loss"] for run in runs[lr]) / len(runs[lr]) for lr in rates]
        cell = Cell(*key, tuple(rates), tuple(means), tuple(len(runs[lr]) for lr in rates))
        cell = replace(cell, loss_sd=_between_seeds([[run["loss"] for run in runs[lr]] for lr in rates]))
        if len(rates) < 3:
            return cls(replace(cell, reason=f"only {len(rates)} learning rates finished, a parabola needs 3"))
        lowest = means.index(min(means))
        cell = replace(cell, min_loss=means[lowest])
        above = [lr for lr in (*rates, *diverged) if lr > rates[lowest]]
        if lowest == 0 or not above:
            side, more = ("lowest", "lower") if lowest == 0 else ("highest", "higher")
            reason = f"the loss is lowest at the {side} learning rate, {rates[lowest]:.3g}: run {more} ones"
            return cls(replace(cell, reason=reason))
        return cls._fit(cell, runs, lowest, (rates[lowest - 1], min(above)))

    @classmethod
    def _fit(cls, cell: Cell, runs: Mapping[float, Any], lowest: int, sides: tuple[float, float]) -> "_Parabola":
        center = math.log2(cell.learning_rates[lowest])
        near = rates_near(cell.learning_rates, lowest)
        inside = [run for lr in near for run in runs[lr]]
        if len(near) < 3:
            return cls(replace(cell, reason=f"only {len(near)} learning rates finished near the lowest loss"))
        z = np.log2([run["learning_rate"] for run in inside]) - center
        loss = np.array([run["loss"] for run in inside], dtype=np.float64)
        design = _design(z, [run["seed"] for run in inside])
        inverse: Array = np.asarray(np.linalg.inv(design.T @ design), dtype=np.float64)
        solution = inverse @ (design.T @ loss)
        p0, p1, p2 = (float(solution[i]) for i in (0, -2, -1))
        residuals = loss - design @ solution
        rest = 1.0 - np.einsum("ij,jk,ik->i", design, inverse, design)
        scatter = np.where(rest > 1e-9, residuals / np.sqrt(np.maximum(rest, 1e-9)), 0.0)
        names = [
            Run(run["trunk"], run["seed"], float(x), float(r))
            for run, x, r in zip(inside, z + center, scatter, strict=True)
        ]
        cell = replace(cell, runs=tuple(names), curvature=p2)
        low, high = (math.log2(lr) - center for lr in sides)
        if p2 <= 0:
            return cls(replace(cell, reason="the losses do not curve upwards: run more seeds or wider learning rates"))
        best = -p1 / (2 * p2)
        if not low <= best <= high:
            reason = "the parabola's optimum lies beyond the neighbours of the lowest loss: run more seeds"
            return cls(replace(cell, reason=reason))
        cell = replace(cell, optimum_lr=2 ** (center + best), min_loss=p0 - p1 * p1 / (4 * p2), used=True)
        return cls(
            cell=cell,
            half_step=(center + low / 2, center + high / 2),
            variance=_variance(p1, p2, inverse),
            squares=float(residuals @ residuals),
            freedom=len(inside) - design.shape[1],
        )

    def with_interval(self, squares: float, freedom: int) -> Cell:
        """The cell with the optimum's interval, for noise of `squares` / `freedom` nats**2."""
        if not self.cell.used or self.cell.optimum_lr is None:
            return self.cell
        if freedom == 0:
            low, high = self.half_step
            sd = (high - low) / math.sqrt(12)
        else:
            from scipy.special import stdtrit

            sd = math.sqrt(self.variance * squares / freedom)
            half = float(stdtrit(freedom, 0.975)) * sd
            low, high = math.log2(self.cell.optimum_lr) - half, math.log2(self.cell.optimum_lr) + half
        return replace(self.cell, optimum_interval=(2**low, 2**high), optimum_sd_octaves=sd, noise_known=freedom > 0)


def _design(z: Array, seeds: Sequence[int]) -> Array:
    """Columns 1, the seeds' offsets (that sum to 0; none where they cannot be told from the learning rate), z, z**2."""
    level, curve = np.ones((len(z), 1)), np.stack([z, z * z], axis=1)
    kinds = sorted(set(seeds))
    which = np.array([kinds.index(seed) for seed in seeds])
    offsets = np.eye(len(kinds))[which][:, 1:] - (which == 0)[:, None]
    design = np.concatenate([level, offsets, curve], axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        design = np.concatenate([level, curve], axis=1)
    return design


def _variance(p1: float, p2: float, inverse: Array) -> float:
    """Of -p1 / (2 p2) for noise of variance 1, by the delta method; p1 and p2 are the last of the coefficients."""
    slope = np.array([-1 / (2 * p2), p1 / (2 * p2 * p2)])
    return float(slope @ inverse[-2:, -2:] @ slope)


def _between_seeds(losses: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation between the runs at one learning rate, pooled over the learning rates."""
    freedom = sum(len(group) - 1 for group in losses)
    if freedom == 0:
        return None
    squares = sum((x - sum(group) / len(group)) ** 2 for group in losses for x in group)
    return math.sqrt(squares / freedom)


def draw_errors(cells: Sequence[Cell], num_samples: int, generator: np.random.Generator) -> Array:
    """Bootstrap draws of the errors of the optima, octaves: shape (num_samples, cells).

    Each draw flips the sign of every trunk's scatter at random (a wild bootstrap: a trunk keeps its branches together,
    so that the errors of its cells are correlated as they are) and fits the parabolas again; an optimum stays within
    the range of its runs. A cell whose noise is unknown gets normal errors of its standard deviation.

    Args:
        cells: used ones.
        num_samples: draws.
        generator: of random numbers.
    """
    trunks = sorted({run.trunk for cell in cells for run in cell.runs})
    signs = generator.choice(np.array([-1.0, 1.0]), size=(num_samples, len(trunks)))
    column = {trunk: i for i, trunk in enumerate(trunks)}
    errors = np.empty((num_samples, len(cells)))
    for i, cell in enumerate(cells):
        if cell.optimum_lr is None or cell.curvature is None or cell.optimum_sd_octaves is None:
            raise UserError(f"the cell {cell.name()} has no optimum: pass used cells only.")
        if not cell.noise_known:
            errors[:, i] = generator.normal(0.0, cell.optimum_sd_octaves, num_samples)
            continue
        z = np.array([run.log2_lr for run in cell.runs]) - math.log2(cell.optimum_lr)
        noise = signs[:, [column[run.trunk] for run in cell.runs]] * np.array([run.scatter for run in cell.runs])
        design = _design(z, [run.seed for run in cell.runs])
        p1, p2 = ((cell.curvature * z * z + noise) @ np.linalg.pinv(design).T)[:, -2:].T
        with np.errstate(divide="ignore", invalid="ignore"):
            best = np.where(p2 > 0, -p1 / (2 * p2), -np.sign(p1) * np.inf)
        errors[:, i] = np.clip(best, z.min(), z.max())
    return errors
