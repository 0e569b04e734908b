"""From the cells of a sweep to the loss of a larger run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_power.fit.result import Cell
from hf_power.fit.rows import SAME_HORIZON
from hf_power.fit.squares import Array
from hf_power.recipe.forecast import VARYING, Batches, Forecast, LossForm, Place, form_terms, seen
from hf_power.schedule import TOKENS_PER_BETA

# A model departs from the trend over the sizes by this share of the loss, for its depth over width is another one; the
# cells of one size and horizon by half as much. A few sizes cannot tell, and the held-out ones widen it.
SIZE_SD = 0.002
HORIZON_SD = 0.001
LEAST_SD = 3e-4
# Far from the best batch the loss is described less well: by this share of what the batch costs there.
PENALTY_SHARE = 0.2
# The prior of the numbers' logarithms: exponents between those of Kaplan et al., arXiv:2001.08361 (.08 and .1, without an
# irreducible loss), and of Hoffmann et al., arXiv:2203.15556 (.34 and .28, with one), and coefficients that are all but free.
_EXPONENT_SD = 0.7
_COEFFICIENT_SD = 3.0
# The irreducible loss is a share of the lowest loss: the published ones are half to four fifths of those measured.
_IRREDUCIBLE_SHARE, _IRREDUCIBLE_SD = 0.65, 0.4
# A form with an irreducible loss is taken only if its error at left-out cells is lower by this factor, for among a handful
# of left-out groups chance alone gives one of .7 often; a form within the second factor of the best widens the interval.
_BETTER, _ALIKE = 0.7, 1.5
_ROUNDS = 3


@dataclass(frozen=True)
class _Losses:
    """The best losses of cells: log loss, and rows of log (size, tokens, steps, batch)."""

    log_loss: Array
    logs: Array

    @classmethod
    def of(cls, cells: Sequence[Cell], size: str | None) -> "_Losses":
        found = [(cell, loss) for cell in cells if (loss := best_loss(cell)) is not None]
        rows = [
            (getattr(cell, size) if size else 1, cell.tokens, cell.tokens / cell.tokens_per_step, cell.tokens_per_step)
            for cell, _ in found
        ]
        losses = np.log(np.array([loss for _, loss in found], dtype=np.float64))
        return cls(losses, np.log(np.array(rows, dtype=np.float64).reshape(-1, 4)))

    def part(self, inside: NDArray[np.bool_]) -> "_Losses":
        return _Losses(self.log_loss[inside], self.logs[inside])

    def same(self, column: int) -> NDArray[np.bool_]:
        """Which cells share a size, or a horizon."""
        values = self.logs[:, column]
        return np.asarray(np.abs(values[:, None] - values) < SAME_HORIZON)


class _Terms(NamedTuple):
    """Which terms the cells can carry."""

    size: bool
    tokens: bool
    batch: bool


class _Fitted(NamedTuple):
    """Numbers at the centre of the logs, their covariance, and the standard deviation of a cell."""

    numbers: Array
    center: Array
    covariance: Array
    cell_sd: float

    def predict(self, logs: Array) -> tuple[Array, Array]:
        """Log loss and its standard deviation, of a new model's cell."""
        terms, slopes, _ = form_terms(self.numbers, logs - self.center)
        variance = ((slopes @ self.covariance) * slopes).sum(axis=1) + SIZE_SD**2 + self.cell_sd**2
        return np.log(terms.sum(axis=1)), np.sqrt(variance)


def best_loss(cell: Cell) -> float | None:
    """The lowest loss over the learning rates of a cell; None if they do not bracket it.

    It is that of the parabola through the means within an octave of the lowest one, which follows the valley more closely
    than that of the cell's wide parabola; the lowest mean where that parabola has no minimum between them.
    """
    if len(cell.losses) < 3:
        return None
    lowest = int(np.argmin(cell.losses))
    rates, losses = np.log2(cell.learning_rates), np.array(cell.losses)
    if lowest == 0 or (lowest == len(rates) - 1 and max(cell.diverged, default=0.0) < cell.learning_rates[lowest]):
        return None
    z = rates - rates[lowest]
    # The neighbours stay in it where the rates are further apart than an octave.
    near = (np.abs(z) <= 1.01) | (np.abs(np.arange(len(z)) - lowest) <= 1)
    if near.sum() < 3:
        return float(losses[lowest])
    curvature, slope, loss = np.polyfit(z[near], losses[near], 2)
    at = -slope / (2 * curvature) if curvature > 0 else math.inf
    inside = float(z[near].min()) <= at <= float(z[near].max())
    return float(loss + slope * at / 2) if inside else float(losses[lowest])


