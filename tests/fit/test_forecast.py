"""The forecast of the loss, against synthetic truths and slow twins."""

import math

import numpy as np
import pytest
from sentences import refused

from hf_power.fit.forecast import best_loss, fit_forecast, forecast_text
from hf_power.fit.result import Cell
from hf_power.recipe import Forecast
from hf_power.recipe.forecast import VARYING, form_terms
from hf_power.records.errors import UserError
from hf_power.records.schema import decode, encode

SIZES, TOKENS, BATCHES = (1e8, 2e8, 4e8), (4e9, 1.2e10, 4e10), (1e5, 4e5, 1.6e6)


def truth(n, t, b):
    """Hoffmann et al.'s form and numbers (arXiv:2203.15556, table A3), with a batch that costs steps."""
    return 1.69 + 406.4 / n**0.34 + 410.7 / t**0.28 + 0.03 * (t / b / 1e4) ** -0.8


def cell(n, t, b, loss, curvature=0.01):
    """Five rates around a best one, half an octave apart, with a parabola's losses."""
    octaves = np.arange(-2, 3) / 2
    rates = tuple((2.0 ** (octaves - 9)).tolist())
    losses = tuple((loss + curvature * octaves**2).tolist())
    return Cell(
        "cosine", 0, round(b), round(t), rates, losses, (1,) * 5, curvature=curvature, used=True, parameters=round(n)
    )


def cells_of(generator=None, noise=0.0, sizes=SIZES, tokens=TOKENS, batches=BATCHES, own=0.0):
    """A grid of cells; `own` is each model's departure from the trend, a share of the loss."""
    found = []
    for n in sizes:
        departure = math.exp(own * generator.standard_normal()) if own else 1.0
        for t in tokens:
            for b in batches:
                error = math.exp(noise * generator.standard_normal()) if noise else 1.0
                found.append(cell(n, t, b, truth(n, t, b) * departure * error))
    return found


def test_the_best_loss_of_a_cell_is_the_valley_s():
    """Exactly the parabola's, where the lowest run is off it; none where the rates do not bracket it."""
    rates = tuple(2.0**x for x in (-10, -9.5, -9, -8.5, -8))
    losses = tuple(2.5 + 0.02 * (math.log2(rate) + 9.1) ** 2 for rate in rates)
    assert best_loss(Cell("cosine", 0, 1, 1, rates, losses, (1,) * 5)) == pytest.approx(2.5, abs=1e-9)
    assert best_loss(Cell("cosine", 0, 1, 1, rates[2:], losses[2:], (1,) * 3)) is None


def test_the_slopes_of_a_form_are_those_of_small_steps():
    generator = np.random.default_rng(0)
    numbers = np.append(generator.uniform(0.2, 1.0, 9), 0.15)
    places = generator.normal(size=(6, 4))
    terms, slopes, penalty = form_terms(numbers, places)
    assert penalty == pytest.approx(terms[:, 3:].sum(axis=1) / terms.sum(axis=1))
    for i in range(len(VARYING)):
        sides = []
        for step in (-1e-6, 1e-6):
            moved = numbers.copy()
            moved[i] = numbers[i] + step if VARYING[i] == "token_size_exponent" else numbers[i] * math.exp(step)
            sides.append(np.log(form_terms(moved, places)[0].sum(axis=1)))
        assert (sides[1] - sides[0]) / 2e-6 == pytest.approx(slopes[:, i], abs=1e-6)


def test_a_larger_model_is_foreseen():
    """Twice the size and four times the tokens of all cells, within .5 % and the interval; the record keeps it."""
    forecast = fit_forecast(cells_of())
    place = 1.6e11, 8e5, 8e8
    loss, low, high = forecast.at(*place)
    assert loss == pytest.approx(truth(place[2], place[0], place[1]), rel=0.005)
    assert low < truth(place[2], place[0], place[1]) < high
    again = decode(Forecast, encode(forecast), "a recipe", "write it again")
    assert again.at(*place) == pytest.approx((loss, low, high))
    assert forecast.curvature == 0.01
    text = "\n".join(forecast_text(forecast))
    assert "forecast of the best loss of cosine" in text
    assert "27 cells" in text


@pytest.mark.slow
def test_the_interval_covers_new_models():
    """In 90 % of draws or more, of cells with noise and models with departures of their own, at 2 x and 4 x all cells."""
    generator = np.random.default_rng(1)
    covered = []
    for _ in range(12):
        forecast = fit_forecast(cells_of(generator, noise=0.002, own=0.002))
        for n, t, b in ((8e8, 8e10, 8e5), (4e8, 1.6e11, 1.6e6), (1.6e9, 4e10, 4e5)):
            new = truth(n, t, b) * math.exp(0.002 * generator.standard_normal() + 0.002 * generator.standard_normal())
            _, low, high = forecast.at(t, b, n)
            covered.append(low <= new <= high)
    assert np.mean(covered) >= 0.9


def test_the_critical_batch_is_that_of_a_slow_search():
    """Tokens to the loss of the best batch, by bisection on the fitted form itself."""
    forecast = fit_forecast(cells_of())
    batches = forecast.batches(1.2e10, 2e8)

    def needed(batch):
        low, high = math.log(1.2e10) - 5, math.log(1.2e10) + 7
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if forecast.at(math.exp(middle), batch, 2e8).loss > batches.loss else (low, middle)
            )
        return math.exp(low)

    assert needed(batches.best) == pytest.approx(1.2e10, rel=0.01)
    assert needed(batches.critical) == pytest.approx(2.4e10, rel=0.02)
    low, high = batches.critical_interval
    assert low < batches.critical < high
    assert forecast.tokens_to(batches.loss, 1.2e10, batches.critical, 2e8) == pytest.approx(2.4e10, rel=0.02)


@pytest.mark.parametrize(
    ("part", "asked", "sentence"),
    [
        (
            {"sizes": (1e8,)},
            (4e9, 1e5, 4e8),
            "no forecast of the loss at 400,000,000 parameters, for the sweep has 100,000,",
        ),
        (
            {"tokens": (4e9,)},
            (8e9, 1e5, 1e8),
            "no forecast of the loss at 8,000,000,000 tokens, for the sweep has 4,000,",
        ),
        (
            {"batches": (1e5, 2e5)},
            (4e9, 8e5, 1e8),
            "at 800,000 tokens per step, for the sweep has 100,000 to 200,000 alone",
        ),
        ({}, (4e9, 1e5, None), "the loss depends on the parameters, which is not given: say it."),
    ],
)
def test_what_it_cannot_say_is_one_sentence(part, asked, sentence):
    forecast = fit_forecast(cells_of(**part))
    assert len(forecast.missing) == len(part)
    with refused(UserError, sentence):
        forecast.at(*asked)


def test_too_few_cells_have_no_forecast():
    assert fit_forecast([]) is None
    assert fit_forecast(cells_of()[:2]) is None
