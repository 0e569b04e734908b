"""What a planned run will reach: the loss with its interval, what a wrong rate costs, and other batches."""

import math
from dataclasses import dataclass, field

from hf_power.plan.target import Machine, Target
from hf_power.recipe import Recipe
from hf_power.records.schema import UNTIL_KNOWN

# Batches of the table, times that of the run; those far beyond what the sweep has seen are left out.
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_BEYOND = 8.0


@dataclass(frozen=True)
class BatchRow:
    """The run with another batch: its loss after the same tokens, and the tokens and days to the loss of the run's batch.

    Tokens, steps and days are None where the batch does not reach that loss with 1,024 times the tokens.
    """

    tokens_per_step: int
    loss: float
    low: float
    high: float
    tokens: float | None = field(metadata=UNTIL_KNOWN)
    steps: int | None = field(metadata=UNTIL_KNOWN)
    days: float | None = field(metadata=UNTIL_KNOWN)


@dataclass(frozen=True)
class PlannedLoss:
    """The loss at the end in nats per token, of a run as those of the sweep's `schedule`, tail included.

    Attributes:
        low, high: 95 %, of the forecast.
        twice_off: nats that a rate at twice or half the best one costs; None where the sweep does not tell.
        best_batch, critical_batch: tokens per step with which a loss takes the fewest tokens, and twice as many; None
            without three batches in the sweep, or beyond what they tell.
        batches: other batches, and this one.
    """

    schedule: str
    loss: float
    low: float
    high: float
    twice_off: float | None = field(metadata=UNTIL_KNOWN)
    best_batch: float | None = field(metadata=UNTIL_KNOWN)
    critical_batch: float | None = field(metadata=UNTIL_KNOWN)
    critical_interval: tuple[float, float | None] | None = field(metadata=UNTIL_KNOWN)
    batches: tuple[BatchRow, ...]


def planned_loss(
    recipe: Recipe, target: Target, machine: Machine, sizes: dict[str, float | None], flops_per_token: float
) -> tuple[PlannedLoss | None, list[str]]:
    """The loss of a recipe's forecast at a target, or a sentence why there is none; nothing for a recipe without one.

    Args:
        sizes: "parameters" and "width" of the target.
    """
    forecast = recipe.forecast
    if forecast is None:
        return None, []
    size = sizes.get(forecast.size or "")
    tokens, batch = target.total_tokens, target.tokens_per_step
    if reason := forecast.cannot(tokens, batch, size):
        return None, [reason]
    loss, low, high = forecast.at(tokens, batch, size)
    which = forecast.batches(tokens, size)
    rows = []
    smallest, largest = forecast.tokens_per_step
    for factor in _FACTORS if which else ():
        other = round(factor * batch / target.block_size) * target.block_size
        if other and (factor == 1 or smallest / _BEYOND <= other <= largest * _BEYOND):
            there = forecast.at(tokens, other, size)
            needed = forecast.tokens_to(loss, tokens, other, size)
            known = needed if math.isfinite(needed) else None
            days = None if known is None else machine.days(flops_per_token * known, target.config)
            steps = None if known is None else math.ceil(known / other)
            rows.append(BatchRow(other, *there, known, steps, days))
    curvature = forecast.curvature
    planned = PlannedLoss(
        forecast.schedule,
        *(loss, low, high, curvature),
        which.best if which else None,
        which.critical if which else None,
        which.critical_interval if which else None,
        tuple(rows),
    )
    return planned, []


def loss_text(planned: PlannedLoss, devices: int) -> list[str]:
    """The lines of a plan."""
    lines = [
        f"  loss         {planned.loss:.3f} ({planned.low:.3f} to {planned.high:.3f}) nats per token at the end, of a run as "
        f"the sweep's {planned.schedule}, tail included"
    ]
    if planned.twice_off is not None:
        lines.append(
            f"    a rate twice or half the best one costs {planned.twice_off:.3f}, as in the sweep's median cell"
        )
    if planned.best_batch is not None:
        text = f"    which batch    a loss takes the fewest tokens at {planned.best_batch:,.0f} tokens per step"
        if planned.critical_batch is not None and planned.critical_interval is not None:
            low, high = planned.critical_interval
            end = "any" if high is None else f"{high:,.0f}"
            text += f", twice as many at {planned.critical_batch:,.0f} (95 % {low:,.0f} to {end})"
        lines.append(text)
    if planned.batches:
        head = f"days on {devices}"
        lines.append(
            f"    {'tokens/step':>13}  {'loss then':>9}  95 % interval     {'tokens to this loss':>19}  {'steps':>10}  {head:>12}"
        )
    for row in planned.batches:
        to = "never" if row.tokens is None else f"{row.tokens:.4g}"
        steps, days = ("", "") if row.steps is None or row.days is None else (f"{row.steps:,}", f"{row.days:.3g}")
        lines.append(
            f"    {row.tokens_per_step:>13,}  {row.loss:>9.3f}  {row.low:.3f} to {row.high:.3f}  {to:>19}  {steps:>10}  {days:>12}"
        )
    return lines
