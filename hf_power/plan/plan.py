"""What a run will do and cost, said before its first step."""

import math
import warnings
from typing import Any

import numpy as np
import torch

from hf_power.models import count_parameters, flops_per_token, usual_utilisation
from hf_power.recipe import Recipe, warnings_for
from hf_power.records.errors import UserError
from hf_power.schedule import LAW, TOKENS_PER_BETA, PowerLR, power_law

SCHEMA = 1
DIRECT_SWEEP_RUNS = 8  # learning rates of a sweep at the target; the paper's grid has as many (Table 2)
FEW_WARMUP_STEPS = 100
FEW_STEPS = 500  # assumption, not measured: below, warmup and noise of the steps weigh more than the law
SHARES = (0.01, 0.1, 0.25, 0.5, 0.75)
CURVE_POINTS = 200


def make_plan(
    recipe: Recipe,
    *,
    tokens: int,
    tokens_per_step: int,
    config: Any = None,
    parameters: int | None = None,
    block_size: int = 4096,
    devices: int = 8,
    flops_per_device: float = 989e12,
    utilisation: float | None = None,
    weight_decay: float | None = None,
    proxies: dict[str, float] | None = None,
) -> dict[str, Any]:
    """The recipe at a target: learning rates with their intervals, cost, and what to beware of.

    Args:
        recipe: the tuned numbers.
        tokens: length of the run, rounded up to whole steps.
        tokens_per_step: tokens of one optimizer step over all processes.
        config: of the target, a Llama, Mixtral, Granite or GraniteMoe config; or
        parameters: its size alone, those that a token passes (active ones), without embeddings but with the head.
        block_size: tokens per sequence.
        devices: accelerators of the run.
        flops_per_device: peak of one of them, in FLOP/s; the default is an H100's in bf16 without sparsity.
        utilisation: share of the peak that a run reaches, in (0, 1]; None: see `hf_power.models.usual_utilisation`.
        weight_decay: of the run, if it is to be another one than the recipe's.
        proxies: {"flops", "tokens"} that the sweep took, to be compared with a sweep at the target.

    Returns:
        The content of plan.json. "timescales" are AdamW's, in shares of the run: its weights are an average of the last
        ``1 / (eta * weight_decay)`` steps (Wang & Aitchison, arXiv:2405.13698), so

            tokens_per_step / (eta * weight_decay * tokens)

        "proxies" compares with DIRECT_SWEEP_RUNS runs of full length at the target, which is what a sweep without
        transfer would take at the least.

    Raises:
        ValueError: neither or both of config and parameters, a number out of range, or a warmup longer than the run.
    """
    if (config is None) == (parameters is None):
        raise UserError("the target needs a config or its number of parameters: pass one of them.")
    utilisation = usual_utilisation(config) if utilisation is None else utilisation
    machine = {"devices": devices, "flops_per_device": flops_per_device, "utilisation": utilisation}
    sizes = {"tokens": tokens, "tokens_per_step": tokens_per_step, "block_size": block_size, "parameters": parameters}
    _check_numbers({name: value for name, value in (sizes | machine).items() if value is not None})
    steps = math.ceil(tokens / tokens_per_step)
    schedule, total = _recipe_schedule(recipe, steps, tokens_per_step), steps * tokens_per_step
    law = schedule.describe()
    target = _target(config, parameters)
    per_token = flops_per_token(config, block_size) if config is not None else 6.0 * target["parameters"]
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    plan: dict[str, Any] = {
        "schema": SCHEMA,
        "target": {**target, "tokens": total, "steps": steps, "block_size": block_size},
        "tokens_per_step": tokens_per_step,
        "beta": tokens_per_step / TOKENS_PER_BETA,
        "law": {**recipe.schedule_kwargs(), "max_lr": recipe.max_lr},
        "intervals": recipe.intervals,
        "warmup_tokens": law["warmup_tokens"],
        "decay_start_tokens": law["decay_start_tokens"],
        "decay_shape": law["decay_shape"],
        "cap_ends_tokens": cap_ends(schedule),
        "milestones": [{"what": what, **_point(recipe, schedule, n)} for what, n in _plan_points(schedule)],
        "peak_lrs": {name: recipe.peak_lr(total, tokens_per_step, name) for name in recipe.laws},
        "weight_decay": decay,
        "timescales": _timescales(schedule, total, decay),
        "compute": _compute(per_token, total, machine),
        "proxies": _compare(proxies, per_token * total),
        "curve": [_point(recipe, schedule, n) for n in _curve_tokens(schedule)],
    }
    width = None if config is None else config.hidden_size
    plan["warnings"] = _plan_warnings(plan, schedule) + warnings_for(
        recipe, tokens=total, tokens_per_step=tokens_per_step, width=width, weight_decay=decay
    )
    return plan


