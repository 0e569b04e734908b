"""A step whose loss or gradient is not finite leaves no trace in the weights, and one on record."""

import copy
import json
from pathlib import Path

import pytest
import torch
from processes import torchrun
from safetensors.torch import load_file
from transformers import Trainer

from hf_power.checkpoints.seal import problems
from hf_power.pretrain import run as train
from hf_power.pretrain.bad_numbers import BadNumbers, NonFiniteError, non_finite_weights
from hf_power.pretrain.record import RunRecord
from hf_power.pretrain.trainer import PowerTrainer
from hf_power.records.run import LossSpike, Run, SkippedStep
from hf_power.settings.settings import Settings

PLAIN_LOSS = Trainer.compute_loss


def poison(monkeypatch, micro_batches, value=float("nan")):
    """Multiply the losses of these micro-batches, counted from 0, before anything of ours sees them."""
    count = iter(range(10**6))

    def loss(self, *args, **kwargs):
        return PLAIN_LOSS(self, *args, **kwargs) * (value if next(count) in micro_batches else 1.0)

    monkeypatch.setattr(Trainer, "compute_loss", loss)


def pretrain(sections, folder, tokens=12 * 128, **training):
    given = sections(folder, tokens=tokens, **{"save_strategy": "no", **training})
    return train.pretrain(Settings.from_dict(given)).to_json(), load_file(folder / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(monkeypatch, sections, folder, skip, accumulation=1, **training):
    """Weights of a loop of its own over the same model, batches and learning rates, that leaves these steps out."""
    kept = {}

    def loop(trainer, resume_from_checkpoint=None):
        model, args = trainer.model.train(), trainer.args
        batches = iter(trainer.get_train_dataloader())
        trainer.create_optimizer_and_scheduler(args.max_steps)
        for step in range(1, args.max_steps + 1):
            for _ in range(accumulation):
                blocks = next(batches)["input_ids"]
                (model(input_ids=blocks, labels=blocks).loss / accumulation).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            if step not in skip:
                trainer.optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()
        kept.update(copy.deepcopy(model.state_dict()))
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(PowerTrainer, "train", loop)
        with pytest.raises(InterruptedError):
            pretrain(sections, folder, **training)
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skipped_steps_leave_the_weights_of_a_loop_without_them(sections, tmp_path, monkeypatch, value):
    wanted = by_hand(monkeypatch, sections, tmp_path / "hand", skip=(1, 5, 6))
    poison(monkeypatch, {0, 4, 5}, value)
    run, weights = pretrain(sections, tmp_path / "run")
    assert equal(weights, {name: wanted[name] for name in weights})
    assert [s["step"] for s in run["skipped_steps"]] == [1, 5, 6]
    assert run["skipped_steps"][1] == {"step": 5, "tokens": [512, 640], "blocks": [16, 20]}
    assert [point["step"] for point in run["loss_curve"] if "loss" in point] == [2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert run["status"] == "finished"
    assert run["tokens_seen"] == 12 * 128
    assert json.loads((tmp_path / "run/run.json").read_text())["skipped_steps"] == run["skipped_steps"]


@pytest.mark.slow
def test_one_bad_micro_batch_skips_the_whole_step_and_the_log_is_of_the_others(sections, tmp_path, monkeypatch):
    given = {"gradient_accumulation_steps": 3, "tokens": 3 * 384, "logging_steps": 3}
    wanted = by_hand(monkeypatch, sections, tmp_path / "hand", skip=(2,), accumulation=3, **given)
    plain = []

    def loss(self, *args, **kwargs):
        value = PLAIN_LOSS(self, *args, **kwargs)
        plain.append(value.item())
        return value * (float("nan") if len(plain) == 5 else 1.0)

    monkeypatch.setattr(Trainer, "compute_loss", loss)
    run, weights = pretrain(sections, tmp_path / "run", **given)
    assert equal(weights, {name: wanted[name] for name in weights})
    assert [s["step"] for s in run["skipped_steps"]] == [2]
    del plain[4]
    assert run["loss_curve"][0]["loss"] == pytest.approx(sum(plain) / 8, abs=1e-4)


@pytest.mark.slow
def test_the_stock_trainer_makes_its_weights_nan(sections, tmp_path, monkeypatch):
    for name in ("_get_grad_norm", "compute_loss", "save_model"):
        monkeypatch.delattr(PowerTrainer, name)

    def training_step(trainer, model, inputs, *args):
        trainer.guards.record.count(len(inputs["input_ids"]))
        return Trainer.training_step(trainer, model, inputs, *args)

    monkeypatch.setattr(PowerTrainer, "training_step", training_step)
    poison(monkeypatch, {4})
    _, weights = pretrain(sections, tmp_path / "run")
    assert all(weight.isnan().any() for weight in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"max_grad_norm": 0.0}, {"logging_steps": 5}])
def test_other_settings_skip_too(sections, tmp_path, monkeypatch, given):
    poison(monkeypatch, {4})
    run, weights = pretrain(sections, tmp_path / "run", **given)
    assert [s["step"] for s in run["skipped_steps"]] == [5]
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.slow
def test_an_optimizer_that_is_not_fused_skips_too(sections, tmp_path, monkeypatch):
    plain = torch.optim.AdamW.__init__
    monkeypatch.setattr(torch.optim.AdamW, "__init__", lambda *args, **kw: plain(*args, **kw | {"fused": False}))
    wanted = by_hand(monkeypatch, sections, tmp_path / "hand", skip=(5,))
    poison(monkeypatch, {4})
    _, weights = pretrain(sections, tmp_path / "run")
    assert equal(weights, {name: wanted[name] for name in weights})


