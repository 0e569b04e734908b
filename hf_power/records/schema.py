"""Files from elsewhere, checked before anything is believed: JSON, and a hand-sized schema of each of our records."""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_power.records.errors import NotFoundError, UserError, shown

LARGEST_INTEGER = 2**63 - 1  # what numpy, torch and a JSON reader in another language can hold
# Dotted name -> type, and the smallest value of a number. Keys that are in no table are let through: they are only shown.
Table = Mapping[str, tuple[Any, float | None]]


def _each(names: str, hint: Any, smallest: float | None = None) -> dict[str, tuple[Any, float | None]]:
    """The names between blanks, all of one type; an int is a float too."""
    return dict.fromkeys(names.split(), (hint, smallest))


DATA: Table = {
    **_each("data", dict),
    **_each("data.dataset data.config_name data.split", str | None),
    **_each("data.local", bool | None),
    **_each("data.held_out_tokens data.train_tokens", int | None, 0),
}
RUN: Table = {
    **DATA,
    **_each("kind name status", str),
    **_each("lineage parent settings.run.license", str | None),
    **_each("tokens_seen total_tokens steps parameters", int | None, 0),
    **_each("tokens_per_step", int | None, 1),
    **_each("seed", int | None),
    **_each("train_seconds flops_per_token settings.training.weight_decay", float | None, 0),
    **_each("held_out_loss", float | None),
    **_each("loss_curve", list),
    **_each("versions hardware settings", dict),
    **_each("settings.model settings.mup settings.data settings.run settings.training", dict),
    **_each("schedule", dict | None),
    **_each("schedule.a schedule.b schedule.batch_exponent schedule.max_lr", float | None),
    **_each("schedule.critical_batch_tokens schedule.decay_start_tokens schedule.decay_tokens", float | None, 0),
}
EVALUATION: Table = {
    **DATA,
    **_each("model metrics tasks tasks.* tasks_settings", dict),
    **_each("model.weights_sha256", str | None),
}
EXPORT: Table = {
    **_each("source source_config", dict),
    **_each("source.name", str | None),
    **_each("source.tokens_seen", int | None, 0),
    **_each("lineage", str),
}
PUSH: Table = {
    **_each("repo targets.*.status", str),
    **_each("revision license checkpoints", str | None),
    **_each("complete", bool),
    **_each("targets targets.*", dict),
}
INDEX: Table = {**_each("weight_map", dict), **_each("weight_map.*", str)}
TABLES = {
    **{"run.json": RUN, "eval.json": EVALUATION, "export.json": EXPORT, "push.json": PUSH},
    "model.safetensors.index.json": INDEX,
}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type such as ``int | None``; a bool is no number, an int is a float, 2**63 is neither."""
    kinds = kinds_of(hint)
    if value is None or isinstance(value, bool):
        return type(value) in kinds or Any in kinds
    if isinstance(value, int) and {int, float} & set(kinds):
        return abs(value) <= LARGEST_INTEGER
    return any(kind is Any or (isinstance(kind, type) and isinstance(value, kind)) for kind in kinds)


def kinds_of(hint: Any) -> list[Any]:
    """The types that a hint allows, without their parameters."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [typing.get_origin(arm) or arm for arm in arms]


def parse_json(text: bytes, source: Any, remedy: str) -> Any:
    """JSON as it must be: UTF-8, every key once, nested no deeper than Python can read.

    Raises:
        ValueError: one sentence, "SOURCE is not JSON (why): REMEDY."
    """
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # also not UTF-8, a BOM, integers of more digits than Python reads
        why = error if isinstance(error, ValueError) else "it is nested too deep"
        raise UserError(f"{source} is not JSON ({why}): {remedy}.") from error


def read_object(
    path: Path, table: Table | None = None, *, schema: int | None = 1, required: Sequence[str] = (), remedy: str = ""
) -> dict[str, Any]:
    """The content of a JSON file that is an object, checked.

    Args:
        path: the file.
        table: the types and ranges of its keys; None: those of the file's name.
        schema: the number that its key "schema" must have; None for a file of somebody else's.
        required: dotted names that must be there and not null.
        remedy: what to do about a bad one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one sentence that names the file, the key, what it must be, and its value.
    """
    if not path.is_file():
        raise NotFoundError(
            f"there is no {path.name} in {path.parent}: {remedy or 'pass a folder that was saved whole'}."
        )
    remedy = remedy or "write it with this version of hf_power"
    content = parse_json(path.read_bytes(), path, remedy)
    if not isinstance(content, dict) or (schema is not None and not _same(content.get("schema"), schema)):
        got = shown(content.get("schema")) if isinstance(content, dict) else type(content).__name__
        what = "a JSON object" if schema is None else f"of schema {schema}"
        raise UserError(f"{path} is not {what}, got {got}: {remedy}.")
    check_keys(content, TABLES.get(path.name, {}) if table is None else table, path, remedy)
    for name in required:
        if all(value is None or value != value for _, value in _at(content, name.split("."))):
            raise UserError(f"{path} lacks {name}: {remedy}.")
    return content


def check_keys(content: Any, table: Table, source: Any, remedy: str) -> None:
    """Raise a ValueError for the first value whose type or range is not that of the table; missing keys and NaN are fine."""
    for name, (hint, smallest) in table.items():
        for where, value in _at(content, name.split(".")):
            low = smallest is not None and isinstance(value, int | float) and value < smallest
            if value == value and (not fits(value, hint) or low):  # NaN is an unknown number
                raise UserError(f"{source}: {where} must be {_wanted(hint, smallest)}, got {shown(value)}: {remedy}.")


def read_run(folder: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """run.json of a run or checkpoint folder, checked; `required` as in `read_object`."""
    return read_object(folder / "run.json", RUN, required=required, remedy="take a folder that hf_power wrote")


def _same(value: Any, schema: int) -> bool:
    return type(value) is int and value == schema


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(n for n in names if names.count(n) > 1))} is there twice")
    return content


def _at(content: Any, parts: list[str], where: str = "") -> list[tuple[str, Any]]:
    """The values at a dotted name that are there, with their names; * stands for every key."""
    if not parts:
        return [(where, content)]
    if not isinstance(content, dict):
        return []
    names = list(content) if parts[0] == "*" else [parts[0]] if parts[0] in content else []
    return [found for n in names for found in _at(content[n], parts[1:], f"{where}.{n}" if where else n)]


def _wanted(hint: Any, smallest: float | None) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number", bool: "a bool"}
    wanted = " or ".join(dict.fromkeys(names.get(k, "null") for k in kinds_of(hint)))
    return wanted + ("" if smallest is None else f" of at least {smallest:g}")
