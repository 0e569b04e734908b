"""The Power schedule: the learning rate as a function of the tokens seen (Shen et al. 2024, arXiv:2408.13359)."""

import math
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from hf_power.records.errors import UserError

TOKENS_PER_BETA = 4096  # beta counts the batch in sequences of 4096 tokens (section 3 of the paper)

# Set by register.py while a Trainer builds its scheduler; an explicit tokens_per_step wins over it.
found_tokens_per_step: ContextVar[int | None] = ContextVar("found_tokens_per_step", default=None)

LAW = ("a", "b", "batch_exponent", "critical_batch_tokens")  # arguments that make the law of a batch

DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    # IBM's code; the paper names the shape (eq. 8) but never writes it
    "exponential": lambda x: (math.exp(1.0 - x) - 1.0) / (math.e - 1.0),
    "linear": lambda x: 1.0 - x,
    "1-sqrt": lambda x: 1.0 - math.sqrt(x),
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def power_law(
    tokens_seen: float,
    *,
    tokens_per_step: float,
    a: float = 4.0,
    b: float = -0.51,
    batch_exponent: float = 1.0,
    critical_batch_tokens: float | None = None,
) -> float:
    """The uncapped law ``a * beta**c * n**b`` (eq. 6 and 7), with ``beta = tokens_per_step / 4096``.

    With a critical batch, ``beta = min(tokens_per_step, critical_batch_tokens) / 4096``; the paper has none.

    Args:
        tokens_seen: n, tokens seen so far; at n <= 0 the law is infinite.
        tokens_per_step: tokens of one optimizer step over all processes, accumulation included.
        a: scale, > 0. 4.0 is the paper's scheduler constant (4.6 belongs to its fit of WSD optima).
        b: exponent of the tokens, < 0.
        batch_exponent: c, exponent of the batch; 1 in the paper.
        critical_batch_tokens: batch, in tokens per step, above which a larger one no longer raises the rate; > 0, or
            None for none.

    Returns:
        The learning rate that the law asks for.

    >>> round(power_law(10e12, tokens_per_step=4_194_304, a=4.6), 4)  # the paper's own example
    0.0011
    """
    if tokens_seen <= 0:
        return math.inf
    batch = tokens_per_step if critical_batch_tokens is None else min(tokens_per_step, critical_batch_tokens)
    return float(a * (batch / TOKENS_PER_BETA) ** batch_exponent * float(tokens_seen) ** b)


