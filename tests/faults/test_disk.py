"""A disk that fills up, for real: a small tmpfs, and ballast that comes between the check of its space and a write."""

import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_power.checkpoints import callback
from hf_power.checkpoints.seal import checkpoints, problems
from hf_power.cli import run_verb
from hf_power.pretrain import run as train


def fill(disk, left):
    """Ballast that leaves so many bytes, or a page less."""
    with open(disk / "ballast", "wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - left)))


def command(sections, disk, **training):
    given = sections(disk / "run", resume_from_checkpoint="true", **training)
    (disk.parent / "run.yaml").write_text(yaml.safe_dump(given))
    return lambda: run_verb("pretrain", [str(disk.parent / "run.yaml")])


def said_in(capsys):
    """The one sentence of a failed verb, and its three numbers in MB."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-power")]
    assert len(lines) == 1
    numbers = re.search(r"take\w*(?: about)? ([\d.,]+) MB, ([\d.,]+) MB are free, ([\d.,]+) MB are missing", lines[0])
    return lines[0], [float(number.replace(",", "")) for number in numbers.groups()]


def goes_on(again, disk, whole):
    (disk / "ballast").unlink()
    assert again() == 0
    mine, undisturbed = (load_file(folder / "model.safetensors") for folder in (disk / "run", whole))
    assert mine.keys() == undisturbed.keys()
    assert all(torch.equal(mine[name], undisturbed[name]) for name in mine)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0, 0.2, 0.6, 0.97])
def test_full_in_the_middle_of_a_save(whole, sections, disk, capsys, monkeypatch, share):
    """The second save finds room for a share of it: in the weights, the optimizer, the small files, the seal."""
    size = sum(p.stat().st_size for p in (whole / "checkpoint-8").rglob("*"))
    plain = callback._require_space

    def late(run, model):
        plain(run, model)
        if (run / "checkpoint-4").exists():
            fill(disk, int(share * size))

    again = command(sections, disk)
    with monkeypatch.context() as patch:
        patch.setattr(callback, "_require_space", late)
        assert again() == 2
    said, (takes, free, missing) = said_in(capsys)
    assert said.startswith(f"hf-power pretrain: the disk of {disk / 'run'} is full: a checkpoint takes ")
    assert said.endswith("checkpoint-4 is intact: free some space and go on with --resume_from_checkpoint true.")
    assert takes == pytest.approx(1.05 * size / 1e6, abs=0.06)
    assert free == pytest.approx(share * size / 1e6, abs=0.06)
    assert missing == pytest.approx(takes - free, abs=0.11)
    assert [problems(p) for p in checkpoints(disk / "run")] == [[]]
    goes_on(again, disk, whole)


@pytest.mark.slow
def test_full_before_a_save(whole, sections, disk, capsys, monkeypatch):
    """Nothing is written where the space is known to be too little."""
    plain = train.PowerTrainer.training_step

    def late(trainer, *args):
        if trainer.state.global_step == 6:
            fill(disk, 100_000)
        return plain(trainer, *args)

    again = command(sections, disk)
    with monkeypatch.context() as patch:
        patch.setattr(train.PowerTrainer, "training_step", late)
        assert again() == 2
    assert re.search(r"the disk of .* has 0.\d MB too little for the next checkpoint: free", capsys.readouterr().err)
    assert [p.name for p in checkpoints(disk / "run")] == ["checkpoint-4"]
    goes_on(again, disk, whole)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 200_000])
def test_full_when_the_finished_model_is_saved(whole, sections, disk, capsys, monkeypatch, left):
    plain = train._finish

    def late(*args):
        fill(disk, left)
        plain(*args)

    again = command(sections, disk)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_finish", late)
        assert again() == 2
    assert "checkpoint-12 is intact: free some space" in said_in(capsys)[0]
    goes_on(again, disk, whole)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 200_000])
def test_full_while_the_text_is_stored(whole, sections, corpus, disk, capsys, left):
    given = sections(disk / "run", resume_from_checkpoint="true")
    given["data"]["data_cache_dir"] = str(disk / "cache")
    (disk.parent / "run.yaml").write_text(yaml.safe_dump(given))
    fill(disk, left)
    assert run_verb("pretrain", [str(disk.parent / "run.yaml")]) == 2
    said, (takes, _, missing) = said_in(capsys)
    assert f"the disk of {disk / 'cache'} is full: text and tokens take about " in said
    assert takes == pytest.approx(3 * corpus.stat().st_size / 1e6, abs=0.06)
    assert missing == pytest.approx(takes - left / 1e6, abs=0.2)
    goes_on(lambda: run_verb("pretrain", [str(disk.parent / "run.yaml")]), disk, whole)


def test_a_sweep_goes_on_when_there_is_space_again(sections, disk, capsys):
    grid = sections(disk / "run")
    grid["training"] = {"weight_decay": 0.1}
    grid["model"]["num_attention_heads"] = 2
    grid["sweep"] = {"widths": [32], "tokens_per_step": [128], "tokens": [1280], "schedules": {"cosine": [0.01, 0.02]}}
    grid["sweep"]["max_extensions"] = 0
    del grid["run"]["tokens"]
    (disk.parent / "grid.yaml").write_text(yaml.safe_dump(grid))
    argv = [str(disk.parent / "grid.yaml"), "--output_dir", str(disk / "sweep"), "--workers", "1"]
    fill(disk, 0)
    assert run_verb("sweep", argv) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("hf-power sweep: the disk is full")
    (disk / "ballast").unlink()
    assert run_verb("sweep", argv) == 0
    assert len((disk / "sweep/sweep.jsonl").read_text().splitlines()) == 2
