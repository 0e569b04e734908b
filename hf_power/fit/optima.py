"""The optima of cells in log2, and the numbers of a law in log2."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from hf_power.fit.cells import draw_errors
from hf_power.fit.result import Draw, FittedCell
from hf_power.fit.squares import Array
from hf_power.schedule import CRITICAL_AT_TOKENS, TOKENS_PER_BETA, Law, beta

REFERENCE = math.log2(CRITICAL_AT_TOKENS)


class Optima(NamedTuple):
    """Used cells in log2, one entry a cell; `sd` is in octaves, `errors` has a bootstrap draw a row.

    size is what the law's size counts, 0 where it counts none.
    """

    tokens: Array
    beta: Array
    width: Array
    size: Array
    lr: Array
    sd: Array
    errors: Array

    @classmethod
    def of(
        cls, cells: Sequence[FittedCell], num_samples: int, generator: np.random.Generator, size: str | None = None
    ) -> "Optima":
        """The optima of used cells."""
        sizes = [cell.parameters if size == "parameters" else cell.width for cell in cells] if size else [1]
        return cls(
            tokens=np.log2([cell.tokens for cell in cells]),
            beta=np.log2([beta(cell.tokens_per_step) for cell in cells]),
            width=np.log2([max(cell.width, 1) for cell in cells]),
            size=np.log2([max(each or 1, 1) for each in sizes]) * np.ones(len(cells)),
            lr=np.log2([cell.optimum().lr for cell in cells]),
            sd=np.array([cell.optimum().sd_octaves for cell in cells], dtype=np.float64),
            errors=draw_errors(cells, num_samples, generator),
        )

    @property
    def places(self) -> tuple[Array, Array, Array]:
        """Where the cells are: log2 of tokens, beta and size."""
        return self.tokens, self.beta, self.size


class Parameters(NamedTuple):
    """Of the law in log2, see `hf_power.fit.form.Form`; an infinite cap is none. Numbers, or arrays of draws."""

    log2_a: float
    b: float
    c: float
    cap: float
    k: float
    s: float

    def cap_at(self, log2_tokens: float) -> float:
        """log2 beta of the critical batch."""
        return self.cap + self.k * (log2_tokens - REFERENCE)

    def log2_lr(self, log2_tokens: Array, log2_beta: Array, log2_size: Array) -> Array:
        """log2 of the law's rate; arrays are broadcast."""
        capped = np.minimum(log2_beta, self.cap + self.k * (log2_tokens - REFERENCE))
        return np.asarray(self.log2_a + self.b * log2_tokens + self.c * capped + self.s * log2_size)

    def law(self, size: Literal["parameters", "width"] | None) -> Law:
        """The law in its own units."""
        a, b, c, critical, k, s = self.draw()
        return Law(a, b, c, critical, k, size, s)

    def draw(self) -> Draw:
        """The numbers in their own units."""
        critical = 2**self.cap * TOKENS_PER_BETA if math.isfinite(self.cap) else None
        return 2**self.log2_a, self.b, self.c, critical, self.k, self.s
