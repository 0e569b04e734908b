import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_power import SealCheckpoints
from hf_power.checkpoints.seal import MANIFEST, SAVING, checkpoints, problems


@pytest.fixture
def train(tmp_path):
    """A stock Trainer of eight steps, saved every two."""

    def build(**given):
        config = LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8
        args = TrainingArguments(
            str(tmp_path), max_steps=8, save_steps=2, per_device_train_batch_size=1, report_to=[], use_cpu=True, **given
        )
        return Trainer(LlamaForCausalLM(config), args, train_dataset=data, callbacks=[SealCheckpoints()])

    return build


@pytest.mark.slow
def test_the_stock_trainer_seals_and_never_keeps_less_than_two(train, tmp_path):
    trainer = train(save_total_limit=1)
    trainer.train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-6"]
    assert [problems(p) for p in checkpoints(tmp_path)] == [[], []]
    assert not list(tmp_path.rglob(SAVING))
    assert trainer.args.save_total_limit == 1


def test_leftovers_of_a_killed_save_go_and_nothing_else(train, tmp_path):
    for step, names in ((50, [SAVING, "a"]), (60, ["a"]), (70, [MANIFEST, "a"])):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in names:
            (tmp_path / f"checkpoint-{step}" / name).touch()
    train().train()
    assert {p.name for p in checkpoints(tmp_path)} >= {"checkpoint-60", "checkpoint-70"}
    assert not (tmp_path / "checkpoint-50").exists()


def test_another_process_may_make_the_folder_a_moment_before(train, tmp_path, monkeypatch):
    plain = Path.mkdir

    def mkdir(self, *args, **kwargs):
        if self.name.startswith("checkpoint-"):
            plain(self, parents=True, exist_ok=True)
        plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    train().train()
    assert [problems(p) for p in checkpoints(tmp_path)] == [[]] * 4
    assert not list(tmp_path.rglob(SAVING))


def test_a_full_disk_stops_the_run_before_it_writes(train, tmp_path, monkeypatch):
    usage = iter([10**12, 0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=next(usage)))
    with pytest.raises(OSError, match=r"the disk of .* has .* MB too little for the next checkpoint: free some space"):
        train().train()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert problems(tmp_path / "checkpoint-2") == []
