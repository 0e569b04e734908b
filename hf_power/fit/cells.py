"""The cells of a sweep: a parabola through the losses of each, its optimum, and bootstrap draws of the optima."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hf_power.fit.result import FittedCell, Point, rates_near
from hf_power.fit.rows import CellKey, by_cell
from hf_power.fit.skew import Array, Curve, Fitted, Skew, design_of, fit_skew, levels_of, unwarped, warped
from hf_power.records.rows import Row

# An optimum that lies so far within the last learning rate is bracketed, though noise has made the last loss the lowest.
EDGE_OCTAVES = 0.5


def fit_cells(rows: Sequence[Row]) -> list[FittedCell]:
    """A curve ``loss = min_loss + curvature * w(log2 lr - log2 optimum)**2`` in each cell, by least squares.

    w(z) = z makes it a parabola, and ``w(z) = (2**(skew * z) - 1) / (skew * log 2)`` one whose flank towards high rates is
    the steeper one for a skew > 0. The cells of a schedule have one skew, see `hf_power.fit.skew.fit_skew`.

    It is fitted to all finished runs, weighted equally, with a min_loss for each seed (runs of one seed share their
    initialization and data, and a part of their luck), within two octaves of the learning rate with the lowest
    mean (and to its neighbours, where the spacing is wider): the loss rises faster towards divergence than towards small
    rates, and a far flank would bend the parabola away from the optimum. A learning rate at which a run diverged (also
    with a finite loss, see `hf_power.fit.rows.by_cell`) is not in the parabola. The optimum is used if the curvature is
    positive and the optimum lies within the learning rates of the parabola or the next diverged one above; where the
    lowest mean is at the end of all rates, EDGE_OCTAVES within. Neighbours of the lowest mean need not bracket it: on a
    fine grid noise alone decides which mean is lowest.

    The standard deviation is by the delta method, with the noise of a run pooled over the cells of the schedule, for the
    few runs of one cell tell little about their own scatter. Where no cell has more runs than the parabola has
    coefficients, it is that of a uniform distribution within half a step around the lowest mean.

    Failed rows are passed over; the cells are sorted by schedule, width, parameters, batch and horizon.
    """
    grouped = by_cell(rows)
    cells = []
    for schedule in sorted({key.schedule for key in grouped}):
        inside = {key: here for key, here in grouped.items() if key.schedule == schedule}
        measured = [_Parabola.of_rows(key, here, 0.0) for key, here in inside.items()]
        skew = fit_skew([each.curve for each in measured if each.curve and each.cell.used])
        if skew and skew.taken:
            measured = [_Parabola.of_rows(key, here, skew.taken) for key, here in inside.items()]
        used = [each for each in measured if each.cell.used]
        freedom = sum(each.freedom for each in used) - (skew is not None and skew.taken != 0)
        noise = sum(each.squares for each in used), freedom
        cells += [each.with_interval(*noise, skew) for each in measured]
    return cells


@dataclass(frozen=True)
class _Parabola:
    """A cell before its noise is known, in z = log2(lr) - log2(lowest lr): loss = p0 + p1 w(z) + p2 w(z)**2.

    half_step is log2 of the middles between the lowest mean and its neighbours, variance that of log2 of the optimum for
    a noise of 1 nat, squares the sum of the squared residuals (nats**2), which have `freedom` degrees of freedom.
    """

    cell: FittedCell
    half_step: tuple[float, float] = (0.0, 0.0)
    variance: float = 0.0
    squares: float = 0.0
    freedom: int = 0
    curve: Curve | None = None

    @classmethod
    def of_rows(cls, key: CellKey, rows: Sequence[Row], skew: float) -> "_Parabola":
        diverged = sorted({float(row.learning_rate) for row in rows if row.status == "diverged"})
        runs: dict[float, list[Row]] = defaultdict(list)
        # A learning rate at which one seed diverged is left out whole, because the seeds that finished were lucky.
        for row in rows:
            if row.loss is not None and row.learning_rate not in diverged:
                runs[float(row.learning_rate)].append(row)
        rates = sorted(runs)
        losses = [[run.loss or 0.0 for run in runs[lr]] for lr in rates]
        means = tuple(sum(each) / len(each) for each in losses)
        cell = FittedCell(
            schedule=key.schedule,
            width=key.width,
            parameters=key.parameters or None,
            tokens_per_step=key.tokens_per_step,
            tokens=key.tokens,
            learning_rates=tuple(rates),
            losses=means,
            num_seeds=tuple(map(len, losses)),
            loss_sd=_between_seeds(losses),
            diverged=tuple(diverged),
        )
        if len(rates) < 3:
            return cls(replace(cell, reason=f"only {len(rates)} learning rates finished, a parabola needs 3"))
        cell = replace(cell, min_loss=min(means))
        near = rates_near(rates, means.index(min(means)))
        return cls._fit(cell, [run for lr in near for run in runs[lr]], near, skew)

    @classmethod
    def _fit(cls, cell: FittedCell, inside: Sequence[Row], near: Sequence[float], skew: float) -> "_Parabola":
        rates, lowest = cell.learning_rates, cell.losses.index(min(cell.losses))
        center = math.log2(rates[lowest])
        if len(near) < 3:
            return cls(replace(cell, reason=_one_sided(cell) or "only 2 learning rates finished near the lowest loss"))
        curve = Curve.of(inside, center)
        fitted = Fitted.of(curve, skew)
        p0, p1, p2 = (float(fitted.solution[i]) for i in (0, -2, -1))
        pull = fitted.pull if skew else np.zeros(len(inside))
        rows = zip(inside, curve.octaves + center, fitted.scatter, pull, strict=True)
        points = tuple(Point(run.trunk, run.seed, *map(float, numbers)) for run, *numbers in rows)
        if p2 <= 0:
            reason = "the losses do not curve upwards: run more seeds or wider learning rates"
            return cls(replace(cell, points=points, curvature=p2, reason=_one_sided(cell) or reason))
        best = fitted.optimum(skew)
        curvature = p2 * 2 ** (2 * skew * best) if math.isfinite(best) else p2
        cell = replace(cell, points=points, curvature=curvature, skew=skew)
        low, high = _ends(cell, near)
        if not low <= center + best <= high:
            reason = "the parabola's optimum lies beyond the learning rates near the lowest loss: run more seeds"
            return cls(replace(cell, reason=_one_sided(cell) or reason))
        sides = [
            rates[max(lowest - 1, 0)],
            min([rate for rate in (*rates, *cell.diverged) if rate > rates[lowest]] or near),
        ]
        low, high = (math.log2(lr) - center for lr in sides)
        cell = replace(cell, optimum_lr=2 ** (center + best), min_loss=p0 - p1 * p1 / (4 * p2), used=True)
        if skew:
            cell = replace(cell, octaves_per_skew=Fitted.slope(curve, skew))
        half_step = center + low / 2, center + high / 2
        variance = _variance(p1, p2, fitted.inverse) / 2 ** (2 * skew * best)
        squares, freedom = float(fitted.rest @ fitted.rest), len(inside) - len(fitted.solution)
        return cls(cell, half_step, variance, squares, freedom, curve)

    def with_interval(self, squares: float, freedom: int, skew: Skew | None) -> FittedCell:
        """The cell with the optimum's interval, for noise of `squares` / `freedom` nats**2 and what is known of the skew."""
        if not self.cell.used or self.cell.optimum_lr is None:
            return self.cell
        if freedom == 0:
            # Nothing shows the noise of a run, so that all that is known is between which rates the optimum lies.
            low, high = self.half_step
            sd = (high - low) / math.sqrt(12)
        else:
            from scipy.special import stdtrit

            sd = math.sqrt(self.variance * squares / freedom)
            by_skew = self.cell.octaves_per_skew * skew.sd if skew and skew.taken else 0.0
            half = float(stdtrit(freedom, 0.975)) * math.hypot(sd, by_skew)
            low, high = math.log2(self.cell.optimum_lr) - half, math.log2(self.cell.optimum_lr) + half
        return replace(self.cell, optimum_interval=(2**low, 2**high), optimum_sd_octaves=sd, noise_known=freedom > 0)


