"""evaluate, export, sweep and publish keep away from a folder in which something is at work, and from a second start."""

import contextlib
import os

import pytest
from sentences import refused

from hf_power.checkpoints.locate import find_model
from hf_power.checkpoints.seal import SAVING
from hf_power.data.text import DataArguments
from hf_power.evaluate.heldout import alone_at, evaluate_model
from hf_power.evaluate.tasks import Tasks, run_tasks
from hf_power.pretrain import run as train
from hf_power.publish.push import publish
from hf_power.records.files import only_one
from hf_power.settings.settings import Settings
from hf_power.sweep.run import run_sweep


@contextlib.contextmanager
def another_process_holds(folder, name=".lock"):
    """A forked process that holds a lock of a folder until the block ends."""
    (ready, tell), (over, end) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(end)
        with only_one(folder, name):
            os.write(tell, b".")
            os.read(over, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield
    finally:
        os.close(end)
        os.waitpid(pid, 0)
        for descriptor in (ready, tell, over):
            os.close(descriptor)


# None of them comes to look at the grid, which is None, or at the model, which is not there.
VERBS = {
    "evaluate": lambda folder: evaluate_model(folder, DataArguments()),
    "evaluate --tasks": lambda folder: run_tasks(folder, Tasks("paper")),
    "export": find_model,
    "sweep": lambda folder: run_sweep(None, folder),
    "publish": lambda folder: publish(folder, "user/name"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_folder_in_which_a_training_is_at_work(tmp_path, verb):
    (tmp_path / "kept").touch()  # A lock takes an empty folder with it.
    with another_process_holds(tmp_path), refused(ValueError, "another run is at work in", tmp_path.name, "wait for"):
        verb(tmp_path)
    with only_one(tmp_path), refused(ValueError, "another run is at work in", tmp_path.name, "wait for its end"):
        verb(tmp_path)  # The same process: a thread of a notebook.
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_checkpoint_of_a_run_that_is_at_work_may_be_scored(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    with another_process_holds(tmp_path), refused(ValueError, "checkpoint-4 is no model"):
        find_model(tmp_path / "checkpoint-4")


def test_a_checkpoint_that_is_being_saved(tmp_path):
    (tmp_path / SAVING).touch()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"half")
    with refused(ValueError, "the saving of the checkpoint", "was not finished: wait for it, or take an earlier one"):
        find_model(tmp_path)


def test_two_evaluations_that_write_one_file(tmp_path):
    path = tmp_path / "eval.json"
    with another_process_holds(tmp_path, ".lock-eval.json"):
        with refused(ValueError, "another run is at work in"), alone_at(path, True):
            pass
        with alone_at(path, False), alone_at(tmp_path / "other.json", True):
            pass


@pytest.mark.parametrize("name", [".lock-0", ".lock-eval.json"])
def test_a_training_keeps_away_from_a_sweep_and_an_evaluation(sections, tmp_path, name):
    (tmp_path / "kept").touch()  # A lock takes an empty folder with it.
    with (
        another_process_holds(tmp_path, name),
        refused(ValueError, "another run is at work in", "another --output_dir"),
    ):
        train.pretrain(Settings.from_dict(sections(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("verb", ["evaluate", "evaluate --tasks", "sweep", "publish"])
def test_processes_that_take_themselves_for_the_only_one(tmp_path, monkeypatch, verb):
    (tmp_path / "kept").touch()  # A lock takes an empty folder with it.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ValueError, "launcher has started 2 processes"):
        VERBS[verb](tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
