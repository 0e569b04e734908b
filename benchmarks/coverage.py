"""Do the 95 % intervals of a fitted law hold the truth? On synthetic sweeps whose law is known, also at new cells.

python benchmarks/coverage.py --draws 200
"""

import argparse
import math
from pathlib import Path

import numpy as np

from hf_power.fit.fit import fit_law
from hf_power.records.errors import UserError
from hf_power.records.files import replaced, write_json
from hf_power.records.rows import Row

RESULTS = Path(__file__).parent / "results"
A, B, C = 4.6, -0.51, 0.7
BATCHES, HORIZONS = (32_768, 65_536, 131_072), (8e6, 32e6, 128e6)
# A new cell: inside, at 4 times the tokens, at twice the batch, at both.
NEW = ((32e6, 65_536), (512e6, 65_536), (32e6, 262_144), (512e6, 262_144))
CELL_SD = 0.08  # Octaves by which the optimum of each cell departs from the law.
KINDS = {
    "two seeds": {"num_seeds": 2},
    "one seed": {"num_seeds": 1},
    "one seed, 2 % of the runs blown up": {"num_seeds": 1, "blown_up": 0.02},
    "two seeds, a skewed U": {"num_seeds": 2, "cubic": 0.006},
    "one seed, a skewed U": {"num_seeds": 1, "cubic": 0.006},
    "one seed, rates a quarter octave apart": {"num_seeds": 1, "spacing": 0.25},
}


def sweep(generator, num_seeds, blown_up=0.0, cubic=0.0, spacing=1.0):
    """Rows with loss = floor(T) + .028 d**2 + cubic d**3 + noise, d octaves above the cell's optimum."""
    rows, luck = [], {}
    shift = generator.uniform(-0.5, 0.5)
    steps = np.arange(-2, 2 + spacing / 2, spacing)
    for batch in BATCHES:
        for tokens in HORIZONS:
            best = math.log2(optimum(tokens, batch)) + generator.normal(0, CELL_SD)
            middle = round((best - shift) / spacing) * spacing + shift
            for x in middle + steps:
                for seed in range(num_seeds):
                    trunk = f"{batch}/{x:.4f}/{seed}"
                    noise = luck.setdefault(trunk, generator.normal(0, 0.010)) + generator.normal(0, 0.0066)
                    d = x - best
                    loss = 3 + 4 * (tokens / 1e6) ** -0.3 + 0.028 * d**2 + cubic * d**3 + noise
                    loss = generator.uniform(7, 11) if generator.uniform() < blown_up else loss
                    place = {"tokens": round(tokens), "tokens_per_step": batch, "learning_rate": 2.0**x}
                    rows.append(Row(schedule="cosine", loss=loss, seed=seed, trunk=trunk, **place))
    return rows


def optimum(tokens, batch):
    return A * (batch / 4096) ** C * tokens**B


def draw(kind, number):
    """What of one sweep's fit holds the truth; None for an interval that is no part of the fit."""
    generator = np.random.default_rng(number)
    try:
        fit = fit_law(sweep(generator, **KINDS[kind]), schedule="cosine", seed=number)
    except UserError as error:
        return {"kind": kind, "draw": number, "refused": str(error)}
    row = {"kind": kind, "draw": number, "forms": next(form.name for form in fit.forms if form.chosen)}
    row["misfit"] = len(fit.validity.misfit)
    row["used"] = sum(cell.used for cell in fit.cells)
    row["b"] = fit.intervals.b[0] <= B <= fit.intervals.b[1]
    row["batch_exponent"] = fit.intervals.batch_exponent[0] <= C <= fit.intervals.batch_exponent[1]
    low, high = fit.center.interval
    row["centre"] = low <= optimum(fit.center.tokens, fit.center.tokens_per_step) <= high
    for tokens, batch in NEW:
        _, low, high = fit.predict(tokens, batch)
        truth = optimum(tokens, batch) * 2 ** generator.normal(0, CELL_SD)
        row[f"new {tokens / 32e6:g}T {batch / 65_536:g}B"] = low <= truth <= high
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=200)
    draws = parser.parse_args().draws
    rows = [draw(kind, number) for kind in KINDS for number in range(draws)]
    write_json(RESULTS / "coverage.json", {"rows": rows})
    with replaced(RESULTS / "coverage.md") as temporary:
        temporary.write_text(markdown(rows, draws), encoding="utf-8")
    print(markdown(rows, draws))


def markdown(rows, draws):
    whole = [row for row in rows if "b" in row]
    names = [name for name, value in whole[0].items() if isinstance(value, bool)]
    lines = ["# Coverage of the 95 % intervals", "", f"`python benchmarks/coverage.py --draws {draws}`", ""]
    lines += [
        "| sweeps | refused | misfit said | " + " | ".join(names) + " |",
        "|---|---:|---:|" + "---:|" * len(names),
    ]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        fitted = [row for row in mine if "b" in row]
        shares = [f"{sum(row[name] for row in fitted) / len(fitted):.1%}" for name in names]
        said = sum(row["misfit"] > 0 for row in fitted)
        lines.append(f"| {kind} | {len(mine) - len(fitted)} | {said} | " + " | ".join(shares) + " |")
    lines += [
        "",
        "A new cell's optimum departs from the law by .08 octaves, as those that are fitted do; T and B are its horizon",
    ]
    lines += ["and batch over the sweep's middle ones."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
