"""Pictures of a fitted law: its rate over the tokens, and the regret of other laws."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_power.fit.result import Cell, Fit
from hf_power.plots.figures import (
    BLACK,
    GRAY,
    LEGEND,
    RED,
    Color,
    decimal_rates,
    distinct_markers,
    handle,
    new_figure,
    ordered_colors,
    si,
    si_formatter,
)
from hf_power.records.errors import UserError
from hf_power.schedule import PAPER_OPTIMA, Law

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FINE = 300  # Points of the map's surface along either side.
_NATS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_Array = NDArray[np.float64]


class _Styles(NamedTuple):
    """Colours by batch, markers by width, and the kinds of cells that are drawn side by side."""

    colors: dict[int, Color]
    markers: dict[int, str]
    kinds: list[tuple[int, int]]

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> "_Styles":
        batches, widths = sorted({cell.tokens_per_step for cell in cells}), sorted({cell.width for cell in cells})
        return cls(
            dict(zip(batches, ordered_colors(len(batches)), strict=True)),
            dict(zip(widths, distinct_markers(len(widths)), strict=True)),
            sorted({(cell.width, cell.tokens_per_step) for cell in cells}),
        )


def plot_law(fit: Fit) -> "Figure":
    """Optimal learning rate over tokens with the law, and what is left of it in octaves.

    Bars are 95 % intervals above and standard deviations below; the bands are the central 95 % of the law's bootstrap
    draws. A law with a size is drawn at the geometric mean of the sizes. The paper's law (Shen et al., arXiv:2408.13359, eq. 6) is dashed, for the same batches.

    Raises:
        UserError: a fit without a used cell.
    """
    used = [cell for cell in fit.cells if cell.used]
    if not used:
        raise UserError("the fit has no used cell to draw: run learning rates on both sides of the optimum.")
    figure = new_figure(7.5, 7.0)
    panel, rest = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    styles = _Styles.of(used)
    horizons = [cell.tokens for cell in used]
    tokens = np.geomspace(min(horizons) / 1.4, max(horizons) * 1.4, 25)
    for batch, color in styles.colors.items():
        _draw_law(panel, fit, batch, tokens, color)
        rates = [PAPER_OPTIMA.lr(n, batch) for n in tokens]
        panel.plot(tokens, rates, color=color, linewidth=1.2, linestyle="--")
    rest.axhspan(-fit.residual_sd_octaves, fit.residual_sd_octaves, color=GRAY, alpha=0.25, linewidth=0)
    rest.axhline(0, color=BLACK, linewidth=0.8)
    for cell in used:
        _draw_optimum(panel, rest, cell, styles)
    _set_law_axes(panel, rest)
    figure.suptitle(_conclusion(fit), fontsize=11)
    handles = [handle(f"{si(batch)} tokens per step", color, "", "-") for batch, color in styles.colors.items()]
    known = [(width, marker) for width, marker in styles.markers.items() if width]
    handles += [handle(f"best rate, width {width}", BLACK, marker) for width, marker in known]
    handles += [] if known else [handle("best rate", BLACK, styles.markers[0])]
    handles.append(handle("the paper's law", BLACK, "", "--"))
    handles.append(handle("95 %, below the scatter", GRAY, "", "-", linewidth=6, alpha=0.4))
    figure.legend(handles=handles, ncols=3, **LEGEND)
    return figure


def _conclusion(fit: Fit) -> str:
    """How the best rate moves, how well that is known, and the law."""
    law, (low, high) = fit.law, fit.intervals.b
    known = f" (+-{(high - low) / 2:.2f})" if low < high else ""
    moves = ["falls" if exponent < 0 else "grows" for exponent in (law.b, law.batch_exponent)]
    beta = "min(beta, beta_crit)" if law.critical_batch_tokens else "beta"
    size = f"{law.size}^{law.size_exponent:.3g} * " if law.size else ""
    formula = f"lr = {law.a:.3g} * {size}{beta}^{law.batch_exponent:.3g} * tokens^{law.b:.3g}"
    return (
        f"The best rate {moves[0]} as tokens^{law.b:.2f}{known} and {moves[1]} as batch^{law.batch_exponent:.2f}\n"
        f"{formula} ({fit.schedule}, R2 {fit.r2:.3f})"
    )


def _set_law_axes(panel: "Axes", rest: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    panel.set_xscale("log")
    panel.set_yscale("log")
    decimal_rates(panel)
    rest.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rest.xaxis.set_major_formatter(si_formatter())
    rest.xaxis.set_minor_locator(NullLocator())
    panel.set_ylabel("optimal learning rate")
    rest.set_ylabel("optimum over law\n(octaves)")
    rest.set_xlabel("horizon (tokens)")
    for each in (panel, rest):
        each.grid(alpha=0.3)


def _draw_optimum(panel: "Axes", rest: "Axes", cell: Cell, styles: _Styles) -> None:
    widths, kinds = list(styles.markers), styles.kinds
    style: dict[str, Any] = {"color": styles.colors[cell.tokens_per_step], "marker": styles.markers[cell.width]}
    style |= {"capsize": 2, "linestyle": "", "markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
    optimum = cell.optimum()
    low, high = optimum.interval
    x = cell.tokens * _aside(widths.index(cell.width), len(widths))
    panel.errorbar(x, optimum.lr, yerr=[[optimum.lr - low], [high - optimum.lr]], **style)
    x = cell.tokens * _aside(kinds.index((cell.width, cell.tokens_per_step)), len(kinds))
    rest.errorbar(x, cell.residual_octaves or 0.0, yerr=optimum.sd_octaves, **style)


def _aside(index: int, count: int) -> float:
    """A factor on the tokens that sets cells of one horizon side by side."""
    return float(1.3 ** ((index + 0.5) / count - 0.5))


def _draw_law(panel: "Axes", fit: Fit, batch: int, tokens: _Array, color: Color) -> None:
    rates = [fit.law.lr(n, batch, fit.center.size) for n in tokens]
    panel.plot(tokens, rates, color=color, linewidth=1.8)
    # Said at the line itself too, for people who do not tell the colours apart.
    panel.annotate(si(batch), (tokens[-1], rates[-1]), (4, 0), textcoords="offset points", fontsize=8, va="center")
    draws = [Law(*draw[:5], fit.law.size, draw[5]) for draw in fit.samples]
    if draws:
        drawn = [[draw.lr(n, batch, fit.center.size) for n in tokens] for draw in draws]
        panel.fill_between(tokens, *np.percentile(drawn, (2.5, 97.5), axis=0), color=color, alpha=0.18, linewidth=0)


def plot_map(fit: Fit) -> "Figure":
    """Mean regret of other (a, b), in nats per token, with the fitted one, its bootstrap draws and the paper's.

    The regret is at the fitted batch exponent, also where the paper's (4.6, -0.51) is marked. The ellipse holds 95 % of
    a normal distribution with the draws' covariance in log2(a) and b.
    """
    figure = new_figure(7.0, 5.4)
    panel = figure.subplots()
    a, b = _draw_regret(figure, panel, fit)
    if len(fit.samples) > 1:
        draws = np.array([draw[:2] for draw in fit.samples])
        panel.plot(*draws.T, ".", color="white", markersize=2, alpha=0.6)
        panel.plot(
            [], [], ".", color=GRAY, markersize=5, label="draws of the law"
        )  # White is not seen below the panel.
        panel.plot(*_ellipse(draws), color=RED, linewidth=1.8, label="95 % of the draws")
    for what, law, marker, color in (("fitted", fit.law, "o", RED), ("paper", PAPER_OPTIMA, "X", "white")):
        label = f"{what} ({law.a:.3g}, {law.b:.3g})"
        panel.plot(law.a, law.b, marker, color=color, markersize=10, markeredgecolor=BLACK, label=label)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.set_xlim(a[0], a[-1])
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_ylim(b[0], b[-1])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _position: f"{x:g}"))
    panel.set_xlabel("a")
    panel.set_ylabel("b")
    figure.suptitle(_cost_of_the_paper(fit), fontsize=11)
    figure.legend(ncols=3, **LEGEND)
    return figure


def _cost_of_the_paper(fit: Fit) -> str:
    """What the paper's (a, b) would cost on the used cells, at the fitted batch exponent, and what is mapped."""
    law, used = fit.law, [cell for cell in fit.cells if cell.used]
    paper = replace(law, a=PAPER_OPTIMA.a, b=PAPER_OPTIMA.b, size=None, size_exponent=0.0)
    costs = [cell.regret_at(paper.lr(cell.tokens, cell.tokens_per_step)) for cell in used]
    mapped = f"mean regret of lr = a * beta^{law.batch_exponent:.3g} * tokens^b, {fit.schedule}"
    if not costs:
        return mapped
    return f"On these cells the paper's a and b would cost {sum(costs) / len(costs):.2g} nats per token\n{mapped}"


