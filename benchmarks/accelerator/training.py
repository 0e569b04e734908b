"""Parts `dense`, `moe` and `host`: a training step of the paper's 1B shapes, by hf_power, by hand and by the stock Trainer.

* ours: `hf_power.pretrain.run.pretrain`, compiled
* by_hand: a bare loop with the same model, blocks, optimizer, schedule and tricks, and nothing else
* stock: transformers' Trainer as it comes, with bf16 and fused AdamW
* eager_experts (moe only): the bare loop with transformers' loop over experts in place of grouped products

Blocks of 4096 tokens, bf16 autocast over fp32 weights, 16 blocks a step as in scripts/recipes, in the largest micro-batches
that fit. `host` trains a model of the dense one's depth that is too narrow to keep a device busy: its step is what the
host needs to issue one.
"""

import torch
from common import DEVICE, ROOT, Clock, ceiling, data, free_memory, only_the_training, tokenizer_of
from torch import nn
from transformers import Trainer, set_seed

from hf_power import MupAdamW, PowerLR, mup_config
from hf_power.cli import parse_settings
from hf_power.data.order import BlockStream, collate_blocks
from hf_power.models import flops_per_token
from hf_power.pretrain import run as train
from hf_power.pretrain.speed import speed_up_
from hf_power.settings.sections import Tokens
from hf_power.settings.settings import build_model

RECIPES = {"dense": "powerlm-1b", "moe": "powermoe-1b", "host": "powerlm-1b"}
SEQUENCES = 16  # of a step
NARROW = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
TINY = {**NARROW, "num_hidden_layers": 2, "block_size": 128, "base_width": 32}  # for a dry run
TINY |= {"model_config": '{"vocab_size": 2048, "output_router_logits": true}', "use_cpu": DEVICE == "cpu"}


def settings(shape, folder, batch, steps, compiled, options):
    """The recipe's model and optimizer on the text of the options, `batch` blocks a micro-batch."""
    flags = {"output_dir": folder, "activation_checkpointing": False, "torch_compile": compiled}
    flags |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": SEQUENCES // batch}
    flags |= {"logging_steps": steps, "save_strategy": "no", "disable_tqdm": True}
    if shape == "host":
        flags |= NARROW | {"block_size": 128, "base_width": 32, "gradient_accumulation_steps": 1}
    if options.dry_run:
        flags |= TINY | {"gradient_accumulation_steps": 2}
        if shape != "moe":
            flags["model_config"] = '{"vocab_size": 2048}'
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    given = parse_settings([str(ROOT / f"scripts/recipes/{RECIPES[shape]}.yaml"), *words])
    given.data.dataset, given.data.dataset_config, given.data.streaming = options.dataset, None, False
    given.data.tokenizer, given.data.vocab_size = None, 2048
    given.training.lr_scheduler_kwargs = {"a": 4.0, "warmup_tokens": given.data.block_size}
    given.training.report_to, given.training.max_steps = [], steps
    per_step = batch * given.training.gradient_accumulation_steps * given.data.block_size
    given.run.tokens, given.run.max_eval_tokens = Tokens(steps * per_step), Tokens(given.data.block_size)
    tokenizer = tokenizer_of(given)
    given.data.tokenizer = str(folder.parent / "tokenizer")  # so that `pretrain` does not train it anew
    tokenizer.save_pretrained(given.data.tokenizer)
    return given


def parts(given, tokenizer_of):
    """Blocks in the order of `pretrain`, and the model."""
    tokenizer, blocks = tokenizer_of
    set_seed(given.training.seed)
    with torch.device(DEVICE):
        model = build_model(given, tokenizer)
    args = given.training
    sequences = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return BlockStream(blocks, seed=args.seed, start=0, stop=sequences), model


def ours(given, known):
    with only_the_training():
        return [p["loss"] for p in train.pretrain(given).loss_curve if "loss" in p][-1]