@pytest.mark.slow
@pytest.mark.parametrize("logging_steps", [1, 7])
def test_ten_in_a_row_end_the_run(sections, tmp_path, monkeypatch, logging_steps):
    poison(monkeypatch, set(range(5, 15)))
    with pytest.raises(NonFiniteError) as error:
        pretrain(sections, tmp_path / "run", 20 * 128, save_strategy="steps", save_steps=4, logging_steps=logging_steps)
    assert "10 steps in a row, 6 to 15, which read tokens 640 to 1,920 (blocks 20 to 60" in str(error.value)
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["status"] == "failed"
    assert [s["step"] for s in run["skipped_steps"]] == list(range(6, 16))
    assert f"go on from {tmp_path / 'run' / 'checkpoint-12'} " in str(error.value)
    saved = json.loads((tmp_path / "run/checkpoint-12/run.json").read_text())
    assert [s["step"] for s in saved["skipped_steps"]] == list(range(6, 13))
    assert not problems(tmp_path / "run/checkpoint-12")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(sections, tmp_path, monkeypatch):
    """Poisoned after the sixth step: checkpoint-4 stands, checkpoint-8 is none."""
    plain = PowerTrainer._get_learning_rate

    def poisoned(trainer):
        if trainer.state.global_step == 6:
            trainer.model.lm_head.weight.data[0, 0] = float("inf")
        return plain(trainer)

    monkeypatch.setattr(PowerTrainer, "_get_learning_rate", poisoned)
    with pytest.raises(NonFiniteError, match=r"weights such as .* not saved: go on from .*checkpoint-4 "):
        pretrain(sections, tmp_path / "run", save_strategy="steps", save_steps=4)
    assert not problems(tmp_path / "run/checkpoint-4")
    assert problems(tmp_path / "run/checkpoint-8") or not (tmp_path / "run/checkpoint-8").exists()
    assert not (tmp_path / "run/model.safetensors").exists()


def test_non_finite_weights_are_named():
    model = torch.nn.Linear(3, 2)
    assert non_finite_weights(model) == []
    model.bias.data[1] = float("nan")
    assert non_finite_weights(model) == ["bias"]


def record(losses=(), **known):
    curve = [{"loss": loss} for loss in losses]
    return RunRecord(Run(tokens_per_step=4, loss_curve=curve, **known), Path("unused"), 4)


def test_a_spike_is_above_the_median_by_three_quartile_ranges():
    """Of 1..20: quartiles 5.25, 10.5, 15.75, so the border is 10.5 + 3 x 10.5 = 42."""
    numbers = BadNumbers(kept := record(range(1, 21)), 10, 1)
    assert numbers.warnings({"loss": 42.0}, 21) == [] == kept.run.loss_spikes
    assert numbers.warnings({"loss": 42.1}, 22) == ["the loss of step 22 is 42.1000; the 20 logs before: 10.5000"]
    assert kept.run.loss_spikes == [LossSpike(22, 42.1, 10.5)]
    assert BadNumbers(record(range(19)), 10, 1).warnings({"loss": 1e9}, 20) == []


def test_idle_experts_are_reported_once_after_five_logs():
    numbers = BadNumbers(record(), 10, 1)
    said = [numbers.warnings({"idle_experts": n}, 1) for n in (1, 1, 1, 1, 0, 1, 1, 1, 1, 2, 1, 1)]
    assert [len(s) for s in said] == [0] * 9 + [1, 0, 0]


def test_the_row_goes_on_after_a_resume_and_needs_a_length():
    skipped = [SkippedStep(step, (0, 4), (0, 4)) for step in (1, 3)]
    numbers = BadNumbers(record(steps=3, skipped_steps=skipped), 2, 1)
    numbers.finite_loss(torch.tensor(1.0))
    numbers.bad_step(torch.tensor(float("nan")))
    numbers.read(4, lambda tensor: tensor)
    assert numbers.stop_at == [3, 4]
    with pytest.raises(ValueError, match=r"^max_skipped_steps must be at least 1, got 0: pass e.g. 10.$"):
        BadNumbers(record(), 0, 1)


TWO = """
import json, sys
from transformers import Trainer
from hf_power.pretrain.trainer import PowerTrainer
from hf_power.pretrain import run as train
from hf_power.settings.settings import Settings
import torch

plain, count = Trainer.compute_loss, iter(range(10**6))
def loss(self, *args, **kwargs):
    bad = next(count) == 4 and self.args.process_index == 1
    return plain(self, *args, **kwargs) * (float("nan") if bad else 1.0)
Trainer.compute_loss = loss
saved = PowerTrainer.evaluate
def evaluate(self, *args, **kwargs):
    torch.save(self.model.state_dict(), f"{sys.argv[2]}-{self.args.process_index}.pt")
    return saved(self, *args, **kwargs)
PowerTrainer.evaluate = evaluate
train.pretrain(Settings.from_dict(json.loads(open(sys.argv[1]).read())))
"""


@pytest.mark.slow
def test_one_bad_process_of_two_skips_the_step_on_both(sections, tmp_path):
    given = sections(tmp_path / "run", save_strategy="no", per_device_train_batch_size=2, use_cpu=True)
    (tmp_path / "two.py").write_text(TWO)
    (tmp_path / "given.json").write_text(json.dumps(given))
    torchrun(*(tmp_path / part for part in ("two.py", "given.json", "weights")))
    one, two = (torch.load(tmp_path / f"weights-{i}.pt") for i in (0, 1))
    assert equal(one, two)
    assert all(weight.isfinite().all() for weight in one.values())
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["skipped_steps"] == [{"step": 5, "tokens": [512, 640], "blocks": [16, 20]}]
