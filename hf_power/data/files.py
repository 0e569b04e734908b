"""Which files a name stands for, and their bytes: `local_files`, `kind_of`, `opened`."""

import bz2
import contextlib
import errno
import fnmatch
import glob
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO, cast

from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.files import refuse_pointer

# By its suffix, how a file is read; each may be compressed as a whole, but for those that compress their own columns.
KINDS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
_COLUMNAR = ("parquet", "arrow")
# What lies beside text in many folders and is none; any other file of an unknown kind in a folder is refused.
_BESIDE = ("readme*", "license*", "notice*", "copying*", "_*", "*.md", "*.py", "*.sha256", "*.md5", "*sums", "*.crc")
# What datasets writes beside the .arrow files of a saved dataset.
_OF_ARROW = ("dataset_info.json", "state.json", "dataset_dict.json")
# Folders that hf_power itself fills, which may lie in the folder of the text.
TEXT_CACHE, TOKENIZER_CACHE = "hf_power_text", "hf_power_tokenizers"
# What the standard library and pyarrow raise for a file that is cut, damaged, or not of its kind.
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


# Folders and files of a split, as train-00000-of-00002.parquet.
_TRAINING = re.compile(r"train(ing)?([-_.].*)?", re.IGNORECASE)
_HELD_OUT = re.compile(r"(test|valid|validation|val|dev|eval)([-_.].*)?", re.IGNORECASE)


def kind_of(path: PurePath) -> str | None:
    """How a file is read, a value of KINDS, by its suffix (and the one before a suffix of COMPRESSED); None: it is not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    if compressed:
        suffixes.pop()
    kind = KINDS.get(suffixes[-1]) if suffixes else None
    return None if compressed and kind in _COLUMNAR else kind


def local_files(name: str) -> list[str]:
    """The files of a path, folder or glob in the order of their names, each once; [] if it is a name for load_dataset.

    Hidden files and folders below a folder are left out, links are followed, and a file that several names lead to is
    read under the first of them.

    Raises:
        NotFoundError: no file, or a link to nothing.
        UserError: a file of an unknown kind.
    """
    path = Path(name).expanduser()
    if path.exists():
        roots = [path]
    elif glob.has_magic(name):
        roots = [file for file in map(Path, glob.glob(str(path), recursive=True)) if not _is_beside(file.name)]
    elif kind_of(path) or path.suffix in COMPRESSED or path.is_absolute() or name.startswith("."):
        roots = []
    else:
        return []
    found: dict[tuple[int, int], Path] = {}
    for file in sorted({file for root in roots for file in (_below(root) if root.is_dir() else [root])}):
        try:
            status = file.stat()
        except FileNotFoundError as error:
            raise NotFoundError(
                f"dataset={name!r}: {file} is a link to nothing: restore what it names, or delete it."
            ) from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            continue  # "**" follows a link to a folder above until the system stops it.
        if kind_of(file) is None:
            raise UserError(
                f"dataset={name!r}: {file} is of no kind that can be read: convert it to one of {', '.join(KINDS)}, or "
                "choose the other files with a glob such as 'folder/*.jsonl'."
            )
        found.setdefault((status.st_dev, status.st_ino), file)
    if roots == [path] and path.is_dir():
        _refuse_splits(name, [file.relative_to(path) for file in found.values()])
    if not found:
        raise NotFoundError(f"dataset={name!r} has no file of type {', '.join(KINDS)}: check the path.")
    return [str(file) for file in found.values()]


def _refuse_splits(name: str, files: Sequence[Path]) -> None:
    """Raise a UserError for a folder with a split for training and one for tests, which must not be trained on."""
    splits = [
        next((file for file in files if any(split.fullmatch(part) for part in file.parts)), None)
        for split in (_TRAINING, _HELD_OUT)
    ]
    if splits[0] and splits[1]:
        raise UserError(
            f"dataset={name!r} has a split for training, {splits[0]}, and another one, {splits[1]}, which would be trained on as "
            "well: name the one, or the files by a glob such as 'folder/train*'."
        )


def _below(root: Path) -> Iterator[Path]:
    """The files of a folder and of those in it, without what is hidden and what is no text."""
    visited = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        # A link to a folder above would otherwise be followed without an end.
        if (place := (status.st_dev, status.st_ino)) in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = [
            name for name in folders if not name.startswith(".") and name not in (TEXT_CACHE, TOKENIZER_CACHE)
        ]
        saved = any(name.endswith(".arrow") for name in names) or "dataset_dict.json" in names
        for name in names:
            if not name.startswith(".") and not _is_beside(name) and not (saved and name in _OF_ARROW):
                yield Path(folder, name)


def _is_beside(name: str) -> bool:
    return kind_of(Path(name)) is None and any(fnmatch.fnmatch(name.lower(), pattern) for pattern in _BESIDE)


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed by its suffix; a UserError for a pointer of Git LFS."""
    refuse_pointer(Path(path))
    suffix = Path(path).suffix.lower()
    with contextlib.ExitStack() as stack:
        if suffix == ".zst":
            import pyarrow  # It brings its own zstd, and is there wherever datasets is.

            raw = stack.enter_context(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))
            file: BinaryIO = stack.enter_context(io.BufferedReader(raw, 1 << 20))
        else:
            plain = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix, open)
            with open(path, "rb") as begin:
                if plain is open and begin.read(2) == b"\x1f\x8b":  # gzip under a name that does not say so.
                    plain = gzip.open
            file = stack.enter_context(cast("Callable[[str, str], BinaryIO]", plain)(path, "rb"))
        yield file
