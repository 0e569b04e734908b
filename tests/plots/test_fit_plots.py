"""Pictures of a fit, a plan, a transfer and a check: what is drawn where, against numbers worked out by hand."""

import json
import math
import sys

import numpy as np
import pytest
from sentences import says

from hf_power.fit.fit import fit_law
from hf_power.plan.plan import make_plan
from hf_power.plots.fit import plot_cells, plot_law, plot_map, plot_plan, plot_transfer, plot_verify
from hf_power.recipe import Recipe

pytestmark = pytest.mark.slow  # together

matplotlib = pytest.importorskip("matplotlib")

BEST = 2.0**-7
RATES = [2.0**-9, 2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5]
LAW = {"a": 0.02, "b": -0.3, "batch_exponent": 0.7, "critical_batch_tokens": None}


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws to a PNG that opens, and returns the figure."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    seen = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kw: (seen.append(figure), save(figure, *args, **kw)))

    def drawn(plot, content):
        path = plot(content, tmp_path / "picture.png")
        assert path == tmp_path / "picture.png"
        assert (imread(path)[..., :3].min(axis=-1) < 0.9).mean() > 0.005
        assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]
        return seen[-1]

    return drawn


def cell(**changes):
    """losses = 3 + 0.02 * (log2 lr + 7)**2"""
    values = {
        "schedule": "warmup_stable_decay",
        "width": 64,
        "tokens_per_step": 8192,
        "tokens": 8_000_000,
        "learning_rates": RATES,
        "losses": [3.08, 3.02, 3.0, 3.02, 3.08],
        "num_seeds": [2] * 5,
        "loss_sd": 0.01,
        "optimum_lr": BEST,
        "optimum_interval": [BEST / 1.5, BEST * 1.5],
        "optimum_sd_octaves": 0.3,
        "curvature": 0.02,
        "min_loss": 3.0,
        "used": True,
        "reason": None,
        "law_lr": BEST * 1.2,
        "residual_octaves": -math.log2(1.2),
        "regret": 0.001,
    }
    return values | changes


def unused(reason="the loss is lowest at the highest learning rate, 0.0312: run higher ones", **changes):
    names = ("optimum_lr", "optimum_interval", "optimum_sd_octaves", "curvature", "residual_octaves", "regret")
    losses = [3.4, 3.3, 3.2, 3.15, 3.12]
    return cell(used=False, reason=reason, losses=losses, min_loss=3.12, **dict.fromkeys(names), **changes)


def fit(*cells, **changes):
    values = {
        "schedule": "warmup_stable_decay",
        "law": LAW,
        "r2": 0.98,
        "residual_sd_octaves": 0.1,
        "cells": list(cells),
        "samples": [[0.02, -0.3, 0.7]] * 3,
    }
    return values | changes


def lines(panel, marker, length=None):
    found = [line for line in panel.lines if line.get_marker() == marker]
    return [line for line in found if length is None or len(line.get_xdata()) == length]


def xy(line):
    return list(zip(*line.get_data(), strict=True))


def visible(figure):
    return [panel for panel in figure.axes if panel.axison]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def verticals(panel):
    return [line.get_xdata()[0] for line in panel.lines if list(line.get_ydata()) == [0, 1]]


# --- cells ---


def test_a_cell_is_points_above_its_minimum_its_parabola_and_its_optimum(draw):
    figure = draw(plot_cells, fit(cell()))
    (panel,) = figure.axes
    assert panel.get_xscale() == "log"
    assert panel.xaxis.get_transform().base == 2
    assert (panel.get_xlabel(), figure.get_supylabel()) == ("learning rate", "loss above its minimum (nats per token)")
    assert panel.get_title() == "width 64, 8.19k tokens per step"
    (points,) = lines(panel, "o", 5)
    assert list(points.get_xdata()) == RATES
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


def test_points_are_above_the_parabola_s_minimum_not_the_lowest_mean(draw):
    (panel,) = draw(plot_cells, fit(cell(min_loss=2.99))).axes
    assert min(lines(panel, "o", 5)[0].get_ydata()) == pytest.approx(0.01)


