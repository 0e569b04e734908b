"""The loss at the end of a run, as a recipe has it: a value with a form, its interval, and what it cannot say."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_power.records.errors import UserError
from hf_power.records.schema import Finite, PositiveNumber
from hf_power.records.summary import Summarized, Summary

Array = NDArray[np.float64]
# Places that differ by less than this factor are one, to a forecast without the term that would tell them apart.
SAME_PLACE = 1.15
# A batch on the way to the critical one costs little; there the tokens that reach a loss have doubled.
CRITICAL_OVERHEAD = 2.0
_BATCHES = 241
QUANTILE = 1.959964


class LossInterval(NamedTuple):
    """A forecast loss and the ends of its 95 % interval, nats per token."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Place:
    """Where the terms of a form equal their coefficients: the geometric mean of the cells."""

    size: PositiveNumber
    tokens: PositiveNumber
    steps: PositiveNumber
    tokens_per_step: PositiveNumber


@dataclass(frozen=True)
class LossForm:
    """A loss as a sum of terms, each a power of a quantity over that of `Place`; a coefficient of 0 is no term.

    ::

        L = irreducible + size_term * N**-size_exponent + token_term * N**token_size_exponent * T**-token_exponent
            + step_term * S**-step_exponent + batch_term * B**-batch_exponent

    N is the size, T the tokens, B the tokens per step and S = T / B the steps. The first three terms are those of
    Hoffmann et al., arXiv:2203.15556, eq. 2, with a data term that may depend on the size (as in arXiv:2506.10972). The
    step term is what a large batch costs (as in Kaplan et al., arXiv:2001.08361, eq. 1.6), the batch term the noise that a
    small one leaves at the end.

    Attributes:
        covariance: of `VARYING`, the logarithms of the numbers, but token_size_exponent itself.
        held_out_rms: root of the mean squared error of log loss at left-out cells; None where none could be left out.
    """

    irreducible: Finite
    size_term: Finite
    size_exponent: Finite
    token_term: Finite
    token_exponent: Finite
    token_size_exponent: Finite
    step_term: Finite
    step_exponent: Finite
    batch_term: Finite
    batch_exponent: Finite
    covariance: list[list[Finite]]
    held_out_rms: Finite | None = None

    def log_loss(self, places: Array) -> Array:
        """The logarithm of the loss at rows of log (N, T, S, B) over those of the centre."""
        terms, _, _ = form_terms(self.numbers(), places)
        return np.asarray(np.log(terms.sum(axis=1)))

    def sd(self, places: Array) -> Array:
        """The standard deviation of log loss that comes from not knowing the numbers, by the delta method."""
        _, slopes, _ = form_terms(self.numbers(), places)
        return np.asarray(np.sqrt(np.maximum(((slopes @ np.array(self.covariance)) * slopes).sum(axis=1), 0.0)))

    def numbers(self) -> Array:
        """The ten numbers in the order of VARYING."""
        return np.array([getattr(self, name) for name in VARYING], dtype=np.float64)


# The numbers of a form: five coefficients, four exponents, and the size's exponent in the data term.
VARYING = (
    *("irreducible", "size_term", "token_term", "step_term", "batch_term"),
    *("size_exponent", "token_exponent", "step_exponent", "batch_exponent", "token_size_exponent"),
)


def form_terms(numbers: Array, places: Array) -> tuple[Array, Array, Array]:
    """The five terms at rows of log (N, T, S, B), the slopes of log loss with the logs of the numbers, and the penalty.

    The slope with the last number is with itself. The penalty is the share of step and batch term in the loss.
    """
    n, t, s, b = places.T
    zero = np.zeros_like(n)
    exponents = -numbers[5:9, None] * np.stack([n, t, s, b])
    exponents[1] += numbers[9] * n
    terms = numbers[:5, None] * np.exp(np.concatenate([zero[None], exponents]))
    loss = terms.sum(axis=0)
    by_exponent = -terms[1:] * numbers[5:9, None] * np.stack([n, t, s, b])
    slopes = np.concatenate([terms, by_exponent, (terms[2] * n)[None]]) / loss
    return terms.T, slopes.T, (terms[3] + terms[4]) / loss


