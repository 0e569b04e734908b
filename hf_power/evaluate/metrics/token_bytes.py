"""How many bytes of text each token stands for."""

import json
import re

import numpy as np
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

SPACE_MARK = "\u2581"  # This is how SentencePiece writes a space.


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray | None:
    """UTF-8 bytes of every token of a fast tokenizer, by id.

    Special tokens stand for none. The sum over a text's tokens is ``len(text.encode())`` for a tokenizer that keeps the
    text as it is; one that writes a space before each document counts that space, one that normalizes (NFC) counts the
    normalized text.

    Args:
        tokenizer: a fast tokenizer of transformers.

    Returns:
        int64 of shape (largest id + 1,); None for a tokenizer that is neither a byte-level BPE nor of SentencePiece's
        kind with byte fallback: its unknown token can stand for any text.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in parts["added_tokens"]}
    special = {token["id"] for token in added.values() if token["special"]} | set(tokenizer.all_special_ids)
    decoder = parts["decoder"] or {"type": None}
    # Byte-level BPE and SentencePiece with byte fallback are told apart by the decoder, for both are called BPE.
    byte_level = "ByteLevel" in [step["type"] for step in decoder.get("decoders", [decoder])]
    if not byte_level and not parts["model"].get("byte_fallback"):
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    vocab = tokenizer.get_vocab()
    table = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    for token, index in vocab.items():
        if index in special:
            continue
        # An added token stands in the text as it is spelled, and not in the alphabet of the model's own tokens.
        if index in added:
            table[index] = len(token.encode())
        elif byte_level:
            if not set(token) <= alphabet:
                return None
            table[index] = len(token)  # Each character of that alphabet is one byte.
        else:
            is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            table[index] = 1 if is_byte else len(token.replace(SPACE_MARK, " ").encode())
    return table
