"""Does the best learning rate carry over from width 32 to 128? python benchmarks/plain_transfer.py [FAMILY ...].

The plain form of muP, standard parameterization, and standard parameterization with muP's embedding rate
(arXiv:2605.21486) are trained on the sources of Python's standard library, at learning rates a factor of 2 apart and then
of sqrt(2). At width 32, the base, all three are one and the same run. Each run is a line of
benchmarks/results/plain_transfer.jsonl as soon as it has ended, and none is made twice: killed, the command goes on where it
was, and killed for good it leaves the rounds that it has finished. The table is made of these lines.
"""

import argparse
import json
import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

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
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_key_value_heads": 4}
FAMILIES = {"qwen3": {}, "olmo2": {}, "gemma2": {}, "qwen3_moe": EXPERTS}
# The same models with the embedding_multiplier that brings the embedding's first values to a deviation of 1.
M_EMB, MULTIPLIER = "_m_emb_10", 10.0
FAMILIES |= {f"{name}{M_EMB}": FAMILIES[name] for name in ("olmo2", "qwen3")}
WEIGHT_DECAY, INIT, MAX_NORM = 0.1, 0.1, 1.0


@dataclass(frozen=True)
class Size:
    """The two widths, the text of a run in blocks of bytes, and where it is trained."""

    base: int
    width: int
    block: int
    steps: int
    blocks_per_step: int
    device: str

    def __str__(self):
        tokens = self.steps * self.blocks_per_step * self.block
        return (
            f"Widths {self.base} and {self.width}, two layers, heads of 16, {tokens:,} bytes in {self.steps} steps of "
            f"{self.blocks_per_step} blocks of {self.block}"
        )


SIZES = {"cpu": Size(32, 128, 32, 200, 16, "cpu"), "gpu": Size(128, 512, 256, 2000, 64, "cuda")}
VOCABULARY, NUM_HELD_OUT = 128, 512
WAYS = ("mup", "standard", "embedding_rate")
# A learning rate is LOWEST * 2**(k / 2), and k its number here. Where a cell begins: a k at the base, and what the other
# cells add to the base's best one.
LOWEST = 0.001
START = 8
OFFSETS = {"mup": 0, "standard": -4, "embedding_rate": -2}
# Which cells, which seeds, and how many steps of sqrt(2) lie between neighbours: each round refines the ones before.
MOST_SEEDS = 10
ROUNDS = (
    (("base", "mup", "standard"), (0,), 2),
    (("base", "mup"), (0, 1), 2),
    (("base", "mup"), (0, 1), 1),
    (("base", "mup"), (0, 1, 2), 1),
    (("embedding_rate",), (0,), 2),
    (("standard", "embedding_rate"), (0, 1), 1),
    (("base", *WAYS), (0, 1, 2), 1),
    *((("base", "mup"), tuple(range(seeds)), 1) for seeds in range(4, MOST_SEEDS + 1)),
)
# Written down before the first run.
EXPECTED = (
    "Expected before the first run: muP drifts by less than a quarter of an octave in each family; standard "
    "parameterization by -1 to -2 octaves, as its hidden matrices ask for a rate of 1 / m; with muP's embedding rate alone the "
    "drift is within half an octave of zero, since its hidden matrices have muP's rates but not muP's first weights."
)
# What is read from the rows of size cpu as they lie there; a measurement made anew needs other words.
FINDINGS = (
    "* **Under muP the best rate moves by less than a quarter of an octave in all four families**, as was expected, in the mean of ten seeds: by +.10 in Qwen3, +.07 in "
    "Qwen3-MoE, -.23 in Gemma 2 and -.21 in OLMo 2 with an embedding multiplier. The intervals are .13 to .32 wide on either side: for Qwen3-MoE a quarter octave "
    "is proven, Qwen3's ends at +.27, Gemma 2's at -.45 and OLMo 2's at -.53, so that a small drift downwards is likely in the last two. "
    "Standard parameterization moves by -.6 to -1.6 in the mean of three seeds.",
    "* **OLMo 2 without the multiplier jumps by more than two octaves, from one valley to another.** Neither of the two moves, but which is the deeper changes with the "
    "width. The one at .13 is that of the embedding, which begins fourteen times smaller than what a block adds, because OLMo 2 normalizes "
    "what a block puts out and does not scale its embeddings. post_norm.md has what was tried, and `mup_init_` warns of such a model. With a multiplier of 10 "
    "there is one valley, which is flat at width 32.",
    "* **With muP's embedding rate alone the optimum goes up**, by about an octave in Qwen3 and Qwen3-MoE, less in the others: the hidden matrices have muP's rates, but begin "
    "twice as large. What was expected of it was wrong.",
    "* The drift alone is measured, not which way is better. At its own best rate and over the same three seeds standard parameterization has the lower loss at width 128, "
    "by .02 to .09 nats, and the embedding rate one lower still, by .01 to .03: their first weights are twice those of muP there, and the "
    "init was not tuned.",
    "* Two and three seeds had said +.06, +.10, -.34 and -.45: the drift of one seed has a standard deviation of .2 to .45 octave.",
)
FIRST_TRY = (
    "A first try, whose rows are kept, read the same text in tokens of a vocabulary of 512, with one seed. There muP's optimum goes down as "
    "well, by .7 to .9 octave: 512 tokens overlap in 32 dimensions, so that the wider model learns faster at one and the same small "
    "rate (loss 5.13, 4.90 and 4.71 at widths 32, 64 and 128 after 100 steps at .008). Bytes of Python have some 40 frequent values. "
    "The change was made after this had been seen.",
)
NEIGHBOURS = {2: (-2, 0, 2), 1: (-2, -1, 0, 1, 2)}


