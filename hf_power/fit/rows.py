"""The runs that a law is fitted to: those of one sweep, or of a CSV file from elsewhere."""

import csv
import difflib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.rows import Row


def sha256_of(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows, whatever their order."""
    # Several processes append to one file, so that the order of its lines differs between sweeps that are the same.
    lines = sorted(json.dumps(row.to_json(), sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_csv(
    path: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    *,
    schedule: str = "warmup_stable_decay",
    block_size: int | None = None,
) -> list[Row]:
    """The rows of a sweep from elsewhere, a CSV file with a header.

    Args:
        path: the file; of a .tsv the columns are parted by tabs.
        columns: our name -> the file's column; a name left out is looked for as it is. learning_rate, loss (nats per
            token; nan or inf is a diverged run), tokens, and tokens_per_step or batch (in sequences) are needed; width
            (0 where it is missing), seed (repetitions of a run are counted where it is missing) and schedule are not.
        schedule: of all rows, where the file has no column for it.
        block_size: tokens of a sequence, with batch.

    Returns:
        Rows with the fields that the fit needs, each trunk one (schedule, width, batch, learning rate, seed).

    Raises:
        NotFoundError: there is no such file.
        UserError: an unknown or missing column, a value that is no number, or no row.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"there is no sweep at {path}: pass a CSV file with a header.")
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if Path(path).suffix.lower() == ".tsv" else ",")
        names = _csv_columns(columns or {}, list(reader.fieldnames or []), block_size, str(path))
        rows: list[Row] = []
        seen: Counter[tuple[object, ...]] = Counter()
        for record in reader:
            where = f"line {reader.line_num} of {path}"
            values = {
                name: _csv_number(name, record[column], where) for name, column in names.items() if name != "schedule"
            }
            kind = record[names["schedule"]] if "schedule" in names else schedule
            batch = values["batch"] * (block_size or 1) if "batch" in values else values["tokens_per_step"]
            width, tokens, rate = round(values.get("width", 0)), round(values["tokens"]), values["learning_rate"]
            key = (kind, width, round(batch), rate)
            seed = round(values["seed"]) if "seed" in values else seen[(*key, tokens)]
            seen[(*key, tokens)] += 1
            finished = math.isfinite(values["loss"])
            rows.append(
                Row(
                    width=width,
                    schedule=kind,
                    learning_rate=rate,
                    tokens_per_step=round(batch),
                    tokens=tokens,
                    loss=values["loss"] if finished else None,
                    status="finished" if finished else "diverged",
                    seed=seed,
                    trunk="/".join(str(part) for part in (*key, seed)),
                )
            )
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


def _csv_number(name: str, text: str | None, where: str) -> float:
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
    return value


def check_one_source(rows: Sequence[Row]) -> None:
    """Raise if rows come from different experiments, whose optima lie on no common law.

    The data, the tokenizer, the weight decay and the model type must be one; within a schedule also the warmup (in
    tokens) and the shape and share of the decay, up to the rounding to whole steps.

    Raises:
        UserError: names what differs, with both values.
    """
    first: dict[str | None, Row] = {}
    for row in rows:
        for schedule in (None, row.schedule):  # None stands for what all schedules must share.
            other = first.setdefault(schedule, row)
            differences = _common(other, row) if schedule is None else _of_schedule(other, row)
            for what, one, two in differences:
                raise UserError(
                    f"the rows differ in {what}, {one} and {two}, and must not be fitted together: fit each kind alone."
                )


def _common(one: Row, two: Row) -> list[tuple[str, object, object]]:
    pairs: list[tuple[str, object, object]] = [
        ("weight decay", one.weight_decay, two.weight_decay),
        ("model type", one.model_type, two.model_type),
        ("data fingerprint", one.data.get("fingerprint"), two.data.get("fingerprint")),
        ("tokenizer", one.data.get("tokenizer"), two.data.get("tokenizer")),
        ("held-out tokens", one.data.get("held_out_tokens"), two.data.get("held_out_tokens")),
    ]
    return [pair for pair in pairs if pair[1] != pair[2]]


def _of_schedule(one: Row, two: Row) -> list[tuple[str, object, object]]:
    found: list[tuple[str, object, object]] = []
    if one.decay_shape != two.decay_shape:
        found.append(("decay shape", one.decay_shape, two.decay_shape))
    warmups = one.warmup_tokens, two.warmup_tokens
    if warmups[0] is None or warmups[1] is None or one.decay_tokens is None or two.decay_tokens is None:
        return found + ([("warmup tokens", *warmups)] if warmups[0] != warmups[1] else [])
    if abs(warmups[0] - warmups[1]) > max(one.tokens_per_step, two.tokens_per_step):
        found.append(("warmup tokens", *warmups))
    shares = one.decay_tokens / one.tokens, two.decay_tokens / two.tokens
    if abs(shares[0] - shares[1]) > one.tokens_per_step / one.tokens + two.tokens_per_step / two.tokens:
        found.append(("share of the decay", f"{shares[0]:.3g}", f"{shares[1]:.3g}"))
    return found
