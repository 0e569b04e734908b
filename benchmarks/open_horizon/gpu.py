"""The open horizon with models of 1.3 to 26M parameters, on one accelerator and in bf16: `run.py gpu` calls it.

    python benchmarks/open_horizon/run.py gpu --folder FOLDER            # goes on with the rows in FOLDER
    python benchmarks/open_horizon/run.py gpu --folder FOLDER --toy      # tiny, on a CPU: its figures mean nothing
    python benchmarks/open_horizon/analyse.py FOLDER

Everything is tuned on the smallest width, two batches and three short horizons, then measured with three seeds at cells that are
four times beyond them in width, horizon or batch. Rows are written after each job, of which most take under a minute; what is
worth most comes first, and what does not fit into --seconds is left to the next call.

What it takes was estimated for an H100, not measured. The sweep's engine, which computes models together and
replays a captured step as this does, made 2.5M tokens a second at 1M parameters and 1.1M at 10M (71 MFLOP a token, so 80 TFLOP/s)
on an H200 (benchmarks/results/accelerator_NVIDIA-H200.md), not compiled. An H100's memory has .7 of that one's speed, and what
is not compiled waits for memory, so SPEED has about .75 of it: 2M tokens a second at width 128 (8 MFLOP), .75M at 512 (88 MFLOP,
66 TFLOP/s), .45M at 704 (158 MFLOP, 71 TFLOP/s). torch.compile is left out: every job has shapes of its own, and the compiled
engine did not end its compilation within two minutes on that machine.

    tuning, 14 jobs           212M tokens at width 128      148 s
    8M tokens, 8k a step      206M at width 128 (1.3M)      112 s
    2M tokens, 8k a step       52M at width 512 (14M)        78 s
    2M tokens, 8k a step       52M at width 704 (26M)       124 s
    4M tokens, 32k a step     103M at width 128              61 s
    start and text                                           30 s   553 s in all
    8M tokens, 32k a step     206M at width 512             284 s   a second sitting; then Power as in the paper, then more seeds
"""

import gc
import hashlib
import json
import math
import sys
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers
from run import TAIL, K, append_rows, at_width, done_jobs, job_of, rows_of, wsd_trunk
from train import Models, Trunk
from tune import curves, least, one_scale, read

from hf_power.data.text import python_files, stdlib_folder
from hf_power.data.tokenizer import train_bpe
from hf_power.records.files import write_json
from hf_power.records.machine import hardware
from hf_power.schedule import PAPER_LAW, Law
from hf_power.schedule.law import PAPER_MAX_LR
from hf_power.sweep.grid import few_digits
from hf_power.sweep.stacked import SweepData


@dataclass(frozen=True)
class Size:
    """What is trained: the model of the fit's width, the fit's batches and horizons, and the cells beyond them."""

    model: dict
    vocabulary: int
    block: int
    text_bytes: int
    eval_tokens: int
    batches: tuple[int, ...]
    horizons: tuple[int, ...]
    warmup_tokens: int
    warmup_steps: int  # At least; four were too few for large batches.
    cells: tuple[tuple[int, int, int], ...]  # Width, batch, horizon; what is worth most comes first.
    seeds: tuple[tuple[int, ...], ...]

    @property
    def width(self):
        return self.model["hidden_size"]


