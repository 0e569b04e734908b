"""Small models of one shape trained side by side: the same parts as in pretraining, many learning rates at once."""

import math
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import get_scheduler, set_seed

from hf_power import data as hf_data
from hf_power.evaluate import block_losses
from hf_power.mup import MupAdamW
from hf_power.schedule import found_tokens_per_step
from hf_power.settings import Settings
from hf_power.train import build_model

# Up to this batch a step on a CPU is mostly calls, and batching the members' calls pays (benchmarks/sweep_engine.py).
BATCHED_CPU_TOKENS = 256
CHECK_EVERY = 20  # steps between looks at whether a loss is finite: each look waits for the device
EVAL_BLOCKS = 32  # held-out blocks in one forward pass
READ_STEPS = 32  # steps whose blocks are read at once
LAST_LOSSES = 20  # steps whose mean is a row's training loss


def rate_factors(settings: Settings, tokens_per_step: int, steps: int) -> np.ndarray:
    """eta(step) / eta_max of the schedule in the settings, shape (steps,), from the scheduler that the Trainer makes."""
    args = settings.training
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    token = found_tokens_per_step.set(tokens_per_step)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cap that binds shows in the rows
            scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                num_warmup_steps=args.get_warmup_steps(steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
            )
    finally:
        found_tokens_per_step.reset(token)
    factors = np.empty(steps)
    for step in range(steps):
        factors[step] = optimizer.param_groups[0]["lr"] / args.learning_rate
        optimizer.step()
        scheduler.step()
    return factors


