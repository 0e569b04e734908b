import subprocess

import pytest


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
