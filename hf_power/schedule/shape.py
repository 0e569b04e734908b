"""The Power schedule: the learning rate as a function of the tokens seen (Shen et al. 2024, arXiv:2408.13359)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hf_power.records.errors import UserError
from hf_power.schedule.law import (
    CRITICAL_AT_TOKENS,
    PAPER_LAW,
    PAPER_MAX_LR,
    Law,
    beta,
    check_cap,
    check_choice,
    check_length,
    check_number,
)

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    # The paper names this shape (eq. 8) but never writes it; the formula is that of IBM's code.
    "exponential": lambda x: (math.exp(1.0 - x) - 1.0) / (math.e - 1.0),
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def power_lr(
    tokens_seen: float,
    *,
    tokens_per_step: float,
    max_lr: float = PAPER_MAX_LR,
    a: float = PAPER_LAW.a,
    b: float = PAPER_LAW.b,
    batch_exponent: float = PAPER_LAW.batch_exponent,
    critical_batch_tokens: float | None = None,
    critical_batch_growth: float = 0.0,
    warmup_tokens: float = 0,
    warmup_to: str = "law",
    decay_start_tokens: float | None = None,
    decay_tokens: float = 0,
    decay_shape: str = "exponential",
    min_lr_ratio: float = 0.0,
) -> float:
    """Learning rate after ``tokens_seen`` tokens (eq. 7 and 8).

    With n = tokens_seen, ``eta_power(n) = min(max_lr, a * beta**c * n**b)``, s = decay_start_tokens and
    x = (n - s) / decay_tokens::

        n < warmup_tokens      n / warmup_tokens * eta_power(warmup_tokens)     (warmup_to="law", eq. 8)
                               n / warmup_tokens * max_lr                       (warmup_to="max", Granite 3.0)
        n < s                  eta_power(n)
        n < s + decay_tokens   eta_power(s) * (r + (1 - r) * f(x))              r = min_lr_ratio, f = decay_shape
        afterwards             eta_power(s) * r

    At n = 0 the value is 0 with a warmup and max_lr without one. Without decay_start_tokens the law goes on for ever.

    Args:
        tokens_seen: tokens seen before the step, >= 0.
        tokens_per_step, a, b, batch_exponent, critical_batch_tokens, critical_batch_growth: see `Law`.
        max_lr: eta_max, the cap.
        warmup_tokens: length of the linear warmup, in tokens as all others.
        warmup_to: "law" or "max".
        decay_start_tokens: where the tail begins; None means that there is no tail.
        decay_tokens: length of the tail; 0 drops to the floor at once. decay_shape: see DECAY_SHAPES; f(0) = 1, f(1) = 0.
        min_lr_ratio: floor of the tail, as a ratio of the rate at which the tail begins.

    >>> power_lr(0, tokens_per_step=4096 * 128)
    0.02
    >>> round(power_lr(1e11, tokens_per_step=4096 * 128), 5)
    0.00126
    >>> round(power_lr(5e8, tokens_per_step=4096 * 128, warmup_tokens=1e9), 5)  # half of .0132
    0.00658
    """
    law = Law(a, b, batch_exponent, critical_batch_tokens, critical_batch_growth)

    def eta(n: float) -> float:
        return min(max_lr, law.lr(n, tokens_per_step))

    if tokens_seen < warmup_tokens:
        top = max_lr if warmup_to == "max" else eta(warmup_tokens)
        return tokens_seen / warmup_tokens * top
    if decay_start_tokens is None or tokens_seen < decay_start_tokens:
        return eta(tokens_seen)
    done = (tokens_seen - decay_start_tokens) / decay_tokens if decay_tokens else 1.0
    shape = DECAY_SHAPES[decay_shape](done) if done < 1.0 else 0.0  # A shape would rise again past its end.
    return eta(decay_start_tokens) * (min_lr_ratio + (1.0 - min_lr_ratio) * shape)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """eta(n) of a run, by the formula of `power_lr`; every length is in tokens.

    `hf_power.scheduler.plan_schedule` makes one from the arguments of `PowerLR`, which has lengths in steps too.

    Attributes:
        law: the uncapped law.
        tokens_per_step: tokens of one optimizer step over all processes, >= 1.
        max_lr: eta_max, the cap, > 0.
        warmup_tokens, warmup_to, decay_start_tokens, decay_tokens, decay_shape, min_lr_ratio: see `power_lr`.
        total_tokens: where the run ends; None for a trunk without an end.

    Raises:
        UserError: a value outside its range.
    """

    law: Law = PAPER_LAW
    tokens_per_step: int
    max_lr: float = PAPER_MAX_LR
    warmup_tokens: int = 0
    warmup_to: str = "law"
    decay_start_tokens: int | None = None
    decay_tokens: int = 0
    decay_shape: str = "exponential"
    min_lr_ratio: float = 0.0
    total_tokens: int | None = None

    def __post_init__(self) -> None:
        self.law.check()
        for name in ("tokens_per_step", "min_lr_ratio"):
            check_number(name, getattr(self, name))
        if self.tokens_per_step < 1 or self.tokens_per_step != int(self.tokens_per_step):
            raise UserError(
                f"tokens_per_step must be a positive whole number, got {self.tokens_per_step}: pass the tokens of one "
                "optimizer step over all processes."
            )
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio must lie between 0 and 1, got {self.min_lr_ratio}: pass 0 to decay to zero.")
        for name in ("warmup_tokens", "decay_start_tokens", "decay_tokens"):
            check_length(name, getattr(self, name))
        check_choice("warmup_to", self.warmup_to, ("law", "max"))
        check_choice("decay_shape", self.decay_shape, tuple(DECAY_SHAPES))
        # JSON and the command line may bring 4096.0, and an optimizer may have a tensor.
        object.__setattr__(self, "tokens_per_step", int(self.tokens_per_step))
        object.__setattr__(self, "max_lr", check_cap(self.max_lr))

    def lr(self, tokens_seen: float) -> float:
        """eta(tokens_seen), for a parameter group whose base is eta_max."""
        return power_lr(tokens_seen, **self.to_dict())

    @property
    def end_of_law(self) -> float:
        """The token at which the tail begins or else the run ends; infinite where neither is known."""
        if self.decay_start_tokens is not None:
            return self.decay_start_tokens
        return math.inf if self.total_tokens is None else self.total_tokens

    @property
    def cap_ends(self) -> int | None:
        """Tokens at which the law falls to max_lr; None unless that lies between the warmup and `end_of_law`."""
        # In logarithms, because a law that falls slowly meets the cap after more tokens than a float can hold.
        law, growth = self.law, self.law.critical_batch_growth
        log_tokens = (
            math.log(replace(law, critical_batch_growth=0.0).lr(1, self.tokens_per_step) / self.max_lr) / -law.b
        )
        if growth and law.critical_batch_tokens is not None:
            # From here on the batch is below the critical one; before, the law goes as n**(b + c k), and may rise.
            log_met = math.log(self.tokens_per_step / law.critical_batch_tokens) / growth + math.log(CRITICAL_AT_TOKENS)
            log_tokens = math.log(law.a * beta(self.tokens_per_step) ** law.batch_exponent / self.max_lr) / -law.b
            if log_tokens < log_met:
                slope = law.b + law.batch_exponent * growth
                log_tokens = log_met + (law.b * (log_met - log_tokens)) / -slope if slope < 0 else -math.inf
        inside = math.log(max(1, self.warmup_tokens)) < log_tokens <= math.log(max(1, self.end_of_law))
        return int(math.exp(log_tokens)) if inside else None

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `power_lr`, which run.json keeps as its "schedule"."""
        return {
            "tokens_per_step": self.tokens_per_step,
            "max_lr": self.max_lr,
            **self.law.to_dict(),
            "warmup_to": self.warmup_to,
            "decay_shape": self.decay_shape,
            "min_lr_ratio": self.min_lr_ratio,
            "warmup_tokens": self.warmup_tokens,
            "decay_start_tokens": self.decay_start_tokens,
            "decay_tokens": self.decay_tokens,
        }
