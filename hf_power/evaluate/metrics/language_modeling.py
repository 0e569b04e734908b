"""Loss, perplexity, bits per byte and accuracy of a language model: a module for `evaluate.load`."""

import math

import datasets
import evaluate
import numpy as np

DESCRIPTION = """
Cross entropy of a causal language model and what follows from it, from sums over sequences, with every token counted
once whatever its sequence or batch:
loss = sum(nll) / sum(num_tokens) nats per token, perplexity = exp(loss), accuracy = sum(num_correct) / sum(num_tokens),
bits_per_byte = sum(nll) / ln 2 / sum(num_bytes), which models with different tokenizers can be compared by.
"""

INPUTS = """
Args:
    nll: per sequence, the sum over its scored tokens of -log(probability), in nats.
    num_tokens: per sequence, how many tokens were scored.
    num_correct: per sequence, how many of them were the most likely one.
    num_bytes: per sequence, UTF-8 bytes of text that the scored tokens stand for; -1 if unknown.
Returns:
    loss, perplexity, accuracy; and bits_per_byte unless a number of bytes is unknown or there are none.
Examples:
    >>> metric = evaluate.load("hf_power/evaluate/metrics/language_modeling.py")
    >>> sums = {"nll": [6.0, 2.0], "num_tokens": [3, 1], "num_correct": [1, 1], "num_bytes": [12, 4]}
    >>> {name: round(value, 3) for name, value in metric.compute(**sums).items()}
    {'loss': 2.0, 'perplexity': 7.389, 'accuracy': 0.5, 'bits_per_byte': 0.721}
"""


class LanguageModeling(evaluate.Metric):  # type: ignore[misc, unused-ignore]  # evaluate is untyped
    """Sums over sequences -> loss, perplexity, accuracy, bits per byte; see DESCRIPTION and INPUTS."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"nll": "float64", "num_tokens": "int64", "num_correct": "int64", "num_bytes": "int64"}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(**{name: datasets.Value(kind) for name, kind in kinds.items()}),
        )

    def _compute(
        self, nll: list[float], num_tokens: list[int], num_correct: list[int], num_bytes: list[int]
    ) -> dict[str, float]:
        # fsum rounds once, so that the order of the sequences does not matter.
        nats, tokens = math.fsum(nll), sum(num_tokens)
        if tokens < 1:
            raise ValueError(f"num_tokens must sum to at least 1, got {tokens}: score some tokens.")
        loss = nats / tokens
        metrics = {"loss": loss, "perplexity": float(np.exp(loss)), "accuracy": sum(num_correct) / tokens}
        # A tokenizer of which the bytes are not known has -1 for every sequence.
        if min(num_bytes) >= 0 and sum(num_bytes) > 0:
            metrics["bits_per_byte"] = nats / math.log(2) / sum(num_bytes)
        return metrics
