"""Pictures of a sweep's fit, a plan, a check and a transfer: drawn from the content of their JSON files."""

import math
import os
import re
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hf_power.fit.cells import rates_near
from hf_power.fit.fit import law_lr
from hf_power.fit.text import PAPER
from hf_power.plots.figures import _figure, _save, _si_formatter, require_matplotlib
from hf_power.records.errors import UserError

_MARKERS = "osDvPh*<>d"  # those at the top of a panel, "^" and "x", are not among them
_GRAY, _BLACK, _STRONG, _RED = "0.6", "0.15", "#0072b2", "#d55e00"  # blue and red of Okabe and Ito: safe together
_LEGEND: dict[str, Any] = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
_UPRIGHT: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "bottom", "fontsize": 8}
_FINE = 300  # points a side of the map
_AT_TOP = {"^": "higher than shown", "x": "diverged"}
_NATS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def plot_cells(fit: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Loss over learning rate: a panel per width and batch, a U-curve per horizon, all above their own minimum.

    A point is the mean over seeds, with the sd between them; the curve is the cell's parabola over the runs that it was
    fitted to. In the strip below zero a bar is the 95 % interval of the optimum, a stroke the law's rate. Runs that are
    higher than the panel are triangles at its top, a loss that is not finite is a cross there. Unused cells are gray.

    Args:
        fit: the content of fit.json.
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a fit without cells.
    """
    cells = _content(fit, "cells", "fit")
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["width"], cell["tokens_per_step"], cell["tokens"])):
        groups.setdefault((cell["width"], cell["tokens_per_step"]), []).append(cell)
    horizons = sorted({cell["tokens"] for cell in cells})
    pairs = zip(_ordered_colors(len(horizons)), _markers(len(horizons)), strict=True)
    styles: dict[int, tuple[Any, str]] = dict(zip(horizons, pairs, strict=True))
    num_batches = len({batch for _, batch in groups})
    num_columns = num_batches if num_batches <= 5 else 4
    figure, panels = _panels(len(groups), num_columns, (3.1, 2.9), "learning rate")
    top = 1.15 * max((_height(cell) for cell in cells), default=0.0) or 0.1
    strip, notes = 0.07 * top, []
    for panel, ((width, batch), group) in zip(panels, groups.items(), strict=True):
        panel.axhline(0, color=_BLACK, linewidth=0.8)
        for cell in group:
            row = -strip * (1 + horizons.index(cell["tokens"]))
            _draw_cell(panel, cell, *styles[cell["tokens"]], top=top, row=row)
        panel.set_title((f"width {width}, " if width else "") + f"{_si(batch)} tokens per step", fontsize=9)
        notes.append(_unused(group))
        panel.text(0.5, 0.97, notes[-1], transform=panel.transAxes, ha="center", va="top", fontsize=7, color="0.35")
    _octaves(panels[0])
    num_lines = max(len(note.splitlines()) for note in notes)
    panels[0].set_ylim(-strip * (len(horizons) + 1), top * (1 + 0.08 * num_lines))
    panels[0].set_yticks([tick for tick in panels[0].get_yticks() if 0 <= tick <= top])
    figure.supylabel("loss above its minimum (nats per token)", fontsize=10)
    handles = [_handle(f"{_si(tokens)} tokens", *styles[tokens], "-") for tokens in horizons]
    handles.append(_handle("optimum, 95 % interval", _BLACK, "", "-", linewidth=2.5))
    handles.append(_handle("the law's rate", _BLACK, "|", markersize=8, markeredgewidth=1.5))
    if not all(cell["used"] for cell in cells):
        handles.append(_handle("not used", _GRAY, "", "-"))
    drawn = {line.get_marker() for panel in panels for line in panel.lines}
    handles += [_handle(label, _BLACK, mark) for mark, label in _AT_TOP.items() if mark in drawn]
    figure.legend(handles=handles, ncols=max(3, 2 * num_columns), **_LEGEND)
    return _save(figure, path)


def _height(cell: dict[str, Any]) -> float:
    """How far the drawn part of a parabola rises, nats."""
    if not cell["used"]:
        return 0.0
    ends = np.log2(_window(cell)) - math.log2(cell["optimum_lr"])
    return float(cell["curvature"] * (ends**2).max())


def _window(cell: dict[str, Any]) -> tuple[float, float]:
    """Learning rates between which the parabola was fitted, see `hf_power.fit.cells.fit_cells`."""
    rates, losses = zip(*_finite(cell), strict=True)
    near = rates_near(rates, losses.index(min(losses)))
    return near[0], near[-1]


def _finite(cell: dict[str, Any]) -> list[tuple[float, float]]:
    pairs = zip(cell["learning_rates"], cell["losses"], strict=True)
    return [(rate, loss) for rate, loss in pairs if loss is not None and math.isfinite(loss)]


def _draw_cell(panel: Any, cell: dict[str, Any], color: Any, marker: str, *, top: float, row: float) -> None:
    color = color if cell["used"] else _GRAY
    finite = dict(_finite(cell))
    for rate in cell["learning_rates"]:
        if rate not in finite:
            panel.plot(rate, 0.97 * top, "x", color=color, markersize=5)
    if not finite:
        return
    floor = cell["min_loss"] if cell["used"] else min(finite.values())
    above = {rate: loss - floor for rate, loss in finite.items()}
    shown = {rate: nats for rate, nats in above.items() if nats <= top}
    for rate in above.keys() - shown.keys():
        panel.plot(rate, 0.97 * top, "^", color=color, markersize=5)
    style = {"color": color, "marker": marker, "markersize": 4, "elinewidth": 0.8, "capsize": 1.5}
    line = {"linestyle": ""} if cell["used"] else {"linestyle": "-", "linewidth": 1.0}
    panel.errorbar(list(shown), list(shown.values()), yerr=cell["loss_sd"], **style, **line)
    if cell["used"]:
        rates = np.geomspace(*_window(cell), 60)
        panel.plot(rates, cell["curvature"] * np.log2(rates / cell["optimum_lr"]) ** 2, color=color, linewidth=1.3)
        panel.plot(cell["optimum_interval"], [row, row], color=color, linewidth=2.5, solid_capstyle="butt")
        panel.plot(cell["optimum_lr"], row, marker=marker, color=color, markersize=4)
        panel.plot(cell["law_lr"], row, marker="|", color=_BLACK, markersize=8, markeredgewidth=1.5)


def _unused(group: list[dict[str, Any]]) -> str:
    """Horizons by the short reason why they are not used."""
    reasons: dict[str, list[str]] = {}
    for cell in group:
        if not cell["used"]:
            reasons.setdefault(re.split("[,:]", cell["reason"] or "not used")[0], []).append(_si(cell["tokens"]))
    return "\n".join(textwrap.fill(f"{', '.join(tokens)}: {reason}", 38) for reason, tokens in reasons.items())


def plot_law(fit: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Optimal learning rate over tokens with the law, and what is left of it in octaves.

    Bars are 95 % intervals above and standard deviations below; the bands are the central 95 % of the law's bootstrap
    draws. The paper's law (Shen et al., arXiv:2408.13359, eq. 6) is dashed, for the same batches.

    Args:
        fit: the content of fit.json.
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a fit without a used cell.
    """
    used = [cell for cell in _content(fit, "cells", "fit") if cell["used"]]
    if not used:
        raise UserError("the fit has no used cell to draw: run learning rates on both sides of the optimum.")
    from matplotlib.ticker import LogLocator, NullLocator

    law, widths = fit["law"], sorted({cell["width"] for cell in used})
    batches = sorted({cell["tokens_per_step"] for cell in used})
    colors = dict(zip(batches, _ordered_colors(len(batches)), strict=True))
    markers = dict(zip(widths, _markers(len(widths)), strict=True))
    figure = _figure(7.5, 7.0)
    panel, rest = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    horizons = [cell["tokens"] for cell in used]
    tokens = np.geomspace(min(horizons) / 1.4, max(horizons) * 1.4, 25)
    paper = dict(zip(("a", "b", "batch_exponent"), PAPER, strict=True)) | {"critical_batch_tokens": None}
    for batch in batches:
        _draw_law(panel, fit, batch, tokens, colors[batch])
        rates = [law_lr(paper, tokens=n, tokens_per_step=batch) for n in tokens]
        panel.plot(tokens, rates, color=colors[batch], linewidth=1.2, linestyle="--")
    rest.axhspan(-fit["residual_sd_octaves"], fit["residual_sd_octaves"], color=_GRAY, alpha=0.25, linewidth=0)
    rest.axhline(0, color=_BLACK, linewidth=0.8)
    kinds = sorted({(cell["width"], cell["tokens_per_step"]) for cell in used})
    for cell in used:
        width, batch, y = cell["width"], cell["tokens_per_step"], cell["optimum_lr"]
        style = {"color": colors[batch], "marker": markers[width], "capsize": 2, "linestyle": ""}
        style |= {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6}
        low, high = cell["optimum_interval"]
        x = cell["tokens"] * _aside(widths.index(width), len(widths))
        panel.errorbar(x, y, yerr=[[y - low], [high - y]], **style)
        x = cell["tokens"] * _aside(kinds.index((width, batch)), len(kinds))
        rest.errorbar(x, cell["residual_octaves"], yerr=cell["optimum_sd_octaves"], **style)
    panel.set_xscale("log")
    panel.set_yscale("log")
    rest.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    rest.xaxis.set_major_formatter(_si_formatter())
    rest.xaxis.set_minor_locator(NullLocator())
    panel.set_ylabel("optimal learning rate")
    rest.set_ylabel("optimum over law\n(octaves)")
    rest.set_xlabel("horizon (tokens)")
    for each in (panel, rest):
        each.grid(alpha=0.3)
    beta = "min(beta, beta_crit)" if law["critical_batch_tokens"] else "beta"
    figure.suptitle(
        f"lr = {law['a']:.3g} * {beta}^{law['batch_exponent']:.3g} * tokens^{law['b']:.3g}   "
        f"({fit['schedule']}, R2 {fit['r2']:.3f})",
        fontsize=11,
    )
    handles = [_handle(f"{_si(batch)} tokens per step", colors[batch], "", "-") for batch in batches]
    handles += [_handle(f"width {width}", _BLACK, markers[width]) for width in widths if width]
    handles.append(_handle("the paper's law", _BLACK, "", "--"))
    figure.legend(handles=handles, ncols=4, **_LEGEND)
    return _save(figure, path)


def _aside(index: int, count: int) -> float:
    """A factor on the tokens that sets cells of one horizon side by side."""
    return float(1.3 ** ((index + 0.5) / count - 0.5))


def _draw_law(panel: Any, fit: dict[str, Any], batch: int, tokens: Any, color: Any) -> None:
    law = fit["law"]
    panel.plot(tokens, [law_lr(law, tokens=n, tokens_per_step=batch) for n in tokens], color=color, linewidth=1.8)
    names = ("a", "b", "batch_exponent")
    draws = [law | dict(zip(names, sample, strict=True)) for sample in fit["samples"]]
    if draws:
        rates = [[law_lr(draw, tokens=n, tokens_per_step=batch) for n in tokens] for draw in draws]
        panel.fill_between(tokens, *np.percentile(rates, (2.5, 97.5), axis=0), color=color, alpha=0.18, linewidth=0)


def plot_map(fit: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Mean regret of other (a, b), in nats per token, with the fitted one, its bootstrap draws and the paper's.

    The regret is at the fitted batch exponent, also where the paper's (4.6, -0.51) is marked. The ellipse holds 95 % of
    a normal distribution with the draws' covariance in log2(a) and b.

    Args:
        fit: the content of fit.json.
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a fit without a map.
    """
    table, law = _content(fit, "map", "fit"), fit["law"]
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter
    from scipy.interpolate import RectBivariateSpline

    a, b, nats = (np.array(table[name], dtype=np.float64) for name in ("a", "b", "regret"))
    # A mean of parabolas, so that the spline is exact: a coarse grid would cut the narrow valley into beads.
    spline = RectBivariateSpline(b, np.log(a), nats, kx=2, ky=2)
    a, b = np.geomspace(a[0], a[-1], _FINE), np.linspace(b[0], b[-1], _FINE)
    nats = np.maximum(0.0, spline(b, np.log(a)))
    figure = _figure(7.0, 5.4)
    panel = figure.subplots()
    levels = [0.0, _NATS[0], *(x for x in _NATS[1:] if x < nats.max())]
    shades = [colormaps["cividis"](i / (len(levels) - 1)) for i in range(len(levels))]
    colors = panel.contourf(a, b, nats, levels=levels, colors=shades, extend="max")
    bar = figure.colorbar(colors, ax=panel, label="mean regret (nats per token)", spacing="uniform")
    bar.set_ticks(levels, labels=[f"{x:g}" for x in levels])
    if len(fit["samples"]) > 1:
        draws = np.array(fit["samples"])[:, :2]
        panel.plot(*draws.T, ".", color="white", markersize=2, alpha=0.6)
        panel.plot(*_ellipse(draws), color=_RED, linewidth=1.8, label="95 % of the draws")
    for what, x, y, marker, color in (("fitted", law["a"], law["b"], "o", _RED), ("paper", *PAPER[:2], "X", "white")):
        style = {"color": color, "markersize": 10, "markeredgecolor": _BLACK, "linestyle": ""}
        panel.plot(x, y, marker=marker, label=f"{what} ({x:.3g}, {y:.3g})", **style)
    panel.set_xscale("log")
    panel.set_xlim(a[0], a[-1])
    panel.set_ylim(b[0], b[-1])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _position: f"{x:g}"))
    panel.set_xlabel("a")
    panel.set_ylabel("b")
    panel.set_title(f"Regret of lr = a * beta^{law['batch_exponent']:.3g} * tokens^b ({fit['schedule']})", fontsize=11)
    figure.legend(ncols=3, **_LEGEND)
    return _save(figure, path)


def _ellipse(draws: Any) -> Any:
    """Points (x, y) of the 95 % ellipse of draws (a, b), in log2(a) and b."""
    points = np.column_stack([np.log2(draws[:, 0]), draws[:, 1]])
    values, vectors = np.linalg.eigh(np.cov(points.T))
    angle = np.linspace(0, 2 * np.pi, 100)
    radius = np.sqrt(-2 * math.log(0.05) * np.maximum(values, 0))  # quantile of chi-squared, 2 degrees of freedom
    x, y = points.mean(axis=0)[:, None] + vectors @ (radius[:, None] * np.array([np.cos(angle), np.sin(angle)]))
    return 2**x, y


def plot_plan(plan: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Learning rate of a planned run with its 95 % band: over log tokens, and over tokens with the milestones.

    Args:
        plan: the content of plan.json.
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a plan without a curve.
    """
    curve = _content(plan, "curve", "plan")
    tokens, lr, low, high = (np.array([point[name] for point in curve]) for name in ("tokens", "lr", "low", "high"))
    total, start = plan["target"]["tokens"], plan["decay_start_tokens"]
    figure = _figure(8.0, 6.6)
    law, run = figure.subplots(2, 1, height_ratios=(1.5, 1))
    law.set_xscale("log")
    for panel in (law, run):
        panel.fill_between(tokens, low, high, color=_STRONG, alpha=0.2, linewidth=0)
        panel.plot(tokens, lr, color=_STRONG, linewidth=2)
        panel.set_ylabel("learning rate")
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter(_si_formatter())
    law.set_yscale("log")
    law.set_xlim(max(tokens[0], 0.1 * plan["warmup_tokens"]), 1.3 * total)
    # Warmup and tail go to 0: the scale is that of the law between them.
    inside = (tokens >= plan["warmup_tokens"]) & (tokens <= (total if start is None else start))
    law.set_ylim(0.2 * lr[inside].min(), 1.5 * high.max())
    corners = [("warmup ends", plan["warmup_tokens"]), ("cap ends", plan["cap_ends_tokens"]), ("decay starts", start)]
    for what, n in corners:
        if n:
            for panel in (law, run):
                panel.axvline(n, color=_BLACK, linewidth=0.9, linestyle=":")
            label = f"{what}, {_si(n)} "
            law.text(n, 0.03, label, **_UPRIGHT, transform=law.get_xaxis_transform())
    for point in plan["milestones"]:
        for panel in (law, run):
            panel.plot(point["tokens"], point["lr"], "o", color=_RED, markersize=5)
        if point["what"].endswith("%") or point["what"] == "end":
            text = f"{point['what']}\n{point['lr']:.2g}"
            run.annotate(text, (point["tokens"], point["lr"]), (2, 6), textcoords="offset points", fontsize=8)
    run.set_xlim(-0.01 * total, 1.06 * total)
    run.set_ylim(0, 1.3 * high.max())
    run.set_xlabel("tokens seen")
    figure.suptitle(
        f"{_si(total)} tokens, {_si(plan['tokens_per_step'])} tokens per step; band: 95 % interval", fontsize=11
    )
    return _save(figure, path)


def plot_transfer(table: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Regret of each method in each held-out cell, a panel per cell, and of all cells in the first one.

    The axis is linear up to 0.005 nats and logarithmic beyond; lines at 0.005 and 0.02. Methods are in the order of
    their median. Bars are the rows' intervals, a stroke is the median, a triangle at the right is a run that diverged.

    Args:
        table: its "rows" are dicts with method, width, tokens_per_step, tokens, regret, low, high (nats per token).
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a table without rows.
    """
    rows = _content(table, "rows", "table")
    from matplotlib.ticker import NullLocator

    by_method: dict[str, list[float]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row["regret"])
    methods = sorted(by_method, key=lambda method: -median(by_method[method]))  # the best one on top
    cells = sorted({(row["width"], row["tokens_per_step"], row["tokens"]) for row in rows})
    summary = len(cells) > 1
    shape = (2.7, 0.75 + 0.2 * len(methods))
    figure, panels = _panels(len(cells) + summary, 4, shape, "regret (nats per token)")
    if summary:
        panels[0].set_title(f"all {len(cells)} cells, median", fontsize=9, fontweight="bold")
        for y, method in enumerate(methods):
            for x in by_method[method]:
                _draw_regret(panels[0], {"method": method, "regret": x}, y)
            panels[0].plot(median(by_method[method]), y, "|", color=_color(method), markersize=14, markeredgewidth=2.5)
    for panel, cell in zip(panels[summary:], cells, strict=True):
        width, batch, tokens = cell
        panel.set_title((f"width {width}, " if width else "") + f"{_si(batch)} / step, {_si(tokens)}", fontsize=9)
        for row in (row for row in rows if (row["width"], row["tokens_per_step"], row["tokens"]) == cell):
            _draw_regret(panel, row, methods.index(row["method"]))
    finite = [row["regret"] for row in rows if math.isfinite(row["regret"])]
    left, right = min(-0.002, *finite, 0.0) * 1.2, max(0.05, *finite, 0.0) * 2
    for panel in panels:
        for x in (0.005, 0.02):
            panel.axvline(x, color=_BLACK, linewidth=0.9, linestyle="--")
        panel.set_xscale("symlog", linthresh=0.005, linscale=0.8)
        panel.set_xlim(left, right)
        panel.set_xticks([x for x in (0, 0.005, 0.02, 0.1, 0.5, 2.0) if x < right])
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(-0.6, len(methods) - 0.4)
    return _save(figure, path)


def _draw_regret(panel: Any, row: dict[str, Any], y: int) -> None:
    color = _color(row["method"])
    if not math.isfinite(row["regret"]):
        panel.plot(0.98, y, ">", color=color, transform=panel.get_yaxis_transform())
        return
    if "low" in row:
        panel.plot([row["low"], row["high"]], [y, y], color=color, linewidth=1.5)
    panel.plot(row["regret"], y, "o", color=color, markersize=4.5, alpha=1.0 if "low" in row else 0.5)


def _color(method: str) -> str:
    return _STRONG if method.startswith("power") else "0.4"


def plot_verify(page: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Loss over the factor on the recipe's learning rate, the band of tolerance above the best one, and the verdict.

    Args:
        page: the content of verify.json: verdict, points with factor, loss (nats per token), sd (None with one seed),
            parabola (or None), tolerance (nats per token), and optionally reasons.
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a page without points.
    """
    points, parabola, tolerance = _content(page, "points", "page"), page["parabola"], page["tolerance"]
    finite = [point["loss"] for point in points if math.isfinite(point["loss"])]
    factors = [point["factor"] for point in points]
    figure = _figure(6.4, 4.8)
    panel = figure.subplots()
    panel.set_xscale("log", base=2)
    if finite:
        best = min([*finite, parabola["min_loss"]] if parabola else finite)
        label = f"within {tolerance:g} nats of the best"
        panel.axhspan(best, best + tolerance, color="#009e73", alpha=0.2, linewidth=0, label=label)
    else:
        panel.set_yticks([])
    if parabola:
        optimum, lowest = parabola["optimum_factor"], parabola["min_loss"]
        x = np.geomspace(min(factors), max(factors), 100)
        panel.plot(x, lowest + parabola["curvature"] * np.log2(x / optimum) ** 2, color=_GRAY, label="parabola")
        panel.plot(optimum, lowest, "v", color=_GRAY, markersize=8, label=f"its optimum, {optimum:.2f} times")
    for point in points:
        _draw_point(panel, point["factor"], point["loss"], point["sd"])
    panel.set_xlim(min(factors) / 1.25, max(factors) * 1.25)
    panel.set_xticks(factors, [f"{factor:g}" + (" (recipe)" if factor == 1 else "") for factor in factors])
    panel.minorticks_off()
    panel.set_xlabel("factor on the recipe's learning rate")
    panel.set_ylabel("held-out loss (nats per token)")
    panel.ticklabel_format(axis="y", useOffset=False)
    panel.grid(alpha=0.3)
    title = [f"Check before the run: {page['verdict']}", *(textwrap.fill(x, 75) for x in page.get("reasons", []))]
    figure.suptitle("\n".join(title), fontsize=11, color="darkgreen" if page["verdict"] == "passed" else "darkred")
    if finite:
        figure.legend(ncols=3, **_LEGEND)
    return _save(figure, path)


def _draw_point(panel: Any, factor: float, loss: float, sd: float | None) -> None:
    if math.isfinite(loss):
        color = _STRONG if factor == 1 else _BLACK
        panel.errorbar(factor, loss, yerr=sd, fmt="o", color=color, markersize=8, capsize=4)
        return
    top = {"transform": panel.get_xaxis_transform(), "color": _RED}
    panel.plot(factor, 0.95, "x", markersize=10, markeredgewidth=2.5, **top)
    panel.text(factor, 0.9, "diverged", ha="center", va="top", **top)


def _content(content: dict[str, Any], name: str, what: str) -> Any:
    """What every picture needs first: matplotlib, and something to draw."""
    require_matplotlib()
    if not content.get(name):
        raise UserError(f"the {what} has no {name} to draw, got {content.get(name)!r}: pass one that is complete.")
    return content[name]


def _panels(num_panels: int, num_columns: int, size: tuple[float, float], xlabel: str) -> tuple[Any, Any]:
    """A figure and its panels, row by row, with shared axes; the lowest panel of each column has the ticks."""
    num_columns = min(num_panels, num_columns)
    num_rows = math.ceil(num_panels / num_columns)
    figure = _figure(max(5.5, size[0] * num_columns + 0.6), size[1] * num_rows + 0.8)
    axes = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in axes[num_panels:]:
        panel.set_axis_off()
    for panel in axes[num_panels - num_columns : num_panels]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(xlabel)
    return figure, axes[:num_panels]


def _ordered_colors(num_colors: int) -> list[Any]:
    """From dark to light along viridis, without its yellow end, which is faint on white paper."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.8 * i / max(1, num_colors - 1)) for i in range(num_colors)]


def _markers(num_markers: int) -> list[str]:
    return [_MARKERS[i % len(_MARKERS)] for i in range(num_markers)]


def _handle(label: str, color: Any, marker: str, linestyle: str = "", **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, marker=marker, linestyle=linestyle, label=label, **style)


def _octaves(panel: Any) -> None:
    """A log2 axis with ticks at whole octaves, written as decimals."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda rate, _position: f"{rate:.1e}".replace("e-0", "e-")))


def _si(number: float) -> str:
    """Three digits, with the letter of `hf_power.plots.figures`."""
    return str(_si_formatter()(float(f"{number:.3g}"), 0))
