"""The forecast of the loss on public sweeps, public loss curves and our own proxies: fitted on a part, tried on the rest.

python benchmarks/public_sweeps/forecast.py --sweeps PATH.csv [MORE.csv] --curves FOLDER [MORE]

The sweeps are those of StepLaw (see held_out.py); a folder of curves is one model of the multi-power law's authors
(arXiv:2503.12811, github.com/thu-yao-01-luo/MultiPowerLaw): CSVs with step, lr and loss, a schedule each. They are read,
and no part of them is kept.
"""

import argparse
import math
import sys
import time
from itertools import combinations
from pathlib import Path
from statistics import fmean

from held_out import HERE, read, splits

from hf_power.fit.cells import fit_cells
from hf_power.fit.curve import read_curve
from hf_power.fit.curves import fit_curves, last_loss
from hf_power.fit.forecast import best_loss, fit_forecast
from hf_power.records.files import replaced, write_json

sys.path.insert(0, str(HERE.parent / "transfer"))
from analyse import measured
from analyse import read as read_proxies

PROXIES = HERE.parent / "transfer/results/cpu/rows.csv"
# A constant rate, a cosine and a decay: what a team may well have.
TRAINED_ON = ("constant_72000", "cosine_24000", "wsd_20000_24000")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="*", default=[])
    parser.add_argument("--curves", nargs="*", type=Path, default=[])
    parser.add_argument("--loss", default="smooth", help="the column of the loss")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    rows = [row for path in arguments.sweeps for row in read(path, arguments.loss)]
    table = {"sweeps": sweeps(rows), "proxies": proxies(), "curves": list(map(curves, arguments.curves))}
    arguments.results.mkdir(exist_ok=True)
    write_json(arguments.results / "forecast.json", table)
    with replaced(arguments.results / "forecast.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


def sweeps(rows):
    """What is held out, tried."""
    cells = fit_cells(rows)
    return [tried(what, cells, held_out, "parameters") for what, held_out in splits(rows)] if rows else []


def tried(what, cells, held_out, size):
    """The forecast of the other cells at those that are held out, against their lowest loss and their valley's."""
    inside, out = ([cell for cell in cells if bool(held_out(cell)) is side] for side in (False, True))
    start = time.process_time()
    forecast = fit_forecast(inside)
    seconds = time.process_time() - start
    places = []
    for cell in out:
        number = getattr(cell, size)
        if why := forecast.cannot(cell.tokens, cell.tokens_per_step, number):
            places.append({"cell": cell.name, "cannot": why})
            continue
        loss, low, high = forecast.at(cell.tokens, cell.tokens_per_step, number)
        lowest = min(cell.losses)
        valley = best_loss(cell) or lowest
        place = {"cell": cell.name, "lowest_run": lowest, "valley": valley, "forecast": loss, "interval": [low, high]}
        place |= {"off": loss - valley, "within": abs(loss / lowest - 1) < 0.005, "covered": low <= lowest <= high}
        places.append(place)
    said = [place for place in places if "off" in place]
    return {
        "held_out": what,
        "num_cells": len(out),
        "num_said": len(said),
        "within_half_a_percent": fmean(place["within"] for place in said) if said else None,
        "mean_off": fmean(place["off"] for place in said) if said else None,
        "rms_off": math.sqrt(fmean(place["off"] ** 2 for place in said)) if said else None,
        "half_interval": fmean((p["interval"][1] - p["interval"][0]) / 2 for p in said) if said else None,
        "covered": fmean(place["covered"] for place in said) if said else None,
        "irreducible": forecast.forms[0].irreducible,
        "missing": forecast.missing,
        "seconds": seconds,
        "cells": places,
    }


def proxies():
    """Our own transfer rows: fitted on the proxies, tried at up to 4 times the tokens, the batch and the width."""
    rows = read_proxies(PROXIES)
    found = []
    for schedule in ("warmup_stable_decay", "linear"):
        parts = {
            part: fit_cells([measured(row) for row in rows if row["schedule"] == schedule and row["part"] == part])
            for part in ("fit", "held out")
        }
        out = set(map(id, parts["held out"]))
        cells = [*parts["fit"], *parts["held out"]]
        found.append(tried(f"proxies, {schedule}", cells, lambda cell, out=out: id(cell) in out, "width"))
    return found


def curves(folder):
    """The law of two and of three curves of one model, at the others."""
    known = {path.stem: read_curve(path) for path in sorted(folder.glob("*.csv"))}
    chosen = [name for name in TRAINED_ON if name in known]
    sets = [tuple(chosen), *combinations(chosen, 2)] if len(chosen) == len(TRAINED_ON) else [tuple(sorted(known)[:3])]
    tried_sets = []
    for names in sets:
        if all(known[name].rates.min() > 0.7 * known[name].rates.max() for name in names):
            continue
        start = time.process_time()
        law = fit_curves([known[name] for name in names])
        seconds = time.process_time() - start
        others = {name: at_curve(law, curve) for name, curve in known.items() if name not in names}
        tried_sets.append(
            {
                "trained_on": names,
                "seconds": seconds,
                "numbers": law.numbers().tolist(),
                "mean_absolute_error": fmean(each["mean_absolute_error"] for each in others.values()),
                "last_within": sum(abs(each["last_off"]) <= 0.005 for each in others.values()),
                "covered": sum(each["covered"] for each in others.values()),
                "others": others,
            }
        )
    return {"model": folder.name, "sets": tried_sets}


def at_curve(law, curve):
    last, low, high = law.final(curve)
    error = float(abs(law.losses(curve) - curve.losses).mean())
    found = {"mean_absolute_error": error, "last_off": last - last_loss(curve), "half_interval": (high - low) / 2}
    return found | {"covered": low <= last_loss(curve) <= high}


def markdown(table):
    lines = ["# The forecast of the loss", "", "`python benchmarks/public_sweeps/forecast.py`, see README.md.", ""]
    lines += [
        "| held out | cells | forecast | within .5 % | mean off (nats) | rms off | half of the 95 % interval | covered |"
    ]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---:|"]
    for part in [*table["sweeps"], *table["proxies"]]:
        start = f"| {part['held_out']} | {part['num_cells']} | {part['num_said']}"
        if part["num_said"]:
            start += f" | {part['within_half_a_percent']:.0%} | {part['mean_off']:+.4f} | {part['rms_off']:.4f}"
            start += f" | {part['half_interval']:.4f} | {part['covered']:.0%}"
        lines.append(f"{start} |")
    for part in table["proxies"]:
        lines += ["", f"**{part['held_out']}**: {'; '.join(part['missing'])}.", ""]
        for place in part["cells"]:
            said = place.get("cannot") or f"measured {place['valley']:.4f}, forecast {place['forecast']:.4f}"
            lines.append(f"* {place['cell']}: {said}")
    for model in table["curves"]:
        lines += ["", f"## Loss curves of {model['model']}", ""]
        for each in model["sets"]:
            lines += [
                f"Fitted on {', '.join(each['trained_on'])} in {each['seconds']:.1f} s: mean absolute error "
                f"{each['mean_absolute_error']:.4f} over the others, last loss within .005 at {each['last_within']} of "
                f"{len(each['others'])}, in its 95 % interval at {each['covered']}.",
                "",
                "| schedule | mean absolute error (nats) | last loss off | half of the interval |",
                "|---|---:|---:|---:|",
            ]
            lines += [
                f"| {name} | {o['mean_absolute_error']:.4f} | {o['last_off']:+.4f} | {o['half_interval']:.4f} |"
                for name, o in each["others"].items()
            ] + [""]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
