"""The picture of loss curves and of the law that was fitted to them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_power.fit.curve import Curve
from hf_power.fit.curves import CurveLaw
from hf_power.plots.figures import BLACK, LEGEND, distinct_colors, handle, new_figure, si_formatter

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(law: CurveLaw, curves: Sequence[Curve], asked: Sequence[Curve] = ()) -> "Figure":
    """Losses and the law of them over the steps, and below the learning rates.

    Curves that were measured are lines with the law dashed upon them; the law alone is drawn of schedules that are asked
    about, with the 95 % interval of their end.
    """
    figure = new_figure(8.0, 6.6)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    colors = distinct_colors(len(curves) + len(asked))
    for color, curve in zip(colors, [*curves, *asked], strict=True):
        said = law.losses(curve)
        if len(curve.losses):
            losses.plot(curve.steps, curve.losses, color=color, linewidth=1.2, label=curve.name)
            losses.plot(curve.steps, said, color=BLACK, linewidth=0.9, linestyle="--")
        else:
            losses.plot(curve.steps, said, color=color, linewidth=1.8, linestyle="--", label=f"{curve.name} (forecast)")
            loss, low, high = law.final(curve)
            losses.errorbar(curve.steps[-1], loss, [[loss - low], [high - loss]], color=color, capsize=4, marker="o")
        rates.plot(curve.steps, curve.rates, color=color, linewidth=1.2)
    ends = [float(law.losses(curve)[-1]) for curve in [*curves, *asked]]
    lowest, highest = min(ends), max(ends)
    losses.set_ylim(lowest - 0.02 * lowest, highest + 0.12 * highest)
    losses.set_ylabel("loss (nats per token)")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("steps")
    rates.xaxis.set_major_formatter(si_formatter())
    for panel in (losses, rates):
        panel.grid(alpha=0.3)
    figure.suptitle(_conclusion(law, curves, asked), fontsize=11)
    handles, _ = losses.get_legend_handles_labels()
    handles.append(handle("multi-power law (arXiv:2503.12811)", BLACK, "", "--"))
    figure.legend(handles=handles, ncols=3, **LEGEND)
    return figure


def _conclusion(law: CurveLaw, curves: Sequence[Curve], asked: Sequence[Curve]) -> str:
    """How far the law is from what was measured, and the best of what was asked about."""
    off = [
        float(np.mean(np.abs(np.asarray(law.losses(curve)) - curve.losses))) for curve in curves if len(curve.losses)
    ]
    said = (
        f"The law follows {len(off)} measured curves to {max(off):.2g} nats on average"
        if off
        else "Nothing was measured"
    )
    if not asked:
        return said
    ends = {curve.name: law.final(curve) for curve in asked}
    best = min(ends, key=lambda name: ends[name][0])
    loss, low, high = ends[best]
    lowest = " lowest" if len(ends) > 1 else ""
    return f"{said};\n{best} is forecast to end{lowest}, at {loss:.3f} ({low:.3f} to {high:.3f})"
