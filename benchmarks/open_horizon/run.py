"""Which way of training needs no horizon, and what does it cost? Tuned on small proxies, measured on cells beyond them.

    python benchmarks/open_horizon/run.py cpu         # README.md says what it takes
    python benchmarks/open_horizon/run.py cpu-long    # then more seeds of what the claim compares, and of schedule-free in long runs
    python benchmarks/open_horizon/run.py gpu         # larger models, ten minutes of one accelerator; see gpu.py

Killed, it goes on where it stopped. The rows of all runs go to results/cpu/rows.jsonl as they come (cpu and cpu-long share
them), those of gpu to results/gpu or --folder; analyse.py makes the tables from them alone.
"""

import argparse
import functools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from english import write_manuals
from train import TAIL, Average, Models, Trunk, train
from tune import CENTER_BATCH, one_scale, read, tuned

from hf_power.data.packing import pack_both
from hf_power.data.text import load_text
from hf_power.data.tokenizer import load_tokenizer
from hf_power.records.files import replaced, write_json
from hf_power.records.machine import versions
from hf_power.schedule import Law
from hf_power.settings.settings import Settings
from hf_power.sweep.grid import Grid, few_digits
from hf_power.sweep.jobs import Group, row_settings
from hf_power.sweep.stacked import SweepData

HERE = Path(__file__).parent
K = 1024
# The law of WSD's optima on the proxies and the rate of linear to zero, from benchmarks/transfer, which has the same proxies.
WSD = Law(19.19, -0.4687, 0.603)
LINEAR = Law(2.868, -0.2715, 0.535)
FIXED_WSD, FIXED_LINEAR = 0.0147, 0.02849
WARMUP, CAP = 8 * K, 0.03  # As the batch of 1,024 chose them.
REFERENCE_TOKENS = 128 * K  # Where scales of the tuning grid are those of WSD's law.
EXPONENTS, SCALES = (0.0, -0.25, -0.4687, -0.7), (0.3, 0.6, 1.2, 2.4)
TUNING_CAP = 0.05
FREE_SCALES = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0, 8.0)
MANUALS = Path("runs/open_horizon/manuals")
CORPORA = {"python": "python-stdlib", "english": str(MANUALS)}
SEEDS = (10, 11, 12)
MODEL = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Job:
    """Members that are trained as one."""

    part: str
    corpus: str
    width: int
    batch: int
    horizons: tuple[int, ...]
    trunks: tuple[Trunk, ...]
    seeds: tuple[int, ...]  # One per trunk.
    windows: tuple[float, ...] = ()
    schedule_free: bool = False

    @property
    def id(self):
        return json.dumps(asdict(self), sort_keys=True)


def job_of(part, corpus, width, batch, horizons, members, windows=(), free=False):
    """The job of these members, each a trunk and a seed."""
    trunks, seeds = map(tuple, zip(*members, strict=True))
    return Job(part, corpus, width, batch, horizons, trunks, seeds, windows, free)


def wsd_trunk(planned, batch, law, warmup_tokens):
    """WSD's trunk, a constant rate, as its law plans it for a horizon."""
    return Trunk(f"wsd planned {planned // K}k", few_digits(law.lr(planned, batch)), warmup_tokens=warmup_tokens)


def settings_of(width, batch, corpus="python", eval_tokens=64 * K):
    """What all members of a job share."""
    data = {"dataset": CORPORA[corpus], "vocab_size": 512, "block_size": 64}
    sections = {"model": MODEL, "mup": {"base_width": 32, "preset": "power_of_two"}, "data": data}
    sections |= {"training": {"weight_decay": 0.1}, "run": {"max_eval_tokens": eval_tokens}}
    return at_width(sections, width, batch)


def at_width(sections, width, batch):
    """The settings of these sections at a width and batch, as a sweep would make them; each trunk has its own rates."""
    grid = Grid(
        sections,
        widths=(width,),
        schedules={"warmup_stable_decay": (0.01,)},
        seeds=(0,),
        tokens_per_step=(batch,),
        tokens=(256 * batch,),
        warmup_tokens=8 * K,
        decay_ratio=0.2,
        decay_shape="1-sqrt",
    )
    group = Group("warmup_stable_decay", width, batch, (256 * batch,), (0,), (0.01,))
    return Settings.from_dict(row_settings(grid, group, 0.01, 0, 256 * batch))


