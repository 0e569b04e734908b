"""What the tests of processes share: how they start and wait, a free port, and who shares a batch under which parallelism."""

import os
import socket
import subprocess
import time

import pytest
from warm import ROOT, python

SHARED_BATCHES = pytest.mark.parametrize(
    ("sizes", "data_parallel"),
    [
        ({}, 8),
        ({"tp_size": 2, "dp_shard_size": 4}, 4),
        ({"cp_size": 4, "dp_shard_size": 2}, 2),
        ({"sp_size": 2, "dp_shard_size": 4}, 4),
        ({"tp_size": 2, "cp_size": 2, "dp_shard_size": 2}, 2),
        ({"tp_size": 2, "sp_size": 4}, 1),
        ({"dp_replicate_size": 2, "dp_shard_size": 4}, 8),
    ],
)


# Seconds that a test waits for another process. It only ends a test that hangs: a busy machine takes ten times as long.
PATIENCE = 600


def until(happened):
    """Wait until something is so, such as a file that appears."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def said_by(*arguments, fails=False, stock=False, **environment):
    """What Python says with these arguments, with its imports done, in the folder of the project.

    `fails` says that it must end with an error, `stock` that hf_power is not imported yet.
    """
    base = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python(stock), *(str(part) for part in arguments)]
    streams = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    out = subprocess.run(command, **streams, cwd=ROOT, timeout=PATIENCE, env=base | environment, check=False)
    assert (out.returncode != 0) == fails, out.stdout[-3000:] + out.stderr[-3000:]
    return out.stdout + out.stderr


def torchrun(*command, processes=2, fails=False, **environment):
    """What so many processes on CPUs say under torchrun; its --standalone would cost a second."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", processes, "--master_port", free_port()]
    return said_by(*launcher, *command, fails=fails, **{"ACCELERATE_USE_CPU": "true", **environment})


_HELD = []  # the sockets of the ports that were given out


def free_port():
    """A port that nobody else is given while this process lives, for those who listen with SO_REUSEADDR, as torch does.

    A port that was only found free may be somebody else's before its user listens there. So it stays bound, and a socket that
    does not listen is in nobody's way who allows the reuse of addresses.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _HELD.append(held)
    return held.getsockname()[1]
