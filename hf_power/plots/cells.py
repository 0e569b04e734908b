"""The picture of a sweep's cells: loss over learning rate."""

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hf_power.fit.result import Cell, Fit, rates_near
from hf_power.plots.figures import BLACK, GRAY, LEGEND, Color, distinct_markers, handle, new_panels, ordered_colors, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 20
MOST_LABELS = 6  # Of an axis, so that they do not touch.
_AT_TOP = {"^": "higher than shown", "x": "diverged"}


class _Style(NamedTuple):
    """How a horizon is drawn: its colour, its marker, and its row in the strip below zero."""

    color: Color
    marker: str
    row: float


def plot_cells(fit: Fit) -> "Figure":
    """Loss over learning rate: a panel per model and batch, a U-curve per horizon, all above their own minimum.

    A point is the mean over seeds, with the sd between them; the curve is the cell's parabola over the runs that it was
    fitted to, and the ticks are the rates that were run. In the strip below zero a bar is the 95 % interval of the optimum, a stroke the law's rate. Runs that are
    higher than the panel are triangles at its top, diverged ones are crosses there. Unused cells are gray.
    """
    groups: dict[tuple[int, int, int], list[Cell]] = {}
    for cell in sorted(fit.cells, key=lambda cell: (*_model(cell), cell.tokens_per_step, cell.tokens)):
        groups.setdefault((*_model(cell), cell.tokens_per_step), []).append(cell)
    num_batches = len({batch for *_, batch in groups})
    same_width = len({_model(cell) for cell in fit.cells}) == len({cell.width for cell in fit.cells})
    num_columns = num_batches if num_batches <= 5 else 4
    figure, panels = new_panels(len(groups), num_columns, (3.1, 2.9), "learning rate")
    top = 1.15 * max((_height(cell) for cell in fit.cells), default=0.0) or 0.1
    strip = 0.07 * top
    styles = _styles(fit, strip)
    notes = []
    for panel, ((width, parameters, batch), group) in zip(panels, groups.items(), strict=True):
        panel.axhline(0, color=BLACK, linewidth=0.8)
        for cell in group:
            _draw_cell(panel, cell, styles[cell.tokens], top)
        size = f"width {width}, " if width else ""
        size = size if same_width else f"{si(parameters)} parameters, "
        panel.set_title(f"{size}{si(batch)} tokens per step", fontsize=9)
        notes.append(_reasons(group))
        panel.text(0.5, 0.97, notes[-1], transform=panel.transAxes, ha="center", va="top", fontsize=7, color="0.35")
    _swept_rates(panels[0], fit.cells)
    num_lines = max(len(note.splitlines()) for note in notes)
    panels[0].set_ylim(-strip * (len(styles) + 1), top * (1 + 0.08 * num_lines))
    panels[0].set_yticks([tick for tick in panels[0].get_yticks() if 0 <= tick <= top])
    figure.supylabel("loss above its minimum (nats per token)", fontsize=10)
    figure.suptitle(textwrap.fill(_conclusion(fit.cells), int(12 * figure.get_figwidth())), fontsize=10)
    _add_legend(figure, panels, styles, all(cell.used for cell in fit.cells), ncols=max(3, 2 * num_columns))
    return figure


def _conclusion(cells: Sequence[Cell]) -> str:
    """How many cells show a best rate, and how far the law is from it."""
    used = [cell for cell in cells if cell.used]
    kind = "Power: " if cells and cells[0].schedule == "power" else ""
    said = f"{kind}{len(used)} of {len(cells)} cells show a best rate between those that were run"
    off = [abs(cell.residual_octaves) for cell in used if cell.residual_octaves is not None]
    costs = [cell.regret for cell in used if cell.regret is not None]
    if not off or not costs:
        return said
    return f"{said}; the law is at most {max(off):.2f} octaves off, which costs up to {max(costs):.4f} nats per token"


def pages_of(fit: Fit) -> dict[str, Fit]:
    """The fit with the cells of one picture each, by the picture's name.

    It is "cells", or where panels are many one per model, and "cells-power" for those of schedule "power".
    """
    pages = _pages_of_law(fit)
    return pages | ({"cells-power": replace(fit, cells=fit.power.cells)} if fit.power and fit.power.cells else {})


def _pages_of_law(fit: Fit) -> dict[str, Fit]:
    panels = {(*_model(cell), cell.tokens_per_step) for cell in fit.cells}
    models = sorted({_model(cell) for cell in fit.cells})
    if len(panels) <= MAX_PANELS or len(models) == 1:
        return {"cells": fit}
    return {
        f"cells-{parameters or width}": replace(
            fit, cells=tuple(c for c in fit.cells if _model(c) == (width, parameters))
        )
        for width, parameters in models
    }