@functools.cache
def data_of(corpus, eval_tokens):
    settings = settings_of(32, 512, corpus, eval_tokens)
    texts = load_text(settings.data)
    tokenizer = load_tokenizer(settings.data, texts.train)
    packed = pack_both(settings.data, tokenizer, texts, settings.run.max_eval_tokens)
    return SweepData(tokenizer, packed.train, packed.held_out, packed.about())


def run(job, averages=(), tails=(TAIL,)):
    """Train a job; its rows as lines of JSON, the last of which says that it is done."""
    import torch

    torch.set_num_threads(1)
    # A process compiles a function for each shape of its jobs, of which torch forgets the first ones after eight.
    torch._dynamo.config.cache_size_limit = 64
    started = time.perf_counter()
    eval_tokens = 16 * K if job.part in ("tune", "free", "averages") else 64 * K
    settings = settings_of(job.width, job.batch, job.corpus, eval_tokens)
    models = Models(settings, job.seeds, data_of(job.corpus, eval_tokens), job.schedule_free)
    lines = rows_of(job, models, averages, tails)
    seconds = round(time.perf_counter() - started, 1)
    return [*lines, json.dumps({"job": job.id, "seconds": seconds, "members": len(job.seeds)})]


def rows_of(job, models, averages=(), tails=(TAIL,)):
    """Train the models of a job; a line of JSON for each member, horizon and way to finish."""
    averages = [*map(Average, job.windows), *averages]
    found, lines = train(models, job.trunks, job.batch, job.horizons, averages, tails), []
    for (horizon, finish), losses in found.items():
        for trunk, seed, loss in zip(job.trunks, job.seeds, losses, strict=True):
            row = {"part": job.part, "corpus": job.corpus, "width": job.width, "batch": job.batch, "tokens": horizon}
            row |= {"method": trunk.method, "finish": finish, "seed": seed}
            lines.append(json.dumps(row | {"loss": round(loss, 6), "trunk": asdict(trunk)}))
    return lines


def tuning_jobs(corpus, seeds):
    """Every exponent and scale of the rate, in each batch of the fit; the finishes are chosen from the same trunks."""
    for batch in (512, 256, 128):
        rate = WSD.lr(REFERENCE_TOKENS, batch)
        trunks = []
        for b in EXPONENTS:
            for scale in SCALES:
                # a of the rate at the reference, without the batch's part, which the law's exponent carries.
                a = scale * rate / ((batch / 4096) ** WSD.batch_exponent * REFERENCE_TOKENS**b)
                if b == 0:
                    trunks.append(Trunk(f"b 0 s {scale:g}", scale * rate))
                else:
                    trunks.append(Trunk(f"b {b:g} s {scale:g}", a, b, WSD.batch_exponent, TUNING_CAP))
        for seed in seeds:
            horizons = (64 * K, 128 * K, 256 * K)
            yield Job("tune", corpus, 32, batch, horizons, tuple(trunks), (seed,) * 16, (0.2, 0.4))


def power_and_constant(choices):
    """The two trunks that need no horizon, as they were tuned: Power of WSD's exponent, and one constant rate."""
    rate = WSD.lr(REFERENCE_TOKENS, CENTER_BATCH)
    b = WSD.b

    def power(batch, warmup_tokens, cap):
        scale, drift = (choices["average 0.2"][b][name] for name in ("scale", "drift"))
        c = WSD.batch_exponent + drift
        a = scale * rate / ((CENTER_BATCH / 4096) ** c * REFERENCE_TOKENS**b)
        return Trunk("power", few_digits(a), b, round(c, 3), cap, warmup_tokens)

    def constant(batch, warmup_tokens):
        scale, drift = (choices["average 0.2"][0.0][name] for name in ("scale", "drift"))
        lr = scale * rate * (batch / CENTER_BATCH) ** (WSD.batch_exponent + drift)
        return Trunk("constant", few_digits(lr), warmup_tokens=warmup_tokens)

    return power, constant


