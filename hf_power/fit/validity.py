"""What cells must have to carry a law, what follows from a fitted one, and how far it may be trusted."""

import math
from collections.abc import Sequence

import numpy as np

from hf_power.fit.law import FittedLaw
from hf_power.fit.optima import Optima
from hf_power.fit.result import (
    Cell,
    Center,
    Estimate,
    Fit,
    FittedCell,
    Interval,
    PaperInside,
    Reach,
    RegretMap,
    Validity,
)
from hf_power.fit.skew import warped
from hf_power.fit.squares import interval, slopes, widening
from hf_power.records.errors import UserError
from hf_power.schedule import PAPER_OPTIMA, TOKENS_PER_BETA, beta


def check_cells(cells: Sequence[Cell], *, batch_exponent: float | None = None, critical_batch: str = "none") -> None:
    """Raise a UserError, what was there and what to run, for cells of a schedule that cannot carry the law."""
    used = [cell for cell in cells if cell.used]
    horizons, batches = sorted({c.tokens for c in used}), sorted({c.tokens_per_step for c in used})
    num_free = 2 + (batch_exponent is None) + (critical_batch == "fixed")
    there = (
        f"{len(used)} of {len(cells)} cells have a bracketed optimum, at {len(horizons)} horizons and {len(batches)} "
        "batches"
    )
    missing = next((cell for cell in cells if not cell.used), None)
    if len(used) < 3 or len(used) <= num_free:
        why = f" (of {missing.name}: {missing.reason})" if missing else ""
        raise UserError(
            f"{there}{why}, too few for {num_free} parameters: run at least {max(3, num_free + 1)} cells with learning "
            "rates on both sides of the optimum."
        )
    if horizons[-1] < 2 * horizons[0]:
        raise UserError(
            f"{there}, and the horizons, {horizons[0]:,} to {horizons[-1]:,} tokens, span less than a factor 2: run "
            "horizons that are at least a factor 2 apart, better 16."
        )
    if batch_exponent is None and len(batches) < 2:
        raise UserError(f"{there}, too few to fit the batch exponent: run another batch, or hold batch_exponent at 1.")
    if critical_batch == "fixed" and len(batches) < 4:
        raise UserError(f"{there}, too few for a critical batch: run at least 4 batches, or do not ask for one.")
    if len(batches) > 1 and batch_exponent is None and abs(_correlation(used)) > 0.98:
        raise UserError(
            f"{there}, but horizon and batch change together, so that b and the batch exponent cannot be told apart: run "
            "each batch at two horizons, or hold batch_exponent at 1."
        )


def check_falling(fit: Fit) -> None:
    """Raise a UserError for a law that does not fall with the tokens, since no Power schedule follows from it."""
    if fit.law.b >= 0:
        low, high = fit.intervals.b
        raise UserError(
            f"the best learning rates of {fit.schedule} do not fall with the tokens, b is {fit.law.b:+.2f} ({low:+.2f} to {high:+.2f}), "
            "and no Power schedule rises: run longer horizons or more seeds, the rows are kept."
        )


def _correlation(cells: Sequence[Cell]) -> float:
    """The correlation of log tokens with log batch over the cells."""
    return float(np.corrcoef(np.log([(c.tokens, c.tokens_per_step) for c in cells]).T)[0, 1])


def warnings_of(cells: Sequence[FittedCell], fitted: FittedLaw) -> list[str]:
    """What a user should know before trusting the law, a sentence each."""
    used = [cell for cell in cells if cell.used]
    found = []
    if 2 * len(used) < len(cells):
        found.append(f"only {len(used)} of {len(cells)} cells have a bracketed optimum: the others may lie elsewhere")
    # The widest gap between the learning rates of the cell's parabola, in octaves, is compared.
    gaps = [float(np.diff(np.unique([point.log2_lr for point in cell.points])).max()) for cell in used]
    if wide := [gap for gap in gaps if gap > 2 + 1e-6]:
        found.append(f"the learning rates of {len(wide)} cells are more than a factor 4 apart: run rates in between")
    if not used[0].noise_known:
        found.append("nothing tells the noise of a run: the intervals rest on the spacing alone, run a second seed")
    if len({cell.tokens_per_step for cell in used}) > 1 and 0.9 < abs(_correlation(used)) <= 0.98:
        found.append("horizon and batch nearly change together: b and the batch exponent are hard to tell apart")
    if fitted.law.b >= 0:
        found.append(f"b is {fitted.law.b:.3g}, not negative: Power needs a rate that falls with the tokens")
    return found


# The law is trusted where the standard deviation of log2 of its rate is at most this, which is a factor of 1.19.
MAX_SD_OCTAVES = 0.25
# However sure the draws are, they cannot know of a bend beyond what was measured: a factor of 16 is the limit.
MAX_EXTRAPOLATION_OCTAVES = 4.0
_MAP_POINTS = 41


