"""Where the training text comes from, the standard library, local files or the Hub, and which of it is held out."""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import numpy as np

from hf_power.data.documents import Counts
from hf_power.data.files import COMPRESSED, KINDS, kind_of, local_files
from hf_power.data.order import STREAM_PROBE_ROWS
from hf_power.data.readers import picked
from hf_power.data.split import Texts, split_stored, split_stream
from hf_power.data.store import stored, streamed
from hf_power.records.errors import MissingPackageError, UserError, reason, refused_by, shown

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Documents: TypeAlias = Dataset | IterableDataset


def stdlib_folder() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def python_files(root: Path) -> list[str]:
    """Relative posix paths of the .py files under root in sorted order."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
        paths += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    return sorted(paths)


def python_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(relative posix path, text) of the `python_files`, without those that are not UTF-8."""
    for path in python_files(root):
        try:
            yield path, (root / path).read_bytes().decode()
        except UnicodeDecodeError:
            # Python's own tests of encodings hold files that are broken on purpose.
            continue


T = TypeVar("T")

PYTHON_STDLIB = "python-stdlib"
# A byte-level BPE starts from the 256 bytes and has an eos token; token ids are stored in 32 bits.
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 2**31 - 1
# The seed of the tokenizer's sample is not the run's, so that runs of other seeds compare.
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
        f"python-stdlib (the sources of the running Python), a file, folder or glob of {', '.join(KINDS)} (text also with "
        f"{', '.join(COMPRESSED)}), or any name that datasets.load_dataset takes.",
    )
    dataset_config: str | None = option(None, "Configuration name for load_dataset.")
    split: str = option("train", "Split to train on; slices such as train[:1000] work.")
    eval_split: str | None = option(None, "Held-out split; none: hold out eval_fraction.")
    eval_fraction: float = option(0.05, "Share of the text, in characters, that is held out as whole documents.")
    streaming: bool = option(False, "Read the data while training instead of storing them first.")
    text_column: str = option("text", "Column that holds the text; a.b is the column b within a.")
    skip_bad_lines: int = option(0, "Lines of local files that may be left out because they cannot be read.")
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
        if self.skip_bad_lines < 0:
            raise UserError(f"skip_bad_lines must be at least 0, got {self.skip_bad_lines}: leave it out to skip none.")


def require_datasets() -> None:
    """Raise a MissingPackageError that names the extra if datasets is missing; a run asks before anything else."""
    try:
        import datasets  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            'datasets is needed to read data and is not installed: run pip install "hf_power[train]".'
        ) from error


def load_text(args: DataArguments) -> Texts:
    """Training and held-out documents.

    Without eval_split, documents are put in the order of a hash of their text, and the first of them are held out until
    they have eval_fraction of all characters; one that is larger than this share by itself is trained on. A stream, whose
    length is not known, holds out each document whose hash lies in the first eval_fraction of all hashes, so that the
    share is eval_fraction on average, and none of more than 1,000,000 characters. python-stdlib holds out
    each file whose path has such a hash.

    Args:
        args: see `DataArguments`; eval_fraction in (0, 1).

    Returns:
        Two datasets.Dataset, or two datasets.IterableDataset if args.streaming, and what was counted.

    Raises:
        NotFoundError: if a path has no file, or a folder none of a known type.
        UserError: if eval_fraction is outside (0, 1), a file is of an unknown kind or damaged, more lines than
            skip_bad_lines cannot be read (a stream meets them only when it reads them), the text column is missing or not
            text, or a part has no documents.
    """
    require_datasets()
    if not 0 < args.eval_fraction < 1:
        raise UserError(f"eval_fraction must lie between 0 and 1, got {args.eval_fraction}: pass, for example, 0.05.")
    if args.dataset == PYTHON_STDLIB:
        texts = _load_python_stdlib(args)
    elif files := local_files(args.dataset):
        texts = _load_files(args, files)
    else:
        texts = _load_from_hub(args)
    for name, part in (("training", texts.train), ("held-out", texts.held_out)):
        if next(iter(part), None) is None:
            more = ", or set streaming to false, which holds out at least one" if args.streaming else ""
            raise UserError(
                f"The {name} part of {args.dataset!r} has no documents: pass more data or another split{more}."
            )
    return texts


