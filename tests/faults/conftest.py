import subprocess

import pytest

from hf_power.pretrain import run as train
from hf_power.settings.settings import Settings


@pytest.fixture(scope="module")
def whole(sections, tmp_path_factory):
    """An undisturbed run, which also fills the cache of the data."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train.pretrain(Settings.from_dict(sections(folder)))
    return folder


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    yield folder
    while subprocess.run(["umount", "-l", folder], capture_output=True, check=False).returncode == 0:
        pass  # a test may have mounted something on top
