"""Text -> tokenizer -> packed fixed-length blocks for language-model pretraining, in an order that can be resumed."""

import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_power.data.text import SPLIT_SEED, STREAM_PROBE_ROWS, DataArguments, cache_folder
from hf_power.records.errors import UserError
from hf_power.records.machine import children_end_with_us

END_OF_TEXT = "<|endoftext|>"  # eos, bos and unk of a trained tokenizer
TOKENIZER_CHARACTERS = 20_000_000  # a tokenizer is trained on this much text at most, about 20 MB
DOCUMENTS_PER_BATCH = 1000  # packed together; what is left over, less than one block, is dropped
FINGERPRINT_BLOCKS = 1024
STREAM_SHUFFLE_BLOCKS = 10_000  # shuffle buffer of a stream: 80 MB of int64 at 1024 tokens per block


def load_tokenizer(args: DataArguments, train: Any) -> PreTrainedTokenizerBase:
    """The tokenizer named in the arguments, or a byte-level BPE trained on the training text.

    A trained one depends on the data, vocab_size and TOKENIZER_CHARACTERS only, and is kept in the cache.

    Args:
        args: see `DataArguments`; vocab_size >= 257 (256 bytes and the end of text).
        train: documents with a "text" column; read only if a tokenizer must be trained.

    Raises:
        ValueError: if the tokenizer is not a fast one or has no eos token, or if vocab_size is below 257.

    Warns:
        UserWarning: if the text is too small to give vocab_size tokens.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        args.tokenizer or _trained_tokenizer(args, train)
    )
    if not tokenizer.is_fast:
        raise UserError(
            f"tokenizer={args.tokenizer!r} must be a fast one (tokenizer.json), got {type(tokenizer).__name__}: "
            "convert it or pass another."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer={args.tokenizer!r} must have an eos token to end documents with, got none: "
            "set eos_token in its tokenizer_config.json."
        )
    if args.tokenizer is None and len(tokenizer) < args.vocab_size:
        warnings.warn(
            f"The training text gives {len(tokenizer)} tokens, fewer than vocab_size={args.vocab_size}: "
            "size the model by len(tokenizer), or train on more text.",
            stacklevel=2,
        )
    return tokenizer


def _trained_tokenizer(args: DataArguments, train: Any) -> str:
    """Folder of the cached tokenizer, which is trained first if it is not there."""
    smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
    if args.vocab_size < smallest:
        raise UserError(f"vocab_size must be at least {smallest} (bytes and eos), got {args.vocab_size}: raise it.")
    recipe = f"byte-level BPE, {args.vocab_size} of {TOKENIZER_CHARACTERS} characters of {fingerprint(train)}"
    cache = cache_folder(args) / "hf_power_tokenizers"
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not folder.exists():
        tokenizer = _train_bpe(_sample_text(train), args.vocab_size)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            tokenizer.save_pretrained(os.path.join(temporary, "tokenizer"))
            try:
                os.rename(os.path.join(temporary, "tokenizer"), folder)
            except OSError:  # another process was first, with the same tokenizer
                if not folder.exists():
                    raise
    return str(folder)


def _sample_text(train: Any) -> Iterator[str]:
    remaining = TOKENIZER_CHARACTERS
    for row in train.shuffle(seed=SPLIT_SEED):
        text = (row["text"] or "")[:remaining]
        remaining -= len(text)
        yield text
        if not remaining:
            return


def _train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(dataset: Any, tokenizer: PreTrainedTokenizerBase, *, block_size: int, num_proc: int | None = None) -> Any:
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
        ValueError: if block_size < 1 or the data gives no block.
    """
    import datasets

    if block_size < 1:
        raise UserError(f"block_size must be at least 1 token, got {block_size}: pass the sequence length.")
    encoder = {"tokenizer_json": _tokenizer_json(tokenizer), "eos_id": tokenizer.eos_token_id}
    options: dict[str, Any] = {
        "batched": True,
        "batch_size": DOCUMENTS_PER_BATCH,
        "remove_columns": dataset.column_names or ["text"],
        "features": datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        "fn_kwargs": {**encoder, "block_size": block_size},
    }
    if isinstance(dataset, datasets.IterableDataset):
        blocks = dataset.map(_pack_batch, **options)
    else:
        blocks = _map_in_parallel(dataset, _pack_batch, options, num_proc or os.cpu_count() or 1)
    if next(iter(blocks), None) is None:
        num_tokens = sum(len(_join(rows["text"], **encoder)) for rows in dataset.iter(DOCUMENTS_PER_BATCH))
        raise UserError(
            f"The data has {num_tokens} tokens, fewer than one block of {block_size} in any "
            f"{DOCUMENTS_PER_BATCH} documents: pass more text or a smaller block_size."
        )
    return blocks.with_format("numpy")


