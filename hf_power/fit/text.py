"""A fit as text for people."""

from collections.abc import Sequence
from dataclasses import fields

from hf_power.fit.result import Cell, Fit, PowerFit
from hf_power.fit.validity import MAX_SD_OCTAVES
from hf_power.schedule import PAPER_OPTIMA, TOKENS_PER_BETA


def fit_text(fit: Fit) -> str:
    """The law with its intervals, the cells, what was not used and why, Power, the paper, validity and warnings."""
    blocks = [[fit.headline], _law_lines(fit), _cell_lines(fit.cells)]
    if fit.power:
        blocks.append(_power_lines(fit.power))
    return "\n\n".join("\n".join(block) for block in [*blocks, _verdict_lines(fit)])


def _law_lines(fit: Fit) -> list[str]:
    law, center = fit.law, fit.center
    growth = f" * (T / 1e9)^{law.critical_batch_growth:.3g}" if law.critical_batch_growth else ""
    batch = f"min(beta, beta_crit{growth})" if law.critical_batch_tokens else "beta"
    size = f" * {law.size}^{law.size_exponent:.4g}" if law.size else ""
    blown_up = f" ({fit.num_blown_up} of them finished far above their cell's best)" if fit.num_blown_up else ""
    lines = [
        f"{fit.schedule}: lr = {law.a:.4g}{size} * {batch}^{law.batch_exponent:.4g} * T^{law.b:.4g}   "
        f"(beta = tokens per step / {TOKENS_PER_BETA}, T = tokens)",
        f"  {fit.num_rows} runs, {fit.num_diverged} diverged{blown_up}, {fit.num_failed} failed; R2 {fit.r2:.3f}, optima "
        f"scatter by {fit.residual_sd_octaves:.2f} octaves, {fit.degrees_of_freedom} degrees of freedom",
        "  parameter              value       95 % interval",
    ]
    for field in fields(fit.intervals):
        value, ends = getattr(law, field.name), getattr(fit.intervals, field.name)
        if value is not None and ends is not None:
            low, high = ends
            lines.append(f"  {field.name:<23}{value:<12.4g}" + ("held" if low == high else f"{low:.4g} to {high:.4g}"))
    low, high = center.interval
    middle = f"{center.size:,.0f} {law.size}, " if center.size else ""
    lines.append(
        f"  at the centre, {middle}{center.tokens:,.0f} tokens and {center.tokens_per_step:,.0f} tokens per step: "
        f"{center.learning_rate:.3g} ({low:.3g} to {high:.3g})"
    )
    _, low, high = fit.predict(center.tokens, center.tokens_per_step, center.size)
    lines.append(
        f"  the optimum of a new cell there: {low:.3g} to {high:.3g}, by the law's interval and the cells' scatter"
    )
    if skew := next((cell.skew for cell in fit.cells if cell.used), 0.0):
        lines.append(
            f"  the losses' U is skewed: an octave above the optimum costs {4**skew:.2f} times as much as one below"
        )
    if fit.width_exponent:
        lines.append("  exponent of the width {:+.3f} ({:+.3f} to {:+.3f}), 0 under muP".format(*fit.width_exponent))
    return [*lines, *_form_lines(fit)]


def _form_lines(fit: Fit) -> list[str]:
    """The forms that were tried, and the law of each size alone."""
    lines = []
    if len(fit.forms) > 1:
        lines.append("  forms tried                                        parameters  off at left-out cells (octaves)")
        lines += [
            f"  {form.name:<52} {form.num_parameters:>9}  {form.held_out_rms_octaves:.3f}{' taken' if form.chosen else ''}"
            for form in fit.forms
        ]
    for alone in fit.by_size:
        if alone.law is None:
            lines.append(f"  size {alone.size:,} alone: none, {alone.reason}")
            continue
        law, critical = alone.law, ""
        if law.critical_batch_tokens:
            grows = f" * (T / 1e9)^{law.critical_batch_growth:.2g}" if law.critical_batch_growth else ""
            critical = f", critical batch {law.critical_batch_tokens:,.0f}{grows}"
        lines.append(
            f"  size {alone.size:,} alone: lr = {law.a:.3g} * beta^{law.batch_exponent:.3g} * T^{law.b:.3g}{critical}, "
            f"scatter {alone.scatter_octaves:.2f} octaves"
        )
    return lines


def _cell_lines(cells: Sequence[Cell]) -> list[str]:
    # Models of one width may differ in their parameters, and then these tell them apart.
    named = len({(cell.width, cell.parameters) for cell in cells}) == len({cell.width for cell in cells})
    name = "width" if named and any(cell.width for cell in cells) else "parameters"
    lines = [f"  {name:>12}  tokens/step           tokens  optimum   95 % interval          law       off (octaves)"]
    for cell in cells:
        where = f"  {getattr(cell, name) or 0:>12,} {cell.tokens_per_step:>12,} {cell.tokens:>16,}  "
        if cell.optimum_interval is None:
            lines.append(f"{where}not used: {cell.reason}")
            continue
        low, high = cell.optimum_interval
        span = f"{low:.3g} to {high:.3g}"
        lines.append(f"{where}{cell.optimum_lr:<9.3g} {span:<22} {cell.law_lr:<9.3g} {cell.residual_octaves:+.2f}")
    return lines


def _power_lines(power: PowerFit) -> list[str]:
    low, high = power.interval
    lines = [f"power: a = {power.a:.4g} ({low:.4g} to {high:.4g}), with b and the batch exponent of the law above"]
    for drift, what in ((power.b_drift, "horizon"), (power.batch_drift, "batch")):
        if drift:
            lines.append("  drift with the {} {:+.3f} ({:+.3f} to {:+.3f})".format(what, *drift))
    return lines + _cell_lines(power.cells)


def _verdict_lines(fit: Fit) -> list[str]:
    validity, beyond, paper = fit.validity, fit.validity.extrapolates_to, fit.paper
    alone = [f"{name} {'inside' if getattr(paper, name) else 'OUTSIDE'}" for name in ("a", "b", "batch_exponent")]
    jointly = "lies inside" if paper.jointly else "lies OUTSIDE"
    law = PAPER_OPTIMA
    reach = (
        f"the rate is known to a factor {2**MAX_SD_OCTAVES:.2f} (one standard deviation) up to {beyond.tokens:,} tokens, "
        f"or up to {beyond.tokens_per_step:,} tokens per step"
    )
    if beyond.sd_octaves > MAX_SD_OCTAVES:
        reach = (
            f"the rate is known to a factor {2**beyond.sd_octaves:.2g} only (one standard deviation) where the cells end, so do not go "
            "beyond them: run longer horizons or more seeds"
        )
    if validity.misfit:
        reach = "nothing is claimed beyond these cells, for within them"
    sizes = f", {validity.parameters[0]:,} to {validity.parameters[-1]:,} parameters" if validity.parameters else ""
    return [
        f"the paper's law, {law.a:g} * beta^{law.batch_exponent:g} * T^{law.b:g}, {jointly} the joint 95 % region; each "
        f"number alone: {', '.join(alone)}",
        f"measured: {validity.tokens[0]:,} to {validity.tokens[1]:,} tokens, {validity.tokens_per_step[0]:,} to "
        f"{validity.tokens_per_step[1]:,} tokens per step, widths {', '.join(str(w) for w in validity.widths)}{sizes}",
        reach,
        *(f"MISFIT {sentence}" for sentence in validity.misfit),
        *(f"WARNING {warning}" for warning in fit.warnings),
    ]
