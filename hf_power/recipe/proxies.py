"""The settings that the proxies of a sweep were made with, as its rows tell them."""

from collections.abc import Sequence
from typing import cast

from transformers import CONFIG_MAPPING

from hf_power.models import ANY
from hf_power.mup.config import PRESETS
from hf_power.mup.init import initializer_range
from hf_power.records.rows import Row

MUP = (
    *("base_width", "embedding_multiplier", "residual_multiplier", "initializer_range"),
    *("attention_multiplier", "base_intermediate_size", "base_attention_width"),
    *("base_head_dim", "base_num_layers"),
)


def _mup_of(row: Row) -> dict[str, object]:
    """The numbers of muP that a run of the sweep was made with."""
    given = row.settings.get("mup", {}).items()
    mup: dict[str, object] = {name: v for name, v in given if v is not None and name in (*MUP, "preset", "base_config")}
    if row.settings.get("model", {}).get("model_type") != ANY:
        return {**PRESETS[str(mup.get("preset", "paper"))], **mup}
    config = cast("dict[str, object]", row.settings["model"]["model_config"])
    class_ = CONFIG_MAPPING[str(config["model_type"])]
    plain = {"form": "plain", "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
    return {**plain, "initializer_range": initializer_range(class_.from_dict(dict(config))), **mup}


def proxies_settings(rows: Sequence[Row]) -> dict[str, object]:
    """What the runs of the sweep were made with, as far as their rows tell."""
    first = rows[0]
    names = ("model_type", "weight_decay", "decay_shape")
    found: dict[str, object] = {name: value for name in names if (value := getattr(first, name)) is not None}
    if first.warmup_tokens is not None:
        # Warmups are whole steps, and that of the smallest batch comes nearest to what was asked for.
        found["warmup_tokens"] = max(row.warmup_tokens or 0 for row in rows)
    found["tokenizer"] = first.data.get("tokenizer")
    if first.settings:
        found |= _mup_of(first)
    if first.decay_tokens is not None:
        longest = max(rows, key=lambda row: row.tokens / row.tokens_per_step)
        steps = longest.tokens // longest.tokens_per_step
        tail = (longest.decay_tokens or 0) // longest.tokens_per_step
        # A tail is a whole number of steps: the shortest ratio that gives it is the one that was asked for.
        ratios = (round(tail / steps, digits) for digits in range(1, 16))
        found["decay_ratio"] = next((ratio for ratio in ratios if round(ratio * steps) == tail), tail / steps)
    return found
