"""The check before a big run: is muP right, and is the recipe's learning rate the best one at a cell it has not seen?"""

import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_power.coord_check import CoordCheck, coord_check
from hf_power.plots import figures as plots
from hf_power.plots import fit as fit_plots
from hf_power.recipe import Recipe, warnings_for
from hf_power.records.errors import UserError
from hf_power.records.files import replaced, write_json
from hf_power.records.machine import versions
from hf_power.settings.settings import Settings, parse_tokens
from hf_power.sweep.grid import Grid, Group, few_digits, row_value
from hf_power.sweep.run import run_sweep

SCHEMA = 1
FACTORS = (0.5, 1.0, 2.0)
EXTENSIONS = 2  # up to a factor of 8 either way
TOLERANCE = 0.02  # nats per token: about what a wrong choice of schedule costs


def verify(settings: Settings, *, seeds: int = 2, tolerance: float = TOLERANCE) -> dict[str, Any]:
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
        verify.json: {"verdict": "passed" | "FAILED", "regret", "regret_interval", "points", "parabola", "coord_check",
        "reasons", "warnings", ...}.

    Raises:
        ValueError: no recipe, a recipe for other settings, or a cell that is no whole number of steps.
    """
    if settings.run.recipe is None:
        raise UserError("verify needs a recipe: pass --recipe recipe.json.")
    if seeds < 1 or not tolerance > 0:
        raise UserError(f"seeds and tolerance must be positive, got {seeds} and {tolerance}: correct them.")
    plots.require_matplotlib()
    recipe = Recipe.load(settings.run.recipe)
    settings.apply_recipe()
    settings.check()
    folder = Path(settings.training.output_dir or "")
    folder.mkdir(parents=True, exist_ok=True)
    grid, group = _cell(settings, recipe, seeds)
    print(f"coordinate check of a {settings.model.model_type} ...", flush=True)
    check = coord_check(settings.model.config(), preset=settings.mup.preset)
    print(check.verdict, flush=True)
    rows = run_sweep(grid, folder, groups=[group])
    page = _judge(rows, group, recipe, tolerance)
    page["warnings"] = warnings_for(
        recipe, tokens=group.tokens[0], tokens_per_step=group.tokens_per_step, width=group.width
    ) + _inside(recipe, group)
    page["coord_check"] = {"passed": check.passed, "verdict": check.verdict, "slopes": check.slopes}
    if not check.passed:
        page |= {"verdict": "FAILED", "reasons": [f"coordinate check {check.verdict}", *page["reasons"]]}
    page["versions"] = versions()
    _write(page, check, folder)
    return page


def _cell(settings: Settings, recipe: Recipe, seeds: int) -> tuple[Grid, Group]:
    """The one cell as a sweep's grid and group."""
    args, block = settings.training, settings.data.block_size
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * block
    tokens = parse_tokens(settings.run.tokens or 0, "tokens") // batch * batch
    kwargs = args.lr_scheduler_kwargs or {}
    sections = settings.to_dict()
    sections["run"].pop("tokens", None)
    width = settings.model.hidden_size
    grid = Grid(
        sections,
        widths=(width,),
        tokens_per_step=(batch,),
        tokens=(tokens,),
        schedules={"power": FACTORS},
        seeds=tuple(range(args.seed, args.seed + seeds)),
        warmup_tokens=kwargs.get("warmup_tokens") or args.get_warmup_steps(tokens // batch) * batch,
        decay_ratio=kwargs.get("decay_ratio", recipe.decay_ratio),
        decay_shape=kwargs.get("decay_shape", recipe.decay_shape),
        max_lr=recipe.max_lr,
        max_extensions=EXTENSIONS,
    )
    if tokens < 10 * batch:
        raise UserError(f"{tokens:,} tokens are {tokens // batch} steps of {batch:,}, too few to verify: raise tokens.")
    values = tuple(few_digits(factor * recipe.a) for factor in FACTORS)
    return grid, Group("power", width, batch, (tokens,), grid.seeds, values, recipe.schedule_kwargs())


def _judge(rows: list[dict[str, Any]], group: Group, recipe: Recipe, tolerance: float) -> dict[str, Any]:
    """Mean losses, parabola, regret and verdict."""
    losses: dict[float, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row_value(row), row["seed"])):
        factor = 2.0 ** round(math.log2(row_value(row) / recipe.a))
        losses.setdefault(factor, []).append(math.inf if row["loss"] is None else row["loss"])
    means = {factor: fmean(each) for factor, each in losses.items()}
    points = [{"factor": f, "loss": means[f], "sd": _sd(losses[f])} for f in means]
    lowest = min(means, key=lambda f: means[f])
    parabola = None
    if lowest not in (min(means), max(means)):
        parabola = _parabola(lowest, means[lowest / 2], means[lowest], means[2 * lowest])
    best = min(means[lowest], parabola["min_loss"] if parabola else math.inf)
    regret = means[1.0] - best
    reasons = []
    if not math.isfinite(means[1.0]):
        reasons.append("a run at the recipe's own learning rate diverged")
    elif lowest in (min(means), max(means)):
        reasons.append(f"the best learning rate lies beyond {lowest:g} times the recipe's")
    elif regret > tolerance:
        reasons.append(
            f"{lowest:g} times the recipe's learning rate is better by {regret:.4f} nats per token, more than {tolerance:g}"
        )
    page: dict[str, Any] = {"schema": SCHEMA, "verdict": "FAILED" if reasons else "passed", "reasons": reasons}
    page |= {"tolerance": tolerance, "regret": regret, "regret_interval": _regret_interval(losses, regret)}
    page |= {"points": points, "losses": {f"{f:g}": each for f, each in losses.items()}, "parabola": parabola}
    page["cell"] = {"width": group.width, "tokens_per_step": group.tokens_per_step, "tokens": group.tokens[0]}
    page["recipe"] = {"a": recipe.a, "b": recipe.b, "batch_exponent": recipe.batch_exponent, "max_lr": recipe.max_lr}
    page["seeds"] = list(group.seeds)
    return page


