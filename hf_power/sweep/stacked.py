"""Models of one shape computed as one: their weights in stacked tensors, their batches one after another."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding


def can_be_stacked(model: nn.Module) -> bool:
    """Whether `stack` has a form for every weight of a model: linear layers, embeddings without padding, norms."""
    return all(
        _is_norm(module)
        or isinstance(module, nn.Linear)
        or (isinstance(module, nn.Embedding) and module.padding_idx is None)
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    )


def stack(models: Sequence[Any]) -> tuple[Any, dict[str, nn.Parameter]]:
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
    by_id = {id(parameter): stacked[name] for name, parameter in named[0].items()}  # tied weights have one name
    whole = copy.deepcopy(models[0], {id(parameter): parameter for parameter in named[0].values()})
    kind: type[nn.Module]
    for name, module in list(whole.named_modules()):
        own: dict[str, Any] = {key: by_id[id(parameter)] for key, parameter in module.named_parameters(recurse=False)}
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
        self.plain._parameters = {}
        self.plain.weight = torch.ones((), device=weight.device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.plain(hidden)
        of_each = normed.view(len(self.weight), -1, normed.shape[-1])
        return (of_each * self.weight[:, None]).view(normed.shape)