def fit_forecast(cells: Sequence[Cell]) -> Forecast | None:
    """The best loss as a function of size, tokens and batch, see `hf_power.recipe.forecast.LossForm` for the form.

    The numbers are the most probable ones under normal errors of log loss and wide normal priors of their logarithms. The
    errors of cells of one size and of one size and horizon go together, and those of cells far from the best batch are
    larger. It is fitted without and with an irreducible loss, and the latter is taken if left-out cells (each size,
    and the longest horizon of each) show it; the interval spans what they do not tell apart, and is as much wider as their
    errors were.

    Args:
        cells: of one schedule, see `hf_power.fit.cells.fit_cells`; those whose rates bracket no best loss are left out.

    Returns:
        None where fewer than three cells have a best loss.
    """
    if not cells:
        return None
    size = _size_of(cells)
    losses = _Losses.of(cells, size)
    if len(losses.log_loss) < 3:
        return None
    terms = _terms(losses)
    tried = [(floor, _fit(losses, terms, floor), _held_out(losses, terms, floor)) for floor in (False, True)]
    errors = [rms for _, _, (rms, _) in tried]
    if errors[0] is not None and errors[1] is not None and errors[1] < _BETTER * errors[0]:
        tried.reverse()
    best = min((rms for rms in errors if rms is not None), default=None)
    alike = [each for each in tried if best is None or each is tried[0] or (each[2][0] or 0.0) <= _ALIKE * best]
    taken = tried[0][1]
    logs = losses.logs
    n, t, s, b = np.exp(taken.center).tolist()
    curvatures = [cell.curvature for cell in cells if cell.used and cell.curvature]
    return Forecast(
        schedule=cells[0].schedule,
        size=size,
        center=Place(n, t, s, b),
        forms=[_form(fitted, rms) for _, fitted, (rms, _) in alike],
        size_sd=SIZE_SD,
        cell_sd=taken.cell_sd,
        widening=max(1.0, *(widening for _, _, (_, widening) in alike)),
        curvature=float(np.median(curvatures)) if curvatures else None,
        sizes=seen(np.exp(logs[:, 0]).round(6).tolist()),
        tokens=seen(np.exp(logs[:, 1]).round().tolist()),
        tokens_per_step=seen(np.exp(logs[:, 3]).round().tolist()),
        num_cells=len(losses.log_loss),
        missing=_missing(terms, size, losses),
    )


def _size_of(cells: Sequence[Cell]) -> Literal["parameters", "width"] | None:
    if all(cell.parameters for cell in cells):
        return "parameters"
    return "width" if all(cell.width for cell in cells) else None


def _count(values: Array) -> int:
    """How many values differ, by more than horizons that are one."""
    return 1 + int((np.diff(np.sort(values)) > SAME_HORIZON).sum())


def _terms(losses: _Losses) -> _Terms:
    sizes, tokens, batches = (_count(losses.logs[:, column]) for column in (0, 1, 3))
    # One batch for each horizon would leave steps and tokens the same thing.
    columns = np.column_stack([np.ones(len(losses.logs)), losses.logs[:, [1, 3]]])
    free = batches >= 3 and np.linalg.matrix_rank(columns - columns.mean(axis=0), tol=0.1) == 1 + (tokens >= 2)
    return _Terms(sizes >= 2, tokens >= 2, bool(free))


def _missing(terms: _Terms, size: str | None, losses: _Losses) -> list[str]:
    n, t, b = (float(np.exp(losses.logs[0, column])) for column in (0, 1, 3))
    found = []
    if not terms.size:
        one = f"one size, {n:,.0f} ({size})" if size else "sizes that the rows do not tell"
        found.append(f"the cells have {one}: the forecast cannot say the loss of another model, sweep a second size")
    if not terms.tokens:
        found.append(
            f"the cells have one horizon, {t:,.0f} tokens: the forecast cannot say the loss of a longer run, sweep a second "
            "horizon"
        )
    if not terms.batch:
        found.append(
            f"the cells have fewer than three batches (one is {b:,.0f} tokens per step) or one for each horizon: the forecast "
            "cannot say what another batch costs, sweep three batches at one horizon"
        )
    return found


