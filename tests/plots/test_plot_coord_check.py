"""The picture of muP's coordinate check."""

import pytest

from hf_power.coordinates import CoordCheck
from hf_power.plots.runs import plot_coord_check
from hf_power.records.errors import UserError

matplotlib = pytest.importorskip("matplotlib")

EXPONENTS = {"embedding": 0.0, "layer 0 mlp": 0.1, "logits": -0.5}


def check(exponents=EXPONENTS):
    rows = [
        {"module": module, "step": step, "width": width, "change": step * width**exponent}
        for module, exponent in exponents.items()
        for step in (1, 2, 3)
        for width in (64, 128, 256, 512)
    ]
    return CoordCheck(rows)


def test_coord_check_shows_verdict_axes_and_slopes():
    figure = plot_coord_check(check())
    assert figure.get_suptitle() == f"Coordinate check {check().verdict}"
    first, last = figure.axes
    assert (first.get_title(), last.get_title()) == ("step 1", "step 3")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert (first.get_xlabel(), first.get_ylabel()) == ("width (hidden_size)", "RMS change of the output")
    assert [label.get_text() for label in first.get_xticklabels()] == ["64", "128", "256", "512"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "embedding +0.00",
        "layer 0 mlp +0.10",
        "logits -0.50 (!)",
    ]
    assert list(last.lines[0].get_ydata()) == [3.0] * 4


def test_coord_check_shows_the_steps_that_were_asked_for():
    assert [panel.get_title() for panel in plot_coord_check(check(), steps=(2,)).axes] == ["step 2"]


def test_coord_check_draws_many_modules_in_different_colors_and_dead_ones():
    many = check({f"layer {i} mlp": 0.0 for i in range(14)})
    for row in many.rows[:4]:
        row["change"] = 0.0
    panel = plot_coord_check(many).axes[0]
    assert len({line.get_color() for line in panel.lines}) == 14
    assert panel.get_legend().get_texts()[0].get_text() == "layer 0 mlp +nan (!)"


def test_a_step_that_was_not_measured_is_refused():
    with pytest.raises(UserError) as caught:
        plot_coord_check(check(), steps=(1, 7))
    assert str(caught.value) == "steps [7] were not measured: choose from [1, 2, 3]."