def plan_text(plan: dict[str, Any]) -> str:
    """A plan as text for people."""
    target, compute, law = plan["target"], plan["compute"], plan["law"]
    size = f"  parameters   {target['parameters']:,}"
    if "active_parameters" in target:
        size += (
            f" ({target['parameters_without_embeddings']:,} without embeddings; active {target['active_parameters']:,})"
        )
    lines = [
        size,
        f"  tokens       {target['tokens']:,} in {target['steps']:,} steps",
        f"  batch        {plan['tokens_per_step']:,} tokens per step (beta = {plan['beta']:g})",
        f"  compute      {compute['flops']:.3g} FLOP ({compute['flops_per_token']:.3g} per token)",
        f"  time         {_duration(compute['days'])} on {compute['devices']} devices of {compute['flops_per_device']:.3g} "
        f"FLOP/s at {compute['utilisation']:.0%}",
    ]
    if plan["proxies"]:
        lines.append(
            f"  proxies      {plan['proxies']['flops']:.3g} FLOP, {100 * plan['proxies']['share_of_direct_sweep']:.2g} % of "
            f"{DIRECT_SWEEP_RUNS} runs of full length at the target"
        )
    lines.append(f"  schedule     {_formula(law)}")
    lines += [
        f"    {p['what']:<14} {p['tokens']:>20,} tokens   lr {p['lr']:.3e}{_between(p)}" for p in plan["milestones"]
    ]
    if plan["cap_ends_tokens"] is not None:
        lines.append(f"    the cap of {law['max_lr']:g} ends at {plan['cap_ends_tokens']:,} tokens")
    lines += [f"  peak         {name}: lr {lr:.3e}" for name, lr in plan["peak_lrs"].items()]
    lines += [
        f"  timescale    {t['share_of_run']:.3g} of the run ({t['what']}), AdamW's with weight decay {plan['weight_decay']:g}"
        for t in plan["timescales"]
    ]
    return "\n".join(lines + [f"  WARNING      {warning}" for warning in plan["warnings"]])


def cap_ends(schedule: PowerLR) -> int | None:
    """Tokens at which ``a * beta**c * n**b = max_lr``; None unless that lies between warmup and decay, or the end."""
    law = schedule.describe()
    at_one = power_law(1, tokens_per_step=schedule.tokens_per_step, **{name: law[name] for name in LAW})
    log_tokens = math.log(at_one / law["max_lr"]) / -law["b"]
    end = _end_of_law(schedule)
    inside = math.log(max(1, law["warmup_tokens"])) < log_tokens <= math.log(max(1, end))
    return int(math.exp(log_tokens)) if inside else None


def _check_numbers(numbers: dict[str, float]) -> None:
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive, got {value!r}: correct it.")
    if numbers["utilisation"] > 1:
        raise UserError(f"utilisation must be at most 1, got {numbers['utilisation']}: pass 0.4 for 40 %.")


