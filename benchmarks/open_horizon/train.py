"""Many small models of one shape trained as one: trunks that are finished at several horizons by a tail or by averaging."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import set_seed

from hf_power.checkpoints.average import shares
from hf_power.models import block_losses
from hf_power.mup.optimizer import factors_of
from hf_power.pretrain.speed import attend_to_blocks_
from hf_power.schedule import DECAY_SHAPES, power_lr
from hf_power.settings.settings import build_model
from hf_power.sweep.ensemble import EAGER_STEPS
from hf_power.sweep.stacked import BATCHED_TOKENS, BlocksOfSeeds, stack

# Blocks of one member in one pass on a CPU: larger batches are accumulated, so that one compiled function serves them all.
PASS_BLOCKS = 8
TAIL, TAIL_SHAPE = 0.2, "1-sqrt"
# An average takes this many weights in a horizon's whole length, so a window of .2 has a fifth of them.
SAMPLES = 128


@dataclass(frozen=True)
class Trunk:
    """The learning rate of a member: min(cap, a * beta**c * n**b) after a warmup, a constant where b is 0; or linear to zero.

    linear_from is the tokens at which a line reaches zero, from the rate at the end of the warmup.
    """

    method: str
    a: float
    b: float = 0.0
    c: float = 0.0
    cap: float = math.inf
    warmup_tokens: int = 8192
    linear_to: int | None = None

    def rates(self, batch, steps):
        """The learning rate of each step, as hf_power's and the stock schedules count them: by the tokens before it."""
        if self.linear_to is not None:
            n = np.arange(steps) * batch
            line = np.maximum(0.0, (self.linear_to - n) / (self.linear_to - self.warmup_tokens))
            return self.a * np.minimum(n / self.warmup_tokens, line)
        if self.b == 0:
            return min(self.cap, self.a) * np.minimum(1.0, np.arange(steps) * batch / self.warmup_tokens)
        kwargs = {"tokens_per_step": batch, "max_lr": self.cap, "a": self.a, "b": self.b, "batch_exponent": self.c}
        kwargs["warmup_tokens"] = self.warmup_tokens
        return np.array([power_lr(step * batch, **kwargs) for step in range(steps)])


