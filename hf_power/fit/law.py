"""The statistics of the law: weighted least squares in log2, the critical batch, and a bootstrap of all of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hf_power.fit.cells import Array, draw_errors
from hf_power.fit.result import FittedCell, Interval, Intervals
from hf_power.schedule import TOKENS_PER_BETA, Law, beta

# Octaves. Without a floor a cell without noise would have infinite weight.
_SD_FLOOR = 1e-3
_NORMAL = 1.959964  # This is the 97.5 % quantile of the normal distribution.
_CAPS_PER_OCTAVE = 8


class Optima(NamedTuple):
    """Used cells in log2, one entry a cell; `sd` is in octaves, `errors` has a bootstrap draw a row."""

    tokens: Array
    beta: Array
    width: Array
    lr: Array
    sd: Array
    errors: Array

    @classmethod
    def of(cls, cells: Sequence[FittedCell], num_samples: int, generator: np.random.Generator) -> "Optima":
        """The optima of used cells."""
        return cls(
            tokens=np.log2([cell.tokens for cell in cells]),
            beta=np.log2([beta(cell.tokens_per_step) for cell in cells]),
            width=np.log2([max(cell.width, 1) for cell in cells]),
            lr=np.log2([cell.optimum().lr for cell in cells]),
            sd=np.array([cell.optimum().sd_octaves for cell in cells], dtype=np.float64),
            errors=draw_errors(cells, num_samples, generator),
        )


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
    solver = _solver(design, weights)
    excess = float(weights @ (y - design @ (solver @ y)) ** 2) - (len(y) - design.shape[1])
    scale = float(weights.sum() - np.trace(solver @ (weights[:, None] * design)))
    spread = max(0.0, excess / scale)
    weights = 1 / (own + spread)
    solver = _solver(design, weights)
    return LeastSquares(solver @ y, solver, weights, spread, y - design @ (solver @ y))


def _solver(design: Array, weights: Array) -> Array:
    return np.asarray(np.linalg.solve(design.T @ (weights[:, None] * design), design.T * weights))


def draw_optima(fitted: LeastSquares, y: Array, errors: Array, generator: np.random.Generator) -> Array:
    """Draws of y: the fitted line, the errors of the optima, and resampled departures of the cells from the line."""
    unit = fitted.residuals / max(float(np.sqrt(np.mean(fitted.residuals**2))), 1e-12)
    departures = generator.choice(unit, size=errors.shape) * math.sqrt(fitted.spread)
    return np.asarray(y - fitted.residuals + errors + departures)


def widening(freedom: int) -> float:
    """Student's 97.5 % quantile over the normal one: with few cells, plain percentiles of a bootstrap are too narrow."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) / _NORMAL


def interval(value: float, draws: Array, freedom: int) -> Interval:
    """95 %: the value and Student's quantile times the standard deviation of its draws."""
    half = widening(freedom) * _NORMAL * float(draws.std())
    return value - half, value + half


@dataclass(frozen=True)
class FittedLaw:
    """log2 lr = log2_a + b log2 T + c min(log2 beta, cap), with its draws, one a row; an infinite cap is none.

    c_held says whether c was given and not fitted, freedom is cells less fitted parameters, r2 the share of the weighted
    variance of log2 lr that is explained; residuals are in octaves.
    """

    parameters: tuple[float, float, float, float]
    draws: Array
    c_held: bool
    freedom: int
    r2: float
    residuals: Array

    @property
    def law(self) -> Law:
        """The law in its own units."""
        log2_a, b, c, cap = self.parameters
        return Law(2**log2_a, b, c, 2**cap * TOKENS_PER_BETA if math.isfinite(cap) else None)

    @property
    def intervals(self) -> Intervals:
        """95 % intervals of the law's numbers."""
        low, high = self.interval(0)
        critical = None
        if math.isfinite(self.parameters[3]):
            first, last = (2**x * TOKENS_PER_BETA for x in self.interval(3))
            critical = first, last
        return Intervals((2**low, 2**high), self.interval(1), self.interval(2), critical)

    def log2_lr(self, log2_tokens: float, log2_beta: float) -> float:
        """log2 of the law's rate."""
        log2_a, b, c, cap = self.parameters
        return log2_a + b * log2_tokens + c * min(log2_beta, cap)

    def log2_lr_draws(self, log2_tokens: float, log2_beta: float) -> Array:
        """The same for each draw."""
        d = self.draws
        return np.asarray(d[:, 0] + d[:, 1] * log2_tokens + d[:, 2] * np.minimum(log2_beta, d[:, 3]))

    def interval(self, index: int) -> Interval:
        """95 % interval of parameter `index`; of the cap plain percentiles, for it comes from a grid."""
        if index == 3:
            low, high = np.percentile(self.draws[:, 3], (2.5, 97.5))
            return float(low), float(high)
        return interval(self.parameters[index], self.draws[:, index], self.freedom)

    def samples(self) -> Array:
        """Draws of (log2_a, b, c), scaled around the estimate so that their central 95 % are the intervals."""
        d = self.draws[:, :3]
        return np.asarray(np.array(self.parameters[:3]) + (d - d.mean(axis=0)) * widening(self.freedom))

    def contains(self, other: Law, log2_tokens: float, log2_beta: float) -> bool:
        """Whether a, b and c of another law lie in the joint 95 % region, Hotelling's ellipse of the draws.

        The scale enters as the rate at the centre of the cells (`log2_tokens`, `log2_beta`), for a itself, the rate at
        one token, is all but a function of b. A held c must be equal.
        """
        from scipy.special import fdtri

        b, c = other.b, other.batch_exponent
        if self.c_held and not math.isclose(c, self.parameters[2]):
            return False
        free = [1] if self.c_held else [1, 2]
        rate = math.log2(other.a) + b * log2_tokens + c * min(log2_beta, self.parameters[3])
        rate -= self.log2_lr(log2_tokens, log2_beta)
        gap = np.array([rate, *(np.array([0.0, b, c])[free] - np.array(self.parameters)[free])])
        draws = np.column_stack([self.log2_lr_draws(log2_tokens, log2_beta), self.draws[:, free]])
        # Losses without noise have no spread, and a matrix of zeros cannot be solved.
        spread = np.cov(draws.T) + 1e-12 * np.eye(len(gap))
        distance = float(gap @ np.linalg.solve(spread, gap)) / len(gap)
        return distance <= float(fdtri(len(gap), self.freedom, 0.95))


