import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from sentences import says

from hf_power.fit.fit import fit_law
from hf_power.pretrain import run as train
from hf_power.records.files import only_one
from hf_power.records.rows import read_rows
from hf_power.settings.settings import Settings
from hf_power.sweep import run as sweep
from hf_power.sweep import trunks
from hf_power.sweep.cost import estimate, estimate_text
from hf_power.sweep.ensemble import Ensemble
from hf_power.sweep.grid import SCHEDULES, Grid, few_digits, job_tokens
from hf_power.sweep.run import rows_text, run_sweep

LAW = {"a": 2.0, "b": -0.5, "batch_exponent": 1.0}
NOT_OF_THE_ROW = {"seconds"}  # depends on the machine's load
KEYS = {
    *("schema", "id", "status", "reason", "model_type", "width", "parameters", "parameters_without_embeddings"),
    *("tokens_per_step", "tokens", "schedule", "learning_rate", "law", "max_lr", "warmup_tokens", "decay_tokens"),
    *("decay_shape", "weight_decay", "seed", "loss", "train_loss", "trunk", "trained_tokens", "flops_per_token"),
    *("seconds", "block_size", "settings", "data", "versions", "hardware"),
}


@pytest.fixture(scope="module")
def make_grid(sections):
    """A width of 16, two blocks of 32 a step, horizons of 8 and 16 steps: a run takes a tenth of a second."""

    def build(**changes):
        made = sections("unused")
        made["model"] |= {"hidden_size": 16, "intermediate_size": 40}
        made["training"] = {"weight_decay": 0.1}
        made["run"] = {"max_eval_tokens": 640}
        grid = Grid(
            sections=made,
            widths=(16,),
            tokens_per_step=(64,),
            tokens=(512, 1024),
            schedules={"warmup_stable_decay": (0.01, 0.02)},
            warmup_tokens=128,
            decay_ratio=0.25,
            max_lr=0.03,
            max_extensions=0,
        )
        return replace(grid, **changes)

    return build


@pytest.fixture
def count_tokens(monkeypatch):
    """Tokens of all calls of Ensemble.step."""
    counted = Counter()
    step = Ensemble.step

    def counting(self, factors):
        counted["tokens"] += self.num_sequences * self.block_size * len(self.models)
        step(self, factors)

    monkeypatch.setattr(Ensemble, "step", counting)
    return counted


class PaperEnsemble:
    """Trains nothing: losses are parabolas around the optimum of a given law, 4.6 * beta * T**-0.51 of the paper."""

    curvature = 0.05  # nats per octave**2
    offset = 0.0  # octaves of power's own optimum from the law

    def __init__(self, members, tokenizer, blocks, held_out, *, num_sequences, device):
        self.members, self.batch = members, num_sequences * len(blocks[0]["input_ids"])
        self.models, self.position, self.alive = [torch.nn.Linear(2, 2)], 0, [True] * len(members)
        self.models[0].num_parameters = lambda **_: 6
        self.models[0].config = sections_config(members[0])

    def step(self, factors):
        self.position += 1

    def held_out_losses(self):
        tokens, losses = self.position * self.batch, []
        for member in self.members:
            best = 4.6 * self.batch / 4096 * tokens**-0.51
            rate, law = member.training.learning_rate, member.training.lr_scheduler_kwargs
            if "a" in law:
                rate = law["a"] * (self.batch / 4096) ** law["batch_exponent"] * tokens ** law["b"] * 2**-self.offset
            losses.append(3.0 + self.curvature * math.log2(rate / best) ** 2 + 1e-3 * (member.training.seed % 2))
        return losses

    train_losses = held_out_losses

    def state(self):
        return {"position": self.position}

    def load_state(self, state):
        self.position = state["position"]


def sections_config(settings):
    return settings.model.config(vocab_size=400)


def by_id(rows, without=NOT_OF_THE_ROW):
    return {row["id"]: {key: value for key, value in row.items() if key not in without} for row in rows}


def rows_in(folder):
    return read_rows(folder / "sweep.jsonl")[0]


