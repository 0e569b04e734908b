"""Models of one shape computed as one, and the batches of a step for them; uses private parts of torch."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_power.compat import PreTrainedConfig
from hf_power.data.order import Block, BlockStream
from hf_power.models import is_stock_block
from hf_power.plan.footprint import activation_bytes
from hf_power.records.run import Data

if TYPE_CHECKING:
    from datasets import Dataset

# Steps whose blocks are read at once, because a read of `datasets` costs more than its blocks.
READ_STEPS = 32


@dataclass(frozen=True)
class SweepData:
    """What all runs of a sweep read: packed blocks, their tokenizer, and where they come from, as the rows say it."""

    tokenizer: PreTrainedTokenizerBase
    blocks: "Dataset"
    held_out: "Dataset | list[Block]"
    record: Data


class BlocksOfSeeds:
    """The batches of members that are trained together; those of one seed read the same blocks."""

    def __init__(self, data: SweepData, seeds: Sequence[int], num_sequences: int, device: torch.device) -> None:
        self._seeds, self._num_sequences, self._device = list(seeds), num_sequences, device
        # The order of the blocks has no end, and a stream must be given one.
        endless = int(np.iinfo(np.int64).max)
        self._streams = {seed: BlockStream(data.blocks, seed=seed, start=0, stop=endless) for seed in self._seeds}
        self._read: dict[int, torch.Tensor] = {}
        self._read_at = -READ_STEPS

    def at(self, step: int) -> torch.Tensor:
        """Token ids of a step, shape (members, num_sequences, block_size)."""
        if not self._read_at <= step < self._read_at + READ_STEPS:
            self._read_at, count = step, self._num_sequences
            wanted = range(step * count, (step + READ_STEPS) * count)
            for seed, stream in self._streams.items():
                read = np.stack([row["input_ids"] for row in stream.__getitems__(wanted)])
                blocks = torch.from_numpy(read).long().to(self._device)
                self._read[seed] = blocks.view(READ_STEPS, count, blocks.shape[-1])
        return torch.stack([self._read[seed][step - self._read_at] for seed in self._seeds])


# On an accelerator more tokens in one call than these gain nothing, and their activations may take this share of its memory.
BATCHED_TOKENS = 2**16
ACTIVATIONS_SHARE = 0.4
# What is taken for the memory of an accelerator that does not say how much it has.
UNKNOWN_MEMORY = 2**33


def can_be_stacked(model: PreTrainedModel) -> bool:
    """Whether `stack` has a form for a model's family and all its weights: linear, embeddings without padding, norms."""
    return is_stock_block(model.config) and all(
        _is_norm(module)
        or isinstance(module, nn.Linear)
        or (isinstance(module, nn.Embedding) and module.padding_idx is None)
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    )


def members_together(
    count: int, config: PreTrainedConfig, shape: tuple[int, int], bf16: bool, device: torch.device
) -> int:
    """Members that are best computed at once: as many as fill an accelerator and as its memory holds, on a CPU all.

    The shape is that of a member's batch: its blocks, and the tokens of a block.
    """
    if device.type == "cpu":
        return count
    num_sequences, block_size = shape
    activations = activation_bytes(
        config,
        block_size=block_size,
        batch_size=num_sequences,
        compute="autocast" if bf16 else "fp32",
        activation_checkpointing=False,
    )
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else UNKNOWN_MEMORY
    fitting = int(ACTIVATIONS_SHARE * memory / activations.peak)
    return max(1, min(count, math.ceil(BATCHED_TOKENS / (num_sequences * block_size)), fitting))


def stack(models: Sequence[PreTrainedModel]) -> tuple[PreTrainedModel, dict[str, nn.Parameter]]:
    """One model that computes what M models of one shape compute, each on its own share of the batch.

    It takes token ids of shape (M * n, tokens), the first n sequences for the first model, and returns logits of shape
    (M * n, tokens, vocabulary). A linear layer becomes one batched product over the models; attention, rotary embedding
    and activations see only a larger batch, so that fused attention works as it does for one model.

    Args:
        models: made alike, see `can_be_stacked`; their parameters become slices of the stacked tensors.

    Returns:
        The model, and its stacked parameters by the name of the models' own: leaves of shape (M, ...).
    """
    named = [dict(model.named_parameters()) for model in models]
    stacked: dict[str, nn.Parameter] = {}
    for name in named[0]:
        stacked[name] = nn.Parameter(torch.stack([parameters[name].detach() for parameters in named]))
        for i, parameters in enumerate(named):
            parameters[name].data = stacked[name].data[i]
    # By identity, because tied weights are one parameter under the first of their names.
    by_id = {id(parameter): stacked[name] for name, parameter in named[0].items()}
    # The memo keeps deepcopy from copying the weights, which are replaced below.
    whole = copy.deepcopy(models[0], {id(parameter): parameter for parameter in named[0].values()})
    kind: type[_Norm] | type[_Embedding] | type[_Linear]
    for name, module in list(whole.named_modules()):
        own = {key: by_id[id(parameter)] for key, parameter in module.named_parameters(recurse=False)}
        if own:
            kind = _Norm if _is_norm(module) else _Embedding if isinstance(module, nn.Embedding) else _Linear
            whole.set_submodule(name, kind(module, **own))
    return whole, stacked


def _is_norm(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_parameters(recurse=False)]
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"]


class _Linear(nn.Module):
    def __init__(self, module: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        of_each = hidden.reshape(len(self.weight), -1, hidden.shape[-1])
        out = torch.bmm(of_each, self.weight.transpose(1, 2))
        if self.bias is not None:
            out = out + self.bias[:, None].to(out.dtype)
        return out.view(*hidden.shape[:-1], -1)


class _Embedding(nn.Module):
    def __init__(self, module: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        members, size = self.weight.shape[:2]
        first_rows = torch.arange(0, members * size, size, device=ids.device)
        rows = ids.view(members, -1) + first_rows[:, None]
        return embedding(rows, self.weight.flatten(0, 1)).view(*ids.shape, -1)


class _Norm(nn.Module):
    """The models' norm with gain 1, then each model's own gain: 1 * x is x, so nothing is rounded twice."""

    def __init__(self, module: nn.Module, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.plain = weight, copy.copy(module)
        # A gain that is no parameter, so that only the stacked ones are learned.
        self.plain._parameters = {}
        self.plain.weight = torch.ones((), device=weight.device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.plain(hidden)
        of_each = normed.view(len(self.weight), -1, normed.shape[-1])
        return (of_each * self.weight[:, None]).view(normed.shape)
