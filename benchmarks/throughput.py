"""What hf_power costs: python benchmarks/throughput.py [--pairs 7] [--steps 80]; rows go to benchmarks/results/.

1. tokens/s of `hf_power.pretrain.run.pretrain` and of a hand-written PyTorch loop with the same model, blocks, optimizer and
   schedule, in turn in one process; both end at the same loss, or the comparison stops.
2. the hand-written loop with glibc's default allocator settings and with those of `keep_freed_memory`, in turn, a
   process each (the setting cannot be taken back).
3. a scheduler step against transformers' cosine, three parameter groups, in turn in one process.
4. the hand-written loop with OpenMP's default spinning and with GOMP_SPINCOUNT=30000 (what the Makefile sets), alone
   and beside a process that keeps one core busy, in turn, a process each.
5. `import hf_power` over `from transformers import Trainer`, in turn, a process each.

Ratios are taken pair by pair; the median is the figure, the range says how noisy the machine was.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from transformers import get_cosine_schedule_with_warmup, set_seed

from hf_power import MupAdamW, PowerLR
from hf_power.data.order import BlockStream, collate_blocks
from hf_power.data.packing import pack
from hf_power.data.text import load_text
from hf_power.data.tokenizer import load_tokenizer
from hf_power.pretrain import run as train
from hf_power.records.files import write_json
from hf_power.records.machine import hardware, tune_cpu, versions
from hf_power.settings.settings import Settings, build_model

ROOT = Path(__file__).resolve().parent.parent
BATCH, BLOCK = 8, 128  # as in the demo


def settings(folder, steps):
    """The demo's model on the demo's data, logging every ten steps, without checkpoints."""
    sections = yaml.safe_load((ROOT / "scripts/recipes/demo.yaml").read_text())
    sections["run"] = {"tokens": steps * BATCH * BLOCK, "max_eval_tokens": BLOCK}
    sections["training"] |= {"output_dir": str(folder), "save_strategy": "no", "disable_tqdm": True}
    sections["training"] |= {"per_device_train_batch_size": BATCH, "lr_scheduler_kwargs": {}, "warmup_steps": 2}
    return Settings.from_dict(sections)


def ours(steps):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = train.pretrain(settings(Path(folder) / "run", steps))
    return {"seconds": run.train_seconds, "loss": [p["loss"] for p in run.loss_curve if "loss" in p][-1]}


def by_hand(steps):
    """A plain loop: forward, backward, clip, step; the loss is read every ten steps, as the Trainer's log does."""
    with tempfile.TemporaryDirectory() as folder:
        s = settings(folder, steps)
        text, *_ = load_text(s.data)
        tokenizer = load_tokenizer(s.data, text)
        blocks = pack(text, tokenizer, block_size=BLOCK)
        set_seed(s.training.seed)
        model = build_model(s, tokenizer).train()
        stream = BlockStream(blocks, seed=s.training.seed, start=0, stop=steps * BATCH)
        loader = torch.utils.data.DataLoader(stream, batch_size=BATCH, collate_fn=collate_blocks)
        factory, kwargs = MupAdamW.for_trainer(s.training)
        optimizer = factory()(model, **kwargs)
        schedule = PowerLR(optimizer, 2, steps, tokens_per_step=BATCH * BLOCK)
        started, total = time.monotonic(), torch.zeros(())
        for step, batch in enumerate(loader, start=1):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), s.training.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += loss.detach()
            if step % 10 == 0:
                last, total = total.item() / 10, torch.zeros(())
        return {"seconds": time.monotonic() - started, "loss": last}


def throughput(pairs, steps):
    ours(10), by_hand(10)  # warm caches
    rows = []
    for pair in range(pairs):
        legs = {"ours": ours, "by_hand": by_hand}
        row = {name: legs[name](steps) for name in (list(legs) if pair % 2 else list(legs)[::-1])}
        if abs(row["ours"]["loss"] - row["by_hand"]["loss"]) > 1e-4:
            sys.exit(f"the two loops did not do the same work: {row}")
        row |= {name: row[name] | {"tokens_per_second": steps * BATCH * BLOCK / row[name]["seconds"]} for name in legs}
        rows.append(row | {"ratio": row["by_hand"]["seconds"] / row["ours"]["seconds"]})
    return rows


def in_a_process(code, **env):
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | env
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    return json.loads(out.stdout.splitlines()[-1])