def held_out_loss(row, folder):
    """Of a Trainer's run of the row's settings as they are."""
    training = row["settings"]["training"] | {"output_dir": str(folder), "save_strategy": "no", "disable_tqdm": True}
    return train.pretrain(Settings.from_dict(row["settings"] | {"training": training}))["held_out_loss"]


def every_schedule(value=0.01):
    return {name: (1.0, 2.0) if name == "power" else (value, 2 * value) for name in SCHEDULES}


# ---- rows


@pytest.mark.parametrize(
    "schedule", ["warmup_stable_decay", *(pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULES[1:])]
)
@pytest.mark.slow
def test_row_is_a_pretraining_run(make_grid, tmp_path, monkeypatch, schedule):
    """Every row of a sweep, branches of trunks among them, has the held-out loss of the Trainer's run from scratch."""
    monkeypatch.setattr("hf_power.plots.figures.plot_lr_and_loss", lambda run, path: None)
    grid = make_grid(schedules={schedule: every_schedule()[schedule]}, law=LAW)
    rows = run_sweep(grid, tmp_path / "sweep", workers=1)
    assert len(rows) == 4
    for i, row in enumerate(rows):
        assert row["loss"] == pytest.approx(held_out_loss(row, tmp_path / f"run{i}"), abs=1e-5)
    assert len({row["loss"] for row in rows}) == 4


def test_row_says_everything(make_grid, tmp_path):
    grid = make_grid(schedules={"power": (2.0,), "linear": (0.01,)}, law=LAW, seeds=(3,), tokens=(1024,))
    rows = {row["schedule"]: row for row in run_sweep(grid, tmp_path, workers=1)}
    for row in rows.values():
        assert set(row) - {"extension"} == KEYS
    row = rows["power"]
    expected = {"schema": 1, "status": "finished", "reason": None, "model_type": "llama", "width": 16}
    expected |= {"tokens_per_step": 64, "tokens": 1024, "seed": 3, "warmup_tokens": 128, "decay_tokens": 256}
    expected |= {"law": {**LAW, "a": 4.0}, "max_lr": 0.03, "decay_shape": "linear", "weight_decay": 0.1}
    expected |= {"block_size": 32, "trained_tokens": 1024}
    assert {key: row[key] for key in expected} == expected
    assert row["learning_rate"] == pytest.approx(4.0 * (64 / 4096) * 1024**-0.5)
    embedding = 400 * 16
    layer = 4 * 16 * 16 + 3 * 16 * 40 + 2 * 16
    assert row["parameters_without_embeddings"] == 2 * layer + 16
    assert row["parameters"] == 2 * layer + 16 + embedding
    assert row["data"]["held_out_tokens"] == 640
    assert rows["linear"]["law"] is None
    assert (rows["linear"]["learning_rate"], rows["linear"]["max_lr"]) == (0.01, 0.01)
    assert 0 < row["loss"] < 7


def test_rows_of_one_trunk_differ_in_the_horizon_only(make_grid, tmp_path):
    rows = run_sweep(make_grid(seeds=(0, 1)), tmp_path, workers=1)
    trunks = {}
    for row in rows:
        trunks.setdefault(row["trunk"], []).append(row)
    assert len(rows) == 8
    for each in trunks.values():
        assert sorted(row["tokens"] for row in each) == [512, 1024]
        assert len({(row["learning_rate"], row["seed"]) for row in each}) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trained_tokens_are_those_that_were_trained(make_grid, tmp_path, count_tokens, schedule):
    grid = make_grid(schedules={schedule: every_schedule()[schedule]}, law=LAW, seeds=(0, 1), tokens=(512, 768, 1024))
    rows = run_sweep(grid, tmp_path, workers=1)
    group = grid.groups(schedule, LAW if schedule == "power" else None)
    assert sum(row["trained_tokens"] for row in rows) == count_tokens["tokens"]
    assert count_tokens["tokens"] == sum(job_tokens(grid, job) for job in sweep.start_jobs(grid, group))
    assert count_tokens["tokens"] < sum(row["tokens"] for row in rows)


