"""The runs of a check: the recipe's learning rate and its neighbours, at one cell that it has not seen."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import cast

from hf_power.coordinates import CoordCheck, coord_check
from hf_power.models import flops_per_token
from hf_power.plots.coordinates import plot_coord_check
from hf_power.plots.figures import require_matplotlib, save
from hf_power.recipe import Recipe, warnings_for
from hf_power.records.errors import UserError
from hf_power.records.files import replaced
from hf_power.records.machine import versions
from hf_power.records.rows import Row
from hf_power.records.schema import decode
from hf_power.settings.any_model import WIDTHS, fitting
from hf_power.settings.arguments import refuse_in_a_sweep
from hf_power.settings.settings import Settings
from hf_power.settings.target import tokens_on_one_device
from hf_power.sweep.grid import Grid, Sections, few_digits
from hf_power.sweep.jobs import Group, row_value
from hf_power.sweep.run import run_sweep
from hf_power.verify.page import Coordinates, Foreseen, Page, judge, page_text
from hf_power.verify.picture import plot_verify

FACTORS = (0.5, 1.0, 2.0)
# Factors of 2 that are added beyond an edge, up to a factor of 8 either way.
EXTENSIONS = 2
# Nats per token: about what a wrong choice of schedule costs.
TOLERANCE = 0.02
# Below this the warmup and the tail are most of the run.
FEWEST_STEPS = 10
MOVE_THE_WEIGHTS = ("optim", "label_smoothing_factor", "neftune_noise_alpha", "fp16")


def verify(settings: Settings, *, seeds: int = 3, tolerance: float = TOLERANCE) -> Page:
    """Coordinate check, then the recipe's Power schedule at half, once and twice its scale at one held-out cell.

    With L(f) the mean held-out loss over seeds at f times the recipe's a, and the parabola in log2 f through the lowest
    point and its neighbours::

        regret = L(1) - min(L(1/2), L(1), L(2), lowest point of the parabola)

    Where the lowest point is an edge, the next factor beyond it is run too, up to EXTENSIONS times; an optimum that is
    not found by then fails the recipe, however flat the curve is.

    Args:
        settings: those of a pretraining run at the cell (width, batch, tokens), with run.recipe; training.output_dir
            takes the page: verify.md, verify.json, two pictures, and the rows.
        seeds: runs at each factor.
        tolerance: regret up to which the law is trusted, in nats per token.

    Returns:
        The content of verify.json.

    Raises:
        UserError: no recipe, a recipe for other settings, or a cell that is no whole number of steps.
    """
    if settings.run.recipe is None:
        raise UserError("verify needs a recipe: pass --recipe recipe.json.")
    if seeds < 1 or not tolerance > 0:
        raise UserError(f"seeds and tolerance must be positive, got {seeds} and {tolerance}: correct them.")
    require_matplotlib()
    recipe = Recipe.load(settings.run.recipe)
    if recipe.parameterization == "standard":
        raise UserError(
            "verify tries a recipe under muP, but this one's sweep had standard parameterization: train at half, once and "
            "twice the rate of hf-power plan instead."
        )
    settings.apply_recipe()
    recipe = replace(recipe, a=recipe.law.at(settings.size_for(recipe)).a, size=None, size_exponent=0.0)
    settings.check()
    # The runs are a sweep's; what moves their numbers in pretraining alone would be left out of them.
    refuse_in_a_sweep({name: getattr(settings.training, name) for name in MOVE_THE_WEIGHTS}, "verify")
    folder = Path(settings.training.output_dir or "")
    folder.mkdir(parents=True, exist_ok=True)
    grid, group = _cell(settings, recipe, seeds)
    print(f"{_cost_text(settings, group)}\ncoordinate check of a {settings.model.family} ...", flush=True)
    check = _coordinates(settings)
    print(check.verdict, flush=True)
    rows = run_sweep(grid, folder, groups=[group])
    page = replace(judge(rows, group, recipe, tolerance), forecast=_foreseen(recipe, group, rows))
    page = page.with_coordinates(Coordinates(check.passed, check.verdict, check.slopes))
    page = replace(page, warnings=tuple(_warnings(recipe, group)), versions=versions())
    _write(page, check, folder)
    return page


def _cost_text(settings: Settings, group: Group) -> str:
    """What the runs will train, in a line."""
    runs, data = len(group.values) * len(group.seeds), settings.data
    tokens = runs * group.tokens[0]
    flops = tokens * flops_per_token(settings.model.config(vocab_size=data.vocab_size), data.block_size)
    return (
        f"{runs} runs of {group.tokens[0]:,} tokens, {tokens:,} tokens and {flops:.2g} FLOP in all; up to {EXTENSIONS} more "
        "learning rates where the best one lies on an edge"
    )


def _coordinates(settings: Settings) -> CoordCheck:
    """The check of the model's own rules; of another family than Llama and Mixtral one with small sizes, where it is deep."""
    if not settings.is_plain:
        return coord_check(settings.model.config(), preset=settings.mup.preset)
    config, fixed = settings.model.config(), settings.model.fixed or ()
    multiplier = settings.mup.embedding_multiplier
    small = fitting(config, WIDTHS, fixed)[0]
    return coord_check(small, widths=WIDTHS, form="plain", fixed=fixed, embedding_multiplier=multiplier)


