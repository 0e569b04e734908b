"""A recipe for people: in a sentence with a few numbers, and in a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_power.plots.figures import (
    BLACK,
    GRAY,
    LEGEND,
    decimal_rates,
    distinct_lines,
    new_figure,
    ordered_colors,
    si_formatter,
)
from hf_power.records.errors import UserError
from hf_power.records.summary import Summary
from hf_power.schedule.law import TOKENS_PER_BETA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_power.recipe.recipe import Recipe

# What is drawn of a recipe that no sweep has made.
_TOKENS, _BATCH = (1e9, 1e12), 1024 * TOKENS_PER_BETA
_POINTS = 200


def recipe_summary(recipe: "Recipe") -> Summary:
    """The law under its cap, how far it was measured, and the settings that it holds for."""
    seen = recipe.validity
    numbers = [("law", recipe.law.formula(recipe.max_lr))]
    for what, ends in (("tokens seen", seen.get("tokens")), ("tokens per step seen", seen.get("tokens_per_step"))):
        numbers += [(what, f"{ends[0]:,.0f} to {ends[1]:,.0f}")] if ends else []
    if reach := seen.get("extrapolates_to", {}).get("tokens"):
        numbers.append(("trusted up to, tokens", f"{reach:,.0f}"))
    tail = f"{recipe.decay_ratio:.0%} of the run, {recipe.decay_shape}"
    numbers += [
        ("tail", tail),
        ("weight decay", "not known" if recipe.weight_decay is None else f"{recipe.weight_decay:g}"),
    ]
    if recipe.warmup_tokens is not None:
        numbers.append(("warmup, tokens", f"{recipe.warmup_tokens:,}"))
    how = f"muP in the {recipe.form} form, base width {recipe.base_width:,}"
    numbers.append(("parameterization", how if recipe.parameterization == "mup" else "standard"))
    numbers += [(f"best peak of {name}", law.formula()) for name, law in recipe.laws.items()]
    numbers += [("beware", sentence) for sentence in seen.get("misfit", [])]
    return Summary(f"{recipe.law.formula(recipe.max_lr)}, {_measured(recipe)}", numbers)


def _measured(recipe: "Recipe") -> str:
    seen = recipe.validity
    if "tokens" not in seen or "tokens_per_step" not in seen:
        return "which no sweep of yours has measured"
    return f"measured up to {seen['tokens'][1]:,.0f} tokens and {seen['tokens_per_step'][1]:,.0f} per step"


def plot_recipe(
    recipe: "Recipe", tokens: Sequence[float] | None = None, tokens_per_step: Sequence[int] | None = None
) -> "Figure":
    """Power's rate over the tokens seen under its cap, a line for each batch, each with its 95 % interval.

    What the sweep has measured is shaded. A law with a size is drawn at the largest one.

    Args:
        tokens: the first and the last number of tokens; None: from the shortest horizon of the sweep to the farthest one
            that the law is trusted for.
        tokens_per_step: the batches; None: the smallest and the largest of the sweep.

    Raises:
        UserError: no batch, or tokens that are not positive and rising.
    """
    seen = recipe.validity
    measured = seen.get("tokens")
    reach = seen.get("extrapolates_to", {}).get("tokens", 0.0)
    low, high = tokens or ((measured[0], max(measured[1], reach)) if measured else _TOKENS)
    batches = sorted({round(batch) for batch in tokens_per_step or seen.get("tokens_per_step") or (_BATCH,)})
    if not 0 < low < high or batches[0] < 1:
        raise UserError(
            f"tokens must rise from above 0 and batches be positive, got {low:g} to {high:g}, and {batches}."
        )
    sizes = seen.get("parameters", []) if recipe.size == "parameters" else seen.get("widths", [])
    size = max(sizes, default=None) if recipe.size else None
    figure = new_figure(7.5, 4.6)
    panel = figure.subplots()
    if measured:
        panel.axvspan(*measured, color=GRAY, alpha=0.15, linewidth=0, label="measured horizons")
    x = np.geomspace(low, high, _POINTS)
    for color, line, batch in zip(ordered_colors(len(batches)), distinct_lines(len(batches)), batches, strict=True):
        rates = np.array([recipe.law.lr(n, batch, size) for n in x])
        ends = np.array([recipe.lr_interval(n, batch, size) for n in x])
        panel.plot(
            x, np.minimum(rates, recipe.max_lr), line, color=color, linewidth=2, label=f"{batch:,} tokens per step"
        )
        band = np.minimum(ends, recipe.max_lr).T
        panel.fill_between(x, *band, color=color, alpha=0.15, linewidth=0)
    panel.axhline(recipe.max_lr, color=BLACK, linewidth=0.9, linestyle=":", label=f"the cap, {recipe.max_lr:g}")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlabel("tokens seen (bands: 95 % of a new run's best rate)")
    panel.set_ylabel("learning rate")
    panel.xaxis.set_major_formatter(si_formatter())
    decimal_rates(panel)
    panel.grid(alpha=0.3)
    end, batch = measured[1] if measured else high, batches[-1]
    rate = min(recipe.max_lr, recipe.law.lr(end, batch, size))
    near, far = (min(recipe.max_lr, each) for each in recipe.lr_interval(end, batch, size))
    between = f" ({near:.2g} to {far:.2g})" if near < far else ""
    which = "the longest horizon measured" if measured else "where this picture ends"
    figure.suptitle(f"{rate:.2g}{between} after {end:,.0f} tokens, {which}, with {batch:,} per step", fontsize=11)
    figure.legend(ncols=3, **LEGEND)
    return figure
