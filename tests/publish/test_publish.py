import json
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download
from sentences import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_power.checkpoints.seal import problems
from hf_power.pretrain.anneal import anneal
from hf_power.publish.card import make_card
from hf_power.publish.publisher import Publisher, PushOptions, staged_in
from hf_power.publish.push import publish

pytestmark = pytest.mark.usefixtures("few_attempts")

BRANCHES = {
    "trunk-512-tokens": "checkpoint-4",
    "trunk-1.024k-tokens": "checkpoint-8",
    "trunk-1.536k-tokens": "checkpoint-12",
}


@pytest.fixture
def annealed(runs, tmp_path):
    return Path(shutil.copytree(runs / "annealed", tmp_path / "annealed"))


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "push.json"
    }


def logits(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=8, do_sample=False)


@pytest.mark.slow
def test_model_on_main_checkpoints_on_branches(hub, trunk):
    before = contents(trunk)
    state = publish(trunk, "tester/run", checkpoints="all")
    assert state.complete
    assert {name: entry.status for name, entry in state.targets.items()} == dict.fromkeys(
        ["main", *BRANCHES], "verified"
    )
    assert contents(trunk) == before  # the run folder is as it was, and nothing waits in it
    main = hub.files("tester/run")
    assert set(main) == {
        *(".gitattributes", "README.md", "config.json", "generation_config.json", "lr_and_loss.png"),
        *("model.safetensors", "run.json", "tokenizer.json", "tokenizer_config.json"),
    }
    for name in ("config.json", "model.safetensors", "tokenizer.json", "lr_and_loss.png"):
        assert main[name] == before[name]
    for branch, checkpoint in BRANCHES.items():
        files = hub.files("tester/run", branch)
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert files[name] == before[f"{checkpoint}/{name}"]
        assert json.loads(files["run.json"])["steps"] == int(checkpoint.split("-")[1])


@pytest.mark.slow
def test_round_trip_from_a_fresh_cache(hub, annealed):
    publish(annealed, "tester/run")
    folder = snapshot_download("tester/run")
    for here, there in zip(logits(annealed), logits(folder), strict=True):
        assert torch.equal(here, there)
    for here, there in zip(logits(annealed), logits("tester/run"), strict=True):
        assert torch.equal(here, there)


@pytest.mark.slow
def test_a_branch_is_a_checkpoint_to_be_annealed(hub, trunk, runs, corpus, tmp_path):
    publish(trunk, "tester/run", checkpoints="all")
    folder = Path(snapshot_download("tester/run", revision="trunk-1.024k-tokens", local_dir=tmp_path / "checkpoint-8"))
    shutil.rmtree(folder / ".cache")
    assert problems(folder) == []
    again = anneal(folder, "50%", output_dir=str(tmp_path / "again"), dataset=str(corpus))
    assert again.held_out_loss == json.loads((runs / "annealed" / "run.json").read_text())["held_out_loss"]


@pytest.mark.slow
def test_twice_sends_nothing(hub, trunk):
    publish(trunk, "tester/run", checkpoints="all")
    sent, calls = hub.uploaded_bytes, len(hub.log)
    assert publish(trunk).complete  # repository and checkpoints from push.json
    assert hub.uploaded_bytes == sent
    assert not [call for call in hub.log[calls:] if call.method in ("PUT", "DELETE") or "/commit/" in call.path]


@pytest.mark.slow
def test_another_repository_starts_anew(hub, trunk):
    publish(trunk, "tester/run", checkpoints="all")
    state = publish(trunk, "tester/other", checkpoints="none")
    assert (state.complete, list(state.targets)) == (True, ["main"])
    assert hub.files("tester/other").keys() == hub.files("tester/run").keys()


