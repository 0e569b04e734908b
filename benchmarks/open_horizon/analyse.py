"""The tables of the open horizon, from the rows of run.py alone.

python benchmarks/open_horizon/analyse.py         # of results/cpu
python benchmarks/open_horizon/analyse.py FOLDER  # of another folder with rows.jsonl, as `run.py gpu` makes it
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

import numpy as np
from run import EXPONENTS, LONG_STEPS, NEW_FREE_SEEDS, REFERENCE_TOKENS, WSD, K
from scipy.stats import t as student
from tune import CENTER_BATCH, curves, one_scale, read, tuned

from hf_power.records.files import replaced, write_json

HERE = Path(__file__).parent
DRAWS = 20_000
KNOWN = "WSD, law's rate, horizon known"
OPEN = "Power, average .2"  # Chosen on the proxies and at a batch of 1,024.


def ways_of(horizon):
    """Way -> (methods, finish) of the rows of a horizon; of several methods the one that was run there."""
    wsd = {4: "planned 4x long", 1: "horizon known", 0.25: "planned 4x short"}
    ways = {f"WSD, law's rate, {name}": (f"wsd planned {int(horizon * f) // K}k", "tail") for f, name in wsd.items()}
    ways["WSD's law, horizon known, average .2 for its tail"] = (f"wsd planned {horizon // K}k", "average 0.2")
    ways["WSD, one rate"] = ("wsd one rate", "tail")
    linear = {4: "planned 4x long, stopped", 1: "horizon known", 0.25: "rate planned 4x short"}
    ways |= {f"linear to zero, law's rate, {name}": (f"linear {f:g}", "raw") for f, name in linear.items()}
    ways["linear to zero, one rate"] = ("linear one rate", "raw")
    for name in ("power", "constant"):
        ways[f"{name.capitalize()}, tail"] = (name, "tail")
        for window in (0.1, 0.2, 0.3):
            ways[f"{name.capitalize()}, average {f'{window:g}'[1:]}"] = (name, f"average {window:g}")
        ways[f"{name.capitalize()}, as it stands"] = (name, "raw")
    ways["Power as in the paper, tail"] = ("power paper", "tail")
    ways["Power as in the paper, average .2"] = ("power paper", "average 0.2")
    ways["schedule-free AdamW, one rate"] = ("free", "free")
    return ways


def cells_of(rows, corpus):
    """(width, batch, horizon) -> way -> seed -> loss."""
    by_cell = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["part"].startswith("held out") and row["corpus"] == corpus:
            cell = by_cell[row["width"], row["batch"], row["tokens"]]
            cell[row["method"], row["finish"]][row["seed"]] = row["loss"]
    found = {}
    for cell, losses in sorted(by_cell.items()):
        ways = {way: losses[key] for way, key in ways_of(cell[2]).items() if key in losses}
        if KNOWN in ways:  # Without it there is nothing to compare with.
            found[cell] = ways
    return found


def differences(cells, way, reference):
    """Cell -> paired differences of the losses over the seeds that both have."""
    found = {}
    for cell, ways in cells.items():
        if way in ways and reference in ways:
            seeds = sorted(set(ways[way]) & set(ways[reference]))
            if seeds:
                found[cell] = [ways[way][seed] - ways[reference][seed] for seed in seeds]
    return found


def summary(found, rng):
    """Median, mean and greatest of the cells' mean differences, with 95 % intervals over the noise of the seeds.

    The standard deviation of a paired difference is pooled over the cells. Each draw moves every cell's mean by Student's
    t of the pooled degrees of freedom times its standard error; the cells are those that were chosen and are not redrawn.
    Where no cell has two seeds nothing is known of the noise, and the intervals have no end.
    """
    counts = np.array([len(each) for each in found.values()])
    means = np.array([fmean(each) for each in found.values()])
    freedom = int((counts - 1).sum())
    squares = sum(((np.array(each) - fmean(each)) ** 2).sum() for each in found.values())
    deviation = math.sqrt(squares / freedom) if freedom else math.inf
    result = {"cells": len(means), "pairs": int(counts.sum()), "sd": deviation}
    centers = {"median": np.median, "mean": np.mean, "max": np.max}
    if not freedom:
        return result | {name: [float(of(means)), -math.inf, math.inf] for name, of in centers.items()}
    noise = rng.standard_normal((DRAWS, len(means))) * np.sqrt(freedom / rng.chisquare(freedom, (DRAWS, 1)))
    drawn = means + noise * deviation / np.sqrt(counts)
    for name, of in centers.items():
        center = float(of(means))
        # About its own centre, because the median and the greatest of noisy means are drawn towards the noise's side.
        errors = of(drawn, axis=1) - float(np.mean(of(drawn, axis=1)))
        low, high = np.quantile(errors, (0.025, 0.975))
        result[name] = [center, center + float(low), center + float(high)]
    return result


def per_cell(each):
    """Mean and half of its 95 % interval by Student's t."""
    if len(each) < 2:
        return fmean(each), math.inf
    return fmean(each), float(student.ppf(0.975, len(each) - 1)) * float(np.std(each, ddof=1)) / math.sqrt(len(each))


