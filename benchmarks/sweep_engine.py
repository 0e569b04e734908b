"""Many small models on one machine: how fast, by the Trainer and by the engine of the sweep (`--device cuda` on a GPU).

Run as `python benchmarks/sweep_engine.py`.

Tokens per second of a proxy's training, all models together: the Trainer's runs one after another, the Trainer in one
process per core, the sweep's engine one model at a time and with the models batched, each alone and in one process per core.
All ways are measured in turn in each round; a ratio is taken within a round. Start-up is left out everywhere, which
favours the Trainer: it starts once per model.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
ROUNDS = 5
WAYS = (
    "trainer",
    "trainer, processes",
    "one by one",
    "batched",
    "one by one, processes",
    "batched, processes",
    "engine",
)


def sections(width, tokens_per_step, seed=0):
    """A proxy of the sweep's example at a width and batch."""
    heads = max(2, width // 16)
    model = {"hidden_size": width, "intermediate_size": width * 5 // 2, "num_hidden_layers": 2}
    model |= {"num_attention_heads": heads, "tie_word_embeddings": True}
    training = {"per_device_train_batch_size": tokens_per_step // 64, "seed": seed, "lr_scheduler_type": "constant"}
    training |= {"learning_rate": 0.01, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 100}
    return {
        "model": model,
        "mup": {"base_width": 32, "preset": "power_of_two"},
        "data": {"dataset": "python-stdlib", "vocab_size": 512, "block_size": 64},
        "run": {"max_eval_tokens": "4k"},
        "training": training,
    }


def trainer_speed(width, tokens_per_step, steps):
    """Tokens per second of one Trainer run, by the Trainer's own clock."""
    from hf_power import train
    from hf_power.settings import Settings

    made = sections(width, tokens_per_step)
    made["run"]["tokens"] = steps * tokens_per_step
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made["training"]["output_dir"] = f"{folder}/run"
        run = train.pretrain(Settings.from_dict(made))
    return run["tokens_seen"] / run["train_seconds"]


def engine_speed(width, tokens_per_step, members, steps, batched, device):
    """Tokens per second of one ensemble."""
    import torch

    from hf_power.ensemble import Ensemble
    from hf_power.grid import Grid
    from hf_power.settings import Settings
    from hf_power.sweep import prepare

    made = [Settings.from_dict(sections(width, tokens_per_step, seed % 3)) for seed in range(members)]
    bench = prepare(Grid(sections(width, tokens_per_step), (width,), (tokens_per_step,), (0,), {}), ".")
    ensemble = Ensemble(
        made,
        bench.tokenizer,
        bench.blocks,
        bench.held_out,
        num_sequences=tokens_per_step // 64,
        device=torch.device(device),
        batched=batched,
    )
    for _ in range(3):
        ensemble.step([1.0] * members)
    ensemble.check_alive()
    if BARRIER is not None:
        BARRIER.wait()
    started = time.perf_counter()
    for _ in range(steps):
        ensemble.step([1.0] * members)
    ensemble.check_alive()
    return members * steps * tokens_per_step / (time.perf_counter() - started)


BARRIER = None


def _start(barrier, threads):
    global BARRIER
    import torch

    from hf_power.machine import keep_freed_memory

    BARRIER = barrier
    torch.set_num_threads(threads)
    keep_freed_memory()


def _call(function, arguments):
    return function(*arguments)


def in_processes(count, threads, function, *arguments):
    """The sum of a speed over processes that run at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    with context.Pool(count, _start, (barrier, threads)) as pool:
        return sum(pool.starmap(_call, [(function, arguments)] * count, chunksize=1))


def measure(way, width, batch, members, steps, device, cores):
    """Tokens per second of one way."""
    if way == "trainer":
        return in_processes(1, cores, trainer_speed, width, batch, steps * members // 3)
    if way == "trainer, processes":
        return in_processes(cores, 1, trainer_speed, width, batch, steps * members // 3)
    count = cores if "processes" in way or way == "engine" else 1
    batched = None if way == "engine" else way.startswith("batched")
    return in_processes(count, 1, engine_speed, width, batch, members, steps, batched, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--members", type=int, help="models of an ensemble; default 9, on an accelerator 32")
    options = parser.parse_args()
    from hf_power.files import write_json
    from hf_power.machine import versions

    cpu = options.device == "cpu"
    cores = os.cpu_count() if cpu else 1
    members = options.members or (9 if cpu else 32)
    ways = [way for way in WAYS if cpu or "processes" not in way]
    cases = (
        ((32, 128), (32, 256), (32, 512), (32, 2048), (128, 512)) if cpu else ((128, 2048), (256, 8192), (384, 8192))
    )
    rows = []
    for width, batch in cases:
        steps = max(30, 300 * 128 * 32 // (batch * width))
        for turn in range(ROUNDS):
            for way in ways:
                speed = measure(way, width, batch, members, steps, options.device, cores)
                rows.append(
                    {"width": width, "tokens_per_step": batch, "round": turn, "way": way, "tokens_per_s": speed}
                )
                print(json.dumps(rows[-1]), flush=True)
    command = f"python benchmarks/sweep_engine.py --device {options.device} --members {members}"
    result = {"command": command, "cores": cores, "members": members, "versions": versions(), "rows": rows}
    name = f"sweep_engine_{options.device}"
    write_json(HERE / f"results/{name}.json", result)
    text = table(rows, ways, command)
    (HERE / f"results/{name}.md").write_text(text, encoding="utf-8")
    print(text)


def table(rows, ways, command):
    """Markdown: medians, and ratios to the Trainer within a round (median, lowest, highest)."""
    lines = [
        f"`{command}`, {ROUNDS} rounds",
        "",
        "Tokens per second (median), and in brackets the ratio to the Trainer's",
    ]
    lines += ["runs one after another: median, lowest and highest of the rounds.", ""]
    lines += ["| width | tokens per step | " + " | ".join(ways) + " |", "|---:|---:|" + "---:|" * len(ways)]
    for width, batch in dict.fromkeys((row["width"], row["tokens_per_step"]) for row in rows):
        mine = [row for row in rows if (row["width"], row["tokens_per_step"]) == (width, batch)]
        speeds = {way: [row["tokens_per_s"] for row in mine if row["way"] == way] for way in ways}
        cells = []
        for way in ways:
            ratios = sorted(one / base for one, base in zip(speeds[way], speeds["trainer"], strict=True))
            text = f"{median(speeds[way]):,.0f}"
            cells.append(
                text if way == "trainer" else f"{text} ({median(ratios):.2f}: {ratios[0]:.2f}-{ratios[-1]:.2f})"
            )
        lines.append(f"| {width} | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
