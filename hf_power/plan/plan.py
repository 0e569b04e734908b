"""What a run will do and cost, said before its first step: as a value, and as text for people."""

from collections.abc import Mapping

import numpy as np

from hf_power.models import count_parameters, flops_per_token
from hf_power.plan.loss import loss_text, planned_loss
from hf_power.plan.record import CappedLaw, Compute, Plan, PlannedTarget, Point, ProxyCost, Timescale, duration
from hf_power.plan.target import Machine, Target
from hf_power.recipe import Recipe, warnings_for
from hf_power.records.run import Run
from hf_power.schedule import Schedule, beta
from hf_power.schedule.lengths import plan_schedule

# A sweep at the target would need at least one run at each of so many learning rates, as in the paper's grid (Table 2).
DIRECT_SWEEP_RUNS = 8
FEW_WARMUP_STEPS = 100
# Assumed, not measured: in shorter runs the warmup and the noise of single steps weigh more than the law.
FEW_STEPS = 500
SHARES = (0.01, 0.1, 0.25, 0.5, 0.75)
CURVE_POINTS = 200


def make_plan(
    recipe: Recipe,
    target: Target,
    machine: Machine | None = None,
    *,
    weight_decay: float | None = None,
    proxies: Mapping[str, float] | None = None,
) -> Plan:
    """The recipe at a target.

    Args:
        recipe, target: the tuned numbers, and the run.
        machine: what it runs on; None for eight H100.
        weight_decay: of the run, if it is to be another one than the recipe's.
        proxies: {"flops", "tokens"} that the sweep took, to be compared with a sweep at the target.

    Raises:
        UserError: a warmup that is longer than the run.
    """
    machine = machine or Machine()
    per_step = target.tokens_per_step
    planned = _planned(target)
    size = planned.hidden_size if recipe.size == "width" else planned.parameters
    law = recipe.law.at(size)
    numbers: dict[str, object] = {**law.to_dict(), **recipe.lengths(), "max_lr": recipe.max_lr}
    schedule = plan_schedule(tokens_per_step=per_step, num_training_steps=target.steps, **numbers)
    total, config = target.total_tokens, target.config
    per_token = 6.0 * planned.parameters if config is None else flops_per_token(config, target.block_size)
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    timescales = _timescales(schedule, total, decay)
    width = None if config is None else config.hidden_size
    peaks: dict[str, float] = {name: recipe.peak_lr(total, per_step, name, size) for name in recipe.laws}
    low, high = recipe.factors(total, per_step, size)
    outside = warnings_for(recipe, tokens=total, tokens_per_step=per_step, width=width, weight_decay=decay, size=size)
    sizes: dict[str, float | None] = {"parameters": planned.parameters or None, "width": width}
    loss, no_loss = planned_loss(recipe, target, machine, sizes, per_token)
    return Plan(
        target=planned,
        tokens_per_step=per_step,
        beta=beta(per_step),
        law=CappedLaw(
            law.a, law.b, law.batch_exponent, law.critical_batch_tokens, recipe.max_lr, law.critical_batch_growth
        ),
        intervals=recipe.intervals,
        warmup_tokens=schedule.warmup_tokens,
        decay_start_tokens=schedule.decay_start_tokens,
        decay_shape=schedule.decay_shape,
        cap_ends_tokens=schedule.cap_ends,
        milestones=tuple(_point(recipe, schedule, size, n, what) for what, n in _named_points(schedule, total)),
        peak_lrs=peaks,
        peak_intervals={name: (lr * low, lr * high) for name, lr in peaks.items()},
        weight_decay=decay,
        timescales=timescales,
        compute=_compute(per_token, target, machine),
        proxies=_proxy_cost(proxies, per_token * total),
        curve=tuple(_point(recipe, schedule, size, n) for n in _curve_tokens(schedule, total)),
        warnings=tuple([*_warnings(schedule, target.steps, timescales), *outside, *no_loss]),
        loss=loss,
    )


def _planned(target: Target) -> PlannedTarget:
    config = target.config
    counts: Mapping[str, int] = {} if config is None else count_parameters(config)
    return PlannedTarget(
        model_type=None if config is None else config.model_type,
        hidden_size=None if config is None else config.hidden_size,
        parameters=counts.get("parameters", target.parameters or 0),
        parameters_without_embeddings=counts.get("parameters_without_embeddings"),
        active_parameters=counts.get("active_parameters"),
        tokens=target.total_tokens,
        steps=target.steps,
        block_size=target.block_size,
    )