def test_added_learning_rates_are_counted_too(make_grid, tmp_path, count_tokens):
    grid = make_grid(schedules={"warmup_stable_decay": (0.0005, 0.001)}, max_extensions=2)  # far too low
    rows = run_sweep(grid, tmp_path, workers=1)
    assert {row["learning_rate"] for row in rows} == {0.0005, 0.001, 0.002, 0.004}
    assert {row["extension"] for row in rows} == {0, 1, 2}
    assert sum(row["trained_tokens"] for row in rows) == count_tokens["tokens"]


# ---- what goes wrong


def test_diverged_rows_say_so(make_grid, tmp_path):
    grid = make_grid(schedules={"linear": (0.01, 30.0, 1e6)}, widths=(32,))
    rows = run_sweep(grid, tmp_path, workers=1)
    by_rate = {rate: [row for row in rows if row["learning_rate"] == rate] for rate in (0.01, 30.0, 1e6)}
    assert {row["status"] for row in by_rate[0.01]} == {"finished"}
    for row in by_rate[30.0] + by_rate[1e6]:
        assert (row["status"], row["loss"], row["train_loss"]) == ("diverged", None, None)
        assert "guessing" in row["reason"] or "not finite" in row["reason"]
    alone = run_sweep(replace(grid, schedules={"linear": (0.01,)}), tmp_path / "alone", workers=1)
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in by_rate[0.01]], abs=1e-5)
    assert f"{len(rows)} rows: 2 finished, 4 diverged, 0 failed" in rows_text(rows)


def test_all_diverged_is_quick_and_honest(make_grid, tmp_path, monkeypatch):
    """Once every member is dead nothing more is computed."""
    calls = Counter()
    step = Ensemble.step

    def dying(self, factors):
        calls["steps"] += 1
        step(self, factors)
        self.alive = [False] * len(self.alive)

    monkeypatch.setattr(Ensemble, "step", dying)
    rows = run_sweep(make_grid(), tmp_path, workers=1)
    assert [(row["status"], row["reason"]) for row in rows] == [("diverged", "the training loss was not finite")] * 4
    assert calls["steps"] == 1


def test_group_that_fails_leaves_the_others_alone(make_grid, tmp_path, monkeypatch):
    grid = make_grid(widths=(16, 32), seeds=(0, 1))
    step = Ensemble.step
    calls = Counter()

    def failing(self, factors):
        width = self.models[0].config.hidden_size
        calls[width] += 1
        if width == 32 and calls[width] == 9:  # the first horizon of 8 steps is measured
            raise RuntimeError("out of\nmemory")
        step(self, factors)

    monkeypatch.setattr(Ensemble, "step", failing)
    rows = run_sweep(grid, tmp_path, workers=1)
    of = {w: [row for row in rows if row["width"] == w] for w in (16, 32)}
    assert {row["status"] for row in of[16]} == {"finished"}
    assert {(row["tokens"], row["status"], row["reason"]) for row in of[32]} == {
        (512, "finished", None),
        (1024, "failed", "RuntimeError: out of memory"),
    }
    assert {row["loss"] for row in of[32] if row["status"] == "failed"} == {None}
    assert rows_text(rows).count("delete its line to try it again") == 4

    monkeypatch.setattr(Ensemble, "step", step)
    assert by_id(run_sweep(grid, tmp_path, workers=1)) == by_id(rows)  # it is not tried again by itself
    path = tmp_path / "sweep.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["status"] != "failed"]
    path.write_text("\n".join(kept) + "\n")
    again = run_sweep(grid, tmp_path, workers=1)
    assert by_id(again) == by_id(run_sweep(grid, tmp_path / "whole", workers=1))


