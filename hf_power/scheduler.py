"""The Power schedule as a PyTorch scheduler, with lengths in steps."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch.optim.lr_scheduler import LRScheduler

from hf_power.records.errors import UserError
from hf_power.schedule import LAW_NAMES, PAPER_LAW, PAPER_MAX_LR, Law, Schedule, check_cap, check_length, check_number


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
    law = replace(PAPER_LAW, **{name: arguments.pop(name) for name in LAW_NAMES if name in arguments})
    lengths = {f.name: arguments.pop(f.name) for f in fields(Lengths) if f.name in arguments}
    return Lengths(**lengths).applied_to(Schedule(law=law, **arguments), resumed)


class PowerLR(LRScheduler):
    """The Power schedule as a PyTorch scheduler whose state is the number of tokens seen.

    Each parameter group gets ``base_lr * eta(n) / eta_max`` with ``eta_max = optimizer.defaults["lr"]``, so ratios
    between groups (muP) are kept, and a group above eta_max follows as many times the law. An optimizer whose groups
    all have rates of their own and that was built without lr= has the highest of them for eta_max. The number of tokens seen is the only state that a checkpoint holds: a run resumed
    with another batch goes on from its tokens under today's arguments, and the end of the schedule moves to today's
    last step. `power_lr` has the formula.

    Args:
        optimizer: its ``defaults["lr"]`` is eta_max, the cap (0.02 in the paper).
        num_warmup_steps: linear warmup, in steps.
        num_training_steps: length of the run, in steps; None for a trunk without an end.
        tokens_per_step: tokens of one optimizer step: sequences x sequence length, over all data-parallel processes,
            accumulation included.
        a, b, batch_exponent, critical_batch_tokens, critical_batch_growth: see `Law`; the paper's by default.
        warmup_tokens: linear warmup, in tokens, instead of num_warmup_steps.
        warmup_to: "law": up to the law at the end of the warmup (eq. 8); "max": up to eta_max (Granite 3.0).
        decay_ratio: length of the tail as a ratio of the run, in [0, 1]; 0.1 by default, 0 for a trunk without a tail.
        decay_tokens: length of the tail, in tokens, instead of decay_ratio.
        decay_start_tokens: first token of the tail, if it is not to end with the run; alone, it decays to the end.
        decay_shape: "exponential", "linear", "1-sqrt" or "cosine".
        min_lr_ratio: floor as a ratio of the rate at the start of the tail, in [0, 1].
        tokens_seen: tokens that the model had seen before this run.
        last_epoch: as in every PyTorch scheduler.

    Attributes:
        schedule: the `Schedule` that it follows.
        tokens_seen: tokens seen so far.

    Raises:
        UserError: a value outside its range, a length given twice, or warmup and tail longer than the run.

    Warns:
        UserWarning: the cap binds for the whole run, or a group without a name has a rate above eta_max.
    """

    # How often one optimizer step calls step(). accelerate's wrapper calls it once per process, which register.py finds out.
    calls_per_step: ClassVar[Callable[[], int]] = staticmethod(lambda: 1)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_warmup_steps: int = 0,
        num_training_steps: int | None = None,
        *,
        tokens_per_step: int,
        a: float = PAPER_LAW.a,
        b: float = PAPER_LAW.b,
        batch_exponent: float = PAPER_LAW.batch_exponent,
        critical_batch_tokens: float | None = None,
        critical_batch_growth: float = 0.0,
        warmup_tokens: int | None = None,
        warmup_to: str = "law",
        decay_ratio: float | None = None,
        decay_tokens: int | None = None,
        decay_start_tokens: int | None = None,
        decay_shape: str = "exponential",
        min_lr_ratio: float = 0.0,
        tokens_seen: int = 0,
        last_epoch: int = -1,
    ) -> None:
        unplanned = Schedule(
            law=Law(a, b, batch_exponent, critical_batch_tokens, critical_batch_growth),
            tokens_per_step=tokens_per_step,
            max_lr=_max_lr(optimizer),
            warmup_to=warmup_to,
            decay_shape=decay_shape,
            min_lr_ratio=min_lr_ratio,
        )
        self._lengths = Lengths(
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_training_steps,
            warmup_tokens=warmup_tokens,
            decay_ratio=decay_ratio,
            decay_tokens=decay_tokens,
            decay_start_tokens=decay_start_tokens,
            tokens_seen=tokens_seen,
        )
        self._at = Progress(int(tokens_seen), 0)  # The property tokens_seen counts on from here.
        self.schedule = self._lengths.applied_to(unplanned, self._at)
        self._warn_if_cap_binds()
        super().__init__(optimizer, last_epoch)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.schedule.tokens_per_step

    @property
    def max_lr(self) -> float:
        """eta_max, the cap."""
        return self.schedule.max_lr

    @property
    def total_tokens(self) -> int | None:
        """Where the schedule ends, in tokens, or None."""
        return self.schedule.total_tokens

    @property
    def tokens_seen(self) -> int:
        """Tokens seen so far, counting every finished optimizer step."""
        calls = self.last_epoch - self._at.calls
        return self._at.tokens + calls * self.tokens_per_step // self._at.calls_per_step

    def _warn_if_cap_binds(self) -> None:
        total, end = self.total_tokens, self.schedule.end_of_law
        if total is None or total <= self._at.tokens:
            return
        law = self.schedule.law.lr(end, self.tokens_per_step)
        if law >= self.max_lr:
            warnings.warn(
                f"the cap learning_rate={self.max_lr:g} binds for the whole run: the law only falls to {law:.3g} by "
                f"{end:,} tokens, so the rate is constant until the decay; set learning_rate to the cap that you want "
                f"({PAPER_MAX_LR} in the paper).",
                stacklevel=4,
            )

    def get_lr(self) -> list[float | torch.Tensor]:
        """Learning rate of each group at the present number of tokens."""
        factor = self.schedule.lr(self.tokens_seen) / self.max_lr
        return [base_lr * factor for base_lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Count one optimizer step's tokens and set the learning rates for the next one.

        A scheduler that went through `accelerator.prepare` is stepped num_processes times per optimizer step, and
        by accelerate's convention its lengths in steps are multiplied by num_processes; each call then counts its
        share of the tokens.

        Raises:
            RuntimeError: if a prepared scheduler runs far past its end, because its lengths were not multiplied.
        """
        before, calls = self._at.calls_per_step, PowerLR.calls_per_step()
        if calls != before and self._step_count:  # It is 0 in the step that torch's constructor makes.
            self.last_epoch = self.last_epoch * calls // before
            self._go_on_from(Progress(self._at.tokens, self._at.calls * calls // before, calls))
        calls, last = self._at.calls_per_step, self._lengths.num_training_steps
        if calls > 1 and last is not None and self.last_epoch > 1.05 * last + calls:
            raise RuntimeError(
                f"the power schedule of {last} steps is over, but the run goes on: accelerator.prepare() steps it "
                f"{calls} times per optimizer step; multiply num_training_steps and num_warmup_steps by "
                "accelerator.num_processes, or do not prepare the scheduler."
            )
        super().step(epoch)

    def _go_on_from(self, progress: Progress) -> None:
        """Plan again, because a checkpoint or accelerate has changed where the run is or what a step is."""
        self._at = progress
        self.schedule = self._lengths.applied_to(self.schedule, progress)

    def state_dict(self) -> dict[str, Any]:
        """The counters only: a restored argument must never win over today's."""
        return {"tokens_seen": self.tokens_seen, "last_epoch": self.last_epoch // self._at.calls_per_step}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from the tokens of a checkpoint, with the arguments of today, from the very next step.

        Raises:
            UserError: if the state is not that of a power schedule.
        """
        if set(state_dict) != {"tokens_seen", "last_epoch"}:
            raise UserError(
                f"the scheduler state of the checkpoint is not that of a power schedule (got {sorted(state_dict)}): "
                "resume with the scheduler that wrote it, or start from its weights with tokens_seen=<tokens so far>."
            )
        calls = PowerLR.calls_per_step()
        self.last_epoch = int(state_dict["last_epoch"]) * calls
        self._step_count = self.last_epoch + 1
        self._go_on_from(Progress(int(state_dict["tokens_seen"]), self.last_epoch, calls))
        # The optimizer's own checkpoint has brought back the old lr and initial_lr.
        for group, base_lr, lr in zip(self.optimizer.param_groups, self.base_lrs, self.get_lr(), strict=True):
            group["initial_lr"] = base_lr
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)  # A compiled or captured step reads this very tensor.
            else:
                group["lr"] = lr
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self._last_lr = [rate.clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]


def get_power_schedule(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int = 0,
    num_training_steps: int | None = None,
    *,
    tokens_per_step: int | None = None,
    **kwargs: Any,
) -> PowerLR:
    """The Power schedule, ``eta(n) = min(eta_max, a * beta**c * n**b)`` with warmup and tail (eq. 7 and 8).

    Args:
        optimizer: its ``defaults["lr"]`` is eta_max, the cap (0.02 in the paper).
        num_warmup_steps: linear warmup, in steps.
        num_training_steps: length of the run, in steps; None for a trunk without an end.
        tokens_per_step: tokens of one optimizer step over all processes; None inside a Trainer, which finds it.
        **kwargs: a, b, batch_exponent, critical_batch_tokens, critical_batch_growth, warmup_tokens, warmup_to, decay_ratio,
            decay_tokens, decay_start_tokens, decay_shape, min_lr_ratio, tokens_seen, last_epoch: see `PowerLR`.

    Returns:
        The scheduler; call step() once after each optimizer.step().

    Raises:
        UserError: tokens_per_step is unknown, or what `PowerLR` refuses.
    """
    if tokens_per_step is None:
        raise UserError(
            "the power schedule needs tokens_per_step and found no Trainer to take it from: pass tokens_per_step = "
            "sequences per device x sequence length x accumulation steps x data-parallel processes (with get_scheduler, "
            'in scheduler_specific_kwargs={"tokens_per_step": ...}).'
        )
    return PowerLR(optimizer, num_warmup_steps, num_training_steps, tokens_per_step=tokens_per_step, **kwargs)


def _max_lr(optimizer: torch.optim.Optimizer) -> float:
    inner: Any = optimizer
    while hasattr(inner, "optimizer"):  # DeepSpeed's wrapper has no defaults, accelerate's no signature of its own.
        inner = inner.optimizer
    cap = check_cap(inner.defaults.get("lr"))
    # muP's groups have names; its rates above the base rate are those of a model narrower than the base width.
    rates = [float(group.get("initial_lr", group["lr"])) for group in inner.param_groups if "name" not in group]
    lr, highest = inspect.signature(type(inner).__init__).parameters.get("lr"), max(rates, default=0.0)
    unchosen = lr is not None and lr.default == cap and cap not in rates and highest > 0
    if not unchosen and highest <= cap * (1 + 1e-6):
        return cap
    above = f"that group follows {highest / cap:.3g} times the law; pass lr={highest:g} for the law itself"
    said = "the highest of its groups is the cap" if unchosen else above
    warnings.warn(f"the optimizer's lr is {cap:g} and a group's is {highest:g}, so {said}.", stacklevel=4)
    return check_cap(highest) if unchosen else cap