BY_HAND = (
    "import json, sys; sys.path.insert(0, 'benchmarks'); import throughput as t; from hf_power.records.machine import "
    "keep_freed_memory; {0}; print(json.dumps(t.by_hand({1})))"
)


def allocator(pairs, steps):
    rows = []
    for pair in range(pairs):
        legs = {"default": "pass", "kept": "assert keep_freed_memory()"}
        order = list(legs) if pair % 2 else list(legs)[::-1]
        row = {f"{name}_s": in_a_process(BY_HAND.format(legs[name], steps))["seconds"] for name in order}
        rows.append(row | {"ratio": row["kept_s"] / row["default_s"]})
    return rows


def spinning(pairs, steps, busy):
    neighbour = "import time\nend = time.time() + 900\nwhile time.time() < end: pass"
    rows = []
    for pair in range(pairs):
        legs = {"default": {}, "short": {"GOMP_SPINCOUNT": "30000"}}
        other = subprocess.Popen([sys.executable, "-c", neighbour if busy else "pass"])
        order = list(legs) if pair % 2 else list(legs)[::-1]
        row = {f"{name}_s": in_a_process(BY_HAND.format("pass", steps), **legs[name])["seconds"] for name in order}
        other.kill()
        other.wait()
        rows.append(row | {"ratio": row["short_s"] / row["default_s"]})
    return rows


def scheduler_step(pairs, calls=20_000):
    def seconds(make):
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.02, 0.005, 0.02)]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        schedule = make(optimizer)
        optimizer.step()
        started = time.perf_counter()
        for _ in range(calls):
            schedule.step()
        return (time.perf_counter() - started) / calls * 1e6

    makers = {
        "power": lambda o: PowerLR(o, 100, 2 * calls, tokens_per_step=1 << 22, a=4.0),
        "cosine": lambda o: get_cosine_schedule_with_warmup(o, 100, 2 * calls),
    }
    rows = []
    for pair in range(pairs):
        row = {name: seconds(makers[name]) for name in (list(makers) if pair % 2 else list(makers)[::-1])}
        rows.append({f"{k}_us": v for k, v in row.items()} | {"ratio": row["power"] / row["cosine"]})
    return rows


def import_time(pairs):
    code = "import json, time; t = time.perf_counter(); {0}; print(json.dumps(time.perf_counter() - t))"
    legs = {
        "trainer": "from transformers import Trainer",
        "with_hf_power": "from transformers import Trainer; import hf_power",
    }
    for leg in legs.values():
        in_a_process(code.format(leg))
    rows = []
    for pair in range(pairs):
        row = {name: in_a_process(code.format(legs[name])) for name in (list(legs) if pair % 2 else list(legs)[::-1])}
        rows.append({f"{k}_s": v for k, v in row.items()} | {"ratio": row["with_hf_power"] / row["trainer"]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args = settings(folder, 1).training
    parts = {
        "import, with hf_power / Trainer alone (seconds)": import_time(options.pairs),
        "scheduler step, power / cosine (seconds)": scheduler_step(options.pairs),
        "allocator, kept / default (seconds)": allocator(options.pairs, options.steps),
        "OpenMP, short spin / default, alone (seconds)": spinning(3, options.steps // 4, busy=False),
        "OpenMP, short spin / default, beside a busy process (seconds)": spinning(3, options.steps // 4, busy=True),
    }
    cpu = tune_cpu(args)
    parts["throughput, ours / by hand (tokens per second)"] = throughput(options.pairs, options.steps)
    rows = []
    for name, found in parts.items():
        ratios = [row["ratio"] for row in found]
        rows.append([name, *(f"{f(ratios):.3f}" for f in (statistics.median, min, max)), len(found)])
    command = f"python benchmarks/throughput.py --pairs {options.pairs} --steps {options.steps}"
    report(
        "throughput",
        command,
        hardware(args.device, args.world_size) | cpu,
        parts,
        ("ratio", "median", "min", "max", "pairs"),
        rows,
    )


def report(name, command, machine, parts, columns, rows):
    """Write NAME.json with the raw rows of each part and NAME.md with a table, and print the table."""
    result = {"command": command, "versions": versions(), "hardware": machine, "parts": parts}
    write_json(ROOT / f"benchmarks/results/{name}.json", result)
    table = [columns, ["---"] * len(columns), *rows]
    lines = [f"`{command}`, {machine}", "", *(f"| {' | '.join(map(str, cells))} |" for cells in table)]
    text = "\n".join(lines)
    (ROOT / f"benchmarks/results/{name}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