@dataclass(frozen=True)
class _Lengths:
    """The arguments of the schedule that a grid has its own names for; 0 and None mean that they were not given."""

    warmup_tokens: float = 0
    decay_ratio: float | None = None
    decay_shape: str | None = None


def _cell(settings: Settings, recipe: Recipe, seeds: int) -> tuple[Grid, Group]:
    """The one cell as a sweep's grid and group."""
    args, batch = settings.training, tokens_on_one_device(settings)
    tokens = (settings.run.tokens or 0) // batch * batch
    given = decode(_Lengths, settings.schedule_kwargs, "lr_scheduler_kwargs", "correct it")
    width = settings.model.hidden_size
    grid = Grid(
        # Without the length, which the grid has as its horizon and each row states anew.
        cast(Sections, settings.changed(run={"tokens": None}).to_dict()),
        widths=(width,),
        tokens_per_step=(batch,),
        tokens=(tokens,),
        schedules={"power": FACTORS},
        seeds=tuple(range(args.seed, args.seed + seeds)),
        warmup_tokens=int(given.warmup_tokens) or args.get_warmup_steps(tokens // batch) * batch,
        decay_ratio=recipe.decay_ratio if given.decay_ratio is None else given.decay_ratio,
        decay_shape=given.decay_shape or recipe.decay_shape,
        max_lr=recipe.max_lr,
        max_extensions=EXTENSIONS,
    )
    if tokens < FEWEST_STEPS * batch:
        raise UserError(
            f"{settings.run.tokens or 0:,} tokens are {tokens // batch} steps of {batch:,}, too few to verify: raise tokens."
        )
    values = tuple(few_digits(factor * recipe.a) for factor in FACTORS)
    law = recipe.law
    return grid, Group("power", width, batch, (tokens,), grid.seeds, values, law)


def _warnings(recipe: Recipe, group: Group) -> list[str]:
    """What the check does not cover: a cell within the fitted range proves nothing about the law's reach."""
    tokens, batch, width, validity = group.tokens[0], group.tokens_per_step, group.width, recipe.validity
    found = warnings_for(recipe, tokens=tokens, tokens_per_step=batch, width=width)
    if validity and width in validity["widths"]:
        (low, high), (small, large) = validity["tokens"], validity["tokens_per_step"]
        if low <= tokens <= high and small <= batch <= large:
            found.append(
                "the cell lies within the range that the law was fitted on: take a larger width, batch or horizon."
            )
    return found


def _foreseen(recipe: Recipe, group: Group, rows: Sequence[Row]) -> Foreseen | None:
    """The recipe's forecast at the cell, beside the lowest mean over the seeds; None without either."""
    forecast = recipe.forecast
    found: dict[float, list[float]] = {}
    for row in rows:
        found.setdefault(row_value(row), []).append(math.inf if row.loss is None else row.loss)
    lowest = min(fmean(losses) for losses in found.values())
    if forecast is None or not math.isfinite(lowest):
        return None
    size = rows[0].parameters if forecast.size == "parameters" else group.width
    place = group.tokens[0], group.tokens_per_step, size
    if forecast.cannot(*place):
        return None
    return Foreseen(*forecast.at(*place), lowest, forecast.schedule)


def _write(page: Page, check: CoordCheck, folder: Path) -> None:
    page.save(folder)
    save(plot_coord_check(check), folder / "coord_check.png")
    save(plot_verify(page), folder / "verify.png")
    with replaced(folder / "verify.md") as temporary:
        temporary.write_text(page_text(page), encoding="utf-8")