def validation_jobs(choices):
    """A batch twice beyond the fit's, at its longest horizon and twice that: which warmup, which cap."""
    power, constant = power_and_constant(choices)
    trunks = []
    for warmup in (8 * K, 32 * K):
        for cap in (0.03, 0.05, 0.1):
            made = power(1024, warmup, cap)
            trunks.append(replace(made, method=f"power cap {cap:g} warmup {warmup // K}k"))
        trunks.append(replace(constant(1024, warmup), method=f"constant warmup {warmup // K}k"))
        for horizon in (256 * K, 512 * K):
            made = wsd_trunk(horizon, 1024, WSD, warmup)
            trunks.append(replace(made, method=f"{made.method} warmup {warmup // K}k"))
    for seed in (0, 1, 2):
        yield Job(
            *("validate", "python", 32, 1024, (256 * K, 512 * K)),
            *(tuple(trunks), (seed,) * len(trunks), (0.1, 0.2, 0.3)),
        )


def free_tuning_jobs():
    """Schedule-free AdamW's one rate in each batch of the fit; a trunk serves all horizons."""
    for batch in (512, 256, 128):
        members = [
            (Trunk(f"b 0 s {scale:g}", few_digits(scale * WSD.lr(REFERENCE_TOKENS, batch))), seed)
            for scale in FREE_SCALES
            for seed in (0, 1)
        ]
        horizons = (64 * K, 128 * K, 256 * K)
        yield job_of("free", "python", 32, batch, horizons, members, free=True)


# width, batch, horizons: 4 times beyond the fit in the horizon, the batch, the width, and in all of them.
LINES = (
    (32, 512, (1024 * K,)),
    (32, 2048, (256 * K, 1024 * K)),
    (128, 512, (256 * K,)),
    (32, 128, (1024 * K,)),
    (128, 128, (256 * K,)),
    (128, 2048, (256 * K, 1024 * K)),
)


# Seeds of the claim alone, about as many as give its medians intervals of .005 on either side; fewer of the line that takes longest.
MORE_SEEDS = (
    ("python", LINES, range(13, 22)),
    ("python", LINES[:-1], range(22, 25)),
    ("english", LINES, range(13, 16)),
    ("english", LINES[:-1], range(16, 22)),
)


