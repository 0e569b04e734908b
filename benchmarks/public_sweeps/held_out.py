"""The law on a public sweep: fitted on a part of its cells, tried on the cells that were held out.

python benchmarks/public_sweeps/held_out.py PATH.csv [MORE.csv]

The files are those of StepLaw (arXiv:2503.04715, github.com/step-law/steplaw): a row per run of a dense model with N
(parameters), D (tokens), lr, tps (tokens per step), h (width) and smooth (training loss, nats). They are read, and no part
of them is kept; results/ has the optimum of each held-out cell and what the law said of it.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import fmean

from hf_power.fit.elsewhere import read_csv
from hf_power.fit.fit import fit_law
from hf_power.records.errors import UserError
from hf_power.records.files import replaced, write_json

HERE = Path(__file__).parent
COLUMNS = {"learning_rate": "lr", "tokens_per_step": "tps", "tokens": "D", "parameters": "N", "width": "h"}
SIMPLE = {"size": None, "critical_batch": "none"}
CHOSEN = {"size": "parameters", "critical_batch": "growing"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--loss", default="smooth", help="the column of the loss")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    rows = [row for path in arguments.paths for row in read(path, arguments.loss)]
    table = {"whole": [whole(rows, name, options) for name, options in (("chosen", CHOSEN), ("simple", SIMPLE))]}
    table["held_out"] = [tried(rows, *split) for split in splits(rows)]
    arguments.results.mkdir(exist_ok=True)
    write_json(arguments.results / "held_out.json", table)
    with replaced(arguments.results / "held_out.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


def read(path, loss):
    rows, notes = read_csv(path, COLUMNS | {"loss": loss}, schedule="cosine")
    for note in notes:
        print(f"{path}: {note}")
    return rows


def splits(rows):
    """What is held out in words, and the test of a row for it."""
    sizes = sorted({row.parameters for row in rows})
    longest = {size: max(row.tokens for row in rows if row.parameters == size) for size in sizes}
    yield "the longest horizon of each size", lambda row: row.tokens > 0.99 * longest[row.parameters]
    for size in reversed(sizes):
        yield f"{size:,} parameters", lambda row, size=size: row.parameters == size


def whole(rows, name, options):
    """The fit of all cells."""
    start = time.process_time()
    fit = fit_law(rows, schedule="cosine", **options)
    return {
        "form": name,
        "seconds": time.process_time() - start,
        "num_cells": len(fit.cells),
        "num_used": sum(cell.used for cell in fit.cells),
        "num_blown_up": fit.num_blown_up,
        "law": fit.law.__dict__,
        "intervals": fit.intervals.__dict__,
        "r2": fit.r2,
        "scatter_octaves": fit.residual_sd_octaves,
        "forms": [vars(form) for form in fit.forms],
        "misfit": fit.validity.misfit,
    }


def tried(rows, what, held_out):
    """Each law of the cells that are not held out, at those that are."""
    cells = fit_law([row for row in rows], schedule="cosine", **SIMPLE).cells
    cells = [cell for cell in cells if cell.used and held_out(cell)]
    found = {"held_out": what, "num_cells": len(cells), "laws": []}
    for name, options in (("chosen", CHOSEN), ("simple", SIMPLE)):
        try:
            fit = fit_law([row for row in rows if not held_out(row)], schedule="cosine", **options)
        except UserError as error:
            found["laws"].append({"form": name, "refused": str(error)})
            continue
        places = [at(cell, *fit.predict(cell.tokens, cell.tokens_per_step, cell.parameters)) for cell in cells]
        taken = next(form.name for form in fit.forms if form.chosen)
        summary = {"form": name, "taken": taken, "law": fit.law.__dict__, "misfit": fit.validity.misfit}
        found["laws"].append(summary | summed(places) | {"cells": places})
    published = [at(cell, 1.79 * cell.parameters**-0.713 * cell.tokens**0.307, 0, 0) for cell in cells]
    found["laws"].append({"form": "StepLaw's own, which saw these cells"} | summed(published) | {"cells": published})
    return found


def at(cell, rate, low, high):
    """A held-out cell: its optimum, the law's rate and interval."""
    return {
        "parameters": cell.parameters,
        "tokens": cell.tokens,
        "tokens_per_step": cell.tokens_per_step,
        "optimum": cell.optimum_lr,
        "optimum_interval": cell.optimum_interval,
        "rate": rate,
        "interval": [low, high],
        "off_octaves": math.log2(cell.optimum_lr / rate),
        "regret": cell.regret_at(rate),
        "inside": low <= cell.optimum_lr <= high,
    }


def summed(places):
    off = [place["off_octaves"] for place in places]
    return {
        "rms_octaves": math.sqrt(fmean(x * x for x in off)),
        "mean_octaves": fmean(off),
        "mean_regret": fmean(place["regret"] for place in places),
        "max_regret": max(place["regret"] for place in places),
        "inside": fmean(place["inside"] for place in places),
    }


def markdown(table):
    lines = [
        "# The law on a public sweep",
        "",
        "`python benchmarks/public_sweeps/held_out.py PATH`, see README.md.",
        "",
    ]
    for fit in table["whole"]:
        law = {name: value for name, value in fit["law"].items() if value not in (None, 0, 0.0)}
        lines += [
            f"**All cells, {fit['form']} form**: {fit['num_used']} of {fit['num_cells']} cells used, {fit['num_blown_up']} "
            f"finished runs taken as diverged, R2 {fit['r2']:.2f}, scatter {fit['scatter_octaves']:.2f} octaves, "
            f"{fit['seconds']:.1f} s. {', '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in law.items())}.",
            "",
        ]
        lines += [f"* {sentence}." for sentence in fit["misfit"]] + ([""] if fit["misfit"] else [])
        lines += ["| form | parameters | off at left-out cells (octaves) |", "|---|---:|---:|"]
        lines += [
            f"| {form['name']}{', taken' if form['chosen'] else ''} | {form['num_parameters']} | "
            f"{form['held_out_rms_octaves']:.3f} |"
            for form in fit["forms"]
        ] + [""]
    lines += [
        "| held out | cells | law | off, rms (octaves) | mean | mean regret (nats) | largest | optimum inside 95 % | misfit said |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for part in table["held_out"]:
        for law in part["laws"]:
            start = f"| {part['held_out']} | {part['num_cells']} | {law['form']}"
            if "refused" in law:
                lines.append(f"{start} | refused: {law['refused']} |||||")
                continue
            taken = f": {law['taken']}" if law.get("taken") not in (None, "simple") else ""
            inside = f"{law['inside']:.0%}" if "taken" in law else ""
            lines.append(
                f"{start}{taken} | {law['rms_octaves']:.3f} | {law['mean_octaves']:+.3f} | {law['mean_regret']:.4f} | "
                f"{law['max_regret']:.4f} | {inside} | {'yes' if law.get('misfit') else ''} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
