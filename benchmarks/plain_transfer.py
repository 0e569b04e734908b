"""Does the best learning rate carry over from width 32 to 128? python benchmarks/plain_transfer.py [FAMILY ...].

The plain form of muP, standard parameterization, and standard parameterization with muP's embedding rate
(arXiv:2605.21486) are trained on the sources of Python's standard library at learning rates a factor of sqrt(2) apart. At
width 32, the base, all three are one and the same run. Each run is a line of benchmarks/results/plain_transfer.jsonl as
soon as it has ended, and no run is made twice: killed, the command goes on where it was. The table is made of these lines.
"""

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean, variance

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from scipy.stats import t as student
from transformers import CONFIG_MAPPING, get_linear_schedule_with_warmup

from hf_power import MupAdamW, mup_init_
from hf_power.data.text import python_sources, stdlib_folder
from hf_power.mup.controls import CONTROLS
from hf_power.mup.init import new_model, set_initializer_range
from hf_power.mup.scale import scale_width
from hf_power.mup.shrink import shrink

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = RESULTS / "plain_transfer.jsonl"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_key_value_heads": 4}
FAMILIES = {"qwen3": {}, "olmo2": {}, "gemma2": {}, "qwen3_moe": EXPERTS}
BASE, WIDTH, VOCABULARY, BLOCK = 32, 128, 128, 32
STEPS, WARMUP, BLOCKS_PER_STEP, NUM_HELD_OUT = 200, 20, 16, 512
WEIGHT_DECAY, INIT, MAX_NORM = 0.1, 0.1, 1.0
WAYS = ("mup", "standard", "embedding_rate")
# A learning rate is LOWEST * 2**(k / 2), and k its number here. Where a cell begins: the k of a family at the base, and what
# the other cells add to the base's best one.
LOWEST = 0.001
START = {"qwen3": 8, "olmo2": 14, "gemma2": 10, "qwen3_moe": 8}
OFFSETS = {"mup": 0, "standard": -4, "embedding_rate": -2}
# Which cells, which seeds, and how many steps of sqrt(2) lie between neighbours: each round refines the ones before.
ROUNDS = (
    (("base", "mup", "standard"), (0,), 2),
    (("base", "mup"), (0, 1), 2),
    (("embedding_rate",), (0,), 2),
    (("base", "mup"), (0, 1), 1),
    (("standard", "embedding_rate"), (0, 1), 1),
    (("base", *WAYS), (0, 1, 2), 1),
)
# Written down before the first run.
EXPECTED = (
    "Expected before the first run: muP drifts by less than a quarter of an octave in each family; standard "
    "parameterization by -1 to -2 octaves, as its hidden matrices ask for a rate of 1 / m; with muP's embedding rate alone the "
    "drift is within half an octave of zero, since its hidden matrices have muP's rates but not muP's first weights."
)
NEIGHBOURS = {2: (-2, 0, 2), 1: (-2, -1, 0, 1, 2)}


def config_of(family, width):
    """The family's default config, small: two layers, heads of 16, an MLP of twice the width, tied as by default."""
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
    small = shrink(CONFIG_MAPPING[family](), **sizes, intermediate_size=128, **FAMILIES.get(family, {}))
    set_initializer_range(small, INIT)
    return scale_width(small, width)


def load_blocks():
    """Training blocks of bytes, and held-out ones, which may be of the same files; all that is not ASCII is one byte."""
    sources = [np.frombuffer(text.encode(), dtype=np.uint8) for _, text in python_sources(stdlib_folder())]
    text = np.minimum(np.concatenate(sources), VOCABULARY - 1)
    blocks = text[: len(text) // BLOCK * BLOCK].reshape(-1, BLOCK).astype(np.int64)
    blocks = torch.from_numpy(blocks[np.random.default_rng(0).permutation(len(blocks))])
    return blocks[NUM_HELD_OUT:], blocks[:NUM_HELD_OUT]


def train(blocks, held_out, family, way, rate, seed):
    """The held-out loss in nats per token of one run, infinite where it is no number."""
    model = new_model(config_of(family, BASE if way == "base" else WIDTH), dtype=torch.float32)
    torch.manual_seed(seed)
    mup_init_(model, base_width=BASE)
    if way in ("base", "mup"):
        optimizer = MupAdamW()(model, lr=rate, weight_decay=WEIGHT_DECAY)
    else:
        torch.manual_seed(seed)
        CONTROLS[way].init(model)
        groups = CONTROLS[way].groups(model, lr=rate, weight_decay=WEIGHT_DECAY)
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    order = np.random.default_rng([seed, 0]).permutation(len(blocks))[: STEPS * BLOCKS_PER_STEP]
    for batch in blocks[torch.from_numpy(order)].split(BLOCKS_PER_STEP):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.train(False)
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() for part in held_out.split(64)]
    return fmean(losses) if math.isfinite(fmean(losses)) else math.inf


def rate_of(k):
    return float(f"{LOWEST * 2 ** (k / 2):.4g}")


def losses_of(rows, family, way):
    """Of one cell, k -> seed -> loss."""
    found = {}
    for row in rows:
        if (row["family"], row["way"], row["vocabulary"]) == (family, way, VOCABULARY):
            found.setdefault(row["k"], {})[row["seed"]] = math.inf if row["loss"] is None else row["loss"]
    return found


