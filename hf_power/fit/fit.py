"""From the rows of a sweep to the law of the optimal learning rate, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hf_power.fit.cells import fit_cells
from hf_power.fit.law import FittedLaw, Optima, draw_optima, interval, least_squares, slopes, solve_law, supported_caps
from hf_power.fit.result import Fit, PowerFit
from hf_power.fit.rows import by_cell, check_one_source, sha256_of
from hf_power.fit.validity import (
    center_of,
    check_cells,
    paper_inside,
    regret_map,
    validity_of,
    warnings_of,
    width_exponent,
)
from hf_power.records.errors import UserError
from hf_power.records.rows import Row
from hf_power.schedule import Law

_MAX_SAMPLES = 500


def fit_law(
    rows: Sequence[Row],
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
        rows: of a sweep; of other schedules than this one only "power" is looked at.
        schedule: whose optima to fit.
        batch_exponent: hold c at this; None means that it is fitted.
        critical_batch: look for beta_crit too; it is reported if it lies inside the batches and an F-test rejects at 5 %
            that there is none.
        num_samples: bootstrap draws; the first 500 are kept.
        seed: of the bootstrap.

    Raises:
        UserError: rows of several sources, or cells that are too few or too poor; says what was there and what to run.
    """
    chosen, powers = _chosen(rows, schedule)
    cells = fit_cells(chosen)
    num_diverged = sum(row.status == "diverged" for inside in by_cell(chosen).values() for row in inside)
    check_cells(cells, batch_exponent=batch_exponent, critical_batch=critical_batch)
    used, generator = [cell for cell in cells if cell.used], np.random.default_rng(seed)
    optima = Optima.of(used, num_samples, generator)
    caps, no_cap = supported_caps(optima, batch_exponent) if critical_batch else ([math.inf], None)
    num_free = 2 + (batch_exponent is None) + (len(caps) > 1)
    fitted = solve_law(optima, batch_exponent, caps, num_free, generator)
    # The generator goes from hand to hand: another order of these calls gives other draws, and another fit.json.
    power, no_power = fit_power(powers, fitted, num_samples, generator)
    return Fit(
        schedule=schedule,
        sweep_sha256=sha256_of(rows),
        num_rows=len(chosen),
        num_diverged=num_diverged,
        num_failed=sum(row.status == "failed" for row in chosen),
        num_blown_up=num_diverged - sum(row.status == "diverged" for row in chosen),
        law=fitted.law,
        intervals=fitted.intervals,
        center=center_of(fitted, optima),
        r2=fitted.r2,
        residual_sd_octaves=math.sqrt(float(fitted.residuals @ fitted.residuals) / fitted.freedom),
        degrees_of_freedom=fitted.freedom,
        paper=paper_inside(fitted, optima),
        cells=tuple(cell.against(fitted.law) for cell in cells),
        samples=tuple((2 ** s[0], s[1], s[2]) for s in fitted.samples()[:_MAX_SAMPLES].tolist()),
        map=regret_map(used, fitted),
        validity=validity_of(used, fitted),
        width_exponent=width_exponent(optima, fitted, generator),
        power=power,
        warnings=tuple([*warnings_of(cells, fitted), *(w for w in (no_cap, no_power) if w)]),
    )


def _chosen(rows: Sequence[Row], schedule: str) -> tuple[list[Row], list[Row]]:
    """The rows of the schedule, and those of "power" beside it, which must be of one source."""
    chosen = [row for row in rows if row.schedule == schedule]
    if not chosen:
        there = ", ".join(sorted({row.schedule for row in rows})) or "no rows"
        raise UserError(f"the sweep has no rows of schedule {schedule}, it has {there}: name one of them.")
    powers = [] if schedule == "power" else [row for row in rows if row.schedule == "power"]
    check_one_source([*chosen, *powers])
    return chosen, powers


def fit_power(
    rows: Sequence[Row], fitted: FittedLaw, num_samples: int, generator: np.random.Generator
) -> tuple[PowerFit | None, str | None]:
    """Power's own scale: the mean of ``optimum / (min(beta, beta_crit)**c * T**b)`` over the cells of schedule "power".

    b, c and beta_crit are held at those of `fitted`, the law of another schedule, and the interval is that of a given
    them. The drifts are the exponents of T and of beta in what is left over, with 95 % intervals: 0 if Power's optimum
    needs no knowledge of horizon and batch; None where the cells cannot tell. A sentence is returned instead where rows
    are there but not enough cells.
    """
    cells = fit_cells(rows)
    used = [cell for cell in cells if cell.used]
    if len(used) < 2:
        there = f"only {len(used)} of {len(cells)} cells of schedule power have a bracketed optimum: "
        return None, there + "run more learning rates, two cells are needed for its scale" if rows else None
    optima = Optima.of(used, num_samples, generator)
    _, b, c, cap = fitted.parameters
    log2_a = optima.lr - b * optima.tokens - c * np.minimum(optima.beta, cap)
    mean = least_squares(np.ones((len(used), 1)), log2_a, optima.sd)
    draws = draw_optima(mean, log2_a, optima.errors, generator) @ mean.solver.T
    value = float(mean.parameters[0])
    low, high = interval(value, draws[:, 0], len(used) - 1)
    columns = {"tokens": optima.tokens, "beta": optima.beta}
    varying = {name: column for name, column in columns.items() if np.ptp(column) > 0}
    found = slopes(list(varying.values()), log2_a, optima.sd, optima.errors, generator)
    drifts = dict(zip(varying, found, strict=True)) if found else {}
    law = replace(fitted.law, a=2**value)
    against = tuple(cell.against(law) for cell in cells)
    return PowerFit(law.a, (2**low, 2**high), drifts.get("tokens"), drifts.get("beta"), against), None


def fit_laws(rows: Sequence[Row], *, batch_exponent: float | None = None) -> dict[str, Law]:
    """The law of each schedule but "power" that has enough cells; those that `fit_law` refuses are left out."""
    laws = {}
    for schedule in sorted({row.schedule for row in rows} - {"power"}):
        try:
            of_schedule = [row for row in rows if row.schedule == schedule]
            laws[schedule] = fit_law(of_schedule, schedule=schedule, batch_exponent=batch_exponent).law
        except UserError:
            continue
    return laws
