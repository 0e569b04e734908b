import os
import subprocess
import sys

import pytest
from warm import ROOT, python

SITE = ROOT / "hf_power" / "run" / "site"

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


@pytest.mark.slow
@pytest.mark.parametrize("target", [["train.py"], ["-m", "train"], ["python", "launch.py", "train.py"]])
def test_a_script_that_does_not_know_of_us(script, target):
    """It runs as __main__, with its own arguments, and finds the modules beside it; below a command it is a process of its own."""
    (script.parent / "launch.py").write_text("import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])")
    command = [python(stock=True), "-m", "hf_power.run", *target, "--x", "1"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=script.parent)
    assert out.stdout.strip() == "__main__ ['--x', '1'] power"


@pytest.mark.slow
@pytest.mark.parametrize("argv", [[], ["missing.py"]])
def test_no_script(argv):
    out = subprocess.run([python(stock=True), "-m", "hf_power.run", *argv], capture_output=True, text=True)
    assert out.returncode == 1
    got = argv[0] if argv else "nothing"
    assert out.stderr.strip().endswith(
        f"needs a script or a command to run, got {got}: python -m hf_power.run SCRIPT.py ARGS."
    )


# Two modules of these names in the folder of the process stand for the packages, which take seconds to import.
PROGRAM = """
import importlib.util
import sys
found = importlib.util.find_spec("transformers") is not None
before = "hf_power" in sys.modules
if found:
    import transformers
print(found, before, "hf_power" in sys.modules, sys.modules["sitecustomize"].__file__)
"""


@pytest.mark.parametrize(
    ("present", "imported"),
    [({"transformers", "hf_power", "sitecustomize"}, True), ({"transformers"}, False), (set(), False)],
)
def test_a_process_below_us(tmp_path, present, imported):
    """hf_power comes with transformers and not before; what is not there is not missed; a hidden sitecustomize has its turn."""
    for name in present:
        (tmp_path / f"{name}.py").write_text("")
    # Without -I, which would hide PYTHONPATH, and without site-packages, which have both.
    command = [sys._base_executable, "-c", PROGRAM]
    paths = os.pathsep.join([str(SITE), str(tmp_path)])
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": paths}, cwd="/")
    found, before, after, site = out.stdout.split()
    assert (found, before, after) == (str("transformers" in present), "False", str(imported))
    assert "sitecustomize" not in present or site == str(tmp_path / "sitecustomize.py")
    assert not out.stderr
