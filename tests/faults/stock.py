"""The stock Trainer and hf_power under the same fault, in this process or in one of their own that can be killed.

Children are forked from a process that has imported everything and trained nothing (warm.py).
"""

import io
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
import transformers
from processes import PATIENCE, free_port, until
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from warm import fork_workers

from hf_power.cli import run_verb

CONTEXT = multiprocessing.get_context("forkserver")
STEPS = 12
HANGS = 5  # seconds that a process which waits for another one that is gone is given before it is said to hang


def stock(folder, callbacks=(), hidden_size=8, family="llama", experts=None, **given):
    """A stock Trainer of twelve steps with a checkpoint after every fourth, as a script of a user has it."""
    transformers.set_seed(1)
    shape = {"vocab_size": 400, "hidden_size": hidden_size, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 1, "num_key_value_heads": 1, **(experts or {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    rows = torch.randint(400, (2 * STEPS, 8), generator=torch.Generator().manual_seed(2))
    data = [{"input_ids": row, "labels": row} for row in rows]
    given = {"max_steps": STEPS, "save_steps": 4, "logging_steps": 1, "learning_rate": 0.01, "warmup_steps": 2, **given}
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True, **given
    )
    return Trainer(model, args, train_dataset=data, callbacks=list(callbacks))


class Poison(TrainerCallback):
    """Makes one weight infinite after a step, as an overflow does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.lm_head.weight.data[0, 0] = float("inf")


def kill_in_save(checkpoint):
    """SIGKILL to this process when half of the optimizer of a checkpoint is written."""
    save = torch.save

    def half(content, path, *args, **kwargs):
        if not str(path).endswith(f"{checkpoint}/optimizer.pt"):
            return save(content, path, *args, **kwargs)
        whole = io.BytesIO()
        save(content, whole)
        Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def at_step(step, action, *args, rank="0"):
    """Call something in the middle of the training step after `step` others."""
    train = Trainer.training_step

    def training_step(self, *given, **kwargs):
        if self.state.global_step == step and os.environ.get("RANK", "0") == rank:
            action(*args)
        return train(self, *given, **kwargs)

    Trainer.training_step = training_step


def signal_at(step, number, pause=0.0, rank="0"):
    """A signal to this process in a step; those after it take `pause` seconds longer, as they do for larger models."""
    at_step(step, os.kill, os.getpid(), number, rank=rank)
    for later in range(step + 1, STEPS):
        at_step(later, time.sleep, pause, rank=rank)


def wait_at(step, here, there):
    """Create a file in a step and go on when another is there."""

    def wait():
        here.touch()
        until(there.exists)

    at_step(step, wait)


def run(what, faults=(), said=None, env=None, **given):
    """Train: the stock Trainer in a folder, or `hf-power pretrain` with a settings file."""
    if said is not None:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
    os.environ.update(env or {})
    # A parent that runs in the background ignores SIGINT, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    for name, arguments in faults:
        globals()[name](**arguments)
    if str(what).endswith(".yaml"):
        sys.exit(run_verb("pretrain", [str(what)]))
    stock(what, **given).train()


def child(what, *faults, **given):
    """A started process of `run`; each fault is the name of a function above and its arguments."""
    fork_workers()
    process = CONTEXT.Process(target=run, args=(what, faults), kwargs=given, daemon=True)
    process.start()
    return process


def pair(what, *faults, **given):
    """Two processes that train together."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    env |= {"LOCAL_WORLD_SIZE": "2"}
    return [child(what, *faults, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **given) for rank in ("0", "1")]


def ended(*processes, seconds=PATIENCE):
    """Their exit codes, None for one that has not ended in time, which is killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join(PATIENCE)
    return codes


if __name__ == "__main__":  # under torchrun
    given = json.loads(sys.argv[1])
    run(**given)
