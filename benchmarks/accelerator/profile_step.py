"""Part `profile`: where the device's time goes in a micro-step, forward and backward, of the dense and the MoE shape."""

import re
from collections import defaultdict

import torch
from common import DEVICE, data, free_memory, now
from torch.profiler import ProfilerActivity, profile
from training import collate_blocks, parts, settings

from hf_power.pretrain.speed import speed_up_

# What a kernel is for, by its name; the first match counts.
KINDS = {
    "attention": r"sdpa|flash|fmha|cudnn::fusion",
    "grouped products of experts": r"GroupProblem|grouped",
    "products": r"nvjet|gemm|cutlass|cublas",
    "loss": r"log_?sum_?exp|cross_entropy|softmax|nll",
    "norms, activations, residual, rotary embedding (compiled)": r"^triton",
    "copies, casts and sums (not compiled)": r"elementwise|copy|reduce|Memcpy|Memset",
}


def kind_of(name):
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def measure(rows, options, folder):
    """A row per shape: milliseconds of a micro-step on the clock, and of the device by kind of kernel."""
    batch = options.micro_batch if DEVICE == "cuda" else 1
    for shape in ("dense", "moe"):
        given = settings(shape, folder / "run", batch, 8, DEVICE == "cuda", options)
        stream, model = parts(given, data(given))
        model = speed_up_(model, given.training, given.data.block_size).train()
        model.config.use_cache = False
        blocks = collate_blocks([block for block, _ in zip(stream, range(batch), strict=False)])
        blocks = {name: tensor.to(DEVICE) for name, tensor in blocks.items()}

        def micro_step(model=model, blocks=blocks):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = model(**blocks).loss
            loss.backward()

        for _ in range(3):
            micro_step()
        count, started = (10, now()) if DEVICE == "cuda" else (1, now())
        for _ in range(count):
            micro_step()
        on_the_clock = (now() - started) / count
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
        with profile(activities=activities) as trace:
            micro_step()
            now()
        events = [event for event in trace.key_averages() if event.device_type.name == DEVICE.upper()]
        field = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
        by_kind, kernels = defaultdict(float), []
        for event in sorted(events, key=lambda event: -getattr(event, field)):
            ms = getattr(event, field) / 1e3
            by_kind[kind_of(event.key)] += ms
            kernels.append([round(ms, 2), event.count, event.key[:120]])
        rows.add(
            "profile",
            shape=shape,
            micro_batch=batch,
            ms_on_the_clock=1e3 * on_the_clock,
            ms_of_kernels=sum(by_kind.values()),
            ms_by_kind=by_kind,
            kernels=kernels[:40],
        )
        del model, micro_step, stream
        free_memory()
