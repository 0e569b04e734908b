import math

import numpy as np
import pytest

from hf_power.fit.cells import fit_cells
from hf_power.fit.fit import fit_law
from hf_power.fit.skew import Curve, fit_skew, levels_of, unwarped, warped
from hf_power.fit.text import fit_text
from hf_power.records.rows import Row

# 2 batches x 2 horizons; the optimum in octaves.
CELLS = {(32_768, 10**7): -9.3, (32_768, 10**8): -10.4, (65_536, 10**7): -8.7, (65_536, 10**8): -10.1}


def rows_of(nats, noise=0.0, num_seeds=1):
    """A row at each of 5 rates an octave apart, with the loss 3 + nats(octaves above the optimum)."""
    generator, rows = np.random.default_rng(0), []
    for (batch, tokens), best in CELLS.items():
        for x in range(round(best) - 2, round(best) + 3):
            for seed in range(num_seeds):
                loss = 3 + nats(x - best) + generator.normal(0, noise)
                place = {"tokens_per_step": batch, "tokens": tokens, "learning_rate": 2.0**x}
                rows.append(Row(schedule="cosine", loss=loss, seed=seed, trunk=f"{batch}/{x}/{seed}", **place))
    return rows


def power_of_rate(skew):
    """A parabola in the rate to the power of `skew`, written out: 0.03 * ((r**s - 1) / (s log 2))**2, r = lr / optimum."""
    return lambda d: 0.03 * ((2.0**d) ** skew - 1) ** 2 / (skew * math.log(2)) ** 2


@pytest.mark.parametrize("skew", [-0.4, 0.25, 0.6])
def test_a_skewed_u_without_noise_is_recovered(skew):
    nats = power_of_rate(skew)
    for cell, best in zip(fit_cells(rows_of(nats)), CELLS.values(), strict=True):
        assert cell.skew == pytest.approx(skew, abs=1e-6)
        assert math.log2(cell.optimum_lr) == pytest.approx(best, abs=1e-6)
        assert cell.curvature == pytest.approx(0.03, rel=1e-5)
        assert cell.min_loss == pytest.approx(3)
        assert [cell.regret_at(2.0 ** (best + d)) for d in (-2, 1, 3)] == pytest.approx([nats(d) for d in (-2, 1, 3)])


@pytest.mark.slow
def test_the_skew_is_known_as_well_as_repeated_sweeps_scatter():
    """The standard deviation against that of 30 sweeps with other noise; a parabola's skew is 0 on average."""
    z = np.arange(-2.0, 2.1, 0.5)
    generator = np.random.default_rng(1)
    found = []
    for _ in range(30):
        curves = []
        for i in range(6):
            loss = 3 + 0.03 * (z - 0.2) ** 2 + generator.normal(0, 0.008, len(z))
            curves.append(Curve(z, levels_of(z, [0] * len(z)), loss, [f"{i}/{x}" for x in z]))
        found.append(fit_skew(curves))
    values, sds = (np.array([getattr(each, name) for each in found]) for name in ("value", "sd"))
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(30)
    assert np.median(sds) == pytest.approx(values.std(), rel=0.4)
    assert all(each.taken == each.value for each in found if each.sd <= 0.15)


def test_a_skew_that_the_runs_do_not_tell_is_left_out():
    rows = rows_of(lambda d: 0.03 * d * d, noise=0.04, num_seeds=2)
    assert {cell.skew for cell in fit_cells(rows)} == {0.0}
    one_cell = [row for row in rows_of(power_of_rate(0.4)) if (row.tokens_per_step, row.tokens) == (32_768, 10**7)]
    assert fit_cells(one_cell)[0].skew == 0.0


def test_the_text_says_what_the_skew_means():
    text = fit_text(fit_law(rows_of(power_of_rate(0.5)), schedule="cosine", batch_exponent=0.7))
    costs = power_of_rate(0.5)(1) / power_of_rate(0.5)(-1)
    assert costs == pytest.approx(2)
    assert "an octave above the optimum costs 2.00 times as much as one below" in text


@pytest.mark.parametrize("skew", [-0.5, 0.0, 0.3])
def test_warping_comes_back(skew):
    z = np.linspace(-3, 3, 7)
    assert unwarped(warped(z, skew), skew) == pytest.approx(z)
    assert (warped(1e-4, skew) - warped(-1e-4, skew)) / 2e-4 == pytest.approx(1)
    assert unwarped(-4.0, 0.5) == -math.inf
