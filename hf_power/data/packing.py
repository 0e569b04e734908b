"""Documents -> blocks of one length: every document is tokenized, ended with eos, and cut with those beside it."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_power.data.order import Block, blocks_fingerprint, spread_blocks
from hf_power.data.split import Texts
from hf_power.data.text import DataArguments
from hf_power.data.tokenizer import tokenizer_fingerprint, tokenizer_json
from hf_power.records.errors import UserError
from hf_power.records.machine import children_end_with_us
from hf_power.records.run import Data

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# So many documents are packed together, and what is left over of them, less than one block, is dropped.
DOCUMENTS_PER_BATCH = 1000

OneKind = TypeVar("OneKind", "Dataset", "IterableDataset")


class _Encoder(NamedTuple):
    """How a process cuts text into tokens: values that datasets can hash and send to another process."""

    tokenizer_json: str
    eos_id: int


@dataclass(frozen=True)
class PackedText:
    """The blocks of a run, and what its record says of them.

    No training block is shuffled yet; the held-out ones are spread over their data, and of a stream a list of its first
    ones. `fingerprint` is of the training blocks, `tokenizer` the fingerprint of that; `dataset` is as the arguments
    name it.
    """

    train: "Dataset | IterableDataset"
    held_out: "Dataset | list[Block]"
    block_size: int
    dataset: str
    local: bool
    fingerprint: str
    tokenizer: str
    texts: Texts

    def about(self) -> Data:
        """What a record says of the data; of a stream, which has no length, how many documents were skipped so far."""
        about: Data = {
            "dataset": self.dataset,
            "local": self.local,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "held_out_tokens": len(self.held_out) * self.block_size,
        }
        train, held_out, counts = self.texts
        if isinstance(self.train, Sized) and isinstance(train, Sized) and isinstance(held_out, Sized):
            about |= {"documents": counts.read, "empty_documents": counts.empty}
            about |= {"train_documents": len(train), "held_out_documents": len(held_out)}
            about["train_tokens"] = len(self.train) * self.block_size
        return about | {"skipped_documents": counts.skipped}


def pack(
    dataset: "Dataset | IterableDataset",
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    num_proc: int | None = None,
) -> "Dataset | IterableDataset":
    """Tokenize documents and cut them into blocks of exactly block_size tokens.

    Every document is followed by the eos token; DOCUMENTS_PER_BATCH documents at a time are joined and cut, and the
    last tokens of such a batch, fewer than one block, are dropped. Special tokens that a text spells out are encoded as
    plain text, so eos only ever means the end of a document; a null text is an empty document. The blocks do not
    depend on num_proc, and a second call with the same data finds them in the cache.

    Args:
        dataset: documents with a "text" column, Dataset or IterableDataset.
        tokenizer: a fast tokenizer with an eos token.
        block_size: tokens per block, >= 1.
        num_proc: processes, at most one per DOCUMENTS_PER_BATCH documents; None for one per CPU, unused in a stream.

    Returns:
        A dataset of {"input_ids": (block_size,) integers} in numpy format, stored as int32.

    Raises:
        UserError: if block_size < 1 or the data gives no block.
    """
    from datasets import Dataset, IterableDataset

    if block_size < 1:
        raise UserError(f"block_size must be at least 1 token, got {block_size}: pass the sequence length.")
    encoder = _Encoder(tokenizer_json(tokenizer), tokenizer.eos_token_id)
    blocks: Dataset | IterableDataset
    if isinstance(dataset, Dataset):
        blocks = _map_in_parallel(dataset, encoder, block_size, num_proc or os.cpu_count() or 1)
    else:
        blocks = _map_batches(dataset, encoder, block_size)()
    if next(iter(blocks), None) is None:
        num_tokens = sum(len(_join(rows["text"], encoder)) for rows in dataset.iter(DOCUMENTS_PER_BATCH))
        raise UserError(
            f"The data has {num_tokens} tokens, fewer than one block of {block_size} in any "
            f"{DOCUMENTS_PER_BATCH} documents: pass more text or a smaller block_size."
        )
    blocks = blocks.with_format("numpy")
    return blocks


def pack_both(
    args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    max_eval_tokens: int,
) -> PackedText:
    """Training blocks, max_eval_tokens of held-out blocks (at least one block), and what a record says of both."""
    block = args.block_size
    blocks = pack(texts.train, tokenizer, block_size=block, num_proc=args.num_proc)
    scored = pack(texts.held_out, tokenizer, block_size=block, num_proc=args.num_proc)
    return PackedText(
        train=blocks,
        held_out=spread_blocks(scored, max(1, max_eval_tokens // block)),
        block_size=block,
        dataset=args.dataset,
        local=Path(args.dataset).exists(),
        fingerprint=blocks_fingerprint(blocks),
        tokenizer=tokenizer_fingerprint(tokenizer),
        texts=texts,
    )


def _map_in_parallel(dataset: "Dataset", encoder: _Encoder, block_size: int, num_proc: int) -> "Dataset":
    """Dataset.map whose batches, and so whose result, are the same for any number of processes.

    map gives each process one contiguous share and batches within it, so shares must be whole batches: the documents
    beyond the last whole round of num_proc batches are mapped in this process.
    """
    from datasets import Dataset, concatenate_datasets

    num_proc = max(1, min(num_proc, len(dataset) // DOCUMENTS_PER_BATCH))
    shared = len(dataset) - len(dataset) % (num_proc * DOCUMENTS_PER_BATCH) if num_proc > 1 else 0
    parts = [(range(shared), num_proc), (range(shared, len(dataset)), None)]
    with children_end_with_us():
        blocks: Dataset = concatenate_datasets(
            [
                _map_batches(dataset.select(rows), encoder, block_size)(
                    num_proc=processes, desc="Tokenizing and packing"
                )
                for rows, processes in parts
                if rows
            ]
        )
    return blocks


def _map_batches(documents: OneKind, encoder: _Encoder, block_size: int) -> Callable[..., OneKind]:
    """The map of documents to blocks, which the caller starts."""
    from datasets import Features, List, Value

    return functools.partial(
        documents.map,
        _pack_batch,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        remove_columns=documents.column_names or ["text"],
        features=Features(input_ids=List(Value("int32"))),
        fn_kwargs={"encoder": encoder, "block_size": block_size},
    )


def _pack_batch(rows: Mapping[str, Sequence[str | None]], *, encoder: _Encoder, block_size: int) -> Block:
    tokens = _join(rows["text"], encoder)
    num_blocks = len(tokens) // block_size
    return {"input_ids": tokens[: num_blocks * block_size].reshape(num_blocks, block_size)}


def _join(texts: Sequence[str | None], encoder: _Encoder) -> np.ndarray:
    """The tokens of all texts in one array, eos after each."""
    encodings = _raw_tokenizer(encoder.tokenizer_json).encode_batch_fast(
        [text or "" for text in texts], add_special_tokens=False
    )
    return np.concatenate([np.array([*encoding.ids, encoder.eos_id], dtype=np.int32) for encoding in encodings])


@functools.lru_cache(maxsize=1)
def _raw_tokenizer(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    # Without it "<|endoftext|>" in a text would become the eos token; the setting is not part of the JSON.
    tokenizer.encode_special_tokens = True
    return tokenizer