def _draw_regret(figure: "Figure", panel: "Axes", fit: Fit) -> tuple[_Array, _Array]:
    """Fill the panel with the regret, and return its axes."""
    from matplotlib import colormaps
    from scipy.interpolate import RectBivariateSpline

    a, b, nats = (np.array(values, dtype=np.float64) for values in (fit.map.a, fit.map.b, fit.map.regret))
    # The regret is a mean of parabolas (or nearly, with a skew), so that the spline is exact: a coarse grid would cut the
    # narrow valley into beads.
    spline = RectBivariateSpline(b, np.log(a), nats, kx=2, ky=2)
    a, b = np.geomspace(a[0], a[-1], _FINE), np.linspace(b[0], b[-1], _FINE)
    nats = np.maximum(0.0, spline(b, np.log(a)))
    levels = [0.0, _NATS[0], *(x for x in _NATS[1:] if x < nats.max())]
    shades = [colormaps["cividis"](i / (len(levels) - 1)) for i in range(len(levels))]
    colors = panel.contourf(a, b, nats, levels=levels, colors=shades, extend="max")
    bar = figure.colorbar(colors, ax=panel, label="mean regret (nats per token)", spacing="uniform")
    bar.set_ticks(levels, labels=[f"{x:g}" for x in levels])
    return a, b


def _ellipse(draws: _Array) -> tuple[_Array, _Array]:
    """Points (x, y) of the 95 % ellipse of draws (a, b), in log2(a) and b."""
    points = np.column_stack([np.log2(draws[:, 0]), draws[:, 1]])
    values, vectors = np.linalg.eigh(np.cov(points.T))
    angle = np.linspace(0, 2 * np.pi, 100)
    # The 95 % quantile of chi-squared with 2 degrees of freedom is -2 log 0.05.
    radius = np.sqrt(-2 * math.log(0.05) * np.maximum(values, 0))
    x, y = points.mean(axis=0)[:, None] + vectors @ (radius[:, None] * np.array([np.cos(angle), np.sin(angle)]))
    return 2**x, y
