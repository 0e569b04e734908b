"""The config of any causal LM of transformers, for a check of it: from its config.json, or from YAML with `model_type: any`."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig

from hf_power.compat import PreTrainedConfig
from hf_power.mup.scale import scale_width
from hf_power.mup.shrink import shrink
from hf_power.records.errors import NotFoundError, UserError, refused_by, shown

DEEPEST = 4  # Layers of a model that is checked as it is; its rules are those of two layers.


def config_file(source: str) -> Path | None:
    """The config.json that a path names, itself or as its folder; None where the path is something else.

    Raises:
        NotFoundError: a JSON file that is not there.
    """
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json":
        return None
    if not path.is_file():
        raise NotFoundError(f"there is no config at {path}: pass a config.json, its folder, or settings (YAML).")
    return path


def config_of_file(path: Path) -> PreTrainedConfig:
    """The config in a config.json; a UserError where transformers refuses it."""
    with refused_by(f"the config {path}"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path))
    return config


def config_of_mapping(values: dict[str, object]) -> PreTrainedConfig:
    """The config of the arguments of its class, with their model_type; a UserError where transformers refuses them."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(
            f"model_config needs a model_type where that of the section model is any, e.g. qwen3, got {shown(model_type)}: "
            "give both."
        )
    with refused_by("model_config"):
        config: PreTrainedConfig = AutoConfig.for_model(**values)  # type: ignore[arg-type]
    return config


def fitting(config: PreTrainedConfig, widths: Sequence[int], fixed: Sequence[str]) -> tuple[PreTrainedConfig, bool]:
    """The config, or where it is deep or cannot have these widths the same kind with small sizes; and whether that was done."""
    if config.num_hidden_layers > DEEPEST:
        return shrink(config), True
    try:
        for width in widths:
            scale_width(config, width, fixed=fixed)
    except UserError:
        return shrink(config), True
    return config, False
