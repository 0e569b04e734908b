"""The picture of muP's coordinate check."""

import pytest

from hf_power.coordinates import CoordCheck
from hf_power.plots.coordinates import plot_coord_check
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
    assert figure.get_suptitle().replace("\n", " ") == f"muP does NOT hold for this model, {check().verdict}"
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


def test_a_wrong_model_is_beside_it_on_the_same_axes_with_the_same_look():
    figure = plot_coord_check(check({"mlp": 0.0, "logits": 0.1}), wrong=check({"mlp": 0.6, "logits": 0.1, "more": 0.0}))
    right, wrong = figure.axes
    assert right.get_title() == "this model, step 1"
    assert wrong.get_title() == "standard parameterization, step 1"
    assert right.get_ylim() == wrong.get_ylim()
    looks = [[(x.get_color(), x.get_marker(), x.get_linestyle()) for x in panel.lines] for panel in figure.axes]
    assert looks[0] == looks[1][:2]
    assert len({marker for _, marker, _ in looks[1]}) == 3
    assert wrong.get_legend().get_texts()[0].get_text() == "mlp +0.60 (!)"
    assert figure.get_suptitle().startswith("muP holds for this model, passed: worst slope +0.10")


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