def _timescales(schedule: Schedule, total: int, weight_decay: float | None) -> tuple[Timescale, ...]:
    if not weight_decay:
        return ()
    points = (("half", total // 2), ("decay starts", int(schedule.end_of_law)))
    steps = total / schedule.tokens_per_step
    return tuple(Timescale(what, n, 1 / (schedule.lr(n) * weight_decay * steps)) for what, n in points)


def _compute(per_token: float, target: Target, machine: Machine) -> Compute:
    flops, share = per_token * target.total_tokens, machine.utilisation_of(target.config)
    days = machine.days(flops, target.config)
    return Compute(per_token, flops, machine.devices, machine.flops_per_device, share, days)


def _proxy_cost(proxies: Mapping[str, float] | None, flops: float) -> ProxyCost | None:
    if not proxies or not proxies["flops"]:
        return None
    direct = DIRECT_SWEEP_RUNS * flops
    return ProxyCost(int(proxies["tokens"]), proxies["flops"], direct, proxies["flops"] / direct)


def _named_points(schedule: Schedule, total: int) -> list[tuple[str, int]]:
    points = [(f"{share:.0%}", round(share * total)) for share in SHARES] + [("end", total)]
    if schedule.warmup_tokens:
        points.append(("end of warmup", schedule.warmup_tokens))
    if schedule.decay_start_tokens is not None:
        points.append(("decay starts", schedule.decay_start_tokens))
    return sorted(points, key=lambda point: point[1])


def _curve_tokens(schedule: Schedule, total: int) -> list[int]:
    """Evenly in log tokens from the first step on, and evenly in tokens over the tail, with every corner."""
    points = set(np.geomspace(schedule.tokens_per_step, total, CURVE_POINTS).round().astype(int).tolist())
    points |= {n for _, n in _named_points(schedule, total)} | {schedule.cap_ends or total}
    if schedule.decay_start_tokens is not None:
        tail = np.linspace(schedule.decay_start_tokens, total, CURVE_POINTS // 8)
        points |= set(tail.round().astype(int).tolist())
    return sorted(n for n in points if n <= total)


def _point(recipe: Recipe, schedule: Schedule, size: float | None, tokens: int, what: str | None = None) -> Point:
    """The rate and its 95 % interval; in warmup and tail, which are ratios of it, that of the rate at their end or start."""
    anchor = max(tokens, schedule.warmup_tokens)
    if schedule.decay_start_tokens is not None:
        anchor = min(anchor, schedule.decay_start_tokens)
    low, high = (min(schedule.max_lr, rate) for rate in recipe.lr_interval(anchor, schedule.tokens_per_step, size))
    lr, top = schedule.lr(tokens), schedule.lr(anchor)
    return Point(what, tokens, lr, lr * (low / top), lr * (high / top))


def _warnings(schedule: Schedule, steps: int, timescales: tuple[Timescale, ...]) -> list[str]:
    found, end = [], int(schedule.end_of_law)
    if schedule.lr(end) >= schedule.max_lr:
        found.append(
            f"the cap of {schedule.max_lr:g} binds for the whole run: the rate is constant until {end:,} tokens, and the law "
            "has no part in it."
        )
    if steps < FEW_STEPS:
        found.append(f"the run has {steps:,} steps, fewer than {FEW_STEPS}: take a smaller batch or more tokens.")
    warmup_steps = schedule.warmup_tokens // schedule.tokens_per_step
    if warmup_steps < min(FEW_WARMUP_STEPS, steps // 100):
        found.append(
            f"the recipe's warmup of {schedule.warmup_tokens:,} tokens is {warmup_steps} steps of this batch: give the run "
            f"its own, e.g. warmup_steps {min(FEW_WARMUP_STEPS, steps // 100)}."
        )
    return found + [
        f"AdamW's timescale is {scale.share_of_run:.3g} times the run ({scale.what}): weight decay hardly acts, and the "
        "weights remember their initialization."
        for scale in timescales
        if scale.share_of_run > 1
    ]


def plan_text(plan: Plan) -> str:
    """A plan as text for people."""
    target, compute, law = plan.target, plan.compute, plan.law
    size = f"  parameters   {target.parameters:,}"
    if target.active_parameters is not None:
        size += f" ({target.parameters_without_embeddings:,} without embeddings; active {target.active_parameters:,})"
    lines = [
        plan.headline,
        "",
        size,
        f"  tokens       {target.tokens:,} in {target.steps:,} steps",
        f"  batch        {plan.tokens_per_step:,} tokens per step (beta = {plan.beta:g})",
        f"  compute      {compute.flops:.3g} FLOP ({compute.flops_per_token:.3g} per token)",
        f"  time         {duration(compute.days)} on {compute.devices} devices of {compute.flops_per_device:.3g} "
        f"FLOP/s at {compute.utilisation:.0%}",
    ]
    if plan.proxies:
        lines.append(
            f"  proxies      {plan.proxies.flops:.3g} FLOP, {100 * plan.proxies.share_of_direct_sweep:.2g} % of "
            f"{DIRECT_SWEEP_RUNS} runs of full length at the target"
        )
    if plan.loss:
        lines += loss_text(plan.loss, compute.devices)
    lines.append(f"  schedule     {law.formula}")
    for p in plan.milestones:
        between = f"  ({p.low:.2e} to {p.high:.2e})" if p.low < p.high else ""
        lines.append(f"    {p.what:<14} {p.tokens:>20,} tokens   lr {p.lr:.3e}{between}")
    if plan.cap_ends_tokens is not None:
        lines.append(f"    the cap of {law.max_lr:g} ends at {plan.cap_ends_tokens:,} tokens")
    for name, lr in plan.peak_lrs.items():
        low, high = plan.peak_intervals[name]
        lines.append(f"  peak         {name}: lr {lr:.3e}" + (f"  ({low:.2e} to {high:.2e})" if low < high else ""))
    lines += [
        f"  timescale    {t.share_of_run:.3g} of the run ({t.what}), AdamW's with weight decay {plan.weight_decay:g}"
        for t in plan.timescales
    ]
    return "\n".join(lines + [f"  WARNING      {warning}" for warning in plan.warnings])


def describe_run(run: Run, steps: int, disk: tuple[int, int], schedule: Schedule | None) -> str:
    """Parameters, tokens, steps, batch, compute, disk, and the learning rate at milestones, as text.

    The run is the record before training, with its parameters and FLOPs; steps are those to come, disk is the bytes that
    will be written and the bytes free, and the schedule is None for another one than power.
    """
    per_step, tokens, per_token = run.tokens_per_step, steps * run.tokens_per_step, run.flops_per_token or 0.0
    lines = [
        f"{run.kind}: {run.name}" + (f" from {run.parent}" if run.parent else ""),
        f"  parameters   {run.parameters:,} ({run.parameters_without_embeddings:,} without embeddings)",
        f"  tokens       {tokens:,} in {steps:,} steps" + (f", after {run.tokens_seen:,}" if run.steps else ""),
        f"  batch        {per_step:,} tokens per step (beta = {beta(per_step):g})",
        f"  compute      {per_token * tokens:.2e} FLOP ({per_token:.3g} per token)",
        f"  disk         {disk[0] / 1e9:.2f} GB will be written, {disk[1] / 1e9:.1f} GB are free",
    ]
    if disk[0] > disk[1]:
        lines.append("  WARNING      the disk is too small: set save_total_limit, or free some space")
    if schedule is not None:
        lines.append(f"  schedule     {schedule.law.formula(schedule.max_lr)}")
        for what, n in _milestones(schedule, run.tokens_seen):
            lines.append(f"    {what:<14} {n:>16,} tokens   lr {schedule.lr(n):.3e}")
    return "\n".join(lines)


def _milestones(schedule: Schedule, seen: int) -> list[tuple[str, int]]:
    end = schedule.total_tokens or 0
    points = [("first step", seen), ("end of warmup", schedule.warmup_tokens), ("half", end // 2), ("end", end)]
    if schedule.cap_ends is not None:
        points.append(("cap ends", schedule.cap_ends))
    if schedule.decay_start_tokens is not None:
        points.append(("decay starts", schedule.decay_start_tokens))
    inside = {(what, n) for what, n in points if seen < n <= end or what == "first step"}
    return sorted(inside, key=lambda point: point[1])