def _prior(losses: _Losses, terms: _Terms, floor: bool) -> tuple[Array, Array]:
    """Means and standard deviations of the logs of VARYING (of the last one itself); a deviation of 0 is no number."""
    loss = math.exp(float(losses.log_loss.mean()))
    least = math.exp(float(losses.log_loss.min()))
    held = terms.size or terms.tokens or terms.batch
    mean = dict.fromkeys(VARYING, 0.0)
    sd = dict.fromkeys(VARYING, 0.0)

    def free(name: str, center: float, spread: float) -> None:
        mean[name], sd[name] = math.log(center), spread

    rest = loss
    if floor or not (terms.size or terms.tokens):
        # Without a term that falls there is but the mean, and nothing that could be taken for irreducible.
        share = _IRREDUCIBLE_SHARE * least if floor and held else loss
        free("irreducible", share, _IRREDUCIBLE_SD)
        rest = max(loss - share, 0.05 * loss)
    # The term that carries the loss where nothing is irreducible falls slowly, as in Kaplan et al.
    slow, fast = (0.3, 0.3) if floor else (0.1, 0.3)
    if terms.size:
        free("size_term", (0.7 if terms.tokens else 1.0) * rest, _COEFFICIENT_SD)
        free("size_exponent", slow, _EXPONENT_SD)
    if terms.tokens:
        free("token_term", (0.3 if terms.size else 1.0) * rest, _COEFFICIENT_SD)
        free("token_exponent", fast if terms.size else slow, _EXPONENT_SD)
    if terms.batch:
        for name, exponent in (("step", 0.7), ("batch", 0.7)):
            free(f"{name}_term", 0.01 * loss, _COEFFICIENT_SD)
            free(f"{name}_exponent", exponent, _EXPONENT_SD)
    if terms.size and terms.tokens:
        mean["token_size_exponent"], sd["token_size_exponent"] = 0.0, 0.3
    return np.array([mean[name] for name in VARYING]), np.array([sd[name] for name in VARYING])


def _fit(losses: _Losses, terms: _Terms, floor: bool) -> _Fitted:
    from scipy.optimize import least_squares

    mean, sd = _prior(losses, terms, floor)
    free = sd > 0
    center = losses.logs.mean(axis=0)
    places, y = losses.logs - center, losses.log_loss

    def numbers(values: Array) -> Array:
        whole = np.where(free, mean, -np.inf)
        whole[free] = values
        return np.append(np.exp(np.minimum(whole[:-1], 50.0)), values[-1] if free[-1] else 0.0)

    values, cell_sd = mean[free], SIZE_SD
    scaled = np.zeros(len(y))
    for _ in range(_ROUNDS):
        noise = cell_sd**2 + (PENALTY_SHARE * scaled) ** 2
        size, horizon = losses.same(0), losses.same(0) & losses.same(1)
        whiten = np.linalg.inv(np.linalg.cholesky(SIZE_SD**2 * size + HORIZON_SD**2 * horizon + np.diag(noise)))

        def residuals(x: Array, whiten: Array = whiten) -> Array:
            terms, _, _ = form_terms(numbers(x), places)
            return np.concatenate([whiten @ (np.log(terms.sum(axis=1)) - y), (x - mean[free]) / sd[free]])

        def slopes(x: Array, whiten: Array = whiten) -> Array:
            _, found, _ = form_terms(numbers(x), places)
            return np.concatenate([whiten @ found[:, free], np.diag(1 / sd[free])])

        solution = least_squares(residuals, values, slopes, max_nfev=100)
        values = solution.x
        found, _, scaled = form_terms(numbers(values), places)
        rest = np.log(found.sum(axis=1)) - y
        inverse = np.linalg.inv(solution.jac.T @ solution.jac)
        used = float(np.trace(solution.jac[: len(y)] @ inverse @ solution.jac[: len(y)].T))
        # The median, for a few cells far from the best batch must not decide how well the others are described.
        spread = 1.4826 * float(np.median(np.abs(rest))) * math.sqrt(len(y) / max(len(y) - used, 1.0))
        cell_sd = max(spread, LEAST_SD)
    covariance = np.zeros((len(VARYING), len(VARYING)))
    covariance[np.ix_(free, free)] = inverse
    return _Fitted(numbers(values), center, covariance, cell_sd)


