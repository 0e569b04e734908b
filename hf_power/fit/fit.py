"""From the rows of a sweep to the law of the optimal learning rate, with intervals: fit.json."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from hf_power.fit.cells import Cell, fit_cells, regret
from hf_power.fit.law import (
    Law,
    Optima,
    draw_optima,
    interval,
    least_squares,
    slopes,
    solve_law,
    supported_caps,
    widening,
)
from hf_power.fit.text import MAX_SD_OCTAVES, PAPER, fit_table
from hf_power.records.errors import UserError
from hf_power.records.rows import check_one_source
from hf_power.schedule import LAW, TOKENS_PER_BETA, power_law

SCHEMA = 1
MAX_EXTRAPOLATION_OCTAVES = 4.0
_MAX_SAMPLES = 500
_MAP_POINTS = 41

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Fit:
    """The law of one schedule and how well it is known: the content of fit.json.

    Attributes:
        schedule: whose optima were fitted.
        sweep_sha256: of the rows.
        num_rows, num_diverged, num_failed: rows of the schedule, all and by status.
        law: a, b, batch_exponent, critical_batch_tokens (None: no cap).
        intervals: 95 %, of the same four.
        center: the rate at the geometric centre of the cells, where it is known best, with its interval.
        r2: share of the weighted variance of log2(optimum) that the law explains.
        residual_sd_octaves: scatter of the optima around the law.
        degrees_of_freedom: used cells less fitted parameters.
        paper: does each of the paper's a, b, batch_exponent lie in its interval, and all in the joint region? A loss that
            rises faster on one side of the optimum moves all parabolas alike, by some 0.1 octave that no interval holds.
        cells: all cells of the schedule.
        samples: bootstrap draws (a, b, batch_exponent), scaled so that their central 95 % are the intervals.
        map: mean regret over the used cells, nats, of other (a, b) at the fitted batch_exponent.
        validity: what was measured, and how far the law may be trusted beyond.
        width_exponent: value, low, high of an exponent of the width, which muP says is 0; None with one width.
        power: Power's own scale and its drifts, see `fit_power`.
        warnings: sentences.
    """

    schedule: str
    sweep_sha256: str
    num_rows: int
    num_diverged: int
    num_failed: int
    law: Numbers
    intervals: Numbers
    center: Numbers
    r2: float
    residual_sd_octaves: float
    degrees_of_freedom: int
    paper: dict[str, bool]
    cells: tuple[Cell, ...]
    samples: tuple[tuple[float, float, float], ...]
    map: Numbers
    validity: Numbers
    width_exponent: tuple[float, float, float] | None
    power: Numbers | None
    warnings: tuple[str, ...]

    def to_dict(self) -> Numbers:
        """The content of fit.json."""
        values: Numbers = {"schema": SCHEMA} | {f.name: getattr(self, f.name) for f in fields(self)}
        values["cells"] = [cell.to_dict() for cell in self.cells]
        values["samples"] = [list(sample) for sample in self.samples]
        values["width_exponent"] = list(self.width_exponent) if self.width_exponent else None
        values["warnings"] = list(self.warnings)
        return values

    def table(self) -> str:
        """The fit as text for people."""
        return fit_table(self.to_dict())


def fit_law(
    rows: Sequence[Mapping[str, Any]],
    *,
    schedule: str = "warmup_stable_decay",
    batch_exponent: float | None = None,
    critical_batch: bool = False,
    num_samples: int = 500,
    seed: int = 0,
) -> Fit:
    """Fit ``lr = a * min(beta, beta_crit)**c * T**b`` to the optima of a sweep's cells.

    beta = tokens_per_step / 4096 and T is the horizon in tokens; eq. 6 of Shen et al., arXiv:2408.13359, has c = 1 and
    no beta_crit. log2(optimum) is fitted by least squares with weights 1 / (sd**2 + s**2): sd of the cell's optimum, s
    of the cells beyond that. The 95 % intervals are Student's quantile, at used cells less parameters degrees of
    freedom, times the standard deviation in a bootstrap that redraws the noise of whole trunks and the cells' departures
    from the law (see `hf_power.fit.cells.draw_errors`).

    Args:
        rows: of `hf_power.records.rows`; of other schedules than this one only "power" is looked at.
        schedule: whose optima to fit.
        batch_exponent: hold c at this; None: fit it.
        critical_batch: look for beta_crit too; it is reported if it lies inside the batches and an F-test rejects at 5 %
            that there is none.
        num_samples: bootstrap draws; the first 500 are kept.
        seed: of the bootstrap.

    Raises:
        ValueError: rows of several sources, or cells that are too few or too poor; says what was there and what to run.
    """
    chosen = [row for row in rows if row["schedule"] == schedule]
    if not chosen:
        there = ", ".join(sorted({str(row["schedule"]) for row in rows})) or "no rows"
        raise UserError(f"the sweep has no rows of schedule {schedule}, it has {there}: name one of them.")
    powers = [] if schedule == "power" else [row for row in rows if row["schedule"] == "power"]
    check_one_source([*chosen, *powers])
    cells = fit_cells(chosen)
    used = [cell for cell in cells if cell.used]
    refuse(cells, batch_exponent=batch_exponent, critical_batch=critical_batch)
    generator = np.random.default_rng(seed)
    optima = Optima.of(used, num_samples, generator)
    caps, warning = supported_caps(optima, batch_exponent) if critical_batch else ([math.inf], None)
    num_free = 2 + (batch_exponent is None) + (len(caps) > 1)
    law = solve_law(optima, batch_exponent, caps, num_free, generator)
    power, power_warning = fit_power(powers, law, num_samples, generator)
    warnings = [*_flags(cells, law), *(w for w in (warning, power_warning) if w)]
    numbers, intervals = _numbers(law)
    by_status = [row["status"] for row in chosen]
    return Fit(
        schedule=schedule,
        sweep_sha256=_hash(rows),
        num_rows=len(chosen),
        num_diverged=by_status.count("diverged"),
        num_failed=by_status.count("failed"),
        law=numbers,
        intervals=intervals,
        center=_center(law, optima),
        r2=law.r2,
        residual_sd_octaves=math.sqrt(float(law.residuals @ law.residuals) / law.freedom),
        degrees_of_freedom=law.freedom,
        paper=_paper(law, optima, intervals),
        cells=tuple(_against_law(cell, numbers) for cell in cells),
        samples=tuple((2 ** s[0], s[1], s[2]) for s in law.samples()[:_MAX_SAMPLES].tolist()),
        map=_map(used, law),
        validity=_validity(used, law),
        width_exponent=_width_exponent(optima, law, generator),
        power=power,
        warnings=tuple(warnings),
    )


def fit_laws(rows: Sequence[Mapping[str, Any]], *, batch_exponent: float | None = None) -> dict[str, Numbers]:
    """The law of each schedule but "power" that has enough cells: a, b, batch_exponent, critical_batch_tokens.

    Schedules that `fit_law` refuses are left out.
    """
    laws = {}
    for schedule in sorted({str(row["schedule"]) for row in rows} - {"power"}):
        try:
            laws[schedule] = fit_law(
                [row for row in rows if row["schedule"] == schedule], schedule=schedule, batch_exponent=batch_exponent
            ).law
        except UserError:
            continue
    return laws


def refuse(cells: Sequence[Cell], *, batch_exponent: float | None = None, critical_batch: bool = False) -> None:
    """Raise if the cells cannot carry the law.

    Raises:
        ValueError: what was there, and what to run.
    """
    used = [cell for cell in cells if cell.used]
    horizons, batches = sorted({c.tokens for c in used}), sorted({c.tokens_per_step for c in used})
    num_free = 2 + (batch_exponent is None) + critical_batch
    there = (
        f"{len(used)} of {len(cells)} cells have a bracketed optimum, at {len(horizons)} horizons and {len(batches)} "
        "batches"
    )
    missing = next((cell for cell in cells if not cell.used), None)
    if len(used) < 3 or len(used) <= num_free:
        why = f" (of {missing.name()}: {missing.reason})" if missing else ""
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
    if critical_batch and len(batches) < 4:
        raise UserError(f"{there}, too few for a critical batch: run at least 4 batches, or do not ask for one.")
    if len(batches) > 1 and batch_exponent is None and abs(_correlation(used)) > 0.98:
        raise UserError(
            f"{there}, but horizon and batch change together, so that b and the batch exponent cannot be told apart: run "
            "each batch at two horizons, or hold batch_exponent at 1."
        )


def _correlation(cells: Sequence[Cell]) -> float:
    return float(np.corrcoef(np.log([(c.tokens, c.tokens_per_step) for c in cells]).T)[0, 1])


def _flags(cells: Sequence[Cell], law: Law) -> list[str]:
    """What a user should know before trusting the law."""
    used = [cell for cell in cells if cell.used]
    flags = []
    if 2 * len(used) < len(cells):
        flags.append(f"only {len(used)} of {len(cells)} cells have a bracketed optimum: the others may lie elsewhere")
    wide = [cell for cell in used if _step_octaves(cell) > 2 + 1e-6]
    if wide:
        flags.append(f"the learning rates of {len(wide)} cells are more than a factor 4 apart: run rates in between")
    if not used[0].noise_known:
        flags.append("nothing tells the noise of a run: the intervals rest on the spacing alone, run a second seed")
    if len({cell.tokens_per_step for cell in used}) > 1 and 0.9 < abs(_correlation(used)) <= 0.98:
        flags.append("horizon and batch nearly change together: b and the batch exponent are hard to tell apart")
    if law.parameters[1] >= 0:
        flags.append(f"b is {law.parameters[1]:.3g}, not negative: Power needs a rate that falls with the tokens")
    return flags


def _step_octaves(cell: Cell) -> float:
    """The widest gap between the learning rates of the cell's parabola."""
    return float(np.diff(np.unique([run.log2_lr for run in cell.runs])).max())


