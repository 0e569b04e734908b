"""The picture of a sweep's cells."""

import math

import numpy as np
import pytest
from fits import BEST, RATES, cell, fit, unused
from pictures import legend, lines, visible, xy

from hf_power.fit.result import PowerFit
from hf_power.plots.cells import pages_of, plot_cells

matplotlib = pytest.importorskip("matplotlib")


def test_a_cell_is_points_above_its_minimum_its_parabola_and_its_optimum():
    figure = plot_cells(fit(cell()))
    (panel,) = figure.axes
    assert panel.get_xscale() == "log"
    assert panel.xaxis.get_transform().base == 2
    assert (panel.get_xlabel(), figure.get_supylabel()) == ("learning rate", "loss above its minimum (nats per token)")
    assert panel.get_title() == "width 64, 8,192 tokens per step"
    (points,) = lines(panel, "o", 5)
    assert tuple(points.get_xdata()) == RATES
    assert list(points.get_ydata()) == pytest.approx([0.08, 0.02, 0, 0.02, 0.08])
    (bars,) = (c for c in panel.collections if len(c.get_segments()) == 5)
    assert [segment[:, 1].tolist() for segment in bars.get_segments()][2] == pytest.approx([-0.01, 0.01])
    (curve,) = (line for line in panel.lines if len(line.get_xdata()) == 60)
    x, y = curve.get_data()
    assert (x[0], x[-1]) == pytest.approx((RATES[0], RATES[-1]))
    assert y == pytest.approx(0.02 * (np.log2(x) + 7) ** 2)
    (optimum,), (law,) = lines(panel, "o", 1), lines(panel, "|")
    (interval,) = (line for line in panel.lines if list(line.get_xdata()) == [BEST / 1.5, BEST * 1.5])
    assert (optimum.get_xdata()[0], law.get_xdata()[0]) == (BEST, BEST * 1.2)
    assert panel.get_ylim()[0] < optimum.get_ydata()[0] < 0
    assert {*optimum.get_ydata(), *law.get_ydata()} == set(interval.get_ydata())
    assert min(panel.get_yticks()) == 0
    assert legend(figure) == ["8M tokens", "optimum, 95 % interval", "the law's rate"]


def test_the_title_is_what_the_cells_say_and_the_ticks_are_the_rates_that_were_run():
    figure = plot_cells(fit(cell(), cell(tokens=16_000_000, residual_octaves=0.5, regret=0.005), unused(tokens=10**9)))
    assert figure.get_suptitle().replace("\n", " ") == (
        "2 of 3 cells show a best rate between those that were run; "
        "the law is at most 0.50 octaves off, which costs up to 0.0050 nats per token"
    )
    (panel,) = figure.axes
    assert tuple(panel.get_xticks()) == RATES
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.002", "0.0039", "0.0078", "0.016", "0.031"]


def test_many_rates_are_all_ticks_with_few_labels():
    rates = [2.0 ** (-9 + 0.1 * i) for i in range(41)]
    many = cell(learning_rates=rates, losses=[3 + 0.02 * (math.log2(x) + 7) ** 2 for x in rates], num_seeds=[2] * 41)
    (panel,) = plot_cells(fit(many)).axes
    assert list(panel.get_xticks()) == rates
    assert 4 <= sum(bool(label.get_text()) for label in panel.get_xticklabels()) <= 7


def test_power_s_cells_have_a_page_of_their_own():
    power = PowerFit(0.02, (0.01, 0.03), None, None, (cell(schedule="power"),))
    assert set(pages_of(fit(cell()))) == {"cells"}
    pages = pages_of(fit(cell(), power=power))
    assert set(pages) == {"cells", "cells-power"}
    assert plot_cells(pages["cells-power"]).get_suptitle().startswith("Power: 1 of 1 cells show a best rate")


def test_points_are_above_the_parabola_s_minimum_not_the_lowest_mean():
    (panel,) = plot_cells(fit(cell(min_loss=2.99))).axes
    assert min(lines(panel, "o", 5)[0].get_ydata()) == pytest.approx(0.01)


def test_the_parabola_is_drawn_where_it_was_fitted():
    """Two octaves on both sides of the lowest mean, see the cells; the run three octaves below is outside."""
    far = cell(learning_rates=[2.0**-10, *RATES], losses=[3.1, 3.08, 3.02, 3.0, 3.02, 3.08], num_seeds=[2] * 6)
    (panel,) = plot_cells(fit(far)).axes
    (curve,) = (line for line in panel.lines if len(line.get_xdata()) == 60)
    assert curve.get_xdata()[0] == pytest.approx(2.0**-9)


