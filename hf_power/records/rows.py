"""The measurements of a sweep: one JSON object a line, appended by several processes, read with what is wrong named."""

import csv
import difflib
import fcntl
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_power.records.errors import DiskError, NotFoundError, UserError, shown
from hf_power.records.schema import LARGEST_INTEGER, check_keys

SCHEMA = 1
ROWS_FILE = "sweep.jsonl"
STATUSES = ("finished", "diverged", "failed")

_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "status": (str,),
    "reason": (str, type(None)),
    "model_type": (str,),
    "width": (int,),
    "parameters": (int,),
    "parameters_without_embeddings": (int,),
    "tokens_per_step": (int,),
    "tokens": (int,),
    "schedule": (str,),
    "learning_rate": _NUMBER,
    "law": (dict, type(None)),
    "max_lr": _NUMBER,
    "warmup_tokens": (int,),
    "decay_tokens": (int,),
    "decay_shape": (str,),
    "weight_decay": _NUMBER,
    "seed": (int,),
    "loss": (*_NUMBER, type(None)),
    "train_loss": (*_NUMBER, type(None)),
    "trunk": (str,),
    "trained_tokens": (int,),
    "flops_per_token": _NUMBER,
    "seconds": _NUMBER,
    "block_size": (int,),
    "settings": (dict,),
    "data": (dict,),
    "versions": (dict,),
    "hardware": (dict,),
}
_NESTED = {
    "data.tokenizer": (str | None, None),
    "settings.mup": (dict, None),
    "settings.mup.preset": (str | None, None),
}
_POSITIVE = ("tokens_per_step", "tokens", "learning_rate")


def append_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a sweep.jsonl, all of them in one write under a lock, flushed to the disk.

    Several processes may append at once. Where a killed writer left half a line, a newline goes first, so that the torn
    line stays alone.

    Args:
        path: the file; it is made if it is missing, its folder must exist.
        rows: one mapping a line; a number that is not finite is not JSON, a missing loss is None.

    Raises:
        ValueError: a number that is not finite.
        OSError: the disk is full.
    """
    try:
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    except ValueError as error:
        raise UserError(f"a row for {path} has a number that is not finite: write null and a reason.") from error
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            text = "\n" + text
        content = text.encode()
        if os.write(file, content) != len(content):
            raise DiskError(f"only a part of the rows could be written to {path}: free some space and run again.")
        os.fsync(file)
    finally:
        os.close(file)  # gives the lock back


def read_rows(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a sweep.jsonl, and one sentence for each line that could not be used.

    A line that a killed writer cut off is left out and named; of two rows with one id the first is kept. A line that is
    whole but wrong is an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another schema, missing keys, a wrong type or range, or no intact row at all.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"there is no sweep at {path}: pass the sweep.jsonl that hf-power sweep wrote.")
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or cut within a character
            problems.append(f"line {number} is cut off and not used")
            continue
        _check_row(row, f"line {number} of {path}")
        if row["id"] in first:
            problems.append(f"line {number} repeats the id {row['id']} of line {first[row['id']]} and is not used")
            continue
        first[row["id"]] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no intact row: pass the sweep.jsonl of a sweep that has finished a run.")
    return rows, problems


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict) or type(row.get("schema")) is not int or row["schema"] != SCHEMA:
        found = row.get("schema") if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where} is not a row of schema {SCHEMA}, got {shown(found)}: write rows with hf-power sweep.")
    missing = [name for name in _TYPES if name not in row]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: write rows with hf-power sweep.")
    for name, types in _TYPES.items():
        value = row[name]
        if not isinstance(value, types) or isinstance(value, bool):
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise UserError(f"{where}: {name} must be {wanted}, got {shown(value)}; write rows with hf-power sweep.")
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise UserError(f"{where}: {name} must be below 2**63, got {shown(value)}; remove the line.")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value}, which is not finite; write null and a reason.")
    check_keys(row, _NESTED, where, "write rows with hf-power sweep")
    for name in _POSITIVE:
        if not row[name] > 0:
            raise UserError(f"{where}: {name} must be positive, got {row[name]!r}; write rows with hf-power sweep.")
    if row["status"] not in STATUSES:
        raise UserError(f"{where}: status must be one of {', '.join(STATUSES)}, got {shown(row['status'])}.")
    if (row["status"] == "finished") != (row["loss"] is not None):
        raise UserError(f"{where}: a row has a loss if and only if it is finished, got {row['status']}, {row['loss']}.")


def read_csv(
    path: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    *,
    schedule: str = "warmup_stable_decay",
    block_size: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of a sweep from elsewhere, a CSV file with a header.

    Args:
        path: the file; of a .tsv the columns are parted by tabs.
        columns: our name -> the file's column; a name left out is looked for as it is. learning_rate, loss (nats per
            token; nan or inf is a diverged run), tokens, and tokens_per_step or batch (in sequences) are needed; width
            (0 where it is missing), seed (repetitions of a run are counted where it is missing) and schedule are not.
        schedule: of all rows, where the file has no column for it.
        block_size: tokens of a sequence, with batch.

    Returns:
        Rows with the keys that the fit needs, each trunk one (schedule, width, batch, learning rate, seed).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown or missing column, a value that is no number, or no row.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"there is no sweep at {path}: pass a CSV file with a header.")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if Path(path).suffix.lower() == ".tsv" else ",")
        names = _csv_columns(columns or {}, list(reader.fieldnames or []), block_size, str(path))
        rows: list[dict[str, Any]] = []
        seen: Counter[tuple[Any, ...]] = Counter()
        for record in reader:
            where = f"line {reader.line_num} of {path}"
            row: dict[str, Any] = {"width": 0, "schedule": schedule}
            row |= {name: _csv_value(name, record[column], where) for name, column in names.items()}
            if "batch" in row:
                row["tokens_per_step"] = row.pop("batch") * block_size
            key = tuple(row[name] for name in ("schedule", "width", "tokens_per_step", "learning_rate"))
            if "seed" not in row:
                row["seed"] = seen[(*key, row["tokens"])]
                seen[(*key, row["tokens"])] += 1
            finished = math.isfinite(row["loss"])
            row |= {"status": "finished" if finished else "diverged", "loss": row["loss"] if finished else None}
            rows.append(row | {"trunk": "/".join(str(part) for part in (*key, row["seed"]))})
    if not rows:
        raise UserError(f"{path} has no row below its header: pass a CSV file with one line per run.")
    return rows


_CSV_NEEDED = ("learning_rate", "tokens_per_step", "tokens", "loss")
_CSV_NAMES = (*_CSV_NEEDED, "batch", "width", "seed", "schedule")


def _csv_columns(columns: Mapping[str, str], header: list[str], block_size: int | None, path: str) -> dict[str, str]:
    """Our name -> the file's column, for all that the file has."""
    unknown = sorted(set(columns) - set(_CSV_NAMES))
    if unknown:
        raise UserError(f"columns maps {unknown[0]!r}, which no row has: choose from {', '.join(_CSV_NAMES)}.")
    names = {name: columns.get(name, name) for name in _CSV_NAMES if name in columns or name in header}
    if "batch" in columns or "tokens_per_step" not in names:
        names.pop("tokens_per_step", None)
    else:
        names.pop("batch", None)
    if "batch" in names and not block_size:
        raise UserError(f"{path} gives the batch in sequences: pass block_size, the tokens of a sequence.")
    for name in _CSV_NEEDED:
        if name not in names and not (name == "tokens_per_step" and "batch" in names):
            names[name] = name
    for name, column in names.items():
        if column not in header:
            near = difflib.get_close_matches(column, header, n=1)
            hint = f"did you mean {near[0]!r} of" if near else "it has"
            raise UserError(
                f"{path} has no column {column!r} for {name}, {hint} {', '.join(header)}: map {name} to a column."
            )
    return names


