"""Held-out loss beside n-gram baselines from the same tokens."""

from typing import Any

import numpy as np


def ngram_losses(train_blocks: Any, held_out_blocks: Any, vocab_size: int) -> dict[str, float]:
    """Loss of a unigram and a bigram model on the positions that a causal model is scored on.

    Unigram: ``P1(w) = (N(w) + 1) / (N + V)`` (add-one). Bigram: Witten-Bell,
    ``P2(w | v) = (N(v, w) + T(v) * P1(w)) / (N(v) + T(v))`` with T(v) the number of distinct successors of v; after a
    token that was never seen, P1.

    Args:
        train_blocks: token ids the counts come from, shape (blocks, block_size).
        held_out_blocks: token ids to be scored, shape (blocks, block_size); the first of each block is context only.
        vocab_size: V.

    Returns:
        {"unigram": nats per token, "bigram": nats per token}.

    >>> losses = ngram_losses([[0, 1, 0, 1]], [[0, 1]], vocab_size=2)
    >>> round(float(np.exp(-losses["unigram"])), 4), round(float(np.exp(-losses["bigram"])), 4)  # 3/6, (2 + .5)/(2 + 1)
    (0.5, 0.8333)
    """
    train, held_out = np.asarray(train_blocks, dtype=np.int64), np.asarray(held_out_blocks, dtype=np.int64)
    counts = np.bincount(train.ravel(), minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    pairs, pair_counts = np.unique(train[:, :-1].ravel() * vocab_size + train[:, 1:].ravel(), return_counts=True)
    contexts = pairs // vocab_size
    seen = np.bincount(contexts, weights=pair_counts, minlength=vocab_size)
    distinct = np.bincount(contexts, minlength=vocab_size)

    context, target = held_out[:, :-1].ravel(), held_out[:, 1:].ravel()
    wanted = context * vocab_size + target
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, pair_counts[place], 0)
    weight = np.maximum(distinct[context], seen[context] == 0)  # never seen: all weight on the unigram
    bigram = (count + weight * unigram[target]) / (seen[context] + weight)
    return {"unigram": float(-np.log(unigram[target]).mean()), "bigram": float(-np.log(bigram).mean())}