@dataclass(frozen=True, repr=False)
class Forecast(Summarized):
    """The best loss over size, tokens and batch, as the cells of a sweep tell it.

    Attributes:
        schedule: whose losses these are, with warmup, tail and data as in the sweep.
        size: what N counts, "parameters" or "width"; None where the rows tell neither.
        center: of the cells.
        forms: the one that is taken first, then any other that left-out cells do not tell from it; the interval spans
            all of them.
        size_sd, cell_sd: standard deviations of log loss, of a model's own departure and of a cell's.
        widening: how much wider than by these the errors at left-out cells were, at least 1.
        curvature: nats per octave**2 around the best rate, the median of the cells; None where no cell has one.
        sizes, tokens, tokens_per_step: the smallest and the largest that were seen.
        missing: what the cells cannot tell, a sentence each.
    """

    schedule: str
    size: Literal["parameters", "width"] | None
    center: Place
    forms: list[LossForm]
    size_sd: Finite
    cell_sd: Finite
    widening: Finite
    curvature: Finite | None
    sizes: tuple[Finite, Finite]
    tokens: tuple[Finite, Finite]
    tokens_per_step: tuple[Finite, Finite]
    num_cells: int
    missing: list[str]

    def summary(self) -> Summary:
        """What the loss depends on, and what the cells cannot tell."""
        form = self.forms[0]
        terms = {
            "tokens": form.token_term,
            "steps": form.step_term,
            "batch": form.batch_term,
            self.size or "size": form.size_term,
        }
        found = [name for name, term in terms.items() if term > 0]
        low, high = self.tokens
        numbers = [
            ("irreducible loss at the center", f"{form.irreducible:.4g} nats per token"),
            ("tokens seen", f"{low:,.0f} to {high:,.0f}"),
            ("tokens per step seen", f"{self.tokens_per_step[0]:,.0f} to {self.tokens_per_step[1]:,.0f}"),
        ]
        if form.held_out_rms is not None:
            numbers.append(("error of left-out cells", f"{form.held_out_rms:.2%} of the loss"))
        return Summary(
            f"the loss of {self.schedule} over {' and '.join(found) or 'nothing'}, from {self.num_cells} cells",
            numbers + [("beware", sentence) for sentence in self.missing],
        )

    def cannot(self, tokens: float, tokens_per_step: float, size: float | None = None) -> str | None:
        """Why there is no forecast for a place, in a sentence; None if there is one."""
        form = self.forms[0]
        kind = self.size or "size"
        known: tuple[tuple[float | None, float, tuple[float, float], str, str], ...] = (
            (size, form.size_term, self.sizes, kind, f"sweep a second {kind}"),
            (tokens, form.token_term, self.tokens, "tokens", "sweep a second horizon"),
            (tokens_per_step, form.step_term, self.tokens_per_step, "tokens per step", "sweep at least three batches"),
        )
        for value, term, (low, high), name, remedy in known:
            if term > 0 and value is None and name == kind:
                return f"the loss depends on the {kind}, which is not given: say it."
            if term == 0 and value and not low / SAME_PLACE <= value <= high * SAME_PLACE:
                seen = f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
                at = f"a width of {value:,.0f}" if name == "width" else f"{value:,.0f} {name}"
                return (
                    f"there is no forecast of the loss at {at}, for the sweep has {seen} alone and nothing "
                    f"tells how the loss goes on from there: {remedy}."
                )
        return None

    def at(self, tokens: float, tokens_per_step: float, size: float | None = None) -> LossInterval:
        """The best loss at a place, with its 95 % interval: predictive, of a new model's cell.

        Args:
            tokens: T, the length of the run.
            tokens_per_step: B.
            size: N, where the forecast has one.

        Raises:
            UserError: `cannot` says why not.
        """
        if reason := self.cannot(tokens, tokens_per_step, size):
            raise UserError(reason)
        place = self._places(np.array([tokens_per_step], dtype=np.float64), tokens, size)
        scatter = math.hypot(self.size_sd, self.cell_sd)
        ends = []
        for form in self.forms:
            center = float(form.log_loss(place)[0])
            half = QUANTILE * self.widening * math.hypot(float(form.sd(place)[0]), scatter)
            ends += [center - half, center + half]
        taken = float(self.forms[0].log_loss(place)[0])
        return LossInterval(math.exp(taken), math.exp(min(ends)), math.exp(max(ends)))

    def tokens_to(self, loss: float, tokens: float, tokens_per_step: float, size: float | None = None) -> float:
        """The tokens with which a batch reaches a loss, between 1/32 and 1,024 times those given; infinite beyond."""
        return _tokens_to(self, self.forms[0], tokens_per_step, math.log(loss), tokens, size, least=1 / 32)

    def batches(self, tokens: float, size: float | None = None) -> "Batches | None":
        """Tokens to the loss over the batch, at the loss of the best batch; None without a batch term."""
        return _batches(self, tokens, size)

    def _places(self, batches: Array, tokens: float | Array, size: float | None) -> Array:
        center = self.center
        n = np.log((size or center.size) / center.size) if self.forms[0].size_term else 0.0
        t, b = np.log(np.asarray(tokens) / center.tokens), np.log(batches / center.tokens_per_step)
        s = np.log(np.asarray(tokens) / batches / center.steps)
        return np.stack(np.broadcast_arrays(n, t, s, b), axis=-1).astype(np.float64)


