"""Part `sweep`: the sweep's engine against runs of `pretrain` one after another, at about 1M and 10M parameters.

A step of the engine trains all its members; the Trainer's time is one run's, times the members. Start-up is left out on
both sides, which favours the Trainer: it starts once per model.
"""

import tempfile
import time

import torch
from common import DEVICE, Clock, free_memory, now, only_the_training, tokenizer_of

from hf_power.data.packing import pack_both
from hf_power.data.text import load_text
from hf_power.pretrain import run as train
from hf_power.settings.settings import Settings
from hf_power.sweep.ensemble import Ensemble, Member
from hf_power.sweep.stacked import SweepData

# name -> width, layers, vocabulary, block size, tokens per step
CASES = {
    "1M": (128, 6, 4096, 256, (2048, 8192)),
    "10M": (384, 6, 4096, 256, (2048, 8192)),
}
MEMBERS = (9, 32)  # three rates of three seeds, and what a wide grid has


def sections(width, layers, vocabulary, block, tokens_per_step, dataset):
    """A proxy, as benchmarks/transfer has them on an accelerator."""
    model = {"hidden_size": width, "intermediate_size": width * 5 // 2, "num_hidden_layers": layers}
    model |= {"num_attention_heads": max(1, width // 64), "tie_word_embeddings": True}
    training = {"per_device_train_batch_size": tokens_per_step // block, "bf16": True, "seed": 0}
    training |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "save_strategy": "no"}
    training |= {"disable_tqdm": True, "report_to": "none", "use_cpu": DEVICE == "cpu"}
    return {
        "model": model,
        "mup": {"base_width": 32, "preset": "power_of_two"},
        "data": {"dataset": dataset, "vocab_size": vocabulary, "block_size": block},
        "run": {"max_eval_tokens": block},
        "training": training,
    }


def trainer(made, warmup, steps):
    """Tokens per second of one run of `pretrain`, and the mean of its losses."""
    tokens_per_step = made["training"]["per_device_train_batch_size"] * made["data"]["block_size"]
    made["run"]["tokens"] = (warmup + steps) * tokens_per_step
    with tempfile.TemporaryDirectory() as folder, Clock(warmup, steps) as clock, only_the_training():
        made["training"] |= {"output_dir": f"{folder}/run", "logging_steps": warmup + steps}
        run = train.pretrain(Settings.from_dict(made))
    return clock.row(tokens_per_step), next(p["loss"] for p in run.loss_curve if "loss" in p)


def engine(made, members, warmup, steps, prepared, **options):
    """Tokens per second of an ensemble, and the mean of the losses of its first member."""
    settings = Settings.from_dict(made)
    tokens_per_step = settings.training.per_device_train_batch_size * settings.data.block_size
    runs = [Member(settings.training.learning_rate, i % 3) for i in range(members)]
    with only_the_training():
        ensemble = Ensemble(settings, runs, prepared, device=torch.device(DEVICE), **options)
    losses = []
    for step in range(warmup + steps):
        if step == warmup:
            started = now()
        ensemble.step([1.0] * members)
        losses.append(ensemble.last_losses[-1][0])
    seconds = now() - started
    peak = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    row = {"seconds": seconds, "steps": steps, "tokens_per_second": members * steps * tokens_per_step / seconds}
    return row | {"batched": ensemble.batched, "peak_bytes": peak}, float(torch.stack(losses).mean())


def measure(rows, options, scratch):
    """Both ways at each size and batch."""
    warmup, steps = (5, 40) if DEVICE == "cuda" else (2, 2)
    members_of = MEMBERS if DEVICE == "cuda" else (3,)
    for name, (width, layers, vocabulary, block, batches) in CASES.items():
        if options.dry_run:
            width, layers, block, batches = width // 4, 2, 64, (128,)
        prepared = None
        for tokens_per_step in batches:
            made = sections(width, layers, vocabulary, block, tokens_per_step, options.dataset)
            given = Settings.from_dict(made | {"training": made["training"] | {"output_dir": "unused"}})
            tokenizer = tokenizer_of(given)
            folder = scratch / f"tokenizer-{vocabulary}"
            tokenizer.save_pretrained(folder)  # so that no run trains it anew
            made["data"]["tokenizer"] = str(folder)
            if prepared is None:
                texts = load_text(given.data)
                packed = pack_both(given.data, tokenizer, texts, 4 * block)
                prepared = SweepData(tokenizer, packed.train, packed.held_out, packed.about())
            started = time.perf_counter()
            row, expected = trainer(made, warmup, steps)
            case = {"parameters": name, "width": width, "tokens_per_step": tokens_per_step}
            rows.add("sweep", way="trainer", members=1, **case | row)
            for members in members_of:
                row, loss = engine(made, members, warmup, steps, prepared)
                free_memory()
                rows.add("sweep", way="engine", members=members, loss=loss, trainer_loss=expected, **case | row)
            rows.add("sweep", **case, wall_seconds=time.perf_counter() - started)
