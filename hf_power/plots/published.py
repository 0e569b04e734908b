"""The picture of published laws beside the fitted one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_power.fit.published import Compared
from hf_power.plots.figures import BLACK, GRAY, LEGEND, RED, STRONG, handle, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_published(laws: Sequence[Compared]) -> "Figure":
    """Octaves of each law's rate over the optimum of each cell, a line of points a law, and what that costs on average.

    Filled points are the rates as published, open ones those with the scale of these rows, where only exponents are. Laws
    that need what the rows do not say are left out.
    """
    laws = [each for each in laws if not each.lacks]
    figure = new_figure(7.5, 0.9 + 0.5 * len(laws))
    panel = figure.subplots()
    panel.axvline(0, color=BLACK, linewidth=0.8)
    for row, each in enumerate(laws):
        color = RED if row == 0 else STRONG
        off, regret = each.off or each.scaled_off, each.regret or each.scaled_regret
        # Cells of one law are set a little apart, in their order, so that equal ones stay countable.
        heights = [row + 0.3 * (i / max(1, len(off) - 1) - 0.5) for i in range(len(off))]
        panel.plot(off, heights, "o", color=color, markersize=4, alpha=0.7, fillstyle="full" if each.off else "none")
        panel.text(
            1.01,
            row,
            f"{sum(regret) / len(regret):.4f} nats",
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=8,
        )
    panel.set_yticks(range(len(laws)), labels=[each.name for each in laws])
    panel.invert_yaxis()
    panel.grid(axis="x", color=GRAY, alpha=0.3)
    panel.set_xlabel("the law's rate over the cell's optimum (octaves), and its mean regret per token")
    figure.suptitle(_conclusion(laws), fontsize=11)
    handles = [handle("as published", BLACK, "o"), handle("with the scale of these rows", BLACK, "o", fillstyle="none")]
    figure.legend(handles=handles, ncols=2, **LEGEND)
    return figure


def _conclusion(laws: Sequence[Compared]) -> str:
    """Which law of others costs least on these cells; the first one is the fitted law."""
    costs = {each.name: each.regret or each.scaled_regret for each in laws[1:]}
    means = {name: sum(regret) / len(regret) for name, regret in costs.items() if regret}
    if not means:
        return "No published law can be tried on these cells"
    best = min(means, key=lambda name: means[name])
    scaled = next("" if each.regret else ", with the scale of these rows" for each in laws if each.name == best)
    return f"Of {len(means)} published laws {best} costs least on these cells{scaled}: {means[best]:.2g} nats"
