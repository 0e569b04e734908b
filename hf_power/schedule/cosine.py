"""From a tuned cosine to Power: the law and the cap that follow from a peak that is known to be good."""

import math
from dataclasses import replace

from hf_power.records.errors import UserError
from hf_power.schedule.law import check_number
from hf_power.schedule.shape import DECAY_SHAPES, Schedule


def with_peak(schedule: Schedule, peak_lr: float) -> Schedule:
    """The schedule with the peak of cosine as its cap, and the scale that gives its run the mean rate of cosine.

    Cosine to zero has the mean rate peak_lr / 2, whatever its warmup. Under Power, with w and s the shares of the run
    at which warmup ends and tail begins, r(x) = min(1, u x**b) and m the mean of the tail's shape::

        mean / peak_lr = w / 2 r(w) + integral of r from w to s + (1 - s) m r(s)

    which grows with u, so that there is one u for each mean; ``a = u peak_lr / (beta**c T**b)`` then holds for every batch
    and horizon. b and c stay those of the schedule's law. Other means were worse than cosine itself in one of the cells of
    benchmarks/from_cosine.py on which the rule was chosen.

    Args:
        schedule: of a run with an end; its cap and its law's a are replaced.
        peak_lr: the best peak of cosine for this horizon and batch, > 0.

    Raises:
        UserError: a peak that is no positive number, a run without an end, or a law with a critical batch that grows.
    """
    check_peak(peak_lr)
    total, law = schedule.total_tokens, schedule.law
    if total is None:
        raise UserError("peak_lr is the peak of a run with an end: pass num_training_steps, or a and a learning_rate.")
    if law.critical_batch_growth:
        raise UserError("peak_lr cannot be brought together with a critical batch that grows: pass a instead.")
    unit = law.lr(total, schedule.tokens_per_step) / peak_lr
    low, high = 0.0, (schedule.end_of_law / total) ** -law.b  # From there on the cap binds for the whole run.
    for _ in range(60):
        middle = (low + high) / 2
        below = _mean_rate(schedule, total, middle) < 0.5
        low, high = (middle, high) if below else (low, middle)
    return replace(schedule, law=replace(law, a=law.a * high / unit), max_lr=peak_lr)


def check_peak(peak_lr: object) -> None:
    """Raise a UserError for what is no rate."""
    check_number("peak_lr", peak_lr)
    if not isinstance(peak_lr, int | float) or peak_lr <= 0:
        raise UserError(
            f"peak_lr must be positive, got {peak_lr}: pass the best peak of cosine that you know, e.g. 1e-3."
        )


def _mean_rate(schedule: Schedule, total: int, unit: float) -> float:
    """The mean rate over the cap, where the law has `unit` times the cap at the end of the run."""
    b = schedule.law.b
    first, last = schedule.warmup_tokens / total, schedule.end_of_law / total
    tail = schedule.decay_tokens / total
    capped = min(max(unit ** (-1 / b) if unit else 0.0, first), last)

    def rate(share: float) -> float:
        return min(1.0, unit * share**b) if share else 1.0

    def integral(share: float) -> float:
        return math.log(share) if b == -1 else share ** (1 + b) / (1 + b)

    falling = unit * (integral(last) - integral(capped)) if unit and capped < last else 0.0
    shape = DECAY_SHAPES[schedule.decay_shape]
    mean = sum(shape((i + 0.5) / 1000) for i in range(1000)) / 1000
    floor = schedule.min_lr_ratio
    # Behind the tail there is nothing but its floor.
    rest = 1.0 - last - tail if tail else 0.0
    ended = tail * (floor + (1 - floor) * mean) + rest * floor
    return (
        first / 2 * (rate(first) if schedule.warmup_to == "law" else 1.0)
        + capped
        - first
        + falling
        + ended * rate(last)
    )
