"""How well cells know the rate at a target, and what further runs are expected to add: an optimal design's arithmetic."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hf_power.fit.form import Form
from hf_power.fit.optima import REFERENCE
from hf_power.fit.result import WINDOW_OCTAVES, FittedCell
from hf_power.fit.squares import widening
from hf_power.schedule import Law, beta

# Ends of a 95 % interval, in standard deviations.
NORMAL = 1.959964


class Place(NamedTuple):
    """A cell of a sweep, or the target: its horizon and batch in tokens, and its width."""

    tokens: int
    tokens_per_step: int
    width: int


class Run(NamedTuple):
    """A run in a cell: its learning rate and its seed."""

    rate: float
    seed: int


# A plan asks for the same few cells thousands of times.
@lru_cache(maxsize=1 << 16)
def parabola_variance(runs: frozenset[Run], optimum: float) -> float:
    """Variance of log2 of a parabola's optimum, for losses with a noise of 1 nat and a curvature of 1 nat per octave**2.

    With z = log2(rate / optimum), the parabola ``p0(seed) + p1 z + p2 z**2`` has its optimum at ``-p1 / (2 p2)``, whose
    variance, by the delta method at p1 = 0, is ``var(p1) / 4``. Each seed's own p0 takes the means of z and z**2 out.
    Runs further than `WINDOW_OCTAVES` from the optimum are left out, as in `hf_power.fit.cells.fit_cells`. It is infinite
    where the runs cannot tell p1 from p2.
    """
    linear = both = square = 0.0
    for seed in sorted({run.seed for run in runs}):
        zs = [math.log2(run.rate / optimum) for run in runs if run.seed == seed]
        zs = [z for z in zs if abs(z) <= WINDOW_OCTAVES]
        mean, mean_square = sum(zs) / max(len(zs), 1), sum(z * z for z in zs) / max(len(zs), 1)
        for z in sorted(zs):
            linear += (z - mean) ** 2
            both += (z - mean) * (z * z - mean_square)
            square += (z * z - mean_square) ** 2
    determinant = linear * square - both * both
    return square / determinant / 4 if determinant > 1e-6 else math.inf


@dataclass(frozen=True)
class Known:
    """What the fitted cells tell of a target's rate, under one form of the law whose critical batch is held.

    ``log2 optimum of a cell = x . theta + e``, e of variance ``sd**2 + spread``, so that theta has the covariance
    ``C = (X' W X)**-1``, W = 1 / (sd**2 + spread), and a new cell at the target x0 the variance
    ``x0' C x0 + spread + mean(sd**2)``: the law's own and the scatter of cells around it, in which a fit finds the errors
    of the optima too.

    Attributes:
        law: the fitted law; form and cap: its form, and its critical batch in log2 with the growth.
        spread: variance of cells beyond their own errors, octaves**2.
        variances: of log2 of each used cell's optimum, octaves**2.
        noise: variance of a loss over the squared curvature, by horizon: that of the optimum of a parabola whose
            `parabola_variance` is 1.
    """

    law: Law
    form: Form
    cap: tuple[float, float]
    spread: float
    variances: Mapping[Place, float]
    noise: Mapping[int, float]

    def half_width(self, target: Place) -> float:
        """Half of the 95 % interval of a new cell's optimum at the target, octaves; infinite with too few cells."""
        freedom = len(self.variances) - self.form.num_free
        if freedom < 1:
            return math.inf
        own = np.array(list(self.variances.values()))
        design = self.design(list(self.variances))
        gram = design.T @ (design / (own + self.spread)[:, None])
        at = self.design([target])[0]
        variance = float(at @ np.linalg.solve(gram, at)) + self.spread + float(own.mean())
        return widening(freedom) * NORMAL * math.sqrt(variance)

    def optimum(self, place: Place) -> float:
        """The law's rate in a cell."""
        return self.law.lr(place.tokens, place.tokens_per_step, place.width)

    def expected(self, runs: Mapping[Place, frozenset[Run]], before: Mapping[Place, frozenset[Run]]) -> "Known":
        """What will be known when these cells have these runs, all of them, where they have those of `before` now.

        A cell that is used already gains as its runs do; another one has its optimum where the law puts it.
        """
        found = dict(self.variances)
        for place, inside in runs.items():
            optimum = self.optimum(place)
            variance = parabola_variance(inside, optimum)
            if place in self.variances:
                now = parabola_variance(before[place], optimum)
                found[place] *= min(1.0, variance / now) if math.isfinite(now) else 1.0
            elif math.isfinite(variance):
                found[place] = variance * self.noise[place.tokens]
        return replace(self, variances=found)

    def design(self, places: Sequence[Place]) -> np.ndarray:
        """A row of the law's design for each place, the tokens around their reference so that it is well conditioned."""
        tokens = np.log2([place.tokens for place in places]) - REFERENCE
        batch = np.minimum(
            np.log2([beta(place.tokens_per_step) for place in places]), self.cap[0] + self.cap[1] * tokens
        )
        columns = [np.ones_like(tokens), tokens]
        columns += [batch] if self.form.c is None else []
        columns += [np.log2([place.width for place in places])] if self.form.size else []
        return np.stack(columns, axis=1)


def noise_of(
    cells: Mapping[Place, FittedCell], runs: Mapping[Place, frozenset[Run]], horizons: Sequence[int]
) -> dict[int, float]:
    """`Known.noise` at each horizon: the mean of its own used cells, or of all where it has none."""
    every: dict[int, list[float]] = {}
    for place, cell in cells.items():
        unit = parabola_variance(runs[place], cell.optimum().lr)
        if math.isfinite(unit):
            every.setdefault(place.tokens, []).append(cell.optimum().sd_octaves ** 2 / unit)
    whole = [value for values in every.values() for value in values]
    return {tokens: float(np.mean(every.get(tokens, whole))) for tokens in horizons}
