"""How a mixture of experts spreads its tokens: balancing loss, load of the experts, entropy of the router."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hf_power.records.errors import UserError

MEASURES = ("aux_loss", "load_max", "load_min", "idle_experts", "router_entropy_nats")


class ExpertLoad:
    """Measures the routing of one forward pass of a GraniteMoe or Mixtral model.

    With E experts of which each token takes k, f = tokens of an expert / tokens (sums to k), p = softmax of the router's
    logits and P = mean of p over tokens, f and P for each layer::

        aux_loss             = E * sum_i mean_layers(f_i) * mean_layers(P_i)     k if the load is even
        load_max             = max over layers and experts of f_i * E / k        1 if even, at most E / k
        load_min             = min of the same                                   0: an expert without a token
        idle_experts         = number of experts without a token, all layers together
        router_entropy_nats  = mean over tokens and layers of -sum_i p_i ln p_i, at most ln E

    aux_loss is that of the model itself (Switch Transformer, arXiv:2101.03961, eq. 4 to 6, over all layers) before
    ``router_aux_loss_coef``, and is measured whether the model trains with it or not. Every token counts, padding too.
    Each process measures its own share of the batch.

    The first forward pass after `start` asks the decoder for its router logits; they leave three small sums on the
    device, which `read` copies to the host. What activation checkpointing runs again in the backward pass is not a
    pass of the decoder, so it does not count. All other passes cost two Python calls.

    Args:
        model: of transformers, not wrapped by an engine.

    Raises:
        ValueError: a model without experts.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        if getattr(config, "num_local_experts", None) is None:
            raise UserError(
                f"{type(model).__name__} has no experts whose load could be measured: pass a GraniteMoe or Mixtral model."
            )
        self.num_experts, self.top_k = int(config.num_local_experts), int(config.num_experts_per_tok)
        self._started = False
        self._sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        decoder: Any = model.base_model
        # Hooks that come after torch.compile has seen the model are ignored, so these stay and look at a flag.
        decoder.register_forward_pre_hook(self._ask, with_kwargs=True)
        decoder.register_forward_hook(self._measure)

    def start(self) -> None:
        """Measure the next forward pass."""
        self._started, self._sums = True, None

    def read(self) -> dict[str, float]:
        """The measures of the pass after `start`, each once; the only wait for the device.

        Returns:
            MEASURES -> value; nothing if `start` was not called since the last `read`.

        Raises:
            ValueError: no forward pass since `start`.
        """
        if self._sums is None:
            if self._started:
                raise UserError("there was no forward pass since start: run the model before the load is read.")
            return {}
        shares, probabilities, entropy = self._sums
        self._sums = None
        load = shares * (self.num_experts / self.top_k)
        aux_loss = self.num_experts * (shares.mean(dim=0) * probabilities.mean(dim=0)).sum()
        values = torch.stack([aux_loss, load.max(), load.min(), (load == 0).sum(), entropy.mean()]).tolist()
        return dict(zip(MEASURES, values, strict=True))

    def _ask(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, (kwargs | {"output_router_logits": True}) if self._started else kwargs

    def _measure(self, decoder: nn.Module, args: Any, output: Any) -> None:
        if not self._started:
            return
        self._started = False
        layers = [self._layer(logits.detach()) for logits in output.router_logits]
        shares, probabilities, entropy = (torch.stack(values) for values in zip(*layers, strict=True))
        self._sums = shares, probabilities, entropy

    def _layer(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of one layer's logits (tokens, experts): f (experts), P (experts), entropy ()."""
        log_p = logits.float().log_softmax(dim=-1)
        p = log_p.exp()
        chosen = torch.zeros_like(p).scatter_(1, logits.topk(self.top_k, dim=-1).indices, 1.0)
        return chosen.mean(dim=0), p.mean(dim=0), -(p * log_p).sum(dim=-1).mean()


class MeasureExperts(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Starts the measurement in the first micro-batch of each step that the Trainer will log.

    A callback sees the logs too late to add to them for every tracker, so the Trainer's ``log`` takes ``load.read()``.

    Args:
        load: of the model that is trained.
    """

    def __init__(self, load: ExpertLoad) -> None:
        self.load = load

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start if the step that begins ends in a log."""
        step = state.global_step + 1
        every = args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
        if every or (step == 1 and args.logging_first_step):
            self.load.start()
