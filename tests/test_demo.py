"""The n-gram losses that the demo compares its model with."""

import doctest
import importlib.util
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sentences import refused

from hf_power.records.errors import UserError


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parent.parent / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documented_values(demo):
    failed, attempted = doctest.testmod(demo)
    assert (failed, attempted) == (0, 2)


@pytest.mark.parametrize(
    ("changed", "got"),
    [
        (["--tokens", "200k"], "200,000 tokens are 196 steps with one checkpoint (save_steps=200)"),
        (["--tokens", "204.8k"], "are 200 steps"),
        (["--save_steps", "1200"], "are 1,172 steps"),
        (["--save_strategy", "no"], "got save_strategy=no"),
    ],
)
def test_a_trunk_without_two_checkpoints(demo, tmp_path, changed, got):
    """The tail begins at the last but one: said before anything is trained."""
    with refused(UserError, got):
        demo.main(["--output_dir", str(tmp_path / "demo"), *changed])
    assert not list(tmp_path.iterdir())


def slow(train, held_out, vocab):
    """Counting in dictionaries, a position at a time."""
    ones = Counter(t for block in train for t in block)
    twos = Counter(pair for block in train for pair in pairwise(block))
    total = sum(ones.values())
    losses = {"unigram": [], "bigram": []}
    for block in held_out:
        for v, w in pairwise(block):
            p1 = (ones[w] + 1) / (total + vocab)
            after = {pair: n for pair, n in twos.items() if pair[0] == v}
            p2 = (twos[v, w] + len(after) * p1) / (sum(after.values()) + len(after)) if after else p1
            losses["unigram"].append(-math.log(p1))
            losses["bigram"].append(-math.log(p2))
    return {name: sum(values) / len(values) for name, values in losses.items()}


@pytest.mark.parametrize("seed", range(5))
def test_against_counting_by_hand(demo, seed):
    rng = np.random.default_rng(seed)
    train, held_out = rng.integers(0, 12, (6, 9)).tolist(), rng.integers(0, 15, (4, 7)).tolist()
    assert demo.ngram_losses(train, held_out, 15) == pytest.approx(slow(train, held_out, 15), rel=1e-12)


def test_both_are_distributions(demo):
    """Summed over all next tokens, the probabilities of either model are 1."""
    train = [[0, 1, 2, 1, 0, 1]]
    for context in range(5):
        each = [demo.ngram_losses(train, [[context, w]], 5) for w in range(5)]
        for name in ("unigram", "bigram"):
            assert sum(math.exp(-loss[name]) for loss in each) == pytest.approx(1.0, rel=1e-12)