def test_group_that_cannot_begin_fails_too(make_grid, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no such shape")

    monkeypatch.setattr(trunks, "Ensemble", refuse)
    rows = run_sweep(make_grid(), tmp_path, workers=1)
    assert [(row["status"], row["reason"]) for row in rows] == [("failed", "ValueError: no such shape")] * 4


# ---- stopped, and gone on with


@pytest.mark.parametrize("torn", ["last", "only"])
def test_torn_line_is_trained_again(make_grid, tmp_path, torn):
    grid = make_grid()
    whole = run_sweep(grid, tmp_path, workers=1)
    path = tmp_path / "sweep.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes((b"" if torn == "only" else b"".join(lines[:-1])) + lines[-1][:200])
    assert by_id(run_sweep(grid, tmp_path, workers=1)) == by_id(whole)
    assert len(read_rows(path)[1]) == 1  # the torn line stays, and is named


def test_finished_sweep_trains_nothing(make_grid, tmp_path, count_tokens):
    rows = run_sweep(make_grid(), tmp_path, workers=1)
    count_tokens.clear()
    assert run_sweep(make_grid(), tmp_path, workers=1) == rows
    assert not count_tokens
    assert not list(tmp_path.glob(".trunk*"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("schedule", ["warmup_stable_decay", pytest.param("cosine", marks=pytest.mark.slow)])
def test_stopped_at_any_step_it_ends_the_same(make_grid, tmp_path, monkeypatch, schedule):
    """Stopped after 3, 5, 7 ... steps in turn; the rows are bit for bit those of a sweep that was not."""
    grid = make_grid(schedules={schedule: (0.01, 0.02)}, tokens=(512, 768, 1024))
    whole = by_id(run_sweep(grid, tmp_path / "whole", workers=1))
    step = Ensemble.step
    left = [0]

    def stopping(self, factors):
        if not left[0]:
            raise Killed
        left[0] -= 1
        step(self, factors)

    monkeypatch.setattr(Ensemble, "step", stopping)
    stops = 0
    while True:
        left[0] = 3 + 2 * stops
        try:
            rows = run_sweep(grid, tmp_path / "stopped", workers=1)
        except Killed:
            stops += 1
            continue
        break
    assert stops >= 4
    assert by_id(rows) == whole


def test_trunk_of_other_learning_rates_is_not_gone_on_with(make_grid, tmp_path, monkeypatch):
    """Stopped in a trunk, and started again with as many other learning rates: nothing of the old trunk is used."""
    step, calls = Ensemble.step, Counter()

    def stopping(self, factors):
        calls["steps"] += 1
        if calls["steps"] > 12:
            raise Killed
        step(self, factors)

    monkeypatch.setattr(Ensemble, "step", stopping)
    with pytest.raises(Killed):
        run_sweep(make_grid(tokens=(1024, 512)), tmp_path / "one", workers=1)
    monkeypatch.setattr(Ensemble, "step", step)
    assert list((tmp_path / "one").glob(".trunk*"))
    other = make_grid(schedules={"warmup_stable_decay": (0.04, 0.08)})
    rows = run_sweep(other, tmp_path / "one", workers=1)
    expected = by_id(run_sweep(other, tmp_path / "two", workers=1))
    assert {i: row for i, row in by_id(rows).items() if row["learning_rate"] > 0.03} == expected


def test_axes_may_grow(make_grid, tmp_path, count_tokens):
    few = run_sweep(make_grid(), tmp_path, workers=1)
    count_tokens.clear()
    more = run_sweep(make_grid(schedules={"warmup_stable_decay": (0.01, 0.02, 0.04)}), tmp_path, workers=1)
    assert by_id(more).items() >= by_id(few).items()
    new = [row for row in more if row["learning_rate"] == 0.04]
    assert len(more) == 6
    assert len(new) == 2


def test_only_one_sweep_in_a_folder(make_grid, tmp_path, monkeypatch):
    """While a sweep trains, another one is refused; afterwards it is not."""
    step, seen = Ensemble.step, []

    def meeting(self, factors):
        if not seen:
            with pytest.raises(ValueError) as caught:
                run_sweep(make_grid(), tmp_path, workers=1)
            seen.append(caught)
        step(self, factors)

    monkeypatch.setattr(Ensemble, "step", meeting)
    run_sweep(make_grid(), tmp_path, workers=1)
    says(seen[0], f"another run is at work in {tmp_path}", "wait for its end, or take another folder")
    run_sweep(make_grid(), tmp_path, workers=1)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"decay_ratio": 0.5}, ("another decay_ratio", "0.25 there, 0.5 now")),
        ({"warmup_tokens": 64}, ("another warmup_tokens", "128 there, 64 now")),
        ({"decay_shape": "1-sqrt"}, ("another decay_shape", "'linear' there, '1-sqrt' now")),
        ({"max_lr": 0.05}, ("another max_lr", "0.03 there, 0.05 now")),
        ({"weight_decay": 0.2}, ("another sections", "{'weight_decay': 0.1}", "{'weight_decay': 0.2}")),
    ],
)
def test_folder_of_another_sweep_is_refused(make_grid, tmp_path, count_tokens, change, parts):
    grid = make_grid(tokens=(512,))
    run_sweep(grid, tmp_path, workers=1)
    before = (tmp_path / "sweep.jsonl").read_bytes()
    count_tokens.clear()
    if "weight_decay" in change:
        change = {"sections": grid.sections | {"training": change}}
    with pytest.raises(ValueError) as caught:
        run_sweep(replace(grid, **change), tmp_path, workers=1)
    says(caught, f"{tmp_path} holds a sweep with", *parts, "take another folder")
    assert not count_tokens
    assert (tmp_path / "sweep.jsonl").read_bytes() == before


