"""A schedule before its run: the rates of `TrainingArguments`, in a picture and in characters, beside another schedule."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler

from hf_power.plots.figures import GRAY, STRONG, new_figure, si, si_formatter
from hf_power.records.errors import UserError, refused_by, shown
from hf_power.schedule.lengths import plan_schedule
from hf_power.schedule.shape import Schedule
from hf_power.schedule.words import highest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 600


def plot_schedule(
    args: TrainingArguments,
    *,
    tokens_per_step: int | None = None,
    num_training_steps: int | None = None,
    versus: str | None = "cosine",
) -> "Figure":
    """The learning rate over the tokens of a run that its arguments describe, before anything is trained.

    Args:
        args: with lr_scheduler_type "power"; learning_rate, warmup, lr_scheduler_kwargs and max_steps are read.
        tokens_per_step: tokens of one optimizer step over all processes; None where lr_scheduler_kwargs has it.
        num_training_steps: length of the run; None for args.max_steps.
        versus: another schedule of transformers with the same peak, warmup and length, or None.

    Returns:
        A figure of matplotlib; ``figure.savefig(path)`` writes it.

    Raises:
        UserError: another lr_scheduler_type, or arguments that say neither length nor batch.
    """
    schedule = schedule_of(args, tokens_per_step, num_training_steps)
    return plot_rates(schedule, versus)


def schedule_of(args: TrainingArguments, tokens_per_step: int | None = None, steps: int | None = None) -> Schedule:
    """The schedule that arguments ask for, see `plot_schedule`."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name != "power":
        raise UserError(f"lr_scheduler_type is {name}, but only power can be previewed: set it to power.")
    # TrainingArguments have made a mapping of them where they came as text.
    kwargs = dict(cast("Mapping[str, Any]", args.lr_scheduler_kwargs or {}))
    if tokens_per_step is not None:
        kwargs["tokens_per_step"] = tokens_per_step
    length = args.max_steps if steps is None else steps
    if length < 1 or "tokens_per_step" not in kwargs:
        raise UserError(
            f"a preview needs the length and the batch of the run, got max_steps {length} and "
            f"tokens_per_step {kwargs.get('tokens_per_step')}: pass num_training_steps and tokens_per_step."
        )
    return plan_schedule(
        **{"max_lr": args.learning_rate, "num_warmup_steps": args.get_warmup_steps(length), **kwargs},
        num_training_steps=length,
    )


def rates(schedule: Schedule, versus: str | None = None, num_points: int = POINTS) -> tuple[list[float], list[float]]:
    """Tokens at equal distances over a run, and the rates there; of `versus` with the same peak, warmup and length."""
    total = schedule.total_tokens or 0
    # The last step begins one step before the end, where the rate is still above its floor.
    last = total - schedule.tokens_per_step
    tokens = [last * i / (num_points - 1) for i in range(num_points)]
    if versus is None:
        return tokens, [schedule.lr(n) for n in tokens]
    step = schedule.tokens_per_step
    steps, warmup = round(total / step), round(schedule.warmup_tokens / step)
    kwargs = {"num_decay_steps": round(schedule.decay_tokens / step)} if versus == "warmup_stable_decay" else {}
    known = [kind.value for kind in SchedulerType]
    if versus not in known:
        raise UserError(f"versus is no schedule of transformers, got {shown(versus)}: take cosine, linear or another.")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=schedule.max_lr)
    with refused_by(f"the schedule {versus}"):
        made = get_scheduler(versus, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
        factor = made.lr_lambdas[0]
    return tokens, [schedule.max_lr * factor(round(n / step)) for n in tokens]


def plot_rates(schedule: Schedule, versus: str | None = None) -> "Figure":
    """The rates of a schedule over its run, beside another one, see `rates`; its conclusion is the title."""
    figure = new_figure(7.5, 4.2)
    panel = figure.subplots()
    tokens, power = rates(schedule)
    if versus is not None:
        other = rates(schedule, versus)[1]
        label = f"{versus}, mean {sum(other) / len(other):.2g}"
        panel.plot(tokens, other, color=GRAY, linewidth=1.8, linestyle="--", label=label)
    panel.plot(tokens, power, color=STRONG, linewidth=2, label=f"power, mean {sum(power) / len(power):.2g}")
    panel.legend(frameon=False)
    panel.set_ylim(bottom=0)
    panel.set_xlabel(f"tokens seen ({schedule.tokens_per_step:,} per step)")
    panel.set_ylabel("learning rate")
    panel.xaxis.set_major_formatter(si_formatter())
    panel.grid(alpha=0.3)
    at, peak = highest(schedule)
    where = f"after {si(at)} tokens" if at else "from the first step"
    end = schedule.lr(schedule.end_of_law)
    figure.suptitle(f"Power peaks at {peak:.3g} {where} and has {end:.3g} where it ends or decays", fontsize=11)
    return figure
