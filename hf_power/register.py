"""Make "power" a scheduler type: every hook into transformers' schedulers; uses private parts of transformers."""

import functools
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import transformers
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import IterableDataset
from transformers import SchedulerType, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from hf_power.compat import sequences_per_step
from hf_power.records.errors import MissingPackageError, UserError
from hf_power.schedule.words import describe, highest
from hf_power.scheduler import PowerLR, get_power_schedule

NAME = "power"
MARK = "_finds_tokens_per_step"  # Of a create_scheduler that is wrapped already: the wrapper.
TRAINER_PARTS = ("create_scheduler", "_get_collator_with_removed_columns")
SAMPLED_EXAMPLES = 64  # Tokens per sequence of padded data are averaged over so many examples.


def register_power_scheduler() -> None:
    """Register `get_power_schedule` as ``lr_scheduler_type="power"``.

    ``import hf_power`` calls it. It adds one member to SchedulerType, one entry to TYPE_TO_SCHEDULER_FUNCTION, and
    teaches Trainer.create_scheduler to find tokens_per_step. Calling it again changes nothing.

    Raises:
        RuntimeError: if another package has registered "power".
        MissingPackageError: if transformers lacks a part that this builds on.
    """
    check_parts(TRAINER_PARTS)
    known = NAME in SchedulerType._value2member_map_
    member = SchedulerType(NAME) if known else _add_member()
    registered = TYPE_TO_SCHEDULER_FUNCTION.setdefault(member, get_power_schedule)
    where = (registered.__module__, registered.__qualname__)
    if where != (get_power_schedule.__module__, get_power_schedule.__qualname__):
        raise RuntimeError(
            f'lr_scheduler_type="power" is already registered, as {registered.__module__}.{registered.__qualname__}: '
            "import either that package or hf_power, not both."
        )
    # In a process that imports hf_power a second time, as a notebook may, its new functions replace the old ones.
    TYPE_TO_SCHEDULER_FUNCTION[member] = get_power_schedule
    PowerLR.calls_per_step = staticmethod(calls_per_optimizer_step)
    current: Any = Trainer.create_scheduler
    wrapped = getattr(current, MARK, None)
    if wrapped is None:
        setattr(Trainer, "create_scheduler", _finding_tokens(current))  # noqa: B010 mypy refuses "="
    elif wrapped is current and current.__globals__ is not globals():
        setattr(Trainer, "create_scheduler", _finding_tokens(current.__wrapped__))  # noqa: B010


def check_parts(names: Iterable[str]) -> None:
    """Find at import, not in the middle of a run, that transformers lacks a part: a MissingPackageError."""
    for part in names:
        if not hasattr(Trainer, part):
            raise MissingPackageError(
                f"this part of hf_power builds on Trainer.{part}, which transformers {transformers.__version__} does not "
                "have: the schedule, muP, fit and plan need transformers 4.52.3 or newer, hf-power's own training 5.3."
            )


def _add_member() -> SchedulerType:
    """A real enum member, so that SchedulerType("power"), iteration, `in` and to_dict all work."""
    # Python offers no way to add to an enum, so this does what the enum's own metaclass does when a class is made.
    member = str.__new__(SchedulerType, NAME)
    member._name_, member._value_ = "POWER", NAME
    vars(member)["_sort_order_"] = len(SchedulerType._member_names_)
    # A training_args.bin must load where hf_power is not installed: the member is pickled as its plain string.
    vars(member)["__reduce_ex__"] = lambda protocol: (str, (NAME,))
    type.__setattr__(SchedulerType, "POWER", member)
    SchedulerType._member_names_.append("POWER")
    SchedulerType._member_map_["POWER"] = member
    SchedulerType._value2member_map_[NAME] = member
    return member


