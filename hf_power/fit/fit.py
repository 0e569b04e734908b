"""From the rows of a sweep to the law of the optimal learning rate, with intervals."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np

from hf_power.fit.cells import fit_cells
from hf_power.fit.form import Critical, Form, Size, choose_form
from hf_power.fit.law import FittedLaw, solve_law
from hf_power.fit.misfit import misfit_of
from hf_power.fit.optima import Optima, Parameters
from hf_power.fit.result import (
    Cell,
    Center,
    Draw,
    Fit,
    FittedCell,
    Intervals,
    OfSize,
    PaperInside,
    PowerFit,
    RegretMap,
    TriedForm,
    Validity,
)
from hf_power.fit.rows import by_cell, check_one_source, sha256_of
from hf_power.fit.squares import draw_optima, interval, least_squares, slopes, widening
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
    critical_batch: Critical = "growing",
    size: Size | None = None,
    num_samples: int = 500,
    seed: int = 0,
) -> Fit:
    """Fit ``lr = a * size**s * min(beta, beta_crit(T))**c * T**b`` to the optima of a sweep's cells.

    beta = tokens_per_step / 4096 and T is the horizon in tokens; eq. 6 of Shen et al., arXiv:2408.13359, has c = 1 and
    neither s nor beta_crit, which is a power of T. They are fitted where left-out cells show them, see
    `hf_power.fit.form.choose_form`. log2(optimum) is fitted by least squares with weights 1 / (sd**2 + spread): sd of the
    cell's optimum, spread of the cells beyond that. The 95 % intervals are Student's quantile, at used cells less
    parameters degrees of freedom, times the standard deviation in a bootstrap that redraws the noise of whole trunks and
    the cells' departures from the law (see `hf_power.fit.cells.draw_errors`).

    Args:
        rows: of a sweep; of other schedules than this one only "power" is looked at.
        schedule: whose optima to fit.
        batch_exponent: hold c at this; None means that it is fitted.
        critical_batch: the most that is looked for: "none", a "fixed" one, or a "growing" one.
        size: look for an exponent of the "parameters" or the "width" too; None: for none, as under muP.
        num_samples: bootstrap draws; the first 500 are kept.
        seed: of the bootstrap.

    Raises:
        UserError: rows of several sources, or cells that are too few or too poor; says what was there and what to run.
    """
    chosen, powers = _chosen(rows, schedule)
    cells = fit_cells(chosen)
    check_cells(cells, batch_exponent=batch_exponent)
    used, generator = [cell for cell in cells if cell.used], np.random.default_rng(seed)
    kind: Size = size or ("parameters" if len({cell.parameters for cell in used}) > 1 else "width")
    optima = Optima.of(used, num_samples, generator, kind)
    form, tried, notes = choose_form(optima, _forms(batch_exponent, critical_batch, size))
    fitted = solve_law(optima, form, generator)
    # The generator goes from hand to hand: another order of these calls gives other draws, and another fit.json.
    power, no_power = fit_power(powers, fitted, num_samples, generator)
    width = None if form.size else width_exponent(optima, fitted, generator)
    num_diverged = sum(row.status == "diverged" for inside in by_cell(chosen).values() for row in inside)
    return Fit(
        schedule=schedule,
        sweep_sha256=sha256_of(rows),
        num_rows=len(chosen),
        num_diverged=num_diverged,
        num_failed=sum(row.status == "failed" for row in chosen),
        num_blown_up=num_diverged - sum(row.status == "diverged" for row in chosen),
        **_described(cells, fitted, optima, next(each for each in tried if each.chosen)),
        forms=tried,
        by_size=_by_size(used, optima, form) if size else (),
        width_exponent=width,
        power=power,
        warnings=tuple([*warnings_of(cells, fitted), *notes, *([no_power] if no_power else [])]),
    )


def _forms(c: float | None, critical: Critical, size: Size | None) -> list[Form]:
    """The forms to try, the simplest first."""
    kinds: tuple[Critical, ...] = ("none", "fixed", "growing")
    sizes: list[Size | None] = [None, size] if size else [None]
    forms = [Form(each, kind, c) for kind in kinds[: kinds.index(critical) + 1] for each in sizes]
    return sorted(forms, key=lambda form: form.num_free)


class _Described(TypedDict):
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
    map: RegretMap
    validity: Validity


def _described(cells: Sequence[FittedCell], fitted: FittedLaw, optima: Optima, taken: TriedForm) -> _Described:
    """What a fitted law says, as fit.json has it."""
    # How far it was off at left-out cells says more of new ones than the residuals at cells that it was fitted to.
    scatter = max(fitted.scatter, taken.held_out_rms_octaves)
    used = [cell for cell in cells if cell.used]
    samples = fitted.samples()[:_MAX_SAMPLES].tolist()
    law = fitted.law
    return _Described(
        law=law,
        intervals=fitted.intervals,
        center=center_of(fitted, optima),
        r2=fitted.r2,
        residual_sd_octaves=fitted.scatter,
        scatter_octaves=scatter * widening(fitted.freedom),
        degrees_of_freedom=fitted.freedom,
        paper=paper_inside(fitted, optima),
        cells=tuple(cell.against(law) for cell in cells),
        samples=tuple(Parameters(*draw).draw() for draw in samples),
        map=regret_map(used, fitted, optima),
        validity=validity_of(used, fitted, misfit_of(optima, fitted)),
    )


def _by_size(cells: Sequence[FittedCell], optima: Optima, form: Form) -> tuple[OfSize, ...]:
    """The law of each size alone, without an exponent of the size, where there are several."""
    found = []
    for size in np.unique(optima.size) if np.ptp(optima.size) > 0 else ():
        inside = optima.size == size
        alone = [cell for cell, here in zip(cells, inside, strict=True) if here]
        number = round(2 ** float(size))
        part = Optima(*(values[..., inside] for values in optima))
        try:
            check_cells(alone, batch_exponent=form.c)
        except UserError as error:
            found.append(OfSize(number, None, None, str(error)))
            continue
        kind, _, _ = choose_form(part, _forms(form.c, form.critical, None))
        fitted = solve_law(part, kind, np.random.default_rng(0))
        found.append(OfSize(number, fitted.law, fitted.scatter, None))
    return tuple(found)


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
    optima = Optima.of(used, num_samples, generator, fitted.form.size)
    log2_a = optima.lr - fitted.parameters._replace(log2_a=0.0).log2_lr(*optima.places)
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


def fit_laws(
    rows: Sequence[Row],
    *,
    batch_exponent: float | None = None,
    critical_batch: Critical = "growing",
    size: Size | None = None,
) -> dict[str, Law]:
    """The law of each schedule but "power" that has enough cells; those that `fit_law` refuses are left out."""
    laws = {}
    for schedule in sorted({row.schedule for row in rows} - {"power"}):
        try:
            of_schedule = [row for row in rows if row.schedule == schedule]
            laws[schedule] = fit_law(
                of_schedule,
                schedule=schedule,
                batch_exponent=batch_exponent,
                critical_batch=critical_batch,
                size=size,
            ).law
        except UserError:
            continue
    return laws
