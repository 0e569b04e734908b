"""Memory and time of a run on paper: bytes on each device and on disk, steps and days, from a config alone."""

import math
from typing import Any

from hf_power.models import count_parameters, flops_per_token, usual_utilisation
from hf_power.records.errors import UserError

SCHEMA = 1
SHARDINGS = ("none", "optimizer", "full")
PRECISIONS = ("bf16", "fp32")
COMPUTES = ("autocast", "bf16", "fp32")
WEIGHT, MOMENTS = 4, 8  # bytes per parameter that are kept and saved: fp32, and AdamW's two moments in fp32
LOGITS_IN_BACKWARD = 12  # bytes per logit: log-probabilities, their gradient, and the logits' gradient, all fp32


def footprint(
    config: Any,
    *,
    block_size: int,
    per_device_batch_size: int,
    devices: int,
    precision: str = "bf16",
    sharding: str = "full",
    activation_checkpointing: bool = True,
    device_memory: float = 80e9,
) -> dict[str, Any]:
    """Bytes that a training step of the Trainer takes on each device, and those of a checkpoint.

    With P parameters, D devices, w bytes of a product's element (2 in bf16, 4 in fp32)::

        weights      4 P            fp32 in both precisions: they are their own master copy
        gradients    4 P            fp32, as the weights
        optimizer    8 P            AdamW's two moments
        buffers      4 P            sharding none and optimizer, D > 1: DDP's buckets, a second copy of the gradients
                     2 w (R + 2 U)  sharding full: weights and gradients of the root unit R (embedding, head, last norm)
                                    and of two of the units U (a layer), the next one being gathered meanwhile
        activations  see `activation_bytes`

    "none" is DDP, "optimizer" divides the optimizer by D, "full" (FSDP2, a unit per layer, resharded after forward)
    weights, gradients and optimizer. A checkpoint has 12 P bytes, 4 P of them weights, whatever the sharding.

    On one H200 the stock Trainer's peak was 87.5 GB where this says 87.4 (PowerLM-1B, 4 blocks of 4096, bf16, no
    checkpointing); a compiled run of hf_power needs far less, 93 GB for 8 blocks (benchmarks/results).

    Assumptions, not measured: buffers of FSDP2; the padding of shards, the allocator's fragmentation, the CUDA context,
    workspaces and a fused optimizer's scratch take nothing (allow some 10 % for them).

    Args:
        config: of a Llama, Mixtral, Granite or GraniteMoe model.
        block_size: tokens per sequence, >= 1.
        per_device_batch_size: sequences of one micro-step on one device, >= 1.
        devices: data-parallel devices, >= 1.
        precision: "bf16" (autocast under none and optimizer, FSDP2's policy under full) or "fp32".
        sharding: "none", "optimizer" or "full".
        activation_checkpointing: each layer keeps its input alone and is computed again in the backward pass.
        device_memory: bytes of one device.

    Returns:
        "bytes" per device, by term, and their "total"; "logits_bytes", of the largest single tensor (fp32);
        "checkpoint_bytes", "checkpoint_bytes_without_optimizer"; "fits": whether total <= device_memory.

    Raises:
        ValueError: a number out of range, or an unknown precision or sharding.
    """
    _check_positive(per_device_batch_size=per_device_batch_size, devices=devices, device_memory=device_memory)
    _check_choice("precision", precision, PRECISIONS)
    _check_choice("sharding", sharding, SHARDINGS)
    compute = "fp32" if precision == "fp32" else "bf16" if sharding == "full" else "autocast"
    activations = activation_bytes(
        config,
        block_size=block_size,
        batch_size=per_device_batch_size,
        compute=compute,
        activation_checkpointing=activation_checkpointing,
    )
    parameters = count_parameters(config)["parameters"]
    whole = devices if sharding == "full" else 1
    sizes = {
        "weights": math.ceil(WEIGHT * parameters / whole),
        "gradients": math.ceil(WEIGHT * parameters / whole),
        "optimizer": math.ceil(MOMENTS * parameters / (1 if sharding == "none" else devices)),
        "buffers": _buffers(config, parameters, devices, sharding, 4 if compute == "fp32" else 2),
        "activations": activations["peak"],
    }
    total = sum(sizes.values())
    return {
        "schema": SCHEMA,
        "model_type": config.model_type,
        "parameters": parameters,
        "devices": devices,
        "block_size": block_size,
        "per_device_batch_size": per_device_batch_size,
        "precision": precision,
        "sharding": sharding,
        "activation_checkpointing": activation_checkpointing,
        "bytes": {**sizes, "total": total},
        "logits_bytes": 4 * block_size * per_device_batch_size * config.vocab_size,
        "checkpoint_bytes": (WEIGHT + MOMENTS) * parameters,
        "checkpoint_bytes_without_optimizer": WEIGHT * parameters,
        "device_memory_bytes": int(device_memory),
        "fits": total <= device_memory,
    }


