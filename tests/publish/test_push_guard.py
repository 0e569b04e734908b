import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from hub import hub_environment
from processes import until
from sentences import refused
from warm import python

from hf_power.cli import run_verb
from hf_power.pretrain import run as train
from hf_power.publish.push import publish, refuse_sharded

pytestmark = pytest.mark.usefixtures("few_attempts")

STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")
CHECKPOINTS = (4, 8, 12)
BRANCHES = ("trunk-512-tokens", "trunk-1.024k-tokens", "trunk-1.536k-tokens")


@pytest.fixture
def pushing(licensed, tmp_path):
    """The settings file of a run of 12 steps that pushes; `pushing(strategy)` writes it and returns it and its folder."""

    def build(strategy="all_checkpoints", repo="tester/run", **training):
        folder = tmp_path / "runs" / "run"
        settings = licensed(folder, **training)
        settings["training"] |= {"push_to_hub": True, "hub_model_id": repo, "hub_strategy": strategy}
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path, folder

    return build


@pytest.fixture
def unpushed(runs):
    """The same run without a push."""
    return runs / "trunk"


def same_training(folder, unpushed):
    """Weights and optimizer of run and checkpoints are those of a run that never heard of a Hub."""
    weights = [f"{name}/model.safetensors" for name in (".", *(f"checkpoint-{step}" for step in CHECKPOINTS))]
    assert all((folder / name).read_bytes() == (unpushed / name).read_bytes() for name in weights)
    here, there = (json.loads((f / "run.json").read_text())["loss_curve"] for f in (folder, unpushed))
    assert [point.get("loss") for point in here] == [point.get("loss") for point in there]
    for step in CHECKPOINTS:
        states = [torch.load(f / f"checkpoint-{step}" / "optimizer.pt") for f in (folder, unpushed)]
        assert all(
            torch.equal(a["exp_avg"], b["exp_avg"])
            for a, b in zip(states[0]["state"].values(), states[1]["state"].values(), strict=True)
        )


def branches(hub):
    return set(hub.repos["tester/run"].branches) - {"main"} if "tester/run" in hub.repos else set()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_pushes_what_it_says(hub, pushing, unpushed, strategy, capsys):
    path, folder = pushing(strategy)
    assert run_verb("pretrain", [str(path), "--hub_token", hub.token]) == 0
    said = capsys.readouterr()
    assert "complete; names, sizes and hashes checked" in said.out
    assert hub.token not in said.out + said.err
    assert not [p for p in folder.rglob("*") if p.is_file() and hub.token.encode() in p.read_bytes()]
    same_training(folder, unpushed)
    main = hub.files("tester/run")
    assert main["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert main["lr_and_loss.png"] == (folder / "lr_and_loss.png").read_bytes()
    assert json.loads(main["run.json"])["status"] == "finished"
    assert b"license: apache-2.0" in main["README.md"]
    assert b"fine-tuned" not in main["README.md"]
    assert ("last-checkpoint/optimizer.pt" in main) == (strategy == "checkpoint")
    assert branches(hub) == (set(BRANCHES) if strategy == "all_checkpoints" else set())
    commits = [call for call in hub.log if "/commit/main" in call.path]
    assert len(commits) == 1 if strategy == "end" else len(commits) >= 1
    assert not list((folder / ".push").iterdir())
    if strategy == "all_checkpoints":  # an annealed model goes to main of its trunk
        tail = ["--from", str(folder / "checkpoint-8"), "--tokens", "512", "--repo", "tester/run"]
        assert run_verb("anneal", tail) == 0
        annealed = folder.with_name("run-anneal-8")
        assert hub.files("tester/run")["model.safetensors"] == (annealed / "model.safetensors").read_bytes()
        assert json.loads(hub.files("tester/run")["run.json"])["parent"] == "run/checkpoint-8"
        assert branches(hub) == set(BRANCHES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "fault"),
    [
        *(("start", fault) for fault in ("down", "401", "404")),
        *(("middle", fault) for fault in ("down", "401", "500", "slow", "cut", "truncate", "quota")),
        *(("end", fault) for fault in ("down", "truncate")),
    ],
)
def test_a_run_under_each_fault(hub, pushing, unpushed, monkeypatch, capsys, fault, when):
    """Complete and verified, or told with exit code 3 and completed by `hf-power publish`; the training is the same."""
    path, folder = pushing()

    def strike():
        if fault == "down":
            hub.down()
        else:
            place = "/commit/|lfs" if fault in ("401", "404", "500") and when != "start" else None
            hub.fault(fault, match=place, **({"seconds": 4} if fault == "slow" else {}))

    steps = {"middle": 6, "end": 12}
    original = train.PowerTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step + 1 == steps.get(when):
            strike()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train.PowerTrainer, "training_step", step)
    if when == "start":
        strike()
    code = run_verb("pretrain", [str(path)])
    said = capsys.readouterr().err
    if when == "start" and fault in ("401", "404"):  # a user's mistake, told before the training
        assert code == 2
        assert not (folder / "checkpoint-4").exists()
        return
    same_training(folder, unpushed)
    hub.up() if fault == "down" else hub.clear()
    if fault == "slow":
        assert code == 0
    else:
        assert code == 3
        assert "NOT complete; the model is safe in" in said
        assert f"hf-power publish {folder}" in said
        assert hub.token not in said
        assert run_verb("publish", [str(folder)]) == 0
    assert branches(hub) == set(BRANCHES)
    assert hub.files("tester/run")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    for step_, branch in zip(CHECKPOINTS, BRANCHES, strict=True):
        there = hub.files("tester/run", branch)["optimizer.pt"]
        assert there == (folder / f"checkpoint-{step_}" / "optimizer.pt").read_bytes()