def _hash(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = sorted(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _numbers(law: Law) -> tuple[Numbers, Numbers]:
    log2_a, b, c, cap = law.parameters
    low, high = law.interval(0)
    capped = math.isfinite(cap)
    numbers: Numbers = {"a": 2**log2_a, "b": b, "batch_exponent": c}
    intervals: Numbers = {"a": [2**low, 2**high], "b": list(law.interval(1)), "batch_exponent": list(law.interval(2))}
    numbers["critical_batch_tokens"] = 2**cap * TOKENS_PER_BETA if capped else None
    intervals["critical_batch_tokens"] = [2**x * TOKENS_PER_BETA for x in law.interval(3)] if capped else None
    return numbers, intervals


def _center(law: Law, optima: Optima) -> Numbers:
    tokens, beta = float(optima.tokens.mean()), float(optima.beta.mean())
    rate = law.log2_lr(tokens, beta)
    low, high = interval(rate, law.log2_lr_draws(tokens, beta), law.freedom)
    return {
        "tokens": 2**tokens,
        "tokens_per_step": 2**beta * TOKENS_PER_BETA,
        "learning_rate": 2**rate,
        "interval": [2**low, 2**high],
    }


def _paper(law: Law, optima: Optima, intervals: Numbers) -> dict[str, bool]:
    names = ("a", "b", "batch_exponent")
    inside = {
        name: intervals[name][0] <= x <= intervals[name][1] or math.isclose(x, intervals[name][0])
        for name, x in zip(names, PAPER, strict=True)
    }
    joint = law.contains(*PAPER, float(optima.tokens.mean()), float(optima.beta.mean()))
    return {**inside, "jointly": joint}


def _against_law(cell: Cell, law: Numbers) -> Cell:
    lr = law_lr(law, tokens=cell.tokens, tokens_per_step=cell.tokens_per_step)
    if cell.optimum_lr is None:
        return replace(cell, law_lr=lr)
    return replace(cell, law_lr=lr, residual_octaves=math.log2(cell.optimum_lr / lr), regret=regret(cell, lr))


def law_lr(law: Mapping[str, Any], *, tokens: float, tokens_per_step: float) -> float:
    """The rate of a fitted law: ``a * min(beta, beta_crit)**c * T**b``, of `Fit.law` or fit.json's "law"."""
    return power_law(tokens, tokens_per_step=tokens_per_step, **{name: law[name] for name in LAW})


def _map(cells: Sequence[Cell], law: Law) -> Numbers:
    """Mean regret over (a, b): the fit and the paper with a margin, a as wide as the ridge of good pairs needs."""
    log2_a, b, c, cap = law.parameters
    optimum = np.log2([cell.optimum_lr or math.nan for cell in cells])
    curvature = np.array([cell.curvature for cell in cells], dtype=np.float64)
    tokens = np.log2([cell.tokens for cell in cells])
    beta = np.minimum(np.log2([cell.tokens_per_step / TOKENS_PER_BETA for cell in cells]), cap)
    low, high = min(b, PAPER[1], law.interval(1)[0]), max(b, PAPER[1], law.interval(1)[1])
    bs = np.linspace(low - 0.05, high + 0.05, _MAP_POINTS)
    ridge = log2_a + (b - bs[[0, -1]]) * tokens.mean()  # same rate at the centre
    ends = sorted([*ridge, math.log2(PAPER[0])])
    log2_as = np.linspace(ends[0] - 1, ends[-1] + 1, _MAP_POINTS)
    rate = log2_as[None, :, None] + bs[:, None, None] * tokens + c * beta
    nats = (curvature * (rate - optimum) ** 2).mean(axis=2)
    return {"a": (2**log2_as).tolist(), "b": bs.tolist(), "regret": nats.tolist()}


def _validity(cells: Sequence[Cell], law: Law) -> Numbers:
    """What was measured, and how far the law may be trusted beyond.

    extrapolates_to: the largest tokens and the largest batch, each with the other at its largest measured value, at
    which the standard deviation of log2 of the law's rate is at most 0.25, and no more than 16 times the largest
    measured; sd_octaves is the larger one of the two there.
    """
    tokens, batches = sorted(cell.tokens for cell in cells), sorted(cell.tokens_per_step for cell in cells)
    top, side = math.log2(tokens[-1]), math.log2(batches[-1] / TOKENS_PER_BETA)

    def sd(more_tokens: float, more_batch: float) -> float:
        return widening(law.freedom) * float(law.log2_lr_draws(top + more_tokens, side + more_batch).std())

    steps = np.arange(0.0, MAX_EXTRAPOLATION_OCTAVES + 0.01, 0.25)
    far = max((x for x in steps if sd(x, 0.0) <= MAX_SD_OCTAVES), default=0.0)
    large = max((x for x in steps if sd(0.0, x) <= MAX_SD_OCTAVES), default=0.0)
    return {
        "widths": sorted({cell.width for cell in cells}),
        "tokens_per_step": [batches[0], batches[-1]],
        "tokens": [tokens[0], tokens[-1]],
        "extrapolates_to": {
            "tokens": round(tokens[-1] * 2**far),
            "tokens_per_step": round(batches[-1] * 2**large),
            "sd_octaves": max(sd(far, 0.0), sd(0.0, large)),
        },
    }


def _width_exponent(optima: Optima, law: Law, generator: np.random.Generator) -> tuple[float, float, float] | None:
    """Exponent of the width beside those of the law; None where the cells cannot tell it."""
    _, _, c, cap = law.parameters
    beta = np.minimum(optima.beta, cap)
    held = law.c_held
    columns = [optima.width, optima.tokens] if held else [optima.width, optima.tokens, beta]
    found = slopes(columns, optima.lr - c * beta if held else optima.lr, optima.sd, optima.errors, generator)
    return found[0] if found else None


def fit_power(
    rows: Sequence[Mapping[str, Any]], law: Law, num_samples: int, generator: np.random.Generator
) -> tuple[Numbers | None, str | None]:
    """Power's own scale: the mean of ``optimum / (min(beta, beta_crit)**c * T**b)`` over the cells of schedule "power".

    b, c and beta_crit are held at the law's, and the interval is that of a given them. The drifts are the exponents of T
    and of beta in what is left over, with 95 % intervals: 0 if Power's optimum needs no knowledge of horizon and batch;
    None where the cells cannot tell.

    Returns:
        fit.json's "power", and a sentence where rows are there but not enough cells.
    """
    cells = fit_cells(rows)
    used = [cell for cell in cells if cell.used]
    if len(used) < 2:
        there = f"only {len(used)} of {len(cells)} cells of schedule power have a bracketed optimum: "
        return None, there + "run more learning rates, two cells are needed for its scale" if rows else None
    optima = Optima.of(used, num_samples, generator)
    _, b, c, cap = law.parameters
    log2_a = optima.lr - b * optima.tokens - c * np.minimum(optima.beta, cap)
    mean = least_squares(np.ones((len(used), 1)), log2_a, optima.sd)
    draws = draw_optima(mean, log2_a, optima.errors, generator) @ mean.solver.T
    value = float(mean.parameters[0])
    columns = {"b_drift": optima.tokens, "batch_drift": optima.beta}
    varying = {name: column for name, column in columns.items() if np.ptp(column) > 0}
    found = slopes(list(varying.values()), log2_a, optima.sd, optima.errors, generator) or []
    drifts = dict(zip(varying, found, strict=False))  # none where the cells cannot tell
    numbers = _numbers(law)[0] | {"a": 2**value}
    return {
        "a": 2**value,
        "interval": [2**x for x in interval(value, draws[:, 0], len(used) - 1)],
        **{name: list(drifts[name]) if name in drifts else None for name in columns},
        "cells": [_against_law(cell, numbers).to_dict() for cell in cells],
    }, None
