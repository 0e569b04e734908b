"""What a run will do, said before its first step."""

from typing import Any

from hf_power.schedule import PowerLR


def describe_run(run: dict[str, Any], steps: int, disk: tuple[int, int], schedule: PowerLR | None) -> str:
    """Parameters, tokens, steps, batch, compute, disk, and the learning rate at milestones, as text.

    Args:
        run: the content of run.json before training.
        steps: optimizer steps to come.
        disk: bytes that will be written, bytes free.
        schedule: the Power schedule, or None for another one.
    """
    per_step, tokens = run["tokens_per_step"], steps * run["tokens_per_step"]
    flops = 6 * run["parameters_without_embeddings"] * tokens
    lines = [
        f"{run['kind']}: {run['name']}" + (f" from {run['parent']}" if run["parent"] else ""),
        f"  parameters   {run['parameters']:,} ({run['parameters_without_embeddings']:,} without embeddings)",
        f"  tokens       {tokens:,} in {steps:,} steps" + (f", after {run['tokens_seen']:,}" if run["steps"] else ""),
        f"  batch        {per_step:,} tokens per step (beta = {per_step / 4096:g})",
        f"  compute      {flops:.2e} FLOP (6 x parameters without embeddings x tokens)",
        f"  disk         {disk[0] / 1e9:.2f} GB will be written, {disk[1] / 1e9:.1f} GB are free",
    ]
    if disk[0] > disk[1]:
        lines.append("  WARNING      the disk is too small: set save_total_limit, or free some space")
    if schedule is not None:
        law = schedule.describe()
        formula = f"{law['a']:g} * beta^{law['batch_exponent']:g} * n^{law['b']:g}"
        lines.append(f"  schedule     min({law['max_lr']:g}, {formula})")
        for what, n in _milestones(schedule, run["tokens_seen"]):
            lines.append(f"    {what:<14} {n:>16,} tokens   lr {schedule.lr_at(n):.3e}")
    return "\n".join(lines)


def _milestones(schedule: PowerLR, seen: int) -> list[tuple[str, int]]:
    law, end = schedule.describe(), schedule.total_tokens or 0
    beta = law["tokens_per_step"] / 4096
    cap_ends = int((law["a"] * beta ** law["batch_exponent"] / law["max_lr"]) ** (-1 / law["b"]))  # a beta^c n^b = cap
    points = [("first step", seen), ("end of warmup", law["warmup_tokens"]), ("half", end // 2), ("end", end)]
    if cap_ends > law["warmup_tokens"]:
        points.append(("cap ends", cap_ends))
    if law["decay_start_tokens"] is not None:
        points.append(("decay starts", law["decay_start_tokens"]))
    inside = {(what, n) for what, n in points if seen < n <= end or what == "first step"}
    return sorted(inside, key=lambda point: point[1])
