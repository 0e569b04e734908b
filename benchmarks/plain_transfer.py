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
    "* **Under muP the best rate of Qwen3 and Qwen3-MoE moves by .1 octave or less**, on the mean of two seeds, **and Gemma 2's by a third**, "
    "more than the quarter that was expected; under standard parameterization by .6, .8 and 1.6. The intervals beside the "
    "first two leave Gemma 2 out, whose third seed is not complete; with it they are .42 wide, so that less than a quarter is what was measured, and is not proven.",
    "* **OLMo 2 jumps by more than two octaves, from one valley to another.** Neither of the two moves, but which is the deeper changes with the "
    "width. The one at .13 is that of the embedding, which begins fourteen times smaller than what a block adds, because OLMo 2 normalizes "
    "what a block puts out and does not scale its embeddings. post_norm.md has what was tried, and `mup_init_` warns of such a model.",
    "* **With an embedding multiplier of 10 OLMo 2 has one valley**, which is flat: its place moves by -.12 and -.29 octave in two seeds, in a third it is not "
    "surrounded at width 32, and by -.45 in their mean; standard parameterization moves by -.84 there. That is far from the jump of the plain model, and no proof of "
    "a quarter octave. The rows are not complete: `python benchmarks/plain_transfer.py olmo2_m_emb_10 gemma2` goes on with them.",
    "* **With muP's embedding rate alone the optimum goes up**, by about an octave in Qwen3 and Qwen3-MoE and a fifth in Gemma 2: the hidden matrices have muP's rates, but begin "
    "twice as large. What was expected of it was wrong.",
    "* The drift alone is measured, not which way is better. At its own best rate standard parameterization has the lower loss at width 128, "
    "by .01 to .07 nats, and the embedding rate one lower still: their first weights are twice those of muP there, and the "
    "init was not tuned.",
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


def optimum(losses, seeds):
    """log2 of the best learning rate, by a parabola through the mean loss at the best rate and its neighbours."""
    center = best(losses, seeds)
    means = {
        k: fmean(own[s] for s in seeds) for k, own in losses.items() if abs(k - center) <= 2 and own.keys() >= seeds
    }
    ks = sorted(k for k, loss in means.items() if math.isfinite(loss))
    curvature, slope, _ = np.polyfit(ks, [means[k] for k in ks], 2) if len(ks) > 2 else (-1.0, 0.0, 0.0)
    if curvature <= 0 or not ks[0] <= -slope / curvature / 2 <= ks[-1]:
        return math.nan
    return math.log2(LOWEST) - slope / curvature / 4  # Half an octave to each k.


def cells(rows, vocabulary):
    """(family, way) -> drift in octaves in all and by seed, optima and losses at both widths, over the seeds of both."""
    found = {}
    for family, way in dict.fromkeys((row["family"], row["way"]) for row in rows if row["vocabulary"] == vocabulary):
        small, large = (losses_of(rows, family, each, vocabulary) for each in ("base", way))
        if way == "base":
            continue
        common = {s for s in range(MOST_SEEDS) if all(s in losses[best(losses, {0})] for losses in (small, large))}
        optima = [optimum(losses, common) for losses in (small, large)]
        found[family, way] = {"drift": optima[1] - optima[0], "optima": [2**each for each in optima]}
        found[family, way]["by_seed"] = [optimum(large, {s}) - optimum(small, {s}) for s in sorted(common)]
        found[family, way]["losses"] = [
            fmean(losses[best(losses, common)][seed] for seed in common) for losses in (small, large)
        ]
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


def octaves(drift):
    return "none" if math.isnan(drift) else f"{drift:+.2f}"


def table(rows, size, vocabulary):
    found = cells(rows, vocabulary)
    halves = intervals(found)
    lines = [
        f"| family | parameterization | best rate at {size.base} | at {size.width} | drift in octaves | by seed | loss at {size.base} | at {size.width} |"
    ]
    lines += ["|---|---|---:|---:|---:|---|---:|---:|"]
    for (family, way), cell in sorted(found.items(), key=lambda item: (item[0][0], WAYS.index(item[0][1]))):
        is_whole = len(cell["by_seed"]) > 1 and all(map(math.isfinite, cell["by_seed"]))
        half = f" ± {halves[way]:.2f}" if way in halves and is_whole else ""
        row = [
            family,
            way,
            *("not bracketed" if math.isnan(each) else f"{each:.4f}" for each in cell["optima"]),
            octaves(cell["drift"]) + half,
        ]
        row += [", ".join(map(octaves, cell["by_seed"])), *(f"{each:.3f}" for each in cell["losses"])]
        lines.append(f"| {' | '.join(row)} |")
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
        "beside it; where two or more seeds were run, of their mean. ± is Student's 95 % interval of a family's drift, from the differences "
        "between paired seeds, pooled over the families in which the rates bracket the optimum of each seed. The learning rate of muP and of embedding_rate is "
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
