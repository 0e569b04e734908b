"""The order in which a run reads its blocks, and short ids of data by private parts of datasets, for provenance."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from hf_power.records.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# The shuffle buffer of a stream takes 80 MB of int64 at 1024 tokens per block.
STREAM_SHUFFLE_BLOCKS = 10_000

Block: TypeAlias = dict[str, np.ndarray]  # {"input_ids": (block_size,) integers}


class BlockStream(torch.utils.data.Dataset[Block]):
    """The endless, seeded order of training blocks, cut to positions [start, stop).

    Item i is block ``permutation(epoch)[k]`` with ``epoch, k = divmod(start + i, len(blocks))`` and
    ``permutation(epoch) = numpy.random.default_rng([seed, epoch]).permutation(len(blocks))``. The order depends on the
    seed and the position alone, not on batch size, processes, or where a run was stopped: a run that resumes at the
    number of blocks it has read goes on exactly. Read it in sequence; only the last epoch's permutation (8 bytes per
    block) is kept.

    Args:
        blocks: what `pack` returned for a Dataset; at least one block.
        seed: >= 0.
        start: position of the first block, in blocks since the start of training, >= 0.
        stop: position after the last one, >= start; not bounded by len(blocks).

    Raises:
        UserError: if there are no blocks, or unless 0 <= start <= stop and seed >= 0.
    """

    def __init__(self, blocks: "Dataset", *, seed: int, start: int, stop: int) -> None:
        if not 0 <= start <= stop or seed < 0 or not len(blocks):
            raise UserError(
                "BlockStream needs 0 <= start <= stop, seed >= 0 and a block to read, "
                f"got start={start}, stop={stop}, seed={seed} and {len(blocks)} blocks: correct them."
            )
        self.blocks, self.seed, self.start, self.stop = blocks, seed, start, stop
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Block:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Block]:
        """Several items in one read; torch's DataLoader calls it with the indices of a batch."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"BlockStream has items 0 to {len(self) - 1}, got {indices}: stay within.")
        epochs, offsets = np.divmod(self.start + wanted, len(self.blocks))
        rows = np.empty_like(wanted)
        for epoch in np.unique(epochs):
            rows[epochs == epoch] = self._order(int(epoch))[offsets[epochs == epoch]]
        return [{"input_ids": block} for block in self.blocks[rows.tolist()]["input_ids"]]

    def _order(self, epoch: int) -> np.ndarray:
        # One permutation is kept, because a run reads its epochs one after the other.
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
            self._epoch = epoch
        return self._permutation


def stream_blocks(blocks: "IterableDataset", *, seed: int, start: int) -> "IterableDataset":
    """The endless order of training blocks of a stream, from position `start` >= 0 on, shuffled by the seed.

    It is shuffled within a buffer of STREAM_SHUFFLE_BLOCKS blocks, in the same order every epoch. Skipping to start
    reads and tokenizes again all that is skipped, and the order holds for one reading process: where start-up time or
    exactness on several ranks matters, store the data and use `BlockStream`.
    """
    # The stream is made endless before it is skipped: a loader that began an epoch anew would otherwise skip anew.
    return blocks.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE_BLOCKS).repeat(None).skip(start)


def spread_blocks(blocks: "Dataset | IterableDataset", num_blocks: int) -> "Dataset | list[Block]":
    """num_blocks blocks at even distances, so that every part of the data is in an evaluation; all if there are fewer.

    A stream gives its first num_blocks, as a list.
    """
    from datasets import Dataset

    if not isinstance(blocks, Dataset):
        return list(blocks.take(num_blocks))
    chosen: Dataset = blocks.select(spread_rows(len(blocks), num_blocks))
    return chosen


def spread_rows(total: int, wanted: int) -> list[int]:
    """The numbers of `wanted` rows of `total` at even distances, from row 0 on; all rows if there are fewer."""
    wanted = min(wanted, total)
    return [i * total // wanted for i in range(wanted)]


def collate_blocks(examples: Sequence[Block]) -> dict[str, torch.Tensor]:
    """Stack blocks to {"input_ids", "labels"}, two equal int64 tensors of shape (batch, block_size).

    The labels are not shifted: causal language models of transformers do that themselves.
    """
    input_ids = torch.from_numpy(np.stack([example["input_ids"] for example in examples])).long()
    return {"input_ids": input_ids, "labels": input_ids.clone()}


# So many rows stand for a stream where its columns or its fingerprint are asked for.
STREAM_PROBE_ROWS = 100
# So many blocks stand for stored data, of which a fingerprint must not have to read all.
FINGERPRINT_BLOCKS = 1024


def fingerprint(documents: "Dataset | IterableDataset") -> str:
    """A short id of the data: the same for the same data and steps, in every process.

    For python-stdlib it is the Python version and a hash of the sources; for other stored data it is that of datasets,
    which also depends on where the files lie; for a stream, a hash of its first STREAM_PROBE_ROWS rows.
    """
    if hasattr(documents, "_fingerprint"):
        return str(documents._fingerprint)
    digest = hashlib.sha256()
    for row in documents.take(STREAM_PROBE_ROWS):
        digest.update(json.dumps(row, default=lambda array: array.tolist()).encode())
    return digest.hexdigest()[:16]


def blocks_fingerprint(blocks: "Dataset | IterableDataset") -> str:
    """A short id of packed blocks, of their content alone: 16 hexadecimal digits, the same wherever the files lie.

    It is the SHA-256 of how many blocks there are and of up to FINGERPRINT_BLOCKS of them at even distances, so a change in
    one document may go unseen where the number of blocks stays. A stream has no length; its id is that of `fingerprint`.
    """
    from datasets import Dataset

    if not isinstance(blocks, Dataset):
        return fingerprint(blocks)
    # The digest is of little-endian numbers, so that it is the same on every machine.
    some = blocks.select(spread_rows(len(blocks), FINGERPRINT_BLOCKS))[:]["input_ids"]
    return hashlib.sha256(f"{len(blocks)}, ".encode() + np.asarray(some, dtype="<i4").tobytes()).hexdigest()[:16]
