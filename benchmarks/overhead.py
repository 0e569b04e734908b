"""What the scheduler, the Trainer and muP cost: python benchmarks/overhead.py [--pairs 30] [--imports_only]; rows go to benchmarks/results/.

0. `import transformers` and its Trainer with `import hf_power` after it over the same without: CPU seconds of one process
   from its start, read before and after, since two processes differ by more than the import takes. Alone with
   --imports_only, in imports.md.
1. The stock Trainer with lr_scheduler_type "power" over the same with "cosine": same model, data, steps, in turn in one
   process; seconds of a step, `import hf_power` included in both.
2. `hf_power.pretrain.run.pretrain` less a bare loop (throughput.by_hand's) on a model of 40 thin layers, so that the step is all
   host: milliseconds a step, in turn. The number of tensors, which the host's work grows with, is that of PowerLM-1B.
3. A compiled decoder layer of Granite (muP's multipliers) over one of Llama with the same sizes, forward and backward, in
   turn; and the whole small model, compiled in the same way.

A step's time is the process's own CPU time on one thread, so that other processes on the machine hardly move it; a leg's
figure is the median of its steps. The result is the median over pairs, with a 95 % interval by bootstrap over pairs.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import throughput
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_power import mup_config
from hf_power.pretrain.speed import speed_up_
from hf_power.records.machine import hardware, tune_cpu


def median_and_interval(values):
    values = np.asarray(values)
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


class Steps:
    """Seconds between the optimizer's steps; the first ones, which warm up, are left out."""

    def __init__(self, warmup=5):
        self.ends, self.warmup = [], warmup

    def __enter__(self):
        self.handle = register_optimizer_step_post_hook(self._after)
        return self

    def _after(self, *_):
        self.ends.append(time.process_time())

    def __exit__(self, *error):
        self.handle.remove()

    @property
    def seconds(self):
        """The median of a step."""
        return statistics.median(np.diff(self.ends[self.warmup :]).tolist())


def imports(pairs):
    # Compiled modules are kept, as an installation has them; the first process, which does not count, writes those of hf_power.
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    code = """
import time, transformers
from transformers import Trainer, TrainingArguments
without = time.process_time()
import hf_power
print(without, time.process_time())
"""
    rows = []
    for _ in range(1 + pairs):
        said = subprocess.run([sys.executable, "-c", code], env=kept, stdout=subprocess.PIPE, check=True).stdout
        without, both = map(float, said.split())
        rows.append({"with": both, "without": without, "ratio": both / without, "milliseconds": 1e3 * (both - without)})
    return rows[1:]


def schedulers(pairs, steps=40):
    blocks = [{"input_ids": b, "labels": b} for b in torch.randint(0, 512, (4 * steps, 64))]
    config = LlamaConfig(
        hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, vocab_size=512
    )

    def seconds(kind):
        with tempfile.TemporaryDirectory() as folder, Steps() as clock:
            set_seed(0)
            args = TrainingArguments(folder, lr_scheduler_type=kind, per_device_train_batch_size=4, warmup_steps=5)
            args.max_steps, args.report_to, args.disable_tqdm, args.save_strategy = steps, [], True, "no"
            tune_cpu(args)
            Trainer(LlamaForCausalLM(config), args, train_dataset=blocks).train()
        return clock.seconds

    return in_turn(pairs, {"power": lambda: seconds("power"), "cosine": lambda: seconds("cosine")})


def host(pairs, steps=40):
    thin = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 40, "num_attention_heads": 1}
    plain = throughput.settings

    def settings(folder, number):
        given = plain(folder, number)
        given.model = dataclasses.replace(given.model, **thin, num_key_value_heads=1)
        given.training.logging_steps, given.training.per_device_train_batch_size = number, throughput.BATCH
        return given

    throughput.settings, throughput.BATCH = settings, 1

    def seconds(run):
        with Steps() as clock, contextlib.redirect_stdout(io.StringIO()):
            run(steps)
        return clock.seconds

    try:
        return in_turn(
            pairs, {"pretrain": lambda: seconds(throughput.ours), "by_hand": lambda: seconds(throughput.by_hand)}
        )
    finally:
        throughput.settings, throughput.BATCH = plain, 8


def multipliers(pairs, whole, calls=10):
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_attention_heads": 4,
        "num_hidden_layers": 4 if whole else 1,
    }
    llama = LlamaConfig(**sizes, vocab_size=512)
    legs = {}
    for name, config in {"granite": mup_config(llama, base_width=128), "llama": llama}.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
        model.config.use_cache = False
        with tempfile.TemporaryDirectory() as folder:
            speed_up_(model, TrainingArguments(folder, torch_compile=True, per_device_train_batch_size=8), 128)
        blocks = torch.randint(0, 512, (8, 128))
        states, positions = torch.randn(8, 128, 256), torch.arange(128)[None]

        def step(model=model, blocks=blocks, states=states, positions=positions):
            if whole:
                model(input_ids=blocks, labels=blocks).loss.backward()
            else:
                rotary = model.model.rotary_emb(states, position_ids=positions)
                model.model.layers[0](states, attention_mask=None, position_embeddings=rotary).sum().backward()

        def seconds(step=step):
            times = []
            for _ in range(calls):
                started = time.process_time()
                step()
                times.append(time.process_time() - started)
            return statistics.median(times)

        seconds()
        legs[name] = seconds
    return in_turn(pairs, legs)


def in_turn(pairs, legs):
    """A row a pair: seconds of each leg, in changing order; their ratio and difference."""
    names = list(legs)
    for run in legs.values():
        run()
    rows = []
    for pair in range(pairs):
        row = {name: legs[name]() for name in (names if pair % 2 else names[::-1])}
        rows.append(
            row | {"ratio": row[names[0]] / row[names[1]], "milliseconds": 1e3 * (row[names[0]] - row[names[1]])}
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--imports_only", action="store_true", help="the first row alone, in imports.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder)
    torch.set_num_threads(1)
    cpu = tune_cpu(args)
    parts = {"import of transformers' Trainer, with hf_power / without": imports(options.pairs)}
    if not options.imports_only:
        parts |= the_others(options.pairs)
    rows = []
    for what, found in parts.items():
        ratio, gap = (median_and_interval([row[key] for row in found]) for key in ("ratio", "milliseconds"))
        rows.append(
            [what, *(f"{v['median']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for v in (ratio, gap)), len(found)]
        )
    name, only = ("imports", " --imports_only") if options.imports_only else ("overhead", "")
    command = f"python benchmarks/overhead.py --pairs {options.pairs}{only}"
    columns = ("what", "ratio (95 %)", "ms, of a step where there are steps (95 %)", "pairs")
    throughput.report(name, command, hardware(args.device, args.world_size) | cpu, parts, columns, rows)


def the_others(pairs):
    return {
        "stock Trainer, power / cosine": schedulers(pairs),
        "pretrain - bare loop, 40 thin layers": host(max(5, pairs // 3)),
        "compiled layer, Granite / Llama": multipliers(pairs, whole=False),
        "compiled model of 4 layers, Granite / Llama": multipliers(pairs, whole=True),
    }


if __name__ == "__main__":
    main()
