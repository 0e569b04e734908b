"""A schedule in words and in characters: what a person reads before a run begins."""

import math
from collections.abc import Mapping, Sequence

from hf_power.schedule.law import PAPER_MAX_LR, beta
from hf_power.schedule.presets import preset
from hf_power.schedule.shape import Schedule

# The sketch in characters: columns and rows of its field.
COLUMNS, ROWS = 72, 12


def whose(law: str | None, given: Mapping[str, object], peak_lr: float | None = None) -> str:
    """Whose numbers a law has, from the arguments of `hf_power.PowerLR`, and how to find one's own where they are none."""
    own = [name for name, value in given.items() if value is not None]
    name = law or "paper"
    known = preset(name)
    if peak_lr is not None:
        rest = f" but for {' and '.join(own)}" if own else ""
        return f"a from a cosine with the peak {peak_lr:g}, exponents of {name}{rest}"
    if {"a", "b"} <= set(own):
        return "your own"
    if own:
        return f"{' and '.join(own)} your own, the rest of {name} ({known.source})"
    if law is None:
        return (
            f"the paper's, from its own data and models ({known.source}); for yours give "
            'lr_scheduler_kwargs={"peak_lr": <a good peak of cosine>}, or fit a sweep (hf-power sweep, hf-power fit)'
        )
    caution = f"; {known.caution}" if known.caution else ""
    return f"{name} ({known.source}; {known.optimizer}, {known.parameterization}){caution}"


def highest(schedule: Schedule) -> tuple[int, float]:
    """Where a run's rate is at its highest, in tokens, and that rate."""
    at = schedule.warmup_tokens
    if schedule.warmup_to == "max" and at and schedule.lr(at) < schedule.max_lr:
        return at, schedule.max_lr
    return at, schedule.lr(at)


def describe(schedule: Schedule, law_of: str, first: int = 0) -> str:
    """The schedule in one line: batch, peak, where the cap ends and the tail begins, and whose the law is.

    Args:
        schedule: of the run.
        law_of: see `whose`.
        first: tokens that the model had seen before the run.
    """
    step = schedule.tokens_per_step
    parts = [f"{step:,} tokens per step (beta {beta(step):.3g})"]
    at, peak = highest(schedule)
    if first > at:
        parts.append(f"goes on from {first:,} tokens at {schedule.lr(first):.3g}")
    else:
        parts.append(f"peaks at {peak:.3g} after {at:,} tokens" if at else f"begins at {peak:.3g} without a warmup")
    end, law = schedule.end_of_law, schedule.law
    falls = schedule.cap_ends
    if falls is not None and falls > first:
        parts.append(f"the cap {schedule.max_lr:g} binds until {falls:,} tokens, then the law falls as n**{law.b:g}")
    elif law.lr(min(end, 1e18), step) >= schedule.max_lr:
        parts.append(f"the cap {schedule.max_lr:g} always binds, so the rate is constant")
    else:
        parts.append(f"the cap {schedule.max_lr:g} is never reached, the law falls as n**{law.b:g}")
    if schedule.decay_start_tokens is None:
        parts.append("no decay at the end" if math.isfinite(end) else "no end, and so no decay")
    else:
        start, rate = schedule.decay_start_tokens, schedule.lr(schedule.decay_start_tokens)
        floor = schedule.min_lr_ratio * rate
        parts.append(f"decays from {rate:.3g} at {start:,} to {floor:.3g} at {start + schedule.decay_tokens:,} tokens")
    return f"power: {'; '.join(parts)}; law: {law_of}"


def advice(schedule: Schedule) -> str:
    """What to set the cap to, for the batch and warmup of this schedule."""
    start = max(schedule.warmup_tokens, schedule.tokens_per_step)
    cap = min(PAPER_MAX_LR, schedule.law.lr(start, schedule.tokens_per_step))
    return (
        f"for this batch and warmup set learning_rate={cap:.2g} under muP, and without muP the best peak of cosine that you "
        'know, as lr_scheduler_kwargs={"peak_lr": ...}'
    )


def sketch(curves: Sequence[tuple[str, str, Sequence[float]]]) -> str:
    """Curves over the run in characters: of each a name, its mark, and its rates at equal distances."""
    top = max(max(rates) for _, _, rates in curves)
    field = [[" "] * COLUMNS for _ in range(ROWS)]
    for _, mark, rates in curves:
        for column in range(COLUMNS):
            rate = rates[round(column * (len(rates) - 1) / (COLUMNS - 1))]
            field[ROWS - 1 - round(rate / top * (ROWS - 1))][column] = mark
    lines = [f"{top * (ROWS - 1 - i) / (ROWS - 1):9.2e} |{''.join(row).rstrip()}" for i, row in enumerate(field)]
    legend = "   ".join(f"{mark} {name}" for name, mark, _ in curves)
    return "\n".join([*lines, " " * 10 + "+" + "-" * COLUMNS, " " * 11 + legend])
