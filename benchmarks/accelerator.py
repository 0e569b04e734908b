"""Speed on an accelerator: python benchmarks/accelerator.py [--shapes dense moe] [--rounds 3] [--steps 20].

Tokens per second, model FLOPs utilisation and peak memory of the PowerLM-1B and the PowerMoE-1B shape, blocks of 4096
tokens, bf16 autocast over fp32 weights, AdamW; in turn in one process, each leg once a round:

* ours: `hf_power.train.pretrain`, compiled
* by_hand: a bare loop with the same model, blocks, optimizer, schedule and tricks, and nothing else
* stock: transformers' Trainer as it comes, with bf16 and fused AdamW
* eager_experts (moe only): the bare loop with the loop over experts in place of grouped products

The clock runs between two steps of the optimizer, after --warmup steps, and waits for the device at both. Utilisation is
`hf_power.flops.flops_per_token` x tokens per second over the chip's peak (--peak_flops) and over the matmul ceiling that is
measured first. Waits for the device within timed steps are counted where the backend reports them (CUDA).
The result goes to benchmarks/results/accelerator_DEVICE.json and .md. `--dry_run` takes a tiny shape on a CPU and writes no
file: it shows that the script runs, its figures mean nothing.
"""

import argparse
import contextlib
import gc
import io
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer, set_seed

