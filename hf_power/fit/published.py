"""Laws of the learning rate that others have published, and what each would have cost on the cells of a fit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hf_power.fit.result import Cell, Fit
from hf_power.schedule import PAPER_LAW, PAPER_OPTIMA, Law


@dataclass(frozen=True)
class Published:
    """A law of the best peak, in the units of `Law`: tokens, and batches in sequences of 4096 tokens.

    Attributes:
        law: the source's numbers; a is 1 where it gives exponents alone.
        has_scale: whether a is the source's, for AdamW.
        base_width: of muP, at which its rates are those of the hidden matrices; None under standard parameterization.
        source: with the equation.
        note: what it holds for.
    """

    name: str
    law: Law
    has_scale: bool
    base_width: int | None
    source: str
    note: str


PAPER = Published(
    "the paper (Power)",
    PAPER_OPTIMA,
    True,
    256,
    "Shen et al. 2024, arXiv:2408.13359, eq. 6",
    "peaks of WSD under muP; its own schedule has a = 4 (eq. 7)",
)
PUBLISHED = (
    PAPER,
    # 1.79 N**-0.713 D**0.307, for the batch that is best, 0.58 D**0.571 tokens; the batch itself is not in the law.
    Published(
        "StepLaw",
        Law(1.79, 0.307, 0.0, size="parameters", size_exponent=-0.713),
        True,
        None,
        "Li et al. 2025, arXiv:2503.04715, eq. 1",
        "cosine, at its own best batch of 0.58 * tokens^0.571",
    ),
    # 0.0063 sqrt(B / 64) (2.5e9 / T)**0.3: its scale is that of another optimizer, AdamH.
    Published(
        "Delphi",
        Law(1.0, -0.3, 0.5),
        False,
        256,
        "Marin 2026, openathena.ai/blog/delphi",
        "a transfer rule, sqrt(batch) and tokens^-0.3; measured with AdamH",
    ),
    Published(
        "Bjorck",
        Law(1.0, -0.32, 0.0),
        False,
        None,
        "Bjorck et al. 2024, arXiv:2409.19913, section 4",
        "a transfer rule over the tokens at one batch and size",
    ),
    # The timescale B / (lr * decay * D) is best at a power -0.527 of D / N, so that at a given weight decay
    # lr = B / (decay * D) * (D / N)**0.527 up to a factor.
    Published(
        "Power Lines",
        Law(1.0, -1 + 0.527, 1.0, size="parameters", size_exponent=-0.527),
        False,
        None,
        "Bergsma et al. 2025, arXiv:2505.13738",
        "AdamW's timescale at a weight decay that stays",
    ),
)


@dataclass(frozen=True)
class Compared:
    """A law on the used cells of a fit: octaves of its rate over each optimum, and nats that it costs there.

    Attributes:
        off: as published; None where the source gives exponents alone.
        regret: of them, likewise.
        scaled_off, scaled_regret: with the one factor that puts its rates on the optima, on average over the cells.
        num_outside: cells whose published rate (the scaled one, without a scale) lies outside the rates that were run, where
            the regret is the U-curve's beyond its runs.
        lacks: what the law needs and the cells do not say; nothing else is known then.
    """

    name: str
    source: str
    note: str
    off: tuple[float, ...] | None = None
    regret: tuple[float, ...] | None = None
    scaled_off: tuple[float, ...] = ()
    scaled_regret: tuple[float, ...] = ()
    num_outside: int = 0
    lacks: str | None = None


def compare(fit: Fit, base_width: int | None) -> list[Compared]:
    """The fitted law and then the published ones on the used cells, units and parameterization converted.

    Under muP a hidden matrix has the rate ``lr / (width / base_width)``, and under standard parameterization lr: a law's
    rate is taken as that of the hidden matrices.

    Args:
        fit: the cells and the law that was fitted to them.
        base_width: of the runs' muP; None under standard parameterization.
    """
    cells = [cell for cell in fit.cells if cell.used]
    fitted = Published("fitted here", fit.law, True, base_width, "these rows", "it saw these cells")
    paper = (
        replace(PAPER, law=PAPER_LAW, source=PAPER.source.replace("eq. 6", "eq. 7"))
        if fit.schedule == "power"
        else PAPER
    )
    return [_compared(each, cells, base_width) for each in (fitted, paper, *PUBLISHED[1:])]


def rate_of(published: Published, cell: Cell, base_width: int | None) -> float:
    """The law's rate for a cell, as the peak of runs with muP of this base width; see `compare`."""
    rate = published.law.lr(cell.tokens, cell.tokens_per_step, cell.size_of(published.law))
    if published.base_width == base_width:
        return rate
    hidden = rate * published.base_width / cell.width if published.base_width else rate
    return hidden * cell.width / base_width if base_width else hidden


def _compared(published: Published, cells: Sequence[Cell], base_width: int | None) -> Compared:
    named = published.name, published.source, published.note
    if published.law.size and any(not cell.size_of(published.law) for cell in cells):
        return Compared(*named, lacks=f"the {published.law.size} of each model")
    # Where only one of the two has a base width, the widths enter; where both have one, their ratio alone does.
    if (published.base_width is None) != (base_width is None) and any(not cell.width for cell in cells):
        return Compared(*named, lacks="the width of each model, between muP and standard parameterization")
    cells = [replace(cell, width=cell.width or 1) for cell in cells]
    rates = [rate_of(published, cell, base_width) for cell in cells]
    off = [math.log2(rate / cell.optimum().lr) for rate, cell in zip(rates, cells, strict=True)]
    mean = sum(off) / len(off)
    scaled = [rate / 2**mean for rate in rates]
    shown = rates if published.has_scale else scaled
    return Compared(
        *named,
        off=tuple(off) if published.has_scale else None,
        regret=_regrets(cells, rates) if published.has_scale else None,
        scaled_off=tuple(x - mean for x in off),
        scaled_regret=_regrets(cells, scaled),
        num_outside=sum(not _lowest(cell) <= rate <= _highest(cell) for cell, rate in zip(cells, shown, strict=True)),
    )


def _regrets(cells: Sequence[Cell], rates: Sequence[float]) -> tuple[float, ...]:
    return tuple(cell.regret_at(rate) for cell, rate in zip(cells, rates, strict=True))


def _lowest(cell: Cell) -> float:
    return min(cell.learning_rates)


def _highest(cell: Cell) -> float:
    return max((*cell.learning_rates, *cell.diverged))


def compared_text(laws: Sequence[Compared]) -> str:
    """A table: how far each law's rates are off the optima, and what that costs, as published and with a scale of these rows."""
    lines = [
        "published laws on these cells          as published                        with the scale of these rows",
        "                                  off, mean (rms), octaves   nats      off, rms   nats     outside the runs",
    ]
    for each in laws:
        if each.lacks:
            lines.append(f"  {each.name:<18} not compared: it needs {each.lacks}, which the rows do not say")
            continue
        published = f"{'exponents alone':>26} {'':>10}"
        if each.off is not None and each.regret is not None:
            published = f"{_mean(each.off):>+16.2f} ({_rms(each.off):.2f}) {'':>3}{_mean(each.regret):>8.4f}  "
        lines.append(
            f"  {each.name:<18} {published:<40} {_rms(each.scaled_off):>8.2f} {_mean(each.scaled_regret):>8.4f} "
            f"{each.num_outside:>8} of {len(each.scaled_off)}"
        )
    lines += [f"  {each.name}: {each.source}; {each.note}" for each in laws[1:]]
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(x * x for x in values) / len(values))