def activation_bytes(
    config: Any, *, block_size: int, batch_size: int, compute: str, activation_checkpointing: bool
) -> dict[str, int]:
    """Bytes of activations of one micro-step of transformers' model, uncompiled, with SDPA or flash attention.

    For N = batch_size * block_size tokens, width h, heads * head_dim = a, KV heads * head_dim = k, MLP width f, each
    tensor that autograd saves, per token and layer. s bytes is an element of the residual stream, w of a product, e of
    an expert's product: autocast (4, 2, 4), for norms promote to their fp32 weights and grouped_mm is not cast;
    bf16 weights (2, 2, 2); fp32 (4, 4, 4)::

        norms       2 (4 h + s h + 4)            input in fp32, normed, and the scale
        projections c w h                        input of q, k, v; under autocast each one casts its own: c = 3, else 1
        attention   w (2 a + 2 k) + 4 heads      q, output; k, v; log-sum-exp
        MLP         c w h + 4 w f                c = 2 or 1; gate, its SiLU, up, and their product
        or experts  w h + K (e (2 h + 4 f) + 36 + e)   of K experts per token: input, gate and up, SiLU, product, output;
                                                 the weights of the choice and its indices (four of int64)

    The head keeps the last norm and its input, 4 h + s h + 4 + w h, and 4 V for the log-probabilities of the
    vocabulary's V logits. Autocast keeps a bf16 copy of each matrix that is not an expert's. A balancing loss keeps
    4 bytes per expert, layer and token. With checkpointing a layer keeps its input, s h.

    The peak is the largest of three moments, over what is kept then:
        end of forward        (w + 4 + 4) V, or 8 V in fp32, and the copies
        backward of the loss  LOGITS_IN_BACKWARD V, and the head's copy
        backward of the last layer   with checkpointing its tensors and copies; gradients: 2 w f and 4 bytes per entry
                              of its largest matrix; or of experts the largest of 3 K e h, K e (2 f - h), in place of what
                              is freed by then, and the gradient of all their gates and ups

    A run of hf_power stays below that: it takes a large loss in chunks (`hf_power.pretrain.speed.chunk_loss_`), and its experts follow
    autocast, which is not counted here.

    The rotary tables, token ids and labels (no multiple of h) are left out. On a CPU "saved" is within 1.2 % of what
    autograd holds, "peak" within 4 % of what is alive at once, for small Granite and GraniteMoe models in each compute.

    Args:
        config: of a Llama, Mixtral, Granite or GraniteMoe model.
        block_size: tokens per sequence, >= 1.
        batch_size: sequences, >= 1.
        compute: "autocast", "bf16" or "fp32".
        activation_checkpointing: see `footprint`.

    Returns:
        "layer", one layer's tensors without copies; "copies", of weights; "saved", what autograd holds between forward
        and backward, the copies that it holds included; "peak".

    Raises:
        ValueError: a number out of range, or an unknown compute.
    """
    _check_positive(block_size=block_size, batch_size=batch_size)
    _check_choice("compute", compute, COMPUTES)
    tokens, layers, width = batch_size * block_size, config.num_hidden_layers, config.hidden_size
    stream, product, _ = _element_bytes(compute)
    layer = tokens * _layer_bytes(config, compute)
    copied = 2 if compute == "autocast" else 0
    head_copy = copied * config.vocab_size * width
    layer_copies = copied * sum(_matrices(config))
    copies = head_copy + layers * layer_copies
    inputs = tokens * stream * width
    kept = layers * (inputs if activation_checkpointing else layer)
    balancing = 4 * config.num_local_experts if getattr(config, "output_router_logits", False) else 0
    kept += tokens * layers * balancing
    head = tokens * ((4 + stream + product) * width + 4)
    logits = tokens * config.vocab_size
    held = head_copy if activation_checkpointing else copies
    again = layer + layer_copies if activation_checkpointing else layers * layer_copies
    moments = (
        head + logits * (8 if compute == "fp32" else product + 8) + copies,
        head + logits * LOGITS_IN_BACKWARD + held,
        again + _layer_gradients(config, tokens, compute),
    )
    return {"layer": layer, "copies": copies, "saved": kept + head + 4 * logits + held, "peak": kept + max(moments)}


