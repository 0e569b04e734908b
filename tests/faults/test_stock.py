"""The column "stock Trainer" of docs/faults.md: both trainers under the same fault, and what each makes of it."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from processes import torchrun, until
from safetensors import SafetensorError
from safetensors.torch import load_file
from stock import HANGS, STEPS, Poison, child, ended, pair, stock

from hf_power.checkpoints.seal import checkpoints, problems
from hf_power.pretrain import run as train
from hf_power.pretrain.bad_numbers import NonFiniteError
from hf_power.settings.settings import Settings

pytestmark = pytest.mark.elsewhere

KILL = ("kill_in_save", {"checkpoint": "checkpoint-8"})
TERMINATE = {"step": 6, "number": signal.SIGTERM}


@pytest.fixture(scope="module")
def whole(sections, tmp_path_factory):
    """A folder with two runs that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    stock(folder / "stock").train()
    train.pretrain(Settings.from_dict(sections(folder / "ours")))
    return folder


@pytest.fixture
def interrupted(whole, tmp_path):
    """The folders of both runs after ten of twelve steps, the stock one first."""
    for name in ("stock", "ours"):
        shutil.copytree(whole / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-12"))
        assert names(tmp_path / name) == ["checkpoint-8", "checkpoint-4"]
    return tmp_path / "stock", tmp_path / "ours"


@pytest.fixture
def ours_goes_on(sections, whole, capsys):
    """True if hf_power resumes a folder to the weights of the undisturbed run, bit by bit; and what it said."""

    def resume(folder):
        capsys.readouterr()
        train.pretrain(Settings.from_dict(sections(folder, resume_from_checkpoint="true")))
        mine, wanted = (load_file(run / "model.safetensors") for run in (folder, whole / "ours"))
        return all(mine[name].equal(wanted[name]) for name in wanted), capsys.readouterr().out

    return resume


@pytest.fixture
def ours(sections, tmp_path):
    """The settings file of a run of hf_power in a folder."""

    def build(folder, **training):
        path = tmp_path / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(sections(folder, **training)))
        return path

    return build


def names(folder):
    return [p.name for p in checkpoints(folder)]


def history(folder, step=STEPS, of="learning_rate"):
    """What a stock run has logged up to a checkpoint, a number a step."""
    log = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [entry[of] for entry in log if of in entry]


def optimizer_steps(folder):
    state = torch.load(folder / f"checkpoint-{STEPS}" / "optimizer.pt")["state"]
    return {int(moments["step"]) for moments in state.values()}


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_saved(ours, ours_goes_on, tmp_path):
    assert ended(child(tmp_path / "stock", KILL)) == [-signal.SIGKILL]
    assert names(tmp_path / "stock") == ["checkpoint-8", "checkpoint-4"]
    with pytest.raises(FileNotFoundError, match=r"checkpoint-8/trainer_state.json"):
        stock(tmp_path / "stock").train(resume_from_checkpoint=True)
    assert ended(child(ours(tmp_path / "ours"), KILL)) == [-signal.SIGKILL]
    same, said = ours_goes_on(tmp_path / "ours")
    assert same
    assert "checkpoint-8 is not used: manifest.json is missing" in said


@pytest.mark.slow
def test_without_a_fault_both_go_on_exactly(whole, interrupted, ours_goes_on):
    """The control of the tests below."""
    stock(interrupted[0]).train(resume_from_checkpoint=True)
    assert history(interrupted[0], of="loss") == history(whole / "stock", of="loss")
    assert optimizer_steps(interrupted[0]) == {STEPS}
    assert ours_goes_on(interrupted[1])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_a_state_that_is_gone(whole, interrupted, ours_goes_on, caplog, name):
    """Either one gone and the stock Trainer begins both anew: no moments, and the warmup once more."""
    for run in interrupted:
        (run / "checkpoint-8" / name).unlink()
    stock(interrupted[0]).train(resume_from_checkpoint=True)
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
    assert optimizer_steps(interrupted[0]) == {STEPS - 8}
    rates, wanted = history(interrupted[0]), history(whole / "stock")
    assert rates[:8] == wanted[:8]
    assert rates[8:] == wanted[:4]
    same, said = ours_goes_on(interrupted[1])
    assert same
    assert f"checkpoint-8 is not used: {name} is missing" in said


