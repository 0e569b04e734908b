"""Whether the numbers of runs from elsewhere can have the units that their columns are read in."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_power.records.errors import UserError

Array = NDArray[np.float64]

# Steps of fewer tokens, and runs of fewer or more steps, are none of a language model.
MIN_TOKENS_PER_STEP = 128
MIN_STEPS, MAX_STEPS = 10, 1e7
# Nats per token: the best run of a sweep is below, for even a uniform guess over 3,000 tokens is not above.
MAX_BEST_LOSS = 8.0
MAX_LEARNING_RATE = 1.0
# The longest run of a sweep over the shortest.
MAX_RANGE = 1e5
_USUAL_STEPS = 2e4


def check_units(path: str, learning_rate: Array, tokens_per_step: Array, tokens: Array, loss: Array) -> None:
    """Raise a UserError that names the likely unit, for numbers that are no nats, tokens or rates.

    * a loss <= 0, or no loss below 8, is no cross-entropy in nats: a turned sign, or perplexities.
    * a learning rate <= 0 is a logarithm, one above 1 a percentage.
    * a batch below 128 tokens per step, or a run of more than 10 million steps, counts sequences.
    * less than 10 steps in a run: tokens count steps, millions or billions.

    Args:
        path: of the file, for the sentence.
        learning_rate, tokens_per_step, tokens: of each run, as read.
        loss: of the runs that have a finite one, nats per token.
    """
    for problem in (
        _loss(loss),
        _rate(learning_rate),
        _batch(tokens_per_step, tokens),
        _horizon(tokens, tokens_per_step),
    ):
        if problem:
            raise UserError(f"{path}: {problem}.")


def _loss(loss: Array) -> str | None:
    if not loss.size:
        return None
    if loss.min() <= 0:
        return (
            f"a loss is {loss.min():.6g}, but a cross-entropy in nats is positive: if the column holds log-likelihoods, turn "
            "their sign, and leave the loss of a failed run empty"
        )
    if loss.min() > MAX_BEST_LOSS:
        return (
            f"the lowest loss is {loss.min():.4g}, too high for nats per token: the column likely holds perplexities, take "
            "their natural logarithm"
        )
    return None


def _rate(rate: Array) -> str | None:
    if rate.min() <= 0:
        return f"a learning rate is {rate.min():.6g}, but it is positive: if the column holds logarithms, raise them"
    if rate.max() > MAX_LEARNING_RATE:
        return (
            f"the learning rates reach {rate.max():.4g}, above 1: the column likely holds percent or multiples of 0.001, "
            "give the rates themselves"
        )
    return None


def _batch(batch: Array, tokens: Array) -> str | None:
    if batch.min() < MIN_TOKENS_PER_STEP or (tokens / batch).max() > MAX_STEPS:
        return (
            f"tokens_per_step is {batch.min():.6g} to {batch.max():.6g}, too few for tokens: the column likely counts "
            "sequences, map it as batch=COLUMN and pass --block_size"
        )
    return None


def _horizon(tokens: Array, batch: Array) -> str | None:
    steps = tokens / batch
    if steps.min() >= MIN_STEPS:
        return None
    at = int(np.argmin(steps))
    seen = f"a run of {tokens[at]:.6g} tokens would have {steps[at]:.3g} steps of {batch[at]:.6g} tokens"
    if _num_kinds(tokens * batch) < _num_kinds(tokens):
        return f"{seen}: the column of tokens likely counts steps, map it as steps=COLUMN"
    if tokens.max() > MAX_RANGE * tokens.min():
        return (
            f"{seen}, and another one has {tokens.max():.6g} tokens: lines likely have other units, give all in tokens"
        )
    units: Sequence[tuple[str, float]] = (("thousands", 1e3), ("millions", 1e6), ("billions", 1e9))
    middle = float(np.exp(np.log(np.maximum(steps, 1e-300)).mean()))
    unit, factor = min(units, key=lambda unit: abs(np.log(middle * unit[1] / _USUAL_STEPS)))
    return f"{seen}: the column of tokens likely counts {unit}, multiply it by {factor:.0e}".replace("e+0", "e")


def _num_kinds(values: Array) -> int:
    """How many values differ by more than 1 %."""
    ordered = np.sort(np.log(np.maximum(values, 1e-300)))
    return 1 + int((np.diff(ordered) > 0.01).sum())
