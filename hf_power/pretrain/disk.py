"""A disk that fills up while a run writes: one sentence, and half a checkpoint goes."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_power.checkpoints.seal import checkpoint_bytes, checkpoints, newest_intact, remove_leftovers, unfinished
from hf_power.data.text import cache_folder, source_bytes
from hf_power.records.errors import DiskError
from hf_power.records.files import free_bytes
from hf_power.settings.settings import Settings

FULL = ["No space left on device", "Disk quota exceeded", "Not enough disk space", "PytorchStreamWriter failed"]
FULL += ["unexpected pos", "iostream error"]  # of torch's writer, at the end of a file that could not be written
READ_ONLY = ["Read-only file system"]


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that the disk or a quota is full.

    safetensors and torch keep the system's number in their text only; torch's writer not even there.
    """
    return _says(error, (errno.ENOSPC, errno.EDQUOT), FULL)


def _says(error: BaseException, numbers: tuple[int, ...], texts: list[str]) -> bool:
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        at = at.__cause__ or at.__context__
    return any(getattr(e, "errno", None) in numbers or any(text in str(e) for text in texts) for e in seen)


@contextlib.contextmanager
def full_disk_told(settings: Settings, run: dict[str, Any], folder: Path) -> Iterator[None]:
    """A disk that is full or read-only, as one sentence: what is missing, and which checkpoint is safe.

    Args:
        settings: of the run.
        run: its record; without "parameters" it was still at its data.
        folder: the run folder, from which an unfinished checkpoint is removed.

    Raises:
        OSError: in place of what the writer raised.
    """
    try:
        yield
    except Exception as error:
        read_only = _says(error, (errno.EROFS,), READ_ONLY)
        if not read_only and not disk_is_full(error):
            raise
        safe = "no checkpoint was finished before"
        with contextlib.suppress(FileNotFoundError):
            safe = f"{newest_intact(folder)[0].name} is intact"
        if read_only:
            raise DiskError(
                f"the disk of {folder} is read-only now; {safe}: make it writable and go on with "
                "--resume_from_checkpoint true."
            ) from error
        if "parameters" in run:
            disk, needed, what = folder, checkpoint_bytes(folder, run["parameters"]), "a checkpoint takes"
        else:  # text as it is, and four bytes for a token of two bytes or more
            disk, needed = cache_folder(settings.data), 3 * source_bytes(settings.data)
            what = "text and tokens take about"
        halves = [p for half in checkpoints(folder) if unfinished(half) for p in half.rglob("*") if p.is_file()]
        free = free_bytes(disk) + sum(p.stat().st_size for p in halves)  # the error's own frames hold a file open
        if settings.training.process_index == 0:
            remove_leftovers(folder)
        missing = max(0, needed - free)
        size = f"{what} {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free, {missing / 1e6:,.1f} MB are missing"
        if not needed:  # a dataset of the Hub, of which not even the text is here
            size = f"{free / 1e6:,.1f} MB are free, and how much the dataset needs is not known"
        raise DiskError(
            f"the disk of {disk} is full: {size}; {safe}: free some space and go on with --resume_from_checkpoint true."
        ) from error