def test_the_parabola_is_drawn_where_it_was_fitted(draw):
    """Two octaves on both sides of the lowest mean, see the cells; the run three octaves below is outside."""
    far = cell(learning_rates=[2.0**-10, *RATES], losses=[3.1, 3.08, 3.02, 3.0, 3.02, 3.08], num_seeds=[2] * 6)
    (panel,) = draw(plot_cells, fit(far)).axes
    (curve,) = (line for line in panel.lines if len(line.get_xdata()) == 60)
    assert curve.get_xdata()[0] == pytest.approx(2.0**-9)


def test_horizons_have_their_own_color_marker_and_height(draw):
    tokens = [10**6 * 2**i for i in range(5)]
    figure = draw(plot_cells, fit(*(cell(tokens=n, optimum_lr=BEST / 2**i) for i, n in enumerate(tokens))))
    (panel,) = figure.axes
    assert legend(figure)[:5] == ["1M tokens", "2M tokens", "4M tokens", "8M tokens", "16M tokens"]
    optima = [line for line in panel.lines if len(line.get_xdata()) == 1 and line.get_marker() != "|"]
    assert [line.get_xdata()[0] for line in optima] == [BEST / 2**i for i in range(5)]
    assert len({line.get_marker() for line in optima}) == len({line.get_color() for line in optima}) == 5
    heights = [line.get_ydata()[0] for line in optima]
    assert heights == sorted(heights, reverse=True)
    assert panel.get_ylim()[0] < heights[-1] < heights[0] < 0


def test_a_panel_per_width_and_batch_widths_in_rows(draw):
    cells = [cell(width=w, tokens_per_step=b) for b in (1000, 2000, 4000, 8000) for w in (256, 64, 128)]
    figure = draw(plot_cells, fit(*cells))
    titles = [f"width {w}, {b}k tokens per step" for w in (64, 128, 256) for b in (1, 2, 4, 8)]
    assert [panel.get_title() for panel in figure.axes] == titles
    assert len({panel.get_ylim() for panel in figure.axes} | {panel.get_xlim() for panel in figure.axes}) == 2
    rows = [panel.get_subplotspec().rowspan.start for panel in figure.axes]
    assert rows == [0] * 4 + [1] * 4 + [2] * 4
    assert [bool(panel.get_xlabel()) for panel in figure.axes] == [False] * 8 + [True] * 4


@pytest.mark.parametrize("num_panels", [1, 2])
def test_a_full_legend_lies_within_the_picture_and_beside_the_panels(draw, num_panels):
    batches = [1000 * 2**i for i in range(num_panels)]
    cells = [cell(tokens_per_step=batch, tokens=10**6 * 2**i) for batch in batches for i in range(5)]
    figure = draw(plot_cells, fit(*cells, unused(tokens_per_step=1000, tokens=10**9)))
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert box.y1 <= min(panel.get_tightbbox().y0 for panel in figure.axes)
    assert figure.axes[0].bbox.height > 3 * box.height


def test_seven_batches_take_two_rows_and_unknown_widths_are_not_named(draw):
    figure = draw(plot_cells, fit(*(cell(width=0, tokens_per_step=1000 * i) for i in range(1, 8))))
    panels = visible(figure)
    assert [panel.get_title() for panel in panels] == [f"{i}k tokens per step" for i in range(1, 8)]
    assert [bool(panel.get_xlabel()) for panel in panels] == [False] * 3 + [True] * 4


def test_unused_cells_are_gray_with_their_reason(draw):
    few = "only 2 learning rates finished, a parabola needs 3"
    cells = [cell(), unused(tokens=16_000_000), unused(tokens=32_000_000), unused(few, tokens=64_000_000)]
    figure = draw(plot_cells, fit(*cells))
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


