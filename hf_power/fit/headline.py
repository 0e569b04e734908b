"""What a fit says, in one sentence."""

import math

from hf_power.fit.result import Cell, Fit


def headline(fit: Fit) -> str:
    """The rate to use at the largest measured horizon and batch, how well b is known, and what is doubtful."""
    tokens, batch = fit.validity.tokens[1], fit.validity.tokens_per_step[1]
    sizes = [size for cell in fit.cells if cell.used and (size := cell.size_of(fit.law))]
    size = max(sizes, default=None) if fit.law.size else None
    rate, low, high = fit.predict(tokens, batch, size)
    of_size = f", {size:,} {fit.law.size}" if size else ""
    low_b, high_b = fit.intervals.b
    known = (
        "b was held" if math.isclose(low_b, high_b) else f"b = {fit.law.b:.2f} is known to +-{(high_b - low_b) / 2:.2f}"
    )
    said = (
        f"at {tokens:,} tokens and {batch:,} per step{of_size} use a peak of {rate:.2g} ({low:.2g} to {high:.2g}) with "
        f"{fit.schedule}; {known}"
    )
    if fit.validity.misfit:
        said = f"do not rely on the law beyond its cells, it does not describe them; {said}"
    doubtful = [_unused(fit.cells, "")] + ([_unused(fit.power.cells, "power ")] if fit.power else [])
    return "; ".join([said, *(part for part in doubtful if part)])


def _unused(cells: tuple[Cell, ...], kind: str) -> str:
    unused = sum(not cell.used for cell in cells)
    return f"{unused} of {len(cells)} {kind}cells have no optimum to count" if unused else ""
