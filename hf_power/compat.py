"""What the versions that setup.cfg allows do in different ways; uses private parts of transformers.

Each part says of which version it is, and can go when the floor rises.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainingArguments

from hf_power.records.errors import UserError

# GraniteMoe reads an explicit head_dim from 5.0 on; this can go when the floor is 5.0.
IS_4 = transformers.__version__.startswith("4.")

try:
    from transformers import PreTrainedConfig as PreTrainedConfig
except ImportError:  # transformers 4 has it under another name; this can go when the floor is 5.0.
    from transformers import PretrainedConfig as PreTrainedConfig


# The argument of from_config that transformers 4.55 and older call otherwise; this can go when the floor is 4.56.
DTYPE = "dtype" if hasattr(PreTrainedConfig(), "dtype") else "torch_dtype"


def arguments_of(config: type[PreTrainedConfig]) -> set[str]:
    """The arguments of a config class, which is no dataclass up to transformers 5.3."""
    if dataclasses.is_dataclass(config):
        return {field.name for field in dataclasses.fields(config)}
    return set(inspect.signature(config).parameters) - {"kwargs"}


# transformers 5.22 and older call gradient_checkpointing what 5.23 calls activation_checkpointing, in the Trainer's
# arguments and in the model's methods. People write either name, the Trainer gets its own, and run.json has the new one;
# the name and the three functions below can go when the floor is 5.23.
OLD, NEW = "gradient_checkpointing", "activation_checkpointing"
CHECKPOINTING = NEW if NEW in {f.name for f in dataclasses.fields(TrainingArguments)} else OLD
_PAIRS = ((OLD, NEW), (f"{OLD}_kwargs", f"{NEW}_kwargs"))


def own_name(setting: str) -> str:
    """The name of a setting in this version's TrainingArguments."""
    return {name: pair[CHECKPOINTING == NEW] for pair in _PAIRS for name in pair}.get(setting, setting)


def recorded_name(setting: str) -> str:
    """The name of a setting in run.json, whatever the version."""
    return dict(_PAIRS).get(setting, setting)


def refuse_two_values(values: Mapping[str, object], source: str) -> None:
    """Raise a UserError where a setting has one value under its old name and another under its new one."""
    for old, new in _PAIRS:
        if old in values and new in values and values[old] != values[new]:
            raise UserError(
                f"{source}: {old} is the old name of {new}, got {values[old]!r} and {values[new]!r}: give one of them."
            )


def own_flags(flags: list[str]) -> list[str]:
    """The flags of a command line under this version's names.

    Raises:
        UserError: both names of a setting, with different values.
    """
    own, given = [], {}
    for flag, following in zip(flags, [*flags[1:], "--"], strict=False):
        name, equals, value = flag.partition("=")
        setting = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and any(setting in pair for pair in _PAIRS):
            bare = "true" if following.startswith("--") else following
            given[setting] = (value if equals else bare).lower()
            flag = f"--{own_name(setting)}{equals}{value}"
        own.append(flag)
    refuse_two_values(given, "command line")
    return own


def sequences_per_step(trainer: Trainer) -> int:
    """The sequences of an optimizer step over all processes, as a Trainer counts them.

    transformers 4.55 and older have no method for it, and no parallelism to divide out; this can go when the floor is 4.56.
    """
    args = trainer.args
    if hasattr(trainer, "get_total_train_batch_size"):
        return int(trainer.get_total_train_batch_size(args)) // uncounted_sharers(trainer)
    return int(trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size)


def uncounted_sharers(trainer: Trainer) -> int:
    """Processes that share each matrix or each sequence, and so each batch, of which the Trainer does not know.

    transformers 5.18 and older ask the model and DeepSpeed for those of a matrix, but not accelerate, and transformers 4 does not
    ask for those of a sequence at all; this can go when the floor is 5.19.
    """
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is None:
        return 1
    of_matrix = int(parallel.tp_size) if trainer.get_tp_size() == 1 else 1
    # Older versions of accelerate have no sp_size.
    of_sequence = int(parallel.cp_size) * int(getattr(parallel, "sp_size", 1)) if IS_4 else 1
    return of_matrix * of_sequence


def name_cpu_without_index(args: TrainingArguments) -> None:
    """Let torch.load put an optimizer on the device of a Trainer's arguments, which is cpu:0 in one of several processes.

    transformers 5.17 asks torch for that device, which torch cannot restore to; this can go when the floor is 5.18.
    """
    if CHECKPOINTING == OLD and args.device.type == "cpu":
        vars(args)["_setup_devices"] = torch.device("cpu")  # It is a cached property.


def logits_first(routed: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """What a mixture's router puts out, as (logits, weights, experts).

    transformers 5.20 and older have GraniteMoe's router give them the other way round, and experts are integers; this can
    go when the floor is 5.21.
    """
    return routed if routed[0].is_floating_point() else routed[::-1]


def _record_router_logits() -> None:
    """The GraniteMoe of transformers 5.0 to 5.17 drops its router's logits, so its balancing loss raises an error.

    5.18 records them in the way that is done here, so this can go when the floor is 5.18.
    """
    # Asked for by name, because no version has all of these.
    module: Any = import_module("transformers.models.granitemoe.modeling_granitemoe")
    recorded = getattr(module.GraniteMoePreTrainedModel, "_can_record_outputs", None)
    if recorded is None:  # transformers 4 collects them by hand.
        return
    home = "output_capturing" if find_spec("transformers.utils.output_capturing") else "generic"  # generic up to 5.1
    recorder = import_module(f"transformers.utils.{home}").OutputRecorder
    # Up to 5.12 the router is of another class and gives its logits last of five values.
    new = getattr(module, "GraniteMoeTopKRouter", None)
    router, index = (module.GraniteMoeTopKGating, 4) if new is None else (new, 2)
    recorded.setdefault("router_logits", recorder(router, index=index))


if CHECKPOINTING == OLD:
    _record_router_logits()
