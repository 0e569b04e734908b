"""A reader for each kind of file: it yields the line that each document begins in, and its text or why there is none."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hf_power.data.files import kind_of, opened
from hf_power.records.errors import UserError, one_line, shown

if TYPE_CHECKING:
    import pyarrow

ROWS_PER_BATCH = 1000
BOM = "\ufeff"


class Bad(NamedTuple):
    """Stands for a document that cannot be read, and says why."""

    why: str


class Absent(NamedTuple):
    """Stands for the text of a row that has no such column, and says which columns it has."""

    columns: tuple[str, ...]


# What a reader yields: the line (or row) that a document begins in, from 1 on, and its text, None for a null.
Row = tuple[int, object]


def kind_in_words(value: object) -> str:
    """What a value is that should have been a text."""
    return {bool: "a truth value", dict: "a mapping", list: "a list"}.get(type(value), f"the number {shown(value)}")


class Fault(NamedTuple):
    """Where a text cannot be written as UTF-8, and why."""

    place: int
    why: str


def fault_of(text: str) -> Fault | None:
    """The first fault of a text; None if it has none. Bytes that were no UTF-8 have become U+DC80 to U+DCFF in it."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            return Fault(error.start, f"the byte {hex(code - 0xDC00)} is no UTF-8")
        return Fault(error.start, f"\\u{code:04x} is half of a character, which UTF-8 cannot hold")
    return None


def picked(row: dict[str, object], column: str) -> object:
    """The value of a column, or of `a.b` in the mapping of a column; `Absent` if the row has none."""
    if column in row:
        return row[column]
    value: object = row
    for name in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            return Absent(tuple(row))
        value = value[name]
    return value


def _txt(file: str, column: str) -> Iterator[Row]:
    with opened(file) as content:
        text = content.read().decode("utf-8", "surrogateescape").removeprefix(BOM)
    fault = fault_of(text)
    yield text.count("\n", 0, fault.place if fault else 0) + 1, text


def _json_row(line: str, column: str) -> object:
    """The text of an object in JSON, or why there is none."""
    # Strings with raw tabs in them are no strict JSON, but mean nothing else.
    try:
        row = json.loads(line, strict=False)
    except (ValueError, RecursionError) as error:
        row = None
        with suppress(ValueError, RecursionError):  # An integer may have more digits than Python reads.
            row = json.loads(line, strict=False, parse_int=float)
        if row is None:
            why = "it is nested too deep" if isinstance(error, RecursionError) else one_line(str(error))
            fault = fault_of(line)
            return Bad(fault.why if fault else f"broken JSON ({why})")
    return picked(row, column) if isinstance(row, dict) else Bad(f"broken JSON (not an object but {_value(row)})")


def _value(row: object) -> str:
    return "null" if row is None else "a text" if isinstance(row, str) else kind_in_words(row)


def _jsonl(file: str, column: str) -> Iterator[Row]:
    with opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.decode("utf-8", "surrogateescape").removeprefix(BOM)
            if not text.isspace() and text:
                yield number, _json_row(text, column)


def _json(file: str, column: str) -> Iterator[Row]:
    """The objects of an array, of a file that is one object, or of lines."""
    with opened(file) as lines:
        first = next((text for line in lines if (text := line.strip(b"\xef\xbb\xbf \t\r\n"))), b"")
    head = first.decode("utf-8", "surrogateescape")
    # A file of lines may be larger than the memory, so that one is read whole only if its first line is no object.
    if head[:1] == "[" or isinstance(_json_row(head, column), Bad):
        with opened(file) as content:
            whole = content.read().decode("utf-8", "surrogateescape").removeprefix(BOM)
        if head[:1] == "[":
            yield from _json_array(file, whole, column)
            return
        if not isinstance(value := _json_row(whole, column), Bad):
            yield 1, value
            return
    yield from _jsonl(file, column)