def _csv_value(name: str, text: str | None, where: str) -> Any:
    if name == "schedule":
        return text
    try:
        value = float(text or "")
    except ValueError:
        raise UserError(f"{where}: {name} must be a number, got {text!r}; mend or remove the line.") from None
    if name in ("loss", "learning_rate"):
        good = name == "loss" or (math.isfinite(value) and value > 0)
    else:
        good = math.isfinite(value) and value == round(value) and value >= (0 if name in ("width", "seed") else 1)
    if not good:
        raise UserError(f"{where}: {name} must be positive and whole where it counts, got {text!r}; mend the line.")
    return value if name in ("loss", "learning_rate") else int(value)


def check_one_source(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise if rows come from different experiments, whose optima lie on no common law.

    The data, the tokenizer, the weight decay and the model type must be one; within a schedule also the warmup (in
    tokens) and the shape and share of the decay, up to the rounding to whole steps.

    Raises:
        ValueError: names what differs, with both values.
    """
    first: dict[str | None, Mapping[str, Any]] = {}
    for row in rows:
        for schedule in (None, row["schedule"]):  # None: what all schedules must share
            other = first.setdefault(schedule, row)
            differences = _common(other, row) if schedule is None else _of_schedule(other, row)
            for what, one, two in differences:
                raise UserError(
                    f"the rows differ in {what}, {one} and {two}, and must not be fitted together: fit each kind alone."
                )


def _common(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs = [(name, one.get(key), two.get(key)) for name, key in _COMMON.items()]
    data = one.get("data", {}), two.get("data", {})
    pairs += [(name, data[0].get(key), data[1].get(key)) for name, key in _COMMON_DATA.items()]
    return [pair for pair in pairs if pair[1] != pair[2]]


_COMMON = {"weight decay": "weight_decay", "model type": "model_type"}
_COMMON_DATA = {"data fingerprint": "fingerprint", "tokenizer": "tokenizer", "held-out tokens": "held_out_tokens"}


def _of_schedule(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    if one.get("decay_shape") != two.get("decay_shape"):
        found.append(("decay shape", one.get("decay_shape"), two.get("decay_shape")))
    warmups = one.get("warmup_tokens"), two.get("warmup_tokens")
    if None in warmups or "decay_tokens" not in one or "decay_tokens" not in two:
        return found + ([("warmup tokens", *warmups)] if warmups[0] != warmups[1] else [])
    if abs(one["warmup_tokens"] - two["warmup_tokens"]) > max(one["tokens_per_step"], two["tokens_per_step"]):
        found.append(("warmup tokens", *warmups))
    shares = [row["decay_tokens"] / row["tokens"] for row in (one, two)]
    if abs(shares[0] - shares[1]) > sum(row["tokens_per_step"] / row["tokens"] for row in (one, two)):
        found.append(("share of the decay", f"{shares[0]:.3g}", f"{shares[1]:.3g}"))
    return found