@pytest.mark.slow
def test_weights_that_are_cut(interrupted, ours_goes_on):
    for run in interrupted:
        weights = run / "checkpoint-8/model.safetensors"
        os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(SafetensorError):
        stock(interrupted[0]).train(resume_from_checkpoint=True)
    same, said = ours_goes_on(interrupted[1])
    assert same
    assert "checkpoint-8 is not used: model.safetensors has " in said


@pytest.mark.slow
def test_weights_of_which_one_byte_has_changed(whole, interrupted, ours_goes_on, caplog):
    for run in interrupted:
        weights = run / "checkpoint-8/model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 2  # of the exponent of the last weight
        weights.write_bytes(content)
    stock(interrupted[0]).train(resume_from_checkpoint=True)
    assert [record for record in caplog.records if record.levelname != "INFO"] == []
    assert history(interrupted[0], of="loss") != history(whole / "stock", of="loss")
    same, said = ours_goes_on(interrupted[1])
    assert same
    assert "checkpoint-8 is not used: model.safetensors has other content" in said


@pytest.mark.slow
def test_a_limit_of_one_checkpoint_and_a_kill_in_the_next_save(ours, ours_goes_on, tmp_path):
    """The stock Trainer deletes after it has written, so the older one is there still, but behind the half one."""
    assert ended(child(tmp_path / "stock", KILL, save_total_limit=1)) == [-signal.SIGKILL]
    assert names(tmp_path / "stock") == ["checkpoint-8", "checkpoint-4"]
    with pytest.raises(FileNotFoundError, match=r"checkpoint-8/trainer_state.json"):
        stock(tmp_path / "stock").train(resume_from_checkpoint=True)
    stock(tmp_path / "stock").train(resume_from_checkpoint=str(tmp_path / "stock/checkpoint-4"))
    assert ended(child(ours(tmp_path / "ours", save_total_limit=1), KILL)) == [-signal.SIGKILL]
    assert ours_goes_on(tmp_path / "ours")[0]


@pytest.mark.slow
def test_a_limit_of_one_checkpoint_and_damage_to_it(sections, ours_goes_on, tmp_path):
    stock(tmp_path / "stock", save_total_limit=1).train()
    train.pretrain(Settings.from_dict(sections(tmp_path / "ours", save_total_limit=1)))
    assert names(tmp_path / "stock") == ["checkpoint-12"]
    assert names(tmp_path / "ours") == ["checkpoint-12", "checkpoint-8"]
    for run in (tmp_path / "stock", tmp_path / "ours"):
        (run / "checkpoint-12" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"Can't find a valid checkpoint"):
        stock(tmp_path / "stock").train(resume_from_checkpoint=True)
    assert ours_goes_on(tmp_path / "ours")[0]


@pytest.mark.slow
def test_weights_that_are_not_finite_are_saved_by_the_stock_trainer_alone(sections, tmp_path, monkeypatch):
    stock(tmp_path / "stock", callbacks=[Poison(6)]).train()
    saved = load_file(tmp_path / "stock/checkpoint-8/model.safetensors")
    assert not all(weight.isfinite().all() for weight in saved.values())
    build = train._trainer

    def poisoned(*args):
        trainer = build(*args)
        trainer.add_callback(Poison(6))
        return trainer

    monkeypatch.setattr(train, "_trainer", poisoned)
    with pytest.raises(NonFiniteError, match=r"not finite.*go on from .*checkpoint-4 "):
        train.pretrain(Settings.from_dict(sections(tmp_path / "ours")))
    assert [problems(p) for p in checkpoints(tmp_path / "ours") if p.name == "checkpoint-4"] == [[]]
    assert not (tmp_path / "ours/checkpoint-8/model.safetensors").exists()


