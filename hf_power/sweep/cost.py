"""What a sweep will cost, from a short measurement."""

import os
import time
from typing import Any

import torch

from hf_power.models import flops_per_token
from hf_power.settings.settings import Settings
from hf_power.sweep.ensemble import Ensemble
from hf_power.sweep.grid import Grid, Group, job_tokens, sections
from hf_power.sweep.run import check_budget, stages_of, start_jobs
from hf_power.sweep.trunks import Bench, prepare

TRIAL_STEPS = 4


def estimate(grid: Grid, folder: str | os.PathLike[str], workers: int | None = None) -> dict[str, Any]:
    """What a sweep will cost, from a few steps of every width and batch: the rows of ``--dry-run``.

    Learning rates that the sweep may add are not in it.

    Returns:
        {"groups": [{"name", "runs", "tokens", "flops", "seconds"}], "runs", "tokens", "tokens_without_sharing",
        "flops", "seconds" (wall time with the workers), "bytes", "workers"}.
    """
    bench = prepare(grid, folder)
    stages = stages_of(grid)
    check_budget(grid, stages)
    workers = 1 if bench.device.type != "cpu" else workers or os.cpu_count() or 1
    threads = torch.get_num_threads()
    if bench.device.type == "cpu":
        torch.set_num_threads(1)
    measured: dict[tuple[int, int, int], tuple[float, float, float, int]] = {}
    rows: list[dict[str, Any]] = []
    for job in start_jobs(grid, [group for stage in stages for group in stage]):
        group, members = job.group, len(job.group.values) * len(job.group.seeds)
        key = (group.width, group.tokens_per_step, members)
        if key not in measured:
            measured[key] = _trial(bench, group, members)
        per_token, per_eval, flops, state = measured[key]
        tokens, runs = job_tokens(grid, job), members * len(group.tokens)
        seconds = tokens * per_token + runs * per_eval
        rows.append({"name": group.name, "runs": runs, "tokens": tokens, "flops": tokens * flops, "seconds": seconds})
        rows[-1] |= {"without_sharing": members * sum(group.tokens), "state": state}
    torch.set_num_threads(threads)
    busiest = max(row["seconds"] for row in rows)
    return {
        "groups": rows,
        "runs": sum(row["runs"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "tokens_without_sharing": sum(row["without_sharing"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "seconds": max(busiest, sum(row["seconds"] for row in rows) / workers),
        "bytes": sum(row["runs"] for row in rows) * 3000 + workers * max(row["state"] for row in rows),
        "workers": workers,
    }


def estimate_text(cost: dict[str, Any]) -> str:
    """The result of `estimate` as text."""
    saved = 1 - cost["tokens"] / cost["tokens_without_sharing"]
    lines = [f"{'group':<36} {'runs':>5} {'tokens':>12} {'FLOP':>9} {'minutes':>8}"]
    for row in cost["groups"]:
        lines.append(
            f"{row['name']:<36} {row['runs']:>5} {row['tokens']:>12,} {row['flops']:>9.1e} {row['seconds'] / 60:>8.1f}"
        )
    lines.append(
        f"{cost['runs']} runs, {cost['tokens']:,} tokens (shared trunks save {saved:.0%} of "
        f"{cost['tokens_without_sharing']:,}), {cost['flops']:.1e} FLOP, about {cost['seconds'] / 60:.1f} minutes with "
        f"{cost['workers']} worker(s), {cost['bytes'] / 1e6:.0f} MB of disk; learning rates that the sweep adds beyond "
        "an edge come on top."
    )
    return "\n".join(lines)


def _trial(bench: Bench, group: Group, members: int) -> tuple[float, float, float, int]:
    """Seconds per trained token and per evaluation, FLOPs per token, bytes of a trunk's state."""
    base = sections(bench.grid, group.width, group.tokens_per_step)
    settings = Settings.from_dict(base)
    block = len(bench.blocks[0]["input_ids"])
    ensemble = Ensemble(
        [settings] * members,
        bench.tokenizer,
        bench.blocks,
        bench.held_out,
        num_sequences=group.tokens_per_step // block,
        device=bench.device,
    )
    for _ in range(2):
        ensemble.step([1e-3] * members)
    started = time.perf_counter()
    for _ in range(TRIAL_STEPS):
        ensemble.step([1e-3] * members)
    ensemble.check_alive()
    trained = time.perf_counter()
    ensemble.held_out_losses()
    per_eval = (time.perf_counter() - trained) / members
    per_token = (trained - started) / (TRIAL_STEPS * members * group.tokens_per_step)
    state: int = 12 * ensemble.models[0].num_parameters() * members
    return per_token, per_eval, flops_per_token(ensemble.models[0].config, block), state
