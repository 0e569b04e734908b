"""run.json, the card and eval.json say what was done: whose weights they are, tokens that were trained, and changes."""

import os
import shutil
import signal

import pytest

from hf_power.checkpoints.locate import find_model
from hf_power.pretrain import run as train
from hf_power.pretrain.resume import other_machine
from hf_power.publish.card import make_card
from hf_power.records.run import Change, Run
from hf_power.settings.settings import Settings

# The first evaluation has the highest loss, which is taken for the best, so the weights are those of checkpoint-4.
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "lr_scheduler_kwargs": {"a": 8.0, "decay_ratio": 0.0},
}


@pytest.mark.slow
def test_weights_that_are_not_those_of_the_end(sections, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    run = train.pretrain(Settings.from_dict(sections(folder, **BEST)))
    weights = (folder / "model.safetensors").read_bytes()
    assert weights == (folder / "checkpoint-4" / "model.safetensors").read_bytes()
    assert (run.steps, run.tokens_seen, run.weights_step, run.weights_tokens) == (12, 1536, 4, 512)
    losses = [(point["step"], point["eval_loss"]) for point in run.loss_curve if "eval_loss" in point]
    assert [step for step, _ in losses] == [4, 8, 12]
    assert run.held_out_loss == losses[0][1]
    for step in (4, 8, 12):
        checkpoint = Run.load(folder / f"checkpoint-{step}")
        assert (checkpoint.weights_step, checkpoint.weights_tokens) == (step, step * 128)
    card = str(make_card(folder, license="mit"))
    assert "| tokens seen | 512 |" in card
    assert "those after step 4 of the run, which went on to step 12 and 1,536 tokens" in card
    assert "planned for 1,536 tokens; these weights have seen 512" in card
    # eval.json holds what is known of a model by its folder.
    assert {"weights_step": 4, "weights_tokens": 512}.items() <= find_model(folder)[1].items()

    # While the run trains on, the weights in its folder are still those of step 4.
    step = train.PowerTrainer.training_step

    def stopped(trainer, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    monkeypatch.setattr(train.PowerTrainer, "training_step", stopped)
    longer = sections(folder, tokens=2048, resume_from_checkpoint="true", **BEST)
    with pytest.raises(train.StoppedBySignalError):
        train.pretrain(Settings.from_dict(longer))
    there = Run.load(folder)
    assert (there.status, there.steps, there.weights_step, there.weights_tokens) == ("stopped", 13, 4, 512)
    assert "| tokens seen | 512 |" in str(make_card(folder, license="mit"))
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_batch_that_is_not_what_the_schedule_counts_ends_the_run(sections, tmp_path, monkeypatch):
    """No way to this is known; the record is then true, and the fault ours."""
    monkeypatch.setattr(train, "tokens_per_step", lambda settings: 256)
    with pytest.raises(RuntimeError, match="1 steps have read 128 tokens, where 256 were to be read in each"):
        train.pretrain(Settings.from_dict(sections(tmp_path / "run", lr_scheduler_kwargs={"a": 8.0})))
    there = Run.load(tmp_path / "run")
    assert (there.status, there.steps, there.tokens_seen) == ("failed", 1, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, {"optimizer": "AdamW", "betas": (0.9, 0.95), "fused": True, "mixed_precision": "no"}),
        ({"bf16": True, "adam_beta1": 0.8}, {"betas": (0.8, 0.95), "mixed_precision": "bf16"}),
        ({"optim": "sgd"}, {"optimizer": "SGD"}),
        ({"optim": "adafactor"}, {"optimizer": "Adafactor"}),
    ],
)
def test_how_a_run_computes_is_what_its_trainer_says(sections, tmp_path, given, made):
    settings = sections(tmp_path / "run", tokens=512, use_cpu=True, **given)
    if "optim" in given:
        settings["mup"] = {"mup": False}
    run = train.pretrain(Settings.from_dict(settings))
    assert made.items() <= run.computation.items()
    assert {"weights": "float32", "attention": "sdpa"}.items() <= run.computation.items()
    assert ("betas" in run.computation) == (run.computation["optimizer"] == "AdamW")


@pytest.mark.slow
def test_changes_are_on_record_and_the_steps_of_today_count(sections, tmp_path):
    trunk = {"lr_scheduler_kwargs": {"a": 8.0, "decay_ratio": 0.0}}
    train.pretrain(Settings.from_dict(sections(tmp_path / "run", tokens=1024, **trunk)))
    shutil.copytree(tmp_path / "run" / "checkpoint-8", tmp_path / "checkpoint-8")
    given = sections(tmp_path / "on", resume_from_checkpoint=str(tmp_path / "checkpoint-8"), **trunk)
    given["training"] |= {"learning_rate": 0.004, "save_steps": 1}
    train.pretrain(Settings.from_dict(given))
    assert Run.load(tmp_path / "on").changes == [
        Change(8, 1024, "tokens", 1024, 1536),
        Change(8, 1024, "learning_rate", 0.01, 0.004),
        Change(8, 1024, "save_steps", 4, 1),
    ]
    saved = {path.name for path in (tmp_path / "on").glob("checkpoint-*")}
    assert saved == {f"checkpoint-{step}" for step in (9, 10, 11, 12)}
    card = str(make_card(tmp_path / "on", license="mit"))
    assert "| 8 | `learning_rate` | 0.01 | 0.004 |" in card


def test_another_machine_or_version_is_a_change():
    before = Run(steps=8, tokens_seen=64, versions={"torch": "2.11", "python": "3.11"}, hardware={"processes": 1})
    now = Run(versions={"torch": "2.12", "python": "3.11"}, hardware={"processes": 2, "cpu_cores": 8})
    assert other_machine(now, before) == [Change(8, 64, "torch", "2.11", "2.12"), Change(8, 64, "processes", 1, 2)]
