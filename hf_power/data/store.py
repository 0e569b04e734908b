"""Documents of local files as a dataset, stored in the cache or streamed, and folders of the cache that are made once."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_power.data.documents import Counts, read_documents
from hf_power.data.files import TEXT_CACHE

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# The text of a folder of the cache depends on this too, so that it is read anew where it would be read in another way.
READER_VERSION = 1
# So many documents, or so many characters, are written together.
DOCUMENTS_PER_WRITE = 1000
CHARACTERS_PER_WRITE = 1 << 24
_TEXT, _COUNTS = "text.arrow", "counts.json"


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """The folder, which `make` fills if it is not there yet; it is there whole or not at all."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary, "made")
            make(made)
            try:
                os.rename(made, folder)
            except OSError:
                # Another process may have been first; then its folder, which holds the same, is taken.
                if not folder.exists():
                    raise
    return folder


def stored(files: Sequence[str], column: str, limit: int, cache: Path) -> "tuple[Dataset, Counts]":
    """The documents of the files, read once and then found in the cache until one of the files is another.

    A file is the same as long as its path, its size, and its times of change (to the nanosecond, that of the system
    included, which no program sets) are.
    """
    from datasets import Dataset

    states = [(str(Path(file).resolve()), os.stat(file)) for file in files]
    what = [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in states]
    key = hashlib.sha256(json.dumps([READER_VERSION, column, limit, what]).encode()).hexdigest()[:32]

    def make(folder: Path) -> None:
        folder.mkdir()
        counts = Counts(limit)
        _write(folder / _TEXT, read_documents(files, column, counts))
        numbers = {"read": counts.read, "empty": counts.empty, "skipped": counts.skipped}
        (folder / _COUNTS).write_text(json.dumps(numbers), encoding="utf-8")

    folder = made_once(cache / TEXT_CACHE / key, make)
    numbers = json.loads((folder / _COUNTS).read_text(encoding="utf-8"))
    return Dataset.from_file(str(folder / _TEXT)), Counts(limit, **numbers)


def _write(path: Path, texts: Iterable[str]) -> None:
    import pyarrow
    from datasets.utils import tqdm

    # Offsets of 32 bits would end at 2 GB of text in a batch.
    schema = pyarrow.schema([("text", pyarrow.large_string())])
    bar = tqdm(desc="Reading text", unit=" documents")
    with open(path, "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer, bar:
        for some in _groups(texts):
            writer.write_batch(pyarrow.record_batch([pyarrow.array(some, pyarrow.large_string())], schema=schema))
            bar.update(len(some))


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in texts:
        group.append(text)
        characters += len(text)
        if len(group) == DOCUMENTS_PER_WRITE or characters > CHARACTERS_PER_WRITE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def streamed(files: Sequence[str], column: str, counts: Counts) -> "IterableDataset":
    """The documents of the files, read while they are asked for; each file is a share of its own for a process."""
    from datasets import Features, IterableDataset, Value

    stream: IterableDataset = IterableDataset.from_generator(
        _rows,
        features=Features(text=Value("large_string")),
        gen_kwargs={"files": list(files), "column": column, "counts": counts},
    )
    return stream


def _rows(files: Sequence[str], column: str, counts: Counts) -> Iterator[dict[str, str]]:
    for text in read_documents(files, column, counts):
        yield {"text": text}