@pytest.mark.slow
def test_a_hub_that_comes_back_is_used_without_being_asked(hub, pushing, monkeypatch):
    path, _ = pushing()
    hub.down()
    original = train.PowerTrainer.training_step

    def step(self, *args, **kwargs):
        if self.state.global_step == 6:
            hub.up()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(train.PowerTrainer, "training_step", step)
    assert run_verb("pretrain", [str(path)]) == 0
    assert len(branches(hub)) == 3


@pytest.mark.slow
def test_hub_revision_is_where_the_model_goes(hub, pushing):
    path, folder = pushing("end", hub_revision="dev")
    hub.down()
    assert run_verb("pretrain", [str(path)]) == 3
    hub.up()
    assert run_verb("publish", [str(folder)]) == 0
    assert hub.files("tester/run", "dev")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert set(hub.files("tester/run")) == {".gitattributes"}


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_staged_is_told_and_stops_nothing(hub, pushing, unpushed, monkeypatch, capsys):
    """A disk that is full for a while; once there is room, `hf-power publish` does what is left."""
    path, folder = pushing()
    original = os.link

    def link(source, target):
        if "checkpoint-8" in str(source):
            raise OSError(28, "No space left on device")
        original(source, target)

    def no_copy(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(shutil, "copy2", no_copy)
    assert run_verb("pretrain", [str(path)]) == 3
    said = capsys.readouterr().err
    assert "push: checkpoint-8 could not be staged" in said
    assert "NOT complete; the model is safe in" in said
    same_training(folder, unpushed)
    monkeypatch.setattr(os, "link", original)
    assert run_verb("publish", [str(folder)]) == 0
    assert len(branches(hub)) == 3
    assert not [p for p in (folder / ".push").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_rotation_takes_nothing_away_before_it_is_uploaded(hub, pushing, unpushed):
    path, folder = pushing(save_total_limit=1)
    hub.down()
    assert run_verb("pretrain", [str(path)]) == 3
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}  # never below two
    hub.up()
    assert run_verb("publish", [str(folder)]) == 0
    for step, branch in zip(CHECKPOINTS, BRANCHES, strict=True):
        there = hub.files("tester/run", branch)["model.safetensors"]
        assert there == (unpushed / f"checkpoint-{step}" / "model.safetensors").read_bytes()


def test_mistakes_are_told_before_the_training(hub, pushing, capsys, monkeypatch):
    def told(*parts, **arguments):
        path, folder = pushing(**{k: v for k, v in arguments.items() if k != "flags"})
        assert run_verb("pretrain", [str(path), *arguments.get("flags", [])]) == 2
        said = capsys.readouterr().err
        assert all(part in said for part in parts), said
        assert not folder.exists() or not list(folder.iterdir())

    told("cannot be the name of a repository", repo="a/b/c")
    told("403", repo="stranger/run")
    hub.add_repo("tester/else", {"README.md": b"---\nlicense: mit\n---\n"})
    told("holds something else already", repo="tester/else")
    told("the licence of the model is missing", "--license", flags=["--license", ""])
    told("license must be an identifier of the Hub", flags=["--license", "Apache 2"])
    monkeypatch.delenv("HF_TOKEN")
    told("there is no token for the Hub", "hf auth login")


def test_sharded_fsdp_is_refused():
    refuse_sharded(None)
    refuse_sharded(FullyShardedDataParallelPlugin(state_dict_type="FULL_STATE_DICT"))
    with refused(ValueError, "push_to_hub needs whole weights", "SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        refuse_sharded(FullyShardedDataParallelPlugin(state_dict_type="SHARDED_STATE_DICT"))


@pytest.mark.slow
def test_killed_in_mid_push_and_completed(hub, pushing, tmp_path):
    """The process dies while the second checkpoint is on its way; what was staged goes up later."""
    path, folder = pushing(save_total_limit=1)
    hub.fault("slow", match="^PUT ", seconds=60, after=2)
    code = "import sys; from hf_power.cli import run_verb; sys.exit(run_verb('pretrain'))"
    environment = hub_environment(hub, tmp_path / "home")
    command = [python(), "-c", code, str(path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        until(
            lambda: ((folder / "checkpoint-12").exists() and list((folder / ".push").glob("main@12"))) or process.poll()
        )
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()  # Its output ends when the run is gone.
    hub.clear()
    shutil.rmtree(folder / "checkpoint-12")  # even so
    assert publish(folder, "tester/run", license="apache-2.0").complete
    assert len(branches(hub)) == 3
    assert "optimizer.pt" in hub.files("tester/run", "trunk-512-tokens")
    assert Path(folder / "push.json").exists()
