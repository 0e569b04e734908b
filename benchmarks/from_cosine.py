"""From a tuned cosine to Power: python benchmarks/from_cosine.py cpu cpu-long; goes on where it was stopped.

A GPT-2 in standard parameterization learns Python's standard library under transformers' cosine, whose peak is tuned in
powers of two, and under Power with the numbers that follow from the best peak. On the cells of "choose" another mean rate
was tried as well; the cells of "report" took no part in that choice. `cpu-long` has 2.3M parameters at 8k tokens per step, and `gpu`
2.6M at 8k and 64k, with 25 and 100 steps of warmup. Rows: benchmarks/results/from_cosine.jsonl; the table: from_cosine.md.
"""

import argparse
import json
import multiprocessing
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

from hf_power import power_lr

RESULTS = Path(__file__).resolve().parent / "results"
ROWS, PAGE = RESULTS / "from_cosine.jsonl", RESULTS / "from_cosine.md"
BLOCK, VOCABULARY, MICRO = 128, 512, 32
SIZES = {"0.01M": (16, 1), "0.04M": (32, 2), "2.3M": (192, 5), "2.6M": (192, 6)}
# Of each cell: size, tokens per step, steps, warmup, and the peaks of cosine to begin with.
CELLS = {
    "cpu": {
        "choose": [("0.04M", 512, 200, 25, (0.016, 0.008)), ("0.04M", 1024, 150, 100, (0.016, 0.008))],
        "report": [("0.01M", 8192, 100, 25, (0.016, 0.032)), ("0.01M", 8192, 125, 100, (0.016, 0.032))],
    },
    "cpu-long": {
        "choose": [],
        "report": [("2.3M", 8192, steps, warmup, (0.002, 0.004)) for steps, warmup in ((100, 25), (150, 100))],
    },
    "gpu": {
        "choose": [],
        "report": [("2.6M", batch, 1000, warmup, (0.001, 0.002)) for batch in (8192, 65536) for warmup in (25, 100)],
    },
}
# The mean rate over cosine's, the cap over cosine's peak, and the length of the tail.
RULE = (1.0, 1.0, 0.1)
OTHERS = [(0.7, 1.0, 0.1)]


