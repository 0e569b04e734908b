import hashlib
import json
import signal
import subprocess

import pytest
from warm import python

from hf_power.checkpoints.seal import (
    MANIFEST,
    SAVING,
    checkpoints,
    newest_intact,
    problems,
    remove_leftovers,
    rotate,
    seal,
)


@pytest.fixture
def run(tmp_path):
    for step in (9, 10, 100):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "sub").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights" * step)
        (folder / "sub" / "rng.pth").write_bytes(b"rng")
        seal(folder)
    (tmp_path / "checkpoint-last").mkdir()
    return tmp_path


def test_manifest_holds_sizes_and_hashes(run):
    files = json.loads((run / "checkpoint-9" / MANIFEST).read_text())["files"]
    expected = hashlib.sha256(b"weights" * 9).hexdigest()
    assert files == {
        "model.safetensors": {"bytes": 63, "sha256": expected},
        "sub/rng.pth": {"bytes": 3, "sha256": hashlib.sha256(b"rng").hexdigest()},
    }


def test_newest_is_by_number(run):
    assert [p.name for p in checkpoints(run)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert newest_intact(run) == (run / "checkpoint-100", {})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "model.safetensors has 5 bytes instead of 700"),
        (
            lambda f: (f / "sub" / "rng.pth").write_bytes(b"rnG"),
            "sub/rng.pth has other content than when it was sealed",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing, so its saving was not finished"),
        (lambda f: (f / MANIFEST).write_text("{"), "manifest.json cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a": 3}}'), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_it_taken(run, damage, message):
    damage(run / "checkpoint-100")
    assert problems(run / "checkpoint-100") == [message]
    assert newest_intact(run) == (run / "checkpoint-10", {"checkpoint-100": [message]})


def test_nothing_intact(run, tmp_path):
    for folder in checkpoints(run):
        (folder / MANIFEST).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"nothing to resume from in .*checkpoint-100: manifest.json is missing.*"
    ):
        newest_intact(run)


def test_rotation_leaves_two_intact_ones(run):
    (run / "checkpoint-100" / "model.safetensors").unlink()
    assert rotate(run, 1) == []  # only two are intact
    seal(run / "checkpoint-100")
    assert rotate(run, 1, keep=run / "checkpoint-9") == []
    assert rotate(run, 3) == []
    assert rotate(run, 1) == ["checkpoint-9"]


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_seal(run):
    folder = run / "checkpoint-200"
    folder.mkdir()
    for name in ("a", "b", SAVING):
        (folder / name).write_bytes(b"content")
    code = """
import sys, time
from pathlib import Path
from hf_power.checkpoints import seal as checkpoint
hash_of = checkpoint.sha256
def slow(path):
    if path.name == "b":
        print("middle", flush=True)
        time.sleep(60)
    return hash_of(path)
checkpoint.sha256 = slow
checkpoint.seal(Path(sys.argv[1]))
"""
    with subprocess.Popen([python(), "-c", code, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"middle\n"
        process.kill()
        assert process.stdout.read() == b""  # The output ends when the process is gone.
    assert process.returncode == -signal.SIGKILL
    assert newest_intact(run)[0].name == "checkpoint-100"
    assert remove_leftovers(run) == ["checkpoint-200"]
    assert not folder.exists()
