"""A schedule before its run: the rates of a picture against those of transformers' and our schedulers, step by step."""

import pytest
import torch
from sentences import refused
from transformers import TrainingArguments, get_scheduler

import hf_power
from hf_power.cli import main
from hf_power.plots.schedule import rates, schedule_of
from hf_power.records.errors import UserError


def arguments(folder, **values):
    given = {"lr_scheduler_type": "power", "max_steps": 200, "warmup_steps": 20, "use_cpu": True, "report_to": "none"}
    return TrainingArguments(str(folder), **{"learning_rate": 1e-3, **given, **values})


@pytest.fixture
def args(tmp_path):
    return arguments(tmp_path, lr_scheduler_kwargs={"a": 1.0, "tokens_per_step": 512})


def by_steps(name, lr, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    made = get_scheduler(name, optimizer, 20, 200, scheduler_specific_kwargs=kwargs)
    found = []
    for _ in range(200):
        found.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    return found


def test_rates_are_those_of_the_schedulers(args):
    schedule = schedule_of(args)
    assert rates(schedule, num_points=200)[1] == pytest.approx(by_steps("power", 1e-3, a=1.0, tokens_per_step=512))
    for other, kwargs in (("cosine", {}), ("linear", {}), ("warmup_stable_decay", {"num_decay_steps": 20})):
        assert rates(schedule, other, 200)[1] == pytest.approx(by_steps(other, 1e-3, **kwargs)), other


def test_figure_has_both_curves_and_the_conclusion(args):
    figure = hf_power.plot_schedule(args)
    (panel,) = figure.axes
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels[0].startswith("cosine, mean 0.0005")
    assert labels[1].startswith("power, mean")
    assert "Power peaks at" in figure.get_suptitle()
    assert max(panel.lines[1].get_ydata()) == pytest.approx(max(by_steps("power", 1e-3, a=1.0, tokens_per_step=512)))
    assert len(hf_power.plot_schedule(args, versus=None).axes[0].lines) == 1


def test_what_cannot_be_previewed_is_refused(args, tmp_path):
    with refused(UserError, "lr_scheduler_type is linear", "set it to power"):
        hf_power.plot_schedule(arguments(tmp_path, lr_scheduler_type="linear"))
    with refused(UserError, "max_steps 200", "tokens_per_step None"):
        hf_power.plot_schedule(arguments(tmp_path))
    with refused(UserError, "versus is no schedule of transformers, got 'cosin'"):
        hf_power.plot_schedule(args, versus="cosin")


def test_verb_prints_line_sketch_and_arguments_and_draws(tmp_path, capsys):
    picture = tmp_path / "schedule.png"
    words = "schedule --peak_lr 1e-3 --tokens_per_step 8k --tokens 8M --warmup_steps 50 --versus cosine --picture"
    assert main([*words.split(), str(picture)]) == 0
    said = capsys.readouterr().out
    for part in (
        "power: 8,000 tokens per step (beta 1.95)",
        "a from a cosine with the peak 0.001",
        "cosine: mean rate 0.0005",
    ):
        assert part in said
    assert "power: mean rate 0.0005" in said
    assert "learning_rate=0.001, lr_scheduler_kwargs={'a': " in said
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--steps 10 --tokens 8M", "the length is --steps or --tokens"),
        ("", "the length is --steps or --tokens"),
        ("--steps 1", "a run of 1 steps"),
        ("--steps 100 --peak_lr 1e-3 --lr 0.02", "leave --lr out"),
        ("--steps 100 --law delhpi", "there is no law of the name 'delhpi'"),
        ("--steps 100 --versus cosin", "versus is no schedule"),
    ],
)
def test_verb_refuses_what_it_cannot_show(words, part, capsys):
    assert main(["schedule", "--tokens_per_step", "8k", *words.split()]) == 2
    assert part in capsys.readouterr().err