def by_hand(given, known, experts=None):
    args = given.training
    stream, model = parts(given, known)
    model = speed_up_(model, args, given.data.block_size).to(DEVICE).train()
    model.config.use_cache = False
    if experts is not None:
        model.set_experts_implementation(experts)
        for layer in model.base_model.layers:
            vars(layer.block_sparse_moe.experts).pop("forward", None)  # the loop depends on the data: no graph
    loader = torch.utils.data.DataLoader(
        stream,
        batch_size=args.per_device_train_batch_size,
        collate_fn=collate_blocks,
        pin_memory=DEVICE == "cuda",
    )
    factory, kwargs = MupAdamW.for_trainer(args)
    optimizer = factory()(model, **kwargs)
    micro_steps = args.gradient_accumulation_steps
    tokens = args.per_device_train_batch_size * micro_steps * given.data.block_size
    schedule = PowerLR(optimizer, 1, args.max_steps, tokens_per_step=tokens, a=4.0)
    total = torch.zeros((), device=DEVICE)
    for i, batch in enumerate(loader):
        batch = {name: tensor.to(DEVICE, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**batch).loss / micro_steps
        loss.backward()
        total += loss.detach()
        if (i + 1) % micro_steps == 0:
            nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return total.item() / args.max_steps


def eager_experts(given, known):
    return by_hand(given, known, experts="eager")


def stock(given, known):
    args = given.training
    args.torch_compile, args.torch_compile_backend = False, "no"
    args.train_sampling_strategy, args.logging_nan_inf_filter, args.eval_strategy = "sequential", True, "no"
    args.lr_scheduler_type, args.lr_scheduler_kwargs, args.optim = "power", {"a": 4.0}, "adamw_torch_fused"
    args.warmup_steps, args.learning_rate = 1, 1e-3
    stream, model = parts(given, known)
    return Trainer(model, args, train_dataset=stream, data_collator=collate_blocks).train().training_loss


LEGS = {function.__name__: function for function in (ours, by_hand, stock, eager_experts)}


def leg(rows, part, name, options, folder, batch, turn):
    """One leg, in micro-batches half as large if its memory does not suffice; returns its micro-batch."""
    steps, warmup = options.steps, options.warmup
    if name in ("stock", "eager_experts"):
        steps, warmup = max(1, steps // 3), 1
    compiled = name != "stock" and (DEVICE == "cuda" or options.compile)
    while True:
        given = settings(part, folder / "run", batch, warmup + steps, compiled, options)
        per_step = batch * given.training.gradient_accumulation_steps * given.data.block_size
        known = data(given)
        try:
            with Clock(warmup, steps) as clock:
                loss = LEGS[name](given, known)
        except torch.OutOfMemoryError:
            loss = None
        if loss is None:  # here the error, which holds the run's tensors, is gone
            rows.add(part, leg=name, round=turn, micro_batch=batch, out_of_memory=True)
            batch //= 2
            if not batch:
                raise SystemExit("not one block fits into the device's memory: take a larger device.")
            torch._dynamo.reset()  # it would take two sizes of the batch for a size that varies
            free_memory()
            continue
        rows.add(part, leg=name, round=turn, micro_batch=batch, loss=loss, **clock.row(per_step))
        return batch


def measure(rows, part, options, folder):
    """All legs of a shape: ours and by_hand in turn, the others once."""
    if not options.dry_run and not rows.read("ceiling"):
        rows.add("ceiling", flops=ceiling(8192), peak_flops=options.peak_flops)
    given = settings(part, folder / "run", 1, 1, False, options)
    config = mup_config(given.model.config(vocab_size=2048), **given.mup.arguments())
    block, layers = given.data.block_size, config.num_hidden_layers
    flops = flops_per_token(config, block)
    attention = flops - flops_per_token(config, 0)  # the half that a causal token has
    rows.add(part, flops_per_token=flops, attention_flops_per_token=attention, block_size=block, layers=layers)
    batch = 1 if part == "host" or DEVICE == "cpu" else options.micro_batch
    for turn in range(options.rounds):
        pair = ("ours", "by_hand") if turn % 2 else ("by_hand", "ours")
        for name in pair:
            batch = leg(rows, part, name, options, folder, batch, turn)
        last = {row["leg"]: row["loss"] for row in rows.read(part) if row.get("round") == turn and "loss" in row}
        if not abs(last["ours"] - last["by_hand"]) < 1e-2:
            raise SystemExit(f"the two loops did not do the same work: {last}")
    once = {"dense": ["stock"], "moe": ["eager_experts"], "host": ["stock"]}[part]
    for name in once:
        leg(rows, part, name, options, folder, batch, 0)
