"""The machine under a run: what makes its CPU fast, and what run.json says of it."""

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_power.version import __version__


def tune_cpu(args: Any) -> dict[str, Any]:
    """Settings that make training on a CPU faster; does nothing on an accelerator.

    glibc hands large tensors back to the system after every step and asks for them anew, page by page; told to keep
    them, it saves several percent of a small model's step (benchmarks/throughput.py). `accelerate launch` sets one
    thread for a process that was given all cores.

    Returns:
        What is in force: threads, and whether the allocator keeps its memory.
    """
    kept = False
    if args.device.type == "cpu":
        args.dataloader_pin_memory = False
        if os.environ.get("OMP_NUM_THREADS") == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        kept = keep_freed_memory()
    return {"cpu_threads": torch.get_num_threads(), "keeps_freed_memory": kept}


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory (no mmap for large blocks, no trimming); False on other systems."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1))


_libc: Any = None  # while children are to end with this process


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
        pr_set_pdeathsig = 1  # linux/prctl.h
        _libc.prctl(pr_set_pdeathsig, signal.SIGKILL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_with_parent)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make the numbers."""
    import accelerate
    import datasets
    import transformers

    modules = {"torch": torch, "transformers": transformers}
    modules |= {"accelerate": accelerate, "datasets": datasets}
    return {"hf_power": __version__, "python": platform.python_version()} | {
        name: m.__version__ for name, m in modules.items()
    }


def hardware(args: Any) -> dict[str, Any]:
    """The device, without anything that names the host."""
    device = args.device.type
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {"device": device, "device_name": name, "processes": args.world_size, "cpu_cores": os.cpu_count()}