def _one_sided(cell: FittedCell) -> str | None:
    """Why the lowest mean has no higher one on both sides; None if it has."""
    rates, lowest = cell.learning_rates, cell.losses.index(min(cell.losses))
    if lowest > 0 and (lowest < len(rates) - 1 or max(cell.diverged, default=0.0) > rates[lowest]):
        return None
    side, more = ("lowest", "lower") if lowest == 0 else ("highest", "higher")
    return f"the loss is lowest at the {side} learning rate, {rates[lowest]:.3g}: run {more} ones"


def _ends(cell: FittedCell, near: Sequence[float]) -> tuple[float, float]:
    """Between which log2 of the rate an optimum is used."""
    rates, lowest = cell.learning_rates, cell.losses.index(min(cell.losses))
    low, high = math.log2(near[0]), math.log2(near[-1])
    if above := [rate for rate in cell.diverged if rate > rates[-1]]:
        return low + EDGE_OCTAVES * (lowest == 0), max(high, math.log2(above[0])) if near[-1] == rates[-1] else high
    return low + EDGE_OCTAVES * (lowest == 0), high - EDGE_OCTAVES * (lowest == len(rates) - 1)


def _variance(p1: float, p2: float, inverse: Array) -> float:
    """Variance of -p1 / (2 p2) for noise of variance 1, by the delta method; p1 and p2 are the last coefficients."""
    slope = np.array([-1 / (2 * p2), p1 / (2 * p2 * p2)])
    return float(slope @ inverse[-2:, -2:] @ slope)


