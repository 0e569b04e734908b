"""From a tuned cosine to Power, against transformers' own cosine and sums over every step."""

import doctest

import numpy as np
import pytest
import torch
from sentences import refused
from transformers import get_scheduler

import hf_power
import hf_power.schedule.tuned
from hf_power.records.errors import UserError
from hf_power.schedule.lengths import plan_schedule


def sgd(lr=1e-3):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(name, steps, warmup, kwargs):
    made = get_scheduler(name, sgd(), warmup, steps, scheduler_specific_kwargs=kwargs)
    found = []
    for _ in range(steps):
        found.append(made.get_last_lr()[0])
        made.optimizer.step()
        made.step()
    return np.array(found)


@pytest.mark.parametrize("warmup", [0, 25, 400])
@pytest.mark.parametrize(("law", "shape", "ratio"), [("paper", "exponential", 0.1), ("delphi", "linear", 0.3)])
def test_mean_rate_and_cap_are_those_of_cosine(warmup, law, shape, ratio):
    cosine = rates("cosine", 1000, warmup, {})
    kwargs = {"tokens_per_step": 8192, "peak_lr": 1e-3, "law": law, "decay_shape": shape, "decay_ratio": ratio}
    power = rates("power", 1000, warmup, kwargs)
    assert power.mean() == pytest.approx(cosine.mean(), rel=3e-3)  # Sums over steps stand beside an integral.
    assert power.max() <= 1e-3


def test_the_law_holds_for_another_batch_and_horizon():
    """a of a run gives the same run the same rates, and others those of the exponents."""
    found = hf_power.from_cosine(peak_lr=1e-3, tokens=8_192_000, tokens_per_step=8192, warmup_tokens=81_920)
    assert found.max_lr == 1e-3
    kwargs = found.arguments()["lr_scheduler_kwargs"]
    again = plan_schedule(**kwargs, max_lr=1e-3, tokens_per_step=8192, num_warmup_steps=10, num_training_steps=1000)
    own = plan_schedule(peak_lr=1e-3, max_lr=1.0, tokens_per_step=8192, num_warmup_steps=10, num_training_steps=1000)
    assert again.lr(4_000_000) == pytest.approx(own.lr(4_000_000), rel=1e-9)
    longer = plan_schedule(**kwargs, max_lr=1.0, tokens_per_step=16384, num_training_steps=10_000)
    assert longer.lr(40_000_000) == pytest.approx(2 * 10**-0.51 * own.lr(4_000_000), rel=1e-9)
    assert found.arguments(tokens_per_step=4096)["warmup_steps"] == 20


def test_the_caption_says_what_is_assumed():
    caption = hf_power.from_cosine(peak_lr=1e-3, tokens=82_000_000, tokens_per_step=8192).caption
    assert all(part in caption for part in ("mean rate", "0.001", "82,000,000", "best one for 8,192", "not measured"))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"peak_lr": 0}, ("peak_lr must be positive", "got 0")),
        ({"peak_lr": "1e-3"}, ("peak_lr must be a finite number", "'1e-3'")),
        ({"tokens": 100}, ("a run of 100 tokens has no step of 8192",)),
        ({"law": "delhpi"}, ("no law of the name 'delhpi'", "take one of paper, delphi")),
    ],
)
def test_bad_numbers_are_refused(values, parts):
    with refused(UserError, *parts):
        hf_power.from_cosine(**{"peak_lr": 1e-3, "tokens": 1_000_000, "tokens_per_step": 8192, **values})


@pytest.mark.parametrize(
    ("lr", "kwargs", "parts"),
    [
        (0.02, {}, ("peak_lr=0.001 is the cap", "learning_rate=0.02", "leave learning_rate out")),
        (1e-3, {"a": 4.0}, ("peak_lr=0.001 and a=4.0", "give one of them")),
        (1e-3, {"num_training_steps": None, "decay_ratio": 0}, ("a run with an end", "num_training_steps")),
    ],
)
def test_peak_beside_another_number_is_refused(lr, kwargs, parts):
    with refused(UserError, *parts):
        hf_power.get_power_schedule(
            sgd(lr), **{"num_training_steps": 100, "tokens_per_step": 64, "peak_lr": 1e-3, **kwargs}
        )


def test_groups_keep_their_ratios_under_a_peak():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 5e-5, "name": "a"}]
    groups.append({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-5, "name": "b"})
    optimizer = torch.optim.AdamW(groups, lr=5e-5)  # The default of TrainingArguments: not chosen by anybody.
    made = hf_power.get_power_schedule(optimizer, 0, 100, tokens_per_step=64, peak_lr=1e-3)
    assert made.get_last_lr() == pytest.approx([1e-3, 2e-4])


def test_a_resumed_run_has_the_law_of_its_whole_length():
    made = hf_power.get_power_schedule(sgd(), 10, 100, tokens_per_step=64, peak_lr=1e-3)
    other = hf_power.get_power_schedule(sgd(), 10, 100, tokens_per_step=64, peak_lr=1e-3)
    other.load_state_dict({"tokens_seen": 50 * 64, "last_epoch": 50})
    assert other.schedule.law.a == pytest.approx(made.schedule.law.a, rel=1e-9)


def test_docstring_examples():
    assert doctest.testmod(hf_power.schedule.tuned).failed == 0