def _design(optima: Optima, c: float | None, cap: float) -> tuple[Array, Array]:
    """Design and offset of log2 lr: 1, log2 T and, where c is free, min(log2 beta, cap)."""
    capped = np.minimum(optima.beta, cap)
    columns = [np.ones_like(capped), optima.tokens]
    if c is None:
        return np.stack([*columns, capped], axis=1), np.zeros_like(capped)
    return np.stack(columns, axis=1), c * capped


def solve_law(
    optima: Optima, c: float | None, caps: Sequence[float], num_free: int, generator: np.random.Generator
) -> FittedLaw:
    """The law with the best of the caps (log2 beta; an infinite one is none), refitted on each draw of the optima."""
    cap = caps[int(np.argmin([squares_at(optima, c, cap) for cap in caps]))]
    design, offset = _design(optima, c, cap)
    best = least_squares(design, optima.lr - offset, optima.sd)
    y_draws = offset + draw_optima(best, optima.lr - offset, optima.errors, generator)
    # Each draw chooses its own cap, for which one is best is a part of what is not known.
    found = np.full(len(y_draws), np.inf)
    draws = np.empty((len(y_draws), 4))
    for each in caps:
        design, shift = _design(optima, c, each)
        y = y_draws - shift
        parameters = y @ _solver(design, best.weights).T
        squares = (y - parameters @ design.T) ** 2 @ best.weights
        better = squares < found
        found[better] = squares[better]
        draws[better] = np.column_stack(
            [parameters[:, :2], parameters[:, 2] if c is None else np.full(len(y), c), np.full(len(y), each)]
        )[better]
    log2_a, b, *rest = best.parameters.tolist()
    mean = float(best.weights @ optima.lr / best.weights.sum())
    return FittedLaw(
        parameters=(log2_a, b, rest[0] if c is None else c, cap),
        draws=draws,
        c_held=c is not None,
        freedom=len(optima.lr) - num_free,
        r2=1 - float(best.weights @ best.residuals**2) / float(best.weights @ (optima.lr - mean) ** 2),
        residuals=best.residuals,
    )


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


def squares_at(optima: Optima, c: float | None, cap: float) -> float:
    """Weighted sum of squared residuals with a cap, by the weights of the fit without one."""
    design, offset = _design(optima, c, math.inf)
    weights = least_squares(design, optima.lr - offset, optima.sd).weights
    design, offset = _design(optima, c, cap)
    y = optima.lr - offset
    return float(weights @ (y - design @ (_solver(design, weights) @ y)) ** 2)


def supported_caps(optima: Optima, c: float | None) -> tuple[list[float], str | None]:
    """The grid of caps if the data ask for one, else only "none" and a sentence that says why.

    The grid is of log2 beta, from the second-smallest batch, below which c would have no data, to the largest. A cap is
    supported if it lies within the grid and an F-test of it against none rejects at 5 %.
    """
    from scipy.special import fdtri

    batches = np.unique(optima.beta)
    num = math.ceil((batches[-1] - batches[1]) * _CAPS_PER_OCTAVE) + 1
    caps = [float(x) for x in np.linspace(batches[1], batches[-1], num)]
    squares = [squares_at(optima, c, cap) for cap in caps]
    index = int(np.argmin(squares))
    freedom = len(optima.lr) - (4 if c is None else 3)
    # The last cap is the largest batch, which is no cap at all.
    improvement = (squares[-1] - squares[index]) * freedom
    noise = squares[index] + 1e-9  # Without noise in the losses only rounding would be left.
    if improvement <= float(fdtri(1, freedom, 0.95)) * noise or index == len(caps) - 1:
        return [math.inf], "no critical batch: the rate rises up to the largest batch, as far as the data can tell"
    if index == 0:
        tokens = round(2 ** caps[0] * TOKENS_PER_BETA)
        return [math.inf], (
            f"no critical batch: the best one is not above the second-smallest batch, {tokens:,} tokens per step, run "
            "smaller batches"
        )
    return caps, None
