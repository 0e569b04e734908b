"""What `hf-power sweep --until` spares: its rounds replayed on the rows of the transfer measurement, which costs nothing.

    python benchmarks/transfer/until.py cpu

For each schedule and target the aim is the precision that the whole grid reached there: half of the 95 % interval of a new
cell's optimum, by the fit of all of its rows. Results go to results/SIZE/until.json and until.md.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

from analyse import measured, read
from run import RIVALS, SIZES, START, K, grid

from hf_power.fit.fit import fit_law
from hf_power.records.files import replaced, write_json
from hf_power.sweep.aim import Aim
from hf_power.sweep.choice import next_answer
from hf_power.sweep.jobs import groups_of, horizon_tokens

HERE = Path(__file__).parent
# Tokens and tokens per step: the far corner of the fit's cells, and four times beyond it in the one, the other and both.
TARGETS = {"cpu": ((256 * K, 512), (1024 * K, 512), (256 * K, 2048), (1024 * K, 2048))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=TARGETS)
    size = parser.parse_args().size
    results = HERE / "results" / size
    every = [row for row in read(results / "rows.csv") if row["part"] == "fit"]
    table = []
    for schedule in RIVALS:
        made = [row for row in every if row["schedule"] == schedule]
        whole = fit_law([measured(row) for row in made], schedule=schedule)
        for tokens, batch in TARGETS[size]:
            rate, low, high = whole.predict(tokens, batch)
            aim = Aim(tokens, batch, math.log2(high / low) / 2)
            table.append({"schedule": schedule, "tokens": tokens, "tokens_per_step": batch} | replay(size, made, aim))
            table[-1]["off_grid_octaves"] = math.log2(table[-1].pop("rate") / rate)
            print(table[-1], flush=True)
    write_json(results / "until.json", {"targets": table})
    with replaced(results / "until.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    print(markdown(table))


def replay(size, made, aim):
    """The rounds of one sweep with --until, of which the rows of the measurement are the answers."""
    schedule = made[0]["schedule"]
    whole = grid(SIZES[size], {schedule: START[schedule]})
    groups, spent = groups_of(whole, schedule), sum(row["trained_tokens"] for row in made)
    answers = {(r["tokens_per_step"], r["learning_rate"], r["seed"], r["tokens"]): measured(r) for r in made}
    rows, path = [], []
    while True:
        answer = next_answer(whole, groups, rows, aim, len(path))
        path.append((sum(row.trained_tokens for row in rows), answer.octaves))
        if not answer.jobs:
            break
        for job in answer.jobs:
            rows += answered(whole, job, answers)
    half = [octaves for tokens, octaves in path if tokens <= spent / 2]
    return {
        "rate": answer.rate,
        "octaves_of_grid": aim.octaves,
        "octaves": answer.octaves,
        "octaves_at_half": half[-1],
        "runs": sum(row.status != "failed" for row in rows),
        "runs_of_grid": len(made),
        "share_of_tokens": path[-1][0] / spent,
    }


def answered(whole, job, answers):
    """The rows of a job; a run that the measurement did not make counts as one that could not be made."""
    for value, horizons in job.horizons.items():
        for horizon, tokens in horizon_tokens(whole, job.group, horizons).items():
            for seed in job.group.seeds:
                row = answers.get((job.group.tokens_per_step, value, seed, horizon))
                if row is None:
                    other = next(iter(answers.values()))
                    row = replace(other, learning_rate=value, seed=seed, tokens=horizon, status="failed", loss=None)
                    row, tokens = replace(row, tokens_per_step=job.group.tokens_per_step), 0
                yield replace(row, extension=job.extension, trained_tokens=tokens)


def markdown(table):
    lines = [
        "| schedule | target | grid, octaves | --until, octaves | its tokens | its runs | at half of the tokens | rate against the grid's |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        lines.append(
            f"| {row['schedule']} | {row['tokens'] // K}k, {row['tokens_per_step']} a step | {row['octaves_of_grid']:.2f} "
            f"| {row['octaves']:.2f} | {row['share_of_tokens']:.0%} | {row['runs']} of {row['runs_of_grid']} "
            f"| {row['octaves_at_half']:.2f} | {row['off_grid_octaves']:+.2f} |"
        )
    reached = [row for row in table if row["octaves"] <= row["octaves_of_grid"] and row["share_of_tokens"] <= 0.5]
    ratios = [row["octaves_at_half"] / row["octaves_of_grid"] for row in table]
    lines += [
        "",
        f"The grid's precision with at most half of its tokens: {len(reached)} of {len(table)}. After half of the tokens the "
        f"interval is {sum(ratios) / len(ratios):.2f} times as wide as the grid's, on average.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
