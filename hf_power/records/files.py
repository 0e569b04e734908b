"""Files that are there whole or not at all, and their hashes."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hf_power.records.errors import UserError
from hf_power.records.schema import read_object

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")

_HELD: set[Path] = set()  # locks of this process


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name in the same folder, renamed to `path` when the block ends and removed when it fails.

    A reader sees the old file or the whole new one, never half of it.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """What a file or folder is called before it is there, or while it is being removed."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def temporaries(folder: Path) -> list[Path]:
    """Everything in a folder that has a temporary name: where nothing else is at work, what killed processes left."""
    return [path for path in folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON atomically and flush it to the disk."""
    with replaced(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file; None if there is no such file.

    Raises:
        ValueError: it is no JSON object.
    """
    if not path.is_file():
        return None
    remedy = "restore the file, or delete it if it can be made anew"
    return read_object(path, {}, schema=None, remedy=remedy)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk of a path that need not be there yet."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_blob_id(path: Path) -> str:
    """The id under which git keeps a file: SHA-1 of "blob SIZE", a zero byte and the content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def only_one(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a folder's lock, which ends with the process however that ends; the folder is made, and goes if it stays empty.

    Where the file system has no locks, nothing is held.

    Raises:
        ValueError: it is held already.
    """
    import fcntl  # of POSIX; the schedule alone runs without it

    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / name
    taken = f"another run is at work in {folder}: wait for its end, or take another folder."
    if path in _HELD:  # the system's lock is of the process, and is no bar within it
        raise UserError(taken)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Of this process alone: its children do not inherit it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise UserError(taken) from error
        try:
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its holder has removed it in between
    _HELD.add(path)
    try:
        yield
    finally:
        _HELD.discard(path)
        with suppress(OSError):  # a disk that is read-only by now
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()
