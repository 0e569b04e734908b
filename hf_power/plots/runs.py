"""The pictures of runs: a planned one, one that was trained, and those of the coordinate check."""

from typing import TYPE_CHECKING

import numpy as np

from hf_power.coordinates import MAX_SLOPE, CoordCheck
from hf_power.plan.record import Plan
from hf_power.plots.figures import BLACK, RED, STRONG, distinct_colors, new_figure, si, si_formatter
from hf_power.records.errors import UserError
from hf_power.records.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_plan(plan: Plan) -> "Figure":
    """Learning rate of a planned run with its 95 % band: over log tokens, and over tokens with the milestones."""
    tokens, lr, low, high = (
        np.array([getattr(point, name) for point in plan.curve]) for name in ("tokens", "lr", "low", "high")
    )
    total, start = plan.target.tokens, plan.decay_start_tokens
    figure = new_figure(8.0, 6.6)
    law, run = figure.subplots(2, 1, height_ratios=(1.5, 1))
    law.set_xscale("log")
    for panel in (law, run):
        panel.fill_between(tokens, low, high, color=STRONG, alpha=0.2, linewidth=0)
        panel.plot(tokens, lr, color=STRONG, linewidth=2)
        panel.set_ylabel("learning rate")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(si_formatter())
    law.set_yscale("log")
    law.set_xlim(max(tokens[0], 0.1 * plan.warmup_tokens), 1.3 * total)
    # Warmup and tail go to 0, so the scale is that of the law between them.
    inside = (tokens >= plan.warmup_tokens) & (tokens <= (total if start is None else start))
    law.set_ylim(0.2 * lr[inside].min(), 1.5 * high.max())
    _draw_corners(plan, law, run)
    _draw_milestones(plan, law, run)
    run.set_xlim(-0.01 * total, 1.06 * total)
    run.set_ylim(0, 1.3 * high.max())
    run.set_xlabel("tokens seen")
    figure.suptitle(f"{si(total)} tokens, {si(plan.tokens_per_step)} tokens per step; band: 95 % interval", fontsize=11)
    return figure


def _draw_corners(plan: Plan, law: "Axes", run: "Axes") -> None:
    corners = {"warmup ends": plan.warmup_tokens, "cap ends": plan.cap_ends_tokens}
    for what, n in {**corners, "decay starts": plan.decay_start_tokens}.items():
        if n:
            for panel in (law, run):
                panel.axvline(n, color=BLACK, linewidth=0.9, linestyle=":")
            across, label = law.get_xaxis_transform(), f"{what}, {si(n)} "
            law.text(n, 0.03, label, rotation=90, ha="right", va="bottom", fontsize=8, transform=across)


def _draw_milestones(plan: Plan, law: "Axes", run: "Axes") -> None:
    for point in plan.milestones:
        for panel in (law, run):
            panel.plot(point.tokens, point.lr, "o", color=RED, markersize=5)
        if point.what == "end" or (point.what or "").endswith("%"):
            text = f"{point.what}\n{point.lr:.2g}"
            run.annotate(text, (point.tokens, point.lr), (2, 6), textcoords="offset points", fontsize=8)