def best(losses, seeds):
    """The k with the lowest mean over these seeds, among those that were trained with most of them."""
    most = max(len(set(by_seed) & set(seeds)) for by_seed in losses.values())
    means = {k: fmean(v for seed, v in own.items() if seed in seeds) for k, own in losses.items() if own.keys() & seeds}
    return min((k for k in means if len(losses[k].keys() & seeds) == most), key=means.get)


def missing(rows, family, way, seeds, spacing):
    """The (k, seed) that a cell lacks until its best rate is surrounded by neighbours, each with all seeds."""
    losses = losses_of(rows, family, way)
    if losses:
        center = best(losses, set(seeds))
    elif way == "base":
        center = START.get(family, 8)
    else:
        center = best(losses_of(rows, family, "base"), {0}) + OFFSETS[way]
    wanted = [(center + step, seed) for seed in seeds for step in NEIGHBOURS[spacing]]
    return [(k, seed) for k, seed in wanted if seed not in losses.get(k, {})]


def measure(rows, families):
    blocks, held_out = load_blocks()
    for ways, seeds, spacing in ROUNDS:
        for family in families:
            for way in ways:
                while todo := missing(rows, family, way, seeds, spacing):
                    k, seed = todo[0]
                    began = time.process_time()
                    loss = train(blocks, held_out, family, way, rate_of(k), seed)
                    rows.append({"family": family, "way": way, "vocabulary": VOCABULARY, "k": k, "rate": rate_of(k)})
                    rows[-1] |= {"seed": seed, "loss": loss if math.isfinite(loss) else None}
                    rows[-1] |= {"cpu_seconds": round(time.process_time() - began, 1)}
                    with open(ROWS, "a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(rows[-1], flush=True)


def optimum(losses, seeds):
    """log2 of the best learning rate, by a parabola through the mean loss at the best rate and its neighbours."""
    center = best(losses, seeds)
    means = {
        k: fmean(own[s] for s in seeds) for k, own in losses.items() if abs(k - center) <= 2 and own.keys() >= seeds
    }
    ks = sorted(k for k, loss in means.items() if math.isfinite(loss))
    curvature, slope, _ = np.polyfit(ks, [means[k] for k in ks], 2) if len(ks) > 2 else (-1.0, 0.0, 0.0)
    if curvature <= 0:
        return math.nan
    return math.log2(LOWEST) - slope / curvature / 4  # Half an octave to each k.


def cells(rows):
    """(family, way) -> drift by seed in octaves, optima and losses at both widths, over the seeds that both cells have."""
    found = {}
    for family, way in dict.fromkeys((row["family"], row["way"]) for row in rows):
        if way == "base":
            continue
        small, large = losses_of(rows, family, "base"), losses_of(rows, family, way)
        seeds = [{s for s in range(3) if all(s in losses.get(best(losses, {0}), {}) for losses in (small, large))}]
        common = seeds[0]
        by_seed = [optimum(large, {s}) - optimum(small, {s}) for s in sorted(common)]
        both = [optimum(losses, common) for losses in (small, large)]
        found[family, way] = {"drift": both[1] - both[0], "by_seed": by_seed, "optima": both}
        at = best(small, common)
        lost = [
            fmean(large[k][s] for s in common) for k in (at, best(large, common)) if large.get(k, {}).keys() >= common
        ]
        found[family, way] |= {"losses": [fmean(own[best(own, common)][s] for s in common) for own in (small, large)]}
        found[family, way] |= {"lost": lost[0] - lost[1] if len(lost) == 2 else None}
    return found


def intervals(found):
    """Way -> half width of the 95 % interval of one family's drift, by the seeds' variance pooled over families."""
    halves = {}
    for way in WAYS:
        groups = [cell["by_seed"] for (_, each), cell in found.items() if each == way and len(cell["by_seed"]) > 1]
        groups = [group for group in groups if all(map(math.isfinite, group))]
        freedom = sum(len(group) - 1 for group in groups)
        if freedom:
            pooled = sum((len(group) - 1) * variance(group) for group in groups) / freedom
            halves[way] = student.ppf(0.975, freedom) * math.sqrt(pooled / min(map(len, groups)))
    return halves


def text(rows):
    found = cells(rows)
    halves = intervals(found)
    lines = [
        f"`python benchmarks/plain_transfer.py`, transformers {transformers.__version__}, {len(rows)} runs.",
        "",
        EXPECTED,
        "",
    ]
    lines += [
        "| family | parameterization | best rate at 32 | at 128 | drift in octaves | by seed | loss at 32 | at 128 | lost |"
    ]
    lines += ["|---|---|---:|---:|---:|---|---:|---:|---:|"]
    for (family, way), cell in found.items():
        half = f" ± {halves[way]:.2f}" if way in halves else ""
        row = [family, way, *(f"{2**each:.4f}" for each in cell["optima"]), f"{cell['drift']:+.2f}{half}"]
        row += [", ".join(f"{each:+.2f}" for each in cell["by_seed"]), *(f"{each:.3f}" for each in cell["losses"])]
        lines.append(f"| {' | '.join(row)} | {'' if cell['lost'] is None else format(cell['lost'], '.3f')} |")
    return "\n".join(lines) + "\n"


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    if sys.argv[1:] != ["--table"]:
        measure(rows, sys.argv[1:] or list(FAMILIES))
    (RESULTS / "plain_transfer.md").write_text(text(rows))
    print(text(rows))


if __name__ == "__main__":
    main()
