"""A table of text as trackers and spreadsheets export it: its encoding, its delimiter, and how it writes numbers."""

import csv
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_power.records.errors import UserError, refused_by

_DELIMITERS = ",;\t|"
# What stands in a cell that has no value.
_EMPTY = {"", "-", "--", "n/a", "na", "#n/a", "none", "null", "nil"}
_NOT_FINITE = {"nan", "inf", "infinity", "∞"}
_UNITS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_SPACES = " '_\u00a0\u2009\u202f\u2019"
# A number with a decimal point may part its thousands by commas, one with a decimal comma by points.
_FORMS = {
    decimal: re.compile(
        rf"(?P<sign>[+-]?)(?P<whole>[1-9]\d{{0,2}}(?:[{thousands}{_SPACES}]\d{{3}})+|\d*)(?:{decimal}(?P<part>\d*))?"
        r"(?P<exponent>[eE][+-]?\d+)?\s*(?P<unit>[kKMBGT]?)"
    )
    for decimal, thousands in ((r"\.", ","), (",", r"\."))
}
_POINT, _COMMA = _FORMS


@dataclass(frozen=True)
class Table:
    """A header, and the records below it, each with the number of its line; empty records are left out."""

    path: str
    header: list[str]
    records: list[tuple[int, dict[str, str]]]
    delimiter: str

    @classmethod
    def read(cls, path: Path) -> "Table":
        """Read a CSV or TSV in UTF-8, UTF-16 or cp1252, parted by commas, semicolons, tabs or bars, or JSON; gzip or not.

        JSON is one mapping per run, on lines of their own or not, in a list, under a name, or by the runs' names; or a
        table by columns. A mapping inside has the columns "config.lr" and so on.

        Raises:
            UserError: it is no text, a name stands twice in its header, or a line has more cells than the header.
        """
        text = _decoded(path)
        if text.lstrip().startswith(("{", "[")):
            records = _json_records(text, path)
            names = list(dict.fromkeys(name for _, record in records for name in record))
            return cls(str(path), names, [(i, dict.fromkeys(names, "") | record) for i, record in records], ",")
        delimiter, text = _delimiter(text)
        lines = _lines(text, delimiter, path)
        if not lines:
            raise UserError(f"{path} is empty: pass a CSV file with a header and one line per run.")
        header = [name.strip() for name in lines[0][1]]
        while header and not header[-1]:
            header.pop()
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            raise UserError(f"{path} has two columns {twice[0]!r}: rename one of them.")
        records = []
        for number, cells in lines[1:]:
            values = [cell.strip() for cell in cells]
            if any(values[len(header) :]):
                raise UserError(
                    f"line {number} of {path} has {len(values)} cells, but the header has {len(header)}: put numbers that "
                    f"hold the delimiter {delimiter!r} in quotes."
                )
            if any(values):
                values += [""] * (len(header) - len(values))
                records.append((number, dict(zip(header, values, strict=False))))
        return cls(str(path), header, records, delimiter)

    def decimals(self, columns: Sequence[str]) -> dict[str, str]:
        """Column -> its decimal sign, as a pattern: a point, unless only a comma reads all of its cells.

        A column whose cells both read, such as "3,214", takes the sign that other columns need; if none does, a comma
        where semicolons part the cells, as spreadsheets write them in countries with a decimal comma.
        """
        fits = {}
        for column in columns:
            cells = [text for _, record in self.records if not is_empty(text := record[column])]
            fits[column] = [decimal for decimal in _FORMS if all(_reads(cell, decimal) for cell in cells)]
        needed = {found[0] for found in fits.values() if len(found) == 1}
        usual = _COMMA if needed == {_COMMA} or (not needed and self.delimiter == ";") else _POINT
        return {column: found[0] if len(found) == 1 else usual for column, found in fits.items()}


def is_empty(text: str) -> bool:
    """Whether a cell says that there is no value."""
    return text.lower() in _EMPTY


def number(text: str, decimal: str) -> float | None:
    """The number in a cell, by the column's decimal sign (see `Table.decimals`); nan or inf as such, None if it is none."""
    if text.lower().lstrip("+-") in _NOT_FINITE:
        return math.nan if "nan" in text.lower() else math.inf
    found = _FORMS[decimal].fullmatch(text)
    if found is None or not (found["whole"] or found["part"]):
        return None
    whole = re.sub(rf"[.,{_SPACES}]", "", found["whole"])
    return float(f"{found['sign']}{whole or 0}.{found['part'] or 0}{found['exponent'] or ''}") * _UNITS[found["unit"]]