def test_what_diverged_or_is_too_high_is_marked_at_the_top(draw):
    rates = [*RATES, 2.0**-4, 2.0**-3, 2.0**-2]
    losses = [3.08, 3.02, 3.0, 3.02, 3.08, 9.0, math.nan, None]
    figure = draw(plot_cells, fit(cell(learning_rates=rates, losses=losses, num_seeds=[2] * 8)))
    (panel,) = figure.axes
    assert [line.get_xdata()[0] for line in lines(panel, "x")] == [2.0**-3, 2.0**-2]
    assert [line.get_xdata()[0] for line in lines(panel, "^")] == [2.0**-4]
    assert panel.get_ylim()[1] == pytest.approx(1.15 * 0.08)
    assert legend(figure)[-2:] == ["higher than shown", "diverged"]


def test_cells_without_any_optimum_or_any_loss_are_drawn(draw):
    nothing = unused("only 0 learning rates finished, a parabola needs 3", tokens=16_000_000)
    nothing |= {"losses": [math.inf] * 5, "min_loss": None, "loss_sd": None}
    figure = draw(plot_cells, fit(unused(), nothing))
    assert len(lines(figure.axes[0], "x")) == 5


# --- law ---


def test_the_law_is_drawn_per_batch_with_its_optima(draw):
    cells = [
        cell(tokens_per_step=b, width=w, tokens=n, optimum_lr=0.001 * b / 4096, optimum_interval=[0.0005, 0.1])
        for b in (4096, 16_384)
        for w in (64, 128)
        for n in (10**6, 10**7)
    ]
    figure = draw(plot_law, fit(*cells, unused(tokens=10**12)))
    panel, rest = figure.axes
    assert (panel.get_xscale(), panel.get_yscale(), rest.get_yscale()) == ("log", "log", "linear")
    assert (panel.get_ylabel(), rest.get_xlabel()) == ("optimal learning rate", "horizon (tokens)")
    assert figure.get_suptitle() == "lr = 0.02 * beta^0.7 * tokens^-0.3   (warmup_stable_decay, R2 0.980)"
    laws = [line for line in panel.lines if len(line.get_xdata()) == 25]
    fitted, papers = ([line for line in laws if line.get_linestyle() == style] for style in ("-", "--"))
    for beta, line, paper in zip((1, 4), fitted, papers, strict=True):
        x, y = line.get_data()
        assert x[0] < 10**6 < 10**7 < x[-1] < 10**8
        assert y == pytest.approx(0.02 * beta**0.7 * x**-0.3)
        assert paper.get_ydata() == pytest.approx(4.6 * beta * x**-0.51)
        assert line.get_color() == paper.get_color()
    assert fitted[0].get_color() != fitted[1].get_color()
    optima = [line for line in panel.lines if len(line.get_xdata()) == 1 and line.get_marker() in "os"]
    found = sorted((line.get_ydata()[0], line.get_marker(), line.get_xdata()[0]) for line in optima)
    assert [(y, m) for y, m, _ in found] == [(y, m) for y in (0.001, 0.004) for m in "os" for _ in range(2)]
    assert [x for *_, x in found] == pytest.approx([10**6, 10**7] * 4, rel=0.15)
    assert len({x for *_, x in found}) == 4  # widths side by side
    labels = ["4.1k tokens per step", "16.4k tokens per step", "width 64", "width 128", "the paper's law"]
    assert legend(figure) == labels


def test_error_bars_are_the_interval_and_the_sd(draw):
    panel, rest = draw(plot_law, fit(cell())).axes
    bar = panel.containers[0][2][0].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([BEST / 1.5, BEST * 1.5])
    assert bar[0, 0] == pytest.approx(8e6)
    assert rest.containers[0][0].get_ydata()[0] == -math.log2(1.2)
    bar = rest.containers[0][2][0].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([-math.log2(1.2) - 0.3, -math.log2(1.2) + 0.3])
    band = rest.patches[0]
    assert (band.get_y(), band.get_height()) == pytest.approx((-0.1, 0.2))


def test_the_band_is_the_central_95_percent_of_the_draws(draw):
    """Draws of a uniform from 0.01 to 0.03: 2.5 % and 97.5 % lie at 0.0105 and 0.0295."""
    samples = [[a, -0.3, 0.7] for a in np.linspace(0.01, 0.03, 401)]
    panel, _ = draw(plot_law, fit(cell(), samples=samples)).axes
    (path,) = panel.collections[0].get_paths()
    scale = 2**0.7 * path.vertices[:, 0] ** -0.3
    assert sorted(set(np.round(path.vertices[:, 1] / scale, 6))) == pytest.approx([0.0105, 0.0295])


