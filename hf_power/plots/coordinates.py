"""The picture of muP's coordinate check."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_power.coordinates import MAX_SLOPE, CoordCheck
from hf_power.plots.figures import distinct_colors, distinct_lines, distinct_markers, new_figure
from hf_power.records.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_coord_check(
    check: CoordCheck,
    *,
    steps: tuple[int, ...] | None = None,
    wrong: CoordCheck | None = None,
    wrong_is: str = "standard parameterization",
) -> "Figure":
    """Change of each module's output over width: both axes logarithmic, a panel per step, slopes in the legend.

    Flat lines mean that muP holds. A line whose slope is outside the limit is bold and marked in the legend; a change that
    is 0 or not finite is a gap.

    Args:
        check: of the model.
        steps: that are shown; None: the first and the last, or beside a wrong model the first one.
        wrong: a check of the same model with a mistake in it, which is drawn beside it on the same axes, after its first
            step.
        wrong_is: the mistake.

    Raises:
        UserError: a step that was not measured.
    """
    measured = sorted({row["step"] for row in check.rows})
    shown = steps or tuple(sorted({measured[0], measured[0 if wrong else -1]}))
    missing = [step for step in shown if step not in measured]
    if missing:
        raise UserError(f"steps {missing} were not measured: choose from {measured}.")
    drawn = [(check, step, f"step {step}") for step in shown]
    if wrong is not None:
        first = min(row["step"] for row in wrong.rows)
        drawn = [(each, step, f"this model, {title}") for each, step, title in drawn]
        drawn.append((wrong, first, f"{wrong_is}, step {first}"))
    modules = list(dict.fromkeys(row["module"] for each, _, _ in drawn for row in each.rows))
    figure = new_figure(5.2 * len(drawn) + 0.6, 5.0 + 0.2 * len(modules))
    panels = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for panel, (each, step, title) in zip(panels, drawn, strict=True):
        _draw(panel, each, step, modules)
        panel.set_title(title, fontsize=10)
    panels[0].set_ylabel("RMS change of the output")
    color = "darkgreen" if check.passed else "darkred"
    said = f"muP {'holds' if check.passed else 'does NOT hold'} for this model, {check.verdict}"
    figure.suptitle(textwrap.fill(said, 60 * len(drawn)), fontsize=11, color=color)
    return figure


def _draw(panel: "Axes", check: CoordCheck, step: int, modules: Sequence[str]) -> None:
    widths = sorted({row["width"] for row in check.rows})
    changes = {(row["module"], row["step"], row["width"]): row["change"] for row in check.rows}
    slopes = {(s["module"], s["step"]): s["slope"] for s in check.slopes}
    styles = zip(
        *(many(len(modules)) for many in (distinct_colors, distinct_markers, distinct_lines)), modules, strict=True
    )
    for color, marker, line, module in styles:
        slope = slopes.get((module, step))
        if slope is None:  # The other model alone has it.
            continue
        failed = not abs(slope) < MAX_SLOPE
        label = f"{module} {slope:+.2f}" + (" (!)" if failed else "")
        values = [changes[module, step, width] or float("nan") for width in widths]
        style = {"linewidth": 2.8 if failed else 1.3, "linestyle": line, "marker": marker, "markersize": 5}
        panel.plot(widths, values, color=color, label=label, **style)
    _set_width_axes(panel, widths)


def _set_width_axes(panel: "Axes", widths: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(widths, [f"{width:,}" for width in widths])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set_xlabel("width (hidden_size)")
    sizes, below = {"fontsize": 8, "title_fontsize": 8, "ncols": 2}, (0.5, -0.14)
    title = f"slopes over the width, (!) beyond {MAX_SLOPE:g}"
    panel.legend(title=title, loc="upper center", bbox_to_anchor=below, frameon=False, handlelength=3.5, **sizes)