def test_folder_of_other_data_is_refused(make_grid, tmp_path):
    """The same path, with other text behind it."""
    grid = make_grid(tokens=(512,))
    copy = tmp_path / "corpus.jsonl"
    copy.write_bytes(Path(grid.sections["data"]["dataset"]).read_bytes())
    grid = replace(grid, sections=grid.sections | {"data": grid.sections["data"] | {"dataset": str(copy)}})
    there = run_sweep(grid, tmp_path / "sweep", workers=1)[0]["data"]["fingerprint"]
    lines = copy.read_text().splitlines()
    copy.write_text("\n".join(lines[:-5]) + "\n")
    with pytest.raises(ValueError) as caught:
        run_sweep(grid, tmp_path / "sweep", workers=1)
    says(caught, "another data", f"'fingerprint': '{there}'", "there, ", "now")


# ---- cost


def test_budget_that_is_too_small_is_refused_before_training(make_grid, tmp_path, count_tokens):
    grid = make_grid()
    needed = 2 * (1024 + 128)  # two learning rates; the short horizon's tail of a quarter
    with pytest.raises(ValueError) as caught:
        run_sweep(replace(grid, max_tokens=needed - 1), tmp_path, workers=1)
    says(caught, "needs 2,304 tokens", "max_tokens of 2,303", "raise it")
    assert not count_tokens
    assert not (tmp_path / "sweep.jsonl").exists()
    assert len(run_sweep(replace(grid, max_tokens=needed), tmp_path, workers=1)) == 4