class Ensemble:
    """Models that take their optimizer steps together, each on its own data, learning rate and seed.

    Every member is what pretraining would build: `build_model` after `set_seed`, AdamW over muP's groups, clipping by
    its own norm, blocks in its seed's order. Batched, the members' weights are slices of stacked tensors and one call
    of the forward and backward pass serves all (torch.func.vmap); otherwise they run one after another.

    Args:
        members: settings of one shape and batch; they may differ in training's learning rate, schedule and seed.
        tokenizer: of the data.
        blocks: packed training blocks.
        held_out: packed held-out blocks.
        num_sequences: blocks per optimizer step.
        device: where to train.
        batched: None for the faster way on this device.

    Attributes:
        position: optimizer steps taken.
        alive: per member, whether its loss has been finite so far.
    """

    def __init__(
        self,
        members: Sequence[Settings],
        tokenizer: Any,
        blocks: Any,
        held_out: Any,
        *,
        num_sequences: int,
        device: torch.device,
        batched: bool | None = None,
    ) -> None:
        self.num_sequences, self.device = num_sequences, device
        self.block_size = len(blocks[0]["input_ids"])
        self.held_out = torch.from_numpy(np.stack([row["input_ids"] for row in held_out])).long().to(device)
        args = members[0].training
        self.max_grad_norm, self._bf16 = args.max_grad_norm, bool(args.bf16)
        self.models: list[Any] = []
        for member in members:
            set_seed(member.training.seed)
            model = build_model(member, tokenizer).to(device).train()
            model.config.use_cache = False
            self.models.append(model)
        if batched is None:
            batched = device.type != "cpu" or num_sequences * self.block_size <= BATCHED_CPU_TOKENS
            batched = batched and self.models[0].config.model_type == "granite"
        self.batched = batched and len(self.models) > 1
        self._stacked = self._stack() if self.batched else {}
        factory, kwargs = MupAdamW.for_trainer(args)
        self.optimizers = [
            factory()(model, **kwargs | {"lr": member.training.learning_rate})
            for model, member in zip(self.models, members, strict=True)
        ]
        self._base_lrs = [[float(group["lr"]) for group in opt.param_groups] for opt in self.optimizers]
        stop = np.iinfo(np.int64).max  # the order is endless
        self._seeds = [int(member.training.seed) for member in members]
        self._streams = {s: hf_data.BlockStream(blocks, seed=s, start=0, stop=stop) for s in self._seeds}
        self._read: dict[int, torch.Tensor] = {}
        self._read_at = -READ_STEPS
        self.position = 0
        self.alive = [True] * len(self.models)
        self.last_losses: deque[torch.Tensor] = deque(maxlen=LAST_LOSSES)

    def _stack(self) -> dict[str, torch.Tensor]:
        """Move the weights of all members into stacked tensors, of which their parameters become slices."""
        named = [dict(model.named_parameters()) for model in self.models]
        stacked = {}
        for name in named[0]:
            stacked[name] = torch.stack([parameters[name].detach() for parameters in named]).requires_grad_()
            for i, parameters in enumerate(named):
                parameters[name].data = stacked[name].data[i]
        self._named = named
        return stacked

    def step(self, factors: Sequence[float] | np.ndarray) -> None:
        """One optimizer step of every member, at factor times its base learning rates."""
        batch = self._batch()
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext():
            losses = self._batched_losses(batch) if self.batched else self._losses_one_by_one(batch)
        for i, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            if not self.alive[i]:
                continue
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
            for group, base in zip(optimizer.param_groups, self._base_lrs[i], strict=True):
                group["lr"] = base * factors[i]
            optimizer.step()
            optimizer.zero_grad()
        self.last_losses.append(losses)
        self.position += 1
        if self.position % CHECK_EVERY == 0:
            self.check_alive()

    def check_alive(self) -> None:
        """Take members out whose loss is not finite."""
        if self.last_losses:
            finite = torch.stack(tuple(self.last_losses)).isfinite().all(dim=0).tolist()
            self.alive = [alive and ok for alive, ok in zip(self.alive, finite, strict=True)]

    def _batch(self) -> torch.Tensor:
        """Token ids of every member's next blocks, shape (members, num_sequences, block_size)."""
        if not self._read_at <= self.position < self._read_at + READ_STEPS:
            self._read_at = self.position
            first = self.position * self.num_sequences
            wanted = range(first, first + READ_STEPS * self.num_sequences)
            for seed, stream in self._streams.items():
                read = np.stack([row["input_ids"] for row in stream.__getitems__(wanted)])
                blocks = torch.from_numpy(read).long().to(self.device)
                self._read[seed] = blocks.view(READ_STEPS, self.num_sequences, self.block_size)
        return torch.stack([self._read[seed][self.position - self._read_at] for seed in self._seeds])

    def _losses_one_by_one(self, batch: torch.Tensor) -> torch.Tensor:
        losses = torch.full((len(self.models),), math.nan, device=self.device)
        for i, model in enumerate(self.models):
            if self.alive[i]:
                loss = model(input_ids=batch[i], labels=batch[i]).loss
                loss.backward()
                losses[i] = loss.detach()
        return losses

    def _batched_losses(self, batch: torch.Tensor) -> torch.Tensor:
        for tensor in self._stacked.values():
            tensor.grad = None
        # The fused attention kernels have no batching rule.
        with sdpa_kernel(SDPBackend.MATH):
            losses: torch.Tensor = vmap(self._loss)(self._stacked, batch)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        for name, tensor in self._stacked.items():
            for i, parameters in enumerate(self._named):
                parameters[name].grad = None if tensor.grad is None else tensor.grad[i]
        return losses.detach()

    def _loss(self, parameters: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
        output: Any = functional_call(self.models[0], parameters, kwargs={"input_ids": input_ids, "labels": input_ids})
        loss: torch.Tensor = output.loss
        return loss

    @torch.no_grad()
    def held_out_losses(self) -> list[float]:
        """Held-out loss of every member in nats per token, of the text alone; nan for one that is not alive."""
        self.check_alive()
        losses = []
        for model, alive in zip(self.models, self.alive, strict=True):
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for blocks in torch.split(self.held_out, EVAL_BLOCKS) if alive else ():
                with torch.autocast(self.device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext():
                    total += block_losses(model, blocks).double().sum()
            losses.append(float(total) / len(self.held_out) if alive else math.nan)
        return losses

    def train_losses(self) -> list[float]:
        """Mean training loss of every member over the last steps."""
        return [float(loss) for loss in torch.stack(tuple(self.last_losses)).double().mean(dim=0)]

    @torch.no_grad()
    def state(self) -> dict[str, Any]:
        """A copy of all that the next step depends on."""
        members = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            moments = {
                i: {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
                for i, state in optimizer.state_dict()["state"].items()
            }
            weights = {name: p.detach().clone() for name, p in model.named_parameters()}
            members.append({"weights": weights, "moments": moments})
        return {
            "position": self.position,
            "alive": list(self.alive),
            "last_losses": [loss.clone() for loss in self.last_losses],
            "members": members,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Go back, or on, to a state of the same ensemble."""
        self.position, self.alive = int(state["position"]), list(state["alive"])
        self.last_losses = deque((loss.clone() for loss in state["last_losses"]), maxlen=LAST_LOSSES)
        for model, optimizer, member in zip(self.models, self.optimizers, state["members"], strict=True):
            for name, parameter in model.named_parameters():
                parameter.copy_(member["weights"][name])
            moments = {
                i: {k: v.clone() if torch.is_tensor(v) else v for k, v in s.items()}
                for i, s in member["moments"].items()
            }
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