@pytest.mark.slow
def test_last_checkpoint_on_main(hub, trunk):
    publish(trunk, "tester/run", checkpoints="last")
    main = hub.files("tester/run")
    assert main["last-checkpoint/optimizer.pt"] == (trunk / "checkpoint-12" / "optimizer.pt").read_bytes()
    publish(trunk, "tester/run", checkpoints="none")
    assert not [name for name in hub.files("tester/run") if name.startswith("last-checkpoint/")]


@pytest.mark.slow
def test_an_annealed_model_replaces_its_trunk_and_not_the_other_way(hub, trunk, annealed):
    publish(trunk, "tester/run")
    publish(annealed, "tester/run")
    weights = (annealed / "model.safetensors").read_bytes()
    assert hub.files("tester/run")["model.safetensors"] == weights
    state = publish(trunk, "tester/run", checkpoints="all")
    assert state.complete
    assert state.targets["main"].status == "kept"
    assert hub.files("tester/run")["model.safetensors"] == weights
    publish(trunk, "tester/run", overwrite=True)
    assert hub.files("tester/run")["model.safetensors"] == (trunk / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_nothing_of_this_machine_goes_up(hub, runs, trunk):
    publish(trunk, "tester/run", checkpoints="all")
    files = [item for revision in ("main", *BRANCHES) for item in hub.files("tester/run", revision).items()]
    everything = b"".join(data for _, data in files)
    for secret in (str(runs), str(trunk), "data_cache_dir", hub.token):
        assert secret.encode() not in everything
    host = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    assert not [name for name, data in files if name.endswith((".json", ".md")) and host.search(data.decode())]
    assert b"corpus.jsonl" in everything
    assert hub.token not in (trunk / "push.json").read_text()


@pytest.mark.slow
def test_card_is_the_last_readme_and_is_made_of_what_is_there(hub, trunk):
    (trunk / "README.md").write_text("a fine-tuned version of nothing")
    publish(trunk, "tester/run")
    folder = snapshot_download("tester/run")
    text = (Path(folder) / "README.md").read_text()
    (Path(folder) / "README.md").unlink()
    assert text == str(make_card(folder, repo_id="tester/run"))
    assert ModelCard(text).data.license == "apache-2.0"


def test_a_checkpoint_folder_is_published_as_a_model(hub, trunk):
    publish(trunk / "checkpoint-8", "tester/early")
    main = hub.files("tester/early")
    assert main["model.safetensors"] == (trunk / "checkpoint-8" / "model.safetensors").read_bytes()
    assert "optimizer.pt" not in main


@pytest.mark.parametrize(
    "fault",
    [
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("500", "503", "slow", "cut", "truncate", "quota")),
        "down",
        "later",
    ],
)
def test_under_each_fault_whole_or_told_and_completed_later(hub, trunk, fault):
    before = contents(trunk)
    if fault == "down":
        hub.down()
    elif fault == "later":  # the second large file of four
        hub.fault("quota", after=1)
    else:
        hub.fault(fault, **({"seconds": 4} if fault == "slow" else {}))
    state = publish(trunk, "tester/run", checkpoints="all")
    assert state.complete == (fault == "slow")
    if fault != "slow":
        failed = [entry for entry in state.targets.values() if entry.status == "failed"]
        assert failed
        assert all(entry.error for entry in failed)
    hub.up() if fault == "down" else hub.clear()
    assert {name: data for name, data in contents(trunk).items() if not name.startswith(".push/")} == before
    sent = hub.uploaded_bytes
    assert publish(trunk).complete
    assert contents(trunk) == before
    assert not (trunk / ".push").exists() or not list((trunk / ".push").iterdir())
    large = sum(len(before[f"{folder}optimizer.pt"]) for folder in ("checkpoint-4/", "checkpoint-8/", "checkpoint-12/"))
    if fault == "later":  # what had arrived is not sent again
        assert hub.uploaded_bytes - sent < sent + large
    for branch, checkpoint in BRANCHES.items():
        assert hub.files("tester/run", branch)["optimizer.pt"] == before[f"{checkpoint}/optimizer.pt"]
    assert hub.files("tester/run")["model.safetensors"] == before["model.safetensors"]


