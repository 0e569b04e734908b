"""Published laws against values that their sources print, and what is said of them."""

import pytest
import torch
from sentences import refused

import hf_power
from hf_power.records.errors import UserError
from hf_power.schedule.presets import PRESETS, chosen_law, preset
from hf_power.schedule.words import describe, highest, sketch, whose


def test_paper_is_that_of_its_own_table():
    """.00126 at 1e11 tokens and beta 128."""
    assert round(preset("paper").power.lr(1e11, 128 * 4096), 5) == 0.00126


def test_delphi_gives_the_rate_that_marin_prints():
    """.00327 for 22.3e9 tokens with 64 sequences of 4096 tokens, and .0063 at its reference of 2.5e9."""
    law = preset("delphi").law
    assert round(law.lr(22.3e9, 64 * 4096), 5) == 0.00327
    assert law.lr(2.5e9, 64 * 4096) == pytest.approx(0.0063)
    assert law.lr(2.5e9, 4 * 64 * 4096) == pytest.approx(2 * 0.0063)
    # Measured on WSD: Power follows it with the paper's ratio of the two.
    assert preset("delphi").power.a == pytest.approx(law.a * 4 / 4.6)


def test_given_numbers_win_over_those_of_the_preset():
    law = chosen_law({"a": 2.0, "b": None}, "delphi")
    assert (law.a, law.b, law.batch_exponent) == (2.0, -0.3, 0.5)
    assert chosen_law({}).a == 4.0


def schedule(law=None, lr=0.02, warmup=100, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    return hf_power.get_power_schedule(optimizer, warmup, 10_000, tokens_per_step=8192, law=law, **kwargs)


def test_whose_law_it_is_is_said():
    assert "the paper's, from its own data" in schedule().whose
    assert "peak_lr" in schedule().whose
    assert "AdamH" in schedule("delphi").whose
    assert "under AdamW" in schedule("delphi").whose
    assert whose(None, {"a": 1.0, "b": -0.4}) == "your own"
    assert whose("delphi", {"a": 1.0}).startswith("a your own, the rest of delphi")
    with refused(UserError, "no law of the name 'x'"):
        schedule("x")
    assert all(each.source for each in PRESETS.values())


def test_a_schedule_in_one_line():
    """beta 2 with the paper's law: the cap of .02 ends at (4 * 2 / .02)**(1 / .51) = 126,496 tokens, below the warmup."""
    line = describe(schedule().schedule, "mine")
    for part in ("8,192 tokens per step (beta 2)", "after 819,200 tokens", "the cap 0.02 is never reached", "n**-0.51"):
        assert part in line
    assert f"peaks at {8 * 819_200**-0.51:.3g} " in line
    assert f"decays from {8 * 73_728_000**-0.51:.3g} at 73,728,000 to 0 at 81,920,000 tokens; law: mine" in line
    assert "binds until 126,496 tokens" in describe(schedule(warmup=0).schedule, "")
    with pytest.warns(UserWarning, match="set learning_rate=0.0077 under muP"):
        bound = schedule(lr=5e-5)
    assert "the cap 5e-05 always binds" in describe(bound.schedule, "")
    assert "no decay at the end" in describe(schedule(decay_ratio=0).schedule, "")
    assert "goes on from 1,000,000 tokens at" in describe(schedule().schedule, "", first=1_000_000)


def test_highest_rate_of_a_warmup_to_the_cap():
    assert highest(schedule(warmup_to="max").schedule) == (819_200, 0.02)


def test_sketch_has_its_curves_at_their_heights():
    lines = sketch([("up", "o", [0.0, 1.0]), ("flat", "*", [0.5, 0.5])]).splitlines()
    assert lines[0].split("|")[0].strip() == "1.00e+00"
    assert lines[0].endswith("o")
    assert sum(line.count("*") for line in lines[:-1]) == 72
    assert lines[-1].split() == ["o", "up", "*", "flat"]