def _held_out(losses: _Losses, terms: _Terms, floor: bool) -> tuple[float | None, float]:
    """The error at left-out cells, root mean square over the groups, and over what was said of it."""
    logs = losses.logs
    groups = []
    sizes = np.unique(logs[:, 0].round(2))
    if len(sizes) >= 3:
        groups += [np.abs(logs[:, 0] - size) < SAME_HORIZON for size in sizes]
    longest = np.array([logs[same, 1].max() for same in losses.same(0)])
    if _count(logs[:, 1]) >= 3:
        groups.append(logs[:, 1] > longest - SAME_HORIZON)
    squares, scaled = [], []
    for out in groups:
        rest = losses.part(~out)
        if _terms(rest) != terms or len(rest.log_loss) < 4:
            continue
        loss, sd = _fit(rest, terms, floor).predict(logs[out])
        error = loss - losses.log_loss[out]
        squares.append(float(np.mean(error**2)))
        scaled.append(float(np.mean((error / sd) ** 2)))
    if not squares:
        return None, 1.0
    return math.sqrt(sum(squares) / len(squares)), max(1.0, math.sqrt(sum(scaled) / len(scaled)))


def _form(fitted: _Fitted, rms: float | None) -> LossForm:
    values = dict(zip(VARYING, fitted.numbers.tolist(), strict=True))
    return LossForm(**values, covariance=fitted.covariance.tolist(), held_out_rms=rms)


def forecast_text(forecast: Forecast) -> list[str]:
    """The form with its numbers, how well it is known, and what is missing."""
    form, center = forecast.forms[0], forecast.center
    parts = [f"{form.irreducible:.4g}"] if form.irreducible else []
    size = f" * (N / {center.size:.3g})^{form.token_size_exponent:.3g}" if form.token_size_exponent else ""
    for term, exponent, name, middle, factor in (
        (form.size_term, form.size_exponent, "N", center.size, ""),
        (form.token_term, form.token_exponent, "T", center.tokens, size),
        (form.step_term, form.step_exponent, "S", center.steps, ""),
        (form.batch_term, form.batch_exponent, "B", center.tokens_per_step, ""),
    ):
        if term:
            parts.append(f"{term:.3g}{factor} * ({name} / {middle:.3g})^-{exponent:.3g}")
    known = "no irreducible loss shows at left-out cells" if not form.irreducible else "with an irreducible loss"
    if len(forecast.forms) > 1:
        known += ", which the interval leaves open"
    error = (
        "" if form.held_out_rms is None else f"; off by {100 * form.held_out_rms:.2f} % at left-out sizes and horizons"
    )
    lines = [
        f"forecast of the best loss of {forecast.schedule}, nats per token: L = {' + '.join(parts)}",
        f"  (N {forecast.size or 'size'}, T tokens, B tokens per step, S = T / B; {known}; {forecast.num_cells} cells{error})",
    ]
    if batches := forecast.batches(center.tokens, center.size):
        lines.append(f"  at {center.tokens:,.0f} tokens {batches_text(batches)}")
    return lines + [f"  WARNING {sentence}" for sentence in forecast.missing]


def batches_text(batches: Batches) -> str:
    """The best and the critical batch in words."""
    text = f"the best batch is {batches.best:,.0f} tokens per step (beta = {batches.best / TOKENS_PER_BETA:.3g})"
    if batches.critical is None or batches.critical_interval is None:
        return f"{text}, and twice the tokens are not needed at any batch that the cells can tell of"
    low, high = batches.critical_interval
    end = "any" if high is None else f"{high:,.0f}"
    return (
        f"{text}; twice the tokens are needed at {batches.critical:,.0f} (the critical batch, 95 % {low:,.0f} to {end})"
    )
