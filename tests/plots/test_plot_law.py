"""Pictures of a fitted law: its rate over the tokens, and the regret of others."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fits import BEST, LAW, cell, fit, unused
from pictures import legend, lines, xy
from sentences import refused

from hf_power.fit.result import RegretMap
from hf_power.plots.law import plot_law, plot_map
from hf_power.records.errors import UserError

matplotlib = pytest.importorskip("matplotlib")


def test_the_law_is_drawn_per_batch_with_its_optima():
    cells = [
        cell(tokens_per_step=b, width=w, tokens=n, optimum_lr=0.001 * b / 4096, optimum_interval=[0.0005, 0.1])
        for b in (4096, 16_384)
        for w in (64, 128)
        for n in (10**6, 10**7)
    ]
    figure = plot_law(fit(*cells, unused(tokens=10**12)))
    panel, rest = figure.axes
    assert (panel.get_xscale(), panel.get_yscale(), rest.get_yscale()) == ("log", "log", "linear")
    assert (panel.get_ylabel(), rest.get_xlabel()) == ("optimal learning rate", "horizon (tokens)")
    assert figure.get_suptitle() == (
        "The best rate falls as tokens^-0.30 (+-0.05) and grows as batch^0.70\n"
        "lr = 0.02 * beta^0.7 * tokens^-0.3 (warmup_stable_decay, R2 0.980)"
    )
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
    labels = ["4,096 tokens per step", "16,384 tokens per step", "best rate, width 64", "best rate, width 128"]
    assert legend(figure) == [*labels, "the paper's law", "95 %, below the scatter"]
    assert [text.get_text() for text in panel.texts] == ["4,096", "16,384"]


def test_error_bars_are_the_interval_and_the_sd():
    panel, rest = plot_law(fit(cell())).axes
    bar = panel.containers[0][2][0].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([BEST / 1.5, BEST * 1.5])
    assert bar[0, 0] == pytest.approx(8e6)
    assert rest.containers[0][0].get_ydata()[0] == -math.log2(1.2)
    bar = rest.containers[0][2][0].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([-math.log2(1.2) - 0.3, -math.log2(1.2) + 0.3])
    band = rest.patches[0]
    assert (band.get_y(), band.get_height()) == pytest.approx((-0.1, 0.2))


def test_the_band_is_the_central_95_percent_of_the_draws():
    """Draws of a uniform from 0.01 to 0.03: 2.5 % and 97.5 % lie at 0.0105 and 0.0295."""
    samples = [[a, -0.3, 0.7, None, 0.0, 0.0] for a in np.linspace(0.01, 0.03, 401)]
    panel, _ = plot_law(fit(cell(), samples=samples)).axes
    (path,) = panel.collections[0].get_paths()
    scale = 2**0.7 * path.vertices[:, 0] ** -0.3
    assert sorted(set(np.round(path.vertices[:, 1] / scale, 6))) == pytest.approx([0.0105, 0.0295])


def test_batches_above_the_critical_one_share_a_line():
    law = replace(LAW, critical_batch_tokens=8192.0)
    cells = [cell(tokens_per_step=batch) for batch in (4096, 16_384, 65_536)]
    figure = plot_law(fit(*cells, law=law))
    solid = [x for x in figure.axes[0].lines if len(x.get_xdata()) == 25 and x.get_linestyle() == "-"]
    assert solid[1].get_ydata() == pytest.approx(solid[2].get_ydata())
    assert solid[1].get_ydata() == pytest.approx(solid[0].get_ydata() * 2**0.7)
    assert "min(beta, beta_crit)^0.7" in figure.get_suptitle()


def test_a_law_without_a_used_cell_is_refused():
    with refused(UserError, "no used cell", "run learning rates on both sides"):
        plot_law(fit(unused()))


def regret(a, b):
    """Two cells at 1e6 and 1e8 tokens with curvature 0.02, whose optima are those of (0.02, -0.3)."""
    gaps = [np.log2(a / 0.02) + (b + 0.3) * math.log2(tokens) for tokens in (1e6, 1e8)]
    return sum(0.02 * gap**2 for gap in gaps) / 2


def mapped(**changes):
    a, b = np.geomspace(1e-4, 10, 41), np.linspace(-0.6, -0.2, 41)
    return fit(map=RegretMap(tuple(a), tuple(b), tuple(map(tuple, regret(a[None, :], b[:, None])))), **changes)


def test_the_map_shows_regret_the_fit_and_the_paper():
    figure = plot_map(mapped())
    panel, bar = figure.axes
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "linear")
    assert (panel.get_xlim(), panel.get_ylim()) == (pytest.approx((1e-4, 10)), pytest.approx((-0.6, -0.2)))
    assert (panel.get_xlabel(), panel.get_ylabel(), bar.get_ylabel()) == ("a", "b", "mean regret (nats per token)")
    (fitted,), (paper,) = lines(panel, "o"), lines(panel, "X")
    assert (xy(fitted), xy(paper)) == ([(0.02, -0.3)], [(4.6, -0.51)])
    assert legend(figure) == ["draws of the law", "95 % of the draws", "fitted (0.02, -0.3)", "paper (4.6, -0.51)"]
    # The one cell's optimum is 2**-7 at 8M tokens and beta 2, and its curvature .02.
    cost = 0.02 * (math.log2(4.6 * 2**0.7 * 8e6**-0.51) + 7) ** 2
    assert figure.get_suptitle() == "mean regret of lr = a * beta^0.7 * tokens^b, warmup_stable_decay"
    title = plot_map(replace(mapped(), cells=(cell(),))).get_suptitle()
    assert title.split("\n")[0] == f"On these cells the paper's a and b would cost {cost:.2g} nats per token"


def test_the_contours_are_those_of_the_regret():
    """Also in the valley, which is narrower than the spacing of the map."""
    panel = plot_map(mapped()).axes[0]
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


def test_the_ellipse_holds_95_percent_of_the_draws():
    generator = np.random.default_rng(1)
    b = generator.normal(-0.3, 0.02, 4000)
    log2_a = math.log2(0.02) - (b + 0.3) * 23 + generator.normal(0, 0.1, 4000)
    samples = np.column_stack([2**log2_a, b, np.full(4000, 0.7)])
    panel = plot_map(mapped(samples=[[*draw, None, 0.0, 0.0] for draw in samples.tolist()])).axes[0]
    (outline,) = (line for line in panel.lines if line.get_label() == "95 % of the draws")
    x, y = outline.get_data()
    inside = matplotlib.path.Path(np.column_stack([np.log2(x), y])).contains_points(np.column_stack([log2_a, b]))
    assert inside.mean() == pytest.approx(0.95, abs=0.01)
    assert len(lines(panel, ".")[0].get_xdata()) == 4000


def test_a_map_without_draws_has_no_ellipse():
    assert legend(plot_map(mapped(samples=[])))[0] == "fitted (0.02, -0.3)"
