"""The page of a check: how much the recipe's learning rate loses against the best one, and the verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

import numpy as np

from hf_power.coordinates import Slope
from hf_power.plan.record import duration
from hf_power.recipe import Recipe
from hf_power.records.files import Record
from hf_power.records.rows import Row
from hf_power.records.summary import Summarized, Summary, frame_of
from hf_power.sweep.jobs import Group, row_value

if TYPE_CHECKING:
    from pandas import DataFrame

VERIFY_FILE = "verify.json"
SECONDS_PER_DAY = 86_400
# More than anybody runs for a check.
MOST_SEEDS = 32


@dataclass(frozen=True)
class Point:
    """Mean loss and standard deviation over seeds, in nats per token, at a factor on the recipe's learning rate."""

    factor: float
    loss: float
    sd: float | None


@dataclass(frozen=True)
class Parabola:
    """Loss over log2 of the factor: ``min_loss + curvature * log2(factor / optimum_factor)**2``."""

    optimum_factor: float
    min_loss: float
    curvature: float


@dataclass(frozen=True)
class Cell:
    """Where the recipe was tried."""

    width: int
    tokens_per_step: int
    tokens: int


@dataclass(frozen=True)
class Tried:
    """The law of the recipe, and its cap."""

    a: float
    b: float
    batch_exponent: float
    max_lr: float


@dataclass(frozen=True)
class Coordinates:
    """What came out of `hf_power.coord_check`."""

    passed: bool
    verdict: str
    slopes: list[Slope]


