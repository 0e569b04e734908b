"""Published laws beside a fitted one; each rate is worked out by hand from the source's own numbers."""

import math
from dataclasses import replace

import pytest
from fits import BEST, UNUSED, cell, fit

from hf_power.fit.published import PUBLISHED, compare, compared_text, rate_of
from hf_power.plots.published import plot_published

BY_NAME = {each.name: each for each in PUBLISHED}
LARGE = cell(tokens=10**13, tokens_per_step=4_194_304, width=256)


def of(name, cells, base_width=None):
    return next(each for each in compare(fit(*cells), base_width) if each.name == name)


def test_the_sources_own_examples():
    """The paper: 10T tokens in batches of 4,194,304 have the peak 0.0011. StepLaw, eq. 1: 1B parameters and 100B tokens."""
    assert rate_of(BY_NAME["the paper (Power)"], LARGE, 256) == pytest.approx(0.0011, abs=5e-5)
    large = cell(tokens=10**11, parameters=10**9)
    assert rate_of(BY_NAME["StepLaw"], large, None) == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert rate_of(BY_NAME["StepLaw"], large, None) == pytest.approx(1.63e-3, rel=0.01)


@pytest.mark.parametrize(
    ("name", "change", "factor"),
    [
        ("Delphi", {"tokens": 4 * 8_000_000}, 4**-0.3),
        ("Delphi", {"tokens_per_step": 4 * 8192}, 2.0),
        ("Bjorck", {"tokens": 16 * 8_000_000}, 16**-0.32),
        ("Bjorck", {"tokens_per_step": 4 * 8192}, 1.0),
        # B / (lr * decay * D) = c * (D / N)**-0.527, solved for lr at four times the tokens, the batch, the size.
        ("Power Lines", {"tokens": 4 * 8_000_000}, 4**0.527 / 4),
        ("Power Lines", {"tokens_per_step": 4 * 8192}, 4.0),
        ("Power Lines", {"parameters": 4 * 10**6}, 4**-0.527),
    ],
)
def test_transfer_rules(name, change, factor):
    one = cell(parameters=10**6)
    law = BY_NAME[name]
    assert rate_of(law, replace(one, **change), law.base_width) == pytest.approx(
        factor * rate_of(law, one, law.base_width)
    )


def test_the_parameterization_is_converted_by_the_rate_of_the_hidden_matrices():
    """At width 1024 muP of base width 256 gives hidden matrices a quarter of lr; base width 64 makes that lr / 16."""
    wide = cell(width=1024, parameters=10**8)
    paper, steplaw = BY_NAME["the paper (Power)"], BY_NAME["StepLaw"]
    rate = 4.6 * 2 * 8e6**-0.51
    assert rate_of(paper, wide, 256) == pytest.approx(rate)
    assert rate_of(paper, wide, None) == pytest.approx(rate / 4)
    assert rate_of(paper, wide, 64) == pytest.approx(rate / 4 * 16)
    standard = 1.79 * 1e8**-0.713 * 8e6**0.307
    assert rate_of(steplaw, wide, None) == pytest.approx(standard)
    assert rate_of(steplaw, wide, 64) == pytest.approx(16 * standard)


def test_regrets_by_hand():
    """Two cells whose optima StepLaw misses by 1 octave up and 3: 0.02 * (1 + 9) / 2 nats, and 0.02 when scaled."""
    rates = [1.79 * 1e6**-0.713 * tokens**0.307 for tokens in (1e7, 1e8)]
    cells = [
        cell(tokens=10**7, parameters=10**6, optimum_lr=rates[0] / 2),
        cell(tokens=10**8, parameters=10**6, optimum_lr=rates[1] / 8),
    ]
    found = of("StepLaw", [*cells, UNUSED])
    assert found.off == pytest.approx((1, 3))
    assert found.regret == pytest.approx((0.02, 0.18))
    assert found.scaled_off == pytest.approx((-1, 1))
    assert found.scaled_regret == pytest.approx((0.02, 0.02))
    assert found.num_outside == sum(not 2**-9 <= rate <= 2**-5 for rate in rates)
    text = compared_text(compare(fit(*cells), None))
    assert "+2.00 (2.24)" in text
    assert "0.1000" in text
    assert "arXiv:2503.04715" in text


def test_what_the_rows_lack_is_said_and_exponents_alone_have_no_published_column():
    laws = compare(fit(cell(width=0)), None)
    assert of("StepLaw", [cell()]).lacks == "the parameters of each model"
    assert of("the paper (Power)", [cell(width=0)]).lacks.startswith("the width of each model")
    text = compared_text(laws)
    assert "StepLaw            not compared: it needs the parameters of each model, which the rows do not say" in text
    bjorck = of("Bjorck", [cell()])
    assert (bjorck.off, bjorck.regret, bjorck.scaled_off) == (None, None, (0.0,))
    assert "exponents alone" in text


def test_the_law_of_power_rows_is_the_paper_s_schedule():
    peak, own = (compare(fit(cell(), schedule=name), 256)[1] for name in ("cosine", "power"))
    assert peak.off[0] - own.off[0] == pytest.approx(math.log2(4.6 / 4))
    assert "eq. 7" in own.source


def test_the_picture_has_a_line_of_points_for_each_law():
    cells = [cell(tokens=n, parameters=10**6) for n in (10**7, 10**8, 10**9)]
    (panel,) = plot_published(compare(fit(*cells), None)).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        *("fitted here", "the paper (Power)", "StepLaw", "Delphi", "Bjorck", "Power Lines")
    ]
    points = [line for line in panel.lines if line.get_marker() == "o"]
    assert [line.get_fillstyle() for line in points] == ["full"] * 3 + ["none"] * 3
    law = fit(*cells).law
    assert points[0].get_xdata() == pytest.approx([math.log2(law.lr(c.tokens, 8192) / BEST) for c in cells])
    assert panel.texts[0].get_text().endswith(" nats")