def scale_table(
    config: Any,
    *,
    tokens: int,
    tokens_per_step: int,
    block_size: int,
    per_device_batch_size: int,
    devices: tuple[int, ...] = (8, 64, 512),
    flops_per_device: float = 989e12,
    utilisation: float | None = None,
    precision: str = "bf16",
    activation_checkpointing: bool = True,
    device_memory: float = 80e9,
) -> list[dict[str, Any]]:
    """The same run on several numbers of devices: batch, memory under each sharding, checkpoint, steps and days.

    ::

        days = ceil(tokens / tokens_per_step) * tokens_per_step * flops_per_token
               / (devices * flops_per_device * utilisation * 86400)

    Communication is in the utilisation alone, so that days fall as 1 / devices: an assumption.

    Args:
        config: of a Llama, Mixtral, Granite or GraniteMoe model.
        tokens: length of the run, rounded up to whole steps.
        tokens_per_step: tokens of one optimizer step over all devices, a multiple of block_size times devices.
        block_size: tokens per sequence.
        per_device_batch_size: the most sequences of a micro-step; a row takes the largest one that divides its share.
        devices: one row each.
        flops_per_device: peak of one device in FLOP/s; the default is an H100's in bf16 without sparsity.
        utilisation: share of the peak that the run reaches, in (0, 1]; None: see `hf_power.models.usual_utilisation`.
        precision: see `footprint`, as are activation_checkpointing and device_memory.

    Returns:
        Rows; "bytes" and "fits" by sharding.

    Raises:
        ValueError: a number out of range, or a batch that the block size or the devices do not divide.
    """
    utilisation = usual_utilisation(config) if utilisation is None else utilisation
    _check_positive(
        tokens=tokens,
        tokens_per_step=tokens_per_step,
        block_size=block_size,
        per_device_batch_size=per_device_batch_size,
        flops_per_device=flops_per_device,
        utilisation=utilisation,
    )
    if utilisation > 1:
        raise UserError(f"utilisation must be at most 1, got {utilisation}: pass 0.4 for 40 %.")
    shares = {count: _sequences_per_device(tokens_per_step, block_size, count) for count in devices}
    steps = math.ceil(tokens / tokens_per_step)
    flops = flops_per_token(config, block_size) * steps * tokens_per_step
    rows = []
    for count, share in shares.items():
        batch = max(n for n in range(1, min(share, per_device_batch_size) + 1) if share % n == 0)
        plans = {
            sharding: footprint(
                config,
                block_size=block_size,
                per_device_batch_size=batch,
                devices=count,
                precision=precision,
                sharding=sharding,
                activation_checkpointing=activation_checkpointing,
                device_memory=device_memory,
            )
            for sharding in SHARDINGS
        }
        row = {
            "devices": count,
            "per_device_batch_size": batch,
            "gradient_accumulation_steps": share // batch,
            "bytes": {sharding: plan["bytes"]["total"] for sharding, plan in plans.items()},
            "fits": {sharding: plan["fits"] for sharding, plan in plans.items()},
            "checkpoint_bytes": plans["none"]["checkpoint_bytes"],
            "steps": steps,
            "days": flops / (count * flops_per_device * utilisation * 86_400),
        }
        rows.append(row)
    return rows


