"""Granite and GraniteMoe as plain Llama and Mixtral, and back: muP's multipliers move into the weights."""

import math
import os
import platform
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from hf_power.checkpoints.locate import find_model
from hf_power.checkpoints.seal import RUN_FILE
from hf_power.export.fold import (
    INDEX,
    MULTIPLIERS,
    PLAIN_FAMILIES,
    WEIGHTS,
    Reader,
    fold_factors,
    kind_of,
    mup_name,
    plain_names,
    write_weights,
)
from hf_power.export.proof import DTYPES, FAMILIES, fixed_logits, proof_rule
from hf_power.records.errors import NotFoundError, UserError, refused_by, shown
from hf_power.records.files import write_json
from hf_power.records.schema import read_object
from hf_power.version import __version__

SCHEMA = 1
EXPORT_FILE = "export.json"
PLAIN = {"granite": "llama", "granitemoe": "mixtral"}
MUP = {plain: mup for mup, plain in PLAIN.items()}
SHAPE = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("num_local_experts", "tie_word_embeddings"),
)
_COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", RUN_FILE, "recipe.json"),
)


def export_model(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    to: str,
    *,
    dtype: str | None = None,
    like: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Write a Granite or GraniteMoe model as a plain Llama or Mixtral with the same logits, or the way back.

    The tensors pass one after the other, multiplied in float64 and rounded once. The result is then proved: both models
    are loaded, one after the other, and compute the logits of 2 x 64 seeded token ids; beyond the tolerance of the dtype
    nothing is left behind. The proof holds one whole model in memory, at 8 bytes per parameter for float32 and float64
    weights, 4 for bfloat16 and float16 (2 where bits are compared).

    Args:
        source: run folder, checkpoint-N folder, or id of a model on the Hub.
        output_dir: new or empty folder.
        to: "llama" (from Granite) or "mixtral" (from GraniteMoe); "granite" or "granitemoe" on the way back.
        dtype: of the exported weights, one of float64, float32, bfloat16, float16; by default the source's.
        like: on the way back, folder or config.json of the muP model whose multipliers to take; by default those in the
            source's export.json.

    Returns:
        The content of export.json, which lies in the output folder. proof.max_relative_difference is
        max |x - y| / max |x| over the logits x of the source, rounded to dtype, and y of the export, computed in
        proof.computed_in. For a mixture, proof.rerouted counts the tokens and layers in which rounding alone made the
        export choose other experts; there it is compared with the source's choice.

    Raises:
        ValueError, FileNotFoundError: bad input, before any work, or an export outside the tolerance.
    """
    output = Path(output_dir)
    _check_arguments(output, to, dtype, like)
    folder, about = find_model(source)
    config, raw = _read_config(folder, to)
    donor = config if to in PLAIN_FAMILIES else _donor(folder, like, config, to)
    files = _tensor_files(folder, config, to)
    dtype = _dtype(files, folder, dtype)
    target = _target_config(config, donor, to, dtype)
    multipliers = {key: float(getattr(donor, key)) for key in MULTIPLIERS}
    folded = fold_factors(multipliers, _head_dim(config), config.tie_word_embeddings)
    exact = all(math.frexp(factor)[0] == 0.5 for factor in folded.values())
    if not exact and dtype in ("bfloat16", "float16"):
        warnings.warn(
            f"the multipliers' factors are not all powers of two, so that {dtype} weights are rounded anew: the "
            'exported model is near the source, not equal to it; preset "power_of_two" of mup_config would be exact.',
            stacklevel=2,
        )
    run = (
        read_object(folder / RUN_FILE, schema=None, remedy="pass a run folder") if (folder / RUN_FILE).exists() else {}
    )
    content = {
        "schema": SCHEMA,
        "from": config.model_type,
        "to": to,
        "dtype": dtype,
        "multipliers": multipliers,
        "power_of_two": exact,
        "head_dim": _head_dim(config),
        "tied": bool(config.tie_word_embeddings),
        "source_config": {key: value for key, value in raw.items() if key != "_name_or_path"},
        "source": {"name": about["name"]} | ({"tokens_seen": run["tokens_seen"]} if "tokens_seen" in run else {}),
        "lineage": run.get("lineage") or uuid.uuid4().hex,
        "versions": _versions(),
    }
    factors = folded if to in PLAIN_FAMILIES else {kind: 1 / factor for kind, factor in folded.items()}
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        content["proof"] = _write_and_prove(folder, files, config, target, factors, exact, temporary)
        _judge(content)
        for file in _COPIED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, temporary / file)
        write_json(temporary / EXPORT_FILE, content)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return content


def export_text(content: dict[str, Any]) -> str:
    """The content of export.json in a few lines for a person."""
    proof, source = content["proof"], content["source"]
    seen = f", {source['tokens_seen']:,} tokens seen" if "tokens_seen" in source else ""
    numbers = ", ".join(f"{key} {value:g}" for key, value in content["multipliers"].items())
    lines = [
        f"{content['from']} -> {content['to']} in {content['dtype']}, from {source['name']}{seen}",
        f"  multipliers  {numbers}",
        f"  proof        logits of {proof['tokens']} tokens differ by at most {proof['max_relative_difference']:.2g} of the "
        f"largest (tolerance {proof['tolerance']:g}, computed in {proof['computed_in']})",
    ]
    if proof.get("rerouted"):
        lines.append(f"  experts      rounding changed the choice of experts for {proof['rerouted']} tokens in a layer")
    if not content["power_of_two"] and content["dtype"] in ("bfloat16", "float16"):
        lines.append(f"  WARNING      factors that are no powers of two: {content['dtype']} weights were rounded anew")
    return "\n".join(lines)


def _check_arguments(output: Path, to: str, dtype: str | None, like: Any) -> None:
    if to not in FAMILIES:
        raise UserError(f"to must be one of {', '.join(FAMILIES)}, got {to!r}: pass the family to export to.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}: pass one, or none for the source's.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output folder {output} exists and is not empty: pass a new one.")
    if like is not None and to not in MUP.values():
        raise UserError(
            f"like={str(like)!r} gives multipliers for granite and granitemoe, and {to} has none: leave it out."
        )


def _read_config(folder: Path, to: str) -> tuple[Any, dict[str, Any]]:
    """The config of the source, known to have a counterpart in the family `to`, and its config.json."""
    raw = read_object(folder / "config.json", schema=None, remedy="pass the folder of a model")
    family = raw.get("model_type")
    counterpart = (PLAIN | MUP).get(str(family))
    if counterpart is None:
        raise UserError(
            f"{folder} is a model of type {family!r}, which cannot be exported: pass one of {', '.join(FAMILIES)}."
        )
    if to != counterpart:
        raise UserError(f"{folder} is a {family} model and exports to {counterpart}, not to {to}: pass {counterpart}.")
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds an adapter beside the model: merge it into the weights and save the result.")
    with refused_by(str(folder / "config.json")):
        config = _config_class(str(family)).from_dict(raw)
    for name in ("sliding_window", "router_jitter_noise", "attention_bias"):
        if getattr(config, name, None) and not (name == "attention_bias" and "llama" in (family, to)):
            raise UserError(
                f"{name}={getattr(config, name)} of {folder} has no counterpart in {to}: only a model without it can be "
                "exported."
            )
    if to == "llama" and config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} of {folder} is not a multiple of num_attention_heads "
            f"{config.num_attention_heads}, which Llama asks for: export a model whose sizes divide."
        )
    if family in PLAIN:
        _check_multipliers(config, folder)
    return config, raw


def _check_multipliers(config: Any, where: Any) -> None:
    for key in MULTIPLIERS:
        value = getattr(config, key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{key} of {where} must be a positive number, got {value!r}: correct its config.json.")


def _donor(folder: Path, like: str | os.PathLike[str] | None, config: Any, to: str) -> Any:
    """The config of the muP model whose multipliers a plain model gets back."""
    if like is None and not (folder / EXPORT_FILE).exists():
        raise UserError(
            f"{folder} has no {EXPORT_FILE} that holds multipliers: pass like, the folder or config.json of the muP model."
        )
    if like is None:
        where = folder / EXPORT_FILE
        raw = read_object(where, schema=None, remedy="pass the folder of an exported model").get("source_config", {})
    else:
        where = Path(like) / "config.json" if Path(like).is_dir() else Path(like)
        raw = read_object(where, schema=None, remedy=f"pass the folder or config.json of a {to} model as like")
    if raw.get("model_type") != to:
        raise UserError(f"{where} has the multipliers of model type {raw.get('model_type')!r}, not {to!r}: pass like.")
    with refused_by(str(where)):
        donor = _config_class(to).from_dict(raw)
    _check_multipliers(donor, where)
    shapes = [{name: getattr(c, name, None) for name in SHAPE} | {"head_dim": _head_dim(c)} for c in (config, donor)]
    for name, value in shapes[0].items():
        if shapes[1][name] != value:
            raise UserError(
                f"{name} is {value} in {folder} and {shapes[1][name]} in {where}: take the multipliers of a model of the "
                "same shape."
            )
    return donor


def _config_class(family: str) -> Any:
    return getattr(transformers, f"{FAMILIES[family]}Config")


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _target_config(config: Any, donor: Any, to: str, dtype: str) -> Any:
    """The config with what the other family knows of it, and with the multipliers only if that is a muP family."""
    family = _config_class(to)
    known = family().to_dict().keys() - {"model_type", "transformers_version", *MULTIPLIERS}
    fields = {key: value for key, value in config.to_dict().items() if key in known}
    head_dim = _head_dim(config)
    if to in PLAIN_FAMILIES:
        fields["head_dim"] = head_dim
    else:
        fields |= {key: getattr(donor, key) for key in MULTIPLIERS}
        if head_dim * config.num_attention_heads != config.hidden_size:
            fields["head_dim"] = head_dim  # Granite's code reads it, its config class has no field for it
        if getattr(donor, "mup", None) is not None:
            fields["mup"] = donor.mup
    return family(**fields | {"architectures": [f"{FAMILIES[to]}ForCausalLM"], "dtype": dtype})


def _versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "safetensors": safetensors}
    named = {name: str(module.__version__) for name, module in modules.items()}
    return {"hf_power": __version__, "python": platform.python_version()} | named


def _tensor_files(folder: Path, config: Any, to: str) -> dict[str, Path]:
    """The file of every tensor of a model, in the files' order; each is known to have a rule.

    A tied head that was saved beside the embedding is left out, as save_pretrained does.
    """
    if (folder / INDEX).exists():
        index = read_object(folder / INDEX, schema=None, remedy="pass a folder that was saved whole")
        shards = index.get("weight_map", {}).values()
        if beyond := next((shard for shard in shards if Path(shard).name != shard), None):
            raise UserError(
                f"{folder / INDEX} names {shown(beyond)}, which is no file beside it: do not use the folder."
            )
        paths = [folder / shard for shard in sorted(set(shards))]
    else:
        paths = [folder / WEIGHTS]
    files: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise NotFoundError(f"there is no {path}: pass the folder of a model that was saved as safetensors.")
        try:
            with safetensors.safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} cannot be read as safetensors: pass a folder that was saved whole.") from error
    if not files:
        raise UserError(f"{folder} holds no tensors: pass a folder that was saved whole.")
    if config.tie_word_embeddings:
        files.pop("lm_head.weight", None)
    experts = getattr(config, "num_local_experts", 0)
    for name in files:
        parts = plain_names(name if to in PLAIN_FAMILIES else mup_name(name), experts)
        if any(kind_of(part) is None for part in parts):
            raise UserError(
                f"there is no rule for the tensor {name} of {folder}: export takes the tensors of Granite, GraniteMoe, "
                "Llama and Mixtral and no others."
            )
        if to in MUP.values() and (missing := next((part for part in parts if part not in files), None)):
            raise UserError(f"the tensor {missing} is missing in {folder}: pass a folder that was saved whole.")
    return files


def _dtype(files: dict[str, Path], folder: Path, dtype: str | None) -> str:
    """The dtype asked for, or that of the tensors, which must be one."""
    names = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    reader = Reader(files)
    stored = {reader.dtype(name) for name in files}
    if not stored <= names.keys():
        raise UserError(
            f"{folder} has tensors of type {min(stored - names.keys())}, which cannot be multiplied: export the model "
            "before it is quantized."
        )
    if dtype is None and len(stored) > 1:
        raise UserError(f"{folder} has tensors of the types {', '.join(sorted(stored))}: pass the dtype to export to.")
    return dtype or names[stored.pop()]


def _write_and_prove(
    folder: Path, files: dict[str, Path], config: Any, target: Any, factors: dict[str, float], exact: bool, into: Path
) -> dict[str, Any]:
    """Write config and weights, and compare the logits of the fixed tokens; no two models are in memory at once."""
    dtype = str(target.dtype).removeprefix("torch.")
    arithmetic, tolerance = proof_rule(dtype, exact, hasattr(config, "num_local_experts"))
    routes: list[torch.Tensor] = []
    expected, _ = fixed_logits(folder, config, dtype, arithmetic, routes)
    into.mkdir(parents=True)
    target.save_pretrained(into)
    write_weights(files, into, config, target.model_type, factors, DTYPES[dtype])
    found, rerouted = fixed_logits(into, target, dtype, arithmetic, routes)
    proof = {
        "tokens": expected.shape[0] * expected.shape[1],
        "max_relative_difference": float((expected - found).abs().max() / expected.abs().max()),
        "tolerance": tolerance,
        "computed_in": str(arithmetic).removeprefix("torch."),
    }
    return proof | ({"rerouted": rerouted} if routes else {})


def _judge(content: dict[str, Any]) -> None:
    difference, tolerance = content["proof"]["max_relative_difference"], content["proof"]["tolerance"]
    if not difference <= tolerance:  # not a number is no proof
        raise UserError(
            f"the export of {content['source']['name']} differs by {difference:.3g} of the largest logit, beyond the "
            f"tolerance of {tolerance:g} in {content['dtype']}, and was not kept: export to float32 or float64, or look "
            "for damage in the source."
        )