from hf_power import MupAdamW, PowerLR, train
from hf_power.cli import parse_settings
from hf_power.compat import CHECKPOINTING
from hf_power.data import BlockStream, collate_blocks, load_tokenizer, pack
from hf_power.files import write_json
from hf_power.flops import flops_per_token
from hf_power.footprint import footprint
from hf_power.machine import hardware, versions
from hf_power.speed import speed_up_
from hf_power.text import load_text

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"dense": "powerlm-1b", "moe": "powermoe-1b"}
LEGS = {"dense": ("ours", "by_hand", "stock"), "moe": ("ours", "by_hand", "stock", "eager_experts")}
TINY = ["--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "1", "--num_key_value_heads", "1"]
TINY += ["--intermediate_size", "32", "--base_width", "32", "--block_size", "128", "--use_cpu", "true"]


class Clock:
    """Times the steps of whichever optimizer runs: from the end of step `warmup` to that of step `warmup` + `steps`."""

    def __init__(self, device, warmup, steps):
        self.device, self.warmup, self.steps, self.seen, self.waits = device, warmup, steps, 0, 0
        self.handle = register_optimizer_step_post_hook(self._after)

    def _after(self, optimizer, args, kwargs):
        self.seen += 1
        if self.seen == self.warmup:
            self.now()
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.set_sync_debug_mode("warn")
            self.started = self.now()
        if self.seen == self.warmup + self.steps:
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            self.seconds = self.now() - self.started

    def now(self):
        """Seconds, when the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def settings(shape, folder, options, batch, checkpointing):
    """The recipe's model and optimizer, one micro-batch a step, on Python's standard library."""
    flags = [str(ROOT / f"scripts/recipes/{RECIPES[shape]}.yaml"), "--output_dir", str(folder)]
    if options.dry_run:
        flags += TINY
    given = parse_settings([*flags, "--torch_compile", str(not options.dry_run or options.compile)])
    given.data.dataset, given.data.dataset_config, given.data.streaming = "python-stdlib", None, False
    given.data.tokenizer, given.data.vocab_size = None, 2048
    args, steps = given.training, options.warmup + options.steps
    args.per_device_train_batch_size, args.gradient_accumulation_steps = batch, 1
    setattr(args, CHECKPOINTING, checkpointing)
    args.save_strategy, args.disable_tqdm = "no", True
    args.logging_steps, args.max_steps, args.report_to = steps, steps, []
    args.lr_scheduler_kwargs = {"a": 4.0, "warmup_tokens": batch * given.data.block_size}
    given.run.tokens, given.run.max_eval_tokens = str(steps * batch * given.data.block_size), str(given.data.block_size)
    return given


def ours(given):
    return [p["loss"] for p in train.pretrain(given)["loss_curve"] if "loss" in p][-1]


def parts(given):
    """Tokenizer, blocks in the order of `pretrain`, and the model."""
    text, _ = load_text(given.data)
    tokenizer = load_tokenizer(given.data, text)
    blocks = pack(text, tokenizer, block_size=given.data.block_size)
    set_seed(given.training.seed)
    model = train.build_model(given, tokenizer)
    sequences = given.training.max_steps * given.training.per_device_train_batch_size
    return tokenizer, BlockStream(blocks, seed=given.training.seed, start=0, stop=sequences), model


def by_hand(given, experts=None):
    args = given.training
    _, stream, model = parts(given)
    model = speed_up_(model, args, given.data.block_size).to(args.device).train()
    model.config.use_cache = False
    if experts is not None:
        model.set_experts_implementation(experts)
    if getattr(args, CHECKPOINTING):
        getattr(model, f"{CHECKPOINTING}_enable")()
    pin = args.device.type == "cuda"
    loader = torch.utils.data.DataLoader(
        stream, batch_size=args.per_device_train_batch_size, collate_fn=collate_blocks, pin_memory=pin
    )
    factory, kwargs = MupAdamW.for_trainer(args)
    optimizer = factory()(model, **kwargs)
    tokens = args.per_device_train_batch_size * given.data.block_size
    schedule = PowerLR(optimizer, 1, args.max_steps, tokens_per_step=tokens, a=4.0)
    total = torch.zeros((), device=args.device)
    for batch in loader:
        batch = {name: tensor.to(args.device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(args.device.type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
    return total.item() / args.max_steps


def stock(given):
    args = given.training
    args.torch_compile, args.torch_compile_backend = False, "no"
    args.train_sampling_strategy, args.logging_nan_inf_filter, args.eval_strategy = "sequential", True, "no"
    args.lr_scheduler_type, args.lr_scheduler_kwargs, args.optim = "power", {"a": 4.0}, "adamw_torch_fused"
    args.warmup_steps, args.learning_rate = 1, 1e-3
    _, stream, model = parts(given)
    return Trainer(model, args, train_dataset=stream, data_collator=collate_blocks).train().training_loss


def leg(name, shape, options, batch, checkpointing, device):
    """One leg: its row."""
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = settings(shape, Path(folder) / "run", options, batch, checkpointing)
        clock = Clock(device, options.warmup, options.steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = {"ours": ours, "by_hand": by_hand, "stock": stock}
            loss = by_hand(given, experts="eager") if name == "eager_experts" else run[name](given)
        clock.handle.remove()
    waits = sum("called a synchronizing" in str(w.message) for w in caught)
    row = {"leg": name, "shape": shape, "loss": loss, "seconds": clock.seconds, "batch": batch}
    row["tokens_per_second"] = options.steps * batch * given.data.block_size / clock.seconds
    row |= {"activation_checkpointing": checkpointing, "waits_in_timed_steps": waits if device == "cuda" else None}
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return row


def ceiling(device, size):
    """FLOPs per second of the best of 20 bf16 products of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best, clock = 0.0, Clock(device, 0, 0)
    clock.handle.remove()
    for _ in range(20):
        started = clock.now()
        a @ b
        best = max(best, 2 * size**3 / (clock.now() - started))
    return best


def batch_that_fits(config, options, block_size, device):
    """The largest micro-batch up to 8 without activation checkpointing, or with it if not even one block fits."""
    if device == "cpu":
        return 1, False
    memory = 0.92 * torch.cuda.get_device_properties(0).total_memory
    for checkpointing in (False, True):
        for batch in (8, 4, 2, 1):
            sizes = footprint(
                config, tokens_per_step=batch * block_size, block_size=block_size, per_device_batch_size=batch,
                devices=1, sharding="none", precision="autocast", activation_checkpointing=checkpointing, device_memory=memory,
            )  # fmt: skip
            if sizes["fits"]:
                return batch, checkpointing
    sys.exit("not one block fits into the device's memory: take a larger device.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak_flops", type=float, default=989e12, help="bf16, dense; 989e12 is an H100 SXM's.")
    parser.add_argument("--compile", action="store_true", help="Compile in a dry run too.")
    parser.add_argument("--dry_run", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: pass --dry_run to try the script on a CPU.")
    top, rows = ceiling(device, 256 if options.dry_run else 8192), []
    for shape in options.shapes:
        given = settings(shape, "unused", options, 1, False)
        config = train.mup_config(given.model.config(vocab_size=2048), **given.mup.arguments())
        batch, checkpointing = batch_that_fits(config, options, given.data.block_size, device)
        flops = flops_per_token(config, given.data.block_size)
        for turn in range(options.rounds):
            legs = LEGS[shape]
            for name in legs if turn % 2 else legs[::-1]:
                row = leg(name, shape, options, batch, checkpointing, device)
                reached = row["tokens_per_second"] * flops
                rows.append(row | {"round": turn, "mfu": reached / options.peak_flops, "of_ceiling": reached / top})
                print(rows[-1], flush=True)
            last = {row["leg"]: row["loss"] for row in rows[-len(legs) :]}
            if abs(last["ours"] - last["by_hand"]) > 1e-3:
                sys.exit(f"the two loops did not do the same work: {last}")
    args = given.training
    lines = [f"`python {' '.join(sys.argv)}`, {hardware(args)}, matmul ceiling {top / 1e12:.4g} TFLOP/s", ""]
    lines += [
        "| shape | leg | tokens/s | MFU | of the ceiling | to by_hand | peak GB | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in options.shapes:
        for name in LEGS[shape]:
            mine, hand = ([r for r in rows if r["shape"] == shape and r["leg"] == which] for which in (name, "by_hand"))
            ratio = statistics.median(
                a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(mine, hand, strict=True)
            )
            speed, mfu, of = (statistics.median(r[k] for r in mine) for k in ("tokens_per_second", "mfu", "of_ceiling"))
            peak = "-" if device == "cpu" else f"{max(r['peak_bytes'] for r in mine) / 1e9:.1f}"
            lines.append(
                f"| {shape} | {name} | {speed:,.0f} | {mfu:.1%} | {of:.1%} | {ratio:.3f} | {peak} | {mine[0]['waits_in_timed_steps']} |"
            )
    print("\n".join(lines))
    if not options.dry_run:
        target = ROOT / f"benchmarks/results/accelerator_{torch.cuda.get_device_name().replace(' ', '-')}"
        record = {
            "command": " ".join(sys.argv),
            "versions": versions(),
            "hardware": hardware(args),
            "ceiling_flops": top,
        }
        write_json(target.with_suffix(".json"), record | {"peak_flops": options.peak_flops, "rows": rows})
        target.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
