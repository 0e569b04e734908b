"""The tokenizer of a run: one that is named, or a byte-level BPE that is trained on the training text."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_power.data.files import TOKENIZER_CACHE
from hf_power.data.order import fingerprint
from hf_power.data.store import made_once
from hf_power.data.text import SPLIT_SEED, DataArguments, cache_folder
from hf_power.records.errors import UserError, reason, refused_by
from hf_power.records.files import refuse_pointer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# A trained tokenizer has this one token for eos, bos and unk.
END_OF_TEXT = "<|endoftext|>"
# A tokenizer is trained on so much text at most, about 20 MB.
TOKENIZER_CHARACTERS = 20_000_000


def load_tokenizer(args: DataArguments, train: "Dataset | IterableDataset | None") -> PreTrainedTokenizerBase:
    """The tokenizer named in the arguments, or a byte-level BPE trained on the training text and kept in the cache.

    A trained one depends on the data, vocab_size and TOKENIZER_CHARACTERS only.
    The documents `train` may be None where the arguments name a tokenizer.

    Raises:
        UserError: if the tokenizer cannot be read, is not a fast one, or has no eos token.

    Warns:
        UserWarning: if the text is too small to give vocab_size tokens.
    """
    named = args.tokenizer
    if not named:
        if train is None:
            raise TypeError("load_tokenizer needs the training text where no tokenizer is named.")
        named = _trained_tokenizer(args, train)
    tokenizer = _opened(named)
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


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for every token: the largest id and one more.

    It is more than ``len(tokenizer)`` where ids were left out, as in a vocabulary with a reserved range.
    """
    return 1 + max(tokenizer.get_vocab().values())


def check_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int, model: str) -> None:
    """Raise a UserError unless every id of the tokenizer is below the vocab_size of a model, which may be larger."""
    if (needed := num_token_ids(tokenizer)) > vocab_size:
        raise UserError(
            f"the tokenizer has token ids up to {needed - 1}, but {model} has a vocab_size of {vocab_size}, so the ids "
            f"from {vocab_size} on have no embedding: raise vocab_size to {needed} or more, or pass a smaller tokenizer."
        )


def _opened(named: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of the Hub; a UserError that names the file if it is a pointer of Git LFS."""
    for path in sorted(Path(named).glob("*")) if Path(named).is_dir() else []:
        if path.name.startswith(("token", "vocab", "merges", "special_tokens", "added_tokens")) and path.is_file():
            refuse_pointer(path)
    try:
        with refused_by(f"the tokenizer of {named}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(named, trust_remote_code=False)
    except Exception as error:
        # The library tokenizers has no type for a file that it cannot read.
        if type(error) is not Exception:
            raise
        raise UserError(f"the tokenizer of {named} cannot be used: {reason(error)}.") from error
    return tokenizer


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer.json of a fast tokenizer, without padding and truncation.

    datasets caches by a hash of the arguments, and the hash of a tokenizer changes once it has padded or truncated.
    """
    raw = Tokenizer.from_str(_backend(tokenizer).to_str())
    raw.no_truncation()
    raw.no_padding()
    return str(raw.to_str())


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short id of how a fast tokenizer cuts text: 16 hexadecimal digits of the SHA-256 of its tokenizer.json.

    It does not change with padding, truncation, the folder it was loaded from, or a save and load.
    """
    return hashlib.sha256(tokenizer_json(tokenizer).encode()).hexdigest()[:16]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise TypeError(f"a fast tokenizer is needed, got {type(tokenizer).__name__}.")
    return backend


def _trained_tokenizer(args: DataArguments, train: "Dataset | IterableDataset") -> str:
    """Folder of the cached tokenizer, which is trained first if it is not there."""
    recipe = f"byte-level BPE, {args.vocab_size} of {TOKENIZER_CHARACTERS} characters of {fingerprint(train)}"
    folder = cache_folder(args) / TOKENIZER_CACHE / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    return str(made_once(folder, lambda made: train_bpe(_sample_text(train), args.vocab_size).save_pretrained(made)))


def _sample_text(train: "Dataset | IterableDataset") -> Iterator[str]:
    remaining = TOKENIZER_CHARACTERS
    rows: Iterable[dict[str, str | None]] = train.shuffle(seed=SPLIT_SEED)
    for row in rows:
        text = (row["text"] or "")[:remaining]
        remaining -= len(text)
        yield text
        if not remaining:
            return


def train_bpe(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens, trained on the texts; its end of text is its beginning and unknown token too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
