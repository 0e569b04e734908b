"""What a machine does to a run: a clock that jumps, text that vanishes, a disk that turns read-only."""

import datetime
import json
import os
import shutil
import subprocess
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_power import SealCheckpoints
from hf_power.checkpoints import callback
from hf_power.checkpoints.seal import checkpoints, newest_intact, problems
from hf_power.cli import run_verb
from hf_power.pretrain import run as train
from hf_power.settings.settings import Settings


def equal(one, other):
    mine, undisturbed = (load_file(folder / "model.safetensors") for folder in (one, other))
    return mine.keys() == undisturbed.keys() and all(torch.equal(mine[name], undisturbed[name]) for name in mine)


def at_step(monkeypatch, step, action):
    plain, done = train.PowerTrainer.training_step, []

    def late(trainer, *args):
        if trainer.state.global_step == step and not done:
            done.append(action())
        return plain(trainer, *args)

    monkeypatch.setattr(train.PowerTrainer, "training_step", late)


@pytest.mark.slow
@pytest.mark.parametrize("jump", [-86400.0, 10 * 365 * 86400.0])
def test_a_clock_that_jumps(whole, sections, tmp_path, monkeypatch, jump):
    """A day back, ten years ahead, in the middle of a run."""
    real, offset = time.time, [0.0]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(time.time(), tz)

    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    monkeypatch.setattr(datetime, "datetime", Clock)
    at_step(monkeypatch, 6, lambda: offset.__setitem__(0, jump))
    started = time.monotonic()
    run = train.pretrain(Settings.from_dict(sections(tmp_path / "run"))).to_json()
    took = time.monotonic() - started
    assert equal(tmp_path / "run", whole)
    assert 0 < run["train_seconds"] < took
    speeds = [point["tokens_per_second"] for point in run["loss_curve"] if "tokens_per_second" in point]
    assert len(speeds) == 12
    assert all(run["tokens_seen"] / took < speed < 1e7 for speed in speeds)
    assert newest_intact(tmp_path / "run")[0].name == "checkpoint-12"


def stock(folder, callbacks=()):
    """A stock Trainer of four steps, saved at each, that keeps two; from the second on the clock is a day behind."""
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 4
    args = TrainingArguments(
        str(folder), max_steps=4, save_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_total_limit=2
    )  # fmt: skip

    class Behind(Trainer):
        def training_step(self, *args):
            if self.state.global_step == 2:
                now = time.time()
                for ahead, path in enumerate(reversed(checkpoints(folder))):
                    os.utime(path, (now + 86400 + ahead, now + 86400 + ahead))
            return super().training_step(*args)

    Behind(LlamaForCausalLM(config), args, train_dataset=data, callbacks=list(callbacks)).train()
    return [path.name for path in checkpoints(folder)]


@pytest.mark.slow
def test_rotation_after_the_clock_was_set_back(tmp_path):
    """The stock Trainer goes by the time of the files and deletes what it has just saved."""
    assert "checkpoint-3" not in stock(tmp_path / "stock")
    assert stock(tmp_path / "ours", [SealCheckpoints()]) == ["checkpoint-4", "checkpoint-3"]


@pytest.mark.slow
def test_text_that_vanishes_under_a_run_is_still_mapped(whole, sections, corpus, tmp_path, monkeypatch, capsys):
    """The run ends as it would have; the next start says what is missing, and all is there when it is back."""
    text = tmp_path / "text.jsonl"
    shutil.copy(corpus, text)
    given = sections(tmp_path / "run", resume_from_checkpoint="true")
    given["data"] |= {"dataset": str(text), "data_cache_dir": str(tmp_path / "cache")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))

    def vanish():
        text.unlink()
        shutil.rmtree(tmp_path / "cache")

    with monkeypatch.context() as patch:
        at_step(patch, 6, vanish)
        assert run_verb("pretrain", [str(tmp_path / "run.yaml")]) == 0
    assert equal(tmp_path / "run", whole)
    longer = [str(tmp_path / "run.yaml"), "--tokens", "1792"]
    assert run_verb("pretrain", longer) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"hf-power pretrain: dataset='{text}' has no file")
    assert [problems(p) for p in checkpoints(tmp_path / "run")] == [[]] * 3
    shutil.copy(corpus, text)
    assert run_verb("pretrain", longer) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["tokens_seen"] == 1792


@pytest.mark.slow
def test_a_stream_that_breaks_off(sections, corpus, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.jsonl"
    shutil.copy(corpus, text)
    given = sections(
        tmp_path / "run", resume_from_checkpoint="true", tokens=400 * 128, logging_steps=100, save_steps=50
    )
    given["data"] |= {"dataset": str(text), "streaming": True, "num_proc": None, "eval_fraction": 0.2}
    given["data"]["tokenizer"] = str(tmp_path / "tokenizer")
    from hf_power.data.text import load_text
    from hf_power.data.tokenizer import load_tokenizer

    plain = Settings.from_dict(sections(tmp_path / "run")).data
    load_tokenizer(plain, load_text(plain)[0]).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    with monkeypatch.context() as patch:
        at_step(patch, 6, text.unlink)
        assert run_verb("pretrain", [str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(text) in said
    newest, broken = newest_intact(tmp_path / "run")
    assert not broken
    shutil.copy(corpus, text)
    assert run_verb("pretrain", [str(tmp_path / "run.yaml"), "--tokens", str((int(newest.name[11:]) + 4) * 128)]) == 0


def make_read_only(disk):
    """By a read-only view on top: the disk itself has open files."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


def test_output_that_is_read_only(sections, disk, capsys, monkeypatch):
    """Known before the data are touched."""
    (disk.parent / "run.yaml").write_text(yaml.safe_dump(sections(disk / "run")))
    monkeypatch.setattr(train, "run_data", lambda *args: 1 / 0)
    make_read_only(disk)
    assert run_verb("pretrain", [str(disk.parent / "run.yaml")]) == 2
    said = capsys.readouterr().err.strip()
    assert said == f"hf-power pretrain: {disk / 'run'} cannot be used: Read-only file system."


@pytest.mark.slow
@pytest.mark.parametrize("place", ["save", "finish"])
def test_output_that_turns_read_only(whole, sections, disk, capsys, monkeypatch, place):
    plain = callback._require_space, train._finish

    def late(run, model):
        plain[0](run, model)
        if place == "save" and (run / "checkpoint-4").exists():
            make_read_only(disk)

    def late_finish(*args):
        if place == "finish":
            make_read_only(disk)
        plain[1](*args)

    (disk.parent / "run.yaml").write_text(yaml.safe_dump(sections(disk / "run", resume_from_checkpoint="true")))
    again = [str(disk.parent / "run.yaml")]
    with monkeypatch.context() as patch:
        patch.setattr(callback, "_require_space", late)
        patch.setattr(train, "_finish", late_finish)
        assert run_verb("pretrain", again) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    newest = "checkpoint-4" if place == "save" else "checkpoint-12"
    assert said == (
        f"hf-power pretrain: the disk of {disk / 'run'} is read-only now; {newest} is intact: make it writable and go on "
        "with --resume_from_checkpoint true."
    )
    subprocess.run(["umount", disk], check=True)
    assert run_verb("pretrain", again) == 0
    assert equal(disk / "run", whole)
