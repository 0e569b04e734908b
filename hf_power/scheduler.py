"""The Power schedule as a PyTorch scheduler, with lengths in steps."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LRScheduler

from hf_power.records.errors import UserError
from hf_power.schedule.cosine import check_peak, with_peak
from hf_power.schedule.law import check_cap
from hf_power.schedule.lengths import Lengths, Progress
from hf_power.schedule.presets import chosen_law
from hf_power.schedule.shape import Schedule
from hf_power.schedule.words import advice, whose

DEFAULT_LR = 5e-5  # Of TrainingArguments, who give it to every optimizer for which no other rate is chosen.


class PowerLR(LRScheduler):
    """The Power schedule as a PyTorch scheduler whose state is the number of tokens seen.

    Each parameter group gets ``base_lr * eta(n) / eta_max`` with ``eta_max = optimizer.defaults["lr"]``, so ratios
    between groups (muP) are kept, and a group above eta_max follows as many times the law. An optimizer whose groups
    all have rates of their own and that was built without lr= has the highest of them for eta_max.

    The number of tokens seen is the only state that a checkpoint holds: a run resumed with another batch goes on from its
    tokens under today's arguments, and the end of the schedule moves to today's last step. `power_lr` has the formula.

    Args:
        optimizer: its ``defaults["lr"]`` is eta_max, the cap (0.02 in the paper).
        num_warmup_steps: linear warmup, in steps.
        num_training_steps: length of the run, in steps; None for a trunk without an end.
        tokens_per_step: tokens of one optimizer step: sequences x sequence length, over all data-parallel processes,
            accumulation included.
        law: name of the preset that has those of the next five that are not given: see
            `hf_power.schedule.presets.PRESETS`; "paper" by default.
        a, b, batch_exponent, critical_batch_tokens, critical_batch_growth: see `hf_power.schedule.Law`.
        peak_lr: instead of a and of the cap, the best peak of cosine for this run, see
            `hf_power.schedule.cosine.with_peak`; the optimizer's lr is then left out, or the same.
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
        whose: whose numbers its law has, in words.
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
        law: str | None = None,
        a: float | None = None,
        b: float | None = None,
        batch_exponent: float | None = None,
        critical_batch_tokens: float | None = None,
        critical_batch_growth: float | None = None,
        peak_lr: float | None = None,
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
        given = {
            "a": a,
            "b": b,
            "batch_exponent": batch_exponent,
            "critical_batch_tokens": critical_batch_tokens,
            "critical_batch_growth": critical_batch_growth,
        }
        # The rate for which the groups' own rates stand; under peak_lr it is no more than a unit.
        self._unit, self._peak = _max_lr(optimizer), peak_lr
        if peak_lr is not None:
            _check_one_peak(peak_lr, a, self._unit, optimizer)
        self.whose = whose(law, given, peak_lr)
        unplanned = Schedule(
            law=chosen_law(given, law),
            tokens_per_step=tokens_per_step,
            max_lr=self._unit,
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
        self._plan(unplanned)
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
        if total is None or total <= self._at.tokens or self._peak is not None:
            return
        law = self.schedule.law.lr(end, self.tokens_per_step)
        if law >= self.max_lr:
            warnings.warn(
                f"the cap learning_rate={self.max_lr:g} binds for the whole run: the law only falls to {law:.3g} by "
                f"{end:,} tokens, so the rate is constant until the decay; {advice(self.schedule)}.",
                stacklevel=4,
            )

    def get_lr(self) -> list[float | torch.Tensor]:
        """Learning rate of each group at the present number of tokens."""
        factor = self.schedule.lr(self.tokens_seen) / self._unit
        return [base_lr * factor for base_lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Count one optimizer step's tokens and set the learning rates for the next one.

        A scheduler that went through `accelerator.prepare` is stepped num_processes times per optimizer step, and
        by accelerate's convention its lengths in steps are multiplied by num_processes; each call then counts its
        share of the tokens.

        Args:
            epoch: the number of the step to go on to, as in every PyTorch scheduler; 0 begins anew, which older
                versions of torch.optim.lr_scheduler.SequentialLR ask for; None, the next step, is what a loop wants.

        Raises:
            UserError: epoch is no step ahead. Loops in the manner of Megatron give the number of steps that were made;
                PyTorch's meaning would hold the rate from their second step on.
            RuntimeError: if a prepared scheduler runs far past its end, because its lengths were not multiplied.
        """
        if epoch is not None:
            self._check_epoch(epoch)
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

    def _check_epoch(self, epoch: object) -> None:
        if type(epoch) is not int or (epoch != 0 and epoch <= self.last_epoch):
            raise UserError(
                f"PowerLR.step({epoch!r}) names no step ahead, and the schedule stands at step {self.last_epoch}: PyTorch takes "
                "this argument (epoch) for the step to go on to, neither for a number of steps that were made nor for a "
                "metric; call step() without it, once after each optimizer step."
            )

    def _go_on_from(self, progress: Progress) -> None:
        """Plan again, because a checkpoint or accelerate has changed where the run is or what a step is."""
        self._at = progress
        self._plan(self.schedule)

    def _plan(self, schedule: Schedule) -> None:
        planned = self._lengths.applied_to(schedule, self._at)
        self.schedule = planned if self._peak is None else with_peak(planned, self._peak)

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
        **kwargs: law, a, b, peak_lr, batch_exponent, critical_batch_tokens, critical_batch_growth, warmup_tokens, warmup_to,
            decay_ratio, decay_tokens, decay_start_tokens, decay_shape, min_lr_ratio, tokens_seen, last_epoch: see `PowerLR`.

    Returns:
        The scheduler; call step() once after each optimizer.step().

    Raises:
        UserError: tokens_per_step or one of the arguments is unknown, or what `PowerLR` refuses.
    """
    known = [name for name in inspect.signature(PowerLR.__init__).parameters if name not in ("self", "optimizer")]
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"the power schedule has no argument {name!r}: "
                + (f"did you mean {near[0]}?" if near else f"use those of {', '.join(known)}.")
            )
    if tokens_per_step is None:
        raise UserError(
            "the power schedule needs tokens_per_step and found no Trainer to take it from: pass tokens_per_step = "
            "sequences per device x sequence length x accumulation steps x data-parallel processes (with get_scheduler, "
            'in scheduler_specific_kwargs={"tokens_per_step": ...}).'
        )
    return PowerLR(optimizer, num_warmup_steps, num_training_steps, tokens_per_step=tokens_per_step, **kwargs)


def chosen_rate(optimizer: torch.optim.Optimizer) -> float:
    """The base rate of an optimizer: its lr, or where it was built without one over groups with rates of their own, theirs.

    That is the highest of them, and of muP's groups, which have names, that of the first, see `mup_param_groups`.
    """
    lr, rate = inspect.signature(type(optimizer).__init__).parameters.get("lr"), float(optimizer.defaults["lr"])
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if lr is None or lr.default != rate or rate in rates or max(rates) <= 0:
        return rate
    return rates[0] if "name" in optimizer.param_groups[0] else max(rates)


def _max_lr(optimizer: torch.optim.Optimizer) -> float:
    inner: Any = optimizer
    while hasattr(inner, "optimizer"):  # DeepSpeed's wrapper has no defaults, accelerate's no signature of its own.
        inner = inner.optimizer
    cap = check_cap(inner.defaults.get("lr"))
    base = chosen_rate(inner)
    unchosen = base != cap
    # muP's groups have names; its rates above the base rate are those of a model narrower than the base width.
    rates = [float(group.get("initial_lr", group["lr"])) for group in inner.param_groups if "name" not in group]
    highest = base if unchosen else max(rates, default=cap)
    if not unchosen and highest <= cap * (1 + 1e-6):
        return cap
    above = f"that group follows {highest / cap:.3g} times the law; pass lr={highest:g} for the law itself"
    said = "that of its groups is the cap" if unchosen else above
    warnings.warn(f"the optimizer's lr is {cap:g} and a group's is {highest:g}, so {said}.", stacklevel=4)
    return check_cap(highest) if unchosen else cap


def _check_one_peak(peak_lr: float, a: float | None, lr: float, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a second number that says how large the rate is."""
    check_peak(peak_lr)
    if a is not None:
        raise UserError(f"peak_lr={peak_lr} and a={a} both say how large the rate is: give one of them.")
    default = inspect.signature(type(optimizer).__init__).parameters.get("lr")
    if lr not in (peak_lr, DEFAULT_LR, default.default if default is not None else None):
        raise UserError(
            f"peak_lr={peak_lr:g} is the cap of the schedule, and learning_rate={lr:g} another one: leave learning_rate out, "
            "or give it the same value."
        )
