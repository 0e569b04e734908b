"""Where a run lies beyond what its recipe's sweep has seen, in sentences."""

from collections.abc import Sequence

from hf_power.recipe.recipe import Recipe


def warnings_for(
    recipe: Recipe,
    *,
    tokens: int,
    tokens_per_step: int,
    width: int | None = None,
    weight_decay: float | None = None,
    size: int | None = None,
) -> list[str]:
    """Sentences on where a run lies outside of what the recipe's fit has seen, with the factors.

    An empty validity says nothing; a width (hidden_size) of None is unknown, a weight decay of None the recipe's, and the
    size is the one that the recipe's law asks for.
    """
    found = []
    validity, reach = recipe.validity, recipe.validity.get("extrapolates_to", {})
    lengths: tuple[tuple[int, str, Sequence[float], float | None], ...] = (
        (tokens, "tokens", validity.get("tokens", ()), reach.get("tokens")),
        (tokens_per_step, "tokens per step", validity.get("tokens_per_step", ()), reach.get("tokens_per_step")),
    )
    for value, what, seen, far in lengths:
        if off := _outside(value, seen):
            side = "within" if value <= (far or 0) else "beyond"
            known = far is not None and value >= seen[0]  # A fit says nothing of a value below those that it has seen.
            reached = f", {side} the {far:,} up to which its fit is sure of the rate" if known else ""
            found.append(f"{value:,} {what} are {off} of the sweep{reached}.")
    found += [f"{sentence}." for sentence in validity.get("misfit", [])]
    widths = [x for x in validity.get("widths", []) if x]  # A sweep from elsewhere that does not tell its width has 0.
    if width is not None and (off := _outside(width, widths)):
        carried = "muP" if recipe.parameterization == "mup" else "the law's size exponent" if recipe.size else "nothing"
        alone = " alone" if recipe.parameterization == "mup" else ""
        found.append(f"the width {width:,} is {off} of the sweep: {carried}{alone} carries the rate there.")
    if recipe.size == "parameters" and size is not None and (off := _outside(size, validity.get("parameters", []))):
        found.append(f"{size:,} parameters are {off} of the sweep: the law's size exponent carries the rate there.")
    critical = recipe.law.critical_at(tokens)
    if critical is not None and tokens_per_step > critical:
        found.append(
            f"{tokens_per_step:,} tokens per step are {tokens_per_step / critical:.3g} times the critical batch, "
            f"{critical:,.0f}: the rate no longer rises with the batch, a smaller one learns as much per token."
        )
    if None not in (weight_decay, recipe.weight_decay) and weight_decay != recipe.weight_decay:
        found.append(
            f"weight decay is {weight_decay:g}, the sweep had {recipe.weight_decay:g}: the law only holds for its own."
        )
    return found


def _outside(value: float, seen: Sequence[float]) -> str:
    """How far a value lies outside of those seen, as a factor; empty if it does not."""
    if not seen or min(seen) <= value <= max(seen):
        return ""
    if value > max(seen):
        return f"{value / max(seen):.3g} times the largest, {max(seen):,},"
    return f"{min(seen) / value:.3g} times below the smallest, {min(seen):,},"