def test_batches_above_the_critical_one_share_a_line(draw):
    law = LAW | {"critical_batch_tokens": 8192.0}
    cells = [cell(tokens_per_step=batch) for batch in (4096, 16_384, 65_536)]
    figure = draw(plot_law, fit(*cells, law=law))
    solid = [x for x in figure.axes[0].lines if len(x.get_xdata()) == 25 and x.get_linestyle() == "-"]
    assert solid[1].get_ydata() == pytest.approx(solid[2].get_ydata())
    assert solid[1].get_ydata() == pytest.approx(solid[0].get_ydata() * 2**0.7)
    assert "min(beta, beta_crit)^0.7" in figure.get_suptitle()


def test_a_law_without_a_used_cell_is_refused(tmp_path):
    with pytest.raises(ValueError) as caught:
        plot_law(fit(unused()), tmp_path / "law.png")
    says(caught, "no used cell", "run learning rates on both sides")


# --- map ---


def regret(a, b):
    """Two cells at 1e6 and 1e8 tokens with curvature 0.02, whose optima are those of (0.02, -0.3)."""
    gaps = [np.log2(a / 0.02) + (b + 0.3) * math.log2(tokens) for tokens in (1e6, 1e8)]
    return sum(0.02 * gap**2 for gap in gaps) / 2


def mapped(**changes):
    a, b = np.geomspace(1e-4, 10, 41), np.linspace(-0.6, -0.2, 41)
    table = {"a": a.tolist(), "b": b.tolist(), "regret": regret(a[None, :], b[:, None]).tolist()}
    return fit(map=table, **changes)


def test_the_map_shows_regret_the_fit_and_the_paper(draw):
    figure = draw(plot_map, mapped())
    panel, bar = figure.axes
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "linear")
    assert (panel.get_xlim(), panel.get_ylim()) == (pytest.approx((1e-4, 10)), pytest.approx((-0.6, -0.2)))
    assert (panel.get_xlabel(), panel.get_ylabel(), bar.get_ylabel()) == ("a", "b", "mean regret (nats per token)")
    (fitted,), (paper,) = lines(panel, "o"), lines(panel, "X")
    assert (xy(fitted), xy(paper)) == ([(0.02, -0.3)], [(4.6, -0.51)])
    assert legend(figure) == ["95 % of the draws", "fitted (0.02, -0.3)", "paper (4.6, -0.51)"]
    assert panel.get_title() == "Regret of lr = a * beta^0.7 * tokens^b (warmup_stable_decay)"


