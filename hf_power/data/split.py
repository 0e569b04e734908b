"""Which documents are held out: a share of the text, chosen by a hash of each document, and none that is empty."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from hf_power.data.documents import Counts
from hf_power.records.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Documents: TypeAlias = Dataset | IterableDataset

# A stream has no length to take a share of. One document of so many characters could be most of what is held out of it.
STREAM_LONGEST_HELD_OUT = 1_000_000


class Texts(NamedTuple):
    """Training and held-out documents, one "text" column each, and how many there were before any was left out."""

    train: "Documents"
    held_out: "Documents"
    counts: Counts


def _score(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, so that copies of a document are on one side of a split."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64)


def _measured(rows: dict[str, list[str | None]]) -> dict[str, list[float] | list[int]]:
    texts = [text or "" for text in rows["text"]]
    return {"size": [len(text) for text in texts], "score": [_score(text) for text in texts]}


def split_stored(
    name: str, fraction: float, documents: "Dataset", held_out: "Dataset | None" = None, *, counts: Counts
) -> Texts:
    """Training and held-out documents, without empty ones; `held_out` are those to choose from where they are given."""
    rows, sizes, scores = _with_text(documents, counts)
    if held_out is not None:
        return Texts(documents.select(rows), held_out.select(_with_text(held_out, counts)[0]), counts)
    if len(rows) < 2:
        raise UserError(
            f"{name!r} has {len(rows)} document(s) with text, too few to hold one out (a .txt file is one document): "
            "pass more documents or eval_split."
        )
    held = held_out_rows(sizes, scores, fraction)
    return Texts(documents.select(rows[~held]), documents.select(rows[held]), counts)


def _with_text(documents: "Dataset", counts: Counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows that are not empty, the characters of each, and its score."""
    from datasets import Features, Value

    if not len(documents):
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    measured = documents.map(
        _measured,
        batched=True,
        remove_columns=["text"],
        features=Features(size=Value("int64"), score=Value("float64")),
        desc="Measuring documents",
    ).with_format("numpy")[:]
    rows = np.flatnonzero(measured["size"])
    counts.empty += len(documents) - len(rows)
    return rows, measured["size"][rows], measured["score"][rows]


def held_out_rows(sizes: np.ndarray, scores: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are held out, as booleans: those of the least scores, up to a fraction of all characters.

    The sum comes as near to the fraction as whole documents in the order of their scores allow. A document that is larger
    than the fraction by itself is trained on; if all are, the smallest is held out. At least one is left to train on.

    Args:
        sizes: characters of each document, >= 1, of two documents or more.
        scores: a number for each.
        fraction: in (0, 1).
    """
    wanted = fraction * sizes.sum()
    order = np.argsort(scores, kind="stable")
    order = order[sizes[order] <= wanted]
    # A document is taken if more than half of it lies below the mark.
    chosen = order[np.cumsum(sizes[order]) - sizes[order] / 2 <= wanted][: len(sizes) - 1]
    held = np.zeros(len(sizes), dtype=bool)
    held[chosen if len(chosen) else [int(np.argmin(sizes))]] = True
    return held


def split_stream(
    fraction: float, documents: "IterableDataset", held_out: "IterableDataset | None" = None, *, counts: Counts
) -> Texts:
    """As `split_stored`, of streams: a document is held out by its own score alone."""
    if held_out is not None:
        return Texts(documents.filter(_has_text, batched=True), held_out.filter(_has_text, batched=True), counts)
    train, held_out = (
        documents.filter(_on_side, batched=True, fn_kwargs={"fraction": fraction, "held_out": side})
        for side in (False, True)
    )
    return Texts(train, held_out, counts)


def _has_text(rows: dict[str, Sequence[str | None]]) -> list[bool]:
    return [bool(text) for text in rows["text"]]


def _on_side(rows: dict[str, Sequence[str | None]], fraction: float, held_out: bool) -> list[bool]:
    sides = (text and (len(text) <= STREAM_LONGEST_HELD_OUT and _score(text) < fraction) for text in rows["text"])
    return [side is held_out for side in sides]
