"""Does the law transfer? Fit on small, short proxies; measure on cells that the fit has not seen.

    python benchmarks/transfer/run.py cpu --folder runs/transfer    # two CPU cores, see README.md for the time
    python benchmarks/transfer/run.py gpu --folder runs/transfer    # one accelerator

Killed, it goes on where it stopped. The rows of all runs go to results/SIZE/rows.csv; analyse.py makes the table, the
figures and the page's numbers from them alone.
"""

import argparse
import csv
import math
from pathlib import Path

from hf_power.fit.cells import fit_cells
from hf_power.fit.fit import fit_law
from hf_power.records.files import replaced, write_json
from hf_power.records.machine import versions
from hf_power.records.schema import encode
from hf_power.schedule import PAPER_LAW, Law
from hf_power.sweep.grid import Grid, few_digits
from hf_power.sweep.jobs import Group, row_law
from hf_power.sweep.run import run_sweep

HERE = Path(__file__).parent
RIVALS = ("warmup_stable_decay", "linear", "cosine", "inverse_sqrt")
LAW_SCHEDULES = ("warmup_stable_decay", "linear")  # whose learning rate a law sets per cell
LADDER = (0.25, 0.5, 1.0, 2.0, 4.0)
PAPER_CAP = 0.02
K = 1024
# Three main schedules at the dear cells, five elsewhere.
MAIN = ("warmup_stable_decay", "linear")
SIZES = {
    "cpu": {
        "model": {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2},
        "mup": {"base_width": 32, "preset": "power_of_two"},
        "data": {"dataset": "python-stdlib", "vocab_size": 512, "block_size": 64},
        "training": {"weight_decay": 0.1},
        "eval_tokens": "64k",
        "batches": (128, 256, 512),
        "horizons": (64 * K, 128 * K, 256 * K),
        "validation": (1024, (256 * K, 512 * K)),  # a batch, and horizons, twice beyond the fit
        "warmup_tokens": 8 * K,
        "caps": (0.03, 0.05, 0.1, 0.2),
        # width, batch, horizon, rivals; 4x beyond the fit in the horizon, the batch, the width, two and all of them
        "held_out": (
            (32, 512, 1024 * K, RIVALS),
            (32, 2048, 256 * K, RIVALS),
            (128, 512, 256 * K, RIVALS),
            (32, 2048, 1024 * K, MAIN),
            (128, 2048, 512 * K, MAIN),
        ),
    },
    "gpu": {
        "model": {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 6, "num_attention_heads": 2},
        "mup": {"base_width": 128, "preset": "power_of_two"},
        "data": {"dataset": "python-stdlib", "vocab_size": 4096, "block_size": 256},
        "training": {"weight_decay": 0.1, "bf16": True},
        "eval_tokens": "256k",
        "batches": (2 * K, 4 * K, 8 * K),
        "horizons": (1024 * K, 2048 * K, 4096 * K),
        "validation": (16 * K, (4096 * K, 8192 * K)),
        "warmup_tokens": 128 * K,
        "caps": (0.03, 0.05, 0.1, 0.2),
        "held_out": (
            (128, 8 * K, 16384 * K, RIVALS),
            (128, 32 * K, 4096 * K, RIVALS),
            (512, 8 * K, 4096 * K, RIVALS),
            (512, 32 * K, 16384 * K, MAIN),
        ),
    },
}
# Learning rates to begin with at the first batch; the sweep goes beyond them until every optimum is bracketed.
START = {
    "warmup_stable_decay": (0.008, 0.016, 0.032),
    "linear": (0.01, 0.02, 0.04),
    "cosine": (0.01, 0.02, 0.04),
    "inverse_sqrt": (0.032, 0.064, 0.128),
    "power": (0.35, 0.7, 1.4),
}
FIT_SEEDS, HELD_OUT_SEEDS = (0, 1, 2), (3, 4, 5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--folder", default="runs/transfer", help="where the sweeps are kept while it runs")
    options = parser.parse_args()
    size, folder = SIZES[options.size], Path(options.folder) / options.size
    results = HERE / "results" / options.size
    results.mkdir(parents=True, exist_ok=True)

    fit_rows = run_sweep(grid(size, {name: START[name] for name in RIVALS}), folder / "fit")
    fitted = fit_law(fit_rows).law
    law = Law(few_digits(fitted.a), few_digits(fitted.b), few_digits(fitted.batch_exponent))
    by_cap = {}
    for cap in size["caps"]:
        capped = grid(size, {"power": START["power"]}, law=law, max_lr=cap)
        by_cap[cap] = run_sweep(capped, folder / f"fit-power-cap{cap:g}")
    scales = {cap: few_digits(fit_law([*fit_rows, *each]).power.a) for cap, each in by_cap.items()}
    validation = {}
    batch, horizons = size["validation"]
    for cap in size["caps"]:
        cell = grid(size, {"power": (1.0,)}, law=law, max_lr=cap, max_extensions=0)
        group = Group("power", size["model"]["hidden_size"], batch, horizons, FIT_SEEDS, (scales[cap],), law)
        validation[cap] = run_sweep(cell, folder / f"validation-cap{cap:g}", groups=[group])
    tuned = tune(fit_rows, by_cap, scales, validation, law)
    write_json(results / "tuned.json", tuned | {"versions": versions(), "command": f"run.py {options.size}"})

    rows = {"fit": fit_rows} | {f"fit cap {cap:g}": each for cap, each in by_cap.items()}
    rows |= {f"validation cap {cap:g}": each for cap, each in validation.items()}
    for what, each, groups in held_out_groups(size, tuned):
        rows[what] = run_sweep(each, folder / what.replace(" ", "-"), groups=groups)
    write_rows(rows, results / "rows.csv")


def grid(size, schedules, **numbers):
    """The grid of the fit: smallest width, few batches, short horizons."""
    sections = {name: size[name] for name in ("model", "mup", "data", "training")}
    sections["run"] = {"max_eval_tokens": size["eval_tokens"]}
    numbers = {"seeds": FIT_SEEDS, "tokens_per_step": size["batches"], "tokens": size["horizons"]} | numbers
    return Grid(
        sections,
        widths=(size["model"]["hidden_size"],),
        schedules=schedules,
        warmup_tokens=size["warmup_tokens"],
        decay_ratio=0.2,
        decay_shape="1-sqrt",
        **numbers,
    )


def tune(fit_rows, by_cap, scales, validation, law):
    """Everything that is chosen on cells that are not held out: laws, one rate per rival, Power's scale and cap.

    The cap is chosen twice: by the best losses of the fit's own cells, and by the losses at the validation batch.
    """
    loss_of_cap = {}
    for cap, rows in by_cap.items():
        cells = [cell for cell in fit_cells(rows) if cell.used]
        loss_of_cap[cap] = sum(cell.min_loss for cell in cells) / len(cells)
    beyond = {cap: sum(row.loss or math.inf for row in rows) / len(rows) for cap, rows in validation.items()}
    chosen = {"power": min(beyond, key=beyond.get), "power_by_fit": min(loss_of_cap, key=loss_of_cap.get)}
    powers = {cap: fit_law([*fit_rows, *rows]).power for cap, rows in by_cap.items()}
    return {
        "law": row_law(law),
        "laws": {name: fit_law(fit_rows, schedule=name).law.to_dict() for name in RIVALS},
        "fixed": {name: one_rate(fit_rows, name) for name in RIVALS},
        **{name: {**row_law(law), "a": scales[cap], "max_lr": cap} for name, cap in chosen.items()},
        "power_fits": {f"{cap:g}": {k: v for k, v in encode(p).items() if k != "cells"} for cap, p in powers.items()},
        "fit_loss_by_cap": {f"{cap:g}": loss for cap, loss in loss_of_cap.items()},
        "validation_loss_by_cap": {f"{cap:g}": loss for cap, loss in beyond.items()},
    }


def one_rate(rows, schedule):
    """The one learning rate with the least mean regret over the schedule's cells, by their parabolas."""
    cells = [cell for cell in fit_cells(rows) if cell.used and cell.schedule == schedule]
    low, high = min(c.optimum_lr for c in cells), max(c.optimum_lr for c in cells)
    rates = [low * (high / low) ** (i / 200) for i in range(201)]
    return few_digits(min(rates, key=lambda rate: sum(cell.regret_at(rate) for cell in cells)))


def held_out_groups(size, tuned):
    """(name, grid, groups): at each held-out cell a ladder around the law's rate, the fixed rate, and Power's scales."""
    base = {"seeds": HELD_OUT_SEEDS, "max_extensions": 1}
    rivals, powers, paper = [], {"power": [], "power_by_fit": []}, []
    law = Law.from_dict(tuned["law"])
    for width, batch, horizon, names in size["held_out"]:
        cell = (width, batch, (horizon,), HELD_OUT_SEEDS)
        for name in names:
            center = Law.from_dict(tuned["laws"][name]).lr(horizon, batch)
            values = {few_digits(center * factor) for factor in LADDER} | {tuned["fixed"][name]}
            rivals.append(Group(name, *cell, tuple(sorted(values))))
        for which, groups in powers.items():
            ladder = LADDER if which == "power" else (1.0,)
            scales = tuple(few_digits(factor * tuned[which]["a"]) for factor in ladder)
            groups.append(Group("power", *cell, scales, law))
        paper.append(Group("power", *cell, (PAPER_LAW.a,), PAPER_LAW))
    yield "held out", grid(size, START, **base), rivals
    for which, groups in powers.items():
        cap, extensions = tuned[which]["max_lr"], int(which == "power")
        each = grid(size, START, **base | {"max_extensions": extensions}, law=law, max_lr=cap)
        yield f"held out power cap {cap:g}", each, groups
    yield "paper", grid(size, START, **base | {"max_extensions": 0}, law=PAPER_LAW, max_lr=PAPER_CAP), paper


def write_rows(rows, path):
    """All rows in one CSV: what made them and what came out."""
    keys = ["part", "schedule", "width", "tokens_per_step", "tokens", "learning_rate", "a", "b", "batch_exponent"]
    keys += ["max_lr", "seed", "status", "loss", "trained_tokens", "flops_per_token", "seconds", "extension", "trunk"]
    with replaced(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, keys, extrasaction="ignore")
        writer.writeheader()
        for part, each in rows.items():
            for row in sorted(each, key=lambda r: (r.schedule, r.width, r.tokens_per_step, r.tokens)):
                law = row.law or {}
                writer.writerow({"part": part, **row.to_json()} | {k: law.get(k) for k in ("a", "b", "batch_exponent")})


if __name__ == "__main__":
    main()