def test_horizons_have_their_own_color_marker_and_height():
    tokens = [10**6 * 2**i for i in range(5)]
    figure = plot_cells(fit(*(cell(tokens=n, optimum_lr=BEST / 2**i) for i, n in enumerate(tokens))))
    (panel,) = figure.axes
    assert legend(figure)[:5] == ["1M tokens", "2M tokens", "4M tokens", "8M tokens", "16M tokens"]
    optima = [line for line in panel.lines if len(line.get_xdata()) == 1 and line.get_marker() != "|"]
    assert [line.get_xdata()[0] for line in optima] == [BEST / 2**i for i in range(5)]
    assert len({line.get_marker() for line in optima}) == len({line.get_color() for line in optima}) == 5
    heights = [line.get_ydata()[0] for line in optima]
    assert heights == sorted(heights, reverse=True)
    assert panel.get_ylim()[0] < heights[-1] < heights[0] < 0


def test_a_panel_per_width_and_batch_widths_in_rows():
    cells = [cell(width=w, tokens_per_step=b) for b in (1000, 2000, 4000, 8000) for w in (256, 64, 128)]
    figure = plot_cells(fit(*cells))
    titles = [f"width {w}, {b},000 tokens per step" for w in (64, 128, 256) for b in (1, 2, 4, 8)]
    assert [panel.get_title() for panel in figure.axes] == titles
    assert len({panel.get_ylim() for panel in figure.axes} | {panel.get_xlim() for panel in figure.axes}) == 2
    rows = [panel.get_subplotspec().rowspan.start for panel in figure.axes]
    assert rows == [0] * 4 + [1] * 4 + [2] * 4
    assert [bool(panel.get_xlabel()) for panel in figure.axes] == [False] * 8 + [True] * 4


@pytest.mark.parametrize("num_panels", [1, 2])
def test_a_full_legend_lies_within_the_picture_and_beside_the_panels(num_panels):
    batches = [1000 * 2**i for i in range(num_panels)]
    cells = [cell(tokens_per_step=batch, tokens=10**6 * 2**i) for batch in batches for i in range(5)]
    figure = plot_cells(fit(*cells, unused(tokens_per_step=1000, tokens=10**9)))
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert box.y1 <= min(panel.get_tightbbox().y0 for panel in figure.axes)
    assert figure.axes[0].bbox.height > 3 * box.height


def test_seven_batches_take_two_rows_and_unknown_widths_are_not_named():
    figure = plot_cells(fit(*(cell(width=0, tokens_per_step=1000 * i) for i in range(1, 8))))
    panels = visible(figure)
    assert [panel.get_title() for panel in panels] == [f"{i},000 tokens per step" for i in range(1, 8)]
    assert [bool(panel.get_xlabel()) for panel in panels] == [False] * 3 + [True] * 4


def test_unused_cells_are_gray_with_their_reason():
    few = "only 2 learning rates finished, a parabola needs 3"
    cells = [cell(), unused(tokens=16_000_000), unused(tokens=32_000_000), unused(reason=few, tokens=64_000_000)]
    figure = plot_cells(fit(*cells))
    (panel,) = figure.axes
    gray = [line for line in panel.lines if line.get_color() == "0.6" and line.get_linestyle() == "-"]
    assert len(gray) == 3
    for line in gray:  # the two runs that are higher than the panel are marks at its top
        assert xy(line) == [(RATES[2], pytest.approx(0.08)), (RATES[3], pytest.approx(0.03)), (RATES[4], 0)]
    assert sorted(line.get_xdata()[0] for line in lines(panel, "^")) == sorted(RATES[:2] * 3)
    (text,) = panel.texts
    assert text.get_text().replace("\n", " ") == (
        "16M, 32M: the loss is lowest at the highest learning rate 64M: only 2 learning rates finished"
    )
    # The text has room of its own above the curves.
    assert panel.get_ylim()[1] > 1.15 * 0.08 * 1.2
    assert legend(figure)[-2:] == ["not used", "higher than shown"]


def test_what_diverged_or_is_too_high_is_marked_at_the_top():
    rates = [*RATES, 2.0**-4, 2.0**-3, 2.0**-2]
    losses = [3.08, 3.02, 3.0, 3.02, 3.08, 9.0, math.nan, math.inf]
    figure = plot_cells(fit(cell(learning_rates=rates, losses=losses, num_seeds=[2] * 8)))
    (panel,) = figure.axes
    assert [line.get_xdata()[0] for line in lines(panel, "x")] == [2.0**-3, 2.0**-2]
    assert [line.get_xdata()[0] for line in lines(panel, "^")] == [2.0**-4]
    assert panel.get_ylim()[1] == pytest.approx(1.15 * 0.08)
    assert legend(figure)[-2:] == ["higher than shown", "diverged"]


def test_cells_without_any_optimum_or_any_loss_are_drawn():
    lost = {"losses": (math.inf,) * 5, "min_loss": None, "loss_sd": None}
    nothing = unused(reason="only 0 learning rates finished, a parabola needs 3", tokens=16_000_000, **lost)
    figure = plot_cells(fit(unused(), nothing))
    assert len(lines(figure.axes[0], "x")) == 5