def power_lr(
    tokens_seen: float,
    *,
    tokens_per_step: float,
    max_lr: float = 0.02,
    a: float = 4.0,
    b: float = -0.51,
    batch_exponent: float = 1.0,
    critical_batch_tokens: float | None = None,
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

    Every length is in tokens. At n = 0 the value is 0 with a warmup and max_lr without one. Without
    decay_start_tokens the law goes on for ever.

    Args:
        tokens_seen: tokens seen before the step, >= 0.
        tokens_per_step: tokens of one optimizer step over all processes.
        max_lr: eta_max, the cap.
        a, b, batch_exponent, critical_batch_tokens: see `power_law`.
        warmup_tokens: length of the linear warmup.
        warmup_to: "law" or "max".
        decay_start_tokens: where the tail begins; None for no tail.
        decay_tokens: length of the tail; 0 drops to the floor at once.
        decay_shape: "exponential", "linear", "1-sqrt" or "cosine"; f(0) = 1, f(1) = 0.
        min_lr_ratio: floor of the tail, as a ratio of the rate at which the tail begins.

    >>> power_lr(0, tokens_per_step=4096 * 128)
    0.02
    >>> round(power_lr(1e11, tokens_per_step=4096 * 128), 5)
    0.00126
    >>> round(power_lr(5e8, tokens_per_step=4096 * 128, warmup_tokens=1e9), 5)  # half of .0132
    0.00658
    """
    law: dict[str, Any] = {"tokens_per_step": tokens_per_step, "a": a, "b": b, "batch_exponent": batch_exponent}
    law["critical_batch_tokens"] = critical_batch_tokens

    def eta(n: float) -> float:
        return min(max_lr, power_law(n, **law))

    if tokens_seen < warmup_tokens:
        top = max_lr if warmup_to == "max" else eta(warmup_tokens)
        return tokens_seen / warmup_tokens * top
    if decay_start_tokens is None or tokens_seen < decay_start_tokens:
        return eta(tokens_seen)
    done = (tokens_seen - decay_start_tokens) / decay_tokens if decay_tokens else 1.0
    shape = DECAY_SHAPES[decay_shape](done) if done < 1.0 else 0.0
    return eta(decay_start_tokens) * (min_lr_ratio + (1.0 - min_lr_ratio) * shape)


class PowerLR(LRScheduler):
    """The Power schedule as a PyTorch scheduler whose state is the number of tokens seen.

    Each parameter group gets ``base_lr * eta(n) / eta_max`` with ``eta_max = optimizer.defaults["lr"]``, so ratios
    between groups (muP) are kept. The number of tokens seen is the only state that a checkpoint holds: a run resumed
    with another batch goes on from its tokens under today's arguments, and the end of the schedule moves to today's
    last step. `power_lr` has the formula.

    Args:
        optimizer: its ``defaults["lr"]`` is eta_max, the cap (0.02 in the paper).
        num_warmup_steps: linear warmup, in steps.
        num_training_steps: length of the run, in steps; None for a trunk without an end.
        tokens_per_step: tokens of one optimizer step: sequences x sequence length, over all data-parallel processes,
            accumulation included.
        a: scale of the law, > 0.
        b: exponent of the tokens, < 0.
        batch_exponent: c, exponent of the batch; 1 in the paper.
        critical_batch_tokens: batch, in tokens per step, above which a larger one no longer raises the rate, > 0; None
            for none.
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
        tokens_seen: tokens seen so far.
        tokens_per_step: tokens of one optimizer step.
        total_tokens: where the schedule ends, or None.

    Raises:
        ValueError: a value outside its range, a length given twice, or warmup and tail longer than the run.

    Warns:
        UserWarning: the cap binds for the whole run, as with TrainingArguments' default of 5e-5.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        num_warmup_steps: int = 0,
        num_training_steps: int | None = None,
        *,
        tokens_per_step: int,
        a: float = 4.0,
        b: float = -0.51,
        batch_exponent: float = 1.0,
        critical_batch_tokens: float | None = None,
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
        _check_law(a, b, batch_exponent, tokens_per_step, min_lr_ratio, critical_batch_tokens)
        _check_lengths(
            num_warmup_steps=num_warmup_steps,
            warmup_tokens=warmup_tokens,
            tokens_seen=tokens_seen,
            decay_ratio=decay_ratio,
            decay_tokens=decay_tokens,
            decay_start_tokens=decay_start_tokens,
        )
        _check_choice("warmup_to", warmup_to, ("law", "max"))
        _check_choice("decay_shape", decay_shape, tuple(DECAY_SHAPES))
        if warmup_tokens is not None and num_warmup_steps:
            raise UserError(
                f"warmup is given twice, num_warmup_steps={num_warmup_steps} and warmup_tokens={warmup_tokens}: "
                "pass one of them."
            )
        self.max_lr = _max_lr(optimizer)
        self.tokens_per_step = int(tokens_per_step)
        self.num_warmup_steps, self.num_training_steps = num_warmup_steps or 0, num_training_steps
        self._warmup_tokens = warmup_tokens
        self._decay = decay_ratio, decay_tokens, decay_start_tokens
        self._law: dict[str, Any] = {"tokens_per_step": self.tokens_per_step, "max_lr": self.max_lr}
        self._law |= {"a": a, "b": b, "batch_exponent": batch_exponent}
        self._law["critical_batch_tokens"] = critical_batch_tokens
        self._law |= {"warmup_to": warmup_to, "decay_shape": decay_shape, "min_lr_ratio": min_lr_ratio}
        self._calls = 1  # calls of step() per optimizer step, see step()
        self._tokens_at, self._epoch_at = int(tokens_seen), 0  # tokens_seen counts on from here
        self._tokens_before = int(tokens_seen)
        self._plan()
        self._warn_if_cap_binds()
        super().__init__(optimizer, last_epoch)

    @property
    def tokens_seen(self) -> int:
        """Tokens seen so far, counting every finished optimizer step."""
        return self._tokens_at + self._tokens(self.last_epoch - self._epoch_at)

    def _tokens(self, calls: int) -> int:
        return calls * self.tokens_per_step // self._calls

    def _plan(self) -> None:
        """Turn steps into tokens; done again when a checkpoint or accelerate changes what a step is."""
        warmup = self._tokens(self.num_warmup_steps) if self._warmup_tokens is None else self._warmup_tokens
        self.total_tokens: int | None = None
        if self.num_training_steps is not None:
            self.total_tokens = self._tokens_at + self._tokens(max(0, self.num_training_steps - self._epoch_at))
        start, length = _tail(self.total_tokens, self._tokens_before, *self._decay)
        end = self.total_tokens if start is None else start
        if end is not None and warmup > end and warmup > self._tokens_at:
            raise UserError(
                f"a warmup of {warmup:,} tokens does not fit before token {end:,}, where the "
                f"{'run ends' if start is None else 'decay starts'}: shorten the warmup or the decay, or train longer."
            )
        self._law |= {"warmup_tokens": warmup, "decay_start_tokens": start, "decay_tokens": length}

    def _warn_if_cap_binds(self) -> None:
        if self.total_tokens is None or self.total_tokens <= self._tokens_at:
            return
        start = self._law["decay_start_tokens"]
        end = self.total_tokens if start is None else start
        law = power_law(end, tokens_per_step=self.tokens_per_step, **{name: self._law[name] for name in LAW})
        if law >= self.max_lr:
            warnings.warn(
                f"the cap learning_rate={self.max_lr:g} binds for the whole run: the law only falls to {law:.3g} by "
                f"{end:,} tokens, so the rate is constant until the decay; set learning_rate to the cap that you want "
                "(0.02 in the paper).",
                stacklevel=4,
            )

    def describe(self) -> dict[str, Any]:
        """The schedule's numbers, lengths in tokens: the record from which `power_lr` gives every learning rate."""
        return dict(self._law)

    def lr_at(self, tokens_seen: float) -> float:
        """eta(tokens_seen) of this schedule, for a group whose base is eta_max."""
        return power_lr(tokens_seen, **self._law)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Learning rate of each group at the present number of tokens."""
        factor = self.lr_at(self.tokens_seen) / self.max_lr
        return [base_lr * factor for base_lr in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Count one optimizer step's tokens and set the learning rates for the next one.

        A scheduler that went through `accelerator.prepare` is stepped num_processes times per optimizer step, and
        by accelerate's convention its lengths in steps are multiplied by num_processes; each call then counts its
        share of the tokens.

        Raises:
            RuntimeError: if a prepared scheduler runs far past its end, because its lengths were not multiplied.
        """
        calls = _calls_per_optimizer_step(sys._getframe(1).f_locals.get("self"))
        if calls != self._calls and not self._is_initial:
            self.last_epoch, self._epoch_at = (x * calls // self._calls for x in (self.last_epoch, self._epoch_at))
            self._calls = calls
            self._plan()
        last = self.num_training_steps
        if self._calls > 1 and last is not None and self.last_epoch > 1.05 * last + self._calls:
            raise RuntimeError(
                f"the power schedule of {last} steps is over, but the run goes on: accelerator.prepare() steps it "
                f"{self._calls} times per optimizer step; multiply num_training_steps and num_warmup_steps by "
                "accelerator.num_processes, or do not prepare the scheduler."
            )
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The counters only: a restored argument must never win over today's."""
        return {"tokens_seen": self.tokens_seen, "last_epoch": self.last_epoch // self._calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the tokens of a checkpoint, with the arguments of today, from the very next step.

        Raises:
            ValueError: if the state is not that of a power schedule.
        """
        if set(state_dict) != {"tokens_seen", "last_epoch"}:
            raise UserError(
                f"the scheduler state of the checkpoint is not that of a power schedule (got {sorted(state_dict)}): "
                "resume with the scheduler that wrote it, or start from its weights with tokens_seen=<tokens so far>."
            )
        self._calls = _calls_per_optimizer_step(sys._getframe(1).f_locals.get("self"))
        self.last_epoch = self._epoch_at = int(state_dict["last_epoch"]) * self._calls
        self._step_count = self.last_epoch + 1
        self._tokens_at = int(state_dict["tokens_seen"])
        self._plan()
        # The optimizer's own checkpoint has brought back the old lr and initial_lr.
        for group, base_lr, lr in zip(self.optimizer.param_groups, self.base_lrs, self.get_lr(), strict=True):
            group["initial_lr"] = base_lr
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [
            lr.clone() if isinstance(lr, torch.Tensor) else lr for lr in (g["lr"] for g in self.optimizer.param_groups)
        ]


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
        **kwargs: a, b, batch_exponent, critical_batch_tokens, warmup_tokens, warmup_to, decay_ratio, decay_tokens,
            decay_start_tokens, decay_shape, min_lr_ratio, tokens_seen, last_epoch: see `PowerLR`.

    Returns:
        The scheduler; call step() once after each optimizer.step().

    Raises:
        ValueError: tokens_per_step is unknown, or what `PowerLR` refuses.
    """
    if tokens_per_step is None:
        tokens_per_step = found_tokens_per_step.get()
    if tokens_per_step is None:
        raise UserError(
            "the power schedule needs tokens_per_step and found no Trainer to take it from: pass tokens_per_step = "
            "sequences per device x sequence length x accumulation steps x data-parallel processes (with get_scheduler, "
            'in scheduler_specific_kwargs={"tokens_per_step": ...}).'
        )
    return PowerLR(optimizer, num_warmup_steps, num_training_steps, tokens_per_step=tokens_per_step, **kwargs)


def _tail(
    total: int | None, before: int, ratio: float | None, tokens: int | None, start: int | None
) -> tuple[int | None, int]:
    """First token and length of the tail; (None, 0) where there is none."""
    if ratio is not None and (tokens is not None or start is not None):
        raise UserError(
            f"the decay is given twice, decay_ratio={ratio} and decay_tokens={tokens} / decay_start_tokens={start}: "
            "pass one of them."
        )
    if ratio is not None and not 0 <= ratio <= 1:
        raise UserError(f"decay_ratio must lie between 0 and 1, got {ratio}: pass 0.1 for the last 10 %.")
    if total is None and ((start is None and tokens) or (start is not None and tokens is None) or ratio):
        raise UserError("a decay that ends with the run needs its length: pass num_training_steps.")
    if start is None:
        if total is None:
            return None, 0
        length = tokens if tokens is not None else round((total - before) * (0.1 if ratio is None else ratio))
        start = total - length
    else:
        length = tokens if tokens is not None else (total or 0) - start
    if start < 0 or length < 0 or (total is not None and start + length > total):
        raise UserError(
            f"a decay of {length:,} tokens from token {start:,} does not fit into a run of {total or 0:,} tokens: "
            "shorten the decay or train longer."
        )
    return (start, length) if length else (None, 0)


def _calls_per_optimizer_step(caller: object) -> int:
    """num_processes if accelerate's wrapper calls, else 1; the wrapper is the only witness that prepare() happened."""
    if type(caller).__name__ != "AcceleratedScheduler":
        return 1
    from accelerate.state import AcceleratorState

    if caller.split_batches or not caller.step_with_optimizer:  # type: ignore[attr-defined]
        return 1
    return int(AcceleratorState().num_processes)


def _max_lr(optimizer: torch.optim.Optimizer) -> float:
    inner: Any = optimizer
    while not hasattr(inner, "defaults"):  # DeepSpeed's wrapper does not show them
        inner = inner.optimizer
    lr = inner.defaults.get("lr")
    if lr is None or not float(lr) > 0:
        raise UserError(
            f"the power schedule takes its cap from the optimizer's own lr, got {lr}: build the optimizer with lr=eta_max "
            "(0.02 in the paper)."
        )
    return float(lr)


def _check_law(
    a: float,
    b: float,
    batch_exponent: float,
    tokens_per_step: int,
    min_lr_ratio: float,
    critical_batch_tokens: float | None,
) -> None:
    for name, value in (
        ("a", a),
        ("b", b),
        ("batch_exponent", batch_exponent),
        ("tokens_per_step", tokens_per_step),
        ("min_lr_ratio", min_lr_ratio),
        ("critical_batch_tokens", 1 if critical_batch_tokens is None else critical_batch_tokens),
    ):
        _check_number(name, value)
    if a <= 0:
        raise UserError(f"a, the scale of the power law, must be positive, got {a}: the paper has 4.0.")
    if b >= 0:
        raise UserError(f"b, the exponent of the power law, must be negative, got {b}: the paper has -0.51.")
    if tokens_per_step < 1 or tokens_per_step != int(tokens_per_step):
        raise UserError(
            f"tokens_per_step must be a positive whole number, got {tokens_per_step}: pass the tokens of one optimizer "
            "step over all processes."
        )
    if critical_batch_tokens is not None and critical_batch_tokens <= 0:
        raise UserError(
            f"critical_batch_tokens must be positive, got {critical_batch_tokens}: pass tokens per step, or None for none."
        )
    if not 0 <= min_lr_ratio <= 1:
        raise UserError(f"min_lr_ratio must lie between 0 and 1, got {min_lr_ratio}: pass 0 to decay to zero.")


def _check_lengths(**lengths: float | None) -> None:
    for name, value in lengths.items():
        if value is not None:
            _check_number(name, value)
            if value < 0 and name != "decay_ratio":  # which has a range of its own
                raise UserError(f"{name} must not be negative, got {value}: pass 0 for none.")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}: write it without quotes, e.g. 4.0.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")
