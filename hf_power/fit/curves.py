"""From the loss curves of a few runs to that of another learning rate schedule: the multi-power law."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_power.fit.curve import Curve
from hf_power.fit.squares import Array
from hf_power.records.errors import UserError

# Points of a curve that the fit looks at, and intervals over which a falling rate is summed: more change nothing but time.
_POINTS, _DROPS = 120, 250
# Priors of the logarithms: means about what Luo et al. found for their models, and standard deviations that are wide for
# scales and narrow for exponents, which one or two decays can hardly tell.
_NAMES = (
    *("irreducible", "scale", "drop_scale", "drop_speed", "exponent", "drop_exponent", "rate_exponent"),
    "progress_exponent",
)
_PRIOR = (None, None, math.log(330), math.log(0.6), math.log(0.48), math.log(5.0), math.log(0.3), math.log(0.57))
_PRIOR_SD = (0.3, 1.0, 0.3, 0.3, 0.4, 0.4, 0.15, 0.1)
# The losses of a curve are not independent of each other; so many of neighbouring points count as one.
_ALIKE_POINTS = 10
# Where Huber's loss turns linear, in shares of the loss.
_HUBER = 0.001
# The mean absolute error of the law at unseen schedules, in shares of the loss, by its authors: .0038 to .0048 nats.
_MISFIT = 0.0015
QUANTILE = 1.959964


@dataclass(frozen=True)
class CurveLaw:
    """The multi-power law of Luo et al., arXiv:2503.12811, eq. 1 to 3, of one model, batch and data set.

    ::

        L(t) = irreducible + scale * S(t)**-exponent - drop_scale * sum_k (eta_(k-1) - eta_k) * G(eta_k**-rate_exponent * S_k(t))
        G(x) = 1 - (1 + drop_speed * x)**-drop_exponent

    S(t) is the sum of the learning rates up to step t, S_k(t) that from step k on. The first two terms are the loss at a
    constant rate, the last one what falls off as the rate does. Their letters are L0, A, alpha, B, gamma, C and beta.

    Attributes:
        covariance: of the logarithms of the seven numbers.
        scatter: root mean square of the residuals of log loss.
        left_out: curve -> error of its last loss, nats, in a fit of the others; empty with fewer than three curves.
        longest: the largest sum of rates that was seen.
    """

    irreducible: float
    scale: float
    drop_scale: float
    drop_speed: float
    exponent: float
    drop_exponent: float
    rate_exponent: float
    progress_exponent: float
    covariance: Array
    scatter: float
    left_out: dict[str, float]
    longest: float

    def losses(self, curve: Curve) -> Array:
        """The loss at each point of a curve."""
        return _Sums.of(curve).losses(self.numbers())[0]

    def final(self, curve: Curve) -> tuple[float, float, float]:
        """The loss at the end of a curve, with its 95 % interval: of the numbers, and of the law's misfit elsewhere."""
        losses, slopes = _Sums.of(curve, points=_POINTS).losses(self.numbers())
        loss, slope = float(losses[-1]), slopes[-1] / losses[-1]
        misfit = max([_MISFIT * loss, *map(abs, self.left_out.values())])
        # Beyond the longest run that was seen the law's first term alone speaks, and is as wrong as it was over an octave.
        beyond = max(0.0, math.log2(float(curve.sums()[-1]) / self.longest))
        half = QUANTILE * math.hypot(loss * math.sqrt(max(float(slope @ self.covariance @ slope), 0.0)), misfit)
        half *= 1 + beyond / 2
        return loss, loss - half, loss + half

    def numbers(self) -> Array:
        """The seven numbers in the order of the fit."""
        return np.array([getattr(self, name) for name in _NAMES], dtype=np.float64)