def config_of(family, width):
    """The family's default config, small: two layers, heads of 16, an MLP of twice the width, tied as by default."""
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None}
    small = shrink(
        CONFIG_MAPPING[family.removesuffix(M_EMB)](), **sizes, intermediate_size=128, **FAMILIES.get(family, {})
    )
    set_initializer_range(small, INIT)
    return scale_width(small, width)


def load_blocks(block):
    """Training blocks of bytes, and held-out ones, which may be of the same files; all that is not ASCII is one byte."""
    sources = [np.frombuffer(text.encode(), dtype=np.uint8) for _, text in python_sources(stdlib_folder())]
    text = np.minimum(np.concatenate(sources), VOCABULARY - 1)
    blocks = text[: len(text) // block * block].reshape(-1, block).astype(np.int64)
    blocks = torch.from_numpy(blocks[np.random.default_rng(0).permutation(len(blocks))])
    return blocks[NUM_HELD_OUT:], blocks[:NUM_HELD_OUT]


def train(size, blocks, held_out, family, way, rate, seed):
    """The held-out loss in nats per token of one run, infinite where it is no number."""
    model = new_model(config_of(family, size.base if way == "base" else size.width), dtype=torch.float32)
    torch.manual_seed(seed)
    multiplier = MULTIPLIER if family.endswith(M_EMB) else 1.0
    mup_init_(model, base_width=size.base, embedding_multiplier=multiplier)
    if way not in ("base", "mup"):
        torch.manual_seed(seed)
        CONTROLS[way].init(model)
    model.to(size.device)
    if way in ("base", "mup"):
        optimizer = MupAdamW()(model, lr=rate, weight_decay=WEIGHT_DECAY)
    else:
        groups = CONTROLS[way].groups(model, lr=rate, weight_decay=WEIGHT_DECAY)
        # Clipping is that of a model with the multiplier in its forward pass, as MupAdamW has it.
        model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * multiplier)
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
    loss, _ = descend(model, optimizer, size, blocks, held_out, seed)
    return loss if math.isfinite(loss) else math.inf