def _reads(text: str, decimal: str) -> bool:
    return number(text, decimal) is not None


def _json_records(text: str, path: Path) -> list[tuple[int, dict[str, str]]]:
    """The mappings of JSON, flat and as text, each with the number of its line, or of its place in a table."""
    values = []
    decoder, position, line = json.JSONDecoder(), 0, 1
    while position < len(text):
        if text[position].isspace():
            line += text[position] == "\n"
            position += 1
            continue
        with refused_by(f"the JSON at line {line} of {path}"):
            value, end = decoder.raw_decode(text, position)
        values.append((line, value))
        line += text.count("\n", position, end)
        position = end
    if len(values) == 1:
        with refused_by(f"the table in {path}"):
            values = list(enumerate(_rows_within(values[0][1]), start=1))
    for number, value in values:
        if not isinstance(value, dict):
            raise UserError(f"line {number} of {path} is no mapping of columns to values: export the runs as CSV.")
    return [(number, _flat(value)) for number, value in values]


def _rows_within(whole: Any) -> list[Any]:
    """The rows of one JSON value: a list, or a mapping that holds one, or columns, or rows by name, or is a row itself."""
    if isinstance(whole, list):
        return whole
    if isinstance(names := whole.get("columns"), list) and isinstance(rows := whole.get("data"), list):
        # A table of Weights & Biases, and what pandas writes with orient="split".
        return [dict(zip(names, row, strict=True)) if isinstance(row, list) else row for row in rows]
    parts = list(whole.values())
    lists = [part for part in parts if isinstance(part, list) and part]
    tables = [part for part in lists if all(isinstance(each, dict) for each in part)]
    if len(tables) == 1:
        return tables[0]
    if lists and len(lists) == len(parts) and len(set(map(len, lists))) == 1:
        return [dict(zip(whole, cells, strict=True)) for cells in zip(*lists, strict=True)]
    if parts and all(isinstance(part, dict) for part in parts):
        shared = set.intersection(*map(set, parts))
        if shared and all(key.isdecimal() for key in shared):  # pandas writes columns by the number of the row.
            return [{name: column[key] for name, column in whole.items()} for key in parts[0] if key in shared]
        if shared:
            return parts
    return [whole]


def _flat(record: Mapping[str, object]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in record.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(each, dict) and {"key", "value"} <= each.keys() for each in value)
        ):
            value = {each["key"]: each["value"] for each in value}  # As MLflow writes parameters and metrics.
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": text for inner, text in _flat(value).items()}
        else:
            flat[name] = "" if value is None else str(value).strip()
    return flat


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        with refused_by(str(path)):
            content = gzip.decompress(content)
    if content.startswith((b"PK\x03\x04", b"PAR1", b"\xd0\xcf\x11\xe0", b"%PDF")):
        raise UserError(f"{path} is a packed file or a workbook, not text: export the runs as CSV.")
    marks: Mapping[bytes, str] = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
    encoding = next((name for mark, name in marks.items() if content.startswith(mark)), None)
    if encoding is None and b"\0" in content[:200]:
        # Text of mostly ASCII letters in UTF-16 has a zero in every other byte; which one says the order.
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    for each in (encoding,) if encoding else ("utf-8", "cp1252"):
        try:
            text = content.decode(each)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text
    raise UserError(f"{path} is not text in UTF-8, UTF-16 or cp1252: export the runs as CSV in UTF-8.")


def _delimiter(text: str) -> tuple[str, str]:
    """The delimiter, by the header, and the text without a line "sep=;" that spreadsheets put first."""
    first, _, rest = text.lstrip("\r\n").partition("\n")
    if said := re.fullmatch(r"sep=(.)\s*", first):
        return said[1], rest
    outside = re.sub(r'"[^"]*"', "", first)
    return max(_DELIMITERS, key=outside.count), text


def _lines(text: str, delimiter: str, path: Path) -> list[tuple[int, list[str]]]:
    """Number and cells of each line that is not blank."""
    limit = csv.field_size_limit(max(len(text), 131_072))  # Notes in a cell can be longer than the module's limit.
    try:
        reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
        return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as a table: {error}.") from error
    finally:
        csv.field_size_limit(limit)