@pytest.mark.slow
def test_sigterm(ours, ours_goes_on, tmp_path):
    fault = ("signal_at", TERMINATE)
    assert ended(child(tmp_path / "stock", fault, save_steps=100)) == [-signal.SIGTERM]
    assert names(tmp_path / "stock") == []
    assert ended(child(ours(tmp_path / "ours", save_steps=100), fault)) == [128 + signal.SIGTERM]
    assert names(tmp_path / "ours") == ["checkpoint-7"]
    assert ours_goes_on(tmp_path / "ours")[0]


@pytest.mark.slow
def test_sigterm_with_the_option_of_the_stock_trainer(tmp_path):
    """enable_jit_checkpoint saves some seconds later and ends as if the training were finished; SIGINT it does not know."""
    given = {"save_steps": 100, "enable_jit_checkpoint": True}
    assert ended(child(tmp_path / "jit", ("signal_at", TERMINATE | {"pause": 1.0}), **given)) == [0]
    (saved,) = names(tmp_path / "jit")
    assert 7 < int(saved.split("-")[1]) < STEPS
    interrupt = ("signal_at", {"step": 6, "number": signal.SIGINT, "pause": 1.0})
    assert ended(child(tmp_path / "int", interrupt, **given)) == [1]
    assert names(tmp_path / "int") == []


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_under_torchrun(tmp_path):
    """torchrun ends the other process too; there is no checkpoint."""
    fault = ["signal_at", {**TERMINATE, "rank": "1"}]
    given = {"what": str(tmp_path / "run"), "faults": [fault], "save_steps": 100, "said": str(tmp_path / "said")}
    folder = Path(__file__).parent
    path = os.pathsep.join(str(part) for part in (folder.parent, folder.parent.parent))
    said = torchrun(folder / "stock.py", json.dumps(given), fails=True, PYTHONPATH=path)
    assert "Signal 15 (SIGTERM) received by PID" in said
    assert "5.9" in (tmp_path / "said").read_text()
    assert names(tmp_path / "run") == []


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes(ours, tmp_path):
    """With the stock Trainer's option one process saves alone, and both wait for ever."""
    given = {"save_steps": 100, "enable_jit_checkpoint": True}
    fault = ("signal_at", {"step": 2, "number": signal.SIGTERM, "rank": "1", "pause": 0.5})
    both = pair(tmp_path / "stock", fault, **given)
    until(lambda: list((tmp_path / "stock").glob("checkpoint-*/rng_state_1.pth")))
    assert ended(*both, seconds=HANGS) == [None, None]
    (half,) = checkpoints(tmp_path / "stock")
    assert [p.name for p in half.iterdir()] == ["rng_state_1.pth"]
    path = ours(tmp_path / "ours", save_steps=100, per_device_train_batch_size=2)
    fault = ("signal_at", {**TERMINATE, "rank": "1"})
    assert ended(*pair(path, fault, said=tmp_path / "said")) == [128 + signal.SIGTERM] * 2
    assert "stopped by SIGTERM after step 8" in (tmp_path / "said").read_text()
    assert names(tmp_path / "ours") == ["checkpoint-8"]
    assert problems(tmp_path / "ours/checkpoint-8") == []


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(name)`: a file system of 800 kB, which holds one checkpoint; `small_disk(name, "remount,")` enlarges it."""
    mounted = []

    def build(name, change=""):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        size = "8m" if change else "800k"
        command = ["mount", "-t", "tmpfs", "-o", f"{change}size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        mounted.append(folder)
        return folder

    yield build
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_one_checkpoint_fills(sections, small_disk, ours_goes_on):
    """Room is made after the fault: the stock Trainer cannot go on all the same, for its half checkpoint is the newest."""
    theirs, mine = small_disk("stock"), small_disk("ours")
    with pytest.raises(RuntimeError, match=r"unexpected pos"):  # not a word of the disk
        stock(theirs, hidden_size=32).train()
    assert names(theirs) == ["checkpoint-8", "checkpoint-4"]
    small_disk("stock", "remount,")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-8/trainer_state.json"):
        stock(theirs, hidden_size=32).train(resume_from_checkpoint=True)
    with pytest.raises(OSError, match=r"too little for the next checkpoint: free some space"):
        train.pretrain(Settings.from_dict(sections(mine)))
    assert names(mine) == ["checkpoint-4"]
    small_disk("ours", "remount,")
    assert ours_goes_on(mine)[0]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_another_learning_rate_at_a_resume(whole, interrupted, sections, schedule):
    folder = interrupted[0].with_name(schedule)
    stock(folder, lr_scheduler_type=schedule).train()
    wanted = history(folder)
    shutil.rmtree(folder / "checkpoint-12")
    stock(folder, lr_scheduler_type=schedule, learning_rate=0.001).train(resume_from_checkpoint=True)
    assert history(folder) == wanted
    given = sections(interrupted[1], resume_from_checkpoint="true", learning_rate=0.001)
    run = train.pretrain(Settings.from_dict(given)).to_json()
    rates = [point["learning_rate"] for point in run["loss_curve"] if "learning_rate" in point]
    assert max(rates[:8]) == pytest.approx(0.01)
    assert rates[9] == pytest.approx(0.001)


@pytest.mark.slow
def test_two_runs_in_one_folder(ours, whole, tmp_path):
    """The first waits in its sixth step until the second is over. With the stock Trainer neither learns of the other."""
    here, there, said = (tmp_path / name for name in ("here", "there", "said"))

    def both(what, **other):
        here.unlink(missing_ok=True)
        there.unlink(missing_ok=True)
        first = child(what, ("wait_at", {"step": 5, "here": here, "there": there}))
        until(here.exists)
        codes = ended(child(what, said=said, **other))
        there.touch()
        return ended(first) + codes

    assert both(tmp_path / "stock", learning_rate=0.001) == [0, 0]
    assert max(history(tmp_path / "stock", step=4)) == 0.001  # of the second
    assert history(tmp_path / "stock") == history(whole / "stock")  # of the first
    assert both(ours(tmp_path / "ours", resume_from_checkpoint="true")) == [0, 2]
    assert f"another run is at work in {tmp_path / 'ours'}" in said.read_text()
    mine, wanted = (load_file(run / "model.safetensors") for run in (tmp_path / "ours", whole / "ours"))
    assert all(mine[name].equal(wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "granitemoe", "mixtral"])
def test_a_mixture_of_experts_that_goes_on(family, tmp_path, sections):
    """Without a fault at all: the names of experts in a file are others than in the model. Step 9 is the first after it."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if family != "llama" else {}
    whole, resumed = (stock(tmp_path / name, family=family, experts=experts) for name in ("whole", "resumed"))
    whole.train()
    shutil.copytree(tmp_path / "whole/checkpoint-8", tmp_path / "resumed/checkpoint-8")
    resumed.train(resume_from_checkpoint=True)
    before, after = (
        {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log} for trainer in (whole, resumed)
    )
    assert after[8] == before[8]
    assert (after[9] == before[9]) == (family == "llama")

    made = sections(tmp_path / "ours")
    made["model"] |= {"model_type": "mixtral" if experts else "llama", **experts}
    run = train.pretrain(Settings.from_dict(made)).to_json()
    shutil.copytree(tmp_path / "ours/checkpoint-8", tmp_path / "again/checkpoint-8")
    made["training"] |= {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "true"}
    again = train.pretrain(Settings.from_dict(made)).to_json()
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("ours", "again")]
    assert weights[0] == weights[1]
    losses = [[p["loss"] for p in each["loss_curve"] if "loss" in p] for each in (run, again)]
    assert losses[0] == losses[1]