def oracle(cells):
    """What WSD's best of its rates would have gained over the law's, chosen on the other seeds than the one it is measured on."""
    gains = {}
    ladder = [f"WSD, law's rate, {name}" for name in ("planned 4x long", "horizon known", "planned 4x short")]
    for cell, ways in cells.items():
        rates = [ways[way] for way in (*ladder, "WSD, one rate") if way in ways]
        seeds = sorted(set.intersection(*(set(each) for each in rates)))
        if len(seeds) < 2:
            continue
        gains[cell] = []
        for seed in seeds:
            best = min(rates, key=lambda each: fmean(each[other] for other in seeds if other != seed))
            gains[cell].append(ways[KNOWN][seed] - best[seed])
    return gains


def label(cell):
    width, batch, horizon = cell
    return f"d {width}, {batch} a step, {horizon // K}k"


def span(center, low, high):
    """A number with its interval."""
    return f"{center:+.4f} ({low:+.4f} to {high:+.4f})"


def summary_row(name, each):
    """Of a table of medians and means: how many cells and pairs they are of, and both with their intervals."""
    return f"| {name} | {each['cells']} | {each['pairs']} | {span(*each['median'])} | {span(*each['mean'])} |"


def cells_row(name, found, cells):
    """Of a table by cells: the mean difference of each with half of its interval, nothing where the way was not run."""
    shown = ["{:+.4f} +- {:.4f}".format(*per_cell(found[cell])) if cell in found else "" for cell in cells]
    return f"| {name} | {' | '.join(shown)} |"