def pack_both(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, train: Any, held_out: Any, max_eval_tokens: int
) -> tuple[Any, Any, dict[str, Any]]:
    """Training blocks, held-out blocks spread over their data, and what a record says of both.

    Args:
        args: see `DataArguments`.
        tokenizer: a fast tokenizer with an eos token.
        train: documents, see `pack`.
        held_out: documents, see `pack`.
        max_eval_tokens: held-out tokens to keep, at least one block.

    Returns:
        Blocks, held-out blocks, {"dataset", "local", "fingerprint", "tokenizer", "held_out_tokens"}.
    """
    block = args.block_size
    blocks = pack(train, tokenizer, block_size=block, num_proc=args.num_proc)
    scored = pack(held_out, tokenizer, block_size=block, num_proc=args.num_proc)
    scored = spread_blocks(scored, max(1, max_eval_tokens // block))
    return (
        blocks,
        scored,
        {
            "dataset": args.dataset,
            "local": Path(args.dataset).exists(),
            "fingerprint": blocks_fingerprint(blocks),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "held_out_tokens": len(scored) * block,
        },
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short id of how a fast tokenizer cuts text: 16 hexadecimal digits of the SHA-256 of its tokenizer.json.

    It does not change with padding, truncation, the folder it was loaded from, or a save and load.
    """
    return hashlib.sha256(_tokenizer_json(tokenizer).encode()).hexdigest()[:16]


def _tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    # datasets caches by a hash of the arguments, and a tokenizer's hash changes once it has padded or truncated.
    raw: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.no_truncation()
    raw.no_padding()
    return str(raw.to_str())


def _map_in_parallel(dataset: Any, function: Any, options: dict[str, Any], num_proc: int) -> Any:
    """Dataset.map whose batches, and so whose result, are the same for any number of processes.

    map gives each process one contiguous share and batches within it, so shares must be whole batches: the documents
    beyond the last whole round of num_proc batches are mapped in this process.
    """
    import datasets

    num_proc = max(1, min(num_proc, len(dataset) // DOCUMENTS_PER_BATCH))
    shared = len(dataset) - len(dataset) % (num_proc * DOCUMENTS_PER_BATCH) if num_proc > 1 else 0
    parts = [(range(shared), num_proc), (range(shared, len(dataset)), None)]
    with children_end_with_us():
        return datasets.concatenate_datasets(
            [
                dataset.select(rows).map(function, num_proc=processes, desc="Tokenizing and packing", **options)
                for rows, processes in parts
                if rows
            ]
        )


def _pack_batch(rows: Any, *, block_size: int, tokenizer_json: str, eos_id: int) -> dict[str, Any]:
    tokens = _join(rows["text"], tokenizer_json=tokenizer_json, eos_id=eos_id)
    num_blocks = len(tokens) // block_size
    return {"input_ids": tokens[: num_blocks * block_size].reshape(num_blocks, block_size)}


def _join(texts: Sequence[str | None], *, tokenizer_json: str, eos_id: int) -> np.ndarray:
    """The tokens of all texts in one array, eos after each."""
    encodings = _raw_tokenizer(tokenizer_json).encode_batch_fast(
        [text or "" for text in texts], add_special_tokens=False
    )
    return np.concatenate([np.array([*encoding.ids, eos_id], dtype=np.int32) for encoding in encodings])


@functools.lru_cache(maxsize=1)
def _raw_tokenizer(tokenizer_json: str) -> Any:
    tokenizer: Any = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True  # not part of the JSON; True reads "<|endoftext|>" in a text as plain text
    return tokenizer


class BlockStream(torch.utils.data.Dataset[dict[str, np.ndarray]]):
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
        ValueError: if there are no blocks, or unless 0 <= start <= stop and seed >= 0.
    """

    def __init__(self, blocks: Any, *, seed: int, start: int, stop: int) -> None:
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

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
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
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
            self._epoch = epoch
        return self._permutation


def stream_blocks(blocks: Any, *, seed: int, start: int) -> Any:
    """The endless order of training blocks of a stream, from position start on.

    Shuffled within a buffer of STREAM_SHUFFLE_BLOCKS blocks, in the same order every epoch. Skipping to start reads and
    tokenizes again all that is skipped, and the order holds for one reading process: where start-up time or exactness
    on several ranks matters, store the data and use `BlockStream`.

    Args:
        blocks: what `pack` returned for an IterableDataset.
        seed: of the shuffle.
        start: blocks to skip, >= 0.

    Returns:
        An endless datasets.IterableDataset.
    """
    # Endless before skip: a loader that starts an epoch anew would otherwise skip anew.
    return blocks.shuffle(seed=seed, buffer_size=STREAM_SHUFFLE_BLOCKS).repeat(None).skip(start)


def spread_blocks(blocks: Any, num_blocks: int) -> Any:
    """num_blocks blocks at even distances, so that every part of the data is in an evaluation; all if there are fewer.

    A stream gives its first num_blocks, as a list.
    """
    if not hasattr(blocks, "__len__"):
        return list(blocks.take(num_blocks))
    num_blocks = min(num_blocks, len(blocks))
    return blocks.select([i * len(blocks) // num_blocks for i in range(num_blocks)])


def collate_blocks(examples: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Stack blocks to {"input_ids", "labels"}, two equal int64 tensors of shape (batch, block_size).

    The labels are not shifted: causal language models of transformers do that themselves.
    """
    input_ids = torch.from_numpy(np.stack([example["input_ids"] for example in examples])).long()
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def blocks_fingerprint(blocks: Any) -> str:
    """A short id of packed blocks, of their content alone: 16 hexadecimal digits, the same wherever the files lie.

    It is the SHA-256 of how many blocks there are and of up to FINGERPRINT_BLOCKS of them at even distances, so a change in
    one document may go unseen where the number of blocks stays. Of a stream, see `fingerprint`.
    """
    if not hasattr(blocks, "__len__"):
        return fingerprint(blocks)
    some = np.asarray(spread_blocks(blocks, FINGERPRINT_BLOCKS)[:]["input_ids"], dtype="<i4")
    return hashlib.sha256(f"{len(blocks)}, ".encode() + some.tobytes()).hexdigest()[:16]


def fingerprint(dataset: Any) -> str:
    """A short id of the data, for provenance: the same for the same data and steps, in every process.

    For python-stdlib it is the Python version and a hash of the sources; for other stored data it is that of datasets,
    which also depends on where the files lie; for a stream, a hash of its first STREAM_PROBE_ROWS rows.
    """
    if hasattr(dataset, "_fingerprint"):
        return str(dataset._fingerprint)
    digest = hashlib.sha256()
    for row in dataset.take(STREAM_PROBE_ROWS):
        digest.update(json.dumps(row, default=lambda array: array.tolist()).encode())
    return digest.hexdigest()[:16]
