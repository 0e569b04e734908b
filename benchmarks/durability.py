"""What it costs to lose nothing: python benchmarks/durability.py [--pairs 5] [--steps 400]; rows go to benchmarks/results/.

1. The demo's trunk (its model, data and rate of saves) with everything that guards a run, over the same without: no seal,
   no guard against bad numbers, no signal handlers, no lock; wall seconds of `pretrain`, in turn in one process. The CPU
   seconds, those of the sealing thread included, are in the rows.
2. Of each save of a run that saves every ten steps: the seconds that the training waits for the space check, the mark and
   the seal of the save before, over the seconds of the save itself; and, for the last save, which nothing runs beside,
   the seconds until the run can end.

Both legs of 1 end with the same weights, or the comparison stops. Medians over pairs and over saves, with a 95 % interval
by bootstrap.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

import torch
from overhead import median_and_interval
from safetensors.torch import load_file
from throughput import ROOT, report
from transformers import Trainer, TrainerCallback

from hf_power.checkpoints.callback import SealCheckpoints
from hf_power.cli import parse_settings
from hf_power.pretrain import run as train
from hf_power.pretrain.trainer import PowerTrainer
from hf_power.records.machine import hardware, tune_cpu
from hf_power.settings.sections import Tokens

SAVES = []  # seconds of a save, and those that the training waited before, after it, and at its end


class NoSeal(TrainerCallback):
    """In the place of SealCheckpoints."""

    def __init__(self, background=True):
        pass

    def join(self):
        pass


class NoStop(TrainerCallback):
    """In the place of StopOnSignal."""

    received = 0

    def restore(self):
        pass


class TimedSeal(SealCheckpoints):
    """Counts the seconds that it keeps the training from going on."""

    def _timed(self, key, method, *args, **kwargs):
        started = time.perf_counter()
        getattr(SealCheckpoints, method)(self, *args, **kwargs)
        SAVES[-1][key] = time.perf_counter() - started

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            SAVES.append({})
            self._timed("before_s", "on_step_end", args, state, control, **kwargs)

    def on_save(self, *args, **kwargs):
        self._timed("after_s", "on_save", *args, **kwargs)

    def on_train_end(self, *args, **kwargs):
        self._timed("end_s", "on_train_end", *args, **kwargs)


@contextlib.contextmanager
def guarded():
    """The library as it is, but for the clock at its saves."""
    plain = Trainer._save_checkpoint, train.SealCheckpoints

    def save(trainer, *args, **kwargs):
        started = time.perf_counter()
        plain[0](trainer, *args, **kwargs)
        SAVES[-1]["save_s"] = time.perf_counter() - started

    Trainer._save_checkpoint, train.SealCheckpoints = save, TimedSeal
    try:
        yield
    finally:
        Trainer._save_checkpoint, train.SealCheckpoints = plain


@contextlib.contextmanager
def bare():
    """Without seals, guards, signal handlers and lock."""
    names = ("compute_loss", "training_step", "_get_grad_norm", "save_model", "_stop_if_too_many")
    methods = {name: PowerTrainer.__dict__[name] for name in names}
    plain = train.SealCheckpoints, train.StopOnSignal, train.only_one
    for name in names:
        setattr(PowerTrainer, name, getattr(Trainer, name, lambda trainer: None))
    train.SealCheckpoints, train.StopOnSignal, train.only_one = NoSeal, NoStop, contextlib.nullcontext
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(PowerTrainer, name, method)
        train.SealCheckpoints, train.StopOnSignal, train.only_one = plain


def run(leg, steps, save_steps=None):
    """Wall and CPU seconds of a run, and its weights."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder, leg(), contextlib.redirect_stdout(io.StringIO()):
        settings = parse_settings([str(ROOT / "scripts/recipes/demo.yaml"), "--output_dir", f"{folder}/run"])
        per_step = settings.training.per_device_train_batch_size * settings.data.block_size
        settings.run.tokens, settings.run.max_eval_tokens = Tokens(steps * per_step), Tokens("10k")
        settings.training.disable_tqdm = True
        settings.training.save_steps = save_steps or settings.training.save_steps
        started, cpu = time.perf_counter(), time.process_time()
        train.pretrain(settings)
        seconds = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
        return seconds, load_file(Path(folder) / "run/model.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = parse_settings([str(ROOT / "scripts/recipes/demo.yaml"), "--output_dir", folder])
    cpu = tune_cpu(settings.training)
    run(guarded, 2)
    pairs = []
    for pair in range(options.pairs):
        legs = {"guarded": guarded, "bare": bare}
        found = {name: run(legs[name], options.steps) for name in (list(legs) if pair % 2 else list(legs)[::-1])}
        weights = [weights for _, weights in found.values()]
        if not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]):
            sys.exit("the two legs did not end with the same weights")
        row = {name: seconds for name, (seconds, _) in found.items()}
        pairs.append(row | {"ratio": row["guarded"]["wall_s"] / row["bare"]["wall_s"]})
    SAVES.clear()
    for _ in range(2):
        run(guarded, 120, save_steps=10)
    for save in SAVES:
        save["ratio"] = (save["before_s"] + save["after_s"] + save.get("end_s", 0)) / save["save_s"]
    parts = {
        "pretrain with all guards / without (wall seconds)": pairs,
        "waiting for the seal in the run / the save itself": [save for save in SAVES if "end_s" not in save],
        "waiting for the last seal / the save itself": [save for save in SAVES if "end_s" in save],
    }
    rows = []
    for name, found in parts.items():
        value = median_and_interval([row["ratio"] for row in found])
        rows.append([name, f"{value['median']:.3f} ({value['low']:.3f} to {value['high']:.3f})", len(found)])
    command = f"python benchmarks/durability.py --pairs {options.pairs} --steps {options.steps}"
    machine = hardware(settings.training.device, settings.training.world_size) | cpu
    report("durability", command, machine, parts, ("what", "ratio (95 %)", "rows"), rows)


if __name__ == "__main__":
    main()