@dataclass(frozen=True)
class _Sums:
    """A curve as the law sees it: sums of rates at its points, and the drops of the rate with the sums before them."""

    curve: Curve
    at: NDArray[np.intp]
    sums: Array
    drops: Array
    rates: Array
    sums_before: Array

    @classmethod
    def of(cls, curve: Curve, points: int | None = None, drops: int | None = None) -> "_Sums":
        sums = curve.sums()
        falls = np.concatenate([[0.0], -np.diff(curve.rates)])
        rates, before = curve.rates, np.concatenate([sums[:1], sums[:-1]])
        if drops is not None and len(falls) > drops:
            # Neighbouring small drops act as one at their middle; large ones, of a rate in steps, stay where they are.
            big = np.flatnonzero(falls > 0.05 * curve.rates.max())
            small = falls.copy()
            small[big] = 0.0
            groups = np.array_split(np.arange(len(falls)), drops)
            middle = np.array([group[len(group) // 2] for group in groups])
            falls = np.concatenate([[small[group].sum() for group in groups], falls[big]])
            rates, before = (np.concatenate([values[middle], values[big]]) for values in (rates, before))
        # A rate of exactly 0 at the last point has had no step yet.
        used = (falls != 0) & (rates > 0)
        at = _spread(len(sums), points)
        return cls(curve, at, sums[at], falls[used], rates[used], before[used])

    def losses(self, numbers: Array) -> tuple[Array, Array]:
        """The losses, and their slopes with the logarithms of the numbers."""
        floor, scale, drop, speed, alpha, beta, gamma, progress = numbers
        whole, by_progress = self.curve.progress(progress)
        done = whole[self.at]
        base = scale * done**-alpha
        x = np.maximum(self.sums[:, None] - self.sums_before, 0.0) * self.rates**-gamma
        grown = 1 + speed * x
        left = grown**-beta
        fallen = drop * ((1 - left) @ self.drops)
        by_x = self.drops * left * beta * speed * x / grown
        slopes = [
            np.full_like(base, floor),
            base,
            -fallen,
            -drop * by_x.sum(axis=1),
            -base * alpha * np.log(done),
            -drop * beta * ((left * np.log(grown)) @ self.drops),
            drop * gamma * (by_x @ np.log(self.rates)),
            -base * alpha * by_progress[self.at] / done,
        ]
        return floor + base - fallen, np.stack(slopes, axis=1)


def _spread(count: int, points: int | None) -> NDArray[np.intp]:
    """Numbers of so many points, evenly over a curve and with its last one."""
    wanted = count if points is None else min(points, count)
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.intp))


def fit_curves(curves: Sequence[Curve]) -> CurveLaw:
    """The multi-power law of the loss curves of runs that differ in their schedule alone.

    Log losses are fitted with Huber's loss under wide priors, from several starts. The interval takes the error of the
    last losses of curves that were left out one at a time.

    Args:
        curves: of one model, batch and data set, with warmup left out; at least one has a falling rate.

    Raises:
        UserError: no curve whose rate falls, or too few points.
    """
    if not any(curve.rates.min() < 0.7 * curve.rates.max() for curve in curves):
        raise UserError(
            "no curve has a rate that falls by a third or more, so nothing tells what a decay gives: add the curve of a run "
            "with a decay."
        )
    numbers, covariance, scatter = _fitted(curves)
    left_out: dict[str, float] = {}
    for curve in curves if len(curves) >= 3 else ():
        others = [other for other in curves if other is not curve]
        if any(other.rates.min() < 0.7 * other.rates.max() for other in others):
            losses, _ = _Sums.of(curve).losses(_fitted(others, numbers)[0])
            left_out[curve.name] = float(losses[-1] - last_loss(curve))
    longest = max(float(curve.sums()[-1]) for curve in curves)
    values = dict(zip(_NAMES, numbers.tolist(), strict=True))
    return CurveLaw(**values, covariance=covariance, scatter=scatter, left_out=left_out, longest=longest)


def last_loss(curve: Curve) -> float:
    """The last loss, of a line through the last points so that noise matters less."""
    few = min(len(curve.losses), max(3, len(curve.losses) // 50))
    steps = curve.steps[-few:] - curve.steps[-1]
    if np.ptp(curve.rates[-few:]) > 0.5 * curve.rates[-1]:
        return float(curve.losses[-1])
    return float(np.polyfit(steps, curve.losses[-few:], 1)[1])


def _fitted(curves: Sequence[Curve], start: Array | None = None) -> tuple[Array, Array, float]:
    """The numbers, the covariance of their logarithms, and the scatter."""
    from scipy.optimize import least_squares

    parts = [_Sums.of(curve, _POINTS, _DROPS) for curve in curves]
    y = np.concatenate([np.log(curve.losses[_spread(len(curve.losses), _POINTS)]) for curve in curves])
    lowest = float(np.exp(y.min()))
    first = float(np.exp(y.max())) - 0.85 * lowest
    early = min(float(part.sums[0]) for part in parts)
    sd = np.array(_PRIOR_SD)

    def cost(squares: Array) -> Array:
        """Huber's for the losses of which _ALIKE_POINTS count as one, and squares for the priors."""
        values = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
        far = squares > 1
        far[len(y) :] = False
        root = np.sqrt(squares[far])
        values[:, far] = 2 * root - 1, 1 / root, -0.5 / root**3
        values[:, : len(y)] /= _ALIKE_POINTS
        return values

    def residuals(x: Array) -> Array:
        losses = np.concatenate([part.losses(np.exp(x))[0] for part in parts])
        return np.concatenate([(np.log(np.maximum(losses, 1e-3)) - y) / _HUBER, (x - mean) / sd])

    def slopes(x: Array) -> Array:
        found = [part.losses(np.exp(x)) for part in parts]
        columns = np.concatenate([slope / np.maximum(loss, 1e-3)[:, None] for loss, slope in found])
        return np.concatenate([columns / _HUBER, np.diag(1 / sd)])

    best = None
    for exponent in (0.3, 0.6) if start is None else (None,):
        alpha = exponent or 0.48
        mean = np.array([0.0 if value is None else value for value in _PRIOR])
        mean[:2] = math.log(0.85 * lowest), math.log(max(first, 0.1 * lowest) * early**alpha)
        begin = mean.copy() if start is None else np.log(start)
        if exponent:
            begin[4] = math.log(exponent)
        # The scale follows the exponent, so that its prior is free.
        found = least_squares(residuals, begin, slopes, loss=cost, max_nfev=200, bounds=(mean - 5 * sd, mean + 5 * sd))
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    rest = residuals(best.x)[: len(y)] * _HUBER
    scatter = float(np.sqrt(np.mean(rest**2)))
    jacobian = slopes(best.x)
    weight = (_HUBER / max(scatter, 1e-5)) ** 2 / _ALIKE_POINTS
    precision = weight * jacobian[: len(y)].T @ jacobian[: len(y)] + np.diag(1 / sd**2)
    return np.exp(best.x), np.linalg.inv(precision), scatter
