"""A fit in one sentence."""

from dataclasses import replace

from fits import CELL, FIT, unused
from sentences import refused

from hf_power.fit.result import PowerFit, Reach
from hf_power.fit.text import fit_text
from hf_power.fit.validity import check_falling
from hf_power.records.errors import UserError


def test_the_rate_at_the_far_corner_and_what_is_known():
    """The law at 8M tokens and beta 2: .02 * 2**.7 * 8e6**-.3 = 2.76e-4; b lies within -.35 and -.25."""
    said = FIT.headline
    assert said.startswith("at 8,000,000 tokens and 8,192 per step use a peak of 0.00028 (0.00023 to 0.00032) with")
    assert said.endswith("b = -0.30 is known to +-0.05")


def test_doubtful_cells_and_a_misfit_are_in_it():
    power = PowerFit(0.02, (0.01, 0.03), None, None, (CELL, unused(), unused()))
    fit = replace(FIT, cells=(CELL, unused()), power=power, validity=replace(FIT.validity, misfit=("it does not",)))
    said = fit.headline
    assert said.startswith("do not rely on the law beyond its cells, it does not describe them; at 8,000,000")
    assert said.endswith("1 of 2 cells have no optimum to count; 2 of 3 power cells have no optimum to count")
    held = replace(FIT, intervals=replace(FIT.intervals, b=(-0.3, -0.3)))
    assert held.headline.endswith("b was held")
    unknown = replace(FIT, intervals=replace(FIT.intervals, b=(-0.7, 0.1)))
    assert unknown.headline.endswith("so the rate may not fall at all: run longer horizons or more seeds")


def test_a_rate_that_rises_with_the_tokens_is_no_power_law():
    rising = replace(FIT, law=replace(FIT.law, b=0.18), intervals=replace(FIT.intervals, b=(-0.1, 0.46)))
    with refused(UserError, "do not fall with the tokens, b is +0.18 (-0.10 to +0.46)", "run longer horizons"):
        check_falling(rising)
    check_falling(FIT)


def test_a_rate_that_is_not_known_where_the_cells_end_is_not_said_to_be():
    """A standard deviation of one octave is a factor of two."""
    unsure = replace(FIT.validity, extrapolates_to=Reach(8_000_000, 8192, 1.0))
    assert "the rate is known to a factor 2 only (one standard deviation)" in fit_text(replace(FIT, validity=unsure))
    sure = replace(FIT.validity, extrapolates_to=Reach(8_000_000, 8192, 0.25))
    assert "known to a factor 1.19 (one standard deviation) up to 8,000,000" in fit_text(replace(FIT, validity=sure))