def center_of(fitted: FittedLaw, optima: Optima) -> Center:
    """The rate at the geometric centre of the cells."""
    place = tuple(float(x.mean()) for x in optima.places)
    rate = fitted.log2_lr(*place)
    low, high = interval(rate, fitted.log2_lr_draws(*place), fitted.freedom)
    size = 2 ** place[2] if fitted.form.size else None
    return Center(2 ** place[0], 2 ** place[1] * TOKENS_PER_BETA, 2**rate, (2**low, 2**high), size)


def paper_inside(fitted: FittedLaw, optima: Optima) -> PaperInside:
    """How the paper's fit of the optima compares."""

    def inside(value: float, ends: Interval) -> bool:
        return ends[0] <= value <= ends[1] or math.isclose(value, ends[0])

    intervals = fitted.intervals
    a, b, c = (inside(getattr(PAPER_OPTIMA, name), getattr(intervals, name)) for name in ("a", "b", "batch_exponent"))
    return PaperInside(a, b, c, fitted.contains(PAPER_OPTIMA, *(float(x.mean()) for x in optima.places)))


def regret_map(cells: Sequence[Cell], fitted: FittedLaw, optima: Optima) -> RegretMap:
    """Mean regret over (a, b): the fit and the paper with a margin, a as wide as the ridge of good pairs needs.

    The other numbers of the law are those of the fit.
    """
    found = fitted.parameters
    curvature = np.array([cell.optimum().curvature for cell in cells])
    rest = found._replace(log2_a=0.0, b=0.0).log2_lr(*optima.places)
    low, high = fitted.interval("b")
    bs = np.linspace(min(found.b, PAPER_OPTIMA.b, low) - 0.05, max(found.b, PAPER_OPTIMA.b, high) + 0.05, _MAP_POINTS)
    ridge = found.log2_a + (found.b - bs[[0, -1]]) * optima.tokens.mean()  # These have the same rate at the centre.
    ends = sorted([*ridge, math.log2(PAPER_OPTIMA.a)])
    log2_as = np.linspace(ends[0] - 1, ends[-1] + 1, _MAP_POINTS)
    rate = log2_as[None, :, None] + bs[:, None, None] * optima.tokens + rest
    nats = (curvature * warped(rate - optima.lr, cells[0].skew) ** 2).mean(axis=2)
    return RegretMap(tuple((2**log2_as).tolist()), tuple(bs.tolist()), tuple(tuple(row) for row in nats.tolist()))


def validity_of(cells: Sequence[Cell], fitted: FittedLaw, misfit: Sequence[str]) -> Validity:
    """What was measured, and how far the law may be trusted beyond.

    The reach is the largest tokens and the largest batch, each with the other at its largest measured value and the
    largest size, at which the standard deviation of log2 of the law's rate is at most MAX_SD_OCTAVES, and no more than
    16 times the largest measured. A law that misfits its own cells reaches nowhere beyond them.
    """
    tokens, batches = sorted(cell.tokens for cell in cells), sorted(cell.tokens_per_step for cell in cells)
    top, side = math.log2(tokens[-1]), math.log2(beta(batches[-1]))
    kind = fitted.form.size
    size = max(math.log2(getattr(cell, kind) or 1) for cell in cells) if kind else 0.0

    def sd(more_tokens: float, more_batch: float) -> float:
        draws = fitted.log2_lr_draws(top + more_tokens, side + more_batch, size)
        return widening(fitted.freedom) * float(draws.std())

    steps = np.arange(0.0, MAX_EXTRAPOLATION_OCTAVES + 0.01, 0.25) if not misfit else ()
    far = max((float(x) for x in steps if sd(x, 0.0) <= MAX_SD_OCTAVES), default=0.0)
    large = max((float(x) for x in steps if sd(0.0, x) <= MAX_SD_OCTAVES), default=0.0)
    known = max(sd(far, 0.0), sd(0.0, large)) if not misfit else fitted.scatter
    return Validity(
        widths=tuple(sorted({cell.width for cell in cells})),
        tokens_per_step=(batches[0], batches[-1]),
        tokens=(tokens[0], tokens[-1]),
        extrapolates_to=Reach(round(tokens[-1] * 2**far), round(batches[-1] * 2**large), known),
        parameters=tuple(sorted({cell.parameters for cell in cells if cell.parameters})),
        misfit=tuple(misfit),
    )


def width_exponent(optima: Optima, fitted: FittedLaw, generator: np.random.Generator) -> Estimate | None:
    """Exponent of the width beside those of the law; None where the cells cannot tell it."""
    found = fitted.parameters
    capped = np.minimum(optima.beta, found.cap_at(optima.tokens))  # type: ignore[arg-type]
    columns, lr = [optima.width, optima.tokens, capped], optima.lr
    if fitted.form.c is not None:
        columns, lr = columns[:2], lr - found.c * capped
    estimates = slopes(columns, lr, optima.sd, optima.errors, generator)
    return estimates[0] if estimates else None
