import json

import pytest

from hf_power.checkpoints.seal import MANIFEST, seal
from hf_power.cli import run_verb


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "weights").write_bytes(b"weights")
        (folder / "run.json").write_text(json.dumps({"schema": 1, "tokens_seen": step * 100, "total_tokens": 1000}))
        seal(folder)
    return tmp_path


def test_a_broken_one_is_named_and_the_one_before_taken(run, capsys):
    (run / "checkpoint-2" / "weights").write_bytes(b"weightS")
    assert run_verb("doctor", [str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "checkpoints": [
            {"name": "checkpoint-2", "tokens": 200, "problems": ["weights has other content than when it was sealed"]},
            {"name": "checkpoint-1", "tokens": 100, "problems": []},
        ],
        "resume": "checkpoint-1",
        "remaining_tokens": 900,
    }
    assert run_verb("doctor", [str(run)]) == 0
    assert "takes checkpoint-1, 900 tokens remain to train" in capsys.readouterr().out


def test_nothing_to_resume_is_exit_code_1(run, capsys):
    for step in (1, 2):
        (run / f"checkpoint-{step}" / MANIFEST).unlink()
    assert run_verb("doctor", [str(run)]) == 1
    assert "nothing can be resumed" in capsys.readouterr().out


def test_no_such_folder(tmp_path, capsys):
    assert run_verb("doctor", [str(tmp_path / "none")]) == 2
    assert "there is no run folder at" in capsys.readouterr().err


def test_a_part_that_was_never_sealed_is_named(run, capsys):
    """Of a run of hf_power; a stock Trainer's checkpoint has other parts."""
    (run / "run.json").write_text("{}")
    assert run_verb("doctor", [str(run), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["resume"] is None
    assert "no optimizer is in it" in found["checkpoints"][0]["problems"]
    assert "no scheduler.pt is in it" in found["checkpoints"][0]["problems"]
