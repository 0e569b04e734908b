"""The cells of a sweep and the law of one schedule, as values: the content of fit.json."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

from hf_power.fit.skew import warped
from hf_power.recipe import predictive_factors
from hf_power.records.errors import UserError
from hf_power.records.files import Record
from hf_power.records.summary import Summarized, Summary, frame_of
from hf_power.schedule import Law

if TYPE_CHECKING:
    from pandas import DataFrame

# Octaves on either side of the lowest loss within which a parabola describes it; further out the loss rises faster
# towards divergence than towards small rates.
WINDOW_OCTAVES = 2.0


class Point(NamedTuple):
    """One run in a cell's parabola.

    Its scatter is the residual over sqrt(1 - leverage), in nats, so that its mean square is the noise's variance (HC2);
    it is 0 where the parabola goes through the point. The pull is what a unit of skew does to it beyond what the parabola
    makes up for, nats; 0 where no skew is fitted.
    """

    trunk: str
    seed: int
    log2_lr: float
    scatter: float
    pull: float = 0.0


@dataclass(frozen=True)
class Cell:
    """What one cell says about its optimum; what could not be found is None.

    Attributes:
        tokens: the horizon.
        learning_rates: those of finished runs, rising.
        losses: mean over the seeds at each of them, nats per token.
        num_seeds: runs at each of them.
        loss_sd: scatter between seeds, nats, pooled over the learning rates; None with one seed each.
        optimum_lr: where the parabola is lowest.
        optimum_interval: 95 % interval of it.
        optimum_sd_octaves: standard deviation of its log2 by the noise of its runs; that of the skew, which moves all cells
            alike, is in the interval only.
        curvature: nats per octave**2, at the optimum.
        skew: how much steeper the flank towards high rates is, see `hf_power.fit.cells.fit_cells`; 0 for a parabola.
        min_loss: of the parabola, nats per token; the lowest mean where there is none.
        used: whether it has a bracketed optimum; if not, `reason` says why.
        law_lr, residual_octaves, regret: the law's rate here, log2 of the optimum over it, and the nats that it costs.
        parameters: of the model; None if not known.
        diverged: learning rates at which a run diverged, also with a finite loss, see `hf_power.fit.rows.by_cell`.
    """

    schedule: str
    width: int
    tokens_per_step: int
    tokens: int
    learning_rates: tuple[float, ...]
    losses: tuple[float, ...]
    num_seeds: tuple[int, ...]
    loss_sd: float | None = None
    optimum_lr: float | None = None
    optimum_interval: tuple[float, float] | None = None
    optimum_sd_octaves: float | None = None
    curvature: float | None = None
    min_loss: float | None = None
    used: bool = False
    reason: str | None = None
    law_lr: float | None = None
    residual_octaves: float | None = None
    regret: float | None = None
    parameters: int | None = None
    diverged: tuple[float, ...] = ()
    skew: float = 0.0

    @property
    def name(self) -> str:
        """The cell in words."""
        width = f"width {self.width}, " if self.width else ""
        size = f"{self.parameters:,} parameters, " if self.parameters else ""
        return f"{self.schedule}, {width}{size}{self.tokens_per_step:,} tokens per step, {self.tokens:,} tokens"

    def size_of(self, law: Law) -> int | None:
        """The size that a law asks for."""
        return self.parameters if law.size == "parameters" else self.width

    def optimum(self) -> "Optimum":
        """Where the cell's parabola is lowest; a UserError where it has no optimum."""
        lr, interval, sd, curvature = self.optimum_lr, self.optimum_interval, self.optimum_sd_octaves, self.curvature
        if lr is None or interval is None or sd is None or curvature is None:
            raise UserError(f"the cell {self.name} has no optimum to compare with: {self.reason}.")
        return Optimum(lr, interval, sd, curvature)

    def regret_at(self, learning_rate: float) -> float:
        """Nats above the optimum at a learning rate, ``curvature * w(log2(lr / optimum))**2`` (see skew); as `optimum`."""
        optimum = self.optimum()
        return optimum.curvature * float(warped(math.log2(learning_rate / optimum.lr), self.skew)) ** 2