@dataclass(frozen=True)
class Foreseen:
    """The loss that the recipe's forecast says for the cell with its 95 % interval, and the lowest one measured."""

    loss: float
    low: float
    high: float
    measured: float
    schedule: str

    @property
    def text(self) -> str:
        """Whether the pilot is on the forecast, in a sentence."""
        inside = self.low <= self.measured <= self.high
        off = self.measured - self.loss
        return (
            f"The lowest loss, {self.measured:.4f}, is {abs(off):.4f} {'above' if off > 0 else 'below'} the forecast of "
            f"{self.loss:.4f} ({self.low:.4f} to {self.high:.4f}) from the sweep's {self.schedule}: "
            f"{'on the forecast' if inside else 'OFF the forecast, so do not trust that of a larger run'}."
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Page(Summarized, Record):
    """verify.json.

    The verdict is "passed", "FAILED" or, where the regret's interval holds the tolerance, "inconclusive", and a reason says
    what would decide it; tolerance and regret (what the recipe's learning rate loses against the best one)
    are in nats per token. The interval, 95 % of the regret, is None with one seed, or where a run diverged; losses maps a
    factor to those of its seeds, infinite for a run that diverged; the parabola goes through the lowest point and its
    neighbours, and is None where that is an edge; enough_seeds would decide an inconclusive check, and are None where too many
    would be needed. Warnings are sentences on what the check does not cover.
    """

    FILE = VERIFY_FILE
    REMEDY = "write it with hf-power verify"

    verdict: Literal["passed", "FAILED", "inconclusive"]
    reasons: tuple[str, ...]
    tolerance: float
    regret: float
    regret_interval: tuple[float, float] | None
    points: tuple[Point, ...]
    losses: dict[str, list[float]]
    parabola: Parabola | None
    cell: Cell
    recipe: Tried
    seeds: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    forecast: Foreseen | None = None
    coord_check: Coordinates | None = None
    enough_seeds: int | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the recipe may be trusted at the cell."""
        return self.verdict == "passed"

    @property
    def conclusion(self) -> str:
        """The verdict in one sentence."""
        cell = self.cell
        where = f"at width {cell.width}, {cell.tokens:,} tokens and {cell.tokens_per_step:,} per step"
        if self.passed:
            return f"The recipe's learning rate holds {where}: no other one is better by more than {self.tolerance:g} nats."
        what = "fails" if self.verdict == "FAILED" else "is neither proved nor refuted"
        return f"The recipe's learning rate {what} {where}: {'; '.join(self.reasons)}."

    def summary(self) -> Summary:
        """The conclusion and the losses."""
        numbers = [("verdict", self.verdict), ("regret, nats per token", f"{self.regret:.4f}")]
        if self.regret_interval:
            numbers.append(("95 % of the regret", " to ".join(f"{end:.4f}" for end in self.regret_interval)))
        numbers += [(f"loss at {point.factor:g} times the recipe's rate", f"{point.loss:.4f}") for point in self.points]
        return Summary(self.conclusion, numbers + [("beware", warning) for warning in self.warnings])

    def to_frame(self) -> "DataFrame":
        """A row for each factor on the recipe's learning rate: the mean loss and its sd over the seeds, nats per token."""
        return frame_of(self.points)

    def next_command(self, settings: str, recipe: str, folder: str) -> str:
        """What to do after the verdict, given what was read and the folder of the page."""
        if self.passed:
            return f"hf-power pretrain {settings} --recipe {recipe}"
        if self.verdict == "FAILED":
            return "hf-power sweep GRID.yaml --output_dir FOLDER"
        # Where no number of seeds decides, a run of four times the length may: its loss is known better.
        tokens, seeds = self.cell.tokens, self.enough_seeds
        more = f"--tokens {tokens} --seeds {seeds}" if seeds else f"--tokens {4 * tokens} --seeds {len(self.seeds)}"
        return f"hf-power verify {settings} --recipe {recipe} {more} --output_dir {folder}"

    def with_coordinates(self, check: Coordinates) -> "Page":
        """The page with the coordinate check on it, of which a failed one fails the recipe, too."""
        page = replace(self, coord_check=check)
        if check.passed:
            return page
        return replace(page, verdict="FAILED", reasons=(f"coordinate check {check.verdict}", *self.reasons))


def judge(rows: Sequence[Row], group: Group, recipe: Recipe, tolerance: float) -> Page:
    """Mean losses, parabola, regret and verdict of the runs of a group."""
    losses: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row_value(row), row.seed)):
        # Values have few digits, so the factor is rounded to the power of 2 that it was meant to be.
        factor = 2.0 ** round(math.log2(row_value(row) / recipe.a))
        losses.setdefault(factor, []).append(math.inf if row.loss is None else row.loss)
    means = {factor: fmean(each) for factor, each in losses.items()}
    lowest = min(means, key=lambda factor: means[factor])
    at_an_edge = lowest in (min(means), max(means))
    parabola = None if at_an_edge else _parabola(lowest, means[lowest / 2], means[lowest], means[2 * lowest])
    regret = means[1.0] - min(means[lowest], parabola.min_loss if parabola else math.inf)
    error = _regret_error(losses)
    reasons = []
    if not math.isfinite(means[1.0]):
        reasons.append("a run at the recipe's own learning rate diverged")
    elif at_an_edge:
        reasons.append(f"the best learning rate lies beyond {lowest:g} times the recipe's")
    elif regret - (error.half_width if error else 0.0) > tolerance:
        reasons.append(
            f"{lowest:g} times the recipe's learning rate is better by {regret:.4f} nats per token, more than {tolerance:g}"
        )
    decided = bool(reasons) or (error is not None and regret + error.half_width <= tolerance)
    enough = None if decided else _enough_seeds(abs(tolerance - regret), error, len(group.seeds))
    if not decided:
        seconds = sum(row.seconds for row in rows) / max(len(group.seeds), 1)
        reasons.append(_what_would_decide(regret, tolerance, error, enough, seconds))
    interval = (max(0.0, regret - error.half_width), regret + error.half_width) if error else None
    return Page(
        verdict="inconclusive" if not decided else "FAILED" if reasons else "passed",
        reasons=tuple(reasons),
        tolerance=tolerance,
        regret=regret,
        regret_interval=interval,
        points=tuple(Point(factor, means[factor], _sd(each)) for factor, each in losses.items()),
        losses={f"{factor:g}": each for factor, each in losses.items()},
        parabola=parabola,
        cell=Cell(group.width, group.tokens_per_step, group.tokens[0]),
        recipe=Tried(recipe.a, recipe.b, recipe.batch_exponent, recipe.max_lr),
        seeds=group.seeds,
        enough_seeds=enough,
    )


