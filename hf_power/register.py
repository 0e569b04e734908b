"""Make "power" a scheduler type of transformers; the only file that touches private parts of transformers."""

import functools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import transformers
from transformers import trainer as hf_trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from hf_power.compat import uncounted_sharers
from hf_power.records.errors import UserError
from hf_power.schedule import found_tokens_per_step, get_power_schedule

NAME = "power"
TRAINER_PARTS = ("create_scheduler", "get_total_train_batch_size", "_get_collator_with_removed_columns")
SAMPLED_EXAMPLES = 64  # padded data: tokens per sequence are averaged over this many examples


def register_power_scheduler() -> None:
    """Register `get_power_schedule` as ``lr_scheduler_type="power"``.

    ``import hf_power`` calls it. It adds one member to SchedulerType, one entry to TYPE_TO_SCHEDULER_FUNCTION, and
    teaches Trainer.create_scheduler to find tokens_per_step. Calling it again changes nothing.

    Raises:
        RuntimeError: if another package has registered "power", or transformers lacks a part that this builds on.
    """
    check_parts(TRAINER_PARTS)
    values: dict[str, Any] = SchedulerType._value2member_map_
    member = values.get(NAME)
    if member is None:
        member = _add_member()
    registered = TYPE_TO_SCHEDULER_FUNCTION.setdefault(member, get_power_schedule)
    if registered is not get_power_schedule:
        raise RuntimeError(
            f'lr_scheduler_type="power" is already registered, as {registered.__module__}.{registered.__qualname__}: '
            "import either that package or hf_power, not both."
        )
    if not hasattr(hf_trainer.Trainer.create_scheduler, "_finds_tokens_per_step"):
        hf_trainer.Trainer.create_scheduler = _finding_tokens(hf_trainer.Trainer.create_scheduler)


def check_parts(names: Iterable[str]) -> None:
    """Find a changed part of transformers at import, not in the middle of a run.

    Raises:
        RuntimeError: the Trainer has no method of such a name.
    """
    for part in names:
        if not hasattr(hf_trainer.Trainer, part):
            raise RuntimeError(
                f"hf_power builds on Trainer.{part}, which transformers {transformers.__version__} does not have: install "
                "a version that setup.cfg allows, e.g. transformers==5.23.0."
            )


def _add_member() -> Any:
    """A real enum member, so that SchedulerType("power"), iteration, `in` and to_dict all work."""
    member = str.__new__(SchedulerType, NAME)
    member._name_, member._value_ = "POWER", NAME
    member._sort_order_ = len(SchedulerType._member_names_)
    # A training_args.bin must load where hf_power is not installed: the member is pickled as its plain string.
    member.__dict__["__reduce_ex__"] = lambda protocol: (str, (NAME,))
    type.__setattr__(SchedulerType, "POWER", member)
    SchedulerType._member_names_.append("POWER")
    SchedulerType._member_map_["POWER"] = member
    SchedulerType._value2member_map_[NAME] = member
    return member


def _finding_tokens(create_scheduler: Any) -> Any:
    @functools.wraps(create_scheduler)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.args.lr_scheduler_kwargs or {}
        if self.args.lr_scheduler_type != NAME or self.lr_scheduler is not None or "tokens_per_step" in given:
            return create_scheduler(self, *args, **kwargs)
        token = found_tokens_per_step.set(find_tokens_per_step(self))
        try:
            return create_scheduler(self, *args, **kwargs)
        finally:
            found_tokens_per_step.reset(token)

    wrapper._finds_tokens_per_step = True  # type: ignore[attr-defined]
    return wrapper


def find_tokens_per_step(trainer: Any) -> int:
    """Tokens of one optimizer step of a Trainer: sequences per step x tokens per sequence.

    Sequences per step are per-device batch x accumulation x data-parallel processes (tensor, context and sequence
    parallelism divided out). Tokens per sequence are counted on up to 64 examples, spread evenly over a map-style
    dataset and from the front of an iterable one, after the Trainer's own collator: those that the attention mask
    keeps, or all where there is no mask. The figure is therefore exact for packed blocks and an average for padded ones.

    Args:
        trainer: a transformers.Trainer with a train_dataset.

    Returns:
        Tokens per optimizer step, over all processes.

    Raises:
        ValueError: if the tokens of a sequence cannot be counted; pass tokens_per_step in lr_scheduler_kwargs.
    """
    sequences: int = trainer.get_total_train_batch_size(trainer.args) // uncounted_sharers(trainer)
    if trainer.accelerator.split_batches:  # then the per-device batch is already that of all processes
        sequences = trainer._train_batch_size * trainer.args.gradient_accumulation_steps
    try:
        per_sequence = _tokens_per_sequence(trainer)
    except Exception as error:
        raise UserError(
            f"the power schedule could not count the tokens of a training sequence ({type(error).__name__}: {error}): "
            'pass lr_scheduler_kwargs={"tokens_per_step": ...}, the tokens of one optimizer step over all processes.'
        ) from error
    if trainer.accelerator.num_processes > 1:  # every process must use the same number
        mean = torch.tensor(per_sequence, dtype=torch.float32, device=trainer.accelerator.device)
        per_sequence = float(trainer.accelerator.reduce(mean, reduction="mean"))
    return max(1, round(sequences * per_sequence))


def _tokens_per_sequence(trainer: Any) -> float:
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    with _untouched_random_numbers():
        examples = _some_examples(trainer.train_dataset)
        batch = collate(examples)
    mask = batch.get("attention_mask")
    # A padding-free collator has a cu_seqlens-style mask or none; a 2-D mask marks padding.
    if mask is not None and mask.dim() == 2:
        return float(mask.ne(0).sum()) / len(examples)
    return float(batch[getattr(trainer.model, "main_input_name", "input_ids")].numel()) / len(examples)


def _some_examples(dataset: Any) -> list[Any]:
    streams = isinstance(dataset, torch.utils.data.IterableDataset)  # inherits a __getitem__ that only raises
    if not streams and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        count = min(len(dataset), SAMPLED_EXAMPLES)
        return [dataset[i * len(dataset) // count] for i in range(count)]
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