@dataclass(frozen=True)
class Batches:
    """Which batch: the one that reaches the loss with the fewest tokens, and the one that takes twice as many.

    Attributes:
        loss: that the best batch reaches with the tokens that were asked about.
        best, critical: tokens per step; critical is None if it lies beyond 64 times the largest batch of the sweep.
        critical_interval: 95 % of critical, by the delta method; an infinite end is None.
        tokens_per_step, tokens: the tokens to that loss over a grid of batches; infinite where it cannot be reached.
    """

    loss: float
    best: float
    critical: float | None
    critical_interval: tuple[float, float | None] | None
    tokens_per_step: tuple[float, ...]
    tokens: tuple[float, ...]


def _batches(forecast: Forecast, tokens: float, size: float | None) -> Batches | None:
    form = forecast.forms[0]
    if form.step_term == 0 or forecast.cannot(tokens, forecast.center.tokens_per_step, size):
        return None
    low, high = forecast.tokens_per_step
    grid = np.geomspace(low / 4, 64 * high, _BATCHES)
    losses = form.log_loss(forecast._places(grid, tokens, size))
    # Below the batches that were swept the batch term alone speaks, which was fitted above them.
    best = int(np.argmin(np.where((grid >= low) & (grid <= 8 * high), losses, np.inf)))
    target = float(losses[best])
    needed = np.array([_tokens_to(forecast, form, batch, target, tokens, size) for batch in grid])
    critical = _critical(grid, needed, tokens)
    ends = None
    if critical is not None:
        # One standard deviation of the numbers along the direction that moves the loss at the critical batch most.
        place = forecast._places(np.array([critical, grid[best]]), np.array([2 * tokens, tokens]), size)
        _, slopes, _ = form_terms(form.numbers(), place)
        change = slopes[0] - slopes[1]
        spread = float(np.sqrt(max(change @ np.array(form.covariance) @ change, 0.0))) * forecast.widening
        near = forecast._places(critical * np.array([0.99, 1.01]), 2 * tokens, size)
        slope = float(np.diff(form.log_loss(near))[0] / math.log(1.01 / 0.99))
        octaves = QUANTILE * spread / max(slope, 1e-9)
        ends = critical * math.exp(-octaves), critical * math.exp(octaves) if octaves < math.log(1e6) else None
    return Batches(math.exp(target), float(grid[best]), critical, ends, tuple(grid.tolist()), tuple(map(float, needed)))


def _tokens_to(
    forecast: Forecast,
    form: LossForm,
    batch: float,
    target: float,
    tokens: float,
    size: float | None,
    least: float = 1.0,
) -> float:
    """The tokens at which a batch reaches a log loss, from `least` to 1,024 times those given."""
    more = np.geomspace(least, 1024, 401) * tokens
    losses = form.log_loss(forecast._places(np.full_like(more, batch), more, size))
    reached = np.flatnonzero(losses <= target + 1e-12)
    if not len(reached):
        return math.inf
    i = int(reached[0])
    if i == 0:
        return float(more[0])
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return float(np.exp(np.log(more[i - 1]) + share * np.log(more[i] / more[i - 1])))


def _critical(grid: Array, needed: Array, tokens: float) -> float | None:
    """The batch beyond the best one that takes CRITICAL_OVERHEAD times the tokens; None if there is none in the grid."""
    best = int(np.argmin(needed))
    above = np.flatnonzero(needed[best:] > CRITICAL_OVERHEAD * tokens)
    if not len(above):
        return None
    i = best + int(above[0])
    if not math.isfinite(needed[i]):
        return float(grid[i])
    share = (CRITICAL_OVERHEAD * tokens - needed[i - 1]) / (needed[i] - needed[i - 1])
    return float(grid[i - 1] * (grid[i] / grid[i - 1]) ** share)


def seen(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest of values."""
    return min(values), max(values)
