"""From files to files: a sweep's rows to fit.json, recipe.json and pictures; a recipe to plan.json and its picture."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_power.fit.fit import fit_law, fit_laws
from hf_power.plan.footprint import scale_table, table_text
from hf_power.plan.plan import make_plan, plan_text
from hf_power.plots import figures as plots
from hf_power.plots import fit as fit_plots
from hf_power.recipe import FILE_NAME, Recipe
from hf_power.records.errors import UserError
from hf_power.records.files import write_json
from hf_power.records.rows import ROWS_FILE, read_csv, read_rows
from hf_power.settings.settings import SECTIONS, Settings, load_yaml, parse_tokens

DEVICES = (8, 64, 512)  # for which a plan says memory and days


def fit_sweep(
    source: Path,
    folder: Path | None = None,
    *,
    schedule: str = "warmup_stable_decay",
    batch_exponent: float | None = None,
    critical_batch: bool = False,
    columns: Mapping[str, str] | None = None,
    block_size: int | None = None,
) -> str:
    """Fit a sweep; write fit.json, recipe.json and the pictures cells.png, law.png and map.png.

    Args:
        source: folder of a sweep, its sweep.jsonl, or a CSV of runs from elsewhere.
        folder: where to write; None: beside the rows.
        schedule: whose optima make the law.
        batch_exponent: hold the batch exponent at this; None: fit it.
        critical_batch: look for a batch above which the rate no longer grows.
        columns: of a CSV, our name -> theirs, see `hf_power.records.rows.read_csv`.
        block_size: tokens per sequence, for a CSV whose batch is in sequences.

    Returns:
        The text to print: the law, its cells, and what was written.

    Raises:
        ValueError, FileNotFoundError: rows that are missing, mixed or too few; see `hf_power.fit.fit.fit_law`.
    """
    plots.require_matplotlib()
    problems: list[str] = []
    from_csv = source.suffix.lower() in (".csv", ".tsv")
    if from_csv:
        rows = read_csv(source, columns, schedule=schedule, block_size=block_size)
    else:
        if columns or block_size:
            raise UserError(f"--columns and --block_size are for a CSV, got {source}: leave them out.")
        source = source / ROWS_FILE if source.is_dir() else source
        rows, problems = read_rows(source)
    fit = fit_law(rows, schedule=schedule, batch_exponent=batch_exponent, critical_batch=critical_batch)
    content = fit.to_dict()
    folder = source.parent if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "fit.json", content)
    written = ["fit.json"]
    if not from_csv:
        laws = fit_laws(rows, batch_exponent=batch_exponent)
        Recipe.from_fit(content, rows, laws).save(folder / FILE_NAME)
        written.append(FILE_NAME)
    for name, plot in (("cells", fit_plots.plot_cells), ("law", fit_plots.plot_law), ("map", fit_plots.plot_map)):
        plot(content, folder / f"{name}.png")
        written.append(f"{name}.png")
    lines = [*problems, fit.table(), "", f"written to {folder}/: {', '.join(written)}"]
    if from_csv:
        lines.append("no recipe: a CSV does not say which muP numbers, weight decay and tokenizer the runs had.")
    return "\n".join(lines)


def plan_run(
    recipe: str,
    *,
    tokens: str,
    tokens_per_step: str,
    target: str | None = None,
    parameters: str | None = None,
    block_size: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    **hardware: Any,
) -> str:
    """The plan of a run under a recipe, as text; with output_dir also plan.json and plan.png.

    Args:
        recipe: see `Recipe.load`.
        tokens: length of the run, e.g. "1T".
        tokens_per_step: global batch in tokens, e.g. "4M".
        target: YAML of the run, whose model section gives the parameters; or
        parameters: their number, e.g. "3.5B".
        block_size: tokens per sequence; None: the target's, or 4096.
        output_dir: where to write.
        hardware: devices, flops_per_device, utilisation: see `hf_power.plan.plan.make_plan`.

    Raises:
        ValueError, FileNotFoundError: neither or both of target and parameters, or bad numbers.
    """
    if (target is None) == (parameters is None):
        raise UserError(f"a plan needs either --target or --parameters, got {target!r} and {parameters!r}.")
    loaded = Recipe.load(recipe)
    numbers: dict[str, Any] = {"tokens": parse_tokens(tokens, "--tokens")}
    numbers["tokens_per_step"] = parse_tokens(tokens_per_step, "--tokens_per_step")
    if target is not None:
        settings = _settings(target)
        config = settings.model.config(vocab_size=settings.data.vocab_size)
        what: dict[str, Any] = {"config": config, "block_size": block_size or settings.data.block_size}
    else:
        what = {"parameters": parse_tokens(parameters or 0, "--parameters"), "block_size": block_size or 4096}
    plan = make_plan(loaded, **numbers, **what, **hardware, proxies=loaded.provenance.get("proxies"))
    text = plan_text(plan)
    sequences = numbers["tokens_per_step"] // what["block_size"]
    if rows := [count for count in DEVICES if target is not None and sequences % count == 0]:
        most = settings.training.per_device_train_batch_size
        speed: dict[str, Any] = {
            name: hardware[name] for name in ("flops_per_device", "utilisation") if name in hardware
        }
        given: dict[str, Any] = {
            "block_size": what["block_size"],
            "per_device_batch_size": most,
            "devices": tuple(rows),
        }
        plan["scale"] = scale_table(config, **numbers, **given, **speed)
        text += (
            f"\non H100-like devices, activations recomputed (! does not fit into 80 GB):\n{table_text(plan['scale'])}"
        )
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "plan.json", plan)
        fit_plots.plot_plan(plan, folder / "plan.png")
        text += f"\nwritten to {folder}/: plan.json, plan.png"
    return text


def _settings(path: str) -> Settings:
    """Settings of a YAML, for its model and data sections and its batch per device."""
    flat = load_yaml(path)
    names = {section: [f.name for f in dataclasses.fields(SECTIONS[section])] for section in ("model", "data")}
    names["training"] = ["per_device_train_batch_size"]
    return Settings.from_dict({section: {n: flat[n] for n in each if n in flat} for section, each in names.items()})