def _finding_tokens(create_scheduler: Callable[..., LRScheduler]) -> Callable[..., LRScheduler]:
    """Trainer.create_scheduler with one more of lr_scheduler_kwargs, the tokens of a step, where they are not given."""

    @functools.wraps(create_scheduler)
    def wrapper(self: Trainer, *args: object, **kwargs: object) -> LRScheduler:
        # A Trainer of somebody else's may have arguments of any type, or none.
        power = getattr(self.args, "lr_scheduler_type", None) == NAME
        if isinstance(self.args, TrainingArguments):
            _warn_beside_mup(
                self, cast("Optimizer | None", kwargs.get("optimizer", args[1] if len(args) > 1 else None))
            )
            if power:
                _count_skipped_steps(self)
                _follow_schedule(self)
        given = cast("dict[str, object]", getattr(self.args, "lr_scheduler_kwargs", None) or {})
        if not power or getattr(self, "lr_scheduler", None) is not None or "tokens_per_step" in given:
            return create_scheduler(self, *args, **kwargs)
        # The stock method hands these to get_power_schedule.
        before = getattr(self.args, "lr_scheduler_kwargs", None)
        self.args.lr_scheduler_kwargs = {**given, "tokens_per_step": find_tokens_per_step(self)}
        try:
            return create_scheduler(self, *args, **kwargs)
        finally:  # The batch may be another one the next time, as under auto_find_batch_size.
            self.args.lr_scheduler_kwargs = before

    # Whoever wraps this one in turn copies the mark, which then names another function.
    setattr(wrapper, MARK, wrapper)
    return wrapper


def _warn_beside_mup(trainer: Trainer, optimizer: Optimizer | None) -> None:
    """Say that a muP model is about to be trained at rates that are not muP's, under whatever schedule."""
    # Whoever imports hf_power for its schedule does not load muP's rules before a training begins.
    from hf_power.mup.check import rates_beside_mup

    said = rates_beside_mup(trainer.accelerator.unwrap_model(trainer.model), optimizer or trainer.optimizer)
    if said is not None and trainer.accelerator.is_main_process:
        warnings.warn(said, stacklevel=3)


class CountSkippedSteps(TrainerCallback):
    """Counts the tokens of a step that fp16's gradient scaler has skipped: the data were read, and are not read again.

    A fused optimizer is called in such a step and skips it by itself, so the Trainer counts it. Of another one it leaves out
    the schedule's step too, after which the schedule would end behind the data.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: LRScheduler | None = None,
        **kwargs: object,
    ) -> None:
        """Make the schedule's step in the Trainer's place."""
        if isinstance(lr_scheduler, PowerLR) and getattr(optimizer, "step_was_skipped", False):
            with warnings.catch_warnings():
                # torch warns where no step of the optimizer came before the first one of the schedule.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                lr_scheduler.step()


class FollowSchedule(TrainerCallback):
    """Says in one line what the schedule will do, and adds the tokens seen and the rates of all groups to each log.

    It stands before the callbacks of the trackers, so that what it adds reaches them, and the state's log history too.

    Args:
        pretrained: where the weights came from; None where they are new.
    """

    def __init__(self, pretrained: str | None) -> None:
        self.pretrained = pretrained

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: LRScheduler | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Print the line, and warn of what speaks against it."""
        power = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if not isinstance(power, PowerLR) or not state.is_world_process_zero:
            return
        print(describe(power.schedule, power.whose, power.tokens_seen), flush=True)
        if power.tokens_seen:
            return
        from hf_power.mup.check import rate_without_mup

        peak = highest(power.schedule)[1]
        said = rate_without_mup(model, peak)
        if self.pretrained is not None:
            said = (
                f"the weights come from {self.pretrained}, but the schedule begins at 0 tokens, with its highest rate of "
                f"{peak:.3g}: to go on with pretraining pass tokens_seen=<tokens that they have seen> in lr_scheduler_kwargs; "
                "for fine-tuning, take a small learning_rate and another schedule"
            )
        if said is not None:
            warnings.warn(f"{said}.", stacklevel=2)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        lr_scheduler: LRScheduler | None = None,
        **kwargs: object,
    ) -> None:
        """Add tokens_seen, and lr/NAME of each group where they differ."""
        power = getattr(lr_scheduler, "scheduler", lr_scheduler)
        if logs is None or "learning_rate" not in logs or not isinstance(power, PowerLR):
            return
        # The log's own rate is that of the last step, of which the groups' bases are ratios.
        bases = [float(base) for base in power.base_lrs]
        found: dict[str, float] = {"tokens_seen": power.tokens_seen}
        if bases[0] and len(set(bases)) > 1:
            names = [group.get("name", f"group{i}") for i, group in enumerate(power.optimizer.param_groups)]
            found |= {
                f"lr/{name}": logs["learning_rate"] * base / bases[0] for name, base in zip(names, bases, strict=True)
            }
        logs |= found
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1] |= found


