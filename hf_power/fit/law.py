"""The fitted law: its parameters, their intervals, and predictions with intervals."""

import math
from dataclasses import dataclass

import numpy as np

from hf_power.fit.form import Form, best_caps, groups_of
from hf_power.fit.optima import Optima, Parameters
from hf_power.fit.result import Interval, Intervals
from hf_power.fit.squares import Array, draw_optima, interval, least_squares, shared_variance, widening
from hf_power.schedule import TOKENS_PER_BETA, Law


@dataclass(frozen=True)
class FittedLaw:
    """A law with its draws, one a row in the order of `Parameters`.

    freedom is cells less fitted parameters, r2 the share of the weighted variance of log2 lr that is explained, spread
    the variance of cells beyond their own errors (octaves**2); residuals are in octaves.
    """

    form: Form
    parameters: Parameters
    draws: Array
    freedom: int
    r2: float
    residuals: Array
    spread: float

    @property
    def law(self) -> Law:
        """The law in its own units."""
        return self.parameters.law(self.form.size)

    @property
    def intervals(self) -> Intervals:
        """95 % intervals of the law's numbers."""
        low, high = self.interval("log2_a")
        critical = None
        if math.isfinite(self.parameters.cap):
            first, last = (2**x * TOKENS_PER_BETA for x in self.interval("cap"))
            critical = first, last
        growth = self.interval("k") if self.form.critical == "growing" else None
        size = self.interval("s") if self.form.size else None
        return Intervals((2**low, 2**high), self.interval("b"), self.interval("c"), critical, growth, size)

    @property
    def scatter(self) -> float:
        """Standard deviation of the cells' optima around the law, octaves."""
        return math.sqrt(float(self.residuals @ self.residuals) / self.freedom)

    def log2_lr(self, log2_tokens: float, log2_beta: float, log2_size: float = 0.0) -> float:
        """log2 of the law's rate."""
        place = (np.asarray(x, dtype=np.float64) for x in (log2_tokens, log2_beta, log2_size))
        return float(self.parameters.log2_lr(*place))

    def log2_lr_draws(self, log2_tokens: float, log2_beta: float, log2_size: float = 0.0) -> Array:
        """The same for each draw."""
        place = (np.asarray(x, dtype=np.float64) for x in (log2_tokens, log2_beta, log2_size))
        return Parameters(*self.draws.T).log2_lr(*place)

    def predict(self, log2_tokens: float, log2_beta: float, log2_size: float = 0.0) -> Interval:
        """95 % interval of log2 of the optimum of a new cell: of the law and of the scatter of cells around it."""
        rate = self.log2_lr(log2_tokens, log2_beta, log2_size)
        variance = float(self.log2_lr_draws(log2_tokens, log2_beta, log2_size).var()) + self.scatter**2
        half = widening(self.freedom) * 1.959964 * math.sqrt(variance)
        return rate - half, rate + half

    def interval(self, name: str) -> Interval:
        """95 % interval of a parameter; of cap and k plain percentiles, for they come from a grid."""
        draws = self.draws[:, Parameters._fields.index(name)]
        if name in ("cap", "k"):
            low, high = np.percentile(draws, (2.5, 97.5))
            return float(low), float(high)
        return interval(getattr(self.parameters, name), draws, self.freedom)

    def samples(self) -> Array:
        """Draws in the order of `Parameters`; all but cap and k scaled so that their central 95 % are the intervals."""
        middle = np.array(self.parameters)
        found: Array = self.draws.copy()
        for i in (0, 1, 2, 5):
            found[:, i] = middle[i] + (self.draws[:, i] - self.draws[:, i].mean()) * widening(self.freedom)
        return found

    def contains(self, other: Law, log2_tokens: float, log2_beta: float, log2_size: float = 0.0) -> bool:
        """Whether a, b and c of another law lie in the joint 95 % region, Hotelling's ellipse of the draws.

        The scale enters as the rate at the centre of the cells (`log2_tokens`, `log2_beta`, `log2_size`), for a itself,
        the rate at one token, is all but a function of b. A held c must be equal.
        """
        from scipy.special import fdtri

        b, c, held = other.b, other.batch_exponent, self.form.c
        if held is not None and not math.isclose(c, held):
            return False
        free = [1] if held is not None else [1, 2]
        rate = math.log2(other.a) + b * log2_tokens + c * min(log2_beta, self.parameters.cap_at(log2_tokens))
        rate -= self.log2_lr(log2_tokens, log2_beta, log2_size)
        gap = np.array([rate, *(np.array([0.0, b, c])[free] - np.array(self.parameters[:3])[free])])
        draws = np.column_stack([self.log2_lr_draws(log2_tokens, log2_beta, log2_size), self.draws[:, free]])
        # Losses without noise have no spread, and a matrix of zeros cannot be solved.
        spread = np.cov(draws.T) + 1e-12 * np.eye(len(gap))
        distance = float(gap @ np.linalg.solve(spread, gap)) / len(gap)
        return distance <= float(fdtri(len(gap), self.freedom, 0.95))


def solve_law(optima: Optima, form: Form, generator: np.random.Generator) -> FittedLaw:
    """The law of a form with the best cap of its grid, refitted on each draw of the optima."""
    caps = form.caps(optima)
    first = least_squares(form.design(optima, (math.inf, 0.0))[0], optima.lr, optima.sd).weights
    found, _ = best_caps(form, optima, optima.lr[None], first[None], caps)
    found, _ = best_caps(form, optima, optima.lr[None], first[None], form.finer(optima, (found[0, 3], found[0, 4])))
    cap = float(found[0, 3]), float(found[0, 4])
    design, offset = form.design(optima, cap)
    best = least_squares(design, optima.lr - offset, optima.sd)
    groups = groups_of(optima)
    between = 2 + (form.size is not None) + (form.critical == "growing")
    shared = groups, shared_variance(best.residuals, groups, between)
    y_draws = offset + draw_optima(best, optima.lr - offset, optima.errors, generator, shared)
    # Each draw chooses its own cap, for which one is best is a part of what is not known.
    draws, _ = best_caps(form, optima, y_draws, best.weights[None], caps)
    mean = float(best.weights @ optima.lr / best.weights.sum())
    return FittedLaw(
        form=form,
        parameters=Parameters(*form.parameters(best.parameters, cap)[0].tolist()),
        draws=draws,
        freedom=len(optima.lr) - form.num_free,
        r2=1 - float(best.weights @ best.residuals**2) / float(best.weights @ (optima.lr - mean) ** 2),
        residuals=best.residuals,
        spread=best.spread,
    )
