"""The documents of local files: `read_documents` yields the text of each, and counts or names what cannot be read.

Only the text column is looked at; what else a row holds may be of any type, in any encoding.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from hf_power.data.files import UNREADABLE, kind_of
from hf_power.data.readers import READERS, Absent, Bad, Row, fault_of, kind_in_words
from hf_power.records.errors import UserError, reason

# A file is refused once so many of its rows have been read and none has the text column.
ROWS_WITHOUT_TEXT = 1000


@dataclass
class Counts:
    """How many documents there were: `read` in all, of which those that are `empty` or `skipped` are not trained on.

    A document without text, or with null for it, is empty. Skipped are those that cannot be read, at most `limit`. A
    stream, which reads its documents again and again, counts each skipped one once, and counts nothing else.
    """

    limit: int = 0
    read: int = 0
    empty: int = 0
    skipped: int = 0
    _places: set[tuple[str, int]] = field(default_factory=set, repr=False)

    def skip(self, file: str, line: int, why: str) -> None:
        """Count a document that cannot be read; a UserError that names it if there are more than the limit."""
        self._places.add((file, line))
        self.skipped = len(self._places)
        if self.skipped <= self.limit:
            return
        what = "convert it to UTF-8" if kind_of(Path(file)) == "txt" else "repair or delete the line"
        if self.limit:
            raise UserError(
                f"{file}:{line}: {why}, and with the lines before it that cannot be read there are more than "
                f"skip_bad_lines={self.limit}: {what}, or raise skip_bad_lines."
            )
        raise UserError(
            f"{file}:{line}: {why}: {what}, or leave such lines out with --skip_bad_lines N, at most N of them."
        )


def read_documents(files: Sequence[str], column: str, counts: Counts) -> Iterator[str]:
    """The text of each document of the files, one file after the other.

    Raises:
        UserError: a file that is damaged or in which no row has the column, or more bad lines than the limit of the counts.
    """
    for file in files:
        found, without = False, 0
        missing: Absent | None = None
        for line, value in _undamaged(file, column):
            counts.read += 1
            if isinstance(value, str) and (fault := fault_of(value)) is not None:
                value = Bad(fault.why)
            found = found or not isinstance(value, Absent | Bad)
            if isinstance(value, Absent):
                missing, without = value, without + 1
                if without == ROWS_WITHOUT_TEXT and not found:
                    break
            if value is None or value == "" or isinstance(value, Absent):
                counts.empty += 1
            elif isinstance(value, str):
                yield value
            else:
                why = value.why if isinstance(value, Bad) else f"{column} is {kind_in_words(value)} and no text"
                if isinstance(value, list | dict):
                    why += " (chats and token ids have to be made into one text each)"
                counts.skip(file, line, why)
        if missing is not None and not found:
            _refuse_column(file, column, missing)


def _undamaged(file: str, column: str) -> Iterator[Row]:
    """The rows of a file; a UserError where the rest of it cannot be read."""
    import pyarrow

    rows, line = READERS[str(kind_of(Path(file)))](file, column), 0
    while True:
        try:
            line, value = next(rows)
        except StopIteration:
            return
        # ArrowException has the types of the standard library for bases, but not always.
        except (*UNREADABLE, csv.Error, pyarrow.ArrowException) as error:
            raise UserError(
                f"{file} cannot be read beyond line {line} ({reason(error)}): it is cut, damaged or of "
                "another kind, so get it anew or delete it."
            ) from error
        yield line, value


def _refuse_column(file: str, column: str, absent: Absent) -> NoReturn:
    raise UserError(
        f"{file} has no column {column!r}: pass --text_column with one of "
        f"{', '.join(absent.columns[:20]) or '(its rows are empty)'}, or choose other files."
    )