def _follow_schedule(trainer: Trainer) -> None:
    """hf_power's own Trainer says and logs more by itself, and has a mark that says so."""
    known = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    if FollowSchedule.__name__ in known or getattr(trainer, "tells_schedule", False):
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    # from_pretrained leaves a model in evaluation mode, and one that is made of a config alone is not.
    loaded = hasattr(model, "peft_config") or not model.training
    name = str(getattr(model, "name_or_path", "") or "")
    trainer.callback_handler.callbacks.insert(0, FollowSchedule(name if loaded and name else None))


def _count_skipped_steps(trainer: Trainer) -> None:
    known = {type(callback).__name__ for callback in trainer.callback_handler.callbacks}
    if CountSkippedSteps.__name__ not in known:  # A Trainer makes a scheduler each time that it begins to train.
        trainer.add_callback(CountSkippedSteps())


def calls_per_optimizer_step() -> int:
    """How often one optimizer step calls `PowerLR.step`: num_processes times where accelerate's wrapper calls it, else once.

    The wrapper that calls is the only witness that `accelerator.prepare` happened, so this looks at who called the
    method that asks.
    """
    caller = sys._getframe(2).f_locals.get("self")
    if not isinstance(caller, AcceleratedScheduler) or caller.split_batches or not caller.step_with_optimizer:
        return 1
    return int(AcceleratorState().num_processes)


def find_tokens_per_step(trainer: Trainer) -> int:
    """Tokens of one optimizer step of a Trainer: sequences per step x tokens per sequence.

    Sequences per step are per-device batch x accumulation x data-parallel processes (tensor, context and sequence
    parallelism divided out). Tokens per sequence are counted on up to 64 examples, spread evenly over a map-style
    dataset and from the front of an iterable one, after the Trainer's own collator: those that the attention mask
    keeps, or all where there is no mask. The figure is therefore exact for packed blocks and an average for padded ones.

    Raises:
        UserError: if the tokens of a sequence cannot be counted; pass tokens_per_step in lr_scheduler_kwargs.
    """
    sequences = sequences_per_step(trainer)
    if trainer.accelerator.split_batches:  # Then the per-device batch is already that of all processes.
        sequences = trainer._train_batch_size * trainer.args.gradient_accumulation_steps
    try:
        per_sequence = _tokens_per_sequence(trainer)
    except Exception as error:
        raise UserError(
            f"the power schedule could not count the tokens of a training sequence ({type(error).__name__}: {error}): "
            'pass lr_scheduler_kwargs={"tokens_per_step": ...}, the tokens of one optimizer step over all processes.'
        ) from error
    if trainer.accelerator.num_processes > 1:  # Every process must use the same number.
        mean = torch.tensor(per_sequence, dtype=torch.float32, device=trainer.accelerator.device)
        per_sequence = float(trainer.accelerator.reduce(mean, reduction="mean"))
    return max(1, round(sequences * per_sequence))


def _tokens_per_sequence(trainer: Trainer) -> float:
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    with _untouched_random_numbers():
        examples = _some_examples(trainer.train_dataset)
        batch = collate(examples)
    mask = batch.get("attention_mask")
    # A padding-free collator has a cu_seqlens-style mask or none; a 2-D mask marks padding.
    if mask is not None and mask.dim() == 2:
        return float(mask.ne(0).sum()) / len(examples)
    return float(batch[getattr(trainer.model, "main_input_name", "input_ids")].numel()) / len(examples)


def _some_examples(dataset: Any) -> list[object]:
    streams = isinstance(dataset, IterableDataset)  # It inherits a __getitem__ that only raises.
    if not streams and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        count = min(len(dataset), SAMPLED_EXAMPLES)
        return [dataset[i * len(dataset) // count] for i in range(count)]
    # A stream that hands out itself, or one iterator again and again, could not give back what is read from it here.
    iterator = iter(dataset)
    if iterator is dataset or iterator is iter(dataset):
        raise TypeError("the dataset is a one-pass iterator, and counting would use up its first examples")
    return [example for _, example in zip(range(SAMPLED_EXAMPLES), iterator, strict=False)]


@contextmanager
def _untouched_random_numbers() -> Iterator[None]:
    """A dataset or collator that draws random numbers must not move those of the run."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
