"""The model to be exported, read and checked before any work: `find_source`, `read_donor`, `tensor_files`, `stored_dtype`."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors

from hf_power.checkpoints.locate import find_model, shards
from hf_power.compat import PreTrainedConfig
from hf_power.export.fold import WEIGHTS, Reader, mup_name, plain_names
from hf_power.models import FAMILIES, MULTIPLIERS, Family, head_dim, kind_of, num_experts
from hf_power.mup.rules import RECORD
from hf_power.records.errors import NotFoundError, UserError, refused_by
from hf_power.records.files import read_object
from hf_power.records.results import EXPORT_FILE, Export
from hf_power.records.schema import Json

# What two models must have in common for one to take the multipliers of the other.
SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("num_local_experts", "tie_word_embeddings"),
)
# safetensors' name of each type that weights can be folded in.
_STORED = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Source:
    """A model whose family has a counterpart, the family `to`; `name` is for the record, and `raw` its config.json."""

    folder: Path
    name: str
    family: Family
    to: Family
    config: PreTrainedConfig
    raw: dict[str, Json]


def find_source(model: str | os.PathLike[str], to: Family) -> Source:
    """The model, known to have a counterpart in the family `to`; a UserError for one that it cannot express."""
    folder, about = find_model(model)
    raw = read_object(folder / "config.json", schema=None, remedy="pass the folder of a model")
    kind = raw.get("model_type")
    family = FAMILIES.get(str(kind))
    if raw.get(RECORD) is not None:
        raise UserError(
            f"{folder} was made with the plain form of muP: it is a stock {kind} already, so there is nothing to export: load or "
            "publish it as it is."
        )
    if family is None:
        raise UserError(
            f"{folder / 'config.json'} is of model_type {kind!r}, which cannot be exported: pass one of {', '.join(FAMILIES)}."
        )
    if to.model_type != family.twin:
        raise UserError(
            f"{folder} is a {kind} model and exports to {family.twin}, not to {to.model_type}: pass {family.twin}."
        )
    # transformers would load the adapter with the model, and the proof would compare something that is not exported.
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter beside the model: merge it into the weights and save the result.")
    config_class = family.config_class
    with refused_by(str(folder / "config.json")):
        config = config_class.from_dict(raw)
    _check_expressible(config, family, to, folder)
    return Source(folder, str(about["name"]), family, to, config, raw)


def _check_expressible(config: PreTrainedConfig, family: Family, to: Family, folder: Path) -> None:
    # Each of these changes the forward pass of one family and is unknown to the other, so that it would be lost.
    for name in ("sliding_window", "router_jitter_noise", "attention_bias"):
        # Llama and Granite have biases of attention, the mixtures have not.
        has_counterpart = name == "attention_bias" and not family.has_experts
        if getattr(config, name, None) and not has_counterpart:
            raise UserError(
                f"{name}={getattr(config, name)} of {folder} has no counterpart in {to.model_type}: only a model without "
                "it can be exported."
            )
    if to.model_type == "llama" and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} of {folder} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}, which Llama asks for: export a model whose sizes divide."
        )
    if family.has_multipliers:
        _check_multipliers(config, folder)


def _check_multipliers(config: PreTrainedConfig, where: Path) -> None:
    for key in MULTIPLIERS:
        value = getattr(config, key)
        # A multiplier of zero cannot be taken back out of a weight, and a negative one has no power of two near it.
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{key} of {where} must be a positive number, got {value!r}: correct its config.json.")


def read_donor(source: Source, like: str | os.PathLike[str] | None) -> PreTrainedConfig:
    """The config of the muP model `like` (a folder or config.json) whose multipliers a plain model gets back.

    None stands for what the source's own export.json says.
    """
    to, folder = source.to.model_type, source.folder
    if like is None:
        where = folder / EXPORT_FILE
        if not where.exists():
            raise UserError(
                f"{folder} has no {EXPORT_FILE} that holds multipliers: pass like, the folder or config.json of the muP "
                "model."
            )
        raw = Export.load(folder).source_config
    else:
        where = Path(like) / "config.json" if Path(like).is_dir() else Path(like)
        raw = read_object(where, schema=None, remedy=f"pass the folder or config.json of a {to} model as like")
    if raw.get("model_type") != to:
        raise UserError(f"{where} has the multipliers of model type {raw.get('model_type')!r}, not {to!r}: pass like.")
    config_class = source.to.config_class
    with refused_by(str(where)):
        donor = config_class.from_dict(raw)
    _check_multipliers(donor, where)
    ours, theirs = _shape(source.config), _shape(donor)
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"{name} is {value} in {folder} and {theirs[name]} in {where}: take the multipliers of a model of the "
                "same shape."
            )
    return donor


def _shape(config: PreTrainedConfig) -> dict[str, object]:
    return {name: getattr(config, name, None) for name in SHAPE} | {"head_dim": head_dim(config)}


def tensor_files(source: Source) -> dict[str, Path]:
    """The file of every tensor of a model, in the files' order; each is known to have a rule.

    A tied head that was saved beside the embedding is left out, as save_pretrained does.
    """
    folder = source.folder
    # The files are opened, and the index is not believed: it may name tensors that are not there.
    files: dict[str, Path] = {}
    for path in shards(folder) or [folder / WEIGHTS]:
        if not path.is_file():
            raise NotFoundError(f"there is no {path}: pass the folder of a model that was saved as safetensors.")
        with safetensors.safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    if not files:
        raise UserError(f"{folder} holds no tensors: pass a folder that was saved whole.")
    if source.config.tie_word_embeddings:
        files.pop("lm_head.weight", None)
    experts = num_experts(source.config)
    # Each tensor of a muP model holds whole tensors of the plain one, so that rules are asked for under the plain names.
    for name in files:
        parts = plain_names(mup_name(name) if source.to.has_multipliers else name, experts)
        if any(kind_of(part) is None for part in parts):
            raise UserError(
                f"there is no rule for the tensor {name} of {folder}: export takes the tensors of Granite, GraniteMoe, "
                "Llama and Mixtral and no others."
            )
        missing = next((part for part in parts if part not in files), None)
        if source.to.has_multipliers and missing:
            raise UserError(f"the tensor {missing} is missing in {folder}: pass a folder that was saved whole.")
    return files


def stored_dtype(files: dict[str, Path], folder: Path, dtype: str | None) -> str:
    """The dtype asked for, or that of the tensors, which must be one."""
    reader = Reader(files)
    stored = {reader.dtype(name) for name in files}
    if not stored <= _STORED.keys():
        raise UserError(
            f"{folder} has tensors of type {min(stored - _STORED.keys())}, which cannot be multiplied: export the model "
            "before it is quantized."
        )
    if dtype is None and len(stored) > 1:
        raise UserError(f"{folder} has tensors of the types {', '.join(sorted(stored))}: pass the dtype to export to.")
    return dtype or _STORED[stored.pop()]
