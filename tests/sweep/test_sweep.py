import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import warm
import yaml
from processes import PATIENCE, free_port, until
from samples import record
from sentences import refused, says

from hf_power.cli import run_verb
from hf_power.fit.fit import fit_law
from hf_power.pretrain import run as train
from hf_power.records.errors import UserError
from hf_power.records.files import only_one
from hf_power.records.rows import append_rows, load_rows
from hf_power.schedule import Law
from hf_power.settings.arguments import ARGUMENTS
from hf_power.settings.settings import Settings
from hf_power.sweep import run as sweep
from hf_power.sweep import trunks
from hf_power.sweep.aim import Aim
from hf_power.sweep.cost import estimate, estimate_text
from hf_power.sweep.crew import parts_of
from hf_power.sweep.ensemble import Ensemble
from hf_power.sweep.grid import SCHEDULES, Grid, few_digits
from hf_power.sweep.jobs import groups_of, job_tokens, start_jobs
from hf_power.sweep.run import aim_text, rows_text, run_sweep

LAW = Law(2.0, -0.5, 1.0)
NUMBERS = {"a": 2.0, "b": -0.5, "batch_exponent": 1.0}
NOT_OF_THE_ROW = {"seconds"}  # depends on the machine's load


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


@pytest.fixture(scope="module")
def done(make_grid, tmp_path_factory):
    """The folder of a finished sweep, to be copied, and its rows."""
    folder = tmp_path_factory.mktemp("done")
    return folder, run_sweep(make_grid(), folder, workers=1)


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the finished sweep."""
    return Path(shutil.copytree(done[0], tmp_path / "copy"))


class PaperEnsemble:
    """Trains nothing: losses are parabolas around the optimum of a given law, 4.6 * beta * T**-0.51 of the paper."""

    curvature = 0.05  # nats per octave**2
    offset = 0.0  # octaves of power's own optimum from the law

    def __init__(self, settings, members, data, *, device):
        self.members, self.training, self.block_size = members, settings.training, settings.data.block_size
        self.batch = settings.training.per_device_train_batch_size * self.block_size
        self.models, self.position, self.alive = [torch.nn.Linear(2, 2)], 0, [True] * len(members)
        self.models[0].num_parameters = lambda **_: 6
        self.models[0].config = settings.model.config(vocab_size=400)
        self.factors = {}

    def step(self, factors):
        self.factors[self.position] = factors
        self.position += 1

    def rates(self):
        """Of each member, the peak or for power the law at the horizon, from its rate where the tail of a quarter begins."""
        peaks = [member.learning_rate for member in self.members]
        if self.training.lr_scheduler_type != "power":
            return peaks
        start, b = 3 * self.position // 4, self.training.lr_scheduler_kwargs["b"]
        to_the_end = (self.position / start) ** b * 2**-self.offset
        return [peak * factor * to_the_end for peak, factor in zip(peaks, self.factors[start], strict=True)]

    def held_out_losses(self):
        best = 4.6 * self.batch / 4096 * (self.position * self.batch) ** -0.51
        nats = [3.0 + self.curvature * math.log2(rate / best) ** 2 for rate in self.rates()]
        return [loss + 1e-3 * (member.seed % 2) for loss, member in zip(nats, self.members, strict=True)]

    train_losses = held_out_losses

    def state(self):
        return {"position": self.position}

    def load_state(self, state):
        self.position = state["position"]


def by_id(rows, without=NOT_OF_THE_ROW):
    return {row.id: {key: value for key, value in row.to_json().items() if key not in without} for row in rows}


def rows_in(folder):
    return load_rows(folder / "sweep.jsonl")[0]


def held_out_loss(row, folder):
    """Of a Trainer's run of the row's settings as they are."""
    training = row.settings["training"] | {"output_dir": str(folder), "save_strategy": "no", "disable_tqdm": True}
    return train.pretrain(Settings.from_dict(row.settings | {"training": training})).held_out_loss


def every_schedule(value=0.01):
    return {name: (1.0, 2.0) if name == "power" else (value, 2 * value) for name in SCHEDULES}


OTHERS = {
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-2,
    "max_grad_norm": 0.01,
    "bf16": True,
}


@pytest.mark.slow
def test_what_a_sweep_honours_moves_its_rows(make_grid, tmp_path, monkeypatch):
    """The rows of the table that say so; what a CPU alone cannot show are tf32, and use_cpu, which is given here."""
    honoured = {name for name, argument in ARGUMENTS.items() if argument.sweep is not None}
    assert honoured == {*OTHERS, "optim", "tf32", "use_cpu"}

    def loss(name, **training):
        grid = make_grid(tokens=(512,), schedules={"warmup_stable_decay": (0.02,)})
        grid = replace(grid, sections=grid.sections | {"training": {"use_cpu": True, **training}})
        (row,) = run_sweep(grid, tmp_path / name, workers=1)
        return row.loss

    plain = loss("plain")
    assert all(loss(name, **{name: value}) != plain for name, value in OTHERS.items())
    fused = []
    step = Ensemble.step
    monkeypatch.setattr(
        Ensemble, "step", lambda self, x: (fused.append(self.optimizers[0].defaults["fused"]), step(self, x))
    )
    assert loss("unfused", optim="adamw_torch") == pytest.approx(plain, abs=1e-5)
    assert not any(fused)


@pytest.mark.slow
def test_row_is_a_pretraining_run(make_grid, tmp_path, monkeypatch):
    """The branch of a trunk, under every schedule, and a trunk's own end have the loss of the Trainer's run from scratch."""
    monkeypatch.setattr("hf_power.plots.figures.save", lambda figure, path: None)
    schedules = {name: (1.0,) if name == "power" else (0.01,) for name in SCHEDULES}
    rows = run_sweep(make_grid(schedules=schedules, law=LAW), tmp_path / "sweep", workers=1)
    assert len({row.loss for row in rows}) == len(rows) == 10
    checked = [row for row in rows if row.tokens == 512 or row.schedule == "warmup_stable_decay"]
    for i, row in enumerate(checked):
        assert row.loss == pytest.approx(held_out_loss(row, tmp_path / f"run{i}"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_trained_tokens_are_those_that_were_trained(make_grid, tmp_path, count_tokens, schedule):
    grid = make_grid(schedules={schedule: (0.01,)}, law=LAW, seeds=(0, 1), tokens=(512, 768, 1024))
    rows = run_sweep(grid, tmp_path, workers=1)
    groups = groups_of(grid, schedule, LAW if schedule == "power" else None)
    assert sum(row.trained_tokens for row in rows) == count_tokens["tokens"]
    assert count_tokens["tokens"] == sum(job_tokens(grid, job) for job in start_jobs(groups))
    assert count_tokens["tokens"] < sum(row.tokens for row in rows)


@pytest.mark.slow
def test_added_learning_rates_are_counted_too(make_grid, tmp_path, count_tokens):
    grid = make_grid(schedules={"warmup_stable_decay": (0.0005, 0.001)}, max_extensions=2)  # far too low
    rows = run_sweep(grid, tmp_path, workers=1)
    assert {row.learning_rate for row in rows} == {0.0005, 0.001, 0.002, 0.004}
    assert {row.extension for row in rows} == {0, 1, 2}
    assert sum(row.trained_tokens for row in rows) == count_tokens["tokens"]


@pytest.mark.slow
def test_diverged_rows_say_so(make_grid, tmp_path):
    grid = make_grid(schedules={"linear": (0.01, 30.0, 1e6)}, widths=(32,))
    rows = run_sweep(grid, tmp_path, workers=1)
    by_rate = {rate: [row for row in rows if row.learning_rate == rate] for rate in (0.01, 30.0, 1e6)}
    assert {row.status for row in by_rate[0.01]} == {"finished"}
    for row in by_rate[30.0] + by_rate[1e6]:
        assert (row.status, row.loss, row.train_loss) == ("diverged", None, None)
        assert "guessing" in row.reason or "not finite" in row.reason
    alone = run_sweep(replace(grid, schedules={"linear": (0.01,)}), tmp_path / "alone", workers=1)
    assert [row.loss for row in alone] == pytest.approx([row.loss for row in by_rate[0.01]], abs=1e-5)
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
    assert [(row.status, row.reason) for row in rows] == [("diverged", "the training loss was not finite")] * 4
    assert calls["steps"] == 1


@pytest.mark.slow
def test_group_that_fails_leaves_the_others_alone(make_grid, tmp_path, monkeypatch):
    grid = make_grid(widths=(16, 32), seeds=(0, 1))
    step = Ensemble.step
    calls = Counter()

    def failing(self, factors):
        width = self.models[0].config.hidden_size
        calls[width] += 1
        if width == 32 and calls[width] == 9:  # the first horizon of 8 steps is measured
            raise torch.OutOfMemoryError("out of\nmemory")
        step(self, factors)

    monkeypatch.setattr(Ensemble, "step", failing)
    rows = run_sweep(grid, tmp_path, workers=1)
    of = {w: [row for row in rows if row.width == w] for w in (16, 32)}
    assert {row.status for row in of[16]} == {"finished"}
    assert {(row.tokens, row.status, row.reason) for row in of[32]} == {
        (512, "finished", None),
        (1024, "failed", "OutOfMemoryError: out of memory"),
    }
    assert {row.loss for row in of[32] if row.status == "failed"} == {None}
    assert rows_text(rows).count("delete its line to try it again") == 4

    monkeypatch.setattr(Ensemble, "step", step)
    assert by_id(run_sweep(grid, tmp_path, workers=1)) == by_id(rows)  # it is not tried again by itself
    path = tmp_path / "sweep.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["status"] != "failed"]
    path.write_text("\n".join(kept) + "\n")
    again = run_sweep(grid, tmp_path, workers=1)
    assert by_id(again) == by_id(run_sweep(grid, tmp_path / "whole", workers=1))


def too_large():
    torch.empty(2**60, dtype=torch.int8)


def impossible():
    raise UserError("no such shape")


@pytest.mark.parametrize(
    ("refuse", "reason"), [(impossible, "UserError: no such shape"), (too_large, "DefaultCPUAllocator: can't allocate")]
)
def test_group_that_cannot_begin_fails_too(make_grid, tmp_path, monkeypatch, refuse, reason):
    monkeypatch.setattr(trunks, "Ensemble", lambda *args, **kwargs: refuse())
    rows = run_sweep(make_grid(), tmp_path, workers=1)
    assert [row.status for row in rows] == ["failed"] * 4
    assert all(reason in row.reason for row in rows)


def test_bug_of_ours_ends_the_sweep_and_keeps_its_rows(make_grid, tmp_path, monkeypatch):
    grid, step = make_grid(), Ensemble.step

    def buggy(self, factors):
        if self.position == 10:  # the first horizon of 8 steps is measured
            max([])
        step(self, factors)

    monkeypatch.setattr(Ensemble, "step", buggy)
    path = as_yaml(grid, tmp_path / "sweep.yaml")
    with pytest.raises(ValueError, match="empty") as caught:
        run_verb("sweep", [str(path), "--output_dir", str(tmp_path / "sweep"), "--workers", "1"])
    assert not isinstance(caught.value, UserError)
    assert [(row.tokens, row.status) for row in rows_in(tmp_path / "sweep")] == [(512, "finished")] * 2


class BuggyGrid(Grid):
    """A grid with a bug that only a worker process meets."""

    def tail_tokens(self, horizon, tokens_per_step):
        return max([]) if multiprocessing.parent_process() else super().tail_tokens(horizon, tokens_per_step)


@pytest.mark.slow
def test_bug_of_ours_in_a_worker_has_its_traceback(make_grid, tmp_path):
    warm.fork_workers()
    grid = make_grid()
    with pytest.raises(ValueError, match="empty") as caught:
        run_sweep(BuggyGrid(**{name: getattr(grid, name) for name in vars(grid) if name != "settings"}), tmp_path)
    assert not isinstance(caught.value, UserError)
    assert "in tail_tokens" in str(caught.value.__cause__)
    assert not (tmp_path / "sweep.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["last", "only"])
def test_torn_line_is_trained_again(make_grid, done, copy, torn):
    path = copy / "sweep.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes((b"" if torn == "only" else b"".join(lines[:-1])) + lines[-1][:200])
    assert by_id(run_sweep(make_grid(), copy, workers=1)) == by_id(done[1])
    assert len(load_rows(path)[1]) == 1  # the torn line stays, and is named


def test_finished_sweep_trains_nothing(make_grid, done, copy, count_tokens):
    assert run_sweep(make_grid(), copy, workers=1) == done[1]
    assert not count_tokens
    assert not list(copy.glob(".trunk*"))


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


@pytest.mark.slow
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


def test_axes_may_grow(make_grid, done, copy):
    more = run_sweep(make_grid(schedules={"warmup_stable_decay": (0.01, 0.02, 0.04)}), copy, workers=1)
    assert by_id(more).items() >= by_id(done[1]).items()
    assert len(more) == 6
    assert len([row for row in more if row.learning_rate == 0.04]) == 2


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
def test_folder_of_another_sweep_is_refused(make_grid, copy, count_tokens, change, parts):
    grid, before = make_grid(), (copy / "sweep.jsonl").read_bytes()
    if "weight_decay" in change:
        change = {"sections": grid.sections | {"training": change}}
    with refused(UserError, f"{copy} holds a sweep with", *parts, "take another folder"):
        run_sweep(replace(grid, **change), copy, workers=1)
    assert not count_tokens
    assert (copy / "sweep.jsonl").read_bytes() == before


def test_horizons_that_further_batches_would_move_are_refused(make_grid, tmp_path):
    """1,152 is 9 steps of 128, but with 256 beside it the horizon is 1,280, and the rows could not be one cell's."""
    append_rows(tmp_path / "sweep.jsonl", [record(tokens_per_step=128, tokens=1152)])
    grid = make_grid(tokens_per_step=(128, 256), tokens=(1280,))
    bench = SimpleNamespace(grid=grid, folder=tmp_path, data=SimpleNamespace(record={}))
    with refused(UserError, "has runs of 1,152 tokens where whole steps of this grid's batches make 1,280"):
        sweep._same_grid(bench)
    assert not (tmp_path / "sweep.json").exists()


