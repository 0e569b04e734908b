"""The config of any causal LM of transformers, of YAML with `model_type: any`, or of its config.json."""

import difflib
import functools
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from hf_power.checkpoints.older import older_names
from hf_power.compat import IS_4, PreTrainedConfig, arguments_of
from hf_power.mup.scale import GROWING, scale_width
from hf_power.mup.shrink import shrink
from hf_power.records.errors import NotFoundError, UserError, refused_by, shown
from hf_power.records.files import parse_json

WIDTHS = (64, 128, 256, 512)  # Of a coordinate check.
DEEPEST = 4  # Layers of a model that is checked as it is; its rules are those of two layers.
# What a published config.json says of its file, its code and its tokenizer, and not of the shape of the model.
OF_THE_FILE: tuple[str, ...] = (
    "architectures",
    "auto_map",
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
)
OF_THE_FILE += ("use_cache", "quantization_config")
OF_THE_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "tokenizer_class")
# Arguments that configs take beside their fields, as files of older versions have them.
BESIDE = {"model_type", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "attn_implementation"}


# What people call a thing elsewhere, where no letters would tell.
SYNONYMS = {
    "batch_size": "per_device_train_batch_size",
    "context_length": "block_size",
    "d_model": "hidden_size",
    "lr": "learning_rate",
    "max_length": "block_size",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "scheduler": "lr_scheduler_type",
    "seq_len": "block_size",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
    "wsd": "warmup_stable_decay",
}


def unknown_key(what: str, name: str, known: list[str]) -> str:
    """The sentence for a key that is not known, with the one that is meant or is nearest."""
    said = SYNONYMS.get(name.lower())
    near = [said] if said in known else difflib.get_close_matches(name, known, n=1)
    return f"{what} is unknown" + (
        f": did you mean {near[0]}?" if near else f": use one of {', '.join(known[:12])} ..."
    )


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
    config = config_of_mapping(mapping_of(str(path), str(path)), str(path))
    # Without the file's own the class has one, which need not be among the rows of the embedding.
    config.pad_token_id = None
    return config


def mapping_of(source: object, where: str) -> dict[str, object]:
    """The arguments of a causal LM's config with its model_type, in a mapping, in JSON, or in a config.json or its folder.

    A file is of a published model, whose token ids, dtype and versions are left out, because they belong to its tokenizer
    and its weights. Of a config of several models the text's alone is taken. `where` names the source in errors.

    Raises:
        UserError: no mapping, a model_type that transformers does not have, or a name that its config does not know.
    """
    if source is None:
        raise UserError(
            f"model_type any needs a {where}: give a mapping of config arguments or the path of a config.json."
        )
    if isinstance(source, str) and not source.lstrip().startswith("{"):
        if (path := config_file(source)) is None:
            raise UserError(f"{where} must be a mapping of config arguments or a config.json, got {shown(source)}.")
        content = parse_json(path.read_bytes(), str(path), "pass the config.json of a model")
        if isinstance(content, dict) and "schema" in content:
            raise UserError(f"{path} is a record that hf-power wrote and no config: pass the config.json of a model.")
        return _text_of(content, str(path))
    if isinstance(source, str):
        source = parse_json(source.encode(errors="replace"), where, "give a mapping of config arguments")
    if not isinstance(source, Mapping):
        raise UserError(f"{where} must be a mapping of config arguments, got {shown(source)}: correct it.")
    values = {str(name): value for name, value in source.items()}
    kind = config_class(values, where)
    values = with_own_rope(values, kind)
    names = names_of_config(kind)
    for name in values:
        if name not in names and name not in BESIDE:
            raise UserError(unknown_key(f"{where}.{name}", name, sorted(names)))
    return {names.get(name, name): value for name, value in values.items()}