@dataclass(frozen=True)
class Average:
    """A mean of the weights of the last part of a horizon, the window, with the shares of `hf_power.checkpoints.average`."""

    window: float
    kind: str = "uniform"  # or ema, whose half-life is a quarter of the window, or decay
    shape: str = "linear"  # of the tail that decay emulates

    @property
    def name(self):
        kind = {"uniform": "average", "decay": f"as {self.shape}"}.get(self.kind, self.kind)
        return f"{kind} {self.window:g}"

    def shares_at(self, end):
        """Step -> share of the weights after it, of a horizon that ends after `end` steps."""
        every = max(1, end // SAMPLES)
        steps = [n for n in range(1, end + 1) if n > end * (1 - self.window) and (end - n) % every == 0]
        return dict(zip(steps, shares(self.kind, steps, self.shape), strict=True))


class Models:
    """M models, each what pretraining would build and feed for its seed, computed as one and updated by AdamW as one.

    Losses and update are compiled, which needs a C++ compiler, or on CUDA a step is captured in a graph and replayed, as the
    sweep's engine does.
    """

    def __init__(self, settings, seeds, data, schedule_free=False, device="cpu", compiles=True):
        args, self.device = settings.training, torch.device(device)
        self.batch_blocks = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.bf16, self.graph = bool(args.bf16), None
        models = []
        for seed in seeds:
            set_seed(seed)
            models.append(attend_to_blocks_(build_model(settings, data.tokenizer)).train().to(self.device))
            models[-1].config.use_cache = False
        factors = factors_of(models[0])
        self.whole, stacked = stack(models)
        self.names, self.weights = list(stacked), [tensor.data for tensor in stacked.values()]
        self.leaves = list(stacked.values())
        own = [factors[name] for name in self.names]
        self.numbers = {
            "lr": [1 / each.lr for each in own],
            "decay": [0.0 if each.weight_decay is None else args.weight_decay * each.weight_decay for each in own],
            "eps": [args.adam_epsilon / each.eps for each in own],
            "betas": (args.adam_beta1, args.adam_beta2),
            "clip": args.max_grad_norm,
        }
        # AdamW: first and second moments. Schedule-free AdamW: the points z, and the second moments.
        self.first = [tensor.clone() if schedule_free else torch.zeros_like(tensor) for tensor in self.weights]
        self.second = [torch.zeros_like(tensor) for tensor in self.weights]
        self.average = [tensor.clone() for tensor in self.weights] if schedule_free else None
        self.weight_sum = torch.zeros(len(models))
        self.blocks = BlocksOfSeeds(data, list(seeds), self.batch_blocks, self.device)
        self.held_out = torch.from_numpy(np.stack([row["input_ids"] for row in data.held_out])).long().to(self.device)
        self.step_number, self.num_members = 0, len(models)
        self.pass_blocks = self._pass_blocks(self.held_out.shape[1])
        self.losses = lambda blocks: block_losses(self.whole, blocks)
        self.update = _adamw if self.average is None else _schedule_free
        if compiles:
            self.losses = torch.compile(self.losses, dynamic=False)
            self.update = torch.compile(self.update, dynamic=False)

    def _pass_blocks(self, block_size):
        """Blocks of one member in one pass, a divisor of the batch's."""
        most = PASS_BLOCKS
        if self.device.type == "cuda":
            most = max(1, BATCHED_TOKENS // (self.num_members * block_size))
        return max(n for n in range(1, min(most, self.batch_blocks) + 1) if self.batch_blocks % n == 0)

    def _block_losses(self, blocks):
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext():
            return self.losses(blocks).view(self.num_members, -1)

    def step(self, rates):
        """One optimizer step of each member at its own learning rate; the mean training losses."""
        batch = self.blocks.at(self.step_number)
        self.step_number += 1
        lr = torch.as_tensor(rates, dtype=torch.float32)
        beta1, beta2 = self.numbers["betas"]
        corrections = torch.tensor([1 - beta1**self.step_number, 1 - beta2**self.step_number])
        # The weight of a step in schedule-free's average is its squared rate (arXiv:2405.15682, the package's default).
        self.weight_sum += lr**2
        share = torch.where(self.weight_sum > 0, lr**2 / self.weight_sum.clamp(min=1e-30), torch.ones(()))
        inputs = [batch, *(each.to(self.device) for each in (lr, corrections, share))]
        return self._take(*inputs) if self.device.type == "cpu" else self._replayed(inputs)

    def _replayed(self, inputs):
        """`_take` by its graph, after a few steps without one."""
        if self.graph is None:
            if self.step_number <= EAGER_STEPS:
                return self._take(*inputs)
            graph, self.inputs = torch.cuda.CUDAGraph(), [each.clone() for each in inputs]
            with torch.cuda.graph(graph):
                self.output = self._take(*self.inputs)
            self.graph = graph
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.output.clone()

    def _take(self, batch, lr, corrections, share):
        for leaf in self.leaves:
            leaf.grad = None
        total = torch.zeros(self.num_members, device=self.device)
        for first in range(0, self.batch_blocks, self.pass_blocks):
            part = batch[:, first : first + self.pass_blocks].flatten(0, 1).contiguous()
            of_members = self._block_losses(part).sum(1) / self.batch_blocks
            of_members.sum().backward()
            total += of_members.detach()
        state = self.weights, [leaf.grad for leaf in self.leaves], self.first, self.second
        with torch.no_grad():
            if self.average is None:
                self.update(*state, lr, corrections, self.numbers)
            else:
                self.update(*state, self.average, lr, share, corrections[1], self.numbers)
        return total

    def state(self):
        """What the next step depends on, but for schedule-free's."""
        return self.step_number, *([t.clone() for t in each] for each in (self.weights, self.first, self.second))

    def restore(self, state):
        """Go back to a state."""
        self.step_number = state[0]
        for mine, theirs in zip((self.weights, self.first, self.second), state[1:], strict=True):
            for tensor, value in zip(mine, theirs, strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def held_out_losses(self, weights=None):
        """Held-out loss of each member in nats per token, at its weights or at others."""
        kept = [tensor.clone() for tensor in self.weights]
        if weights is not None:
            for mine, other in zip(self.weights, weights, strict=True):
                mine.copy_(other)
        total = torch.zeros(self.num_members, dtype=torch.float64, device=self.device)
        # As in training in shape, so that nothing is compiled twice but for the missing gradients.
        usable = len(self.held_out) // self.pass_blocks * self.pass_blocks
        for blocks in torch.split(self.held_out[:usable], self.pass_blocks):
            total += self._block_losses(blocks.repeat(self.num_members, 1)).double().sum(1)
        for mine, own in zip(self.weights, kept, strict=True):
            mine.copy_(own)
        means = (total / usable).tolist()
        return [loss if math.isfinite(loss) else math.inf for loss in means]


def _clipped(grads, clip):
    norms = sum(grad.flatten(1).square().sum(1) for grad in grads).sqrt()
    scale = (clip / (norms + 1e-6)).clamp(max=1.0)
    return [grad * _wide(scale, grad) for grad in grads]


def _wide(of_members, like):
    return of_members.view(-1, *[1] * (like.dim() - 1))


def _adamw(weights, grads, first, second, lr, corrections, numbers):
    beta1, beta2 = numbers["betas"]
    for i, (w, g) in enumerate(zip(weights, _clipped(grads, numbers["clip"]), strict=True)):
        rate = _wide(lr * numbers["lr"][i], w)
        first[i].lerp_(g, 1 - beta1)
        second[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        w.mul_(1 - rate * numbers["decay"][i])
        w.sub_(rate / corrections[0] * first[i] / (second[i].sqrt() / corrections[1].sqrt() + numbers["eps"][i]))


def _schedule_free(weights, grads, points, second, average, lr, share, correction, numbers):
    """Y = weights, where gradients are taken; z = points; x = average (Defazio et al. 2024, arXiv:2405.15682, AdamW)."""
    beta1, beta2 = numbers["betas"]
    for i, (y, g) in enumerate(zip(weights, _clipped(grads, numbers["clip"]), strict=True)):
        rate, c = _wide(lr * numbers["lr"][i], y), _wide(share, y)
        second[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        direction = g / (second[i].div(correction).sqrt() + numbers["eps"][i]) + numbers["decay"][i] * y
        points[i].sub_(rate * direction)
        average[i].lerp_(points[i], c)
        y.copy_(points[i].lerp(average[i], beta1))


def train(models, trunks, batch, horizons, averages=(), tails=(TAIL,)):
    """Losses of every member at every horizon: {(horizon, finish): losses}, finish in raw, tail, average .2, ..., free.

    Up to the longest horizon the members follow their trunks; at each horizon's own tails they leave it, are measured, and come
    back. `averages` are of the last weights without a tail. A tail of another length than TAIL is named with its own.
    """
    longest = max(horizons) // batch
    rates = np.stack([trunk.rates(batch, longest) for trunk in trunks])
    ends = {horizon // batch: horizon for horizon in horizons}
    plain = models.average is None and any(trunk.linear_to is None for trunk in trunks)
    branches = [(end - round(part * end), end, part) for end in ends for part in tails if plain]
    parts = {(end, each): each.shares_at(end) for end in ends for each in averages if plain}
    sums, found = {}, {}
    for step in range(longest + 1):
        for first, end, part in branches:
            if step == first:
                name = "tail" if part == TAIL else f"tail {part:g}"
                found[ends[end], name] = _tail(models, rates[:, step], end)
        for key, of_step in parts.items():
            if step in of_step:
                sums[key] = _added(sums.get(key), models.weights, of_step[step])
        if step in ends:
            horizon = ends[step]
            if models.average is not None:
                found[horizon, "free"] = models.held_out_losses(models.average)
            else:
                found[horizon, "raw"] = models.held_out_losses()
            for end, each in [key for key in sums if key[0] == step]:
                found[horizon, each.name] = models.held_out_losses(sums.pop((end, each)))
        if step < longest:
            models.step(rates[:, step])
    return found


def _tail(models, before, end):
    """Losses after a tail that goes to zero at the end, from the rates where it begins; the models come back to where they were."""
    state, first = models.state(), models.step_number
    for step in range(first, end):
        models.step(before * DECAY_SHAPES[TAIL_SHAPE]((step - first) / (end - first)))
    losses = models.held_out_losses()
    models.restore(state)
    return losses


def _added(total, weights, share):
    if total is None:
        return [tensor * share for tensor in weights]
    for mine, other in zip(total, weights, strict=True):
        mine.add_(other, alpha=share)
    return total
