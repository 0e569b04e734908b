"""Why does OLMo 2's best learning rate drift under muP? python benchmarks/post_norm.py [EXPERIMENT ...].

Small models of plain_transfer.py's kind, each with one thing changed. Every run is a line of benchmarks/results/post_norm.jsonl as
soon as it has ended, and none is made twice.
"""

import argparse
import json
import math
import os
import time
import warnings
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from plain_transfer import MAX_NORM, WEIGHT_DECAY, config_of, load_blocks, rate_of, read
from transformers import get_linear_schedule_with_warmup

from hf_power import MupAdamW, mup_init_
from hf_power.mup.init import new_model
from hf_power.mup.optimizer import factors_of

PATH = Path(__file__).resolve().parent / "results" / "post_norm.jsonl"
DEFAULTS = {"family": "olmo2", "base": 32, "width": 32, "k": 8, "seed": 0, "steps": 200, "warmup": 0.1}
DEFAULTS |= {
    "weight_decay": WEIGHT_DECAY,
    "init": 0.1,
    "embedding": 1.0,
    "gain": 1.0,
    "held": "",
    "held_k": 8,
    "only": "",
    "clip": MAX_NORM,
}
DEFAULTS |= {"sigma_lr": 0.0, "batch": 16, "matrix_k": 0, "multiplier": 1.0}


def group_of(name, own):
    if own.role in ("embedding", "head"):
        return own.role
    return "gain" if own.std is None else "matrix"


def train(options, blocks, held_out):
    o = {**DEFAULTS, **options}
    config = config_of(o["family"], o["width"])
    config.initializer_range = o["init"]
    model = new_model(config, dtype=torch.float32)
    torch.manual_seed(o["seed"])
    mup_init_(model, base_width=o["base"])
    factors = factors_of(model)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if factors[name].role == "embedding":
                tensor.mul_(o["embedding"] * o["multiplier"])
            if o["gain"] != 1.0 and "layers." in name and ("post_attention" in name or "post_feedforward" in name):
                tensor.mul_(o["gain"])
    optimizer = MupAdamW()(model, lr=rate_of(o["k"]), weight_decay=o["weight_decay"])
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            own, new = factors[names[id(tensor)]], {**group, "params": [tensor]}
            kind = group_of(names[id(tensor)], own)
            if kind in o["held"].split("+") or (o["only"] and kind not in o["only"].split("+")):
                new["lr"] *= rate_of(o["held_k"]) / rate_of(o["k"])
            if kind == "embedding":
                new["lr"] *= o["multiplier"]
                new["weight_decay"] /= o["multiplier"]
                new["eps"] *= o["multiplier"]
            if kind == "matrix":
                new["lr"] *= 2 ** (o["matrix_k"] / 2) * own.r ** o["sigma_lr"]
                new["weight_decay"] /= own.r ** o["sigma_lr"]
            groups.append(new)
    optimizer = torch.optim.AdamW(groups, lr=rate_of(o["k"]), betas=(0.9, 0.95), fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(o["steps"] * o["warmup"]), o["steps"])
    order = np.random.default_rng([o["seed"], 0]).permutation(len(blocks))[: o["steps"] * o["batch"]]
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    losses = []
    for batch in blocks[torch.from_numpy(order)].split(o["batch"]):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.train(False)
    with torch.no_grad():
        parts = held_out.split(64)
        loss = fmean(model(input_ids=part, labels=part, use_cache=False).loss.item() for part in parts)
        rms = {}
        for name, tensor in model.named_parameters():
            kind = group_of(name, factors[name])
            rms.setdefault(kind, []).append((tensor.norm() / before[name].norm()).item())
    quarter = max(1, o["steps"] // 8)
    return {
        "loss": loss if math.isfinite(loss) else None,
        "growth": {kind: round(fmean(values), 3) for kind, values in rms.items()},
        "curve": [round(fmean(losses[i : i + quarter]), 4) for i in range(0, len(losses), quarter)],
    }


def ladder(ks, seeds=(0,), **options):
    return [{**options, "k": k, "seed": seed} for seed in seeds for k in ks]


EXPERIMENTS = {
    "wide": [*ladder(range(6, 20, 2), width=128), *ladder(range(6, 20, 2), width=64), *ladder((15, 16, 17, 18))],
    "transfer": [
        *ladder((8, 10, 6, 12), width=128, multiplier=10.0),
        *ladder((8, 10, 12, 14), family="qwen3", multiplier=10.0),
    ],
    "multiplier": [
        *ladder((4, 6, 8, 10, 12), multiplier=10.0),
        *ladder((6, 8, 10), embedding=10.0),
        *ladder((6, 8, 10), multiplier=4.0),
    ],
    "groups": [
        *ladder((6, 10, 12, 14, 16), only="matrix"),
        *ladder((6, 10, 12, 14, 16), only="embedding"),
        *ladder((6, 10, 12, 14, 16), only="head"),
        *ladder((6, 10, 12, 14, 16), only="gain"),
    ],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    blocks, held_out = load_blocks(32)
    rows = read(PATH)
    for name in parser.parse_args().experiments:
        for options in EXPERIMENTS[name]:
            if any(row["options"] == options for row in rows):
                continue
            began = time.process_time()
            row = {"experiment": name, "options": options, **train(options, blocks, held_out)}
            row["cpu_seconds"] = round(time.process_time() - began, 1)
            rows.append(row)
            with open(PATH, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