def _sd(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def _parabola(lowest: float, half: float, one: float, two: float) -> Parabola | None:
    """The parabola in log2 of the factor through a lowest point and its neighbours, an octave away on either side."""
    curvature = (half + two - 2 * one) / 2
    if not math.isfinite(curvature) or curvature <= 0:
        return None
    octaves = (half - two) / (4 * curvature)
    return Parabola(lowest * 2**octaves, one - curvature * octaves**2, curvature)


@dataclass(frozen=True)
class _Error:
    """The standard deviation of a run's loss beyond what its factor and its seed do, and the runs that tell it."""

    sd: float
    num_factors: int
    num_seeds: int

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of a difference between the means of two factors, nats."""
        return self.half_width_with(self.num_seeds)

    def half_width_with(self, num_seeds: int) -> float:
        """The same with another number of seeds."""
        from scipy.stats import t

        freedom = (self.num_factors - 1) * (num_seeds - 1)
        return float(t.ppf(0.975, freedom)) * self.sd * math.sqrt(2 / num_seeds)


def _regret_error(losses: dict[float, list[float]]) -> _Error | None:
    """The noise of a factor's mean, pooled over the factors of which no run diverged; None with one seed.

    Runs of one seed share a part of their luck, so the noise is what is left of a loss without the means of its factor
    and of its seed: a two-way layout, with (factors - 1) * (seeds - 1) degrees of freedom.
    """
    table = np.array([each for each in losses.values() if all(map(math.isfinite, each))])
    if table.ndim < 2 or min(table.shape) < 2:
        return None
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    factors, seeds = table.shape
    return _Error(math.sqrt(float(np.sum(left**2)) / ((factors - 1) * (seeds - 1))), factors, seeds)


def _enough_seeds(gap: float, error: _Error | None, seeds: int) -> int | None:
    """The fewest seeds that would tell the regret from a tolerance that it is a gap away from; None where too many would."""
    if error is None:
        return 3  # One seed tells no interval, from two it is wide.
    return next((n for n in range(seeds + 1, MOST_SEEDS + 1) if error.half_width_with(n) <= gap), None)


def _what_would_decide(
    regret: float, tolerance: float, error: _Error | None, enough: int | None, seconds: float
) -> str:
    """What is open, how many seeds would decide it, and about how long they take, all of them trained anew."""
    if error is None:
        said = f"one seed tells no interval of the regret of {regret:.4f} nats"
    else:
        said = f"the regret of {regret:.4f} nats is known to +-{error.half_width:.4f}, so that it may be on either side of {tolerance:g}"
    if enough is None:
        return f"{said}: even {MOST_SEEDS} seeds would not decide it, so take a longer run or another --tolerance"
    return (
        f"{said}: --seeds {enough} would decide it, in about {duration(enough * seconds / SECONDS_PER_DAY)} of one core"
    )


def page_text(page: Page) -> str:
    """The page for a review, in Markdown."""
    cell, recipe, interval = page.cell, page.recipe, page.regret_interval
    spread = f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else " (one seed: no interval)"
    checked = [f"* Coordinate check {page.coord_check.verdict}."] if page.coord_check else []
    lines = [
        f"# Check before the run: {page.verdict}",
        "",
        page.conclusion,
        "",
        f"* Cell: width {cell.width}, {cell.tokens_per_step:,} tokens per step, {cell.tokens:,} tokens, "
        f"seeds {', '.join(map(str, page.seeds))}.",
        f"* Law: min({recipe.max_lr:g}, {recipe.a:g} * beta^{recipe.batch_exponent:g} * n^{recipe.b:g}).",
        f"* Regret of the recipe's learning rate: {page.regret:.4f} nats per token{spread}; tolerance {page.tolerance:g}.",
        *checked,
        *([f"* {page.forecast.text}"] if page.forecast else []),
        *(f"* Warning: {warning}" for warning in page.warnings),
        "",
        "| factor on the learning rate | held-out loss (nats per token) | sd over seeds |",
        "|---:|---:|---:|",
        *(
            f"| {point.factor:g} | {point.loss:.4f} | {'' if point.sd is None else format(point.sd, '.4f')} |"
            for point in page.points
        ),
        "",
        "![Loss over the factor on the learning rate](verify.png)",
        "",
        "![Coordinate check](coord_check.png)",
        "",
        "The runs are in sweep.jsonl beside this page, the numbers in verify.json.",
        "",
    ]
    return "\n".join(lines)