def plot_lr_and_loss(run: Run) -> "Figure":
    """Loss and learning rate of a run over the tokens seen: two panels with one axis.

    Args:
        run: the points of its loss curve have tokens and either loss (nats per token) with learning_rate, or eval_loss
            (nats per token), or all. A loss that is None or nan is a gap in the line.

    Raises:
        UserError: a run without a loss curve.
    """
    if not run.loss_curve:
        raise UserError("the run has no loss_curve to draw: pass a run with at least one point.")
    figure = new_figure(7.5, 5.5)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    trained = [point for point in run.loss_curve if "loss" in point]
    tokens = [point["tokens"] for point in trained]
    values = [float("nan") if point["loss"] is None else point["loss"] for point in trained]
    # Lone points have no line to be seen by.
    marker = "." if len(trained) < 30 else None
    losses.plot(tokens, values, color="tab:blue", linewidth=1.2, marker=marker, label="training")
    held_out = [(point["tokens"], point["eval_loss"]) for point in run.loss_curve if point.get("eval_loss") is not None]
    if held_out:
        x, y = zip(*held_out, strict=True)
        losses.plot(x, y, "o", color="tab:orange", markersize=5, label="evaluation")
        losses.legend()
    _draw_forecast(losses, run)
    losses.set_ylabel("loss (nats per token)")
    rates.plot(tokens, [point["learning_rate"] for point in trained], color="tab:green", linewidth=1.5, marker=marker)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("tokens seen")
    rates.xaxis.set_major_formatter(si_formatter())
    for panel in (losses, rates):
        panel.grid(alpha=0.3)
    if run.name:
        figure.suptitle(run.name, fontsize=11)
    return figure


def _draw_forecast(losses: "Axes", run: Run) -> None:
    """The recipe's forecast of a run that ended at each point, with its 95 % interval, where the run has noted it."""
    names = ("tokens", "forecast_loss", "forecast_low", "forecast_high")
    points = [[point[name] for name in names] for point in run.loss_curve if "forecast_loss" in point]
    if not points:
        return
    tokens, loss, low, high = zip(*points, strict=True)
    losses.fill_between(tokens, low, high, color=BLACK, alpha=0.12, linewidth=0)
    losses.plot(tokens, loss, color=BLACK, linewidth=1.0, linestyle="--", label="forecast of a run that ends here")
    losses.legend()


def plot_coord_check(check: CoordCheck, *, steps: tuple[int, ...] | None = None) -> "Figure":
    """Change of each module's output over width: both axes logarithmic, a panel per step, slopes in the legend.

    Flat lines mean that muP holds. A line whose slope is outside the limit is solid, bold and marked in the legend; a
    change that is 0 or not finite is a gap.

    The steps that are shown are by default the first and the last; one that was not measured is a UserError.
    """
    measured = sorted({row["step"] for row in check.rows})
    shown = steps or tuple(sorted({measured[0], measured[-1]}))
    missing = [step for step in shown if step not in measured]
    if missing:
        raise UserError(f"steps {missing} were not measured: choose from {measured}.")
    modules = list(dict.fromkeys(row["module"] for row in check.rows))
    widths = sorted({row["width"] for row in check.rows})
    changes = {(row["module"], row["step"], row["width"]): row["change"] for row in check.rows}
    slopes = {(s["module"], s["step"]): s["slope"] for s in check.slopes}
    figure = new_figure(5.2 * len(shown) + 0.6, 5.0 + 0.2 * len(modules))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, step in zip(panels, shown, strict=True):
        for color, module in zip(distinct_colors(len(modules)), modules, strict=True):
            slope = slopes[module, step]
            failed = not abs(slope) < MAX_SLOPE
            label = f"{module} {slope:+.2f}" + (" (!)" if failed else "")
            values = [changes[module, step, width] or float("nan") for width in widths]
            style = {"linewidth": 2.6, "linestyle": "-"} if failed else {"linewidth": 1.4, "linestyle": "--"}
            panel.plot(widths, values, marker="o", markersize=4, color=color, label=label, **style)
        panel.set_title(f"step {step}", fontsize=10)
        _set_width_axes(panel, widths)
    panels[0].set_ylabel("RMS change of the output")
    figure.suptitle(f"Coordinate check {check.verdict}", fontsize=11, color="darkgreen" if check.passed else "darkred")
    return figure


def _set_width_axes(panel: "Axes", widths: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(widths, [str(width) for width in widths])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_xlabel("width (hidden_size)")
    sizes, below = {"fontsize": 8, "title_fontsize": 8, "ncols": 2}, (0.5, -0.14)
    title = f"slopes, (!) beyond {MAX_SLOPE:g}"
    panel.legend(title=title, loc="upper center", bbox_to_anchor=below, frameon=False, **sizes)
