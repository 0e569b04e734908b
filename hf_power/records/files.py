"""Files that are there whole or not at all, their hashes, and the lock of a folder."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar, cast

from typing_extensions import Self

from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.schema import Json, decode, encode

T = TypeVar("T")
REMEDY = "write it with this version of hf_power"
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")

LOCK = ".lock"  # Of the run that trains in a folder.
_POINTER = b"version https://git-lfs.github.com/spec/"

_HELD: set[Path] = set()  # The locks that this process holds.


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


def write_json(path: str | os.PathLike[str], content: object) -> None:
    """Write JSON atomically and flush it to the disk; a number that is not finite is written as Python reads it."""
    with replaced(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def parse_json(text: bytes, source: object, remedy: str) -> Json:
    """JSON as it must be, or a UserError: UTF-8, every key once, nested no deeper than Python can read."""
    try:
        return cast(Json, json.loads(text.decode("utf-8"), object_pairs_hook=_unique))
    # Bytes that are not UTF-8, a BOM, and integers of more digits than Python reads are a ValueError too.
    except (ValueError, RecursionError) as error:
        why = error if isinstance(error, ValueError) else "it is nested too deep"
        raise UserError(f"{source} is not JSON ({why}): {remedy}.") from error


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(n for n in names if names.count(n) > 1))} is there twice")
    return content


def read_object(path: Path, *, schema: int | None = 1, remedy: str = REMEDY) -> dict[str, Json]:
    """The content of a JSON file that is an object.

    `schema` is the number that its key "schema" must have, None for a file of somebody else's.

    Raises:
        NotFoundError: there is no such file.
        UserError: one sentence that names the file, and why it is none.
    """
    if not path.is_file():
        what = "pass a folder that was saved whole" if remedy == REMEDY else remedy
        raise NotFoundError(f"there is no {path.name} in {path.parent}: {what}.")
    content = parse_json(path.read_bytes(), path, remedy)
    found = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(content, dict) or (schema is not None and (type(found) is not int or found != schema)):
        got = shown(found) if isinstance(content, dict) else type(content).__name__
        what = "a JSON object" if schema is None else f"of schema {schema}"
        raise UserError(f"{path} is not {what}, got {got}: {remedy}.")
    return content


def read_record(
    path: Path, kind: type[T], *, schema: int | None = 1, required: Sequence[str] = (), remedy: str = REMEDY
) -> T:
    """The record in a JSON file: `read_object`, and then `hf_power.records.schema.decode`, with the errors of both."""
    return decode(kind, read_object(path, schema=schema, remedy=remedy), path, remedy, required=required)


def read_json(path: Path) -> dict[str, Json] | None:
    """As `read_object`, of any schema; None if there is no such file."""
    remedy = "restore the file, or delete it if it can be made anew"
    return read_object(path, schema=None, remedy=remedy) if path.is_file() else None


@dataclass(frozen=True)
class Record:
    """A dataclass that is the content of a JSON file of its own, with the schema number that all records have."""

    FILE: ClassVar[str]
    REMEDY: ClassVar[str]

    @classmethod
    def load(cls, folder: Path, required: Sequence[str] = ()) -> Self:
        """Read the file in a folder; `required` are dotted names, "data.held_out_tokens", that must be there and not null.

        Raises:
            NotFoundError: there is no such file.
            UserError: one sentence that names the file, the key, what it must be, and its value.
        """
        return read_record(folder / cls.FILE, cls, required=required, remedy=cls.REMEDY)

    @classmethod
    def load_if_there(cls, folder: Path) -> Self | None:
        """As `load`; None if the folder has no such file."""
        return cls.load(folder) if (folder / cls.FILE).is_file() else None

    def to_json(self) -> dict[str, Json]:
        """The content of the file."""
        return {"schema": 1, **encode(self)}

    def save(self, folder: Path) -> None:
        """Write the file into a folder, whole or not at all."""
        write_json(folder / self.FILE, self.to_json())


def refuse_pointer(path: Path) -> None:
    """Raise a UserError for a file that Git LFS has not downloaded, in whose place lies a small text that names it."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of Git LFS and not the file itself: run git lfs pull in its folder.")


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
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def git_blob_id(path: Path) -> str:
    """The id under which git keeps a file: SHA-1 of "blob SIZE", a zero byte and the content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def refuse_at_work(folder: Path, remedy: str, names: str = LOCK) -> None:
    """Raise a UserError if a lock of a folder whose name matches the pattern is held, see `only_one`; nothing is written."""
    import fcntl

    for path in folder.resolve().glob(names):
        taken = path in _HELD
        # This process must not open a lock of its own, because closing it would give the lock back.
        if not taken:
            with suppress(FileNotFoundError, PermissionError), open(path, "rb") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError as error:
                    taken = error.errno in (errno.EACCES, errno.EAGAIN)
        if taken:
            raise UserError(f"another run is at work in {folder}: {remedy}.")


@contextmanager
def only_one(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a folder's lock, which ends with the process however that ends; the folder is made, and goes if it stays empty.

    Where the file system has no locks, nothing is held.

    Raises:
        UserError: it is held already.
    """
    import fcntl  # Only POSIX has it, and who uses the schedule alone needs none.

    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / name
    taken = f"another run is at work in {folder}: wait for its end, or take another folder."
    if path in _HELD:  # The system's lock belongs to the process, and does not keep it from locking once more.
        raise UserError(taken)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # lockf's lock belongs to this process alone, whereas its children would inherit that of flock.
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
        os.close(descriptor)  # The holder has removed the file in between, so this one locks nothing.
    _HELD.add(path)
    try:
        yield
    finally:
        _HELD.discard(path)
        with suppress(OSError):  # The disk may be read-only by now.
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()
