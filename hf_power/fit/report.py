"""From a sweep's rows to files: fit.json, recipe.json and pictures, and the fit as text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_power.fit.elsewhere import read_csv
from hf_power.fit.fit import fit_law, fit_laws
from hf_power.fit.result import FIT_FILE, Cell, Fit, PowerFit
from hf_power.fit.validity import MAX_SD_OCTAVES
from hf_power.plots.cells import plot_cells
from hf_power.plots.figures import require_matplotlib, save
from hf_power.plots.law import plot_law, plot_map
from hf_power.recipe import FILE_NAME, Recipe
from hf_power.records.errors import UserError
from hf_power.records.rows import ROWS_FILE, Row, load_rows
from hf_power.schedule import LAW_NAMES, PAPER_OPTIMA, TOKENS_PER_BETA


def fit_sweep(
    source: Path,
    folder: Path | None = None,
    *,
    schedule: str | None = None,
    batch_exponent: float | None = None,
    critical_batch: bool = False,
    columns: Mapping[str, str] | None = None,
    block_size: int | None = None,
) -> str:
    """Fit a sweep; write fit.json, recipe.json and the pictures cells.png, law.png and map.png.

    Args:
        source: folder of a sweep, its sweep.jsonl, or a CSV of runs from elsewhere.
        folder: where to write; None: beside the rows.
        schedule: whose optima make the law; None: warmup_stable_decay of a sweep, and of a CSV the one that its column says.
        batch_exponent: hold the batch exponent at this; None: fit it.
        critical_batch: look for a batch above which the rate no longer grows.
        columns: of a CSV, our name -> theirs, see `hf_power.fit.rows.read_csv`.
        block_size: tokens per sequence, for a CSV whose batch is in sequences.

    Returns:
        The text to print: the law, its cells, and what was written.

    Raises:
        NotFoundError: there are no rows.
        UserError: rows that are mixed or too few; see `hf_power.fit.fit.fit_law`.
    """
    require_matplotlib()
    problems: list[str] = []
    from_csv = source.suffix.lower() in (".csv", ".tsv")
    if from_csv:
        rows, problems = read_csv(source, columns, schedule=schedule, block_size=block_size)
        schedule = schedule or _only_schedule(rows, source)
    else:
        if columns or block_size:
            raise UserError(f"--columns and --block_size are for a CSV, got {source}: leave them out.")
        source = source / ROWS_FILE if source.is_dir() else source
        rows, problems = load_rows(source)
    fit = fit_law(
        rows, schedule=schedule or "warmup_stable_decay", batch_exponent=batch_exponent, critical_batch=critical_batch
    )
    folder = source.parent if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    fit.save(folder)
    written = [FIT_FILE]
    if not from_csv:
        laws = {name: law.to_dict() for name, law in fit_laws(rows, batch_exponent=batch_exponent).items()}
        Recipe.from_fit(fit.to_json(), rows, laws).save(folder / FILE_NAME)
        written.append(FILE_NAME)
    for name, plot in (("cells", plot_cells), ("law", plot_law), ("map", plot_map)):
        save(plot(fit), folder / f"{name}.png")
        written.append(f"{name}.png")
    lines = [*problems, fit_text(fit), "", f"written to {folder}/: {', '.join(written)}"]
    if from_csv:
        lines.append("no recipe: a CSV does not say which muP numbers, weight decay and tokenizer the runs had.")
    return "\n".join(lines)


def _only_schedule(rows: Sequence[Row], source: Path) -> str:
    kinds = sorted({row.schedule for row in rows})
    if len(kinds) > 1:
        raise UserError(f"{source} has runs of the schedules {', '.join(kinds)}: pass --schedule, one of them.")
    return kinds[0]


def fit_text(fit: Fit) -> str:
    """The law with its intervals, the cells, what was not used and why, Power, the paper, validity and warnings."""
    blocks = [_law_lines(fit), _cell_lines(fit.cells)]
    if fit.power:
        blocks.append(_power_lines(fit.power))
    return "\n\n".join("\n".join(block) for block in [*blocks, _verdict_lines(fit)])


def _law_lines(fit: Fit) -> list[str]:
    law, center = fit.law, fit.center
    batch = "min(beta, beta_crit)" if law.critical_batch_tokens else "beta"
    blown_up = f" ({fit.num_blown_up} of them finished far above their cell's best)" if fit.num_blown_up else ""
    lines = [
        f"{fit.schedule}: lr = {law.a:.4g} * {batch}^{law.batch_exponent:.4g} * T^{law.b:.4g}   "
        f"(beta = tokens per step / {TOKENS_PER_BETA}, T = tokens)",
        f"  {fit.num_rows} runs, {fit.num_diverged} diverged{blown_up}, {fit.num_failed} failed; R2 {fit.r2:.3f}, optima "
        f"scatter by {fit.residual_sd_octaves:.2f} octaves, {fit.degrees_of_freedom} degrees of freedom",
        "  parameter              value       95 % interval",
    ]
    for name in LAW_NAMES:
        value, ends = getattr(law, name), getattr(fit.intervals, name)
        if value is not None:
            low, high = ends
            lines.append(f"  {name:<23}{value:<12.4g}" + ("held" if low == high else f"{low:.4g} to {high:.4g}"))
    low, high = center.interval
    lines.append(
        f"  at the centre, {center.tokens:,.0f} tokens and {center.tokens_per_step:,.0f} tokens per step: "
        f"{center.learning_rate:.3g} ({low:.3g} to {high:.3g})"
    )
    if fit.width_exponent:
        lines.append("  exponent of the width {:+.3f} ({:+.3f} to {:+.3f}), 0 under muP".format(*fit.width_exponent))
    return lines


def _cell_lines(cells: Sequence[Cell]) -> list[str]:
    lines = ["  width  tokens/step           tokens  optimum   95 % interval          law       off (octaves)"]
    for cell in cells:
        where = f"  {cell.width:>5} {cell.tokens_per_step:>12,} {cell.tokens:>16,}  "
        if cell.optimum_interval is None:
            lines.append(f"{where}not used: {cell.reason}")
            continue
        low, high = cell.optimum_interval
        span = f"{low:.3g} to {high:.3g}"
        lines.append(f"{where}{cell.optimum_lr:<9.3g} {span:<22} {cell.law_lr:<9.3g} {cell.residual_octaves:+.2f}")
    return lines


def _power_lines(power: PowerFit) -> list[str]:
    low, high = power.interval
    lines = [f"power: a = {power.a:.4g} ({low:.4g} to {high:.4g}), with b and the batch exponent of the law above"]
    for drift, what in ((power.b_drift, "horizon"), (power.batch_drift, "batch")):
        if drift:
            lines.append("  drift with the {} {:+.3f} ({:+.3f} to {:+.3f})".format(what, *drift))
    return lines + _cell_lines(power.cells)


def _verdict_lines(fit: Fit) -> list[str]:
    validity, beyond, paper = fit.validity, fit.validity.extrapolates_to, fit.paper
    alone = [f"{name} {'inside' if getattr(paper, name) else 'OUTSIDE'}" for name in LAW_NAMES[:3]]
    jointly = "lies inside" if paper.jointly else "lies OUTSIDE"
    law = PAPER_OPTIMA
    return [
        f"the paper's law, {law.a:g} * beta^{law.batch_exponent:g} * T^{law.b:g}, {jointly} the joint 95 % region; each "
        f"number alone: {', '.join(alone)}",
        f"measured: {validity.tokens[0]:,} to {validity.tokens[1]:,} tokens, {validity.tokens_per_step[0]:,} to "
        f"{validity.tokens_per_step[1]:,} tokens per step, widths {', '.join(str(w) for w in validity.widths)}",
        f"the rate is known to a factor {2**MAX_SD_OCTAVES:.2f} (one standard deviation) up to {beyond.tokens:,} tokens, "
        f"or up to {beyond.tokens_per_step:,} tokens per step",
        *(f"WARNING {warning}" for warning in fit.warnings),
    ]
