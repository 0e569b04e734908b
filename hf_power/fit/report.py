"""From a sweep's rows to files: fit.json, recipe.json and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypedDict

from hf_power.fit.elsewhere import read_csv
from hf_power.fit.fit import fit_law, fit_laws
from hf_power.fit.forecast import fit_forecast, forecast_text
from hf_power.fit.form import Critical, Size
from hf_power.fit.published import Compared, compare, compared_text
from hf_power.fit.result import FIT_FILE, Fit
from hf_power.fit.text import fit_text
from hf_power.fit.validity import check_falling
from hf_power.plots.cells import pages_of, plot_cells
from hf_power.plots.figures import require_matplotlib, save
from hf_power.plots.law import plot_law, plot_map
from hf_power.plots.published import plot_published
from hf_power.recipe import FILE_NAME, Recipe
from hf_power.records.errors import UserError
from hf_power.records.rows import ROWS_FILE, Row, load_rows
from hf_power.records.schema import encode
from hf_power.settings.new import TARGET_FILE


@dataclass(frozen=True)
class Elsewhere:
    """What a CSV needs beside its rows, and what it cannot say of its runs; None is left open in the recipe.

    Attributes:
        columns: our name -> theirs, see `hf_power.fit.elsewhere.read_csv`.
        block_size: tokens per sequence, where the batch is in sequences.
        base_width: of muP; None: the runs had standard parameterization.
        weight_decay, warmup_tokens, decay_ratio, decay_shape, model_type, tokenizer: see `Recipe`.
    """

    columns: Mapping[str, str] | None = None
    block_size: int | None = None
    base_width: int | None = None
    weight_decay: float | None = None
    warmup_tokens: int | None = None
    decay_ratio: float | None = None
    decay_shape: str | None = None
    model_type: str | None = None
    tokenizer: str | None = None

    def told(self) -> dict[str, object]:
        """The fields of a recipe."""
        names = ("base_width", "warmup_tokens", "decay_ratio", "decay_shape", "model_type", "tokenizer")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        kind = "standard" if self.base_width is None else "mup"
        return values | {"parameterization": kind, "weight_decay": self.weight_decay}

    def open(self) -> list[str]:
        """What the recipe leaves open, and how to say it."""
        names = {
            name: f"--{name}" for name in ("weight_decay", "warmup_tokens", "decay_ratio", "tokenizer", "model_type")
        }
        return [option for name, option in names.items() if getattr(self, name) is None]


def fit_sweep(
    source: Path,
    folder: Path | None = None,
    *,
    schedule: str | None = None,
    batch_exponent: float | None = None,
    critical_batch: Critical = "growing",
    size: Size | None = None,
    elsewhere: Elsewhere | None = None,
    published: bool = False,
) -> str:
    """Fit a sweep; write fit.json, recipe.json and the pictures cells.png, law.png and map.png.

    Args:
        source: folder of a sweep, its sweep.jsonl, or a CSV of runs from elsewhere.
        folder: where to write; None: beside the rows.
        schedule: whose optima make the law; None: warmup_stable_decay of a sweep, and of a CSV the one that its column says.
        batch_exponent: hold the batch exponent at this; None: fit it.
        critical_batch: the most that is looked for: "none", a "fixed" one, or a "growing" one.
        size: look for an exponent of the "parameters" or the "width"; None: of a CSV under standard parameterization of
            either that it has, else of none.
        elsewhere: of a CSV.
        published: set published laws beside the fitted one, in the text and in compare.png.

    Returns:
        The text to print: the law, its cells, and what was written.

    Raises:
        NotFoundError: there are no rows.
        UserError: rows that are mixed or too few, see `hf_power.fit.fit.fit_law`; or a law that makes no recipe.
    """
    require_matplotlib()
    rows, problems, from_csv = _read(source, schedule, elsewhere or Elsewhere())
    if from_csv:
        schedule = schedule or _only_schedule(rows, source)
        size = size or (None if from_csv.base_width else _size_of(rows))
    folder = (source if source.is_dir() else source.parent) if folder is None else folder
    options: _Options = {"batch_exponent": batch_exponent, "critical_batch": critical_batch, "size": size}
    fit = fit_law(rows, schedule=schedule or "warmup_stable_decay", **options)
    check_falling(fit)
    laws = {name: encode(law) for name, law in fit_laws(rows, **options).items()}
    forecast = fit_forecast(fit.cells)
    told = (from_csv.told() if from_csv else {}) | {"forecast": encode(forecast) if forecast else None}
    # A law that makes no recipe is refused here, before anything is written.
    recipe = Recipe.from_fit(fit.to_json(), rows, laws, told)
    compared = compare(fit, recipe.base_width if recipe.parameterization == "mup" else None) if published else []
    written = _save(folder, fit, recipe, compared)
    text = [fit_text(fit), *([compared_text(compared)] if compared else [])]
    text += ["\n".join(forecast_text(forecast))] if forecast else []
    lines = [*problems, "\n\n".join(text), "", f"wrote: {', '.join(str(folder / name) for name in written)}"]
    # Whose rows are from elsewhere may have a Trainer of another kind, and no settings to plan from.
    run = _a_target(folder)
    if from_csv:
        how = f"muP of base width {from_csv.base_width}" if from_csv.base_width else "standard parameterization"
        lines.append(
            f"the recipe takes {how} (--base_width says muP); it leaves open: {', '.join(from_csv.open()) or 'nothing'}"
        )
        run = "--tokens 1T --tokens_per_step 4M --parameters 3.5B"
    lines.append(f"next: hf-power plan {folder / FILE_NAME} {run}")
    return "\n".join(lines)


def _a_target(folder: Path) -> str:
    """The option of a plan that names the run which the sweep is for; `hf-power new` has written it beside the sweep."""
    made = folder.parent / TARGET_FILE
    return f"--target {made if made.is_file() else 'RUN.yaml'}"


def _save(folder: Path, fit: Fit, recipe: Recipe, compared: Sequence[Compared]) -> list[str]:
    """Write the files, and return their names."""
    folder.mkdir(parents=True, exist_ok=True)
    fit.save(folder)
    recipe.save(folder / FILE_NAME)
    written = [FIT_FILE, FILE_NAME]
    figures = [(name, plot_cells(part)) for name, part in pages_of(fit).items()]
    figures += [("law", plot_law(fit)), ("map", plot_map(fit))]
    figures += [("compare", plot_published(compared))] if compared else []
    for name, figure in figures:
        save(figure, folder / f"{name}.png")
        written.append(f"{name}.png")
    return written


class _Options(TypedDict):
    batch_exponent: float | None
    critical_batch: Critical
    size: Size | None


def _read(source: Path, schedule: str | None, elsewhere: Elsewhere) -> tuple[list[Row], list[str], Elsewhere | None]:
    """The rows, sentences on those that are not used, and what a CSV was read with; None for a sweep of our own."""
    if source.is_file() and not _is_of_ours(source):
        rows, problems = read_csv(source, elsewhere.columns, schedule=schedule, block_size=elsewhere.block_size)
        return rows, problems, elsewhere
    if given := [field.name for field in fields(elsewhere) if getattr(elsewhere, field.name)]:
        raise UserError(f"--{given[0]} is for another tool's table, got {source}: leave it out.")
    rows, problems = load_rows(source / ROWS_FILE if source.is_dir() else source)
    return rows, problems, None


def _is_of_ours(source: Path) -> bool:
    """Whether a file has rows or another record of hf-power, rather than another tool's table."""
    with source.open("rb") as file:
        return source.name == ROWS_FILE or b'"schema"' in file.read(4000)


def _size_of(rows: Sequence[Row]) -> Size | None:
    """What the rows tell of their models' sizes, where these are several."""
    if len({row.parameters for row in rows if row.parameters}) > 1:
        return "parameters"
    return "width" if len({row.width for row in rows if row.width}) > 1 else None


def _only_schedule(rows: Sequence[Row], source: Path) -> str:
    kinds = sorted({row.schedule for row in rows})
    if len(kinds) > 1:
        raise UserError(f"{source} has runs of the schedules {', '.join(kinds)}: pass --schedule, one of them.")
    return kinds[0]