def test_what_is_still_being_staged_is_not_pushed(trunk):
    for name in (".main@8", "main@12", "trunk-900-tokens@8", "trunk-90-tokens@4"):
        (trunk / ".push" / name).mkdir(parents=True)
    assert [p.name for p in staged_in(trunk)] == ["trunk-90-tokens@4", "trunk-900-tokens@8", "main@12"]


def test_a_newer_model_waits_for_the_one_of_the_same_step_that_is_on_its_way(hub, trunk):
    """The last save and the end of a run stage the same revision and step, the end with a picture more."""
    picture = trunk / "lr_and_loss.png"
    picture.rename(trunk.parent / picture.name)
    publisher = Publisher(trunk, PushOptions("tester/run", lineage="x", license="mit"))
    publisher.stage_run()
    hub.fault("slow", match="^PUT ", seconds=100)  # half a second, see the fixture
    thread = threading.Thread(target=publisher.push_all)
    thread.start()
    while not hub.seen("/preupload/"):
        threading.Event().wait(0.01)
    (trunk.parent / picture.name).rename(picture)
    publisher.stage_run()
    thread.join()
    assert publisher.push_all().complete
    assert hub.files("tester/run")["lr_and_loss.png"] == picture.read_bytes()
    assert len(hub.seen("/commit/")) == 2


def test_a_damaged_upload_is_sent_again_by_itself(hub, trunk):
    hub.fault("truncate", times=1)
    assert publish(trunk, "tester/run").complete
    assert hub.files("tester/run")["model.safetensors"] == (trunk / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_bad_input_before_anything_is_sent(hub, trunk, tmp_path, monkeypatch):
    def pushes_nothing(*parts, error=ValueError, **kwargs):
        arguments = {"folder": trunk, "repo_id": "tester/run", **kwargs}
        with refused(error, *parts):
            publish(**arguments)
        assert not [call for call in hub.log if call.method == "PUT" or "/commit/" in call.path]
        assert not (trunk / ".push").exists() or not list((trunk / ".push").iterdir())

    pushes_nothing("there is no folder", error=FileNotFoundError, folder=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    pushes_nothing("is no run", "run.json", folder=tmp_path / "empty")
    pushes_nothing("--repo", repo_id=None)
    pushes_nothing("'a/b/c' cannot be the name of a repository", repo_id="a/b/c")
    pushes_nothing("checkpoints must be one of none, last, all", checkpoints="some")
    pushes_nothing("rights", "403", repo_id="stranger/run")
    hub.add_repo("tester/else", {"README.md": b"---\nlicense: mit\n---\n"})
    pushes_nothing("holds something else already", "--overwrite", repo_id="tester/else")
    (trunk / "checkpoint-8" / "optimizer.pt").write_bytes(b"half")
    pushes_nothing("checkpoint-8 cannot be published", "optimizer.pt has 4 bytes", checkpoints="all")
    pushes_nothing("checkpoint-8 cannot be published", "optimizer.pt has 4 bytes", folder=trunk / "checkpoint-8")
    (trunk / "model.safetensors").unlink()
    pushes_nothing("has no finished model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    pushes_nothing("401", folder=trunk / "checkpoint-4")
    monkeypatch.delenv("HF_TOKEN")
    pushes_nothing("there is no token", "hf auth login", folder=trunk / "checkpoint-4")


def test_missing_licence(hub, trunk):
    run = json.loads((trunk / "run.json").read_text())
    del run["settings"]["run"]["license"]
    (trunk / "run.json").write_text(json.dumps(run))
    with refused(ValueError, "licen", "--license"):
        publish(trunk, "tester/run")
    assert publish(trunk, "tester/run", license="mit").license == "mit"
    assert HfApi().model_info("tester/run").card_data.license == "mit"
