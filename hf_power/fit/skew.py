"""The skew of a U-curve: how much faster the loss rises towards high learning rates than towards low ones."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_power.records.rows import Row

Array = NDArray[np.float64]

# A skew is taken where its standard deviation is at most MAX_SD, which moves an optimum by some 0.15 octaves, or where it
# is so many standard deviations off 0. Its size alone decides only where it is poorly known: a test would leave it out
# just where it is too small for the test and large enough to put every optimum off.
MAX_SD = 0.15
MIN_RATIO = 3.5
# With fewer cells or residuals to spare their scatter does not tell how well the skew is known.
MIN_FREEDOM = 8
MIN_CELLS = 4
LARGEST = 1.0
_STEP = 1e-4
_NUM_GRID = 10
_MAX_ROUNDS = 50
_CHI2 = 3.84  # This is the 95 % quantile of chi-squared with one degree of freedom.


def warped(octaves: float | Array, skew: float) -> Array:
    """``(2**(skew * z) - 1) / (skew * log 2)``, an octave near 0; z itself for a skew of 0.

    A parabola in it falls as one in the rate to the power of `skew`, and it is one wherever z has its origin.
    """
    rate = skew * math.log(2)
    return np.asarray(np.expm1(rate * octaves) / rate if abs(rate) > 1e-9 else octaves, dtype=np.float64)


def unwarped(values: float | Array, skew: float) -> Array:
    """The octaves of warped ones; infinitely far down (up, for a negative skew) where there are none."""
    rate = skew * math.log(2)
    if abs(rate) <= 1e-9:
        return np.asarray(values, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log1p(np.maximum(rate * values, -1.0)) / rate, dtype=np.float64)


def levels_of(z: Array, seeds: Sequence[int]) -> Array:
    """Columns 1 and the seeds' offsets (that sum to 0; none where they cannot be told from the learning rate)."""
    level = np.ones((len(z), 1))
    kinds = sorted(set(seeds))
    which = np.array([kinds.index(seed) for seed in seeds])
    levels = np.concatenate([level, np.eye(len(kinds))[which][:, 1:] - (which == 0)[:, None]], axis=1)
    # With one learning rate for each seed, an offset would explain what the parabola is to explain.
    return levels if np.linalg.matrix_rank(design_of(levels, z)) == levels.shape[1] + 2 else level


def design_of(levels: Array, w: Array) -> Array:
    """Columns of the levels, w, w**2."""
    return np.column_stack([levels, w, w * w])


class Curve(NamedTuple):
    """The runs of a cell: octaves of their rates, columns of their levels, losses in nats, and trunks."""

    octaves: Array
    levels: Array
    loss: Array
    trunks: list[str]

    @classmethod
    def of(cls, runs: Sequence[Row], center: float) -> "Curve":
        """Of finished runs, the octaves beyond `center`."""
        octaves = np.log2([run.learning_rate for run in runs]) - center
        levels = levels_of(octaves, [run.seed for run in runs])
        loss = np.array([run.loss for run in runs], dtype=np.float64)
        return cls(octaves, levels, loss, [run.trunk for run in runs])


class Fitted(NamedTuple):
    """A curve's parabola at some skew, in nats.

    pull is what a unit of skew does to the fitted losses beyond what the parabola makes up for, rest what the parabola
    leaves, spare 1 - leverage.
    """

    solution: Array
    inverse: Array
    pull: Array
    rest: Array
    spare: Array

    @classmethod
    def of(cls, curve: Curve, skew: float) -> "Fitted":
        """Least squares, weighted equally."""
        w = warped(curve.octaves, skew)
        design = design_of(curve.levels, w)
        inverse = np.asarray(np.linalg.inv(design.T @ design), dtype=np.float64)
        solution = inverse @ (design.T @ curve.loss)
        moved = (warped(curve.octaves, skew + _STEP) - warped(curve.octaves, skew - _STEP)) / (2 * _STEP)
        change = (solution[-2] + 2 * solution[-1] * w) * moved
        pull = change - design @ (inverse @ (design.T @ change))
        spare = 1.0 - np.einsum("ij,jk,ik->i", design, inverse, design)
        return cls(solution, inverse, pull, curve.loss - design @ solution, spare)

    @classmethod
    def slope(cls, curve: Curve, skew: float) -> float:
        """By how many octaves the optimum moves for a unit of skew."""
        above, below = (cls.of(curve, skew + step).optimum(skew + step) for step in (_STEP, -_STEP))
        return (above - below) / (2 * _STEP)

    def optimum(self, skew: float) -> float:
        """Octaves of the lowest point of a parabola that opens upwards; may be infinite."""
        return float(unwarped(-self.solution[-2] / (2 * self.solution[-1]), skew))

    @property
    def scatter(self) -> Array:
        """The residuals over sqrt(1 - leverage), whose mean square is the noise's variance (HC2), nats."""
        # A point with a leverage of 1 is one that the parabola must go through: it tells nothing about the noise.
        return np.where(self.spare > 1e-9, self.rest / np.sqrt(np.maximum(self.spare, 1e-9)), 0.0)


class Skew(NamedTuple):
    """What the curves of a schedule say of their common skew; `taken` is 0 where they say too little."""

    value: float
    sd: float
    taken: float


def fit_skew(curves: Sequence[Curve]) -> Skew | None:
    """The skew with the least squared residuals of all curves, by Gauss-Newton, and its standard deviation.

    That is of the sandwich form with a trunk's runs, which share their luck, as one. None where too few runs tell it.
    """
    freedom = sum(len(curve.loss) - curve.levels.shape[1] - 2 for curve in curves)
    if len(curves) < MIN_CELLS or freedom < MIN_FREEDOM:
        return None
    grid = np.linspace(-LARGEST, LARGEST, 2 * _NUM_GRID + 1)
    squares = np.array([_squares([Fitted.of(curve, value) for curve in curves]) for value in grid])
    skew = float(grid[squares.argmin()])
    for _ in range(_MAX_ROUNDS):
        fits = [Fitted.of(curve, skew) for curve in curves]
        told = sum(float(fit.pull @ fit.pull) for fit in fits)
        step = sum(float(fit.pull @ fit.rest) for fit in fits) / told if told else math.inf
        if abs(step) < 1e-8:
            break
        skew += step
        if abs(skew) >= LARGEST:
            return None
    luck: dict[str, float] = {}
    for curve, fit in zip(curves, fits, strict=True):
        for trunk, value in zip(curve.trunks, fit.pull * fit.scatter, strict=True):
            luck[trunk] = luck.get(trunk, 0.0) + float(value)
    variance = sum(value * value for value in luck.values()) / told**2
    noise = _squares(fits) / (freedom - 1)
    # Losses of much noise have several skews that fit as well, of which the curvature at the best one knows nothing.
    limit = _squares(fits) + _CHI2 * max(noise, variance * told) + 1e-18
    as_good = float(np.abs(grid[squares <= limit] - skew).max(initial=0.0))
    sd = max(math.sqrt(variance), as_good / math.sqrt(_CHI2))
    return Skew(skew, sd, skew if sd <= max(MAX_SD, abs(skew) / MIN_RATIO) else 0.0)


def _squares(fits: Sequence[Fitted]) -> float:
    return sum(float(fit.rest @ fit.rest) for fit in fits)
