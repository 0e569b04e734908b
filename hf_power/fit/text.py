"""fit.json as text for people."""

from collections.abc import Mapping
from typing import Any

from hf_power.schedule import TOKENS_PER_BETA

PAPER = (4.6, -0.51, 1.0)  # a, b, c of the paper's fit of optima, Shen et al., arXiv:2408.13359, eq. 6
MAX_SD_OCTAVES = 0.25  # as far as the law may be trusted, a factor 1.19


def fit_table(fit: Mapping[str, Any]) -> str:
    """The law with its intervals, the cells, what was not used and why, Power, the paper, validity and warnings.

    Args:
        fit: the content of fit.json.
    """
    blocks = [_law_lines(fit), _cell_lines(fit["cells"])]
    if fit["power"]:
        blocks.append(_power_lines(fit["power"]))
    return "\n\n".join("\n".join(block) for block in [*blocks, _verdict_lines(fit)])


def _law_lines(fit: Mapping[str, Any]) -> list[str]:
    law, center = fit["law"], fit["center"]
    batch = "min(beta, beta_crit)" if law["critical_batch_tokens"] else "beta"
    lines = [
        f"{fit['schedule']}: lr = {law['a']:.4g} * {batch}^{law['batch_exponent']:.4g} * T^{law['b']:.4g}   "
        f"(beta = tokens per step / {TOKENS_PER_BETA}, T = tokens)",
        f"  {fit['num_rows']} runs, {fit['num_diverged']} diverged, {fit['num_failed']} failed; R2 {fit['r2']:.3f}, optima "
        f"scatter by {fit['residual_sd_octaves']:.2f} octaves, {fit['degrees_of_freedom']} degrees of freedom",
        "  parameter              value       95 % interval",
    ]
    for name in ("a", "b", "batch_exponent", "critical_batch_tokens"):
        if law[name] is not None:
            low, high = fit["intervals"][name]
            lines.append(f"  {name:<23}{law[name]:<12.4g}" + ("held" if low == high else f"{low:.4g} to {high:.4g}"))
    low, high = center["interval"]
    lines.append(
        f"  at the centre, {center['tokens']:,.0f} tokens and {center['tokens_per_step']:,.0f} tokens per step: "
        f"{center['learning_rate']:.3g} ({low:.3g} to {high:.3g})"
    )
    if fit["width_exponent"]:
        lines.append("  exponent of the width {:+.3f} ({:+.3f} to {:+.3f}), 0 under muP".format(*fit["width_exponent"]))
    return lines


def _cell_lines(cells: list[Mapping[str, Any]]) -> list[str]:
    lines = ["  width  tokens/step           tokens  optimum   95 % interval          law       off (octaves)"]
    for cell in cells:
        where = f"  {cell['width']:>5} {cell['tokens_per_step']:>12,} {cell['tokens']:>16,}  "
        if not cell["used"]:
            lines.append(f"{where}not used: {cell['reason']}")
            continue
        low, high = cell["optimum_interval"]
        span = f"{low:.3g} to {high:.3g}"
        lines.append(
            f"{where}{cell['optimum_lr']:<9.3g} {span:<22} {cell['law_lr']:<9.3g} {cell['residual_octaves']:+.2f}"
        )
    return lines


def _power_lines(power: Mapping[str, Any]) -> list[str]:
    low, high = power["interval"]
    lines = [f"power: a = {power['a']:.4g} ({low:.4g} to {high:.4g}), with b and the batch exponent of the law above"]
    for name, what in (("b_drift", "horizon"), ("batch_drift", "batch")):
        if power[name]:
            lines.append("  drift with the {} {:+.3f} ({:+.3f} to {:+.3f})".format(what, *power[name]))
    return lines + _cell_lines(power["cells"])


def _verdict_lines(fit: Mapping[str, Any]) -> list[str]:
    validity, beyond = fit["validity"], fit["validity"]["extrapolates_to"]
    alone = [f"{name} {'inside' if fit['paper'][name] else 'OUTSIDE'}" for name in ("a", "b", "batch_exponent")]
    jointly = "lies inside" if fit["paper"]["jointly"] else "lies OUTSIDE"
    return [
        f"the paper's law, {PAPER[0]:g} * beta^{PAPER[2]:g} * T^{PAPER[1]:g}, {jointly} the joint 95 % region; each number "
        f"alone: {', '.join(alone)}",
        f"measured: {validity['tokens'][0]:,} to {validity['tokens'][1]:,} tokens, {validity['tokens_per_step'][0]:,} to "
        f"{validity['tokens_per_step'][1]:,} tokens per step, widths {', '.join(str(w) for w in validity['widths'])}",
        f"the rate is known to a factor {2**MAX_SD_OCTAVES:.2f} (one standard deviation) up to {beyond['tokens']:,} tokens, "
        f"or up to {beyond['tokens_per_step']:,} tokens per step",
        *(f"WARNING {warning}" for warning in fit["warnings"]),
    ]
