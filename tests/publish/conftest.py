"""One trunk and its tail, trained once for all tests of cards and pushes."""

import shutil
from pathlib import Path

import pytest

from hf_power.pretrain.anneal import anneal
from hf_power.pretrain.run import pretrain
from hf_power.publish import remote
from hf_power.settings.settings import Settings


@pytest.fixture(scope="session")
def licensed(sections):
    """Sections of a trunk of 12 steps with a licence."""

    def build(folder, **training):
        law = {"a": 2.0, "b": -0.5, "batch_exponent": 0.7, "decay_ratio": 0}
        made = sections(folder, lr_scheduler_kwargs=law, **training)
        made["run"]["license"] = "apache-2.0"
        return made

    return build


@pytest.fixture(scope="session")
def runs(licensed, tmp_path_factory):
    """A folder with a trunk, which has checkpoints at 4, 8 and 12, and with the model annealed from the second one."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain(Settings.from_dict(licensed(folder / "trunk")))
    anneal(folder / "trunk" / "checkpoint-8", tokens="50%", output_dir=str(folder / "annealed"))
    return folder


@pytest.fixture
def trunk(runs, tmp_path):
    return Path(shutil.copytree(runs / "trunk", tmp_path / "trunk"))


@pytest.fixture
def few_attempts(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0,))
