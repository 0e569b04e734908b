"""What makes a step on whole blocks faster and changes none of its numbers; uses private parts of transformers."""

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_power.models import STOCK_BLOCKS, is_stock_block, num_experts
from hf_power.mup.probe import blocks_of

ATTENTION = "sdpa_of_blocks"
EXPERTS = "grouped_mm_under_autocast"
# A loss whose fp32 logits take more bytes than this is taken in chunks that do not.
LOGITS_BYTES = 2**30
# torch and transformers give this label to a token that no loss counts.
IGNORED = -100

Compiler: TypeAlias = Callable[[Callable[..., object]], Callable[..., object]]
# Logits and targets -> their summed loss, and its gradient by the logits.
LossOfLogits: TypeAlias = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def speed_up_(model: PreTrainedModel, args: TrainingArguments, block_size: int) -> PreTrainedModel:
    """Prepare a model in place for training on packed blocks without padding; its losses stay those of the stock path.

    * SDPA attention is told that a block is one causal sequence, where it is, see `attend_to_blocks_`. The stock path looks
      for padding and packed sequences in every forward pass, which waits for the device.
    * Grouped products of experts follow autocast, as every other product does.
    * A loss whose fp32 logits exceed LOGITS_BYTES is taken chunk by chunk, see `chunk_loss_`. Not under DeepSpeed, whose
      ZeRO 3 has no whole head outside of the head's own forward pass, and for the families of STOCK_BLOCKS alone.
    * With ``torch_compile``, the decoder layers are compiled, and share one graph, instead of the whole model; of a layer
      with experts its attention, norms and experts: the router reports its logits, which breaks graphs. So is what lies
      between the products of a loss in chunks.
    * Batches are copied to an accelerator while it computes.

    Args:
        model: for causal language modeling.
        args: the run's TrainingArguments; its compile backend is set to "no" once the layers are compiled.
        block_size: tokens of a block, >= 1.

    Returns:
        The model.
    """
    attend_to_blocks_(model)
    if num_experts(model.config) and model.config._experts_implementation == "grouped_mm":
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_mm_under_autocast)
        model.set_experts_implementation(EXPERTS)
    chunks = loss_chunks(args.per_device_train_batch_size * block_size, model.config.vocab_size)
    compiler = functools.partial(torch.compile, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    # A smoothed loss is one of the logits of all tokens.
    if (
        chunks > 1
        and model.config.model_type in STOCK_BLOCKS
        and args.deepspeed_plugin is None
        and not args.label_smoothing_factor
    ):
        chunk_loss_(model, chunks, compiler if args.torch_compile else None)
    if args.torch_compile:
        for region in _regions(model):
            # Not the module with its hooks: those of FSDP and of the router's logits would break graphs.
            region.forward = compiler(region.forward)
        # accelerate would compile the whole model besides; it reads the backend from the environment.
        args.torch_compile_backend = os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
    if args.device.type != "cpu" and isinstance(args.accelerator_config, AcceleratorConfig):
        args.accelerator_config.non_blocking = True
    return model


def attend_to_blocks_(model: PreTrainedModel) -> PreTrainedModel:
    """Tell SDPA attention that a block is one causal sequence, in place; other attention is left as it is.

    So are windows and families that are not known to need no other mask, see `hf_power.models.STOCK_BLOCKS`.
    """
    if model.config._attn_implementation == "sdpa" and is_stock_block(model.config):
        # Under a name of our own transformers builds no mask, and the same function then takes its causal path.
        AttentionInterface.register(ATTENTION, sdpa_attention_forward)
        model.set_attn_implementation(ATTENTION)
    return model


def attention_of(model: PreTrainedModel) -> str:
    """The kind of attention of a model: sdpa, eager, flash_attention_2 and so on."""
    name = str(model.config._attn_implementation)
    return "sdpa" if name == ATTENTION else name


def _regions(model: PreTrainedModel) -> Iterator[nn.Module]:
    for layer in blocks_of(model):
        if not num_experts(model.config):
            yield layer
            continue
        for part in layer.children():
            experts = getattr(part, "experts", part)
            yield experts if isinstance(experts, nn.Module) else part


def loss_chunks(tokens: int, vocab_size: int) -> int:
    """Chunks in which a loss over `tokens` is taken, a power of two: the fp32 logits of one fit into LOGITS_BYTES."""
    return int(2 ** math.ceil(math.log2(max(1.0, 4 * tokens * vocab_size / LOGITS_BYTES))))


def chunk_loss_(model: PreTrainedModel, chunks: int, compiler: Compiler | None = None) -> PreTrainedModel:
    """Take the training loss of a causal model in chunks of its tokens (>= 1), without the logits of all at once.

    The gradients of a chunk's logits are computed beside them, see `_ChunkedLoss`, so that only one chunk's logits
    exist at any time and no product is computed twice. What the model does between its head and its loss must be
    linear, as Granite's division by logits_scaling is: here it is applied to the hidden states. In training mode the
    output's ``logits`` are those hidden states; in evaluation mode nothing changes. The model is changed in place and
    returned: it has an ``lm_head`` without bias and transformers' ``loss_function``. The compiler is for the part
    between the head's products.
    """
    head = model.get_submodule("lm_head")
    whole_head, whole_loss = head.forward, model.loss_function
    loss_of_logits = compiler(_loss_of_logits) if compiler else _loss_of_logits

    def deferred_head(hidden: torch.Tensor) -> torch.Tensor:
        return hidden if model.training else whole_head(hidden)

    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        if not model.training:
            loss: torch.Tensor = whole_loss(logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, **kwargs)
            return loss
        # Each token is the target of the one before it, and the last of a block has none, so that all chunks are alike.
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        summed: Callable[..., torch.Tensor] = _ChunkedLoss.apply
        # An engine that shards the model puts another tensor here for every pass.
        weight = cast(torch.Tensor, head.weight)
        total = summed(logits.flatten(0, 1), weight, targets, chunks, loss_of_logits)
        return total / (targets.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    head.forward, model.loss_function = deferred_head, loss_function
    return model


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropy of ``hidden @ weight.T``, its gradients computed with it, chunk by chunk.

    With p the softmax of a token's logits and y its target (one-hot), the logits' gradient is p - y. From it come the
    gradients of the hidden states, (p - y) @ weight, and of the weight, (p - y).T @ hidden, summed in the weight's type.
    Products are in autocast's type. Between forward and backward both gradients are kept, one of each size.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunks: int,
        loss_of_logits: LossOfLogits,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        matrix, grad_weight = weight.to(dtype), torch.zeros_like(weight)
        losses, grads = [], []
        with torch.autocast(device, enabled=False):
            for part, wanted in zip(hidden.to(dtype).chunk(chunks), targets.chunk(chunks), strict=True):
                loss, grad = loss_of_logits(part @ matrix.T, wanted)
                losses.append(loss)
                grads.append((grad @ matrix).to(hidden.dtype))
                grad_weight += grad.T @ part
        # Both gradients are known now, so the backward pass has nothing left to compute but a product with a number.
        ctx.save_for_backward(torch.cat(grads), grad_weight)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(
        ctx: BackwardCFunction, grad_loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_hidden, grad_weight = cast("tuple[torch.Tensor, torch.Tensor]", ctx.saved_tensors)
        return grad_hidden * grad_loss, grad_weight * grad_loss, None, None, None


def _loss_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of logits (tokens, vocabulary) in fp32, and its gradient in the type of the logits."""
    exact, counted = logits.float(), targets.ne(IGNORED)[:, None]
    target = targets[:, None].clamp(min=0)
    log_sum = exact.logsumexp(dim=-1, keepdim=True)
    loss = ((log_sum - exact.gather(1, target)) * counted).sum()
    is_target = torch.arange(logits.shape[-1], device=logits.device) == target
    return loss, (((exact - log_sum).exp() - is_target.float()) * counted).to(logits.dtype)


class _Experts:
    """The experts of a module with weights of another type; everything else is the module's, whatever a version asks for."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts = experts
        self.gate_up_proj = cast(torch.Tensor, experts.gate_up_proj).to(dtype)
        self.down_proj = cast(torch.Tensor, experts.down_proj).to(dtype)

    def __getattr__(self, name: str) -> object:
        return getattr(self._experts, name)


def grouped_mm_under_autocast(experts: nn.Module, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """The grouped products of transformers in autocast's type: torch does not cast them by itself.

    Under bf16 with fp32 weights the stock path multiplies experts, most of a mixture's FLOPs, in fp32.
    """
    from transformers.integrations.moe import grouped_mm_experts_forward

    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        experts, hidden_states = cast(nn.Module, _Experts(experts, dtype)), hidden_states.to(dtype)
    output: torch.Tensor = grouped_mm_experts_forward(experts, hidden_states, *routing)
    return output
