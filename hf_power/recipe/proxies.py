"""The numbers of muP that the proxies of a sweep were made with, as its rows tell them."""

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


def mup_of(row: Row) -> dict[str, object]:
    """The numbers of muP that a run of the sweep was made with."""
    given = row.settings.get("mup", {}).items()
    mup: dict[str, object] = {name: v for name, v in given if v is not None and name in (*MUP, "preset", "base_config")}
    if row.settings.get("model", {}).get("model_type") != ANY:
        return {**PRESETS[str(mup.get("preset", "paper"))], **mup}
    config = cast("dict[str, object]", row.settings["model"]["model_config"])
    class_ = CONFIG_MAPPING[str(config["model_type"])]
    plain = {"form": "plain", "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
    return {**plain, "initializer_range": initializer_range(class_.from_dict(dict(config))), **mup}
