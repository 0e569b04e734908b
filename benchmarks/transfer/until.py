"""What `sweep --until` spares: its choices replayed on the rows of the transfer measurement, at no cost.

python benchmarks/transfer/until.py cpu
"""

import math
from dataclasses import replace
from pathlib import Path

from analyse import measured, read
from run import SIZES, START, grid

from hf_power.fit.fit import fit_law
from hf_power.sweep.choice import Aim, next_answer
from hf_power.sweep.jobs import groups_of, horizon_tokens

HERE = Path(__file__).parent
RIVALS = ("warmup_stable_decay", "linear", "cosine", "inverse_sqrt")


class Oracle:
    """Answers for each run that the measurement made."""

    def __init__(self, rows):
        self.rows = {(r.tokens_per_step, r.learning_rate, r.seed, r.tokens): r for r in rows}
        self.asked, self.unknown = [], []

    def answer(self, grid, job):
        for value, horizons in job.horizons.items():
            tokens = horizon_tokens(grid, job.group, horizons)
            for horizon in horizons:
                for seed in job.group.seeds:
                    row = self.rows.get((job.group.tokens_per_step, value, seed, horizon))
                    if row is None:
                        self.unknown.append((job.group.name, value, seed, horizon))
                        row = next(iter(self.rows.values()))
                        row = replace(
                            row,
                            tokens_per_step=job.group.tokens_per_step,
                            learning_rate=value,
                            seed=seed,
                            tokens=horizon,
                        )
                        self.asked.append(replace(row, extension=job.extension, status="failed", loss=None))
                        continue
                    self.asked.append(replace(row, extension=job.extension, trained_tokens=tokens[horizon]))


def replay(grid, schedule, rows, aim, verbose=False):
    groups, oracle = groups_of(grid, schedule), Oracle(rows)
    path = []
    for number in range(200):
        before = len(oracle.asked)
        answer = next_answer(grid, groups, oracle.asked, aim, number)
        path.append((sum(r.trained_tokens for r in oracle.asked), answer.octaves))
        if verbose:
            print(
                number,
                len(oracle.asked),
                path[-1],
                [(j.group.name, j.group.seeds, dict(j.horizons)) for j in answer.jobs],
            )
        if not answer.jobs:
            break
        for job in answer.jobs:
            oracle.answer(grid, job)
        if len(oracle.asked) == before:
            print("nothing answered", oracle.unknown[-3:])
            break
    return answer, oracle, path


if __name__ == "__main__":
    import sys
    import time

    import hf_power.sweep.choice as C

    C.DEBUG = "-v" in sys.argv
    size = SIZES["cpu"]
    every = [r for r in read(HERE / "results/cpu/rows.csv") if r["part"] == "fit"]
    for schedule in [x for x in sys.argv[1:] if x != "-v"]:
        raw = [r for r in every if r["schedule"] == schedule]
        rows = [measured(r) for r in raw]
        g = grid(size, {schedule: START[schedule]})
        whole = fit_law(rows, schedule=schedule)
        full = sum(r["trained_tokens"] for r in raw)
        for t in ((256 * 1024, 512), (1024 * 1024, 512), (256 * 1024, 2048), (1024 * 1024, 2048)):
            rate, l, h = whole.predict(*t)
            octs = math.log2(h / l) / 2
            t0 = time.time()
            a, o, path = replay(g, schedule, rows, Aim(*t, octs), verbose="-v" in sys.argv)
            print(
                schedule,
                t,
                f"grid ±{octs:.3f} {full}; until ±{a.octaves:.3f} {path[-1][0]} share {path[-1][0] / full:.2f} runs {len(o.asked)} of {len(rows)} diff {math.log2(a.rate / rate):+.3f} unknown {len(o.unknown)} {time.time() - t0:.1f}s",
                flush=True,
            )
