"""What is chosen on the proxies' own cells: exponent, scale and the batch's exponent for each way to finish."""

import json
import math
from collections import defaultdict
from statistics import fmean

import numpy as np
from scipy.optimize import minimize

FINISHES = ("tail", "average 0.2", "average 0.4")
CENTER_BATCH = 256  # Scales are those of this batch; another has them times (batch / 256)**drift.


def read(path):
    """The rows of rows.jsonl, without the lines that say which jobs are done."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [line for line in lines if "job" not in line]


def curves(rows, part, finish):
    """(b, batch, horizon) -> coefficients of a parabola of the mean loss over log2 of the scale, through the best four."""
    losses = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["part"] == part and row["finish"] == finish:
            _, b, _, scale = row["method"].split()
            losses[float(b), row["batch"], row["tokens"]][float(scale)].append(row["loss"])
    found = {}
    for cell, by_scale in losses.items():
        means = {scale: fmean(each) for scale, each in by_scale.items() if math.isfinite(fmean(each))}
        best = sorted(sorted(means, key=means.get)[:4])
        found[cell] = np.polyfit([math.log2(scale) for scale in best], [means[scale] for scale in best], 2)
    return found


def choose(rows, part, finish, b):
    """(scale, drift, mean loss) over the cells with the exponent b: the least mean of the parabolas."""
    of_b = {cell[1:]: each for cell, each in curves(rows, part, finish).items() if cell[0] == b}

    def mean_loss(numbers):
        scale, drift = numbers
        return fmean(
            np.polyval(each, scale + drift * math.log2(batch / CENTER_BATCH)) for (batch, _), each in of_b.items()
        )

    best = minimize(mean_loss, (0.0, 0.0), method="Nelder-Mead")
    return float(2 ** best.x[0]), float(best.x[1]), float(best.fun)


def tuned(rows, exponents, part="tune"):
    """Finish -> exponent -> its choice."""
    return {
        finish: {
            b: dict(zip(("scale", "drift", "loss"), choose(rows, part, finish, b), strict=True)) for b in exponents
        }
        for finish in FINISHES
    }


def one_scale(rows, part="free", finish="free"):
    """The one scale for all cells of a part, by default schedule-free's over WSD's law, and its mean loss."""
    return least(curves(rows, part, finish).values())


def least(parabolas):
    """The scale with the least mean of the parabolas, between a quarter and eight, and that mean."""
    scales = np.linspace(-2, 3, 501)
    means = np.mean([np.polyval(each, scales) for each in parabolas], axis=0)
    return {"scale": float(2 ** scales[np.argmin(means)]), "loss": float(means.min())}
