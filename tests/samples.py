"""Whole records that several tests change or break."""

import random

from hf_power import Recipe
from hf_power.records.rows import Row

LAW = {"a": 0.013, "b": -0.3, "batch_exponent": 0.7, "critical_batch_tokens": 131_072.0}
FULL = Recipe(
    a=0.012,
    b=-0.3,
    batch_exponent=0.7,
    critical_batch_tokens=131_072.0,
    max_lr=0.05,
    weight_decay=0.05,
    model_type="llama",
    tokenizer="0123456789abcdef",
    warmup_tokens=65_536,
    decay_ratio=0.2,
    decay_shape="linear",
    base_num_layers=4,
    laws={"warmup_stable_decay": LAW, "cosine": LAW | {"a": 0.02, "critical_batch_tokens": None}},
    intervals={"a": [0.01, 0.015], "b": [-0.35, -0.25], "batch_exponent": [0.7, 0.7], "critical_batch_tokens": None},
    samples=[[a, -0.3, 0.7, None, 0.0, 0.0] for a in (0.012, 0.014, 0.013)],
    validity={
        "widths": [64, 128],
        "tokens_per_step": [2048, 16_384],
        "tokens": [500_000, 8_000_000],
        "extrapolates_to": {"tokens": 64_000_000, "tokens_per_step": 65_536, "sd_octaves": 0.25},
    },
    provenance={"sweep_sha256": "abc", "versions": {"torch": "2"}},
)
ROW = {"schema": 1, "id": "a1", "status": "finished", "reason": None, "model_type": "llama", "width": 64}
ROW |= {"parameters": 100_000, "parameters_without_embeddings": 60_000, "tokens_per_step": 8192, "tokens": 1_000_000}
ROW |= {"schedule": "warmup_stable_decay", "learning_rate": 0.01, "law": None, "max_lr": 0.02, "warmup_tokens": 100_000}
ROW |= {"decay_tokens": 100_000, "decay_shape": "exponential", "weight_decay": 0.1, "seed": 0, "loss": 3.5}
ROW |= {"train_loss": 3.4, "trunk": "t1", "trained_tokens": 1_000_000, "flops_per_token": 4e5, "seconds": 2.5}
ROW |= {"block_size": 256, "settings": {"run": {"tokens": "1M"}}}
ROW |= {"data": {"dataset": "d", "fingerprint": "f", "tokenizer": "t", "held_out_tokens": 200_000}}
ROW |= {"versions": {"torch": "2"}, "hardware": {"device": "cpu"}}


def record(**changes):
    """A row as a value."""
    return Row.of({k: v for k, v in (ROW | changes).items() if k != "schema"}, "a row")


def synthetic_rows():
    """A sweep around 3 * beta**.7 * T**-.4, with half of that for power; all numbers are short, so no last digit varies."""
    rows = []
    for width in (32, 64):
        for batch in (256, 1024):
            for tokens in (131_072, 262_144, 524_288):
                for schedule in ("warmup_stable_decay", "power"):
                    for octaves in (-1.6, -0.6, 0.4, 1.4):
                        rows += [synthetic_row(width, batch, tokens, schedule, octaves, seed) for seed in (0, 1)]
    rows[6] |= {"status": "diverged", "reason": "the training loss was not finite", "loss": None, "train_loss": None}
    return rows


def synthetic_row(width, batch, tokens, schedule, octaves, seed):
    best = 3 * (batch / 4096) ** 0.7 * tokens**-0.4
    law = None
    rate = float(f"{best * 2**octaves:.4g}")
    if schedule == "power":
        law = {"a": float(f"{1.5 * 2**octaves:.4g}"), "b": -0.4, "batch_exponent": 0.7}
        rate = float(f"{best / 2 * 2**octaves:.4g}")
    luck = random.Random(f"{width} {batch} {schedule} {octaves} {seed}").random()
    loss = round(3 + 4 * (tokens / 1e6) ** -0.3 + 0.03 * octaves**2 + 0.004 * (luck - 0.5), 5)
    trunk = f"{schedule}-{width}-{batch}-{octaves}-{seed}"
    row = {"id": f"{trunk}-{tokens}", "width": width, "parameters": 1250 * width}
    row |= {"parameters_without_embeddings": 750 * width, "tokens_per_step": batch, "tokens": tokens}
    row |= {"schedule": schedule, "learning_rate": rate, "law": law, "max_lr": 0.05 if law else rate}
    row |= {"warmup_tokens": 8192, "decay_tokens": round(0.2 * tokens / batch) * batch, "decay_shape": "1-sqrt"}
    row |= {"seed": seed, "loss": loss, "train_loss": loss, "trunk": trunk, "trained_tokens": tokens}
    row |= {"flops_per_token": 3e5, "seconds": 1.0, "block_size": 64, "versions": {"hf_power": "0"}}
    row |= {"settings": {"model": {"hidden_size": width}, "mup": {"base_width": 32, "preset": "power_of_two"}}}
    return ROW | row | {"data": {"dataset": "d", "fingerprint": "f", "tokenizer": "t", "held_out_tokens": 1000}}