def _json_array(file: str, text: str, column: str) -> Iterator[Row]:
    """The elements of an array one by one, so that the texts alone are held in memory twice."""
    decoder, blank = json.JSONDecoder(strict=False, parse_int=float), " \t\r\n"
    at, line, counted, wanted = text.index("[") + 1, 1, 0, True
    while True:
        while text[at : at + 1] and text[at] in blank:
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and not text[at + 1 :].strip():
            return
        try:
            if not wanted:
                if text[at : at + 1] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                at += 1
            else:
                row, at = decoder.raw_decode(text, at)
                yield line, picked(row, column) if isinstance(row, dict) else Bad(f"not an object but {_value(row)}")
        except (json.JSONDecodeError, RecursionError) as error:
            # What follows cannot be told apart from what is broken.
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            why = one_line(str(error))
            raise UserError(
                f"{file}:{where}: broken JSON ({why}) in an array: repair it, or write an object a line."
            ) from error
        wanted = not wanted


def _csv(file: str, column: str) -> Iterator[Row]:
    # The module's limit of 131,072 characters a field is meant for other data than documents.
    csv.field_size_limit(sys.maxsize)
    with opened(file) as content:
        lines = TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="")
        table = csv.reader(lines, delimiter="," if kind_of(Path(file)) == "csv" else "\t", strict=True)
        header = next(table, [])
        begin = table.line_num + 1
        while True:
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end" in str(error):  # The rest of the file has become one cell.
                    raise UserError(f"{file}:{begin}: a quote is opened and never closed: close it.") from error
                yield begin, Bad(f"broken CSV ({error})")
            else:
                if len(cells) == len(header):
                    yield begin, dict(zip(header, cells, strict=True)).get(column, Absent(tuple(header)))
                elif cells:
                    yield begin, Bad(f"it has {len(cells)} cells and the first line {len(header)}")
            begin = table.line_num + 1


def _parquet(file: str, column: str) -> Iterator[Row]:
    from pyarrow import parquet

    with open(file, "rb") as content:
        table = parquet.ParquetFile(content)
        names = table.schema_arrow.names
        wanted = [column] if column in names or column.split(".")[0] in names else []
        rows = 0
        for batch in table.iter_batches(ROWS_PER_BATCH, columns=wanted):
            yield from _arrow_rows(batch, column, tuple(names), rows)
            rows += len(batch)


def _arrow(file: str, column: str) -> Iterator[Row]:
    import pyarrow

    with pyarrow.memory_map(file) as content:
        try:
            batches = iter(pyarrow.ipc.open_stream(content))
        except pyarrow.ArrowInvalid:
            whole = pyarrow.ipc.open_file(content)
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
        rows = 0
        for batch in batches:
            for start in range(0, len(batch), ROWS_PER_BATCH):
                yield from _arrow_rows(
                    batch.slice(start, ROWS_PER_BATCH), column, tuple(batch.schema.names), rows + start
                )
            rows += len(batch)


def _arrow_rows(batch: "pyarrow.RecordBatch", column: str, names: tuple[str, ...], first: int) -> Iterator[Row]:
    """The text of each row of a batch, `first` rows after the begin of the file."""
    import pyarrow

    values = _arrow_column(batch, column)
    if values is None:
        yield from ((first + i, Absent(names)) for i in range(1, len(batch) + 1))
        return
    # As bytes, for a file may call text what is no UTF-8.
    with suppress(pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        values = values.cast(pyarrow.large_binary())
    for i, value in enumerate(values.to_pylist(), start=1):
        yield first + i, value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _arrow_column(batch: "pyarrow.RecordBatch", column: str) -> "pyarrow.Array | None":
    import pyarrow
    from pyarrow import compute

    names = [column] if column in batch.schema.names else column.split(".")
    if names[0] not in batch.schema.names:
        return None
    values = batch.column(names[0])
    for name in names[1:]:
        if not pyarrow.types.is_struct(values.type) or values.type.get_field_index(name) < 0:
            return None
        values = compute.struct_field(values, name)
    return values


READERS: dict[str, Callable[[str, str], Iterator[Row]]] = {
    "txt": _txt,
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}