def with_own_rope(values: dict[str, Any], kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """The arguments of a config with rope_parameters under the names that transformers 4 has for them, where that is installed.

    It would refuse them, or leave them out of a config.json without a word. This can go when the floor is 5.0.
    """
    if not IS_4 or not isinstance(values.get("rope_parameters"), dict):
        return values
    known = arguments_of(kind)
    added = older_names(values | {"model_type": kind.model_type})
    others = {name: value for name, value in values.items() if name != "rope_parameters"}
    # A scaling that the class does not know stays, so that it is refused by name.
    return others | {name: value for name, value in added.items() if name in known or isinstance(value, dict)}


def names_of_config(kind: type[PreTrainedConfig]) -> dict[str, str]:
    """The names that a config knows -> the one among its arguments: an alias beside it would be a second value."""
    own = arguments_of(kind)
    # In most families the alias stands for an argument; in some it is the argument.
    pairs = [pair for alias, name in kind.attribute_map.items() for pair in ((alias, name), (name, alias))]
    aliases = {other: name for other, name in pairs if name in own and other not in own}
    return {name: name for name in own | _read_by_the_model(kind.model_type)} | aliases


@functools.cache
def _read_by_the_model(model_type: str) -> frozenset[str]:
    """Names that the code of a config's causal LM reads and its class need not declare, such as head_dim of Qwen3-MoE."""
    kind = CONFIG_MAPPING[model_type]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return frozenset()
    source = inspect.getsource(sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[kind].__module__])
    return frozenset(re.findall(r"config(?:\.|, \")(\w+)", source))


def _text_of(content: object, where: str) -> dict[str, object]:
    """What a config.json says of the shape of its text model."""
    if not isinstance(content, dict):
        raise UserError(
            f"{where} must hold the mapping of a config, got {shown(content)}: pass the config.json of a model."
        )
    kind = config_class(content, where)
    with refused_by(f"the config {where}"):
        text = kind.from_dict(dict(content)).get_text_config(decoder=True)
    if type(text) is not kind:
        part = next((value for name, value in content.items() if "text" in name and isinstance(value, dict)), {})
        content, kind = {**part, "model_type": text.model_type}, type(text)
    content = {name: value for name, value in content.items() if name not in (*OF_THE_FILE, *OF_THE_TOKENIZER)}
    content = with_own_rope(content, kind)
    # A file may have names that its config does not know, and older names of some that it does.
    names = names_of_config(kind) | {"model_type": "model_type"}
    known = {names[name]: value for name, value in content.items() if name in names}
    with refused_by(f"the config {where}"):
        whole, without = kind.from_dict(dict(content)).to_dict(), kind.from_dict(dict(known)).to_dict()
    renamed = {name: value for name, value in whole.items() if name in without and without[name] != value}
    return known | renamed


def config_class(values: Mapping[str, object], where: str) -> type[PreTrainedConfig]:
    """The class of a config, by its model_type."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise UserError(
            f"{where} needs a model_type where that of the section model is any, e.g. qwen3, got {shown(kind)}: give both."
        )
    if kind not in CONFIG_MAPPING:
        why = "brings its own code (auto_map), which hf_power does not run" if "auto_map" in values else "is unknown"
        raise UserError(f"model_type {shown(kind)} of {where} {why}: use a model type of transformers.")
    found: type[PreTrainedConfig] = CONFIG_MAPPING[kind]
    return found


def config_of_mapping(values: Mapping[str, object], where: str = "model_config") -> PreTrainedConfig:
    """The config of what `mapping_of` gives; a UserError where transformers refuses it or it is of no causal LM."""
    kind = config_class(values, where)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model_type {kind.model_type} of {where} is no causal language model: give that of one.")
    with refused_by(where):
        # `from_dict` also reads what files of older versions say.
        return kind.from_dict(dict(values))


def sizes_of(config: PreTrainedConfig, other: PreTrainedConfig) -> dict[str, object]:
    """The values of another config of the same class that differ from those of a config."""
    own = config.to_dict()
    return {name: value for name, value in other.to_dict().items() if own.get(name) != value}


def fixed_sizes(config: PreTrainedConfig, base: PreTrainedConfig) -> tuple[str, ...]:
    """Sizes that do not grow with the width, as two configs of different hidden_size tell."""
    if config.hidden_size == base.hidden_size:
        return ()
    pairs = ((name, getattr(config, name, None), getattr(base, name, None)) for name in GROWING)
    return tuple(name for name, one, two in pairs if one is not None and one == two)


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