@dataclass(frozen=True)
class FittedCell(Cell):
    """A cell with what no file holds.

    The runs within its curve, whether its sd comes from more than the spacing, and by how many octaves its optimum moves for
    a unit of skew.
    """

    points: tuple[Point, ...] = ()
    noise_known: bool = False
    octaves_per_skew: float = 0.0

    def against(self, law: Law) -> Cell:
        """The cell with a law's rate and, if it has an optimum, what the law is off and what that costs."""
        lr = law.lr(self.tokens, self.tokens_per_step, self.size_of(law))
        cell = replace(self, law_lr=lr)
        if self.optimum_lr is not None:
            cell = replace(cell, residual_octaves=math.log2(self.optimum_lr / lr), regret=self.regret_at(lr))
        return Cell(*(getattr(cell, each.name) for each in fields(Cell)))


class Optimum(NamedTuple):
    """The optimum of a used cell, see there."""

    lr: float
    interval: tuple[float, float]
    sd_octaves: float
    curvature: float


def rates_near(rates: Sequence[float], lowest: int) -> list[float]:
    """The rates that a parabola is fitted to: within WINDOW_OCTAVES of number `lowest`, and its neighbours."""
    return [
        rate
        for i, rate in enumerate(rates)
        if abs(i - lowest) <= 1 or abs(math.log2(rate) - math.log2(rates[lowest])) <= WINDOW_OCTAVES + 1e-6
    ]


FIT_FILE = "fit.json"
Interval = tuple[float, float]  # The low and the high end of 95 %.
# A draw of a law: a, b, batch_exponent, critical_batch_tokens, critical_batch_growth and size_exponent.
Draw = tuple[float, float, float, float | None, float, float]
Estimate = tuple[float, float, float]  # A value, and the ends of its 95 % interval.


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of the law's numbers; a number that was held has both ends at its value, None stands for no number."""

    a: Interval
    b: Interval
    batch_exponent: Interval
    critical_batch_tokens: Interval | None = None
    critical_batch_growth: Interval | None = None
    size_exponent: Interval | None = None


@dataclass(frozen=True)
class TriedForm:
    """A form of the law, and the root of its mean squared error at left-out cells, octaves; see `fit.form.choose_form`."""

    name: str
    num_parameters: int
    held_out_rms_octaves: float
    chosen: bool


@dataclass(frozen=True)
class OfSize:
    """The simple law of one size alone, or why there is none, and the scatter of its optima around it, octaves."""

    size: int
    law: Law | None
    scatter_octaves: float | None
    reason: str | None


@dataclass(frozen=True)
class Center:
    """The law's rate at the geometric centre of the cells, where it is known best."""

    tokens: float
    tokens_per_step: float
    learning_rate: float
    interval: Interval
    size: float | None = None


@dataclass(frozen=True)
class PaperInside:
    """Whether each number of the paper's law lies in its interval, and all of them in the joint 95 % region."""

    a: bool
    b: bool
    batch_exponent: bool
    jointly: bool


@dataclass(frozen=True)
class RegretMap:
    """Mean regret over the used cells, nats per token, of other (a, b) at the fitted batch exponent: a row for each b."""

    a: tuple[float, ...]
    b: tuple[float, ...]
    regret: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Reach:
    """How far the law may be trusted: the largest tokens, and the largest batch, each with the other one as measured.

    `sd_octaves` is the larger one of the standard deviations of log2 of the rate at the two ends.
    """

    tokens: int
    tokens_per_step: int
    sd_octaves: float


@dataclass(frozen=True)
class Validity:
    """What was measured (the smallest and the largest of used cells), and how far the law may be trusted beyond.

    `misfit` says where it fails inside the range, a sentence each; then nothing is claimed beyond.
    """

    widths: tuple[int, ...]
    tokens_per_step: tuple[int, int]
    tokens: tuple[int, int]
    extrapolates_to: Reach
    parameters: tuple[int, ...] = ()
    misfit: tuple[str, ...] = ()


@dataclass(frozen=True)
class PowerFit:
    """Power's own scale a, with b, batch exponent and critical batch of the law, and the cells of schedule "power".

    The drifts are exponents of tokens and batch in what is left over; None where the cells cannot tell.
    """

    a: float
    interval: Interval
    b_drift: Estimate | None
    batch_drift: Estimate | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True, repr=False)
