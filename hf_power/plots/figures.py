"""What every picture is made with: figures of their own, panels, colours, the letters of large numbers, and saving."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from hf_power.records.errors import MissingPackageError, NotFoundError, UserError
from hf_power.records.files import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import Formatter

GRAY, BLACK = "0.6", "0.15"
# Blue, red and green of Okabe and Ito, which people with any kind of colour vision can tell apart.
STRONG, RED, GREEN = "#0072b2", "#d55e00", "#009e73"
# Okabe and Ito's colours (https://jfly.uni-koeln.de/color) without yellow, which is faint on white paper.
_DISTINCT = (STRONG, RED, GREEN, "#cc79a7", "#56b4e9", "#e69f00", BLACK)
# Beside the colours, for people who see few of them and for paper without any.
LINES = ("-", "--", "-.", ":")
_DPI = 150
_MARKERS = "osDvPh*<>d"  # "^" and "x" are not among them: they mark what lies above a panel.

Color = str | tuple[float, float, float, float]


class _Legend(TypedDict):
    loc: str
    frameon: bool
    fontsize: int


LEGEND: _Legend = {"loc": "outside lower center", "frameon": False, "fontsize": 8}


def require_matplotlib() -> None:
    """Raise a MissingPackageError that names the extra if matplotlib is not installed; a run asks before it trains."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            'matplotlib is needed for plots and is not installed: run pip install "hf_power[plots]".'
        ) from error


def save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure to a file that is there whole or not at all; its ending chooses the format (.png, .pdf, .svg)."""
    path = Path(path)
    check_picture(path)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format=path.suffix.lstrip("."))
    return path


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse a file that no picture can be written to, before the work that it shows.

    Raises:
        NotFoundError: its folder is not there.
        UserError: its ending is no format of matplotlib.
        MissingPackageError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    if path.suffix.lstrip(".") not in FigureCanvasAgg.get_supported_filetypes():
        raise UserError(f"the name of a picture must end in .png, .pdf or .svg, got {path.name!r}.")
    if not path.parent.is_dir():
        raise NotFoundError(f"there is no folder {path.parent} for the picture {path.name}: make it, or name another.")


def new_figure(width: float, height: float) -> "Figure":
    """A figure of its own on the Agg canvas, in inches; pyplot's global state and backend are left alone."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_panels(
    num_panels: int, num_columns: int, size: tuple[float, float], xlabel: str
) -> "tuple[Figure, Sequence[Axes]]":
    """A figure and its panels, row by row, with shared axes; the lowest panel of each column has the ticks."""
    num_columns = min(num_panels, num_columns)
    num_rows = math.ceil(num_panels / num_columns)
    figure = new_figure(max(5.5, size[0] * num_columns + 0.6), size[1] * num_rows + 1.4)  # With a title and a legend.
    axes = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel in axes[num_panels:]:
        panel.set_axis_off()
    for panel in axes[num_panels - num_columns : num_panels]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel(xlabel)
    return figure, list(axes[:num_panels])


def ordered_colors(num_colors: int) -> list[Color]:
    """From dark to light along viridis, without its yellow end, which is faint on white paper."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.8 * i / max(1, num_colors - 1)) for i in range(num_colors)]


def distinct_colors(num_colors: int) -> list[Color]:
    """Seven that people with any kind of colour vision can tell apart; more of them come from viridis."""
    from matplotlib import colormaps

    if num_colors <= len(_DISTINCT):
        return list(_DISTINCT[:num_colors])
    return [colormaps["viridis"](i / (num_colors - 1)) for i in range(num_colors)]


def distinct_markers(num_markers: int) -> list[str]:
    """One for each, again from the first after ten."""
    return [_MARKERS[i % len(_MARKERS)] for i in range(num_markers)]


def distinct_lines(num_lines: int) -> list[str]:
    """A style for each line, again from the first after four."""
    return [LINES[i % len(LINES)] for i in range(num_lines)]


def handle(label: str, color: Color, marker: str, linestyle: str = "", **style: Any) -> "Line2D":
    """An entry of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, marker=marker, linestyle=linestyle, label=label, **style)


def si(number: float, digits: int = 3) -> str:
    """Three digits and a letter from a million on, as they are said of tokens: 1.5B, not 1.5G; below it all digits.

    >>> [si(number) for number in (0.5, 8192, 2_097_152, 1.5e9)]
    ['0.5', '8,192', '2.1M', '1.5B']
    """
    if 1e3 <= abs(number) < 1e6 and number == round(number):
        return f"{number:,.0f}"
    number = float(f"{number:.{digits}g}")
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:,g}" if abs(number) < 1e5 else f"{number:,.0f}"


def decimal_rates(panel: "Axes") -> None:
    """Ticks of a logarithmic axis of learning rates, as decimals at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda rate, _position: f"{rate:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def si_formatter() -> "Formatter":
    """Ticks with the letters of `si`."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda number, _position: si(number, digits=17))
