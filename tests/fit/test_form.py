"""Which form of the law is taken, and what is said of one that misfits."""

import math
from dataclasses import replace

import numpy as np
import pytest
from fits import cell, fit

from hf_power.fit.fit import fit_law
from hf_power.plots.cells import pages_of
from hf_power.records.rows import Row

GROWTH, CRITICAL = 0.8, 2.0**17  # B_crit = CRITICAL * (T / 1e9)**GROWTH


def optimum(tokens, batch):
    return 2.0 * (min(batch, CRITICAL * (tokens / 1e9) ** GROWTH) / 4096) ** 0.6 * tokens**-0.4


@pytest.fixture(scope="module")
def rows():
    """7 batches x 4 horizons, with noise of .001 nats; each critical batch lies within the batches."""
    generator, found = np.random.default_rng(0), []
    for tokens in (10**9 // 4, 10**9, 4 * 10**9, 16 * 10**9):
        for batch in (2**k for k in range(14, 21)):
            best = math.log2(optimum(tokens, batch))
            for x in best + np.arange(-2, 2.5) + generator.uniform(-0.3, 0.3):
                loss = 3 + 0.03 * (x - best) ** 2 + generator.normal(0, 0.001)
                place = {"tokens": tokens, "tokens_per_step": batch, "learning_rate": 2.0**x}
                found.append(Row(schedule="cosine", loss=loss, seed=0, trunk=f"{tokens}/{batch}/{x}", **place))
    return found


@pytest.mark.slow
def test_a_critical_batch_that_grows_is_found_and_its_lack_is_a_misfit(rows):
    grown = fit_law(rows, schedule="cosine", num_samples=40)
    assert next(form.name for form in grown.forms if form.chosen) == "a critical batch that grows"
    assert grown.law.critical_batch_growth == pytest.approx(GROWTH, abs=0.1)
    assert grown.law.critical_batch_tokens == pytest.approx(CRITICAL, rel=0.1)
    assert grown.validity.misfit == ()
    plain = fit_law(rows, schedule="cosine", num_samples=40, critical_batch="none")
    assert plain.validity.misfit
    assert plain.validity.extrapolates_to.tokens == 16 * 10**9


def test_a_page_for_each_model_where_panels_are_many():
    cells = [cell(parameters=n, tokens_per_step=2**k) for n in (10**6, 10**7, 10**8) for k in range(10, 18)]
    pages = pages_of(fit(*cells))
    assert list(pages) == ["cells-1000000", "cells-10000000", "cells-100000000"]
    assert [len(page.cells) for page in pages.values()] == [8, 8, 8]
    whole = fit(*[replace(each, parameters=None) for each in cells[:8]])
    assert pages_of(whole) == {"cells": whole}
