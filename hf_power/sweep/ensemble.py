"""Small models of one shape trained side by side: the same parts as in pretraining, many learning rates at once."""

import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_power.models import block_losses, is_stock_block, num_experts
from hf_power.mup.optimizer import optimizer_of
from hf_power.pretrain.speed import attend_to_blocks_
from hf_power.records.errors import UserError
from hf_power.settings.settings import Settings, build_model
from hf_power.sweep.stacked import BlocksOfSeeds, SweepData, can_be_stacked, members_together, stack

# Up to this batch a step on a CPU is mostly calls, and batching the members' calls pays (benchmarks/sweep_engine.py).
BATCHED_CPU_TOKENS = 256
# On CUDA, before the step is captured: the optimizers make their state in them, which a graph cannot.
EAGER_STEPS = 3
# Steps between looks at whether a loss is finite, since each look waits for the device.
CHECK_EVERY = 20
# Held-out blocks in one forward pass of one model.
EVAL_BLOCKS = 32
# Steps whose mean is a row's training loss.
LAST_LOSSES = 20


class Member(NamedTuple):
    """A model of an ensemble: the base learning rate eta_max, which the schedule's factors multiply, and its seed."""

    learning_rate: float
    seed: int


class Stack(NamedTuple):
    """Some of the members, the model that computes them as one, and its weights by the name of theirs."""

    members: slice
    whole: PreTrainedModel
    weights: dict[str, nn.Parameter]


Moments = dict[int, dict[str, torch.Tensor]]


class MemberState(TypedDict):
    """Weights by name, and the optimizer's moments by the index of the parameter."""

    weights: dict[str, torch.Tensor]
    moments: Moments


class State(TypedDict):
    """All that the next step of an ensemble depends on; `torch.load` reads it with weights_only."""

    position: int
    alive: list[bool]
    last_losses: list[torch.Tensor]
    members: list[MemberState]


class Ensemble:
    """Models that take their optimizer steps together, each on its own data, learning rate and seed.

    Every member is what pretraining would build: the model of its config after `set_seed`, AdamW over muP's groups,
    clipping by its own norm, blocks in its seed's order. Batched, members are computed as one model
    (`hf_power.sweep.stacked.stack`), on an accelerator as many at once as fill it; otherwise one after another. On CUDA
    the whole step of all members is captured in a graph after EAGER_STEPS steps and replayed, because small models are
    bound by the calls and not by the device.

    Args:
        settings: what the members share: shape, muP, batch, and the optimizer but for its learning rate.
        members: their learning rates and seeds.
        data: see `SweepData`.
        device: where to train.
        batched: None for the faster way on this device.

    Attributes:
        position: optimizer steps taken.
        alive: per member, whether its loss has been finite so far.
        num_sequences: blocks of one member in an optimizer step.

    Raises:
        UserError: batched, but there is no stacked form of the models.
    """

    _graph: torch.cuda.CUDAGraph | None
    _eager_steps: int

    def __init__(
        self,
        settings: Settings,
        members: Sequence[Member],
        data: SweepData,
        *,
        device: torch.device,
        batched: bool | None = None,
    ) -> None:
        args, self.device = settings.training, device
        self.num_sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.block_size = len(data.blocks[0]["input_ids"])
        self.held_out = torch.from_numpy(np.stack([row["input_ids"] for row in data.held_out])).long().to(device)
        self.max_grad_norm, self._bf16 = args.max_grad_norm, bool(args.bf16)
        self.models = [self._build(settings, data.tokenizer, member.seed) for member in members]
        self._stacks = self._stacked(batched)
        self.batched = bool(self._stacks)
        self._named = [dict(model.named_parameters()) for model in self.models]
        factory, kwargs = optimizer_of(args)
        self.optimizers = [
            factory()(model, **kwargs | {"lr": member.learning_rate})
            for model, member in zip(self.models, members, strict=True)
        ]
        # In fp64, so that a rate is the very number that the Trainer's scheduler gives its optimizer.
        rates = [[float(group["lr"]) for group in opt.param_groups] for opt in self.optimizers]
        self._base_lrs = torch.tensor(rates, dtype=torch.float64)
        # A graph holds the kernels of fixed tensors; experts decide on the host how much there is to compute.
        # So may the masks of attention that is not known to need none.
        config = self.models[0].config
        self._captures = device.type == "cuda" and not num_experts(config) and is_stock_block(config)
        self._device_lrs = self._base_lrs.float().to(device)
        self._forget_graph()
        self._blocks = BlocksOfSeeds(data, [member.seed for member in members], self.num_sequences, device)
        self.position = 0
        self.alive = [True] * len(self.models)
        self.last_losses: deque[torch.Tensor] = deque(maxlen=LAST_LOSSES)

    def _build(self, settings: Settings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
        set_seed(seed)
        model: PreTrainedModel = attend_to_blocks_(build_model(settings, tokenizer)).train()
        nn.Module.to(model, self.device)
        model.config.use_cache = False
        return model

    def _stacked(self, batched: bool | None) -> list[Stack]:
        """The stacks of all members, or none where they are computed one by one."""
        stackable = can_be_stacked(self.models[0])
        if batched and not stackable:
            raise UserError(
                f"{type(self.models[0]).__name__} cannot be stacked (experts, an embedding with a padding token, or a family or "
                "attention whose stacked form is not known): leave batched at None, and its members are trained one after another."
            )
        if batched is None:
            few_tokens = self.num_sequences * self.block_size <= BATCHED_CPU_TOKENS
            batched = stackable and (self.device.type != "cpu" or few_tokens)
        count, shape = len(self.models), (self.num_sequences, self.block_size)
        config = self.models[0].config
        together = members_together(count, config, shape, self._bf16, self.device) if batched else 1
        if together == 1:
            return []
        parts = [slice(first, first + together) for first in range(0, len(self.models), together)]
        return [Stack(members, *stack(self.models[members])) for members in parts]

    def step(self, factors: Sequence[float] | np.ndarray) -> None:
        """One optimizer step of every member, at factor times its base learning rates."""
        batch = self._blocks.at(self.position)
        rates = self._base_lrs * torch.as_tensor(np.asarray(factors, dtype=np.float64))[:, None]
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
            # A graph computes what it has captured, so that there a member that is not alive goes on with NaN.
            if not alive and not self._captures:
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
        stacks = self._stacks or [Stack(slice(i, i + 1), model, {}) for i, model in enumerate(self.models)]
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
    def state(self) -> State:
        """A copy of all that the next step depends on."""
        members: list[MemberState] = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
            moments = _copied(optimizer.state_dict()["state"])
            members.append({"weights": weights, "moments": moments})
        return {
            "position": self.position,
            "alive": list(self.alive),
            "last_losses": [loss.clone() for loss in self.last_losses],
            "members": members,
        }

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Go back, or on, to a state of the same ensemble."""
        self.position, self.alive = int(state["position"]), list(state["alive"])
        self.last_losses = deque((loss.clone() for loss in state["last_losses"]), maxlen=LAST_LOSSES)
        for model, optimizer, member in zip(self.models, self.optimizers, state["members"], strict=True):
            for name, parameter in model.named_parameters():
                parameter.copy_(member["weights"][name])
            optimizer.load_state_dict(
                {"state": _copied(member["moments"]), "param_groups": optimizer.state_dict()["param_groups"]}
            )
        self._forget_graph()


def _copied(moments: Moments) -> Moments:
    """Moments in tensors of their own: an optimizer goes on in those that it is given."""
    return {
        index: {name: value.clone() if torch.is_tensor(value) else value for name, value in of_one.items()}
        for index, of_one in moments.items()
    }
