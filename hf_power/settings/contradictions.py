"""What several arguments of a run say together, and what depends on where it runs: refused before anything starts."""

import copy
import inspect
from collections.abc import Callable, Collection
from typing import cast

from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_power.compat import CHECKPOINTING
from hf_power.mup.optimizer import ADAMW
from hf_power.records.errors import UserError, refused_by, shown
from hf_power.scheduler import PowerLR
from hf_power.settings.sections import unknown_key

# What the Trainer itself gives a schedule.
TOLD = ("optimizer", "last_epoch", "num_warmup_steps", "num_training_steps")
# Optimizers that train without muP: those that take one step for all weights, of which nothing but the gradient is needed.
WITHOUT_MUP = (
    *("adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
)
# The numbers of AdamW, and what an optimizer that has them calls them.
MOMENTS = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}


def refuse_contradictions(args: TrainingArguments, given: Collection[str]) -> None:
    """Raise a UserError for arguments of which one leaves another without effect, or that no run can follow."""
    _refuse_sizes(args)
    _refuse_strategies(args, given)
    if f"{CHECKPOINTING}_kwargs" in given and not getattr(args, CHECKPOINTING):
        raise UserError(f"{CHECKPOINTING}_kwargs has no effect without {CHECKPOINTING}: give {CHECKPOINTING}: true.")
    if "fsdp_config" in given and not args.fsdp:
        raise UserError("fsdp_config has no effect without fsdp: give fsdp, e.g. full_shard.")
    if args.fp16 and args.device.type == "cpu":  # accelerate trains in fp32 then, without a word.
        raise UserError("fp16 has no effect on a CPU: give bf16, or leave it out.")
    if DebugOption.TPU_METRICS_DEBUG in args.debug:
        raise UserError("debug is tpu_metrics_debug, but hf_power does not train on TPUs: leave it out.")
    _refuse_accelerator_config(args)


def _refuse_sizes(args: TrainingArguments) -> None:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(args, name)}: correct it.")
    for name in ("logging", "eval", "save"):
        every = getattr(args, f"{name}_steps")
        if getattr(args, f"{name}_strategy") == "steps" and not every > 0:
            raise UserError(f"{name}_steps must be positive, got {shown(every)}: give {name}_strategy no for none.")
    for name in ("seed", "weight_decay", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha"):
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UserError(f"{name} must not be negative, got {value}: correct it.")


def _refuse_strategies(args: TrainingArguments, given: Collection[str]) -> None:
    for name in ("logging_strategy", "eval_strategy", "save_strategy"):
        if getattr(args, name) == "epoch":
            raise UserError(f"{name} is epoch, but a run is a stream of tokens that has no epochs: give steps or no.")
    if args.eval_strategy != "steps":
        for name in ("eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better"):
            if name in given and getattr(args, name):
                raise UserError(f"{name} has no effect while eval_strategy is no: give eval_strategy: steps.")
        if args.save_strategy == "best":
            raise UserError("save_strategy best saves nothing without an evaluation: give eval_strategy: steps.")
    if args.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise UserError(
            f"metric_for_best_model is {shown(args.metric_for_best_model)}, but an evaluation here has the loss alone: give "
            "loss."
        )


def _refuse_accelerator_config(args: TrainingArguments) -> None:
    config = args.accelerator_config
    if not isinstance(config, AcceleratorConfig):
        return
    if "num_steps" in (config.gradient_accumulation_kwargs or {}):
        raise UserError(
            "accelerator_config.gradient_accumulation_kwargs.num_steps would make the batch another than the record says: "
            "give gradient_accumulation_steps."
        )
    if args.world_size > 1 and (config.split_batches or not config.even_batches):
        name, remedy = "even_batches false", "leave it out"
        if config.split_batches:
            name, remedy = "split_batches", "give per_device_train_batch_size, the batch of one process"
        raise UserError(
            f"accelerator_config has {name}, which hf_power does not train with in several processes: {remedy}."
        )


def refuse_optimizer(args: TrainingArguments, given: Collection[str], mup: bool) -> None:
    """Raise a UserError for an optimizer without a rule, one whose package is missing, or a number that it has not."""
    name = str(getattr(args.optim, "value", args.optim))
    known = ADAMW if mup else (*ADAMW, *WITHOUT_MUP)
    if name not in known:
        why = "muP has a rule for AdamW alone" if mup else "hf_power does not train with it"
        raise UserError(f"optim is {name}, but {why}: give one of {', '.join(known)}.")
    with refused_by(f"optim {name}"):
        kwargs = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    for number, keyword in MOMENTS.items():
        if number in given and keyword not in kwargs:
            raise UserError(f"{number} has no effect under optim {name}: leave it out.")
    _refuse_optim_args(args, name)


def _refuse_optim_args(args: TrainingArguments, name: str) -> None:
    """The Trainer takes up what the optimizer has and drops the rest, so each is tried alone."""
    alone = copy.copy(args)
    alone.optim_args = None
    without = Trainer.get_optimizer_cls_and_kwargs(alone)[1]
    for pair in (args.optim_args or "").replace(" ", "").split(","):
        alone.optim_args = pair
        if pair and Trainer.get_optimizer_cls_and_kwargs(alone)[1] == without:
            raise UserError(f"optim_args: {pair} has no effect under optim {name}: leave it out.")


def refuse_schedule(args: TrainingArguments, kwargs: Collection[str]) -> None:
    """Raise a UserError for an argument that the schedule does not have, with the nearest that it has."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    of_transformers = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
    makes = PowerLR if name == "power" else cast("Callable[..., object]", of_transformers)
    parameters = inspect.signature(makes).parameters
    if args.warmup_steps and "num_warmup_steps" not in parameters:
        raise UserError(
            f"warmup_steps is {args.warmup_steps}, but lr_scheduler_type {name} has no warmup: leave it out."
        )
    # A function that hands everything on says nothing of what it takes; its class does when it is tried out.
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [parameter for parameter in parameters if parameter not in TOLD]
    for key in kwargs:
        if not known:
            raise UserError(f"lr_scheduler_kwargs.{key}: lr_scheduler_type {name} has no arguments: leave it out.")
        if key not in known:
            raise UserError(unknown_key(f"lr_scheduler_kwargs.{key}", key, known))
