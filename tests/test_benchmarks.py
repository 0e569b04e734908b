"""The benchmark for an accelerator runs where there is none, and its two loops do the same work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accelerator.py"


@pytest.mark.slow
def test_dry_run_of_the_accelerator_benchmark():
    command = [sys.executable, SCRIPT, "--dry_run", "--rounds", "1", "--steps", "2", "--warmup", "1"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert out.returncode == 0, out.stderr[-3000:]
    rows = [ast.literal_eval(line) for line in out.stdout.splitlines() if line.startswith("{")]
    for shape, legs in {"dense": 3, "moe": 4}.items():
        losses = {row["leg"]: row["loss"] for row in rows if row["shape"] == shape}
        assert len(losses) == legs
        assert losses["ours"] == pytest.approx(losses["by_hand"], abs=1e-5)
    assert sum(line.startswith("| ") for line in out.stdout.splitlines()) == 8


@pytest.mark.slow
def test_without_a_device_the_accelerator_benchmark_says_so():
    out = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=100)
    assert out.returncode == 1
    assert out.stderr.strip().endswith("there is no CUDA device here: pass --dry_run to try the script on a CPU.")
