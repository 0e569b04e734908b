"""The picture of the transfer measurement, which is a benchmark."""

import math
import sys
from pathlib import Path

import pytest
from pictures import lines, verticals, visible, xy

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks/transfer"))

from picture import plot_transfer


def row(method, nats, width=128, batch=8192, tokens=10**7):
    values = {"method": method, "width": width, "tokens_per_step": batch, "tokens": tokens}
    return values | {"regret": nats, "low": nats - 0.001, "high": nats + 0.002}


TABLE = {
    "rows": [
        row(m, x, width)
        for m, xs in (("wsd", (0.03, 0.2)), ("power", (0.001, 0.004)))
        for width, x in zip((128, 256), xs, strict=True)
    ]
}


def test_a_transfer_has_a_panel_for_all_cells_and_one_for_each():
    figure = plot_transfer(TABLE)
    panels = visible(figure)
    assert [panel.get_title() for panel in panels] == [
        "all 2 cells, median",
        "width 128, 8,192 / step, 10M",
        "width 256, 8,192 / step, 10M",
    ]
    for panel in panels:
        assert panel.get_xscale() == "symlog"
        assert verticals(panel) == [0.005, 0.02]
        assert panel.get_xlabel() == "regret (nats per token)"
        assert panel.get_xlim()[0] < 0 < 0.2 < panel.get_xlim()[1]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["wsd", "power"]  # from below
    assert [xy(line)[0] for line in lines(panels[0], "|")] == [(pytest.approx(0.115), 0), (0.0025, 1)]
    assert [xy(line)[0] for line in lines(panels[2], "o")] == [(0.2, 0), (0.004, 1)]
    bars = [xy(line) for line in panels[2].lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
    assert bars == [[(pytest.approx(0.199), 0), (0.202, 0)], [(0.003, 1), (0.006, 1)]]


def test_methods_of_power_stand_out():
    panel = plot_transfer({"rows": TABLE["rows"][::2]}).axes[0]
    wsd, power = lines(panel, "o")
    assert (wsd.get_color(), power.get_color()) == ("0.4", "#0072b2")


def test_small_and_large_regrets_are_both_apart():
    """0.001 and 0.005 are at least a tenth of the axis apart, and so are 0.02 and 0.2."""
    figure = plot_transfer(TABLE)
    figure.draw_without_rendering()
    panel = figure.axes[0]
    at = {
        x: panel.transAxes.inverted().transform(panel.transData.transform((x, 0)))[0] for x in (0.001, 0.005, 0.02, 0.2)
    }
    assert at[0.005] - at[0.001] > 0.1
    assert at[0.2] - at[0.02] > 0.1


def test_one_cell_has_one_panel():
    figure = plot_transfer({"rows": [row("power", 0.003, width=0)]})
    assert [panel.get_title() for panel in figure.axes] == ["8,192 / step, 10M"]


def test_a_method_that_diverged_or_beat_the_oracle_is_on_the_axis():
    lost = row("wsd", math.inf) | {"low": math.nan, "high": math.nan}
    nan = math.nan
    rows = [lost, row("wsd", math.inf, 256) | {"low": nan, "high": nan}, row("power", -0.01), row("power", 0.02, 256)]
    figure = plot_transfer({"rows": rows})
    assert [xy(line) for line in lines(figure.axes[1], ">")] == [[(0.98, 0)]]
    assert figure.axes[0].get_xlim()[0] < -0.01


def test_nine_cells_wrap():
    figure = plot_transfer({"rows": [row("power", 0.003, tokens=10**i) for i in range(6, 15)]})
    panels = visible(figure)
    assert len(panels) == 10
    assert [panel.get_subplotspec().rowspan.start for panel in panels] == [0] * 4 + [1] * 4 + [2] * 2
