"""The picture of the transfer measurement: the regret of each method in each held-out cell."""

import math
from statistics import median

from matplotlib.ticker import NullLocator

from hf_power.plots.figures import BLACK, STRONG, new_panels, si


def plot_transfer(table):
    """Regret of each method in each held-out cell, a panel per cell, and of all cells in the first one.

    The axis is linear up to 0.005 nats and logarithmic beyond; lines at 0.005 and 0.02. Methods are in the order of
    their median. Bars are the rows' intervals, a stroke is the median, a triangle at the right is a run that diverged.

    Args:
        table: its "rows" are dicts with method, width, tokens_per_step, tokens, regret, low, high (nats per token).

    Returns:
        A matplotlib figure.
    """
    rows = table["rows"]
    by_method = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row["regret"])
    methods = sorted(by_method, key=lambda method: -median(by_method[method]))  # the best one on top
    cells = sorted({(row["width"], row["tokens_per_step"], row["tokens"]) for row in rows})
    summary = len(cells) > 1
    shape = (2.7, 0.75 + 0.2 * len(methods))
    figure, panels = new_panels(len(cells) + summary, 4, shape, "regret (nats per token)")
    if summary:
        panels[0].set_title(f"all {len(cells)} cells, median", fontsize=9, fontweight="bold")
        for y, method in enumerate(methods):
            for x in by_method[method]:
                _draw_regret(panels[0], {"method": method, "regret": x}, y)
            panels[0].plot(median(by_method[method]), y, "|", color=_color(method), markersize=14, markeredgewidth=2.5)
    for panel, cell in zip(panels[summary:], cells, strict=True):
        width, batch, tokens = cell
        panel.set_title((f"width {width}, " if width else "") + f"{si(batch)} / step, {si(tokens)}", fontsize=9)
        for row in (row for row in rows if (row["width"], row["tokens_per_step"], row["tokens"]) == cell):
            _draw_regret(panel, row, methods.index(row["method"]))
    _set_axes(panels, rows)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(-0.6, len(methods) - 0.4)
    return figure


def _set_axes(panels, rows):
    finite = [row["regret"] for row in rows if math.isfinite(row["regret"])]
    left, right = min(-0.002, *finite, 0.0) * 1.2, max(0.05, *finite, 0.0) * 2
    for panel in panels:
        for x in (0.005, 0.02):
            panel.axvline(x, color=BLACK, linewidth=0.9, linestyle="--")
        panel.set_xscale("symlog", linthresh=0.005, linscale=0.8)
        panel.set_xlim(left, right)
        panel.set_xticks([x for x in (0, 0.005, 0.02, 0.1, 0.5, 2.0) if x < right])
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="y", alpha=0.3)


def _draw_regret(panel, row, y):
    color = _color(row["method"])
    if not math.isfinite(row["regret"]):
        panel.plot(0.98, y, ">", color=color, transform=panel.get_yaxis_transform())
        return
    if "low" in row:
        panel.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.5)
    panel.plot(row["regret"], y, "o", color=color, markersize=4.5, alpha=1.0 if "low" in row else 0.5)


def _color(method):
    return STRONG if method.startswith("power") else "0.4"