def test_budget_holds_for_the_whole_sweep(make_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    schedules = {"warmup_stable_decay": (1e-4, 2e-4), "linear": (1e-4, 2e-4)}
    grid = make_grid(schedules=schedules, max_extensions=20)
    free = sum(row["trained_tokens"] for row in run_sweep(grid, tmp_path / "free", workers=1))
    for budget in (free // 2, free - 1):
        rows = run_sweep(replace(grid, max_tokens=budget), tmp_path / str(budget), workers=1)
        assert budget / 3 < sum(row["trained_tokens"] for row in rows) <= budget


@pytest.mark.slow
def test_estimate_is_what_the_sweep_then_has(make_grid, tmp_path, count_tokens):
    schedules = {name: every_schedule()[name] for name in ("warmup_stable_decay", "power", "cosine")}
    grid = make_grid(tokens_per_step=(64, 128), seeds=(0, 1), schedules=schedules, law=LAW)
    cost = estimate(grid, tmp_path / "none", workers=2)
    assert not (tmp_path / "none").exists()
    count_tokens.clear()
    rows = run_sweep(grid, tmp_path / "sweep", workers=1)
    assert cost["runs"] == len(rows) == 3 * 2 * 2 * 2 * 2
    assert cost["tokens"] == count_tokens["tokens"]
    assert cost["tokens_without_sharing"] == sum(row["tokens"] for row in rows)
    assert cost["flops"] == pytest.approx(sum(row["trained_tokens"] * row["flops_per_token"] for row in rows))
    names = {f"{row['schedule']}-{row['width']}-{row['tokens_per_step']}" for row in rows}
    assert {group["name"] for group in cost["groups"]} == names
    assert 0 < cost["seconds"] < 600
    text = estimate_text(cost)
    assert f"{len(rows)} runs, {cost['tokens']:,} tokens" in text
    assert "2 worker(s)" in text
    saved = 1 - cost["tokens"] / cost["tokens_without_sharing"]
    assert f"save {saved:.0%}" in text
    assert f"shared trunks saved {saved:.0%}" in rows_text(rows)


# ---- power


def law_grid(make_grid, **changes):
    """A 3 x 3 sweep around the paper's law, and scales of power."""
    return make_grid(
        tokens_per_step=(64, 128, 256),
        tokens=(1024, 2048, 8192),
        schedules={"warmup_stable_decay": (0.0005, 0.001, 0.002), "power": (0.5, 1.0, 2.0)},
        seeds=(0, 1),
        max_extensions=8,
        **changes,
    )


def test_power_runs_under_the_law_of_the_sweep(make_grid, tmp_path, monkeypatch):
    """Losses that follow the paper's law exactly: power's rows have it, times the scales."""
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    grid = law_grid(make_grid)
    rows = run_sweep(grid, tmp_path, workers=1)
    powers = [row for row in rows if row["schedule"] == "power"]
    fitted = fit_law([row for row in rows if row["schedule"] != "power"]).law
    a = few_digits(fitted["a"])
    assert fitted["a"] == pytest.approx(4.6, rel=0.02)
    for row in powers:
        assert row["law"]["b"] == few_digits(fitted["b"]) == pytest.approx(-0.51, abs=0.01)
        assert row["law"]["batch_exponent"] == few_digits(fitted["batch_exponent"]) == pytest.approx(1.0, abs=0.01)
        law = row["law"]["a"] * (row["tokens_per_step"] / 4096) ** row["law"]["batch_exponent"]
        assert row["learning_rate"] == pytest.approx(law * row["tokens"] ** row["law"]["b"])
    starts = {row["law"]["a"] for row in powers if not row["extension"]}
    assert starts == {few_digits(scale * a) for scale in (0.5, 1.0, 2.0)}
    cells = Counter((row["width"], row["tokens_per_step"], row["tokens"], row["seed"]) for row in powers)
    assert len(cells) == 18
    assert min(cells.values()) >= 3
    assert run_sweep(grid, tmp_path, workers=1) == rows  # the law is found again, and nothing is missing


def test_power_is_extended_to_its_own_optimum(make_grid, tmp_path, monkeypatch):
    """Power's optimum lies 2.5 octaves above the law: the sweep goes there, the fit finds it."""
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    monkeypatch.setattr(PaperEnsemble, "offset", 2.5)
    rows = run_sweep(law_grid(make_grid), tmp_path, workers=1)
    assert max(row["extension"] for row in rows if row["schedule"] == "power") == 2
    fitted = fit_law(rows)
    assert math.log2(fitted.power["a"] / fitted.law["a"]) == pytest.approx(2.5, abs=0.05)


def test_power_without_enough_rows_says_so(make_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    grid = law_grid(make_grid)
    with pytest.raises(ValueError) as caught:
        run_sweep(replace(grid, tokens_per_step=(64,)), tmp_path, workers=1)
    says(caught, "3 of 3 cells", "too few for 3 parameters")
    rows = rows_in(tmp_path)
    assert {row["schedule"] for row in rows} == {"warmup_stable_decay"}  # what was measured is kept
    assert {row["schedule"] for row in run_sweep(grid, tmp_path, workers=1)} == {"warmup_stable_decay", "power"}


# ---- several processes


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_workers(make_grid, tmp_path):
    grid = make_grid(widths=(16, 32), schedules=every_schedule(), law=LAW, max_extensions=1)
    one = run_sweep(grid, tmp_path / "one", workers=1)
    two = run_sweep(grid, tmp_path / "two", workers=2)
    assert by_id(one) == by_id(two)
    assert Counter(row["id"] for row in one) == Counter(row["id"] for row in two)


def as_yaml(grid, path):
    names = ("widths", "tokens_per_step", "tokens", "seeds")
    content = {name: list(getattr(grid, name)) for name in names}
    content["schedules"] = {name: list(values) for name, values in grid.schedules.items()}
    names = ("law", "warmup_tokens", "decay_ratio", "decay_shape", "max_lr", "max_extensions")
    content |= {name: getattr(grid, name) for name in names}
    path.write_text(yaml.safe_dump(grid.sections | {"sweep": content}), encoding="utf-8")
    return path


def start(path, folder, workers=2, launcher=(), **variables):
    """The command line of a sweep in a process group of its own."""
    command = [sys.executable, "-m", *launcher, "hf_power.cli", "sweep", str(path), "--output_dir", str(folder)]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        )


def alive(group):
    """Processes of a process group that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def signs(folder):
    """What changes while a sweep works: rows and the state of trunks."""
    files = [*folder.glob("sweep.jsonl"), *folder.glob(".trunk*.pt")]
    return {(p.name, p.stat().st_mtime_ns) for p in files}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_at_ten_points_it_ends_the_same(make_grid, tmp_path):
    """SIGKILL to the sweep: its workers end by themselves, and the rows are in the end those of one that was let run."""
    schedules = {name: every_schedule()[name] for name in ("warmup_stable_decay", "power", "cosine")}
    grid = make_grid(widths=(16, 32), tokens=(8192, 16384, 32768), schedules=schedules, law=LAW)
    path = as_yaml(grid, tmp_path / "sweep.yaml")
    folder = tmp_path / "killed"
    generator = random.Random(0)
    for kill in range(10):
        before, process = signs(folder), start(path, folder)
        if kill % 5:  # two of the ten may be killed before this start has done any work
            wait_until(lambda before=before: signs(folder) != before)
        time.sleep(generator.uniform(0, 2 if kill % 5 else 8))
        assert process.poll() is None
        process.kill()
        process.wait()
        wait_until(lambda process=process: not alive(process.pid))  # one that was just starting imports to the end
    assert 0 < len(rows_in(folder)) < 36
    assert start(path, folder).wait() == 0
    whole = run_sweep(grid, tmp_path / "whole", workers=1)
    assert by_id(rows_in(folder)) == by_id(whole)
    assert not list(folder.glob(".trunk*"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_processes_of_accelerate_share_a_folder(make_grid, tmp_path, workers):
    """Two processes, each with its share of the groups: the rows of one, none of them trained twice."""
    grid = make_grid(widths=(16, 32), schedules=every_schedule(), law=LAW, max_extensions=1)
    path, folder = as_yaml(grid, tmp_path / "sweep.yaml"), tmp_path / "two"
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    process = start(path, folder, workers, launcher, ACCELERATE_USE_CPU="true")
    try:
        assert process.wait(timeout=300) == 0, folder.with_suffix(".log").read_text()[-3000:]
    finally:
        process.terminate()  # the launcher ends its processes
    assert not list(folder.glob(".lock*"))
    rows = rows_in(folder)
    assert by_id(rows) == by_id(run_sweep(grid, tmp_path / "one", workers=1))
    assert len(rows) == len((folder / "sweep.jsonl").read_text().splitlines())


def test_lock_is_given_back_when_a_sweep_fails(make_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "prepare", lambda grid, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_sweep(make_grid(), tmp_path, workers=1)
    with only_one(tmp_path, ".lock-0"):
        pass
