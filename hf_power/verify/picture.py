"""The picture of a check: the loss over the factor on the recipe's learning rate."""

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from hf_power.plots.figures import BLACK, GRAY, GREEN, LEGEND, RED, STRONG, handle, new_figure
from hf_power.verify.page import Page, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"passed": "darkgreen", "inconclusive": "#8a5a00", "FAILED": "darkred"}


def plot_verify(page: Page) -> "Figure":
    """Loss over the factor on the recipe's learning rate, the band of tolerance above the best one, and the verdict."""
    points, parabola = page.points, page.parabola
    finite = [point.loss for point in points if math.isfinite(point.loss)]
    factors = [point.factor for point in points]
    figure = new_figure(6.4, 4.8)
    panel = figure.subplots()
    panel.set_xscale("log", base=2)
    if finite:
        best = min([*finite, parabola.min_loss] if parabola else finite)
        label = f"within {page.tolerance:g} nats of the best"
        panel.axhspan(best, best + page.tolerance, color=GREEN, alpha=0.2, linewidth=0, label=label)
    else:
        panel.set_yticks([])
    if parabola:
        optimum, lowest = parabola.optimum_factor, parabola.min_loss
        x = np.geomspace(min(factors), max(factors), 100)
        panel.plot(x, lowest + parabola.curvature * np.log2(x / optimum) ** 2, color=GRAY, label="parabola")
        panel.plot(optimum, lowest, "v", color=GRAY, markersize=8, label=f"its optimum, {optimum:.2f} times")
    for point in points:
        _draw_point(panel, point)
    panel.set_xlim(min(factors) / 1.25, max(factors) * 1.25)
    panel.set_xticks(factors, [f"{factor:g}" + (" (recipe)" if factor == 1 else "") for factor in factors])
    panel.minorticks_off()
    panel.set_xlabel("factor on the recipe's learning rate")
    panel.set_ylabel("held-out loss (nats per token)")
    panel.ticklabel_format(axis="y", useOffset=False)
    panel.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(f"{page.verdict}: {page.conclusion}", 85), fontsize=10, color=COLORS[page.verdict])
    if finite:
        handles, _ = panel.get_legend_handles_labels()
        handles += [handle("the recipe's rate", STRONG, "o"), handle("other rates, bars: sd over seeds", BLACK, "o")]
        figure.legend(handles=handles, ncols=3, **LEGEND)
    return figure


def _draw_point(panel: "Axes", point: Point) -> None:
    if math.isfinite(point.loss):
        color = STRONG if point.factor == 1 else BLACK
        panel.errorbar(point.factor, point.loss, yerr=point.sd, fmt="o", color=color, markersize=8, capsize=4)
        return
    top = panel.get_xaxis_transform()
    panel.plot(point.factor, 0.95, "x", color=RED, markersize=10, markeredgewidth=2.5, transform=top)
    panel.text(point.factor, 0.9, "diverged", color=RED, ha="center", va="top", transform=top)