def descend(model, optimizer, size, blocks, held_out, seed):
    """The held-out loss of a model that takes the steps of a size, and the training loss of each step."""
    schedule = get_linear_schedule_with_warmup(optimizer, size.steps // 10, size.steps)
    order = np.random.default_rng([seed, 0]).permutation(len(blocks))[: size.steps * size.blocks_per_step]
    losses = []
    for batch in blocks[torch.from_numpy(order)].split(size.blocks_per_step):
        batch = batch.to(size.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        losses.append(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.train(False)
    with torch.no_grad():
        parts = held_out.to(size.device).split(64)
        scored = [model(input_ids=part, labels=part, use_cache=False).loss.item() for part in parts]
    return fmean(scored), [loss.item() for loss in losses]


def rate_of(k):
    return float(f"{LOWEST * 2 ** (k / 2):.4g}")


def losses_of(rows, family, way, vocabulary=VOCABULARY):
    """Of one cell, k -> seed -> loss."""
    found = {}
    for row in rows:
        if (row["family"], row["way"], row["vocabulary"]) == (family, way, vocabulary):
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
    if not losses:
        starts = [START if way == "base" else best(losses_of(rows, family, "base"), {0}) + OFFSETS[way]]
    else:
        starts = [best(losses, {0}), best(losses, set(seeds))]
    # A second valley beside the start would else be taken for the only one.
    starts += [START] if way == "base" else []
    # The best rate of the first seed comes first: before its neighbours have all seeds, the mean over seeds misleads.
    for center in starts:
        wanted = [(center + step, seed) for seed in seeds for step in NEIGHBOURS[spacing]]
        if lacking := [(k, seed) for k, seed in wanted if seed not in losses.get(k, {})]:
            return lacking
    return []


def measure(size, rows, path, families):
    blocks, held_out = load_blocks(size.block)
    for ways, seeds, spacing in ROUNDS:
        for family in families:
            for way in ways:
                while todo := missing(rows, family, way, seeds, spacing):
                    k, seed = todo[0]
                    began = time.process_time()
                    loss = train(size, blocks, held_out, family, way, rate_of(k), seed)
                    rows.append({"family": family, "way": way, "vocabulary": VOCABULARY, "k": k, "rate": rate_of(k)})
                    rows[-1] |= {"seed": seed, "loss": loss if math.isfinite(loss) else None}
                    rows[-1] |= {"cpu_seconds": round(time.process_time() - began, 1)}
                    with open(path, "a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
                    print(rows[-1], flush=True)


def optimum(losses, seeds, center):
    """log2 of the best learning rate, by a parabola through the mean loss at the rates up to an octave beside the center."""
    means = {
        k: fmean(own[s] for s in seeds) for k, own in losses.items() if abs(k - center) <= 2 and own.keys() >= seeds
    }
    ks = sorted(k for k, loss in means.items() if math.isfinite(loss))
    curvature, slope, _ = np.polyfit(ks, [means[k] for k in ks], 2) if len(ks) > 2 else (-1.0, 0.0, 0.0)
    if curvature <= 0 or not ks[0] <= -slope / curvature / 2 <= ks[-1]:
        return math.nan
    return math.log2(LOWEST) - slope / curvature / 4  # Half an octave to each k.


def cells(rows, vocabulary):
    """(family, way) -> drift in octaves with half of its interval, optima and losses at both widths, over the seeds of both."""
    found = {}
    for family, way in dict.fromkeys((row["family"], row["way"]) for row in rows if row["vocabulary"] == vocabulary):
        small, large = (losses_of(rows, family, each, vocabulary) for each in ("base", way))
        if way == "base":
            continue
        common = {s for s in range(MOST_SEEDS) if all(s in losses[best(losses, {0})] for losses in (small, large))}
        drift, half = jackknife(small, large, common)
        found[family, way] = {"drift": drift, "half": half, "seeds": len(common)}
        found[family, way]["optima"] = [2 ** optimum(each, common, best(each, common)) for each in (small, large)]
        found[family, way]["common"] = common
    for (family, way), cell in found.items():
        # The losses of a family's rows are comparable, so that they are of the seeds that all of them have.
        shared = set.intersection(*(other["common"] for (name, _), other in found.items() if name == family))
        small, large = (losses_of(rows, family, each, vocabulary) for each in ("base", way))
        cell["losses"] = [fmean(losses[best(losses, shared)][s] for s in shared) for losses in (small, large)]
    return found


def jackknife(small, large, seeds):
    """Drift of the optimum of the mean losses in octaves, and half of its 95 % interval from leaving out each seed in turn."""
    # The same rates for every set of seeds; of a flat curve the best one is another with each.
    centers = best(small, seeds), best(large, seeds)

    def drift(of):
        return optimum(large, of, centers[1]) - optimum(small, of, centers[0])

    count = len(seeds)
    if count < 3:
        return drift(seeds), math.nan
    without = [drift(seeds - {seed}) for seed in seeds]
    error = math.sqrt((count - 1) / count * sum((each - fmean(without)) ** 2 for each in without))
    return drift(seeds), student.ppf(0.975, count - 1) * error


def octaves(drift):
    return "none" if math.isnan(drift) else f"{drift:+.2f}"


def table(rows, size, vocabulary):
    found = cells(rows, vocabulary)
    small, wide = size.base, size.width
    lines = [
        f"| family | parameterization | seeds | best rate at {small} | at {wide} | drift in octaves | loss at {small} | at {wide} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for (family, way), cell in sorted(found.items(), key=lambda item: (item[0][0], WAYS.index(item[0][1]))):
        half = "" if math.isnan(cell["half"]) else f" ± {cell['half']:.2f}"
        rates = ["not bracketed" if math.isnan(each) else f"{each:.4f}" for each in cell["optima"]]
        row = [family, way, str(cell["seeds"]), *rates, octaves(cell["drift"]) + half]
        lines.append(f"| {' | '.join([*row, *(f'{each:.3f}' for each in cell['losses'])])} |")
    return lines


def text(size, rows):
    counted = [row for row in rows if row["vocabulary"] == VOCABULARY]
    lines = [
        f"`python benchmarks/plain_transfer.py`, transformers {transformers.__version__}, {len(counted)} runs. {size}, from all over the "
        f"text; AdamW with weight decay {WEIGHT_DECAY:g}, gradients clipped to {MAX_NORM:g}, a tenth of warmup and a linear "
        f"decay to zero; init {INIT:g}; head tied or not as the family has it. The loss is in nats per byte of {NUM_HELD_OUT} other blocks.",
        "",
        EXPECTED,
        "",
        "The optimum is that of a parabola in the logarithm of the rate, through the loss at the best rate and at those up to an octave "
        "beside it; where several seeds were run, of their mean. ± is half of the drift's 95 % interval, by leaving out each of three or more paired seeds "
        "in turn (jackknife) and Student's t. The losses are of the seeds that all rows of a family have. The learning rate of muP and of embedding_rate is "
        "that of the embedding, and that of the hidden matrices is a quarter of it at the larger width.",
        "",
        *table(rows, size, VOCABULARY),
    ]
    if len(counted) < len(rows):  # The rows of size cpu.
        lines += ["", *FINDINGS, "", *FIRST_TRY, "", *table(rows, size, 512)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--size", choices=SIZES, default="cpu", help="gpu: widths 128 and 512 on one accelerator")
    parser.add_argument("--table", action="store_true", help="make the table of the rows that are there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    path = RESULTS / ("plain_transfer.jsonl" if options.size == "cpu" else "plain_transfer_gpu.jsonl")
    if not options.table:
        measure(SIZES[options.size], read(path), path, options.families)
    page = text(SIZES[options.size], read(path))
    path.with_suffix(".md").write_text(page)
    print(page)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
