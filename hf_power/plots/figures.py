"""Pictures of results, drawn from plain data and written atomically."""

import os
from pathlib import Path
from typing import Any

from hf_power.coord_check import MAX_SLOPE, CoordCheck
from hf_power.records.errors import MissingPackageError, UserError
from hf_power.records.files import replaced

_DPI = 150


def plot_coord_check(check: CoordCheck, path: str | os.PathLike[str], *, steps: tuple[int, ...] | None = None) -> Path:
    """Change of each module's output over width: both axes logarithmic, a panel per step, slopes in the legend.

    Flat lines mean that muP holds. A line whose slope is outside the limit is solid, bold and marked in the legend; a
    change that is 0 or not finite is a gap.

    Args:
        check: result of `hf_power.coord_check.coord_check`.
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.
        steps: steps to show; None for the first and the last.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a step that was not measured.
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

    figure = _figure(5.2 * len(shown) + 0.6, 5.0 + 0.2 * len(modules))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    colors = _colormap("tab10" if len(modules) <= 10 else "viridis", len(modules))
    for panel, step in zip(panels, shown, strict=True):
        for color, module in zip(colors, modules, strict=True):
            slope = slopes[module, step]
            failed = not abs(slope) < MAX_SLOPE
            label = f"{module} {slope:+.2f}" + (" (!)" if failed else "")
            values = [changes[module, step, width] or float("nan") for width in widths]
            style = {"linewidth": 2.6, "linestyle": "-"} if failed else {"linewidth": 1.4, "linestyle": "--"}
            panel.plot(widths, values, marker="o", markersize=4, color=color, label=label, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_title(f"step {step}", fontsize=10)
        panel.set_xlabel("width (hidden_size)")
        panel.legend(title=f"slopes, (!) beyond {MAX_SLOPE:g}", fontsize=8, title_fontsize=8, ncols=2, **_BELOW)
    panels[0].set_ylabel("RMS change of the output")
    figure.suptitle(f"Coordinate check {check.verdict}", fontsize=11, color="darkgreen" if check.passed else "darkred")
    return _save(figure, path)


_BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "frameon": False}


def plot_lr_and_loss(run: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Loss and learning rate of a run over the tokens seen: two panels with one axis.

    Args:
        run: its "loss_curve" is a list of dicts with tokens (tokens seen, int) and either loss (nats per token) with
            learning_rate, or eval_loss (nats per token), or all; optional "name" is the title. A loss that is None or
            nan is a gap in the line.
        path: file to write, its ending chooses the format (.png, .pdf, .svg); its folder must exist.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a run without a loss curve.
    """
    curve = run.get("loss_curve")
    if not curve:
        raise UserError("the run has no loss_curve to draw: pass a run with at least one point.")
    figure = _figure(7.5, 5.5)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    trained = [point for point in curve if "loss" in point]
    tokens = [point["tokens"] for point in trained]
    values = [float("nan") if point["loss"] is None else point["loss"] for point in trained]
    # Lone points have no line to be seen by.
    marker = "." if len(trained) < 30 else None
    losses.plot(tokens, values, color="tab:blue", linewidth=1.2, marker=marker, label="training")
    held_out = [(point["tokens"], point["eval_loss"]) for point in curve if point.get("eval_loss") is not None]
    if held_out:
        x, y = zip(*held_out, strict=True)
        losses.plot(x, y, "o", color="tab:orange", markersize=5, label="evaluation")
        losses.legend()
    losses.set_ylabel("loss (nats per token)")
    rates.plot(tokens, [point["learning_rate"] for point in trained], color="tab:green", linewidth=1.5, marker=marker)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.set_xlabel("tokens seen")
    rates.xaxis.set_major_formatter(_si_formatter())
    for panel in (losses, rates):
        panel.grid(alpha=0.3)
    if run.get("name"):
        figure.suptitle(str(run["name"]), fontsize=11)
    return _save(figure, path)


def require_matplotlib() -> None:
    """Raise an ImportError that names the extra if matplotlib is missing; a run asks before it trains."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            'matplotlib is needed for plots and is not installed: run pip install "hf_power[plots]".'
        ) from error


def _figure(width: float, height: float) -> Any:
    """A figure of its own on the Agg canvas: pyplot's global state and backend are left alone."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _colormap(name: str, num_colors: int) -> list[Any]:
    from matplotlib import colormaps

    colors = colormaps[name]
    if name == "tab10":
        return [colors(i) for i in range(num_colors)]
    return [colors(i / (num_colors - 1)) for i in range(num_colors)]


def _si_formatter() -> Any:
    """Ticks in powers of 1000 as they are said of tokens: 1.5B, not 1.5G."""
    from matplotlib.ticker import FuncFormatter

    def text(tokens: float, _position: int) -> str:
        for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
            if abs(tokens) >= size:
                return f"{tokens / size:g}{letter}"
        return f"{tokens:g}"

    return FuncFormatter(text)


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format=path.suffix.lstrip("."))
    return path
