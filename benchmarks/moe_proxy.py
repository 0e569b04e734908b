"""Does a mixture of experts learn more than a dense model of the same active parameters?

Run as `python benchmarks/moe_proxy.py`.

Both read the same tokens of Python's standard library in the same order, under the power schedule and muP. An expert is
half as wide as the dense MLP and each token goes through two of eight, so that a token meets the same number of weights,
the router's apart. The scale `a` is chosen for each model on a seed of its own; the figure is the held-out loss, without
the balancing loss, over other seeds; then on four times the tokens at the same `a`. Rows and medians go to
benchmarks/results/moe_proxy.json.
"""

import argparse
import contextlib
import io
import json
import math
import os
import tempfile
from pathlib import Path
from statistics import mean, median, stdev

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hf_power.pretrain import run as train
from hf_power.records.files import write_json
from hf_power.records.machine import versions
from hf_power.settings.settings import Settings

RESULT = Path(__file__).resolve().parent / "results/moe_proxy.json"
WIDTH, MLP, EXPERTS, TOP_K = 64, 160, 8, 2
SCALES = (16.0, 32.0, 64.0, 128.0)
TUNING_SEED, SEEDS = 0, (1, 2, 3, 4, 5)
LONGER, LONGER_SEEDS = 4, (1, 2, 3)
T_95 = {3: 4.303, 5: 2.776}  # number of seeds -> 97.5 % point of Student's t with one degree of freedom less
MODELS = {
    "dense": {"model_type": "llama", "intermediate_size": MLP},
    "moe": {
        "model_type": "mixtral",
        "intermediate_size": MLP // TOP_K,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "model_config": {"output_router_logits": True, "router_aux_loss_coef": 0.01},
    },
}


def sections(model, tokens, a, seed):
    """The settings of one run: steps of 16 blocks of 64 tokens."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, **MODELS[model]}
    schedule = {"a": a, "warmup_tokens": tokens // 20, "decay_ratio": 0.2}
    training = {"per_device_train_batch_size": 16, "learning_rate": 0.1, "lr_scheduler_kwargs": schedule}
    training |= {"seed": seed, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 50}
    return {
        "model": shape,
        "mup": {"base_width": 32, "preset": "power_of_two"},
        "data": {"dataset": "python-stdlib", "vocab_size": 512, "block_size": 64},
        "run": {"tokens": tokens, "max_eval_tokens": "100k"},
        "training": training,
    }


def train_one(model, tokens, a, seed):
    """The row of one run."""
    made = sections(model, tokens, a, seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made["training"]["output_dir"] = f"{folder}/run"
        run = train.pretrain(Settings.from_dict(made))
        experts = json.loads(Path(folder, "run/config.json").read_text()).get("num_local_experts")
    active = run.parameters
    if experts:
        active -= 2 * (EXPERTS - TOP_K) * 3 * WIDTH * (MLP // TOP_K)  # the experts that a token does not meet
    row = {"model": model, "a": a, "seed": seed, "held_out_loss": run.held_out_loss}
    row |= {"parameters": run.parameters, "active_parameters": active}
    row |= {"tokens": run.tokens_seen, "train_seconds": run.train_seconds, "loss_curve": run.loss_curve}
    print(f"{model:5}  a {a:g}  seed {seed}  held-out loss {row['held_out_loss']:.4f}", flush=True)
    return row


def compare(rows):
    """Medians, and MoE minus dense by seed with its 95 % interval."""
    losses = {m: {r["seed"]: r["held_out_loss"] for r in rows if r["model"] == m} for m in MODELS}
    differences = [losses["moe"][seed] - losses["dense"][seed] for seed in losses["dense"]]
    found = {"tokens": rows[0]["tokens"], "median_held_out_loss": {m: median(losses[m].values()) for m in MODELS}}
    found |= {"difference": mean(differences), "differences_by_seed": differences}
    if len(differences) in T_95:
        half = T_95[len(differences)] * stdev(differences) / math.sqrt(len(differences))
        found["difference_95"] = [mean(differences) - half, mean(differences) + half]
    return found


def measure(tokens, scales=SCALES, seeds=SEEDS, longer_seeds=LONGER_SEEDS):
    """The two models in turn at each scale, at the best scale of each on every seed, and there on more tokens."""
    tuning = [train_one(model, tokens, a, TUNING_SEED) for a in scales for model in MODELS]
    best = {m: min((r for r in tuning if r["model"] == m), key=lambda r: r["held_out_loss"])["a"] for m in MODELS}
    runs = [train_one(model, tokens, best[model], seed) for seed in seeds for model in MODELS]
    longer = [train_one(model, LONGER * tokens, best[model], seed) for seed in longer_seeds for model in MODELS]
    return {"best_a": best, "at_tokens": [compare(runs), compare(longer)], "rows": tuning + runs + longer}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512_000)
    parser.add_argument("--output", default=str(RESULT))
    args = parser.parse_args()
    result = {"schema": 1, "command": f"python benchmarks/moe_proxy.py --tokens {args.tokens}", "versions": versions()}
    result |= measure(args.tokens)
    write_json(args.output, result)
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=2))


if __name__ == "__main__":
    main()
