"""Which runs may be fitted together, which make one cell, and a fingerprint of them."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from hf_power.records.errors import UserError
from hf_power.records.rows import Row


def sha256_of(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows, whatever their order."""
    # Several processes append to one file, so that the order of its lines differs between sweeps that are the same.
    lines = sorted(json.dumps(row.to_json(), sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# A finished run that is so far above another one of its cell, in nats per token, at no lower rate, has diverged. On public
# sweeps losses are within 0.3 of their cell's best, or more than 1.5 above it.
BLOWN_UP_NATS = 1.0
# At the lowest rate nothing lies lower to compare with. A U-curve that is so near its bottom (nats above the cell's best) does
# not fall by so much on the octave before.
BOTTOM_NATS, CLIFF_NATS = 0.3, 1.5
# Horizons that differ by less than this share are one: batches round them to whole steps.
SAME_HORIZON = 0.01


class CellKey(NamedTuple):
    """What the runs of a cell share; `parameters` is 0 where it is not known."""

    schedule: str
    width: int
    parameters: int
    tokens_per_step: int
    tokens: int


def by_cell(rows: Sequence[Row]) -> dict[CellKey, list[Row]]:
    """The rows of each cell but the failed ones, sorted by the cell.

    A finished run becomes a diverged one if its loss is more than BLOWN_UP_NATS above that of a run of the cell at the
    same or a lower learning rate. (At a rate far too low the loss is high, too, but at lower ones still higher.) So it does if
    it is CLIFF_NATS above a run within the octave above it whose loss is within BOTTOM_NATS of the cell's best.
    Horizons of one model and batch within SAME_HORIZON are one, named after the most frequent of them.
    """
    grouped: dict[tuple[str, int, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.status != "failed":
            grouped[row.schedule, row.width, row.parameters or 0, row.tokens_per_step].append(row)
    cells: dict[CellKey, list[Row]] = {}
    for key in sorted(grouped):
        for horizon in horizons_of([row.tokens for row in grouped[key]]):
            inside = [row for row in grouped[key] if row.tokens in horizon]
            counts = Counter(row.tokens for row in inside)
            name = min(counts, key=lambda tokens: (-counts[tokens], tokens))
            cells[CellKey(*key, name)] = _mark_blown_up(inside)
    return cells


def horizons_of(tokens: Sequence[int]) -> list[list[int]]:
    """Horizons in rising order, those that differ by no more than SAME_HORIZON from their smallest together."""
    groups: list[list[int]] = []
    for each in sorted(set(tokens)):
        if groups and each <= groups[-1][0] * (1 + SAME_HORIZON):
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def _mark_blown_up(rows: Sequence[Row]) -> list[Row]:
    # Where one seed diverged, the others were lucky.
    lucky = {row.learning_rate for row in rows if row.status == "diverged"}
    finished = [
        (row.learning_rate, row.loss) for row in rows if row.loss is not None and row.learning_rate not in lucky
    ]
    best = min((loss for _, loss in finished), default=math.inf)
    marked = []
    for row in rows:
        lr = float(row.learning_rate)
        lower = min((loss for rate, loss in finished if rate <= lr), default=math.inf)
        above = min((loss for rate, loss in finished if lr < rate <= 2.01 * lr), default=math.inf)
        cliff = above + CLIFF_NATS if above <= best + BOTTOM_NATS else math.inf
        blown_up = row.loss is not None and row.loss > min(lower + BLOWN_UP_NATS, cliff)
        marked.append(replace(row, status="diverged", loss=None) if blown_up else row)
    return marked


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
