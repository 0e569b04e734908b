"""Weighted least squares with a spread between the points, a bootstrap of it, and intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_power.fit.result import Interval

Array = NDArray[np.float64]

# Octaves. Without a floor a cell without noise would have infinite weight.
_SD_FLOOR = 1e-3
_NORMAL = 1.959964  # This is the 97.5 % quantile of the normal distribution.


class LeastSquares(NamedTuple):
    """parameters = solver @ y; weights 1 / (sd**2 + spread), spread the variance between cells beyond their sd."""

    parameters: Array
    solver: Array
    weights: Array
    spread: float
    residuals: Array


def least_squares(design: Array, y: Array, sd: Array) -> LeastSquares:
    """Weighted least squares; the spread is the moment estimate of DerSimonian and Laird (1986)."""
    own = np.maximum(sd, _SD_FLOOR) ** 2
    # The spread is estimated with the weights of the cells' own errors, and only then enters the weights itself.
    weights = 1 / own
    solver = solver_of(design, weights)
    excess = float(weights @ (y - design @ (solver @ y)) ** 2) - (len(y) - design.shape[1])
    scale = float(weights.sum() - np.trace(solver @ (weights[:, None] * design)))
    spread = max(0.0, excess / scale)
    weights = 1 / (own + spread)
    solver = solver_of(design, weights)
    return LeastSquares(solver @ y, solver, weights, spread, y - design @ (solver @ y))


def solver_of(design: Array, weights: Array) -> Array:
    """The matrix that makes least-squares parameters of y."""
    return np.asarray(np.linalg.solve(design.T @ (weights[:, None] * design), design.T * weights))


def draw_optima(
    fitted: LeastSquares,
    y: Array,
    errors: Array,
    generator: np.random.Generator,
    shared: tuple[Array, float] | None = None,
) -> Array:
    """Draws of y: the fitted line, the errors of the optima, and resampled departures of the cells from the line.

    With `shared`, the number of each cell's group and the variance of what its cells share (see `shared_variance`), a
    normal departure of each group is drawn too, and its variance taken from that of the cells.
    """
    unit = fitted.residuals / max(float(np.sqrt(np.mean(fitted.residuals**2))), 1e-12)
    groups, variance = shared or (np.zeros(len(y)), 0.0)
    departures = generator.choice(unit, size=errors.shape) * math.sqrt(max(fitted.spread - variance, 0.0))
    if variance:
        kinds, column = np.unique(groups, return_inverse=True)
        departures += generator.normal(0.0, math.sqrt(variance), (len(errors), len(kinds)))[:, column]
    return np.asarray(y - fitted.residuals + errors + departures)


def shared_variance(residuals: Array, groups: Array, num_free: int) -> float:
    """Variance of what the residuals of a group share, a moment estimate, for `num_free` parameters between groups.

    Cells of one size and horizon depart from the law together, so that they tell less of the tokens and the size than as
    many independent cells; with it left out, intervals beyond the measured horizons are too narrow.
    """
    kinds, column, counts = np.unique(groups, return_inverse=True, return_counts=True)
    freedom, within = len(kinds) - num_free, len(residuals) - len(kinds)
    if within < 1:
        return 0.0
    if freedom < 1:
        # The law takes up what each group is off, so that nothing tells it: all of the scatter may be shared.
        return float(np.mean(residuals**2))
    means = np.bincount(column, residuals) / counts
    noise = float(np.sum((residuals - means[column]) ** 2)) / within
    return max(0.0, float(means @ means) / freedom - noise * float(np.mean(1 / counts)))


def widening(freedom: int) -> float:
    """Student's 97.5 % quantile over the normal one: with few cells, plain percentiles of a bootstrap are too narrow."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) / _NORMAL


def interval(value: float, draws: Array, freedom: int) -> Interval:
    """95 %: the value and Student's quantile times the standard deviation of its draws."""
    half = widening(freedom) * _NORMAL * float(draws.std())
    return value - half, value + half


def slopes(
    columns: Sequence[Array], y: Array, sd: Array, errors: Array, generator: np.random.Generator
) -> list[tuple[float, float, float]] | None:
    """Value and 95 % interval of the slope of y on each column; None where the cells cannot tell them apart."""
    design = np.stack([np.ones_like(y), *(column - column.mean() for column in columns)], axis=1)
    freedom = len(y) - design.shape[1]
    if freedom < 1 or np.linalg.matrix_rank(design, tol=1e-6) < design.shape[1]:
        return None
    fitted = least_squares(design, y, sd)
    draws = draw_optima(fitted, y, errors, generator) @ fitted.solver.T
    values = fitted.parameters.tolist()
    return [(values[i], *interval(values[i], draws[:, i], freedom)) for i in range(1, len(values))]