def _model(cell: Cell) -> tuple[int, int]:
    return cell.width, cell.parameters or 0


def _styles(fit: Fit, strip: float) -> dict[int, _Style]:
    horizons = sorted({cell.tokens for cell in fit.cells})
    colors, markers = ordered_colors(len(horizons)), distinct_markers(len(horizons))
    return {n: _Style(colors[i], markers[i], -strip * (1 + i)) for i, n in enumerate(horizons)}


def _add_legend(
    figure: "Figure", panels: "Sequence[Axes]", styles: dict[int, _Style], all_used: bool, *, ncols: int
) -> None:
    handles = [handle(f"{si(tokens)} tokens", style.color, style.marker, "-") for tokens, style in styles.items()]
    handles.append(handle("optimum, 95 % interval", BLACK, "", "-", linewidth=2.5))
    handles.append(handle("the law's rate", BLACK, "|", markersize=8, markeredgewidth=1.5))
    handles += [] if all_used else [handle("not used", GRAY, "", "-")]
    drawn = {line.get_marker() for panel in panels for line in panel.lines}
    handles += [handle(label, BLACK, mark) for mark, label in _AT_TOP.items() if mark in drawn]
    figure.legend(handles=handles, ncols=ncols, **LEGEND)


def _height(cell: Cell) -> float:
    """How far the drawn part of a parabola rises, nats."""
    return max(map(cell.regret_at, _window(cell))) if cell.used else 0.0


def _window(cell: Cell) -> tuple[float, float]:
    """Learning rates between which the parabola was fitted, see `hf_power.fit.cells.fit_cells`."""
    finite = _finite(cell)
    rates, losses = list(finite), list(finite.values())
    near = rates_near(rates, losses.index(min(losses)))
    return near[0], near[-1]


def _finite(cell: Cell) -> dict[float, float]:
    pairs = zip(cell.learning_rates, cell.losses, strict=True)
    return {rate: loss for rate, loss in pairs if math.isfinite(loss)}


def _draw_cell(panel: "Axes", cell: Cell, style: _Style, top: float) -> None:
    color = style.color if cell.used else GRAY
    finite = _finite(cell)
    for rate in (*cell.learning_rates, *cell.diverged):
        if rate not in finite:
            panel.plot(rate, 0.97 * top, "x", color=color, markersize=5)
    if not finite:
        return
    floor = cell.min_loss if cell.used and cell.min_loss is not None else min(finite.values())
    above = {rate: loss - floor for rate, loss in finite.items()}
    shown = {rate: nats for rate, nats in above.items() if nats <= top}
    for rate in above.keys() - shown.keys():
        panel.plot(rate, 0.97 * top, "^", color=color, markersize=5)
    line = {"linestyle": ""} if cell.used else {"linestyle": "-", "linewidth": 1.0}
    bars: dict[str, Any] = {"yerr": cell.loss_sd, "elinewidth": 0.8, "capsize": 1.5, **line}
    panel.errorbar(list(shown), list(shown.values()), color=color, marker=style.marker, markersize=4, **bars)
    if not cell.used:
        return
    rates = np.geomspace(*_window(cell), 60)
    panel.plot(rates, [cell.regret_at(rate) for rate in rates], color=color, linewidth=1.3)
    optimum = cell.optimum()
    panel.plot(optimum.interval, [style.row, style.row], color=color, linewidth=2.5, solid_capstyle="butt")
    panel.plot(optimum.lr, style.row, marker=style.marker, color=color, markersize=4)
    panel.plot(cell.law_lr or math.nan, style.row, marker="|", color=BLACK, markersize=8, markeredgewidth=1.5)


def _reasons(group: Sequence[Cell]) -> str:
    """Horizons by the short reason why they are not used."""
    reasons: dict[str, list[str]] = {}
    for cell in group:
        if not cell.used:
            reasons.setdefault(re.split("[,:]", cell.reason or "not used")[0], []).append(si(cell.tokens))
    return "\n".join(textwrap.fill(f"{', '.join(tokens)}: {reason}", 38) for reason, tokens in reasons.items())


def _swept_rates(panel: "Axes", cells: Sequence[Cell]) -> None:
    """A log2 axis with a tick at each rate that was run, written as decimals where there is room."""
    from matplotlib.ticker import NullLocator

    rates = sorted({rate for cell in cells for rate in (*cell.learning_rates, *cell.diverged)})
    panel.set_xscale("log", base=2)
    apart = math.log2(rates[-1] / rates[0]) / MOST_LABELS
    written: list[float] = []
    for rate in rates:
        if not written or math.log2(rate / written[-1]) >= apart:
            written.append(rate)
    panel.set_xticks(rates, [f"{rate:.2g}" if rate in written else "" for rate in rates])
    panel.xaxis.set_minor_locator(NullLocator())
