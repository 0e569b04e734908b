"""Warmup, run and tail as a caller states them, and the schedule that follows from them."""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from hf_power.records.errors import UserError
from hf_power.schedule.cosine import with_peak
from hf_power.schedule.law import LAW_NAMES, check_length, check_number
from hf_power.schedule.presets import chosen_law
from hf_power.schedule.shape import Schedule


class Progress(NamedTuple):
    """How far a run is: the tokens seen after so many calls of `PowerLR.step`, of which a step makes calls_per_step."""

    # Whole numbers throughout: after 1e16 tokens a float no longer holds every single one.
    tokens: int
    calls: int
    calls_per_step: int = 1


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Warmup, run and tail as a caller states them, in steps or in tokens; the arguments of `PowerLR` have the details.

    Raises:
        UserError: a length that is no number, negative, or given twice.
    """

    num_warmup_steps: int | None = 0
    num_training_steps: int | None = None
    warmup_tokens: int | None = None
    decay_ratio: float | None = None
    decay_tokens: int | None = None
    decay_start_tokens: int | None = None
    tokens_seen: int = 0

    def __post_init__(self) -> None:
        for name in ("num_warmup_steps", "warmup_tokens", "decay_tokens", "decay_start_tokens", "tokens_seen"):
            check_length(name, getattr(self, name))
        if self.decay_ratio is not None:
            check_number("decay_ratio", self.decay_ratio)
        if self.warmup_tokens is not None and self.num_warmup_steps:
            raise UserError(
                f"warmup is given twice, num_warmup_steps={self.num_warmup_steps} and warmup_tokens={self.warmup_tokens}: "
                "pass one of them."
            )
        if self.decay_ratio is not None and (self.decay_tokens is not None or self.decay_start_tokens is not None):
            raise UserError(
                f"the decay is given twice, decay_ratio={self.decay_ratio} and decay_tokens={self.decay_tokens} / "
                f"decay_start_tokens={self.decay_start_tokens}: pass one of them."
            )
        if not 0 <= (self.decay_ratio or 0) <= 1:
            raise UserError(
                f"decay_ratio must lie between 0 and 1, got {self.decay_ratio}: pass 0.1 for the last 10 %."
            )

    def tail(self, total: int | None) -> tuple[int | None, int]:
        """First token and length of the tail of a run that ends at token `total`; (None, 0) where there is no tail."""
        start, length = self.decay_start_tokens, self.decay_tokens
        # Either end of the tail may be left open, and then the end of the run stands in for it.
        needs_end = length if start is None else length is None
        if total is None and (needs_end or self.decay_ratio):
            raise UserError("a decay that ends with the run needs its length: pass num_training_steps.")
        if start is None:
            if total is None:
                return None, 0
            if length is None:
                # The ratio is one of this run, for a run from other weights must not begin its tail before itself.
                length = round(
                    (total - int(self.tokens_seen)) * (0.1 if self.decay_ratio is None else self.decay_ratio)
                )
            start = total - length
        elif length is None:
            length = (total or 0) - start
        if start < 0 or length < 0 or (total is not None and start + length > total):
            raise UserError(
                f"a decay of {length:,} tokens from token {start:,} does not fit into a run of {total or 0:,} tokens: "
                "shorten the decay or train longer."
            )
        return (start, length) if length else (None, 0)

    def applied_to(self, schedule: Schedule, at: Progress | None = None) -> Schedule:
        """The schedule with these lengths, from the beginning of the run or from where it is resumed.

        Raises:
            UserError: warmup and tail do not fit into the run.
        """
        at = at or Progress(int(self.tokens_seen), 0)

        def tokens(calls: int) -> int:
            return calls * schedule.tokens_per_step // at.calls_per_step

        total = None
        if self.num_training_steps is not None:
            total = at.tokens + tokens(max(0, self.num_training_steps - at.calls))
        start, length = self.tail(total)
        warmup = tokens(self.num_warmup_steps or 0) if self.warmup_tokens is None else self.warmup_tokens
        end = total if start is None else start
        # A run that is resumed after its warmup may have become shorter than that.
        if end is not None and warmup > end and warmup > at.tokens:
            raise UserError(
                f"a warmup of {warmup:,} tokens does not fit before token {end:,}, where the "
                f"{'run ends' if start is None else 'decay starts'}: shorten the warmup or the decay, or train longer."
            )
        return replace(
            schedule, warmup_tokens=warmup, decay_start_tokens=start, decay_tokens=length, total_tokens=total
        )


def plan_schedule(resumed: Progress | None = None, /, **arguments: Any) -> Schedule:
    """The schedule of a `PowerLR` with these arguments and max_lr, from where the run is `resumed` (None: its beginning)."""
    law = chosen_law(arguments, arguments.pop("law", None))
    peak = arguments.pop("peak_lr", None)
    if peak is not None and arguments.get("a") is not None:
        raise UserError(f"peak_lr={peak} and a={arguments['a']} both say how large the rate is: give one of them.")
    lengths = {f.name: arguments.pop(f.name) for f in fields(Lengths) if f.name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in LAW_NAMES}
    planned = Lengths(**lengths).applied_to(Schedule(law=law, **rest), resumed)
    return planned if peak is None else with_peak(planned, peak)
