"""The arguments of the verb schedule, and what it prints."""

from dataclasses import dataclass, field

from hf_power.data.text import option
from hf_power.plots.schedule import rates
from hf_power.records.errors import UserError
from hf_power.schedule.law import PAPER_MAX_LR
from hf_power.schedule.lengths import plan_schedule
from hf_power.schedule.shape import Schedule
from hf_power.schedule.words import describe, sketch, whose
from hf_power.settings.sections import parse_tokens


@dataclass(frozen=True)
class ScheduleArguments:
    """The learning rate of a run that is not begun."""

    tokens_per_step: str = field(metadata={"help": "global batch in tokens, e.g. 64k"})
    steps: int | None = option(None, "length of the run; or give --tokens")
    tokens: str | None = option(None, "length of the run in tokens, e.g. 80M; or give --steps")
    lr: float | None = option(None, "the cap, learning_rate of TrainingArguments; default: 0.02, the paper's")
    peak_lr: float | None = option(None, "instead of --lr and --a: the best peak of cosine for this run")
    warmup_steps: int = option(0, "linear warmup")
    law: str | None = option(None, "name of a published law: paper, delphi; default: paper")
    a: float | None = option(None, "scale of the law; default: that of --law")
    b: float | None = option(None, "exponent of the tokens; default: that of --law")
    batch_exponent: float | None = option(None, "exponent of the batch; default: that of --law")
    decay_ratio: float = option(0.1, "length of the tail over the run")
    decay_shape: str = option("exponential", "exponential, linear, 1-sqrt or cosine")
    versus: str | None = option(None, "another schedule of the same peak and warmup beside it: cosine, linear, ...")
    picture: str | None = option(None, "write the picture to this PNG file")

    def planned(self) -> "Schedule":
        """The schedule; a UserError for a length that is missing or given twice."""
        step = parse_tokens(self.tokens_per_step, "--tokens_per_step")
        if (self.steps is None) == (self.tokens is None):
            raise UserError(f"the length is --steps or --tokens, got {self.steps} and {self.tokens}: give one of them.")
        if step < 1:
            raise UserError(f"--tokens_per_step must be positive, got {self.tokens_per_step!r}: pass e.g. 64k.")
        steps = self.steps if self.steps is not None else round(parse_tokens(self.tokens or "", "--tokens") / step)
        if self.peak_lr is not None and self.lr not in (None, self.peak_lr):
            raise UserError(f"--peak_lr {self.peak_lr:g} is the cap, and --lr {self.lr:g} another one: leave --lr out.")
        for name, rate in (("--lr", self.lr), ("--peak_lr", self.peak_lr)):
            if rate is not None and not rate > 0:
                raise UserError(f"{name} must be positive, got {rate:g}: pass e.g. 1e-3.")
        if steps < 2:
            raise UserError(f"a run of {steps} steps has no schedule to show: give more --steps or --tokens.")
        names = ("law", "a", "b", "batch_exponent", "peak_lr", "decay_ratio", "decay_shape")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        cap = PAPER_MAX_LR if self.lr is None else self.lr
        lengths = {"num_warmup_steps": self.warmup_steps, "num_training_steps": steps}
        return plan_schedule(tokens_per_step=step, max_lr=self.peak_lr or cap, **lengths, **given)


def schedule_text(arguments: ScheduleArguments, planned: Schedule) -> str:
    """The schedule in a line, the mean rates, the sketch, and the arguments that make it."""
    given = {"a": arguments.a, "b": arguments.b, "batch_exponent": arguments.batch_exponent}
    curves = [("power", "*", rates(planned)[1])]
    if arguments.versus:
        curves = [(arguments.versus, "o", rates(planned, arguments.versus)[1]), *curves]
    means = [f"{name}: mean rate {sum(values) / len(values):.3g}" for name, _, values in curves]
    kwargs = {name: value for name, value in planned.law.to_dict().items() if value is not None}
    if arguments.peak_lr is not None:
        means.append(
            "a gives the run the mean rate of cosine with this peak, which is taken to be the best one "
            "for this batch and length; the exponents are not measured on your model"
        )
    made = f"learning_rate={planned.max_lr:g}, lr_scheduler_kwargs={kwargs}"
    return "\n".join([describe(planned, whose(arguments.law, given, arguments.peak_lr)), *means, sketch(curves), made])