def _timescales(schedule: PowerLR, total: int, weight_decay: float) -> list[dict[str, Any]]:
    points = [("half", total // 2), ("decay starts", _end_of_law(schedule))]
    steps = total / schedule.tokens_per_step
    return [
        {"what": what, "tokens": n, "share_of_run": 1 / (schedule.lr_at(n) * weight_decay * steps)}
        for what, n in points
        if weight_decay
    ]


def _end_of_law(schedule: PowerLR) -> int:
    start, total = schedule.describe()["decay_start_tokens"], schedule.total_tokens or 0
    return total if start is None else int(start)


def _compute(per_token: float, tokens: int, machine: dict[str, float]) -> dict[str, float]:
    flops = per_token * tokens
    days = flops / (math.prod(machine.values()) * 86_400)
    return {"flops_per_token": per_token, "flops": flops, **machine, "days": days}


def _recipe_schedule(recipe: Recipe, steps: int, tokens_per_step: int) -> PowerLR:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.max_lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plan has a warning of its own
        kwargs: dict[str, Any] = {**recipe.schedule_kwargs(), **recipe.lengths()}
        return PowerLR(optimizer, 0, steps, tokens_per_step=tokens_per_step, **kwargs)


def _target(config: Any, parameters: int | None) -> dict[str, Any]:
    if config is None:
        return {"parameters": parameters}
    return {"model_type": config.model_type, "hidden_size": config.hidden_size, **count_parameters(config)}


def _plan_points(schedule: PowerLR) -> list[tuple[str, int]]:
    law, total = schedule.describe(), schedule.total_tokens or 0
    points = [(f"{share:.0%}", round(share * total)) for share in SHARES] + [("end", total)]
    if law["warmup_tokens"]:
        points.append(("end of warmup", law["warmup_tokens"]))
    if law["decay_start_tokens"] is not None:
        points.append(("decay starts", law["decay_start_tokens"]))
    return sorted(points, key=lambda point: point[1])


def _curve_tokens(schedule: PowerLR) -> list[int]:
    """Evenly in log tokens from the first step on, and evenly in tokens over the tail, with every corner."""
    total, start = schedule.total_tokens or 0, schedule.describe()["decay_start_tokens"]
    points = set(np.geomspace(schedule.tokens_per_step, total, CURVE_POINTS).round().astype(int).tolist())
    points |= {n for _, n in _plan_points(schedule)} | {cap_ends(schedule) or total}
    if start is not None:
        points |= set(np.linspace(start, total, CURVE_POINTS // 8).round().astype(int).tolist())
    return sorted(n for n in points if n <= total)


def _point(recipe: Recipe, schedule: PowerLR, tokens: int) -> dict[str, Any]:
    """The rate and its 95 % interval; in warmup and tail, which are ratios of it, that of the rate at their end or start."""
    law = schedule.describe()
    anchor = max(tokens, law["warmup_tokens"])
    if law["decay_start_tokens"] is not None:
        anchor = min(anchor, law["decay_start_tokens"])
    low, high = (min(law["max_lr"], rate) for rate in recipe.lr_interval(anchor, schedule.tokens_per_step))
    lr, top = schedule.lr_at(tokens), schedule.lr_at(anchor)
    return {"tokens": tokens, "lr": lr, "low": lr * (low / top), "high": lr * (high / top)}


def _compare(proxies: dict[str, float] | None, flops: float) -> dict[str, float] | None:
    if not proxies or not proxies["flops"]:
        return None
    direct = DIRECT_SWEEP_RUNS * flops
    return {**proxies, "direct_sweep_flops": direct, "share_of_direct_sweep": proxies["flops"] / direct}


def _plan_warnings(plan: dict[str, Any], schedule: PowerLR) -> list[str]:
    found, law, steps = [], schedule.describe(), plan["target"]["steps"]
    end = _end_of_law(schedule)
    if schedule.lr_at(end) >= law["max_lr"]:
        found.append(
            f"the cap of {law['max_lr']:g} binds for the whole run: the rate is constant until {end:,} tokens, and the law "
            "has no part in it."
        )
    if steps < FEW_STEPS:
        found.append(f"the run has {steps:,} steps, fewer than {FEW_STEPS}: take a smaller batch or more tokens.")
    warmup_steps = law["warmup_tokens"] // schedule.tokens_per_step
    if warmup_steps < min(FEW_WARMUP_STEPS, steps // 100):
        found.append(
            f"the recipe's warmup of {law['warmup_tokens']:,} tokens is {warmup_steps} steps of this batch: give the run "
            f"its own, e.g. warmup_steps {min(FEW_WARMUP_STEPS, steps // 100)}."
        )
    for scale in plan["timescales"]:
        if scale["share_of_run"] > 1:
            found.append(
                f"AdamW's timescale is {scale['share_of_run']:.3g} times the run ({scale['what']}): weight decay hardly "
                "acts, and the weights remember their initialization."
            )
    return found


def _duration(days: float) -> str:
    for unit, length in (("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if days >= length:
            return f"{days / length:.3g} {unit}"
    return f"{86_400 * days:.2g} seconds"


def _formula(law: dict[str, Any]) -> str:
    critical = law.get("critical_batch_tokens")
    beta = "beta" if critical is None else f"min(beta, {critical / TOKENS_PER_BETA:g})"
    return f"min({law['max_lr']:g}, {law['a']:g} * {beta}^{law['batch_exponent']:g} * n^{law['b']:g})"


def _between(point: dict[str, Any]) -> str:
    return f"  ({point['low']:.2e} to {point['high']:.2e})" if point["low"] < point["high"] else ""


def describe_run(run: dict[str, Any], steps: int, disk: tuple[int, int], schedule: PowerLR | None) -> str:
    """Parameters, tokens, steps, batch, compute, disk, and the learning rate at milestones, as text.

    Args:
        run: the content of run.json before training.
        steps: optimizer steps to come.
        disk: bytes that will be written, bytes free.
        schedule: the Power schedule, or None for another one.
    """
    per_step, tokens = run["tokens_per_step"], steps * run["tokens_per_step"]
    lines = [
        f"{run['kind']}: {run['name']}" + (f" from {run['parent']}" if run["parent"] else ""),
        f"  parameters   {run['parameters']:,} ({run['parameters_without_embeddings']:,} without embeddings)",
        f"  tokens       {tokens:,} in {steps:,} steps" + (f", after {run['tokens_seen']:,}" if run["steps"] else ""),
        f"  batch        {per_step:,} tokens per step (beta = {per_step / 4096:g})",
        f"  compute      {run['flops_per_token'] * tokens:.2e} FLOP ({run['flops_per_token']:.3g} per token)",
        f"  disk         {disk[0] / 1e9:.2f} GB will be written, {disk[1] / 1e9:.1f} GB are free",
    ]
    if disk[0] > disk[1]:
        lines.append("  WARNING      the disk is too small: set save_total_limit, or free some space")
    if schedule is not None:
        lines.append(f"  schedule     {_formula(schedule.describe())}")
        for what, n in _milestones(schedule, run["tokens_seen"]):
            lines.append(f"    {what:<14} {n:>16,} tokens   lr {schedule.lr_at(n):.3e}")
    return "\n".join(lines)


def _milestones(schedule: PowerLR, seen: int) -> list[tuple[str, int]]:
    law, end = schedule.describe(), schedule.total_tokens or 0
    points = [("first step", seen), ("end of warmup", law["warmup_tokens"]), ("half", end // 2), ("end", end)]
    if (capped := cap_ends(schedule)) is not None:
        points.append(("cap ends", capped))
    if law["decay_start_tokens"] is not None:
        points.append(("decay starts", law["decay_start_tokens"]))
    inside = {(what, n) for what, n in points if seen < n <= end or what == "first step"}
    return sorted(inside, key=lambda point: point[1])