def test_the_contours_are_those_of_the_regret(draw):
    """Also in the valley, which is narrower than the spacing of the map."""
    panel = draw(plot_map, mapped()).axes[0]
    assert 2 < max(regret(a, b) for a in (1e-4, 10) for b in (-0.6, -0.2)) < 5
    (contours,) = (c for c in panel.collections if hasattr(c, "levels"))
    assert list(contours.levels) == [0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    generator = np.random.default_rng(0)
    b = generator.uniform(-0.58, -0.22, 300)
    a = 0.02 * 2.0 ** (-(b + 0.3) * math.log2(1e7) + generator.uniform(-3, 3, 300))
    a = np.clip(a, 1.1e-4, 9)
    band = np.searchsorted(contours.levels, regret(a, b)) - 1
    margin = np.min(np.abs(np.log(np.array(contours.levels[1:])[:, None] / regret(a, b))), axis=0)
    clear = margin > 0.05
    assert set(band[clear]) >= {0, 1, 2, 3, 4, 5, 6}
    for x, y, i in zip(a[clear], b[clear], band[clear], strict=True):
        assert contours.get_paths()[i].contains_point((x, y)), (x, y, i)


def test_the_ellipse_holds_95_percent_of_the_draws(draw):
    generator = np.random.default_rng(1)
    b = generator.normal(-0.3, 0.02, 4000)
    log2_a = math.log2(0.02) - (b + 0.3) * 23 + generator.normal(0, 0.1, 4000)
    samples = np.column_stack([2**log2_a, b, np.full(4000, 0.7)])
    panel = draw(plot_map, mapped(samples=samples.tolist())).axes[0]
    (outline,) = (line for line in panel.lines if line.get_label() == "95 % of the draws")
    x, y = outline.get_data()
    inside = matplotlib.path.Path(np.column_stack([np.log2(x), y])).contains_points(np.column_stack([log2_a, b]))
    assert inside.mean() == pytest.approx(0.95, abs=0.01)
    assert len(lines(panel, ".")[0].get_xdata()) == 4000


def test_a_map_without_draws_has_no_ellipse(draw):
    assert legend(draw(plot_map, mapped(samples=[])))[0] == "fitted (0.02, -0.3)"


# --- plan ---


def plan(**changes):
    """1e9 tokens under min(0.01, 100 / sqrt(n)): the cap ends at 1e8; warmup to 1e7; a linear tail from 9e8 on."""

    def point(n):
        tail = min(1.0, (10**9 - n) / 10**8)
        lr = min(0.01, 100 / math.sqrt(min(n, 9e8))) * min(1.0, n / 1e7) * tail
        return {"tokens": n, "lr": lr, "low": 0.8 * lr, "high": 1.25 * lr}

    curve = [point(n) for n in sorted({*np.geomspace(10**6, 10**9, 60).astype(int).tolist(), 9 * 10**8, 10**9})]
    shares = [{"what": what, **point(n)} for what, n in (("10%", 10**8), ("50%", 5 * 10**8), ("end", 10**9))]
    shares.append({"what": "decay starts", **point(9 * 10**8)})
    values = {
        "target": {"tokens": 10**9},
        "tokens_per_step": 10**6,
        "warmup_tokens": 10**7,
        "cap_ends_tokens": 10**8,
        "decay_start_tokens": 9 * 10**8,
        "milestones": shares,
        "curve": curve,
    }
    return values | changes


def test_a_plan_is_its_curve_with_band_corners_and_milestones(draw):
    figure = draw(plot_plan, plan())
    law, run = figure.axes
    assert (law.get_xscale(), law.get_yscale(), run.get_xscale(), run.get_yscale()) == (
        "log",
        "log",
        "linear",
        "linear",
    )
    assert (law.get_ylabel(), run.get_xlabel()) == ("learning rate", "tokens seen")
    assert figure.get_suptitle() == "1B tokens, 1M tokens per step; band: 95 % interval"
    for panel in (law, run):
        curve = panel.lines[0]
        assert list(curve.get_xdata()) == [p["tokens"] for p in plan()["curve"]]
        assert list(curve.get_ydata()) == [p["lr"] for p in plan()["curve"]]
        assert panel.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(0.0125)
        assert verticals(panel) == [10**7, 10**8, 9 * 10**8]
        assert [xy(line)[0][0] for line in lines(panel, "o")] == [10**8, 5 * 10**8, 10**9, 9 * 10**8]
    texts = [text.get_text().strip() for text in law.texts]
    assert texts == ["warmup ends, 10M", "cap ends, 100M", "decay starts, 900M"]
    assert [text.get_text() for text in run.texts] == ["10%\n0.01", "50%\n0.0045", "end\n0"]
    # The tail goes to 0 and the scale does not follow it.
    assert law.get_ylim()[0] == pytest.approx(0.2 * 100 / math.sqrt(9e8))
    assert law.xaxis.get_major_formatter()(10**8, 0) == "100M"


def test_a_plan_without_warmup_cap_or_tail_has_no_corners(draw):
    curve = plan()["curve"][:40]
    none = {"warmup_tokens": 0, "cap_ends_tokens": None, "decay_start_tokens": None}
    law, run = draw(plot_plan, plan(curve=curve, **none)).axes
    assert verticals(law) == verticals(run) == []
    assert list(law.texts) == []
    assert law.get_xlim()[0] == 10**6


# --- transfer ---


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


def test_a_transfer_has_a_panel_for_all_cells_and_one_for_each(draw):
    figure = draw(plot_transfer, TABLE)
    panels = visible(figure)
    assert [panel.get_title() for panel in panels] == [
        "all 2 cells, median",
        "width 128, 8.19k / step, 10M",
        "width 256, 8.19k / step, 10M",
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


def test_methods_of_power_stand_out(draw):
    panel = draw(plot_transfer, {"rows": TABLE["rows"][::2]}).axes[0]
    wsd, power = lines(panel, "o")
    assert (wsd.get_color(), power.get_color()) == ("0.4", "#0072b2")


def test_small_and_large_regrets_are_both_apart(draw):
    """0.001 and 0.005 are at least a tenth of the axis apart, and so are 0.02 and 0.2."""
    panel = draw(plot_transfer, TABLE).axes[0]
    at = {
        x: panel.transAxes.inverted().transform(panel.transData.transform((x, 0)))[0] for x in (0.001, 0.005, 0.02, 0.2)
    }
    assert at[0.005] - at[0.001] > 0.1
    assert at[0.2] - at[0.02] > 0.1


def test_one_cell_has_one_panel(draw):
    figure = draw(plot_transfer, {"rows": [row("power", 0.003, width=0)]})
    assert [panel.get_title() for panel in figure.axes] == ["8.19k / step, 10M"]


def test_a_method_that_diverged_or_beat_the_oracle_is_on_the_axis(draw):
    lost = row("wsd", math.inf) | {"low": math.nan, "high": math.nan}
    rows = [
        lost,
        row("wsd", math.inf, 256) | {"low": math.nan, "high": math.nan},
        row("power", -0.01),
        row("power", 0.02, 256),
    ]
    figure = draw(plot_transfer, {"rows": rows})
    assert [xy(line) for line in lines(figure.axes[1], ">")] == [[(0.98, 0)]]
    assert figure.axes[0].get_xlim()[0] < -0.01


def test_nine_cells_wrap(draw):
    figure = draw(plot_transfer, {"rows": [row("power", 0.003, tokens=10**i) for i in range(6, 15)]})
    panels = visible(figure)
    assert len(panels) == 10
    assert [panel.get_subplotspec().rowspan.start for panel in panels] == [0] * 4 + [1] * 4 + [2] * 2


# --- verify ---


def page(losses=(3.05, 3.01, 3.03), sd=0.004, **changes):
    points = [{"factor": f, "loss": x, "sd": sd} for f, x in zip((0.5, 1.0, 2.0), losses, strict=True)]
    parabola = {"optimum_factor": 1.25, "min_loss": 3.0, "curvature": 0.03}
    return {"verdict": "passed", "points": points, "parabola": parabola, "tolerance": 0.02} | changes


def test_a_check_is_its_points_the_parabola_and_the_tolerance(draw):
    figure = draw(plot_verify, page())
    (panel,) = figure.axes
    assert (figure.get_suptitle(), figure._suptitle.get_color()) == ("Check before the run: passed", "darkgreen")
    assert panel.get_xscale() == "log"
    assert [label.get_text() for label in panel.get_xticklabels()] == ["0.5", "1 (recipe)", "2"]
    assert panel.get_ylabel() == "held-out loss (nats per token)"
    assert [xy(line)[0] for line in lines(panel, "o")] == [(0.5, 3.05), (1.0, 3.01), (2.0, 3.03)]
    assert panel.containers[1][2][0].get_segments()[0][:, 1].tolist() == pytest.approx([3.006, 3.014])
    (band,) = panel.patches
    assert (band.get_y(), band.get_height()) == pytest.approx((3.0, 0.02))
    (curve,) = (line for line in panel.lines if len(line.get_xdata()) == 100)
    x, y = curve.get_data()
    assert (x[0], x[-1]) == pytest.approx((0.5, 2.0))
    assert y == pytest.approx(3.0 + 0.03 * np.log2(x / 1.25) ** 2)
    assert xy(lines(panel, "v")[0]) == [(1.25, 3.0)]
    assert legend(figure) == ["within 0.02 nats of the best", "parabola", "its optimum, 1.25 times"]


def test_a_failed_check_says_why(draw):
    figure = draw(plot_verify, page((3.05, 3.1, 3.2), None, verdict="FAILED", parabola=None, reasons=["too slow"]))
    assert figure.get_suptitle() == "Check before the run: FAILED\ntoo slow"
    assert figure._suptitle.get_color() == "darkred"
    assert figure.axes[0].patches[0].get_y() == 3.05  # without a parabola the best point counts
    assert legend(figure) == ["within 0.02 nats of the best"]


@pytest.mark.parametrize(("losses", "lost"), [((3.0, 3.1, math.inf), [2.0]), ((math.inf,) * 3, [0.5, 1.0, 2.0])])
def test_a_check_marks_what_diverged(draw, losses, lost):
    (panel,) = draw(plot_verify, page(losses, None, verdict="FAILED", parabola=None)).axes
    assert [line.get_xdata()[0] for line in lines(panel, "x")] == lost
    assert [text.get_text() for text in panel.texts] == ["diverged"] * len(lost)
    assert len(lines(panel, "o")) == 3 - len(lost)


# --- what the others write ---


def test_what_the_fit_writes_can_be_drawn(draw):
    """As it comes back from its file: three batches, four horizons, noise, a cell that is not bracketed."""
    generator = np.random.default_rng(0)
    rows = []
    for batch in (4096, 8192, 16_384):
        for tokens in (10**6, 2 * 10**6, 4 * 10**6, 8 * 10**6):
            for k in range(-2, 3) if (batch, tokens) != (8192, 10**6) else range(2, 5):
                best = 4.6 * batch / 4096 * tokens**-0.51
                loss = 3 + 0.03 * (k + 0.2) ** 2 + generator.normal(0, 0.002)
                rows.append({"schedule": "cosine", "width": 64, "tokens_per_step": batch, "tokens": tokens, "seed": 0})
                rows[-1] |= {"learning_rate": best * 2.0**k, "status": "finished", "loss": loss}
                rows[-1] |= {"trunk": f"{batch} {tokens} {k}"}
    content = json.loads(json.dumps(fit_law(rows, schedule="cosine").to_dict()))
    assert len(draw(plot_cells, content).axes) == 3
    assert len(draw(plot_law, content).axes[0].containers) == 11  # optima
    (fitted,) = lines(draw(plot_map, content).axes[0], "o")
    assert xy(fitted) == [(content["law"]["a"], content["law"]["b"])]


def test_what_the_plan_writes_can_be_drawn(draw):
    content = make_plan(Recipe(warmup_tokens=10**9), tokens=10**12, tokens_per_step=2**22, parameters=10**9)
    law, _ = draw(plot_plan, json.loads(json.dumps(content))).axes
    # (a * beta / cap)**(1 / 0.51) = (4 * 1024 / 0.02)**1.96 = 2.6e10; the tail is the last tenth.
    assert verticals(law) == pytest.approx([1e9, 2.6e10, 9e11], rel=0.01)


@pytest.mark.parametrize(
    ("plot", "name", "what"),
    [
        (plot_cells, "cells", "fit"),
        (plot_law, "cells", "fit"),
        (plot_map, "map", "fit"),
        (plot_plan, "curve", "plan"),
        (plot_transfer, "rows", "table"),
        (plot_verify, "points", "page"),
    ],
)
def test_nothing_to_draw_is_refused(tmp_path, plot, name, what):
    for content, got in (({}, "None"), ({name: []}, "[]")):
        with pytest.raises(ValueError) as caught:
            plot(content, tmp_path / "picture.png")
        says(caught, f"the {what} has no {name} to draw", f"got {got}", "pass one")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plot", [plot_cells, plot_law, plot_map, plot_plan, plot_transfer, plot_verify])
def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch, plot):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    content = plan() | page() | mapped(cells=[cell()]) | TABLE
    with pytest.raises(ImportError) as caught:
        plot(content, tmp_path / "picture.png")
    says(caught, "matplotlib is needed for plots", 'pip install "hf_power[plots]"')
