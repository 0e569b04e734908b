"""The rows of a sweep as one value: `Sweep`."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from hf_power.records.rows import ROWS_FILE, Row, load_rows
from hf_power.records.summary import Summarized, Summary, frame_of

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, repr=False)
class Sweep(Summarized, Sequence[Row]):
    """Rows in their order, and a sentence on each line of a file that could not be used.

    It is a sequence of rows, as `hf_power.fit.fit_law` takes it; ``Sweep(*read_csv(path))`` is that of another tool's table.
    """

    rows: Sequence[Row]
    problems: Sequence[str] = ()

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Sweep":
        """The rows of a sweep's folder, or of a sweep.jsonl; see `hf_power.records.rows.load_rows` for its errors."""
        path = Path(source)
        return cls(*load_rows(path / ROWS_FILE if path.is_dir() else path))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_frame(self) -> "DataFrame":
        """A row for each run: what was trained, at which rate, and its loss in nats per token."""
        return frame_of(self.rows)

    def summary(self) -> Summary:
        """What was trained, and what came of it."""
        status = Counter(row.status for row in self.rows)
        numbers = [
            (what, ", ".join(f"{value:,}" for value in sorted({getattr(row, name) for row in self.rows})))
            for what, name in (
                ("widths", "width"),
                ("tokens per step", "tokens_per_step"),
                ("horizons, tokens", "tokens"),
                ("seeds", "seed"),
            )
        ]
        numbers.append(("schedules", ", ".join(sorted({row.schedule for row in self.rows}))))
        trained = sum(row.trained_tokens for row in self.rows)
        took = f" took {trained:,} tokens" if trained else ""  # A table from elsewhere does not say.
        return Summary(
            f"{len(self.rows):,} runs{took}: {status['finished']:,} finished, {status['diverged']:,} diverged and "
            f"{status['failed']:,} failed",
            numbers,
        )
