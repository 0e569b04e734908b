import os
import subprocess
import sys

import pytest
import torch
from warm import python

from hf_power.records.machine import hardware, versions

CODE = """
import sys, torch
from types import SimpleNamespace
from hf_power.records.machine import tune_cpu
args = SimpleNamespace(device=torch.device("cpu"), dataloader_pin_memory=True)
print(tune_cpu(args), torch.get_num_threads(), args.dataloader_pin_memory)
before = [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")][0]
x = torch.ones(64 << 20, dtype=torch.uint8); del x
after = [int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS")][0]
print(after - before > 50_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    ("env", "threads"),
    [
        ({"OMP_NUM_THREADS": "1"}, 1),  # the user's own wish
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, os.cpu_count()),  # accelerate launch's default
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": str(os.cpu_count())}, 1),
    ],
)
def test_tune_cpu(env, threads):
    """In a process of its own: a freed block of 64 MB stays with the process, and threads are those of the cores."""
    environment = {**os.environ, **env}
    out = subprocess.run([python(), "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    first, kept = out.stdout.splitlines()
    assert first == f"{{'cpu_threads': {threads}, 'keeps_freed_memory': True}} {threads} False"
    assert kept == "True"


def test_records():
    assert versions()["torch"] == torch.__version__
    record = hardware(torch.device("cpu"), 3)
    assert (record["device"], record["processes"], record["cpu_cores"]) == ("cpu", 3, os.cpu_count())