def of_long_cells(cells, table, rng):
    """The table of the cells of many steps; of schedule-free AdamW also by the seeds alone that were run to try what three had shown."""
    cells = {cell: ways for cell, ways in cells.items() if cell[2] // cell[1] >= LONG_STEPS}
    new = {
        cell: {way: {seed: loss for seed, loss in each.items() if seed in NEW_FREE_SEEDS} for way, each in ways.items()}
        for cell, ways in cells.items()
    }
    lines = ["", f"Means over the cells of {LONG_STEPS:,} steps and more alone:", ""]
    lines.append("| way | cells | pairs | behind the known horizon (95 %) | behind Power's mean (95 %) |")
    lines.append("|---|---:|---:|---:|---:|")
    free = "schedule-free AdamW, one rate"
    rows = [(way, way, cells) for way in table] + [(f"{free}, the new seeds alone", free, new)]
    for name, way, chosen in rows:
        if (found := differences(chosen, way, KNOWN)) and (of_open := differences(chosen, way, OPEN)):
            known, behind = summary(found, rng), summary(of_open, rng)
            spans = f"{span(*known['mean'])} | {span(*behind['mean']) if way != OPEN else ''}"
            lines.append(f"| {name} | {known['cells']} | {known['pairs']} | {spans} |")
    return lines if len(lines) > 5 else []


def markdown(corpus, cells, rng):
    """The summary over the cells, and a row per way and cell."""
    names = list(ways_of(K * K))
    table = {way: summary(found, rng) for way in names if (found := differences(cells, way, KNOWN)) and way != KNOWN}
    complete = max((each["cells"] for each in table.values()), default=0)
    lines = [f"## {corpus}", ""]
    lines.append(
        f"Nats per token behind WSD at the law's rate with the horizon known; {complete} held-out cells, paired by seed."
    )
    lines += ["", "| way | cells | pairs | median (95 %) | mean (95 %) | greatest |", "|---|---:|---:|---:|---:|---:|"]
    for way in sorted(table, key=lambda way: (-table[way]["cells"], table[way]["median"][0])):
        lines.append(f"{summary_row(way, table[way])} {table[way]['max'][0]:+.4f} |")
    gains = oracle(cells)
    if gains:
        of_all = summary(gains, rng)
        lines += ["", "The best of WSD's rates in the cell itself, chosen on the other seeds, beats the law's rate by "]
        lines[-1] += f"{span(*of_all['median'])} in the median, {of_all['max'][0]:+.4f} at most."
    lines += ["", f"Behind {OPEN}, paired by seed:", "", "| way | cells | pairs | median (95 %) | mean (95 %) |"]
    lines.append("|---|---:|---:|---:|---:|")
    behind = {}
    for way in table:
        if way != OPEN and "as it stands" not in way and (found := differences(cells, way, OPEN)):
            behind[way] = summary(found, rng)
            lines.append(summary_row(way, behind[way]))
    lines += of_long_cells(cells, table, rng)
    lines += ["", "Averaging in place of a tail, on the same trunk at equal tokens (average .2 less tail):", ""]
    lines += ["| trunk | cells | pairs | median (95 %) | mean (95 %) |", "|---|---:|---:|---:|---:|"]
    pairs = [(f"{name}, average .2", f"{name}, tail") for name in ("Power", "Constant")]
    pairs.append(("WSD's law, horizon known, average .2 for its tail", KNOWN))
    averaging = {}
    by_steps = sorted(cells, key=lambda cell: (cell[2] // cell[1], cell))
    of_cells = [f"| trunk | {' | '.join(f'{c[2] // c[1]:,} steps (d {c[0]}, {c[1]})' for c in by_steps)} |"]
    of_cells.append("|---|" + "---:|" * len(cells))
    for way, reference in pairs:
        if found := differences(cells, way, reference):
            averaging[way] = summary(found, rng)
            lines.append(summary_row(way.split(",")[0], averaging[way]))
            of_cells.append(cells_row(way.split(",")[0], found, by_steps))
    if found := differences(cells, OPEN, KNOWN):
        of_cells.append(cells_row(f"{OPEN}, less WSD's tail at a known horizon", found, by_steps))
    lines += ["", "The same in each cell, by its number of steps:", "", *of_cells]
    lines += ["", "| way | " + " | ".join(map(label, cells)) + " |", "|---|" + "---:|" * len(cells)]
    known = [f"{fmean(ways[KNOWN].values()):.3f} ({len(ways[KNOWN])})" for ways in cells.values()]
    lines.append(f"| {KNOWN}: loss (seeds) | " + " | ".join(known) + " |")
    lines += [cells_row(way, differences(cells, way, KNOWN), cells) for way in table]
    return "\n".join(lines) + "\n", {
        "ways": table,
        "behind": behind,
        "averaging": averaging,
        "cells": [label(cell) for cell in cells],
    }


def by_steps_of_proxies(rows, choices):
    """On the proxies' own cells: Power's mean less WSD's tail at its law's rate, at the one scale and at the cell's own best.

    Losses are those of the parabolas through the tuning's scales, of which the constant trunk's tail is WSD.
    """
    averaged, tails = curves(rows, "tune", "average 0.2"), curves(rows, "tune", "tail")
    choice = choices["average 0.2"][WSD.b]
    lines = ["Power's mean of the last 20 % less WSD on the proxies' cells, by steps, from the same two seeds:", ""]
    lines += [
        "| steps | tokens per step | tokens | at one scale for all | at the cell's own best |",
        "|---:|---:|---:|---:|---:|",
    ]
    for _, batch, horizon in sorted((c for c in averaged if c[0] == WSD.b), key=lambda c: (c[2] // c[1], c)):
        of_cell = averaged[WSD.b, batch, horizon]
        known = np.polyval(tails[0.0, batch, horizon], WSD.b * math.log2(horizon / REFERENCE_TOKENS))
        scale = math.log2(choice["scale"]) + choice["drift"] * math.log2(batch / CENTER_BATCH)
        one, best = np.polyval(of_cell, (scale, -of_cell[1] / (2 * of_cell[0]))) - known
        lines.append(f"| {horizon // batch:,} | {batch} | {horizon // K}k | {one:+.4f} | {best:+.4f} |")
    return lines


def chosen(rows):
    """What the choices were made of: the least mean loss of each exponent on the proxies, and the validation batch."""
    choices, free = tuned(rows, EXPONENTS), one_scale(rows)
    lines = [
        "## What was chosen on",
        "",
        "Least mean loss over the proxies' nine cells with one scale for all of them:",
        "",
    ]
    lines += ["| finish | " + " | ".join(f"b = {b:g}" for b in EXPONENTS) + " |", "|---|" + "---:|" * len(EXPONENTS)]
    for finish, by_exponent in choices.items():
        lines.append(f"| {finish} | " + " | ".join(f"{by_exponent[b]['loss']:.4f}" for b in EXPONENTS) + " |")
    lines += [f"| schedule-free AdamW | {free['loss']:.4f} |" + " |" * (len(EXPONENTS) - 1), ""]
    lines += [*by_steps_of_proxies(rows, choices), ""]
    losses = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["part"] == "validate":
            losses[row["method"]][row["finish"], row["tokens"]].append(row["loss"])
    columns = sorted({column for found in losses.values() for column in found})
    lines += ["Mean loss at width 32 and 1,024 tokens per step, three seeds:", ""]
    lines.append("| trunk | " + " | ".join(f"{finish}, {tokens // K}k" for finish, tokens in columns) + " |")
    lines.append("|---|" + "---:|" * len(columns))
    for method, found in sorted(losses.items()):
        lines.append(f"| {method} | " + " | ".join(f"{fmean(found[column]):.3f}" for column in columns) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "results" / "cpu")
    results = parser.parse_args().folder
    rows = read(results / "rows.jsonl")
    rng = np.random.default_rng(0)
    texts, tables = [], {}
    for corpus in dict.fromkeys(row["corpus"] for row in rows):
        if cells := cells_of(rows, corpus):
            text, tables[corpus] = markdown(corpus, cells, rng)
            texts.append(text)
    if any(row["part"] == "validate" for row in rows):
        texts.append(chosen(rows))
    write_json(results / "table.json", tables)
    with replaced(results / "table.md") as temporary:
        temporary.write_text("\n".join(texts), encoding="utf-8")
    print("\n".join(texts))
    medians = {corpus: median(each["sd"] for each in table["ways"].values()) for corpus, table in tables.items()}
    print("standard deviation of a paired difference, median over the ways:", medians)


if __name__ == "__main__":
    main()
