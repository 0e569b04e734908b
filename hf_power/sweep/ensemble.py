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
from transformers import get_scheduler, set_seed

from hf_power.data import blocks as hf_data
from hf_power.evaluate.heldout import block_losses
from hf_power.mup import MupAdamW
from hf_power.plan.footprint import activation_bytes
from hf_power.pretrain.run import build_model
from hf_power.pretrain.speed import attend_to_blocks_
from hf_power.records.errors import UserError
from hf_power.schedule import found_tokens_per_step
from hf_power.settings.settings import Settings
from hf_power.sweep.stacked import can_be_stacked, stack

# Up to this batch a step on a CPU is mostly calls, and batching the members' calls pays (benchmarks/sweep_engine.py).
BATCHED_CPU_TOKENS = 256
# On an accelerator more tokens in one call than these gain nothing, and their activations may take this share of its memory.
BATCHED_TOKENS = 2**16
ACTIVATIONS_SHARE = 0.4
EAGER_STEPS = 3  # on CUDA, before the step is captured
CHECK_EVERY = 20  # steps between looks at whether a loss is finite: each look waits for the device
EVAL_BLOCKS = 32  # held-out blocks in one forward pass of one model
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
    its own norm, blocks in its seed's order. Batched, members are computed as one model (`hf_power.sweep.stacked.stack`), on an
    accelerator as many at once as fill it; otherwise one after another. On CUDA the whole step of all members is
    captured in a graph after EAGER_STEPS steps and replayed: small models are bound by the calls, not by the device.

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

    Raises:
        ValueError: batched, but there is no stacked form of the models.
    """

    _graph: torch.cuda.CUDAGraph | None
    _eager_steps: int

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
            model = attend_to_blocks_(build_model(member, tokenizer)).to(device).train()
            model.config.use_cache = False
            self.models.append(model)
        self._stacks = self._stacked(batched)
        self.batched = bool(self._stacks)
        self._named = [dict(model.named_parameters()) for model in self.models]
        factory, kwargs = MupAdamW.for_trainer(args)
        self.optimizers = [
            factory()(model, **kwargs | {"lr": member.training.learning_rate})
            for model, member in zip(self.models, members, strict=True)
        ]
        rates = [[float(group["lr"]) for group in opt.param_groups] for opt in self.optimizers]
        self._base_lrs = torch.tensor(rates, dtype=torch.float64)
        # A graph holds the kernels of fixed tensors; experts decide on the host how much there is to compute.
        self._captures = device.type == "cuda" and getattr(self.models[0].config, "num_local_experts", None) is None
        self._device_lrs = self._base_lrs.float().to(device)
        self._forget_graph()
        stop = np.iinfo(np.int64).max  # the order is endless
        self._seeds = [int(member.training.seed) for member in members]
        self._streams = {s: hf_data.BlockStream(blocks, seed=s, start=0, stop=stop) for s in self._seeds}
        self._read: dict[int, torch.Tensor] = {}
        self._read_at = -READ_STEPS
        self.position = 0
        self.alive = [True] * len(self.models)
        self.last_losses: deque[torch.Tensor] = deque(maxlen=LAST_LOSSES)

    def _stacked(self, batched: bool | None) -> list[tuple[slice, Any, dict[str, nn.Parameter]]]:
        """The members that are computed as one, the model that computes them, and its weights; [] for one by one."""
        stackable = can_be_stacked(self.models[0])
        if batched and not stackable:
            raise UserError(
                f"{type(self.models[0]).__name__} has weights that cannot be stacked (experts, or an embedding with a padding "
                "token): leave batched at None, and its members are trained one after another."
            )
        if batched is None:
            few_tokens = self.num_sequences * self.block_size <= BATCHED_CPU_TOKENS
            batched = stackable and (self.device.type != "cpu" or few_tokens)
        together = self._members_together() if batched else 1
        if together == 1:
            return []
        parts = [slice(first, first + together) for first in range(0, len(self.models), together)]
        return [(members, *stack(self.models[members])) for members in parts]

    def _members_together(self) -> int:
        """Members of one stack: all on a CPU; on an accelerator as many as fill it, and as its memory holds."""
        count = len(self.models)
        if self.device.type == "cpu":
            return count
        tokens = self.num_sequences * self.block_size
        activations = activation_bytes(
            self.models[0].config,
            block_size=self.block_size,
            batch_size=self.num_sequences,
            compute="autocast" if self._bf16 else "fp32",
            activation_checkpointing=False,
        )
        memory = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 2**33
        fitting = int(ACTIVATIONS_SHARE * memory / activations["peak"])
        return max(1, min(count, math.ceil(BATCHED_TOKENS / tokens), fitting))

    def step(self, factors: Sequence[float] | np.ndarray) -> None:
        """One optimizer step of every member, at factor times its base learning rates."""
        batch, rates = self._batch(), self._base_lrs * torch.as_tensor(np.asarray(factors, dtype=np.float64))[:, None]
        if self._captures:
            self._device_lrs.copy_(rates.float(), non_blocking=True)
            losses = self._replayed(batch)
        else:
            for optimizer, rates_of in zip(self.optimizers, rates.tolist(), strict=True):
                for group, rate in zip(optimizer.param_groups, rates_of, strict=True):
                    group["lr"] = rate
            losses = self._update(batch)
        self.last_losses.append(losses)
        self.position += 1
        if self.position % CHECK_EVERY == 0:
            self.check_alive()

    def _update(self, batch: torch.Tensor) -> torch.Tensor:
        """Gradients, clipping and the optimizers' steps; the losses, shape (members)."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext():
            losses = self._batched_losses(batch) if self.batched else self._losses_one_by_one(batch)
        for alive, model, optimizer in zip(self.alive, self.models, self.optimizers, strict=True):
            if not alive and not self._captures:  # in a graph it goes on, and stays what it is
                continue
            if self.max_grad_norm:
                nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def _replayed(self, batch: torch.Tensor) -> torch.Tensor:
        """`_update` by its graph; before there is one, the first steps make what a graph cannot: the optimizers' state."""
        if self._graph is None:
            if self._eager_steps < EAGER_STEPS:
                self._eager_steps += 1
                return self._update(batch)
            graph, self._graph_batch = torch.cuda.CUDAGraph(), batch.clone()
            with torch.cuda.graph(graph):
                self._graph_losses = self._update(self._graph_batch)
            self._graph = graph
        self._graph_batch.copy_(batch)
        self._graph.replay()
        return self._graph_losses.clone()

    def _forget_graph(self) -> None:
        """The next steps are eager again: the tensors of the last graph are no longer those of the optimizers."""
        self._graph, self._eager_steps = None, 0
        for i, optimizer in enumerate(self.optimizers) if self._captures else ():
            for j, group in enumerate(optimizer.param_groups):
                group["lr"], group["capturable"] = self._device_lrs[i, j], True

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
            if self.alive[i] or self._captures:
                loss = model(input_ids=batch[i], labels=batch[i]).loss
                loss.backward()
                losses[i] = loss.detach()
        return losses

    def _batched_losses(self, batch: torch.Tensor) -> torch.Tensor:
        losses = []
        for members, whole, stacked in self._stacks:
            for tensor in stacked.values():
                tensor.grad = None
            blocks = block_losses(whole, batch[members].flatten(0, 1))
            of_members = blocks.view(-1, self.num_sequences).mean(dim=1)
            of_members.sum().backward()  # type: ignore[no-untyped-call]
            losses.append(of_members.detach())
            for name, tensor in stacked.items():
                for i, parameters in enumerate(self._named[members]):
                    parameters[name].grad = None if tensor.grad is None else tensor.grad[i]
        return torch.cat(losses)

    @torch.no_grad()
    def held_out_losses(self) -> list[float]:
        """Held-out loss of every member in nats per token, of the text alone; nan for one that is not alive."""
        self.check_alive()
        stacks = self._stacks or [(slice(i, i + 1), model, {}) for i, model in enumerate(self.models)]
        losses: list[float] = []
        for members, whole, _ in stacks:
            alive = self.alive[members]
            total = torch.zeros(len(alive), dtype=torch.float64, device=self.device)
            for blocks in torch.split(self.held_out, self.num_sequences if self._stacks else EVAL_BLOCKS):
                if not any(alive):
                    break
                with torch.autocast(self.device.type, dtype=torch.bfloat16) if self._bf16 else nullcontext():
                    of_blocks = block_losses(whole, blocks.repeat(len(alive), 1))
                total += of_blocks.double().view(len(alive), -1).sum(dim=1)
            means = (total / len(self.held_out)).tolist()
            losses += [mean if ok else math.nan for mean, ok in zip(means, alive, strict=True)]
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
        self._forget_graph()