def _between_seeds(losses: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation between the runs at one learning rate, pooled over the learning rates."""
    freedom = sum(len(group) - 1 for group in losses)
    if freedom == 0:
        return None
    squares = sum((x - sum(group) / len(group)) ** 2 for group in losses for x in group)
    return math.sqrt(squares / freedom)


def draw_errors(cells: Sequence[FittedCell], num_samples: int, generator: np.random.Generator) -> Array:
    """Bootstrap draws of the errors of the optima of used cells, octaves: shape (num_samples, cells).

    Each draw flips the sign of every trunk's scatter at random (a wild bootstrap: a trunk keeps its branches together,
    so that the errors of its cells are correlated as they are) and fits the parabolas and, in linear order, their common
    skew again; an optimum stays within the range of its runs. A run that the parabola goes through, such as each of a cell of
    three, has no scatter to flip: it gets normal noise of the size that the others show. A cell whose noise is unknown gets
    normal errors of its standard deviation.
    """
    trunks = sorted({point.trunk for cell in cells for point in cell.points})
    signs = generator.choice(np.array([-1.0, 1.0]), size=(num_samples, len(trunks)))
    column = {trunk: i for i, trunk in enumerate(trunks)}
    luck, told = np.zeros(len(trunks)), 0.0
    for point in (point for cell in cells for point in cell.points):
        luck[column[point.trunk]] += point.pull * point.scatter
        told += point.pull**2
    skew_errors = signs @ luck / told if told else np.zeros(num_samples)
    shown = [point.scatter**2 for cell in cells for point in cell.points if point.scatter]
    noise_sd = math.sqrt(np.mean(shown)) if shown else 0.0
    errors = np.empty((num_samples, len(cells)))
    for i, cell in enumerate(cells):
        optimum = cell.optimum()
        if not cell.noise_known:
            errors[:, i] = generator.normal(0.0, optimum.sd_octaves, num_samples)
            continue
        z = np.array([point.log2_lr for point in cell.points]) - math.log2(optimum.lr)
        scatter = np.array([point.scatter for point in cell.points])
        noise = signs[:, [column[point.trunk] for point in cell.points]] * scatter
        noise[:, scatter == 0] = generator.normal(0.0, noise_sd, (num_samples, int(np.sum(scatter == 0))))
        w = warped(z, cell.skew)
        design = design_of(levels_of(z, [point.seed for point in cell.points]), w)
        p1, p2 = ((optimum.curvature * w * w + noise) @ np.linalg.pinv(design).T)[:, -2:].T
        # A draw whose parabola opens downwards puts the optimum at the end towards which it falls.
        with np.errstate(divide="ignore", invalid="ignore"):
            best = np.where(p2 > 0, -p1 / (2 * p2), -np.sign(p1) * np.inf)
        best = unwarped(np.clip(best, w.min(), w.max()), cell.skew) + skew_errors * cell.octaves_per_skew
        errors[:, i] = np.clip(best, z.min(), z.max())
    return errors