def table_text(rows: list[dict[str, Any]]) -> str:
    """Rows of `scale_table` as text for people; memory that does not fit has an exclamation mark."""
    lines = ["  devices  batch x accum.  GB none  GB optimizer  GB full  GB checkpoint      steps      days"]
    for row in rows:
        none, optimizer, full = (
            f"{row['bytes'][name] / 1e9:.1f}{' ' if row['fits'][name] else '!'}" for name in SHARDINGS
        )
        batch = f"{row['per_device_batch_size']} x {row['gradient_accumulation_steps']}"
        lines.append(
            f"  {row['devices']:>7,}  {batch:>14}  {none:>7}  {optimizer:>12}  {full:>7}  "
            f"{row['checkpoint_bytes'] / 1e9:>13.1f}  {row['steps']:>9,}  {row['days']:>8.3g}"
        )
    return "\n".join(lines)


def _element_bytes(compute: str) -> tuple[int, int, int]:
    """Of the residual stream, of a product, of an expert's product."""
    return {"autocast": (4, 2, 4), "bf16": (2, 2, 2), "fp32": (4, 4, 4)}[compute]


def _heads(config: Any) -> tuple[int, int]:
    """Widths of the queries, and of the keys."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim


def _layer_bytes(config: Any, compute: str) -> int:
    """What one token leaves in a layer for the backward pass."""
    stream, product, expert = _element_bytes(compute)
    width, inner, (queries, keys) = config.hidden_size, config.intermediate_size, _heads(config)
    casts = compute == "autocast"
    total = 2 * ((4 + stream) * width + 4) + product * width * (3 if casts else 1)
    total += product * (2 * queries + 2 * keys) + 4 * config.num_attention_heads
    if hasattr(config, "num_local_experts"):
        pair = expert * (2 * width + 4 * inner) + 36 + expert
        total += product * width + config.num_experts_per_tok * pair
    else:
        total += product * (width * (2 if casts else 1) + 4 * inner)
    return int(total)


def _matrices(config: Any) -> list[int]:
    """Entries of a layer's matrices that are not an expert's."""
    width, inner, (queries, keys) = config.hidden_size, config.intermediate_size, _heads(config)
    experts = getattr(config, "num_local_experts", 0)
    return [width * queries] * 2 + [width * keys] * 2 + ([width * experts] if experts else [width * inner] * 3)


def _layer_gradients(config: Any, tokens: int, compute: str) -> int:
    """Gradients that are alive at once in the backward pass of the MLP, which come and go."""
    _, product, expert = _element_bytes(compute)
    width, inner = config.hidden_size, config.intermediate_size
    if not hasattr(config, "num_local_experts"):
        return int(tokens * 2 * product * inner + 4 * max(_matrices(config)))
    rows = tokens * config.num_experts_per_tok
    return int(expert * max(rows * max(3 * width, 2 * inner - width), config.num_local_experts * 2 * inner * width))


def _buffers(config: Any, parameters: int, devices: int, sharding: str, element: int) -> int:
    if sharding != "full":
        return WEIGHT * parameters if devices > 1 else 0
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    root = embeddings + config.hidden_size
    unit = (parameters - root) // config.num_hidden_layers
    return int(2 * element * (root + 2 * unit))


def _sequences_per_device(tokens_per_step: int, block_size: int, devices: int) -> int:
    _check_positive(devices=devices)
    sequences, left = divmod(tokens_per_step, block_size)
    if left:
        raise UserError(
            f"{tokens_per_step} tokens per step are no whole number of blocks of {block_size}: correct one."
        )
    if sequences % devices:
        raise UserError(f"{devices} devices do not divide the {sequences} sequences of a step: choose a divisor of it.")
    return sequences // devices


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive, got {value!r}: correct it.")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}: correct it.")
