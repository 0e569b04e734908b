"""What a notebook shows of a result: a sentence and a few numbers in place of all its fields; and records as a frame."""

import dataclasses
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hf_power.records.errors import MissingPackageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pandas import DataFrame


class Summary(NamedTuple):
    """A result in a sentence, and (what, value) of the numbers beside it."""

    sentence: str
    numbers: Sequence[tuple[str, str]] = ()


class Summarized:
    """A result that prints as its sentence, and in a notebook as the sentence over a table of its numbers."""

    def summary(self) -> Summary:
        """The sentence and the numbers."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.summary().sentence}>"

    def _repr_html_(self) -> str:
        """What Jupyter shows; it has the notebook's own colours and nothing that has to be loaded."""
        sentence, numbers = self.summary()
        rows = "".join(
            f'<tr><th style="text-align:left">{html.escape(what)}</th><td style="text-align:left">{html.escape(value)}</td></tr>'
            for what, value in numbers
        )
        table = f"<table>{rows}</table>" if rows else ""
        return f"<p><strong>{type(self).__name__}</strong>: {html.escape(sentence)}</p>{table}"


def frame_of(records: "Iterable[DataclassInstance]") -> "DataFrame":
    """A pandas DataFrame with a row for each record.

    Numbers, texts and truth values have a column each; an interval NAME has the columns NAME_low and NAME_high. What is a
    list or a record of its own, or not known of any record, is left out.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingPackageError(
            'pandas is needed for a frame and is not installed: run pip install "hf_power[train]".'
        ) from error
    rows = list(records)
    columns: dict[str, list[object]] = {}
    for name in [field.name for field in dataclasses.fields(rows[0])] if rows else ():
        values = [getattr(row, name) for row in rows]
        if name.endswith("interval"):
            ends = [value or (None, None) for value in values]
            columns |= {f"{name}_low": [low for low, _ in ends], f"{name}_high": [high for _, high in ends]}
        elif all(value is None or isinstance(value, bool | int | float | str) for value in values):
            columns |= {name: values} if any(value is not None for value in values) else {}
    return pandas.DataFrame(columns)
