"""The machine under a run: what makes its CPU fast, and what run.json says of it."""

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from hf_power.records.errors import UserError
from hf_power.records.run import Hardware
from hf_power.version import __version__

if TYPE_CHECKING:
    from transformers import TrainingArguments


def tune_cpu(args: "TrainingArguments") -> dict[str, int]:
    """Make training on a CPU faster, and say what is in force: cpu_threads, and whether malloc keeps_freed_memory."""
    kept = False
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
        # accelerate launch sets one thread for a process that was given all cores.
        if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        kept = keep_freed_memory()
    return {"cpu_threads": torch.get_num_threads(), "keeps_freed_memory": kept}


def refuse_alone(processes: int) -> None:
    """Raise a UserError for a launch of several processes of which each knows of itself alone, `processes` being 1."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and processes == 1:
        raise UserError(
            f"the launcher has started {started} processes, and each takes itself for the only one: set "
            "ACCELERATE_USE_CPU=true where there is no accelerator."
        )


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory (no mmap for large blocks, no trimming); False on other systems."""
    # Without this, glibc hands large tensors back to the system after every step and asks for them anew, page by page,
    # which costs several percent of a small model's step (benchmarks/throughput.py).
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # These are the numbers that malloc.h gives the options.
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1))


_libc: ctypes.CDLL | None = None  # It is set while children are to end with this process.


@contextmanager
def children_end_with_us() -> Iterator[None]:
    """What is forked in this block is killed when the thread that forked it ends, however that happens; Linux only.

    datasets' workers and the manager of their queue would otherwise wait for ever for a parent that was killed.
    """
    global _libc
    _libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    try:
        yield
    finally:
        _libc = None


def _end_with_parent() -> None:
    if _libc is not None:
        pr_set_pdeathsig = 1  # The number is from linux/prctl.h.
        _libc.prctl(pr_set_pdeathsig, signal.SIGKILL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_with_parent)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    import accelerate
    import datasets
    import transformers

    modules = (torch, transformers, accelerate, datasets)
    named = {module.__name__: str(module.__version__) for module in modules}
    return {"hf_power": __version__, "python": platform.python_version()} | named


def hardware(device: torch.device, processes: int = 1) -> Hardware:
    """The device of a run, without anything that names the host."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return {"device": device.type, "device_name": name, "processes": processes, "cpu_cores": os.cpu_count()}
