"""What a sweep will cost, from a short measurement."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from hf_power.models import flops_per_token
from hf_power.settings.settings import Settings
from hf_power.sweep.aim import Aim
from hf_power.sweep.crew import parts_of
from hf_power.sweep.ensemble import EVAL_BLOCKS, Ensemble, Member
from hf_power.sweep.grid import Grid
from hf_power.sweep.jobs import Group, groups_of, job_tokens, start_jobs
from hf_power.sweep.run import aimed_schedule, stages_of, within_budget
from hf_power.sweep.stacked import can_be_stacked
from hf_power.sweep.trunks import Bench, prepare

TRIAL_STEPS = 4
# The first steps make the optimizers' state and are slower.
UNCOUNTED_STEPS = 2
# Steps that take longer are measured with fewer of them: a long step is hardly slower for being the first.
TRIAL_SECONDS = 5.0
# Of a line in sweep.jsonl, about.
ROW_BYTES = 3000


@dataclass(frozen=True)
class GroupCost:
    """What a group will cost: tokens with its trunks counted once, or for each row; seconds of one worker.

    `stackable` says whether its members can be computed as one, see `hf_power.sweep.stacked.can_be_stacked`, and `divided`
    whether they are shared out among the workers.
    """

    name: str
    runs: int
    tokens: int
    tokens_without_sharing: int
    flops: float
    seconds: float
    state_bytes: int
    stackable: bool = True
    divided: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a sweep will cost: its groups and what they have in all, wall time with the workers, bytes of disk."""

    groups: Sequence[GroupCost]
    workers: int
    runs: int
    tokens: int
    tokens_without_sharing: int
    flops: float
    seconds: float
    bytes: int

    @classmethod
    def of(cls, groups: Sequence[GroupCost], workers: int) -> "Estimate":
        """The estimate of all groups."""
        runs, seconds = sum(group.runs for group in groups), [group.seconds for group in groups]
        return cls(
            groups,
            workers,
            runs=runs,
            tokens=sum(group.tokens for group in groups),
            tokens_without_sharing=sum(group.tokens_without_sharing for group in groups),
            flops=sum(group.flops for group in groups),
            seconds=max([sum(seconds) / workers, *(group.seconds for group in groups if not group.divided)]),
            bytes=runs * ROW_BYTES + workers * max(group.state_bytes for group in groups),
        )


def estimate(grid: Grid, folder: str | os.PathLike[str], workers: int | None = None) -> Estimate:
    """What a sweep will cost, from a few steps of every width and batch: the rows of ``--dry-run``.

    Learning rates that the sweep may add are not in it.
    """
    bench = prepare(grid, folder)
    stages = within_budget(grid, stages_of(grid))
    threads = torch.get_num_threads()
    if bench.device.type == "cpu":
        # As in the sweep's own workers.
        torch.set_num_threads(1)
    measured: dict[tuple[int, int, int], _Trial] = {}
    costs = []
    jobs = start_jobs([group for stage in stages for group in stage])
    for job in tqdm(jobs, desc="Measuring", unit=" group", leave=False, dynamic_ncols=True):
        group, members = job.group, len(job.group.values) * len(job.group.seeds)
        key = (group.width, group.tokens_per_step, members)
        if key not in measured:
            measured[key] = _trial(bench, group, members)
        trial, tokens, runs = measured[key], job_tokens(grid, job), members * len(group.tokens)
        costs.append(
            GroupCost(
                name=group.name,
                runs=runs,
                tokens=tokens,
                tokens_without_sharing=members * sum(group.tokens),
                flops=tokens * trial.flops_per_token,
                seconds=tokens * trial.seconds_per_token + runs * trial.seconds_per_evaluation,
                state_bytes=trial.state_bytes,
                stackable=trial.stackable,
                divided=len(parts_of(job)) > 1,
            )
        )
    torch.set_num_threads(threads)
    return Estimate.of(costs, 1 if bench.device.type != "cpu" else workers or os.cpu_count() or 1)


