"""What the plain form of muP has to know of a model's forward pass, Probe."""

import contextlib
import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_power.records.errors import UserError, refused_by


class _StopForward(Exception):  # noqa: N818 - no error: it ends a forward pass of which the rest is not needed.
    pass


class Probe:
    """What a forward pass of two tokens shows; weights, gradients and random numbers are left as they are."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens = torch.tensor([[1, 0]], device=model.device)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Without dropout, gradients, or a trace in the random numbers."""
        was_training = self.model.training
        self.model.train(False)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), refused_by("the model's forward pass"):
                yield
        finally:
            self.model.train(was_training)

    def final_gain(self) -> str | None:
        """The name of the module with a gain whose output is the head's input; None where there is none."""
        outputs: dict[str, torch.Tensor] = {}
        inputs: list[torch.Tensor] = []
        handles = []
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.ndim == 1:
                handles.append(module.register_forward_hook(_keep_output(outputs, name)))
        head = self.model.get_output_embeddings()
        handles.append(head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
        try:
            with self._quiet():
                self.model(input_ids=self.tokens, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not inputs:
            return None
        seen = inputs[-1]
        same = {name: output for name, output in outputs.items() if output.shape == seen.shape}
        alike = [name for name, output in same.items() if torch.equal(output, seen)]
        if alike:
            return alike[-1]
        for name, output in same.items():
            if torch.nn.functional.cosine_similarity(output.flatten(), seen.flatten(), dim=0) > 0.999:
                ratio = float(seen.norm() / output.norm())
                raise UserError(
                    f"{type(self.model).__name__} multiplies what {name} puts out by {ratio:.3g} before its head, a scaling of "
                    "its own, for which the plain form of muP has no rule."
                )
        return None

    def gain(self, name: str) -> tuple[int, float]:
        """The offset, 1 where the gain of this module is 1 + weight and 0 where it is the weight, and the gain itself.

        A gain that differs between features has been trained, and begins at 1 again.
        """
        module = self.model.get_submodule(name)
        weight = cast("torch.Tensor", module.weight)
        probe = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)[None, None]
        zeros = {key: torch.zeros_like(value) for key, value in module.named_parameters()}
        with self._quiet():
            offset = int(bool(functional_call(module, zeros, (probe,)).ne(0).any()))
        return offset, weight[0].item() + offset if bool((weight == weight[0]).all()) else 1.0

    def scales_embeddings(self) -> bool:
        """Whether what enters the first block is the embedding times sqrt(hidden_size)."""
        weight = cast("torch.Tensor", self.model.get_input_embeddings().weight)
        name = next(n for n, p in self.model.named_parameters(remove_duplicate=False) if p is weight)
        rows = weight.detach()[self.tokens]
        once, twice = (self._first_input({name: weight.detach() * k}) for k in (1, 2))
        # Positions drop out of the difference, and so does all where a norm follows the embedding.
        change = (twice - once).flatten().float()
        if change.shape != rows.flatten().shape:
            raise UserError(
                f"what enters the first block of {type(self.model).__name__} is no sum with the embedding of each token, so "
                "that muP cannot tell how the model scales it."
            )
        factor = float(change @ rows.flatten().float() / rows.float().square().sum().clamp(min=1e-30))
        return math.isclose(factor, math.sqrt(self.model.config.hidden_size), rel_tol=0.02)

    def first_block(self, times: float) -> tuple[float, float] | None:
        """RMS of what enters the first block, and of what it adds, with its matrices multiplied; None where nothing tells."""
        block = _first_block(self.model)
        inside = {id(tensor) for tensor in block.parameters() if tensor.ndim > 1}
        weights = {name: p.detach() * times for name, p in self.model.named_parameters() if id(p) in inside}
        seen: list[object] = []

        def stop(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
            seen.extend(
                (args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output)
            )
            raise _StopForward

        self._run_until_stopped(block.register_forward_hook(stop, with_kwargs=True), weights)
        before, after = (each.float() if isinstance(each, torch.Tensor) else None for each in seen)
        if before is None or after is None or before.shape != after.shape:
            return None
        return float(before.square().mean().sqrt()), float((after - before).square().mean().sqrt())

    def _first_input(self, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """What enters the first block, with other weights in the place of some."""
        seen: list[torch.Tensor] = []

        def stop(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            seen.append(cast("torch.Tensor", args[0] if args else kwargs["hidden_states"]))
            raise _StopForward

        self._run_until_stopped(_first_block(self.model).register_forward_pre_hook(stop, with_kwargs=True), weights)
        return seen[-1]

    def _run_until_stopped(self, hook: RemovableHandle, weights: dict[str, torch.Tensor]) -> None:
        """A forward pass with other weights in the place of some, up to the hook, which is removed."""
        try:
            with self._quiet(), contextlib.suppress(_StopForward):
                functional_call(self.model, weights, (), {"input_ids": self.tokens, "use_cache": False})
        finally:
            hook.remove()


def _keep_output(outputs: dict[str, torch.Tensor], name: str) -> object:
    def hook(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, torch.Tensor):
            outputs[name] = output

    return hook


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's blocks: the one with most parameters among the outermost lists.

    Raises:
        UserError: a model without such a list.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of blocks, so that muP cannot tell what enters them.")
    return max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))


def _first_block(model: PreTrainedModel) -> nn.Module:
    return blocks_of(model)[0]
