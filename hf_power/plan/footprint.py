"""Memory of a training step on paper: bytes on each device and of a checkpoint, from a config alone.

On one H200 the stock Trainer's peak was 87.5 GB where `footprint` says 87.4 (PowerLM-1B, 4 blocks of 4096, bf16, no
checkpointing); a compiled run of hf_power needs far less, 93 GB for 8 blocks (benchmarks/results). Assumptions, not
measured: buffers of FSDP2; the padding of shards, the allocator's fragmentation, the CUDA context, workspaces and a
fused optimizer's scratch take nothing (allow some 10 % for them).

Activations are those of one micro-step of transformers' model, uncompiled, with SDPA or flash attention. For N = batch_size *
block_size tokens, width h, heads * head_dim = a, KV heads * head_dim = k, MLP width f, each tensor that autograd saves,
per token and layer. s bytes is an element of the residual stream, w of a product, e of an expert's product: autocast (4, 2, 4), for norms promote to their fp32 weights and grouped_mm is not cast;
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

A run of hf_power stays below that: it takes a large loss in chunks (`hf_power.pretrain.speed.chunk_loss_`), and its
experts follow autocast, which is not counted here.

The rotary tables, token ids and labels (no multiple of h) are left out. On a CPU "saved" is within 1.2 % of what
autograd holds, "peak" within 4 % of what is alive at once, for small Granite and GraniteMoe models in each compute. Other
families are counted by the same formulas with their own sizes, `_Sizes`: an estimate, in which norms beside the two of a
block, latent projections, biases and an MLP without a gate are not told apart, and every layer has the experts.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from hf_power.compat import PreTrainedConfig
from hf_power.models import count_parameters, experts_per_token, head_dim, num_experts
from hf_power.plan.target import Layout, Machine, check_choice, check_positive

COMPUTES = ("autocast", "bf16", "fp32")
# Bytes per logit: log-probabilities, their gradient, and the logits' gradient, all in fp32.
LOGITS_IN_BACKWARD = 12


class Activations(NamedTuple):
    """Bytes of one micro-step: a layer's tensors without copies of weights, those copies, and two sums.

    `saved` is what autograd holds between forward and backward, its copies included; `peak` is what is alive at once.
    """

    layer: int
    copies: int
    saved: int
    peak: int


class _Elements(NamedTuple):
    """Bytes of an element of the residual stream, of a product, and of an expert's product."""

    stream: int
    product: int
    expert: int


_ELEMENTS = {"autocast": _Elements(4, 2, 4), "bf16": _Elements(2, 2, 2), "fp32": _Elements(4, 4, 4)}


def activation_bytes(
    config: PreTrainedConfig, *, block_size: int, batch_size: int, compute: str, activation_checkpointing: bool
) -> Activations:
    """Bytes of activations of a micro-step of batch_size sequences, by the formulas at the top of this file.

    Raises:
        UserError: a number out of range, or a compute that is not among COMPUTES.
    """
    check_positive(block_size=block_size, batch_size=batch_size)
    check_choice("compute", compute, COMPUTES)
    tokens, layers, width = batch_size * block_size, config.num_hidden_layers, config.hidden_size
    stream, product, _ = _ELEMENTS[compute]
    layer = tokens * _layer_bytes(config, compute)
    copied = 2 if compute == "autocast" else 0
    head_copy = copied * config.vocab_size * width
    layer_copies = copied * sum(_matrices(config))
    copies = head_copy + layers * layer_copies
    inputs = tokens * stream * width
    kept = layers * (inputs if activation_checkpointing else layer)
    balancing = 4 * num_experts(config) if getattr(config, "output_router_logits", False) else 0
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
    return Activations(layer, copies, kept + head + 4 * logits + held, kept + max(moments))


