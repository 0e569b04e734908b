"""The measurements of a sweep: one JSON object a line, appended by several processes, read with what is wrong named."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from hf_power.records.errors import DiskError, NotFoundError, UserError, shown
from hf_power.records.run import SCHEMA, Data, Hardware, Sections
from hf_power.records.schema import FINITE, UNTIL_KNOWN, Count, Finite, Json, above, decode, encode

ROWS_FILE = "sweep.jsonl"
Status = Literal["finished", "diverged", "failed"]
_REMEDY = "write rows with hf-power sweep"


class RowLaw(TypedDict, total=False):
    """The law that a run of schedule "power" followed, see `hf_power.schedule.Law`."""

    a: Finite
    b: Finite
    batch_exponent: Finite
    critical_batch_tokens: Finite | None
    critical_batch_growth: Finite


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of a sweep and its result. A row from elsewhere, of a CSV file, has no id and only the fields of `CSV`.

    Attributes:
        id: of everything that makes the run; a sweep that is started again skips the ids that it has.
        width: hidden_size; 0 if it is not known.
        tokens: the horizon T, in tokens, decay included.
        schedule: whose learning rates are swept.
        learning_rate: the peak, or for "power" the uncapped law at the horizon.
        law: that a run of schedule "power" followed.
        extension: how often learning rates had been added when the run was made.
        trunk: an id that the rows of one trunk share.
        trained_tokens: tokens trained for this row beyond those of the rows before it on its trunk.
        settings: from which pretraining makes this run from scratch.
        status: "finished", "diverged" or "failed", the latter two with a reason.
        loss: held-out, in nats per token; None unless the run has finished.
    """

    id: str = ""
    model_type: str | None = None
    width: Count = 0
    parameters: Count | None = None
    parameters_without_embeddings: Count | None = None
    tokens_per_step: Annotated[int, above(0)]
    tokens: Annotated[int, above(0)]
    schedule: str
    learning_rate: Annotated[float, FINITE, above(0)]
    law: RowLaw | None = None
    max_lr: Finite | None = None
    warmup_tokens: int | None = None
    decay_tokens: int | None = None
    decay_shape: str | None = None
    weight_decay: Finite | None = None
    seed: int = 0
    extension: Count | None = field(default=None, metadata=UNTIL_KNOWN)
    trunk: str = ""
    trained_tokens: int = 0
    flops_per_token: Finite = 0
    seconds: Finite = 0.0
    block_size: int | None = None
    settings: Sections = field(default_factory=Sections)
    data: Data = field(default_factory=Data)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: Hardware = field(default_factory=Hardware)
    status: Status = "finished"
    reason: str | None = None
    loss: Finite | None = None
    train_loss: Finite | None = None

    @classmethod
    def of(cls, content: object, source: object, remedy: str = _REMEDY) -> "Row":
        """A row of parsed JSON, every value checked; `source` names it in errors.

        Raises:
            UserError: a wrong type or range, or a loss without an end.
        """
        row = decode(cls, content, source, remedy)
        if (row.status == "finished") != (row.loss is not None):
            raise UserError(
                f"{source}: a row has a loss if and only if it is finished, got {row.status}, {row.loss}: {remedy}."
            )
        return row

    def to_json(self) -> dict[str, Json]:
        """A line of sweep.jsonl; of a row from elsewhere only what its CSV file says."""
        known = encode(self)
        return {"schema": SCHEMA, **known} if self.id else {name: known[name] for name in CSV}


# The fields of a row from elsewhere.
CSV = (
    "width",
    "parameters",
    "schedule",
    "learning_rate",
    "tokens_per_step",
    "tokens",
    "loss",
    "seed",
    "status",
    "trunk",
)


def append_rows(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Append rows to a sweep.jsonl, all of them in one write under a lock, flushed to the disk.

    Several processes may append at once. Where a killed writer left half a line, a newline goes first, so that the torn
    line stays alone.

    Raises:
        UserError: a number that is not finite.
        DiskError: the disk is full.
    """
    import fcntl  # Only POSIX has it, and who reads rows needs none.

    try:
        text = "".join(json.dumps(row.to_json(), allow_nan=False) + "\n" for row in rows)
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
        os.close(file)  # This gives the lock back.


def load_rows(path: str | os.PathLike[str]) -> tuple[list[Row], list[str]]:
    """The rows of a sweep.jsonl, and one sentence for each line that could not be used.

    A line that a killed writer cut off is left out and named; of two rows with one id the first is kept. A line that is
    whole but wrong is an error.

    Raises:
        NotFoundError: there is no such file.
        UserError: another schema, missing keys, a wrong type or range, or no intact row at all.
    """
    if not Path(path).is_file():
        raise NotFoundError(f"there is no sweep at {path}: pass the sweep.jsonl that hf-power sweep wrote.")
    if Path(path).suffix == ".json":
        raise UserError(f"{path} is JSON and no rows: pass the sweep.jsonl that hf-power sweep wrote, or its folder.")
    rows: list[Row] = []
    problems: list[str] = []
    first: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):  # The line is not JSON, or it is cut within a character.
            problems.append(f"line {number} is cut off and not used")
            continue
        row = _whole_row(content, f"line {number} of {path}")
        if row.id in first:
            problems.append(f"line {number} repeats the id {row.id} of line {first[row.id]} and is not used")
            continue
        first[row.id] = number
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no intact row: pass the sweep.jsonl of a sweep that has finished a run.")
    return rows, problems


def _whole_row(content: object, where: str) -> Row:
    schema = content.get("schema") if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or type(schema) is not int or schema != SCHEMA:
        raise UserError(f"{where} is not a row of schema {SCHEMA}, got {shown(schema)}: {_REMEDY}.")
    if missing := [f.name for f in fields(Row) if f.name != "extension" and f.name not in content]:
        raise UserError(f"{where} lacks {', '.join(missing)}: {_REMEDY}.")
    return Row.of(content, where)
