"""The table, the figures and the summary of the transfer measurement, from its rows alone.

python benchmarks/transfer/analyse.py cpu
"""

import argparse
import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median, stdev

import numpy as np
from picture import plot_transfer
from scipy.stats import t as student

from hf_power.fit.fit import fit_law
from hf_power.fit.text import fit_text
from hf_power.plots.cells import plot_cells
from hf_power.plots.figures import save
from hf_power.plots.law import plot_law, plot_map
from hf_power.records.files import replaced, write_json
from hf_power.records.rows import Row
from hf_power.schedule import Law
from hf_power.sweep.grid import few_digits

HERE = Path(__file__).parent
NUMBERS = ("learning_rate", "a", "b", "batch_exponent", "max_lr", "loss", "flops_per_token", "seconds")
WHOLE = ("width", "tokens_per_step", "tokens", "seed", "trained_tokens", "extension")
SHORT = {"warmup_stable_decay": "wsd", "inverse_sqrt": "inv. sqrt"}
DRAWS = 2000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("cpu", "gpu"))
    results = HERE / "results" / parser.parse_args().size
    rows = read(results / "rows.csv")
    tuned = json.loads((results / "tuned.json").read_text())
    fit_rows = [row for row in rows if row["part"] in ("fit", f"fit cap {tuned['power']['max_lr']:g}")]
    fit = fit_law([measured(row) for row in fit_rows])
    fit.save(results)
    (results / "fit.txt").write_text(fit_text(fit) + "\n", encoding="utf-8")
    cells = held_out(rows, tuned)
    table = {"rows": regrets(cells), "summary": summary(cells), "unknown_horizon": unknown_horizon(cells, tuned)}
    table["oracles"] = oracles(cells)
    table["compute"] = compute(rows, tuned)
    write_json(results / "table.json", table)
    with replaced(results / "table.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    save(plot_cells(fit), results / "cells.png")
    save(plot_law(fit), results / "law.png")
    save(plot_map(fit), results / "map.png")
    save(plot_transfer(table), results / "transfer.png")
    print(markdown(table))


def read(path):
    """The rows of rows.csv with their types."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            row |= {name: float(row[name]) if row[name] else None for name in NUMBERS}
            row |= {name: int(row[name]) for name in WHOLE}
            law = {name: row[name] for name in ("a", "b", "batch_exponent")}
            row["law"] = law if law["a"] is not None else None
            rows.append(row)
    return rows


def measured(row):
    """A row of rows.csv as `fit_law` takes it."""
    names = ("width", "schedule", "learning_rate", "tokens_per_step", "tokens", "loss", "seed", "status", "trunk")
    return Row(**{name: row[name] for name in names})


def held_out(rows, tuned):
    """Cell -> {"methods": method -> losses by seed, "ladders": schedule -> value -> losses by seed}."""
    cells = defaultdict(lambda: {"methods": {}, "ladders": defaultdict(dict)})
    for row in rows:
        if not row["part"].startswith(("held out", "paper")):
            continue
        cell = cells[row["width"], row["tokens_per_step"], row["tokens"]]
        loss = math.inf if row["loss"] is None else row["loss"]
        if row["part"] == "paper":
            cell["methods"].setdefault("power paper", {})[row["seed"]] = loss
            continue
        value, schedule = (row["a"], f"power cap {row['max_lr']:g}") if row["law"] else (row["learning_rate"], None)
        cell["ladders"][schedule or row["schedule"]].setdefault(value, {})[row["seed"]] = loss
    for (_, batch, horizon), cell in cells.items():
        ladders = cell["ladders"]
        for which, name in (("power_by_fit", "power, cap by fit"), ("power", "power fitted")):
            ladder = ladders.get(f"power cap {tuned[which]['max_lr']:g}")
            if ladder:
                cell["methods"][name] = ladder[tuned[which]["a"]]
        for schedule in set(ladders) & set(tuned["laws"]):
            name = SHORT.get(schedule, schedule)
            center = few_digits(Law.from_dict(tuned["laws"][schedule]).lr(horizon, batch))
            cell["methods"][f"{name} law"] = ladders[schedule][center]
            cell["methods"][f"{name} fixed"] = ladders[schedule][tuned["fixed"][schedule]]
    return dict(sorted(cells.items()))


def mean(by_seed):
    return fmean(by_seed.values())


def best(ladder):
    """Value with the least mean loss."""
    return min(ladder, key=lambda value: mean(ladder[value]))


def best_oracle(cell):
    """Losses by seed of the best schedule at its best learning rate in the cell itself."""
    return min((ladder[best(ladder)] for ladder in cell["ladders"].values()), key=mean)


def regrets(cells):
    """A row per cell and method: mean of the paired differences to the best oracle, with Student's 95 % interval."""
    rows = []
    for (width, batch, horizon), cell in cells.items():
        oracle = best_oracle(cell)
        for method, losses in sorted(cell["methods"].items()):
            gaps = [losses[seed] - oracle[seed] for seed in oracle]
            error = student.ppf(0.975, len(gaps) - 1) * stdev(gaps) / math.sqrt(len(gaps))
            rows.append({"method": method, "width": width, "tokens_per_step": batch, "tokens": horizon})
            rows[-1] |= {"regret": fmean(gaps), "low": fmean(gaps) - error, "high": fmean(gaps) + error}
            rows[-1] |= {"loss": mean(losses), "oracle_loss": mean(oracle)}
    return rows


def summary(cells):
    """Median and maximum over the cells that a method was run in, and over those that all were, with 95 % intervals.

    The intervals redraw the seeds (the same for every method and cell), oracles included.
    """
    methods = sorted({method for cell in cells.values() for method in cell["methods"]})
    seeds = sorted(next(iter(next(iter(cells.values()))["methods"].values())))
    generator = np.random.default_rng(0)
    draws = [list(seeds), *(list(generator.choice(seeds, len(seeds))) for _ in range(DRAWS))]
    found = {}
    for method in methods:
        mine = [cell for cell in cells.values() if method in cell["methods"]]
        values = []
        for draw in draws:
            each = []
            for cell in mine:
                oracle = min(
                    min(fmean(losses[s] for s in draw) for losses in ladder.values())
                    for ladder in cell["ladders"].values()
                )
                each.append(fmean(cell["methods"][method][s] for s in draw) - oracle)
            values.append((median(each), max(each)))
        medians, maxima = zip(*values, strict=True)
        found[method] = {
            "cells": len(mine),
            "median": medians[0],
            "median_interval": [float(x) for x in np.quantile(medians[1:], (0.025, 0.975))],
            "max": maxima[0],
            "max_interval": [float(x) for x in np.quantile(maxima[1:], (0.025, 0.975))],
        }
    return found


def unknown_horizon(cells, tuned):
    """WSD and linear under the law, planned for a quarter or four times the horizon that came: regret interpolated.

    The loss at the planned learning rate is read from the cell's ladder, linearly in log2 of the rate between the
    neighbouring values, which overstates it where the curve is convex.
    """
    rows = []
    for (width, batch, horizon), cell in cells.items():
        oracle = mean(best_oracle(cell))
        for schedule in ("warmup_stable_decay", "linear"):
            ladder = cell["ladders"].get(schedule)
            for factor in (0.25, 4.0) if ladder else ():
                rate = Law.from_dict(tuned["laws"][schedule]).lr(horizon * factor, batch)
                values = sorted(ladder)
                loss = float(np.interp(math.log2(rate), np.log2(values), [mean(ladder[v]) for v in values]))
                rows.append(
                    {"method": f"{SHORT.get(schedule, schedule)} law, planned for {factor:g} T", "width": width}
                )
                rows[-1] |= {"tokens_per_step": batch, "tokens": horizon, "regret": loss - oracle}
    return rows


def oracles(cells):
    """The best learning rate of each schedule in each cell, and how far from it the tuned one is."""
    rows = []
    for (width, batch, horizon), cell in cells.items():
        for schedule, ladder in cell["ladders"].items():
            value = best(ladder)
            rows.append({"schedule": schedule, "width": width, "tokens_per_step": batch, "tokens": horizon})
            rows[-1] |= {"best": value, "loss": mean(ladder[value]), "edge": value in (min(ladder), max(ladder))}
            rows[-1]["losses"] = {f"{v:g}": mean(ladder[v]) for v in sorted(ladder)}
    return rows


def compute(rows, tuned):
    """FLOPs that each way spends on tuning: on the proxies, and for the oracle in the held-out cells."""
    flops = defaultdict(float)
    for row in rows:
        cost = row["trained_tokens"] * row["flops_per_token"]
        if row["part"] == "fit":
            flops[f"proxies of {SHORT.get(row['schedule'], row['schedule'])}"] += cost
        elif row["part"].startswith("fit cap"):
            flops["proxies of power, all caps"] += cost
        elif row["part"].startswith("validation"):
            flops["validation of power's caps"] += cost
        elif row["part"].startswith("held out"):
            flops[f"oracle of {SHORT.get(row['schedule'], row['schedule'])}"] += cost
    return dict(flops)


def markdown(table):
    lines = ["| method | cells | median regret (95 %) | maximum regret (95 %) |", "|---|---:|---:|---:|"]
    for method, s in sorted(table["summary"].items(), key=lambda item: item[1]["median"]):
        (ml, mh), (xl, xh) = s["median_interval"], s["max_interval"]
        lines.append(
            f"| {method} | {s['cells']} | {s['median']:.4f} ({ml:.4f} to {mh:.4f}) | {s['max']:.4f} ({xl:.4f} to {xh:.4f}) |"
        )
    cells = list(dict.fromkeys((r["width"], r["tokens_per_step"], r["tokens"]) for r in table["rows"]))
    methods = list(dict.fromkeys(r["method"] for r in table["rows"]))
    lines += [
        "",
        "| regret, nats per token | " + " | ".join(f"d {w}, {b} a step, {n // 1024}k" for w, b, n in cells) + " |",
    ]
    lines += ["|---|" + "---:|" * len(cells)]
    by = {(r["method"], r["width"], r["tokens_per_step"], r["tokens"]): r for r in table["rows"]}
    for method in methods:
        texts = []
        for cell in cells:
            row = by.get((method, *cell))
            texts.append(f"{row['regret']:.4f} ({row['low']:.3f} to {row['high']:.3f})" if row else "")
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    lines += ["", "| unknown horizon, regret | " + " | ".join(f"d {w}, {b}, {n // 1024}k" for w, b, n in cells) + " |"]
    lines += ["|---|" + "---:|" * len(cells)]
    by = {(r["method"], r["width"], r["tokens_per_step"], r["tokens"]): r for r in table["unknown_horizon"]}
    for method in dict.fromkeys(r["method"] for r in table["unknown_horizon"]):
        lines.append(f"| {method} | " + " | ".join(f"{by[(method, *c)]['regret']:.4f}" for c in cells) + " |")
    lines += ["", "| tuning compute | FLOP |", "|---|---:|"]
    lines += [f"| {what} | {flops:.2e} |" for what, flops in sorted(table["compute"].items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
