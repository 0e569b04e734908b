import subprocess

import pytest
from warm import python

pytestmark = pytest.mark.slow  # a process each

SCRIPT = """
import sys
from helper import name
from transformers import TrainingArguments
assert "hf_power" not in globals()
print(__name__, sys.argv[1:], TrainingArguments("out", lr_scheduler_type=name, report_to="none").lr_scheduler_type.value)
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helper.py").write_text('name = "power"\n')
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path / "train.py"


@pytest.mark.parametrize("module", [False, True])
def test_a_script_that_does_not_know_of_us(script, module):
    """It runs as __main__, with its own arguments, and finds the modules beside it."""
    target = ["-m", "train"] if module else [str(script)]
    command = [python(stock=True), "-m", "hf_power.run", *target, "--x", "1"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent)
    assert out.stdout.strip() == "__main__ ['--x', '1'] power"


@pytest.mark.parametrize("argv", [[], ["missing.py"]])
def test_no_script(argv):
    out = subprocess.run([python(stock=True), "-m", "hf_power.run", *argv], capture_output=True, text=True)
    assert out.returncode == 1
    got = argv[0] if argv else "nothing"
    assert out.stderr.strip().endswith(f"needs a script to run, got {got}: python -m hf_power.run SCRIPT.py ARGS.")
