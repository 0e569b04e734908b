"""What makes a training step faster without changing what it computes, for models that train on whole blocks."""

import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "sdpa_of_blocks"
EXPERTS = "grouped_mm_under_autocast"
LOGITS_BYTES = 2**29  # of one chunk in fp32; a loss whose logits are larger is taken in chunks


def speed_up_(model: PreTrainedModel, args: Any, block_size: int) -> PreTrainedModel:
    """Prepare a model in place for training on packed blocks without padding; its losses stay those of the stock path.

    * SDPA attention is told that a block is one causal sequence. The stock path looks for padding and packed sequences in
      every forward pass, which waits for the device.
    * Grouped products of experts follow autocast, as every other product does.
    * A loss whose fp32 logits exceed LOGITS_BYTES is taken chunk by chunk, each computed again in the backward pass: see
      `chunk_loss_`. Not under DeepSpeed, whose ZeRO 3 has no whole head outside of the head's own forward pass.
    * With ``torch_compile``, the decoder layers are compiled, and share one graph, instead of the whole model; of a layer
      with experts its attention, norms and experts: the router reports its logits, which breaks graphs.
    * Batches are copied to an accelerator while it computes.

    Args:
        model: Llama, Mixtral, Granite or GraniteMoe for causal language modeling.
        args: the run's TrainingArguments; its compile backend is set to "no" once the layers are compiled.
        block_size: tokens of a block, >= 1.

    Returns:
        The model.
    """
    attend_to_blocks_(model)
    if getattr(model.config, "num_local_experts", None) and model.config._experts_implementation == "grouped_mm":
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_mm_under_autocast)
        model.set_experts_implementation(EXPERTS)
    chunks = loss_chunks(args.per_device_train_batch_size * block_size, model.config.vocab_size)
    if chunks > 1 and args.deepspeed_plugin is None:
        chunk_loss_(model, chunks)
    if args.torch_compile:
        compile_layers_(model, args)
        args.torch_compile_backend = os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
    if args.device.type != "cpu":
        args.accelerator_config.non_blocking = True
    return model


def attend_to_blocks_(model: Any) -> Any:
    """Tell SDPA attention that a block is one causal sequence, in place; other attention is left as it is."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, sdpa_attention_forward)
        model.set_attn_implementation(ATTENTION)
    return model


def compile_layers_(model: Any, args: Any) -> None:
    """Compile the decoder layers in place with the backend and mode of the run's TrainingArguments."""
    for region in _regions(model):  # not their hooks: those of FSDP and of the router's logits would break graphs
        compiled = torch.compile(region.forward, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        region.forward = compiled


def _regions(model: Any) -> Iterator[Any]:
    for layer in model.base_model.layers:
        if not getattr(model.config, "num_local_experts", None):
            yield layer
            continue
        for part in layer.children():
            yield getattr(part, "experts", part)


def loss_chunks(tokens: int, vocab_size: int) -> int:
    """Chunks in which a loss over `tokens` is taken, so that the fp32 logits of one fit into LOGITS_BYTES."""
    return math.ceil(4 * tokens * vocab_size / LOGITS_BYTES)


def chunk_loss_(model: PreTrainedModel, chunks: int) -> PreTrainedModel:
    """Take the training loss of a causal model in chunks of its tokens, without the logits of all of them at once.

    The head's product and the cross-entropy of a chunk are computed again in the backward pass, so that only one chunk's
    logits exist at any time, for 2 * vocab_size * hidden_size more FLOPs per token. What the model does between its
    head and its loss must be linear, as Granite's division by logits_scaling is: here it is applied to the hidden states.

    In training mode the output's ``logits`` are those hidden states; in evaluation mode nothing changes.

    Args:
        model: with ``lm_head`` and transformers' ``loss_function``; changed in place.
        chunks: >= 1.

    Returns:
        The model.
    """
    head: Any = model.lm_head
    whole_head, whole_loss = head.forward, model.loss_function

    def deferred_head(hidden: torch.Tensor) -> torch.Tensor:
        return hidden if model.training else whole_head(hidden)

    def loss_function(
        logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        if not model.training:
            loss: torch.Tensor = whole_loss(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)
            return loss
        hidden, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total: torch.Tensor = hidden.new_zeros((), dtype=torch.float32)
        for part, wanted in zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True):
            total = total + checkpoint(summed_loss, part, wanted, use_reentrant=False)
        return total / (targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)

    def summed_loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(whole_head(hidden).float(), targets, reduction="sum")

    head.forward, model.loss_function = deferred_head, loss_function
    return model


class _Experts:
    """The experts of a module with weights of another type; everything else is the module's, whatever a version asks for."""

    def __init__(self, experts: Any, dtype: torch.dtype) -> None:
        self._experts = experts
        self.gate_up_proj, self.down_proj = experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def grouped_mm_under_autocast(experts: Any, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """The grouped products of transformers in autocast's type: torch does not cast them by itself.

    Under bf16 with fp32 weights the stock path multiplies experts, most of a mixture's FLOPs, in fp32.
    """
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        experts, hidden_states = _Experts(experts, dtype), hidden_states.to(dtype)
    output: torch.Tensor = grouped_mm_experts_forward(experts, hidden_states, *routing)
    return output
