"""Where the training text comes from: the standard library, local files, or any dataset of the Hub."""

import functools
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from hf_power.data.order import STREAM_PROBE_ROWS
from hf_power.records.errors import MissingPackageError, NotFoundError, UserError, shown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Documents: TypeAlias = Dataset | IterableDataset

# By its suffix, the loader of `datasets` for a file, and the loader's options.
LOADERS: dict[str, tuple[str, dict[str, str]]] = {
    ".txt": ("text", {"sample_by": "document"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}


def stdlib_folder() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def python_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(relative posix path, text) of the .py files under root in sorted order, without those that are not UTF-8."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
        paths += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    for path in sorted(paths):
        try:
            yield path, (root / path).read_bytes().decode()
        except UnicodeDecodeError:
            # Python's own tests of encodings hold files that are broken on purpose.
            continue


def local_files(name: str) -> list[str]:
    """Sorted files of a path, folder or glob, all of one type; [] if the name must be one for load_dataset."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix in LOADERS]
    elif path.exists():
        files = [path]
    elif glob.has_magic(name):
        files = [Path(file) for file in glob.glob(str(path), recursive=True)]
    elif path.suffix in LOADERS or path.is_absolute() or name.startswith("."):
        files = []
    else:
        return []
    if not files:
        raise NotFoundError(f"dataset={name!r} has no file of type {', '.join(LOADERS)}: check the path.")
    suffixes = sorted({file.suffix for file in files})
    if len(suffixes) > 1 or suffixes[0] not in LOADERS:
        raise UserError(
            f"dataset={name!r} must be files of one type of {', '.join(LOADERS)}, got {', '.join(suffixes)}: "
            "choose some with a glob such as 'folder/*.jsonl'."
        )
    return sorted(str(file) for file in files)


def check_json(file: str, cause: Exception) -> None:
    """Raise a UserError with file and line if it is no JSON, of which datasets says only that it is wrong."""
    with open(file, "rb") as lines:
        is_array = lines.read(1) == b"["
        lines.seek(0)
        for number, line in enumerate([lines.read()] if is_array else lines, start=1):
            try:
                if line.strip() and not isinstance(json.loads(line), list if is_array else dict):
                    raise ValueError("not an object")
            except ValueError as error:
                number = error.lineno if is_array and isinstance(error, json.JSONDecodeError) else number
                raise UserError(f"{file}:{number}: broken JSON ({error}): repair or delete the line.") from cause


T = TypeVar("T")

PYTHON_STDLIB = "python-stdlib"
# A stream has no length to take a fraction of, so its first documents are held out.
STREAM_EVAL_DOCUMENTS = 1000
# A byte-level BPE starts from the 256 bytes and has an eos token; token ids are stored in 32 bits.
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 2**31 - 1
# The seed of the held-out documents and of the tokenizer's sample is not the run's, so that runs of other seeds compare.
SPLIT_SEED = 0


def option(default: T, help: str, **metadata: object) -> T:
    """A field of arguments with its line of help; further metadata are those that `hf_power.cli` knows."""
    value: T = field(default=default, metadata={"help": help, **metadata})
    return value


@dataclass
class DataArguments:
    """Which text, which tokenizer, which blocks; made for `transformers.HfArgumentParser`."""

    dataset: str = option(
        PYTHON_STDLIB,
        "python-stdlib (the sources of the running Python), a file, folder or glob of .txt, .jsonl, .json, "
        ".parquet or .arrow, or any name that datasets.load_dataset takes.",
    )
    dataset_config: str | None = option(None, "Configuration name for load_dataset.")
    split: str = option("train", "Split to train on; slices such as train[:1000] work.")
    eval_split: str | None = option(None, "Held-out split; none: hold out eval_fraction.")
    eval_fraction: float = option(
        0.05, f"Share of held-out documents; a stream holds out its first {STREAM_EVAL_DOCUMENTS}."
    )
    streaming: bool = option(False, "Read the data while training instead of storing them first.")
    text_column: str = option("text", "Column that holds the text.")
    tokenizer: str | None = option(None, "Folder or Hub name; none: train a byte-level BPE on the training text.")
    vocab_size: int = option(4096, "Vocabulary of a trained tokenizer.")
    block_size: int = option(256, "Tokens per block (sequence length).")
    num_proc: int | None = option(None, "Processes that tokenize; none: one per CPU.")
    data_cache_dir: str | None = option(None, "None: the cache of datasets.")

    def __post_init__(self) -> None:
        if not SMALLEST_VOCABULARY <= self.vocab_size <= LARGEST_VOCABULARY:
            raise UserError(
                f"vocab_size must lie in {SMALLEST_VOCABULARY} (bytes and eos) to {LARGEST_VOCABULARY:,}, "
                f"got {shown(self.vocab_size)}: correct it."
            )


def require_datasets() -> None:
    """Raise a MissingPackageError that names the extra if datasets is missing; a run asks before anything else."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            'datasets is needed to read data and is not installed: run pip install "hf_power[train]".'
        ) from error


def load_text(args: DataArguments) -> "tuple[Documents, Documents]":
    """Training and held-out documents, one "text" column each.

    Without eval_split, python-stdlib is split by a hash of each file's path, other data by a fixed seed, and a stream
    holds out its first STREAM_EVAL_DOCUMENTS documents.

    Args:
        args: see `DataArguments`; eval_fraction in (0, 1).

    Returns:
        (train, held out): two datasets.Dataset, or two datasets.IterableDataset if args.streaming.

    Raises:
        NotFoundError: if a path has no file, or a folder none of a known type.
        UserError: if eval_fraction is outside (0, 1), file types are mixed or unknown, a JSON line is broken (a stream
            meets it only when it reads it), the text column is missing or not text, or a part has no documents.
    """
    require_datasets()
    if not 0 < args.eval_fraction < 1:
        raise UserError(f"eval_fraction must lie between 0 and 1, got {args.eval_fraction}: pass, for example, 0.05.")
    if args.dataset == PYTHON_STDLIB:
        parts = _load_python_stdlib(args)
    else:
        data = _load_split(args, args.split)
        parts = _hold_out(data, args) if args.eval_split is None else (data, _load_split(args, args.eval_split))
    for name, part in zip(("training", "held-out"), parts, strict=True):
        if next(iter(part), None) is None:
            raise UserError(f"The {name} part of {args.dataset!r} has no documents: pass more data or another split.")
    return parts


def cache_folder(args: DataArguments) -> Path:
    """Where text and tokens are stored."""
    import datasets

    return Path(args.data_cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()


def source_bytes(args: DataArguments) -> int:
    """Bytes of the files that the text comes from; 0 for a dataset of the Hub, which is not known before it is there."""
    if args.dataset == PYTHON_STDLIB:
        return sum(len(text.encode()) for _, text in python_sources(stdlib_folder()))
    return sum(Path(file).stat().st_size for file in local_files(args.dataset))


def _load_python_stdlib(args: DataArguments) -> "tuple[Documents, Documents]":
    import datasets

    if (args.split, args.eval_split, args.text_column) != ("train", None, "text"):
        raise UserError(
            f"dataset={PYTHON_STDLIB!r} has no splits or columns to choose from, got split={args.split!r}, "
            f"eval_split={args.eval_split!r}, text_column={args.text_column!r}: leave them at their defaults."
        )
    documents: tuple[list[str], list[str]] = ([], [])
    digests = hashlib.sha256(), hashlib.sha256()
    for path, text in python_sources(stdlib_folder()):
        # The hash of its path puts a file on the same side in every version of Python that has the file.
        score = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
        part = int(score < args.eval_fraction)
        documents[part].append(text)
        digests[part].update(f"{path}\0{text}\0".encode())
    if not all(documents):
        raise UserError(
            f"eval_fraction={args.eval_fraction} holds out {len(documents[1])} of the "
            f"{len(documents[0]) + len(documents[1])} documents of {PYTHON_STDLIB!r}: pass, for example, 0.05."
        )
    # The fingerprint is of the content, not of the path: two machines with the same Python share it.
    parts = [
        datasets.Dataset.from_generator(
            lambda texts=texts: ({"text": text} for text in texts),
            features=datasets.Features(text=datasets.Value("string")),
            cache_dir=str(cache_folder(args)),
            fingerprint=f"python-{python_version()}-{digest.hexdigest()[:16]}",
        )
        for texts, digest in zip(documents, digests, strict=True)
    ]
    train, held_out = (part.to_iterable_dataset() if args.streaming else part for part in parts)
    return train, held_out


def _load_split(args: DataArguments, split: str) -> "Documents":
    import datasets

    # With a split, load_dataset gives a dataset or a stream; a dictionary of them is what it gives without one.
    load = functools.partial(
        datasets.load_dataset, split=split, streaming=args.streaming, cache_dir=args.data_cache_dir
    )
    files = local_files(args.dataset)
    if not files:
        found = cast("Documents", load(args.dataset, args.dataset_config))
        return _text_only(found, args.text_column)
    loader, options = LOADERS[Path(files[0]).suffix]
    try:
        loaded = load(loader, args.dataset_config, data_files=list(map(glob.escape, files)), **options)
        return _text_only(cast("Documents", loaded), args.text_column)
    except StopIteration:
        # The JSON loader raises it for empty files.
        raise UserError(f"{args.dataset!r} has no documents: pass more data.") from None
    except datasets.exceptions.DatasetGenerationError as error:
        for file in files if loader == "json" else []:
            check_json(file, error)
        raise


def _text_only(dataset: "Documents", column: str) -> "Documents":
    """The dataset with the text column alone, named "text"."""
    import datasets

    features = dataset.features
    if features is None:
        # A stream of JSON does not know its columns before it is read.
        features = datasets.Dataset.from_list(list(dataset.take(STREAM_PROBE_ROWS))).features
    strings = [name for name, kind in features.items() if "string" in str(getattr(kind, "dtype", ""))]
    if column not in strings:
        got = f"of type {features[column]}" if column in features else "missing"
        raise UserError(
            f"text_column={column!r} must be a column of strings, got one that is {got}: "
            f"pass one of {', '.join(strings) or '(the data has no column of strings)'}."
        )
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _hold_out(dataset: "Documents", args: DataArguments) -> "tuple[Documents, Documents]":
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        return dataset.skip(STREAM_EVAL_DOCUMENTS), dataset.take(STREAM_EVAL_DOCUMENTS)
    if len(dataset) < 2:
        raise UserError(
            f"{args.dataset!r} has {len(dataset)} document(s), too few to hold one out (a .txt file is one document): "
            "pass more documents or eval_split."
        )
    num_held_out = min(max(1, round(args.eval_fraction * len(dataset))), len(dataset) - 1)
    # At least one document is held out, and at least one is left to train on.
    parts = dataset.train_test_split(test_size=num_held_out, seed=SPLIT_SEED)
    return parts["train"], parts["test"]