# The lines of so many steps and more, where three seeds of schedule-free AdamW were ahead of all that needs no horizon.
LONG_STEPS, NEW_FREE_SEEDS = 2048, range(13, 19)
LONG = [line for line in LINES if line[2][-1] // line[1] >= LONG_STEPS]


# The line of the second corpus that has all ways; the others have those of the claim.
ALL_WAYS = LINES[1:2]


def held_out_jobs(choices, seeds, corpus="python", lines=LINES):
    """The trunks of each line with three seeds at a time: open ones, and WSD planned for 1/4, 1 and 4 times each horizon."""
    power, constant = power_and_constant(choices)
    for width, batch, horizons in lines:
        trunks = [power(batch, WARMUP, CAP), constant(batch, WARMUP)]
        planned = sorted({horizon * factor // 4 for horizon in horizons for factor in (1, 4, 16)})
        trunks += [wsd_trunk(each, batch, WSD, WARMUP) for each in planned]
        if len(trunks) < 6:
            trunks.append(linear_trunk(horizons[0], batch, 1))
        members = [(trunk, seed) for trunk in trunks for seed in seeds]
        yield job_of("held out", corpus, width, batch, horizons, members, (0.1, 0.2, 0.3))


def claim_jobs(choices, seeds, corpus="python", lines=LINES):
    """What the claim compares, in each line: Power, and WSD planned for each horizon of the line."""
    power, _ = power_and_constant(choices)
    for width, batch, horizons in lines:
        trunks = [power(batch, WARMUP, CAP), *(wsd_trunk(each, batch, WSD, WARMUP) for each in horizons)]
        members = [(trunk, seed) for trunk in trunks for seed in seeds]
        yield job_of("held out", corpus, width, batch, horizons, members, (0.2,))


def linear_trunk(horizon, batch, factor):
    """Linear to zero as the law plans it for another horizon: too long a line is stopped, of too short a one the rate is taken."""
    planned = int(horizon * factor)
    lr = few_digits(LINEAR.lr(planned, batch))
    return Trunk(f"linear {factor:g}", lr, warmup_tokens=WARMUP, linear_to=max(planned, horizon))


def rival_jobs(free, seeds, corpus="python", lines=LINES):
    """Linear to zero, one rate each, and schedule-free AdamW, whose scale over WSD's law is `free`."""
    for width, batch, horizons in lines:
        for horizon in horizons:
            trunks = [linear_trunk(horizon, batch, factor) for factor in (0.25, 4)]
            if len(horizons) > 1:
                trunks.append(linear_trunk(horizon, batch, 1))
            trunks.append(Trunk("linear one rate", FIXED_LINEAR, warmup_tokens=WARMUP, linear_to=horizon))
            members = [(trunk, seed) for trunk in trunks for seed in seeds]
            yield job_of("held out", corpus, width, batch, (horizon,), members)
        yield free_job(free, seeds, corpus, (width, batch, horizons))
        one = Trunk("wsd one rate", FIXED_WSD, warmup_tokens=WARMUP)
        yield Job("held out", corpus, width, batch, horizons, (one,) * len(seeds), seeds)


def free_job(free, seeds, corpus, line):
    """Schedule-free AdamW with one rate for every horizon, in each batch by the law: `free` times that of the longest proxies."""
    width, batch, horizons = line
    trunk = Trunk("free", few_digits(free * WSD.lr(REFERENCE_TOKENS, batch)), warmup_tokens=WARMUP)
    return Job("held out", corpus, width, batch, horizons, (trunk,) * len(seeds), tuple(seeds), (), True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("cpu", "cpu-long", "gpu"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of cpu and cpu-long")
    parser.add_argument("--folder", type=Path, default=HERE / "results" / "gpu", help="where the rows of gpu are kept")
    parser.add_argument(
        "--seconds", type=float, default=570, help="of gpu: nothing is begun that cannot end within them"
    )
    parser.add_argument("--toy", action="store_true", help="of gpu: tiny, on a CPU")
    options = parser.parse_args()
    if options.size == "gpu":
        from gpu import measure

        measure(options.folder, options.seconds, options.toy)
        return
    results = HERE / "results" / "cpu"
    results.mkdir(parents=True, exist_ok=True)
    rows = results / "rows.jsonl"
    rows.touch()
    if not MANUALS.exists():
        write_manuals(MANUALS)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        run_all(pool, [*tuning_jobs("python", (0, 1)), *free_tuning_jobs()], rows)
        choices, free = tuned(read(rows), EXPONENTS), one_scale(read(rows))
        write_json(results / "tuned.json", choices_for_json(choices) | {"free": free, "versions": versions()})
        run_all(pool, validation_jobs(choices), rows)
        if options.size == "cpu":
            run_all(pool, [*held_out_jobs(choices, SEEDS), *rival_jobs(free["scale"], SEEDS)], rows)
            run_all(pool, [*held_out_jobs(choices, SEEDS, "english", ALL_WAYS)], rows)
        else:
            others = tuple(line for line in LINES if line not in ALL_WAYS)
            jobs = [*claim_jobs(choices, SEEDS, "english", others)]
            for corpus, lines, seeds in MORE_SEEDS:
                for i in range(0, len(seeds), 3):
                    jobs += claim_jobs(choices, seeds[i : i + 3], corpus, lines)
            jobs += [free_job(free["scale"], NEW_FREE_SEEDS, "python", line) for line in LONG]
            run_all(pool, jobs, rows)


def choices_for_json(choices):
    """With texts for keys."""
    return {finish: {f"{b:g}": each for b, each in of_finish.items()} for finish, of_finish in choices.items()}


def run_all(pool, jobs, path, run=run):
    """Train the jobs that have no rows yet, and append the rows of each as it ends; this process alone writes."""
    done = done_jobs(path)
    futures = {pool.submit(run, job): job for job in jobs if job.id not in done}
    print(f"{len(futures)} jobs", flush=True)
    for future in as_completed(futures):
        job = futures[future]
        append_rows(path, future.result())
        what = f"{job.part} {job.corpus} {job.width} {job.batch}"
        print(f"{what} seeds {sorted(set(job.seeds))}: done", flush=True)


def done_jobs(path):
    """The ids of the jobs that have rows."""
    lines = map(json.loads, path.read_text().splitlines())
    return {line["job"] for line in lines if "job" in line}


def append_rows(path, lines):
    """Add the lines of a job, all or none of them: a kill leaves no half of one."""
    with replaced(path) as temporary:
        temporary.write_text(path.read_text() + "".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
