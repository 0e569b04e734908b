"""The pictures of runs: a planned one, and one that was trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_power.plan.record import Plan
from hf_power.plots.figures import (
    BLACK,
    GREEN,
    LEGEND,
    RED,
    STRONG,
    decimal_rates,
    handle,
    new_figure,
    si,
    si_formatter,
)
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
    decimal_rates(law)
    handles = [handle("learning rate", STRONG, "", "-"), handle("milestones", RED, "o")]
    handles += [handle("95 % interval", STRONG, "", "-", linewidth=6, alpha=0.3)] if (low < high).any() else []
    figure.legend(handles=handles, ncols=3, **LEGEND)
    figure.suptitle(_of_plan(plan), fontsize=11)
    return figure


def _of_plan(plan: Plan) -> str:
    """Where the rate peaks, and what it is when the tail begins or the run ends."""
    top = max(plan.milestones, key=lambda point: point.lr)
    start, total = plan.decay_start_tokens, plan.target.tokens
    last = [point for point in plan.milestones if point.tokens <= (total if start is None else start)][-1:]
    where = "where the decay starts" if start is not None else "at the end"
    then = "".join(f", and has {point.lr:.2g} {where}" for point in last)
    return f"{si(total)} tokens in steps of {si(plan.tokens_per_step)}: Power peaks at {top.lr:.2g}{then}"


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

    The tail of an annealed model is drawn with its trunk before it, dashed and in another colour from where it begins.

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
    lrs = [point["learning_rate"] for point in trained]
    begin = run.tokens_seen - run.steps * run.tokens_per_step if run.kind == "anneal" else None
    for part, (inside, label, style) in _parts(tokens, begin).items():
        lines = {"color": part, "marker": marker, "linestyle": style}
        losses.plot([tokens[i] for i in inside], [values[i] for i in inside], linewidth=1.2, label=label, **lines)
        rates.plot([tokens[i] for i in inside], [lrs[i] for i in inside], linewidth=1.5, **lines)
    held_out = [(point["tokens"], point["eval_loss"]) for point in run.loss_curve if point.get("eval_loss") is not None]
    if held_out:
        x, y = zip(*held_out, strict=True)
        losses.plot(x, y, "o", color=RED, markersize=6, label="evaluation")
    _draw_forecast(losses, run)
    if held_out or begin is not None or len(losses.lines) > 1:
        losses.legend(frameon=False)
    losses.set_ylabel("loss (nats per token)")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("tokens seen")
    rates.xaxis.set_major_formatter(si_formatter())
    for panel in (losses, rates):
        panel.grid(alpha=0.3)
        if begin is not None:
            panel.axvline(begin, color=BLACK, linewidth=0.9, linestyle=":")
    figure.suptitle(_of_run(run), fontsize=11)
    return figure


def _parts(tokens: Sequence[float], begin: int | None) -> dict[str, tuple[list[int], str, str]]:
    """Colour -> indices of points, label and line style: the run, or the trunk and from its last point on the tail."""
    if begin is None:
        return {STRONG: (list(range(len(tokens))), "training", "-")}
    trunk = [i for i, n in enumerate(tokens) if n <= begin]
    tail = [*trunk[-1:], *range(len(trunk), len(tokens))]
    return {STRONG: (trunk, "training, trunk", "-"), GREEN: (tail, "training, tail", "--")}


def _of_run(run: Run) -> str:
    """What has come of a run: its last loss, and how often it was in trouble."""
    known = [point["loss"] for point in run.loss_curve if point.get("loss") is not None]
    loss = f", training loss {known[-1]:.3f}" if known else ""
    if run.held_out_loss is not None:
        loss = f", held-out loss {run.held_out_loss:.3f} nats per token"
    seen = run.tokens_seen or max(int(point["tokens"]) for point in run.loss_curve)
    trouble = f", {len(run.loss_spikes)} spikes" if run.loss_spikes else ""
    skipped = f", {len(run.skipped_steps)} steps skipped" if run.skipped_steps else ""
    return f"{run.name + ': ' if run.name else ''}{si(seen)} tokens{loss}{trouble}{skipped}"


def _draw_forecast(losses: "Axes", run: Run) -> None:
    """The recipe's forecast of a run that ended at each point, with its 95 % interval, where the run has noted it."""
    names = ("tokens", "forecast_loss", "forecast_low", "forecast_high")
    points = [[point[name] for name in names] for point in run.loss_curve if "forecast_loss" in point]
    if not points:
        return
    tokens, loss, low, high = zip(*points, strict=True)
    losses.fill_between(tokens, low, high, color=BLACK, alpha=0.12, linewidth=0)
    losses.plot(tokens, loss, color=BLACK, linewidth=1.0, linestyle="-.", label="forecast of a run that ends here")