FULL = Size(
    model={"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 2},
    vocabulary=4096,
    block=256,
    text_bytes=64_000_000,
    eval_tokens=64 * K,
    batches=(8 * K, 2 * K),
    horizons=(512 * K, 1024 * K, 2048 * K),
    warmup_tokens=64 * K,
    warmup_steps=8,
    cells=(
        (128, 8 * K, 8192 * K),
        (512, 8 * K, 2048 * K),
        (704, 8 * K, 2048 * K),
        (128, 32 * K, 4096 * K),
        (512, 32 * K, 8192 * K),
    ),
    seeds=((10, 11, 12), (13, 14, 15), (16, 17, 18), (19, 20, 21)),
)
TOY = Size(
    model={"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2},
    vocabulary=300,
    block=16,
    text_bytes=30_000,
    eval_tokens=128,
    batches=(32, 16),
    horizons=(K // 4, K // 2),
    warmup_tokens=64,
    warmup_steps=2,
    cells=((16, 64, 2 * K), (32, 128, 2 * K)),
    seeds=((10, 11, 12),),
)
SPEED = {128: 2.0e6, 512: 0.75e6, 704: 0.45e6}  # Tokens a second.
JOB_SECONDS = 3  # For building and capturing.
# Where the tuning begins: the exponents of WSD's law of the CPU's proxies, and .36 of its rates, because at their base width of 32
# hidden matrices of this width had a quarter of the rate and the best rate of such a model was half of that law's.
PRIOR = Law(7.0, -0.4687, 0.603)
SCALES, FREE_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0, 4.0, 8.0)
POWER_SCALES, CAPS = (0.25, 0.5, 1.0, 2.0), (1, 2)
TUNING_SEEDS = (0, 1)
CORPUS = "python sources"


def text(size):
    """Blocks of the standard library and of torch's sources, which every machine has that can run this; and their digest."""
    roots = (stdlib_folder(), Path(torch.__file__).parent)
    paths = [root / path for root in roots for path in python_files(root)]
    chosen, left = [], size.text_bytes
    for i in np.random.default_rng(0).permutation(len(paths)):
        if left > 0:
            # Python's own tests of encodings hold files that are broken on purpose.
            chosen.append(paths[i].read_bytes().decode(errors="ignore")[:left])
            left -= len(chosen[-1])
    tokenizer = train_bpe(iter(chosen[::4]), size.vocabulary)
    encoded = tokenizer.backend_tokenizer.encode_batch(chosen)
    tokens = np.concatenate([np.array([*each.ids, tokenizer.eos_token_id], dtype=np.int16) for each in encoded])
    blocks = tokens[: len(tokens) // size.block * size.block].reshape(-1, size.block)
    held = size.eval_tokens // size.block
    held_out = [{"input_ids": block} for block in blocks[:held]]
    return SweepData(tokenizer, _Blocks(blocks[held:]), held_out, {}), hashlib.sha256(tokens).hexdigest()[:16]


class _Blocks:
    """As many rows at once as are asked for, as `datasets` gives them, which the machine need not have."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, rows):
        return {"input_ids": self.blocks[rows]}


def settings_of(size, width, batch):
    sections = {"model": size.model, "mup": {"base_width": size.width, "preset": "power_of_two"}}
    sections |= {"data": {"dataset": "python-stdlib", "vocab_size": size.vocabulary, "block_size": size.block}}
    cpu = not torch.cuda.is_available()
    sections |= {
        "training": {"weight_decay": 0.1, "bf16": True, "use_cpu": cpu},
        "run": {"max_eval_tokens": size.eval_tokens},
    }
    return at_width(sections, width, batch)


def warmup(size, batch):
    return max(size.warmup_tokens, size.warmup_steps * batch)


def ladder(size, batch, scales, seeds, linear_to=None):
    """Members of one rate each: scales of the rate of PRIOR at the second horizon of the fit."""
    rate = PRIOR.lr(size.horizons[1], batch)
    for scale in scales:
        trunk = Trunk(
            f"b 0 s {scale:g}", few_digits(scale * rate), warmup_tokens=warmup(size, batch), linear_to=linear_to
        )
        yield from ((trunk, seed) for seed in seeds)


def first_tuning_jobs(size):
    """WSD's rates and the constant ones on the same trunks, schedule-free's, and linear's at each horizon."""
    for batch in size.batches:
        members = ladder(size, batch, SCALES, TUNING_SEEDS)
        yield job_of("tune", CORPUS, size.width, batch, size.horizons, members, (0.2,))
        members = ladder(size, batch, FREE_SCALES, TUNING_SEEDS[:1])
        yield job_of("tune free", CORPUS, size.width, batch, size.horizons, members, free=True)
        for horizon in size.horizons:
            members = ladder(size, batch, SCALES, TUNING_SEEDS[:1], linear_to=horizon)
            yield job_of("tune linear", CORPUS, size.width, batch, (horizon,), members)


def power_tuning_jobs(size, law):
    """Power of WSD's exponents: its scale, under two caps that are multiples of WSD's rate at the shortest horizon."""
    for batch in size.batches:
        for cap in CAPS:
            trunks = [power(size, law, batch, scale, cap, f"b {law.b:g} s {scale:g}") for scale in POWER_SCALES]
            members = [(trunk, seed) for trunk in trunks for seed in TUNING_SEEDS]
            yield job_of(f"tune power {cap}", CORPUS, size.width, batch, size.horizons, members, (0.2,))


def power(size, law, batch, scale, cap, method="power"):
    highest = few_digits(cap * law.lr(size.horizons[0], batch))
    return Trunk(method, few_digits(scale * law.a), law.b, law.batch_exponent, highest, warmup(size, batch))


def law_of(size, rows, part, finish):
    """The law through the best rates of a part's cells."""
    points = []
    for (_, batch, horizon), curve in curves(rows, part, finish).items():
        best = least([curve])["scale"] * PRIOR.lr(size.horizons[1], batch)
        points.append((1.0, math.log(horizon), math.log(batch / 4096), math.log(best)))
    cells = np.array(points)
    _, b, c = np.linalg.lstsq(cells[:, :3], cells[:, 3], rcond=None)[0]
    # Six noisy optima must not make a rate that rises with the horizon.
    b, c = float(np.clip(b, -1.0, -0.05)), float(np.clip(c, 0.0, 1.0))
    a = math.exp(float(np.mean(cells[:, 3] - b * cells[:, 1] - c * cells[:, 2])))
    return Law(few_digits(a), few_digits(b), few_digits(c))


def choose_rest(size, rows, law):
    """What is chosen once Power's rows are there, as the held-out jobs need it."""
    by_cap = {cap: one_scale(rows, f"tune power {cap}", "average 0.2") for cap in CAPS}
    cap = min(by_cap, key=lambda cap: by_cap[cap]["loss"])
    tails = {cap: one_scale(rows, f"tune power {cap}", "tail") for cap in CAPS}
    return {
        "wsd": law,
        "linear": law_of(size, rows, "tune linear", "raw"),
        "power": by_cap[cap] | {"cap": cap},
        "power by cap": {"average": by_cap, "tail": tails},
        "constant": one_scale(rows, "tune", "average 0.2"),
        "free": one_scale(rows, "tune free", "free"),
    }


def held_out_jobs(size, tuned, seeds):
    """Of each cell two jobs of nine members and schedule-free AdamW's three."""
    for width, batch, horizon in size.cells:
        long = warmup(size, batch)
        wsd = {factor: wsd_trunk(horizon * factor // 4, batch, tuned["wsd"], long) for factor in (1, 4, 16)}
        rate = PRIOR.lr(size.horizons[1], batch)
        open_trunk = power(size, tuned["wsd"], batch, tuned["power"]["scale"], tuned["power"]["cap"])
        constant = Trunk("constant", few_digits(tuned["constant"]["scale"] * rate), warmup_tokens=long)
        linear_lr = few_digits(tuned["linear"].lr(horizon, batch))
        linear = Trunk("linear 1", linear_lr, warmup_tokens=long, linear_to=horizon)
        free = Trunk("free", few_digits(tuned["free"]["scale"] * rate), warmup_tokens=long)
        for trunks in ((open_trunk, wsd[4], linear), (constant, wsd[1], wsd[16])):
            members = [(trunk, seed) for trunk in trunks for seed in seeds]
            yield job_of("held out", CORPUS, width, batch, (horizon,), members, (0.1, 0.2, 0.3))
        yield job_of("held out", CORPUS, width, batch, (horizon,), [(free, seed) for seed in seeds], free=True)


def paper_jobs(size, seeds):
    """Power with the paper's numbers in each cell."""
    for width, batch, horizon in size.cells:
        law = PAPER_LAW
        trunk = Trunk("power paper", law.a, law.b, law.batch_exponent, PAPER_MAX_LR, warmup(size, batch))
        yield job_of("held out", CORPUS, width, batch, (horizon,), [(trunk, seed) for seed in seeds], (0.2,))


def estimate(job):
    """Seconds that a job is expected to take; nothing is known of the toy's."""
    tails = 0 if job.schedule_free else round(TAIL * sum(job.horizons))
    tokens = len(job.seeds) * (max(job.horizons) + tails)
    return JOB_SECONDS + tokens / SPEED[job.width] if job.width in SPEED else 0.0


class Sitting:
    """The jobs of one call: those that have no rows yet and fit into its time."""

    def __init__(self, size, folder, seconds):
        self.size, self.path, self.end = size, folder / "rows.jsonl", time.perf_counter() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self.data, digest = text(size)
        texts = {job for job in done_jobs(self.path) if job.startswith("text ")}
        if texts - {f"text {digest}"}:
            sys.exit(f"{self.path} has rows of another text than this machine's: pass another --folder.")
        if not texts:
            append_rows(self.path, [json.dumps({"job": f"text {digest}", "blocks": len(self.data.blocks)})])

    def take(self, jobs):
        """Whether all of them have rows now."""
        done = done_jobs(self.path)
        for job in jobs:
            if job.id in done:
                continue
            if time.perf_counter() + estimate(job) > self.end:
                print(
                    f"no time is left for {job.part}, width {job.width}, {job.batch} a step: call it again", flush=True
                )
                return False
            started = time.perf_counter()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            settings = settings_of(self.size, job.width, job.batch)
            models = Models(settings, job.seeds, self.data, job.schedule_free, device, compiles=False)
            parameters = sum(tensor[0].numel() for tensor in models.weights)
            lines = rows_of(job, models)
            about = {"seconds": round(time.perf_counter() - started, 1), "estimated": round(estimate(job), 1)}
            about |= {"members": len(job.seeds), "parameters": parameters, "device": hardware(torch.device(device))}
            append_rows(self.path, [*lines, json.dumps({"job": job.id} | about)])
            print(f"{job.part}, width {job.width}, {job.batch} a step, {max(job.horizons) // K}k: {about}", flush=True)
            # A captured step holds its memory until the models are gone.
            del models
            gc.collect()
            torch.cuda.empty_cache()
        return True


def measure(folder, seconds, toy=False):
    """Tune, then measure, as far as the time goes; True once all is there."""
    if not toy and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: pass --toy to try the script on a CPU.")
    size = TOY if toy else FULL
    sitting = Sitting(size, folder, seconds)
    if not sitting.take(first_tuning_jobs(size)):
        return False
    law = law_of(size, read(sitting.path), "tune", "tail")
    if not sitting.take(power_tuning_jobs(size, law)):
        return False
    tuned = choose_rest(size, read(sitting.path), law)
    laws = {name: vars(tuned[name]) for name in ("wsd", "linear")}
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers)}
    write_json(folder / "tuned.json", tuned | laws | {"versions": versions})
    first, *more = size.seeds
    held_out = chain(held_out_jobs(size, tuned, first), paper_jobs(size, first))
    return sitting.take(chain(held_out, *(held_out_jobs(size, tuned, seeds) for seeds in more)))