def test_folder_of_other_data_is_refused(make_grid, tmp_path):
    """The same path, with other text behind it."""
    grid = make_grid(tokens=(512,), schedules={"linear": (0.01,)})
    copy = tmp_path / "corpus.jsonl"
    copy.write_bytes(Path(grid.sections["data"]["dataset"]).read_bytes())
    grid = replace(grid, sections=grid.sections | {"data": grid.sections["data"] | {"dataset": str(copy)}})
    there = run_sweep(grid, tmp_path / "sweep", workers=1)[0].data["fingerprint"]
    lines = copy.read_text().splitlines()
    copy.write_text("\n".join(lines[:-5]) + "\n")
    with refused(ValueError, "another data", f"'fingerprint': '{there}'", "there, ", "now"):
        run_sweep(grid, tmp_path / "sweep", workers=1)


def test_budget_that_is_too_small_is_refused_before_training(make_grid, tmp_path, count_tokens):
    grid = make_grid()
    needed = 2 * (1024 + 128)  # two learning rates; the short horizon's tail of a quarter
    with refused(ValueError, "needs 2,304 tokens", "max_tokens of 2,303", "raise it"):
        run_sweep(replace(grid, max_tokens=needed - 1), tmp_path, workers=1)
    assert not count_tokens
    assert not (tmp_path / "sweep.jsonl").exists()
    assert len(run_sweep(replace(grid, max_tokens=needed), tmp_path, workers=1)) == 4


