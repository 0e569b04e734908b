"""`from_cosine`: the numbers of Power for whoever knows a good peak of cosine."""

import math
from dataclasses import dataclass
from typing import Any

from hf_power.records.errors import UserError
from hf_power.schedule.cosine import check_peak
from hf_power.schedule.law import Law, check_length
from hf_power.schedule.lengths import plan_schedule

# Without a warmup of the user's own: a share of the run, but at least so many steps, and never more than a tenth.
WARMUP_SHARE, WARMUP_STEPS, LONGEST_WARMUP = 0.02, 100, 0.1


@dataclass(frozen=True)
class FromCosine:
    """What a tuned cosine says of Power, see `from_cosine`.

    Attributes:
        law: for every batch and horizon of this model.
        max_lr: the cap, which is the peak of cosine.
        warmup_tokens: length of the warmup.
        tokens, tokens_per_step: of the run in which cosine's peak was the best.
        decay_ratio, decay_shape: the tail that Power has.
    """

    law: Law
    max_lr: float
    warmup_tokens: int
    tokens: int
    tokens_per_step: int
    decay_ratio: float
    decay_shape: str

    @property
    def caption(self) -> str:
        """What the numbers assume, in sentences."""
        end = self.law.lr(self.tokens, self.tokens_per_step)
        return (
            f"a {self.law.a:.3g} gives Power over {self.tokens:,} tokens the mean rate of a cosine "
            f"with the peak {self.max_lr:g}, which is also the cap; the law is at {end:.3g} by then. This assumes that the "
            f"peak is the best one for {self.tokens_per_step:,} tokens per step. Another batch or horizon is reached by the exponents "
            f"{self.law.batch_exponent:g} and {self.law.b:g}, which are not measured on your model: a sweep does that."
        )

    def arguments(self, tokens_per_step: int | None = None) -> dict[str, Any]:
        """Arguments of `transformers.TrainingArguments`, for a batch of so many tokens, by default cosine's own."""
        steps = round(self.warmup_tokens / (tokens_per_step or self.tokens_per_step))
        law = {name: value for name, value in self.law.to_dict().items() if value is not None}
        kwargs = {**law, "decay_ratio": self.decay_ratio, "decay_shape": self.decay_shape}
        return {
            "lr_scheduler_type": "power",
            "learning_rate": self.max_lr,
            "lr_scheduler_kwargs": kwargs,
            "warmup_steps": steps,
        }


def from_cosine(
    *,
    peak_lr: float,
    tokens: int,
    tokens_per_step: int,
    warmup_tokens: int | None = None,
    law: str = "paper",
    decay_ratio: float = 0.1,
    decay_shape: str = "exponential",
) -> FromCosine:
    """Power's law, cap and warmup from the best peak of cosine in a run that you know.

    The cap is the peak, and a is such that the mean rate over the run is that of cosine, peak_lr / 2; see
    `hf_power.schedule.cosine.with_peak`.

    Args:
        peak_lr: the best peak of cosine (from the warmup's end to zero), for these tokens and this batch, > 0.
        tokens: length of that run.
        tokens_per_step: tokens of one of its optimizer steps over all processes.
        warmup_tokens: length of its warmup; by default 2 % of the run, at least 100 steps, at most a tenth of the run.
        law: name of the preset that has b and the batch exponent, see `hf_power.schedule.presets.PRESETS`.
        decay_ratio, decay_shape: the tail that Power is to have, see `hf_power.PowerLR`.

    Returns:
        A `FromCosine`; ``TrainingArguments(..., **hf_power.from_cosine(...).arguments())`` takes it up.

    Raises:
        UserError: a number outside of its range.

    >>> found = from_cosine(peak_lr=1e-3, tokens=82_000_000, tokens_per_step=8192)
    >>> found.max_lr, found.warmup_tokens
    (0.001, 1640000)
    """
    for name, value in (("tokens", tokens), ("tokens_per_step", tokens_per_step), ("warmup_tokens", warmup_tokens)):
        check_length(name, value)
    if tokens < 1 or tokens_per_step < 1 or tokens < tokens_per_step:
        raise UserError(f"a run of {tokens} tokens has no step of {tokens_per_step}: pass the tokens of the whole run.")
    if warmup_tokens is None:
        wanted = max(WARMUP_SHARE * tokens, WARMUP_STEPS * tokens_per_step)
        warmup_tokens = round(min(wanted, LONGEST_WARMUP * tokens))
    check_peak(peak_lr)
    planned = plan_schedule(
        peak_lr=peak_lr,
        law=law,
        max_lr=peak_lr,
        tokens_per_step=int(tokens_per_step),
        num_training_steps=math.ceil(tokens / tokens_per_step),
        warmup_tokens=warmup_tokens,
        decay_ratio=decay_ratio,
        decay_shape=decay_shape,
    )
    run = int(tokens), int(tokens_per_step)
    return FromCosine(planned.law, planned.max_lr, warmup_tokens, *run, decay_ratio, decay_shape)