def estimate_text(cost: Estimate) -> str:
    """The result of `estimate` as text."""
    saved = 1 - cost.tokens / cost.tokens_without_sharing
    lines = [f"{'group':<36} {'runs':>5} {'tokens':>12} {'FLOP':>9} {'minutes':>8}"]
    for group in cost.groups:
        lines.append(
            f"{group.name:<36} {group.runs:>5} {group.tokens:>12,} {group.flops:>9.1e} {group.seconds / 60:>8.1f}"
        )
    lines.append(
        f"{cost.runs} runs, {cost.tokens:,} tokens (shared trunks save {saved:.0%} of "
        f"{cost.tokens_without_sharing:,}), {cost.flops:.1e} FLOP, about {cost.seconds / 60:.1f} minutes with "
        f"{cost.workers} worker(s), {cost.bytes / 1e6:.0f} MB of disk; learning rates that the sweep adds beyond "
        "an edge come on top."
    )
    if not all(group.stackable for group in cost.groups):
        lines.append(
            "models of this family cannot be computed as one: the members of a group are trained one after another."
        )
    return "\n".join(lines)


def cost_text(grid: Grid, aim: Aim | None) -> str:
    """What a sweep will train, in a line that needs no measurement."""
    stages = within_budget(grid, stages_of(grid))
    if aim is not None:
        stages = [groups_of(grid, aimed_schedule(grid))]
    jobs = start_jobs([group for stage in stages for group in stage])
    runs = sum(len(job.horizons) * len(job.group.tokens) * len(job.group.seeds) for job in jobs)
    tokens = sum(job_tokens(grid, job) for job in jobs)
    if aim is None:
        return f"{runs:,} runs, {tokens:,} tokens, more where a best rate lies on an edge (--dry_run says how long it takes)"
    return f"at most about {runs:,} runs and {tokens:,} tokens, fewer where the rate is known to {aim.octaves:g} octaves before"


class _Trial(NamedTuple):
    seconds_per_token: float
    seconds_per_evaluation: float
    flops_per_token: float
    state_bytes: int
    stackable: bool


def _trial(bench: Bench, group: Group, num_members: int) -> _Trial:
    """A few steps of as many members as a group has, and the evaluation of a part of the held-out blocks."""
    settings = Settings.from_dict(bench.grid.sections_at(group.width, group.tokens_per_step))
    member = Member(settings.training.learning_rate, settings.training.seed)
    ensemble = Ensemble(settings, [member] * num_members, bench.data, device=bench.device)
    # So small a rate that no model diverges in the trial, whose step would then be left out.
    factors = [1e-3] * num_members
    _take_steps(ensemble, factors, UNCOUNTED_STEPS)
    started = time.perf_counter()
    steps = _take_steps(ensemble, factors, TRIAL_STEPS)
    # This waits for the device, which may still be at work.
    ensemble.check_alive()
    trained = time.perf_counter()
    blocks = len(ensemble.held_out)
    ensemble.held_out = ensemble.held_out[: max(EVAL_BLOCKS, ensemble.num_sequences)]
    ensemble.held_out_losses()
    evaluated = (time.perf_counter() - trained) * blocks / len(ensemble.held_out)
    model, block = ensemble.models[0], settings.data.block_size
    return _Trial(
        seconds_per_token=(trained - started) / (steps * num_members * group.tokens_per_step),
        seconds_per_evaluation=evaluated / num_members,
        flops_per_token=flops_per_token(model.config, block),
        # Weights and two moments in fp32.
        state_bytes=12 * model.num_parameters() * num_members,
        stackable=can_be_stacked(model),
    )


def _take_steps(ensemble: Ensemble, factors: Sequence[float], most: int) -> int:
    """Take one step or more, at most so many, until TRIAL_SECONDS are over; how many they were."""
    end = time.perf_counter() + TRIAL_SECONDS
    taken = 0
    while taken < most and (not taken or time.perf_counter() < end):
        ensemble.step(factors)
        taken += 1
    return taken