def _sd(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


def _parabola(lowest: float, half: float, one: float, two: float) -> dict[str, float] | None:
    """The parabola in log2 of the factor through a lowest point and its neighbours, an octave away on either side."""
    curvature = (half + two - 2 * one) / 2
    if not math.isfinite(curvature) or curvature <= 0:
        return None
    octaves = (half - two) / (4 * curvature)
    return {
        "optimum_factor": lowest * 2**octaves,
        "min_loss": one - curvature * octaves**2,
        "curvature": curvature,
    }


def _regret_interval(losses: dict[float, list[float]], regret: float) -> list[float] | None:
    """95 % of the regret against the best factor, from differences between runs of the same seed; one seed: None."""
    from scipy.stats import t

    best = min(losses, key=lambda f: fmean(losses[f]))
    gaps = [one - other for one, other in zip(losses[1.0], losses[best], strict=True)]
    if best == 1.0:  # the next best one says how sure that is
        best = min((f for f in losses if f != 1.0), key=lambda f: fmean(losses[f]))
        gaps = [one - other for one, other in zip(losses[1.0], losses[best], strict=True)]
    if len(gaps) < 2 or not all(map(math.isfinite, gaps)):
        return None
    error = float(t.ppf(0.975, len(gaps) - 1)) * stdev(gaps) / math.sqrt(len(gaps))
    return [max(0.0, regret - error), max(0.0, regret + error)]


def _inside(recipe: Recipe, group: Group) -> list[str]:
    """A cell within the fitted range proves nothing about the law's reach."""
    validity = recipe.validity
    if not validity:
        return []
    low, high = validity["tokens"]
    small, large = validity["tokens_per_step"]
    beyond = group.width not in validity["widths"] or not low <= group.tokens[0] <= high
    if beyond or not small <= group.tokens_per_step <= large:
        return []
    return ["the cell lies within the range that the law was fitted on: take a larger width, batch or horizon."]


def _write(page: dict[str, Any], check: CoordCheck, folder: Path) -> None:
    write_json(folder / "verify.json", page)
    plots.plot_coord_check(check, folder / "coord_check.png")
    fit_plots.plot_verify(page, folder / "verify.png")
    with replaced(folder / "verify.md") as temporary:
        temporary.write_text(page_text(page), encoding="utf-8")


def page_text(page: dict[str, Any]) -> str:
    """The page for a review, in Markdown."""
    cell, recipe, interval = page["cell"], page["recipe"], page["regret_interval"]
    spread = f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else " (one seed: no interval)"
    lines = [
        f"# Check before the run: {page['verdict']}",
        "",
        *(f"* {reason}." for reason in page["reasons"]),
        f"* Cell: width {cell['width']}, {cell['tokens_per_step']:,} tokens per step, {cell['tokens']:,} tokens, "
        f"seeds {', '.join(map(str, page['seeds']))}.",
        f"* Law: min({recipe['max_lr']:g}, {recipe['a']:g} * beta^{recipe['batch_exponent']:g} * n^{recipe['b']:g}).",
        f"* Regret of the recipe's learning rate: {page['regret']:.4f} nats per token{spread}; "
        f"tolerance {page['tolerance']:g}.",
        f"* Coordinate check {page['coord_check']['verdict']}.",
        *(f"* Warning: {warning}" for warning in page["warnings"]),
        "",
        "| factor on the learning rate | held-out loss (nats per token) | sd over seeds |",
        "|---:|---:|---:|",
        *(
            f"| {p['factor']:g} | {p['loss']:.4f} | {'' if p['sd'] is None else format(p['sd'], '.4f')} |"
            for p in page["points"]
        ),
        "",
        "![Loss over the factor on the learning rate](verify.png)",
        "",
        "![Coordinate check](coord_check.png)",
        "",
        "The runs are in sweep.jsonl beside this page, the numbers in verify.json.",
        "",
    ]
    return "\n".join(lines)