class Fit(Summarized, Record):
    """The law of one schedule and how well it is known: the content of fit.json.

    Attributes:
        num_rows, num_diverged, num_failed: rows of the schedule, all and by status.
        num_blown_up: those of the diverged that have a finite loss, see `hf_power.fit.rows.by_cell`.
        r2: share of the weighted variance of log2(optimum) that the law explains.
        residual_sd_octaves: scatter of the optima around the law.
        degrees_of_freedom: used cells less fitted parameters.
        scatter_octaves: half of the 95 % interval of a new cell over 1.96, as far as it comes from the scatter of cells
            around the law, of left-out ones where that is larger; the draws of `samples` come on top.
        samples: bootstrap draws (a, b, batch_exponent, critical_batch_tokens, critical_batch_growth, size_exponent),
            scaled so that their central 95 % are the intervals.
        forms: the forms of the law that were tried, with their errors at left-out cells.
        by_size: the law of each size alone, where the law has or might have a size.
        width_exponent: an exponent of the width beside those of the law, which is 0 under muP; None with one width, or
            where the law has a size.
        power: None without cells of schedule "power".
    """

    FILE = FIT_FILE
    REMEDY = "write it with hf-power fit"

    schedule: str
    sweep_sha256: str
    num_rows: int
    num_diverged: int
    num_failed: int
    num_blown_up: int
    law: Law
    intervals: Intervals
    center: Center
    r2: float
    residual_sd_octaves: float
    scatter_octaves: float
    degrees_of_freedom: int
    paper: PaperInside
    cells: tuple[Cell, ...]
    samples: tuple[Draw, ...]
    forms: tuple[TriedForm, ...]
    by_size: tuple[OfSize, ...]
    map: RegretMap
    validity: Validity
    width_exponent: Estimate | None
    power: PowerFit | None
    warnings: tuple[str, ...]

    def predict(self, tokens: float, tokens_per_step: float, size: float | None = None) -> tuple[float, float, float]:
        """The law's rate at a new cell, and the 95 % interval of the cell's optimum: of the law and of the scatter."""
        place = tokens, tokens_per_step, size
        rate = self.law.lr(*place)
        low, high = predictive_factors(self.samples, self.law.size, self.scatter_octaves, place)
        return rate, rate * low, rate * high

    @property
    def headline(self) -> str:
        """The rate to use at the largest measured horizon and batch, how well b is known, and what is doubtful."""
        tokens, batch = self.validity.tokens[1], self.validity.tokens_per_step[1]
        sizes = [size for cell in self.cells if cell.used and (size := cell.size_of(self.law))]
        size = max(sizes, default=None) if self.law.size else None
        rate, low, high = self.predict(tokens, batch, size)
        of_size = f", {size:,} {self.law.size}" if size else ""
        low_b, high_b = self.intervals.b
        is_held = math.isclose(low_b, high_b)
        known = "b was held" if is_held else f"b = {self.law.b:.2f} is known to +-{(high_b - low_b) / 2:.2f}"
        known += "" if is_held or high_b < 0 else ", so the rate may not fall at all: run longer horizons or more seeds"
        said = (
            f"at {tokens:,} tokens and {batch:,} per step{of_size} use a peak of {rate:.2g} ({low:.2g} to {high:.2g}) with "
            f"{self.schedule}; {known}"
        )
        if self.validity.misfit:
            said = f"do not rely on the law beyond its cells, it does not describe them; {said}"
        doubtful = [_unused(self.cells, "")] + ([_unused(self.power.cells, "power ")] if self.power else [])
        return "; ".join([said, *(part for part in doubtful if part)])

    def summary(self) -> Summary:
        """The headline, and the law with its intervals."""
        numbers = [("law of the peak", self.law.formula())]
        for each in fields(self.intervals):
            ends = getattr(self.intervals, each.name)
            if ends is not None and getattr(self.law, each.name) is not None:
                numbers.append((each.name, f"{getattr(self.law, each.name):.4g} ({ends[0]:.4g} to {ends[1]:.4g})"))
        numbers.append(("cells used", f"{sum(cell.used for cell in self.cells)} of {len(self.cells)}"))
        numbers.append(("scatter around the law", f"{self.residual_sd_octaves:.2f} octaves"))
        return Summary(self.headline, numbers + [("beware", warning) for warning in self.warnings])

    def to_frame(self) -> "DataFrame":
        """A row for each cell, those of schedule "power" last: its optimum, the law's rate there, and what that costs."""
        return frame_of([*self.cells, *(self.power.cells if self.power else ())])


def _unused(cells: tuple[Cell, ...], kind: str) -> str:
    unused = sum(not cell.used for cell in cells)
    return f"{unused} of {len(cells)} {kind}cells have no optimum to count" if unused else ""