@pytest.mark.slow
def test_budget_holds_for_the_whole_sweep(make_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    schedules = {"warmup_stable_decay": (1e-4, 2e-4), "linear": (1e-4, 2e-4)}
    grid = make_grid(schedules=schedules, max_extensions=20)
    free = sum(row.trained_tokens for row in run_sweep(grid, tmp_path / "free", workers=1))
    for budget in (free // 2, free - 1):
        rows = run_sweep(replace(grid, max_tokens=budget), tmp_path / str(budget), workers=1)
        assert budget / 3 < sum(row.trained_tokens for row in rows) <= budget


@pytest.mark.slow
def test_estimate_is_what_the_sweep_then_has(make_grid, tmp_path, count_tokens):
    schedules = {name: every_schedule()[name] for name in ("warmup_stable_decay", "power", "cosine")}
    grid = make_grid(tokens_per_step=(64, 128), seeds=(0, 1), schedules=schedules, law=LAW)
    cost = estimate(grid, tmp_path / "none", workers=2)
    assert not (tmp_path / "none").exists()
    count_tokens.clear()
    rows = run_sweep(grid, tmp_path / "sweep", workers=1)
    assert cost.runs == len(rows) == 3 * 2 * 2 * 2 * 2
    assert cost.tokens == count_tokens["tokens"]
    assert cost.tokens_without_sharing == sum(row.tokens for row in rows)
    assert cost.flops == pytest.approx(sum(row.trained_tokens * row.flops_per_token for row in rows))
    names = {f"{row.schedule}-{row.width}-{row.tokens_per_step}" for row in rows}
    assert {group.name for group in cost.groups} == names
    assert 0 < cost.seconds < 600
    text = estimate_text(cost)
    assert f"{len(rows)} runs, {cost.tokens:,} tokens" in text
    assert "2 worker(s)" in text
    saved = 1 - cost.tokens / cost.tokens_without_sharing
    assert f"save {saved:.0%}" in text
    assert f"shared trunks saved {saved:.0%}" in rows_text(rows)


def law_grid(make_grid, **changes):
    """A 3 x 3 sweep around the paper's law, and scales of power."""
    return make_grid(
        tokens_per_step=(64, 128, 256),
        tokens=(1024, 2048, 8192),
        schedules={"warmup_stable_decay": (0.0005, 0.001, 0.002), "power": (0.5, 1.0, 2.0)},
        seeds=(0, 1),
        max_lr=10.0,  # binds nowhere
        max_extensions=8,
        **changes,
    )


@pytest.mark.slow
def test_power_runs_under_the_law_of_the_sweep(make_grid, tmp_path, monkeypatch):
    """Losses that follow the paper's law exactly: power's rows have it, times the scales."""
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    grid = law_grid(make_grid)
    rows = run_sweep(grid, tmp_path, workers=1)
    powers = [row for row in rows if row.schedule == "power"]
    fitted = fit_law([row for row in rows if row.schedule != "power"]).law
    a = few_digits(fitted.a)
    assert fitted.a == pytest.approx(4.6, rel=0.02)
    for row in powers:
        assert row.law["b"] == few_digits(fitted.b) == pytest.approx(-0.51, abs=0.01)
        assert row.law["batch_exponent"] == few_digits(fitted.batch_exponent) == pytest.approx(1.0, abs=0.01)
        law = row.law["a"] * (row.tokens_per_step / 4096) ** row.law["batch_exponent"]
        assert row.learning_rate == pytest.approx(law * row.tokens ** row.law["b"])
    starts = {row.law["a"] for row in powers if not row.extension}
    assert starts == {few_digits(scale * a) for scale in (0.5, 1.0, 2.0)}
    cells = Counter((row.width, row.tokens_per_step, row.tokens, row.seed) for row in powers)
    assert len(cells) == 18
    assert min(cells.values()) >= 3
    assert run_sweep(grid, tmp_path, workers=1) == rows  # the law is found again, and nothing is missing


@pytest.mark.slow
def test_power_is_extended_to_its_own_optimum(make_grid, tmp_path, monkeypatch):
    """Power's optimum lies 2.5 octaves above the law: the sweep goes there, the fit finds it."""
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    monkeypatch.setattr(PaperEnsemble, "offset", 2.5)
    rows = run_sweep(law_grid(make_grid), tmp_path, workers=1)
    assert max(row.extension for row in rows if row.schedule == "power") == 2
    fitted = fit_law(rows)
    assert math.log2(fitted.power.a / fitted.law.a) == pytest.approx(2.5, abs=0.05)


@pytest.mark.slow
def test_an_aim_is_reached_and_a_killed_sweep_ends_the_same(make_grid, tmp_path, monkeypatch):
    """The losses follow the paper's law exactly: the rate at the target is the paper's, with fewer runs than the grid."""
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    grid, aim = law_grid(make_grid), Aim(65536, 1024, 0.3)
    rows = run_sweep(grid, tmp_path / "whole", workers=1, aim=aim)
    assert {row.schedule for row in rows} == {"warmup_stable_decay"}
    assert fit_law(rows).predict(65536, 1024)[0] == pytest.approx(4.6 * 0.25 * 65536**-0.51, rel=0.03)
    assert "saved" in aim_text(grid, rows, aim)
    lines = (tmp_path / "whole/sweep.jsonl").read_text().splitlines(keepends=True)
    for kept in (len(lines) // 4, len(lines) - 1, len(lines)):
        (tmp_path / f"{kept}").mkdir()
        (tmp_path / f"{kept}/sweep.jsonl").write_text("".join(lines[:kept]))
        assert by_id(run_sweep(grid, tmp_path / f"{kept}", workers=1, aim=aim)) == by_id(rows)


@pytest.mark.slow
def test_power_without_enough_rows_says_so(make_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(trunks, "Ensemble", PaperEnsemble)
    grid = law_grid(make_grid)
    with refused(ValueError, "3 of 3 cells", "too few for 3 parameters"):
        run_sweep(replace(grid, tokens_per_step=(64,)), tmp_path, workers=1)
    rows = rows_in(tmp_path)
    assert {row.schedule for row in rows} == {"warmup_stable_decay"}  # what was measured is kept
    assert {row.schedule for row in run_sweep(grid, tmp_path, workers=1)} == {"warmup_stable_decay", "power"}


def test_runs_are_shared_out_that_are_not_computed_as_one(make_grid):
    """A check before a run has one group, which would otherwise keep a single worker busy."""
    grid = make_grid(tokens_per_step=(256, 512), tokens=(1024, 2048), seeds=(3, 4))
    large, small = start_jobs(groups_of(grid, "warmup_stable_decay"))
    assert parts_of(small) == [small]
    parts = parts_of(large)
    assert [(part.group.seeds, part.horizons) for part in parts] == [
        ((seed,), {value: (1024, 2048)}) for value in large.group.values for seed in (3, 4)
    ]
    assert sum(job_tokens(grid, part) for part in parts) == job_tokens(grid, large)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_workers(make_grid, tmp_path):
    warm.fork_workers()
    schedules = {name: every_schedule()[name] for name in ("warmup_stable_decay", "power", "cosine")}
    # The runs of the larger batch are shared out one by one.
    grid = make_grid(tokens_per_step=(64, 512), schedules=schedules, law=LAW, max_extensions=1)
    one = run_sweep(grid, tmp_path / "one", workers=1)
    two = run_sweep(grid, tmp_path / "two", workers=2)
    assert by_id(one) == by_id(two)
    assert len(one) == len(two) == len(by_id(one))


def as_yaml(grid, path):
    names = ("widths", "tokens_per_step", "tokens", "seeds")
    content = {name: list(getattr(grid, name)) for name in names}
    content["schedules"] = {name: list(values) for name, values in grid.schedules.items()}
    content["law"] = grid.law and {name: getattr(grid.law, name) for name in NUMBERS}
    names = ("warmup_tokens", "decay_ratio", "decay_shape", "max_lr", "max_extensions")
    content |= {name: getattr(grid, name) for name in names}
    path.write_text(yaml.safe_dump(grid.sections | {"sweep": content}), encoding="utf-8")
    return path


def start(path, folder, launcher=(), **variables):
    """The command line of a sweep with two workers."""
    command = [warm.python(), "-m", *launcher, "hf_power.cli", "sweep", str(path), "--output_dir", str(folder)]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            [*command, "--workers", "2"], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"} | variables
        )


def workers_of(mark):
    """Processes that are no zombies and were started with a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # It has ended, or belongs to somebody else.
    return found


def rows_and_trunks(folder):
    """Lines of the rows, and the states of trunks: what changes while a sweep works."""
    rows = folder / "sweep.jsonl"
    states = {(path.name, path.stat().st_mtime_ns) for path in folder.glob(".trunk*.pt")}
    return rows.read_bytes().count(b"\n") if rows.exists() else 0, states


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_at_three_points_it_ends_the_same(make_grid, tmp_path):
    """SIGKILL to the sweep: its workers end by themselves, and the rows are in the end those of one that was let run.

    It is killed before it has workers, when a trunk's state is there, and when there are more rows.
    """
    schedules = {"warmup_stable_decay": (0.01, 0.02), "cosine": (0.01, 0.02)}
    grid = make_grid(tokens_per_step=(64, 512), tokens=(1024, 2048, 4096), schedules=schedules)
    path, folder = as_yaml(grid, tmp_path / "sweep.yaml"), tmp_path / "killed"
    mark = f"HF_POWER_TEST={tmp_path}"
    for goes_on in (
        lambda before: (folder / "sweep.json").exists(),
        lambda before: rows_and_trunks(folder)[1] - before[1],
        lambda before: rows_and_trunks(folder)[0] > before[0],
    ):
        before, process = rows_and_trunks(folder), start(path, folder, HF_POWER_TEST=str(tmp_path))
        until(lambda goes_on=goes_on, before=before: goes_on(before))
        assert process.poll() is None
        process.kill()
        process.wait()
        until(lambda: not workers_of(mark))  # A worker that was just starting imports to the end.
    assert 0 < len(rows_in(folder)) < 24
    assert start(path, folder).wait() == 0
    whole = run_sweep(grid, tmp_path / "whole", workers=1)
    assert by_id(rows_in(folder)) == by_id(whole)
    assert not list(folder.glob(".trunk*"))


@pytest.mark.slow
def test_processes_of_accelerate_share_a_folder(make_grid, tmp_path):
    """Two processes, each with its share of the groups in a worker: the rows of one, none of them trained twice."""
    grid = make_grid(widths=(16, 32), schedules={"power": (1.0, 2.0)}, law=LAW, max_extensions=1)
    path, folder = as_yaml(grid, tmp_path / "sweep.yaml"), tmp_path / "two"
    launcher = ("torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port()), "-m")
    process = start(path, folder, launcher, ACCELERATE_USE_CPU="true")
    try:
        assert process.wait(timeout=PATIENCE) == 0, folder.with_suffix(".log").read_text()[-3000:]
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