class _Sizes(NamedTuple):
    """Sizes of a layer: the heads, the width of all queries, of all keys, of the MLP that every token passes, of an expert."""

    heads: int
    queries: int
    keys: int
    inner: int
    expert: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "_Sizes":
        """By the names that families have for them."""
        heads, size = config.num_attention_heads, head_dim(config)
        if getattr(config, "qk_nope_head_dim", None):  # Latent attention has whole keys for every head.
            size = config.qk_nope_head_dim + config.qk_rope_head_dim
        kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or heads
        dense = _first(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * config.hidden_size
        if not num_experts(config):
            return cls(heads, heads * size, kv_heads * size, dense, 0)
        expert = _first(config, "moe_intermediate_size") or dense
        shared = _first(config, "shared_expert_intermediate_size") or _first(config, "n_shared_experts") * expert
        return cls(heads, heads * size, kv_heads * size, shared, expert)


def _first(config: PreTrainedConfig, *names: str) -> int:
    """The first of some attributes that a config has; 0 where it has none."""
    return next((int(value) for name in names if isinstance(value := getattr(config, name, None), int)), 0)


def _layer_bytes(config: PreTrainedConfig, compute: str) -> int:
    """What one token leaves in a layer for the backward pass."""
    stream, product, expert = _ELEMENTS[compute]
    width, sizes = config.hidden_size, _Sizes.of(config)
    casts = compute == "autocast"
    total = 2 * ((4 + stream) * width + 4) + product * width * (3 if casts else 1)
    total += product * (2 * sizes.queries + 2 * sizes.keys) + 4 * sizes.heads
    if sizes.expert:
        pair = expert * (2 * width + 4 * sizes.expert) + 36 + expert
        total += product * width + experts_per_token(config) * pair
    if sizes.inner:
        total += product * (width * (2 if casts else 1) + 4 * sizes.inner)
    return int(total)


def _matrices(config: PreTrainedConfig) -> list[int]:
    """Entries of a layer's matrices that are not an expert's."""
    width, sizes = config.hidden_size, _Sizes.of(config)
    mlp = [width * sizes.inner] * 3 if sizes.inner else []
    router = [width * num_experts(config)] if sizes.expert else []
    return [width * sizes.queries] * 2 + [width * sizes.keys] * 2 + mlp + router


def _layer_gradients(config: PreTrainedConfig, tokens: int, compute: str) -> int:
    """Gradients that are alive at once in the backward pass of the MLP, which come and go."""
    _, product, expert = _ELEMENTS[compute]
    width, sizes = config.hidden_size, _Sizes.of(config)
    if not sizes.expert:
        return int(tokens * 2 * product * sizes.inner + 4 * max(_matrices(config)))
    rows, inner = tokens * experts_per_token(config), sizes.expert
    return int(expert * max(rows * max(3 * width, 2 * inner - width), num_experts(config) * 2 * inner * width))


# Bytes per parameter that are kept and saved: the weights in fp32, and AdamW's two moments in fp32.
WEIGHT, MOMENTS = 4, 8


@dataclass(frozen=True)
class DeviceBytes:
    """Bytes on each device, by what they hold."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Footprint:
    """What a training step takes on each device, whether that fits, and what a checkpoint takes on disk.

    The logits are the largest single tensor, in fp32; a checkpoint without its optimizer is the weights alone.
    """

    parameters: int
    bytes: DeviceBytes
    logits_bytes: int
    checkpoint_bytes: int
    checkpoint_bytes_without_optimizer: int
    fits: bool


def footprint(
    config: PreTrainedConfig,
    *,
    block_size: int,
    per_device_batch_size: int,
    machine: Machine | None = None,
    layout: Layout | None = None,
) -> Footprint:
    """Bytes that a training step of the Trainer takes on each device, and those of a checkpoint.

    With P parameters, D devices, w bytes of a product's element (2 in bf16, 4 in fp32)::

        weights      4 P            fp32 in both precisions: they are their own master copy
        gradients    4 P            fp32, as the weights
        optimizer    8 P            AdamW's two moments
        buffers      4 P            sharding none and optimizer, D > 1: DDP's buckets, a second copy of the gradients
                     2 w (R + 2 U)  sharding full: weights and gradients of the root unit R (embedding, head, last norm)
                                    and of two of the units U (a layer), the next one being gathered meanwhile
        activations  see the top of this file

    A checkpoint has 12 P bytes, 4 P of them weights, whatever the sharding.

    Args:
        config: of any causal LM with attention layers.
        block_size: tokens per sequence, >= 1.
        per_device_batch_size: sequences of one micro-step on one device, >= 1.
        machine, layout: see there.

    Raises:
        UserError: a number out of range.
    """
    machine, layout = machine or Machine(), layout or Layout()
    check_positive(per_device_batch_size=per_device_batch_size)
    shape = {"block_size": block_size, "batch_size": per_device_batch_size}
    checkpointing = layout.activation_checkpointing
    activations = activation_bytes(config, **shape, compute=layout.compute, activation_checkpointing=checkpointing)
    parameters = count_parameters(config)["parameters"]
    whole = machine.devices if layout.sharding == "full" else 1
    weights = math.ceil(WEIGHT * parameters / whole)
    moments = math.ceil(MOMENTS * parameters / (1 if layout.sharding == "none" else machine.devices))
    buffers = _buffers(config, parameters, machine.devices, layout)
    sizes = DeviceBytes(weights, weights, moments, buffers, activations.peak)
    return Footprint(
        parameters=parameters,
        bytes=sizes,
        logits_bytes=4 * block_size * per_device_batch_size * config.vocab_size,
        checkpoint_bytes=(WEIGHT + MOMENTS) * parameters,
        checkpoint_bytes_without_optimizer=WEIGHT * parameters,
        fits=sizes.total <= machine.device_memory,
    )


def _buffers(config: PreTrainedConfig, parameters: int, devices: int, layout: Layout) -> int:
    if layout.sharding != "full":
        return WEIGHT * parameters if devices > 1 else 0
    # FSDP2 gathers the root unit for the whole step, and the next layer while one is at work.
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    root = embeddings + config.hidden_size
    unit = (parameters - root) // config.num_hidden_layers
    return int(2 * (4 if layout.compute == "fp32" else 2) * (root + 2 * unit))