def cache_folder(args: DataArguments) -> Path:
    """Where text and tokens are stored."""
    import datasets

    return Path(args.data_cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()


def source_bytes(args: DataArguments) -> int:
    """Bytes of the files that the text comes from; 0 for a dataset of the Hub, which is not known before it is there."""
    if args.dataset == PYTHON_STDLIB:
        return sum(len(text.encode()) for _, text in python_sources(stdlib_folder()))
    return sum(Path(file).stat().st_size for file in local_files(args.dataset))


def _load_python_stdlib(args: DataArguments) -> Texts:
    import datasets

    if (args.split, args.eval_split, args.text_column, args.skip_bad_lines) != ("train", None, "text", 0):
        raise UserError(
            f"dataset={PYTHON_STDLIB!r} has no splits, columns or lines to choose from, got split={args.split!r}, "
            f"eval_split={args.eval_split!r}, text_column={args.text_column!r}, skip_bad_lines={args.skip_bad_lines}: "
            "leave them at their defaults."
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
    num_read = sum(map(len, documents))
    num_files = len(python_files(stdlib_folder()))
    return Texts(train, held_out, Counts(read=num_files, skipped=num_files - num_read))


def _load_files(args: DataArguments, files: list[str]) -> Texts:
    if args.dataset_config is not None:
        raise UserError(
            f"dataset_config={args.dataset_config!r} is for datasets of the Hub, and {args.dataset!r} is on this disk: "
            "leave it out."
        )
    if args.text_column != "text" and all(kind_of(Path(file)) == "txt" for file in files):
        raise UserError(
            f"text_column={args.text_column!r}, but {args.dataset!r} has .txt files alone, which have no columns: leave it "
            "out."
        )
    if not args.streaming:
        documents, counts = stored(files, args.text_column, args.skip_bad_lines, cache_folder(args))
        return split_stored(
            args.dataset, args.eval_fraction, *(_slice(documents, split) for split in _splits(args)), counts=counts
        )
    if args.split != "train" or args.eval_split not in (None, "train"):
        raise UserError(
            f"a stream of files can only be read whole, as the split train, got split={args.split!r} and "
            f"eval_split={args.eval_split!r}: set streaming to false, or choose files with a glob."
        )
    counts = Counts(args.skip_bad_lines)
    return split_stream(
        args.eval_fraction, *(streamed(files, args.text_column, counts) for _ in _splits(args)), counts=counts
    )


def _splits(args: DataArguments) -> list[str]:
    return [args.split] if args.eval_split is None else [args.split, args.eval_split]


def _slice(documents: "Dataset", split: str) -> "Dataset":
    """The rows of a split such as train[:30] or train[:10%]+train[90%:], of documents that are all of the split train."""
    from datasets import ReadInstruction

    if split == "train":
        return documents
    with refused_by(f"split {split!r}"):
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(documents)})
    sliced: Dataset = documents.select(np.concatenate([np.arange(part.from_, part.to) for part in parts]))
    return sliced


def _load_from_hub(args: DataArguments) -> Texts:
    import datasets

    if args.skip_bad_lines:
        raise UserError(
            f"skip_bad_lines={args.skip_bad_lines} is for files on this disk, and {args.dataset!r} is none: leave it out."
        )
    parts = []
    for split in _splits(args):
        try:
            with refused_by(f"dataset={args.dataset!r}"):
                # With a split, load_dataset gives a dataset or a stream; a dictionary of them is what it gives without one.
                load = functools.partial(
                    datasets.load_dataset, split=split, streaming=args.streaming, cache_dir=args.data_cache_dir
                )
                found = load(args.dataset, args.dataset_config)
        except datasets.exceptions.DatasetsError as error:
            raise UserError(f"dataset={args.dataset!r} cannot be read: {reason(error.__cause__ or error)}.") from error
        parts.append(_text_only(cast("Documents", found), args.text_column))
    if args.streaming:
        return split_stream(args.eval_fraction, *cast("list[IterableDataset]", parts), counts=Counts())
    tables = cast("list[Dataset]", parts)
    counts = Counts(read=sum(len(table) for table in tables))
    return split_stored(args.dataset, args.eval_fraction, *tables, counts=counts)


def _text_only(dataset: "Documents", column: str) -> "Documents":
    """The dataset with the text column alone, named "text"."""
    import datasets

    features = dataset.features
    if features is None:
        # A stream of JSON does not know its columns before it is read.
        features = datasets.Dataset.from_list(list(dataset.take(STREAM_PROBE_ROWS))).features
    strings = [name for name, kind in features.items() if "string" in str(getattr(kind, "dtype", ""))]
    nested = picked(features, column)
    if "string" not in str(getattr(nested, "dtype", "")):
        got = f"of type {nested}" if column in features else "missing"
        raise UserError(
            f"text_column={column!r} must be a column of strings, got one that is {got}: "
            f"pass one of {', '.join(strings) or '(the data has no column of strings)'}."
        )
    if column not in features:
        return dataset.map(
            _lifted,
            fn_kwargs={"column": column},
            remove_columns=list(features),
            features=datasets.Features(text=datasets.Value("string")),
        )
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _lifted(row: dict[str, object], column: str) -> dict[str, object]:
    return {"text": picked(dict(row), column)}
