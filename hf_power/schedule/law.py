"""The law of the learning rate, ``a * size**s * beta**c * n**b``, and the checks of its numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from hf_power.records.errors import UserError

TOKENS_PER_BETA = 4096  # The paper counts the batch in sequences of 4096 tokens (section 3).
PAPER_MAX_LR = 0.02
LAW_NAMES = ("a", "b", "batch_exponent", "critical_batch_tokens", "critical_batch_growth")
CRITICAL_AT_TOKENS = 1e9  # A critical batch that grows is named by its value at so many tokens.


def beta(tokens_per_step: float) -> float:
    """The batch in sequences of 4096 tokens."""
    return tokens_per_step / TOKENS_PER_BETA


@dataclass(frozen=True)
class Law:
    """The uncapped law of the learning rate, ``a * size**s * beta**c * n**b`` (eq. 6 and 7), with n in tokens.

    ``beta = min(tokens_per_step, B_crit) / 4096`` with ``B_crit = critical_batch_tokens * (n / 1e9)**k``. The paper has
    neither a critical batch nor a size; s = k = 0 is its form. A law is not checked when it is built, because a fit may
    find one that no run can follow; `Schedule` calls `check`.

    Attributes:
        a: scale, > 0. 4.0 is the paper's scheduler constant, 4.6 belongs to its fit of WSD optima.
        b: exponent of the tokens, < 0.
        batch_exponent: c, exponent of the batch; 1 in the paper.
        critical_batch_tokens: batch at 1e9 tokens, in tokens per step, above which a larger one no longer raises the
            rate, > 0. None means that there is none.
        critical_batch_growth: k, exponent of the tokens in the critical batch, >= 0.
        size: "parameters" or "width", what the size counts; None where the law does not depend on it.
        size_exponent: s; 0 without a size.

    >>> round(PAPER_OPTIMA.lr(10e12, tokens_per_step=4_194_304), 4)  # the paper's own example
    0.0011
    """

    a: float
    b: float
    batch_exponent: float = 1.0
    critical_batch_tokens: float | None = None
    critical_batch_growth: float = 0.0
    size: Literal["parameters", "width"] | None = None
    size_exponent: float = 0.0

    def lr(self, tokens_seen: float, tokens_per_step: float, size: float | None = None) -> float:
        """The learning rate that the law asks for, which is infinite at no tokens; a UserError without a size it needs."""
        if tokens_seen <= 0:
            return math.inf
        law = self.at(size)
        critical = law.critical_at(tokens_seen)
        batch = beta(tokens_per_step if critical is None else min(tokens_per_step, critical))
        return float(law.a * batch**law.batch_exponent * float(tokens_seen) ** law.b)

    def critical_at(self, tokens: float) -> float | None:
        """The critical batch after so many tokens, in tokens per step; None where there is none."""
        if self.critical_batch_tokens is None or not self.critical_batch_growth:
            return self.critical_batch_tokens
        return float(self.critical_batch_tokens * (tokens / CRITICAL_AT_TOKENS) ** self.critical_batch_growth)

    def at(self, size: float | None) -> "Law":
        """The law of one model, its size within the scale; a UserError without a size that the law needs."""
        if self.size is None:
            return self
        if size is None or size <= 0:
            raise UserError(f"the law depends on the model's {self.size}, got {size}: pass the model's size.")
        return replace(self, a=self.a * float(size) ** self.size_exponent, size=None, size_exponent=0.0)

    def check(self) -> None:
        """Refuse numbers that no schedule can follow.

        Raises:
            UserError: a number that is not finite, a or critical_batch_tokens <= 0, b >= 0, a critical batch that shrinks,
                or a law that still depends on the size.
        """
        for name, value in self.to_dict().items():
            if value is not None or name != "critical_batch_tokens":
                check_number(name, value)
        if self.a <= 0:
            raise UserError(
                f"a, the scale of the power law, must be positive, got {self.a}: the paper has {PAPER_LAW.a}."
            )
        if self.b >= 0:
            raise UserError(
                f"b, the exponent of the power law, must be negative, got {self.b}: the paper has {PAPER_LAW.b}."
            )
        if self.critical_batch_tokens is not None and self.critical_batch_tokens <= 0:
            raise UserError(
                f"critical_batch_tokens must be positive, got {self.critical_batch_tokens}: pass tokens per step, or None "
                "for none."
            )
        if self.critical_batch_growth < 0:
            raise UserError(
                f"critical_batch_growth must not be negative, got {self.critical_batch_growth}: pass 0 for none."
            )
        self.at(None)

    def formula(self, max_lr: float | None = None) -> str:
        """The law as text, under its cap if there is one.

        >>> PAPER_LAW.formula(0.02)
        'min(0.02, 4 * beta^1 * n^-0.51)'
        """
        critical = self.critical_batch_tokens
        growth = f" * (n / 1e9)^{self.critical_batch_growth:.4g}" if self.critical_batch_growth else ""
        batch = "beta" if critical is None else f"min(beta, {beta(critical):.4g}{growth})"
        size = f"{self.size}^{self.size_exponent:.4g} * " if self.size else ""
        said = f"{self.a:.4g} * {size}{batch}^{self.batch_exponent:.4g} * n^{self.b:.4g}"
        return said if max_lr is None else f"min({max_lr:g}, {said})"

    def to_dict(self) -> dict[str, float | None]:
        """The numbers of LAW_NAMES, as arguments of a schedule; the growth of a critical batch only where there is one."""
        names = LAW_NAMES if self.critical_batch_growth else LAW_NAMES[:-1]
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Law":
        """The law among the values, which may hold others too; a number that is not there has its default."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if values.get(field.name) is not None})


PAPER_LAW = Law(4.0, -0.51)  # The schedule's own (eq. 7).
PAPER_OPTIMA = Law(4.6, -0.51)  # The paper's fit of the best peaks of WSD (eq. 6).


def check_cap(lr: Any) -> float:
    """eta_max as a float, or a UserError where it is not positive."""
    if lr is None or not float(lr) > 0:
        raise UserError(
            f"the power schedule takes its cap from the optimizer's own lr, got {lr}: build the optimizer with lr=eta_max "
            f"({PAPER_MAX_LR} in the paper)."
        )
    return float(lr)


def check_number(name: str, value: object) -> None:
    """Raise a UserError for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(
            f"{name} must be a finite number, got {value!r}: write it without quotes, e.g. 4.0, and in YAML 1.0e+3 for 1e3."
        )


def check_length(name: str, value: float | None) -> None:
    """Raise a UserError for what is neither None nor a number of tokens or steps."""
    if value is not None:
        check_number(name, value)
        if value < 0:
            raise UserError(f"{name} must not be negative, got {value}: pass 0 for none.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a UserError for what is none of the choices."""
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
