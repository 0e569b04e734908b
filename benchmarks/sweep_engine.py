"""Many small models on a CPU: how fast, by the Trainer and by the engine of the sweep (an accelerator: on_accelerator.sh).

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
    from hf_power.pretrain import run as train
    from hf_power.settings.settings import Settings

    made = sections(width, tokens_per_step)
    made["run"]["tokens"] = steps * tokens_per_step
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        made["training"]["output_dir"] = f"{folder}/run"
        run = train.pretrain(Settings.from_dict(made))
    return run.tokens_seen / run.train_seconds


def engine_speed(width, tokens_per_step, members, steps, batched):
    """Tokens per second of one ensemble."""
    import torch

    from hf_power.settings.settings import Settings
    from hf_power.sweep.ensemble import Ensemble, Member
    from hf_power.sweep.grid import Grid
    from hf_power.sweep.trunks import prepare

    global _bench
    if _bench is None:
        _bench = prepare(Grid(sections(32, 128), (32,), (128,), (0,), {}), ".")
    ensemble = Ensemble(
        Settings.from_dict(sections(width, tokens_per_step)),
        [Member(0.01, seed % 3) for seed in range(members)],
        _bench.data,
        device=torch.device("cpu"),
        batched=batched,
    )
    for _ in range(3):
        ensemble.step([1.0] * members)
    ensemble.check_alive()
    _wait()
    started = time.perf_counter()
    for _ in range(steps):
        ensemble.step([1.0] * members)
    ensemble.check_alive()
    return members * steps * tokens_per_step / (time.perf_counter() - started)


_bench = None


def _wait():
    """Begin together with the other processes of a measurement."""
    if _together:
        _barrier.wait()


def _start(barrier):
    global _barrier
    from hf_power.records.machine import keep_freed_memory

    _barrier = barrier
    keep_freed_memory()


def _task(function, arguments, threads, together):
    global _together
    import torch

    torch.set_num_threads(threads)
    _together = together
    if function is trainer_speed:
        _wait()
    return function(*arguments)


def measure(pool, cores, way, width, batch, members, steps):
    """Tokens per second of one way, summed over the processes that run at once."""
    count = cores if "processes" in way else 1
    if "trainer" in way:
        task = (trainer_speed, (width, batch, steps * members // 3), cores // count, count > 1)
    else:
        task = (engine_speed, (width, batch, members, steps, way.startswith("batched")), 1, count > 1)
    return sum(result.get() for result in [pool.apply_async(_task, task) for _ in range(count)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=9, help="models of an ensemble")
    options = parser.parse_args()
    from hf_power.records.files import write_json
    from hf_power.records.machine import versions

    cores, members, ways = os.cpu_count(), options.members, WAYS
    cases = ((32, 128), (32, 256), (32, 512), (32, 2048), (128, 512))
    rows = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores, _start, (context.Barrier(cores),)) as pool:
        for width, batch in cases:
            steps = max(20, 100 * 128 * 32 // (batch * width))
            for turn in range(-1, ROUNDS):  # the first round warms the processes up and is left out
                for way in ways:
                    speed = measure(pool, cores, way, width, batch, members, steps)
                    row = {"width": width, "tokens_per_step": batch, "round": turn, "way": way, "tokens_per_s": speed}
                    rows += [row] if turn >= 0 else []
                    print(json.dumps(row), flush=True)
    command = f"python benchmarks/sweep_engine.py --members {members}"
    result = {"command": command, "cores": cores, "members": members, "versions": versions(), "rows": rows}
    name = "sweep_engine_cpu"
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