def text_tokens(folder):
    """Training and held-out tokens of the standard library, from a tokenizer that is trained on it."""
    stored = folder / "tokens.npy"
    if not stored.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        files = [path for path in files if "site-packages" not in path.parts]
        order = np.random.default_rng(0).permutation(len(files))
        texts = [files[i].read_text(errors="ignore") for i in order]
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts[::20], vocab_size=VOCABULARY, show_progress=False)
        ids = [np.array(each.ids, dtype=np.int16) for each in tokenizer.encode_batch(texts)]
        np.save(stored, np.concatenate(ids))
    tokens = np.load(stored).astype(np.int64)
    held = 128 * BLOCK
    blocks = torch.from_numpy(tokens[: len(tokens) // BLOCK * BLOCK]).view(-1, BLOCK)
    return blocks[held // BLOCK :], blocks[: held // BLOCK]


def train(job, folder, device="cpu"):
    """One run: its held-out loss, and what it took."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    blocks, held = (part.to(device) for part in text_tokens(folder))
    torch.manual_seed(job["seed"])
    width, layers = SIZES[job["size"]]
    sizes = {
        "vocab_size": VOCABULARY,
        "n_positions": BLOCK,
        "n_embd": width,
        "n_layer": layers,
        "n_head": max(1, width // 32),
    }
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    kwargs = {} if job["schedule"] == "cosine" else {"tokens_per_step": job["tokens_per_step"], **job["kwargs"]}
    schedule = get_scheduler(job["schedule"], optimizer, job["warmup"], job["steps"], scheduler_specific_kwargs=kwargs)
    rows = job["tokens_per_step"] // BLOCK
    order = torch.from_numpy(np.random.default_rng(job["seed"]).permutation(len(blocks)))
    for step in range(job["steps"]):
        batch = blocks[order[torch.arange(step * rows, (step + 1) * rows) % len(order)]]
        for part in batch.split(MICRO):
            loss = model(part, labels=part).loss * (len(part) / rows)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = [model(part, labels=part).loss.item() for part in held.split(MICRO)]
    return {**job, "loss": float(np.mean(losses)), "seconds": round(time.perf_counter() - began, 1)}


def mean_rate(a, cap, cell, tail):
    """The mean rate of Power over the steps of a cell."""
    _, step, steps, warmup, _ = cell
    start = steps - round(tail * steps)
    lengths = {
        "warmup_tokens": warmup * step,
        "decay_start_tokens": start * step,
        "decay_tokens": (steps - start) * step,
    }
    rates = (power_lr(i * step, tokens_per_step=step, max_lr=cap, a=a, **lengths) for i in range(steps))
    return sum(rates) / steps


def scale(target, *given):
    """The a that gives Power this mean rate, by bisection of the logarithm."""
    low, high = 1e-4, 1e4
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean_rate(middle, *given) < target else (low, middle)
    return low


def run_cell(cell, variants, done, folder, device):
    """Tune cosine in powers of two until its best peak has neighbours on both sides, then run Power by each variant."""
    size, step, steps, warmup, peaks = cell
    base = {"size": size, "tokens_per_step": step, "steps": steps, "warmup": warmup, "seed": 0}

    def run(**job):
        key = json.dumps({**base, **job}, sort_keys=True)
        if key not in done:
            done[key] = train({**base, **job}, folder, device)
            with ROWS.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
            print(step, warmup, job["schedule"], f"{job['lr']:g}", round(done[key]["loss"], 4), flush=True)
        return done[key]["loss"]

    losses = {peak: run(schedule="cosine", lr=peak) for peak in peaks}
    while (best := min(losses, key=losses.get)) in (min(losses), max(losses)):
        peak = best / 2 if best == min(losses) else best * 2
        losses[peak] = run(schedule="cosine", lr=peak)
    power = {}
    for mean, cap, tail in variants:
        a = scale(mean * best / 2, cap * best, cell, tail)
        kwargs = {"a": a, "decay_ratio": tail, "decay_shape": "exponential"}
        power[mean, cap, tail] = run(schedule="power", lr=cap * best, kwargs=kwargs, variant=[mean, cap, tail])
    return best, losses[best], power


def table(sizes, found):
    """What came out, as a page."""
    lines = ["    " + " ".join(["python benchmarks/from_cosine.py", *sizes]), ""]
    lines += ["Held-out loss in nats per token, of Power less that of cosine at its best peak; one seed each.", ""]
    lines += [
        "| part | parameters | tokens per step | steps | warmup | best peak | cosine | mean | cap | tail | Power - cosine |"
    ]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for part, cell, (peak, cosine, power) in found:
        for (mean, cap, tail), loss in power.items():
            numbers = f"{cell[0]} | {cell[1]:,} | {cell[2]} | {cell[3]} | {peak:g} | {cosine:.4f}"
            lines.append(f"| {part} | {numbers} | {mean:g} | {cap:g} | {tail:g} | {loss - cosine:+.4f} |")
    return "\n".join(lines) + "\n"


def main():
    """Run what is missing of one size of the benchmark, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="+", choices=list(CELLS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "from_cosine")
    given = parser.parse_args()
    text_tokens(given.cache)
    names = ("size", "tokens_per_step", "steps", "warmup", "seed", "schedule", "lr", "kwargs", "variant")
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    done = {json.dumps({k: row[k] for k in names if k in row}, sort_keys=True): row for row in rows}
    cells = [(part, cell) for size in given.sizes for part, those in CELLS[size].items() for cell in those]
    jobs = [
        (cell, [RULE, *(OTHERS if part == "choose" else [])], done, given.cache, given.device) for part, cell in cells
    ]
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        results = pool.starmap(run_cell, jobs)
    found = [(part, cell, result) for (part, cell), result in zip(cells, results, strict=True)]
    page = table(given.sizes, found)
    PAGE.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
