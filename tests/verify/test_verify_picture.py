"""The picture of the check before a big run."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import legend, lines, xy

from hf_power.verify.picture import plot_verify

matplotlib = pytest.importorskip("matplotlib")


def page(losses=(3.05, 3.01, 3.03), sd=0.004, **changes):
    points = [SimpleNamespace(factor=f, loss=x, sd=sd) for f, x in zip((0.5, 1.0, 2.0), losses, strict=True)]
    parabola = SimpleNamespace(optimum_factor=1.25, min_loss=3.0, curvature=0.03)
    values = {"verdict": "passed", "reasons": [], "points": points, "parabola": parabola, "tolerance": 0.02}
    values["conclusion"] = "The rate holds."
    return SimpleNamespace(**values | changes)


def test_a_check_is_its_points_the_parabola_and_the_tolerance():
    figure = plot_verify(page())
    (panel,) = figure.axes
    assert (figure.get_suptitle(), figure._suptitle.get_color()) == ("passed: The rate holds.", "darkgreen")
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
    assert legend(figure) == [
        *("within 0.02 nats of the best", "parabola", "its optimum, 1.25 times"),
        *("the recipe's rate", "other rates, bars: sd over seeds"),
    ]


def test_a_failed_check_says_why():
    figure = plot_verify(page((3.05, 3.1, 3.2), None, verdict="FAILED", parabola=None, conclusion="It is slow."))
    assert figure.get_suptitle() == "FAILED: It is slow."
    assert figure._suptitle.get_color() == "darkred"
    assert figure.axes[0].patches[0].get_y() == 3.05  # without a parabola the best point counts
    assert legend(figure)[0] == "within 0.02 nats of the best"


@pytest.mark.parametrize(("losses", "lost"), [((3.0, 3.1, math.inf), [2.0]), ((math.inf,) * 3, [0.5, 1.0, 2.0])])
def test_a_check_marks_what_diverged(losses, lost):
    (panel,) = plot_verify(page(losses, None, verdict="FAILED", parabola=None)).axes
    assert [line.get_xdata()[0] for line in lines(panel, "x")] == lost
    assert [text.get_text() for text in panel.texts] == ["diverged"] * len(lost)
    assert len(lines(panel, "o")) == 3 - len(lost)
