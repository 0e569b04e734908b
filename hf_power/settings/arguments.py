"""The table of every field of TrainingArguments: what pretraining and a sweep do with it, or why they refuse it.

An argument that changes nothing would be recorded as if it had, so each field of the versions that setup.cfg allows has
one row here. docs/arguments.md is made of these rows, and a test finds a field that a new version brings.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from transformers import TrainingArguments

from hf_power.records.errors import UserError, shown
from hf_power.settings.sections import TRAINING_DEFAULTS, unknown_key

Effect = Literal["honoured", "neutral", "refused"]


@dataclass(frozen=True)
class Argument:
    """One row of the table.

    Attributes:
        effect: "honoured": it does what transformers says of it. "neutral": no number of a run depends on it.
            "refused": another value than the default, or than those in `taken` where there are some, is a `UserError`.
        words: what it does; of one that is refused, why, and what to do instead.
        taken: values of a refused argument that say what is done anyway.
        sweep: what a sweep does with it; None for an argument that a sweep refuses, see `OF_A_SWEEP`.
    """

    effect: Effect
    words: str
    taken: tuple[object, ...] = ()
    sweep: str | None = None


def _honoured(words: str, sweep: str | None = None) -> Argument:
    return Argument("honoured", words, sweep=sweep)


def _neutral(words: str) -> Argument:
    return Argument("neutral", words)


def _refused(words: str, *taken: object) -> Argument:
    return Argument("refused", words, taken)


_LENGTH = "the length of a run is told in tokens: leave it out and give tokens"
_TRACKER = "goes to the tracker in report_to, which alone reads it"
_PROCESSES = "acts where several processes train"
_HUB = "acts in a push"
_METRICS = "an evaluation here has the loss alone, and no metric that could read it: leave it out"
_PREDICTIONS = "about predictions, of which an evaluation here keeps none"
_LOADER = "acts where the loader has workers; the blocks and their order are the same"
_LIGER = "Liger's kernels would replace the loss in chunks and muP's multipliers: leave it out"
_FULL_EVAL = "held-out losses are computed in the precision of the training: leave it out"
_VERB = "pretrain trains, and evaluates at the end: leave it out"

ARGUMENTS: Mapping[str, Argument] = {
    "output_dir": _honoured("the run folder"),
    "per_device_train_batch_size": _honoured("blocks of a step on one device; part of tokens_per_step"),
    "num_train_epochs": _refused(_LENGTH, None),  # The default of transformers is a length, too.
    "max_steps": _refused(_LENGTH),
    "learning_rate": _honoured("eta_max, the cap of the power schedule; of other schedules the peak"),
    "lr_scheduler_type": _honoured("power, or a schedule of transformers, which is tried out before the data are read"),
    "lr_scheduler_kwargs": _honoured("arguments of the schedule; one that it does not have is refused"),
    "warmup_steps": _honoured("linear warmup, in steps or below 1 as a share; refused where a schedule has none"),
    "optim": _honoured(
        "under muP AdamW: adamw_torch, adamw_torch_fused, and of 8 and 4 bits where their packages are; without muP also "
        "adafactor, sgd, adagrad, rmsprop and those of bitsandbytes; others are refused",
        sweep="adamw_torch or adamw_torch_fused",
    ),
    "optim_args": _honoured("arguments of an optimizer other than AdamW; one that it does not have is refused"),
    "weight_decay": _honoured("AdamW's, scaled by muP in each group", sweep="as in pretraining"),
    "adam_beta1": _honoured("refused where the optimizer has no betas", sweep="as in pretraining"),
    "adam_beta2": _honoured("refused where the optimizer has no betas", sweep="as in pretraining"),
    "adam_epsilon": _honoured("scaled by muP in each group; refused without an AdamW", sweep="as in pretraining"),
    "optim_target_modules": _refused("it is of GaLore and APOLLO, which hf_power does not train with: leave it out"),
    "gradient_accumulation_steps": _honoured("micro-batches of a step; part of tokens_per_step"),
    "average_tokens_across_devices": _neutral("all blocks have one length, so that both means are the same"),
    "max_grad_norm": _honoured("clipping by the norm of all gradients; 0 for none", sweep="as in pretraining"),
    "label_smoothing_factor": _honoured(
        "of the training loss alone; with it that loss is not taken in chunks; refused for a mixture of experts"
    ),
    "bf16": _honoured("autocast to bf16", sweep="as in pretraining"),
    "fp16": _honoured("autocast to fp16 with a scaler of the loss; refused on a CPU, where accelerate ignores it"),
    "bf16_full_eval": _refused(_FULL_EVAL),
    "fp16_full_eval": _refused(_FULL_EVAL),
    "tf32": _honoured("of matrix products on CUDA; true is refused elsewhere", sweep="as in pretraining"),
    "activation_checkpointing": _honoured("layers are computed again in the backward pass, with the same numbers"),
    "activation_checkpointing_kwargs": _honoured("use_reentrant and others; refused without activation_checkpointing"),
    "gradient_checkpointing": _honoured("the name of activation_checkpointing up to transformers 5.22"),
    "gradient_checkpointing_kwargs": _honoured("the name of activation_checkpointing_kwargs up to transformers 5.22"),
    "torch_compile": _honoured("compiles the decoder layers"),
    "torch_compile_backend": _honoured("of torch.compile; setting it turns torch_compile on"),
    "torch_compile_mode": _honoured("of torch.compile; setting it turns torch_compile on"),
    "use_liger_kernel": _refused(_LIGER),
    "liger_kernel_config": _refused(_LIGER),
    "use_cache": _neutral("training uses no cache, and the saved model always has it turned on"),
    "neftune_noise_alpha": _honoured("noise on the embeddings while training"),
    "torch_empty_cache_steps": _neutral("frees the device's cache every so many steps"),
    "auto_find_batch_size": _refused(
        "a smaller batch would be another tokens_per_step than the schedule and the record have: leave it out and give "
        "per_device_train_batch_size and gradient_accumulation_steps"
    ),
    "logging_strategy": _honoured("steps or no; a run has no epochs"),
    "logging_steps": _honoured("steps, or below 1 a share of the run"),
    "logging_first_step": _honoured("a log after the first step, too"),
    "log_on_each_node": _neutral("what other nodes than the first print"),
    "logging_nan_inf_filter": _neutral(
        "losses that are not finite are left out of the log's mean and recorded, always"
    ),
    "include_num_input_tokens_seen": _honoured("adds num_input_tokens_seen to logs and trainer_state.json"),
    "log_level": _neutral("what transformers prints"),
    "log_level_replica": _neutral("what transformers prints in other processes than the first"),
    "disable_tqdm": _neutral("logs are printed in place of a progress bar"),
    "report_to": _honoured("trackers; one whose package is missing is refused"),
    "run_name": _neutral(_TRACKER),
    "project": _neutral(_TRACKER),
    "trackio_space_id": _neutral(_TRACKER),
    "trackio_bucket_id": _neutral(_TRACKER),
    "trackio_static_space_id": _neutral(_TRACKER),
    "eval_strategy": _honoured("steps or no; a run has no epochs, and is always evaluated at its end"),
    "eval_steps": _honoured("steps, or below 1 a share of the run; refused without eval_strategy steps"),
    "eval_delay": _honoured("steps before the first evaluation; refused without an eval_strategy"),
    "per_device_eval_batch_size": _honoured("held-out blocks in one forward pass"),
    "prediction_loss_only": _neutral(_PREDICTIONS),
    "eval_on_start": _honoured("an evaluation before the first step"),
    "eval_do_concat_batches": _neutral(_PREDICTIONS),
    "eval_use_gather_object": _neutral(_PREDICTIONS),
    "eval_accumulation_steps": _neutral(_PREDICTIONS),
    "include_for_metrics": _refused(_METRICS, []),
    "batch_eval_metrics": _refused(_METRICS),
    "save_only_model": _honoured("checkpoints without optimizer, from which a run cannot go on"),
    "save_strategy": _honoured("steps, best or no; a run has no epochs"),
    "save_steps": _honoured("steps, or below 1 a share of the run"),
    "save_on_each_node": _refused(
        "one process seals the checkpoints: leave it out and name a folder that all nodes share"
    ),
    "save_total_limit": _honoured("applied after the seal, and never leaves less than two"),
    "enable_jit_checkpoint": _refused("hf_power saves and seals a checkpoint at SIGTERM by itself: leave it out"),
    "push_to_hub": _honoured("pushes what is sealed, and checks what has arrived"),
    "hub_token": _honoured(_HUB),
    "hub_private_repo": _honoured(_HUB),
    "hub_model_id": _honoured(_HUB),
    "hub_strategy": _honoured(_HUB),
    "hub_always_push": _honoured(_HUB),
    "hub_revision": _honoured(_HUB),
    "load_best_model_at_end": _honoured("needs an evaluation at every save"),
    "metric_for_best_model": _honoured("loss or eval_loss, which alone an evaluation gives"),
    "greater_is_better": _honoured("of metric_for_best_model; false for a loss unless it is given"),
    "ignore_data_skip": _refused("a run always goes on with the block that comes next: leave it out"),
    "restore_callback_states_from_checkpoint": _refused(
        "a stop that a signal asked for would be restored, too; hf_power's callbacks go on by run.json: leave it out"
    ),
    "full_determinism": _honoured("deterministic algorithms of torch"),
    "seed": _honoured("of the first weights and of the order of the blocks"),
    "data_seed": _refused("seed orders the blocks, too: leave it out"),
    "use_cpu": _honoured("trains on the CPU", sweep="as in pretraining"),
    "accelerator_config": _honoured(
        "as in accelerate; gradient_accumulation_kwargs.num_steps is refused, and in several processes split_batches and "
        "even_batches false are"
    ),
    "parallelism_config": _honoured("of accelerate's launcher, or an object in Python; it has no form in YAML"),
    "dataloader_drop_last": _refused("held-out blocks would be left out of the loss: leave it out"),
    "dataloader_num_workers": _neutral("processes that read blocks; more than one is refused for a stream"),
    "dataloader_pin_memory": _neutral("where batches lie before they are copied to a device"),
    "dataloader_persistent_workers": _neutral(_LOADER),
    "dataloader_prefetch_factor": _neutral(_LOADER),
    "dataloader_multiprocessing_context": _neutral(_LOADER),
    "dataloader_in_order": _refused("blocks would come in another order than the seed's: leave it out"),
    "remove_unused_columns": _neutral("blocks have no columns but those that the model reads"),
    "label_names": _refused("the labels of a block are its own tokens: leave it out"),
    "train_sampling_strategy": _refused(
        "the blocks come in the seed's order already, and a resumed run would read some twice and some never: leave it out"
    ),
    "length_column_name": _refused("all blocks have one length: leave it out"),
    "ddp_find_unused_parameters": _honoured(_PROCESSES),
    "ddp_bucket_cap_mb": _honoured(_PROCESSES),
    "ddp_broadcast_buffers": _honoured(_PROCESSES),
    "ddp_static_graph": _honoured(_PROCESSES),
    "ddp_backend": _honoured(_PROCESSES),
    "ddp_timeout": _honoured(_PROCESSES),
    "fsdp": _honoured("several processes only, and refused in one"),
    "fsdp_config": _honoured("of fsdp; refused without it"),
    "deepspeed": _honoured("a config without an optimizer or scheduler of its own"),
    "debug": _honoured("underflow_overflow reports the first values that are not finite; tpu_metrics_debug is refused"),
    "skip_memory_metrics": _neutral("false adds the memory of the training to the last log"),
    "do_train": _refused(_VERB, True),
    "do_eval": _refused(_VERB, True),
    "do_predict": _refused("pretrain predicts nothing: leave it out"),
    "resume_from_checkpoint": _honoured("a checkpoint, or true for the newest intact one of the run folder"),
    "local_rank": _neutral("a process knows its rank from the launcher's environment"),
}

# Why a sweep refuses what pretraining takes; every other such argument is refused with `NOT_IN_A_SWEEP`.
_AXIS = "the axes of the grid tell it: leave it out and give"
OF_A_SWEEP: Mapping[str, str] = {
    "output_dir": "a sweep is told its folder as an option of its own: leave it out and give --output_dir",
    "per_device_train_batch_size": f"{_AXIS} sweep.tokens_per_step",
    "gradient_accumulation_steps": f"{_AXIS} sweep.tokens_per_step",
    "learning_rate": f"{_AXIS} sweep.schedules",
    "lr_scheduler_type": f"{_AXIS} sweep.schedules",
    "lr_scheduler_kwargs": f"{_AXIS} sweep.schedules, sweep.law, sweep.decay_ratio and sweep.decay_shape",
    "warmup_steps": f"{_AXIS} sweep.warmup_tokens",
    "seed": f"{_AXIS} sweep.seeds",
    "torch_compile": "a sweep compiles nothing, since its small models would compile longer than they train: remove it",
}
# Of these a value that happens to be the default would mislead, too.
AXES = (
    "per_device_train_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "seed",
)
NOT_IN_A_SWEEP = "a sweep trains many small models in a loop of its own, which does not have it: leave it out"

# Arguments that transformers had once -> what to write today.
_GONE = "transformers has taken it out"
FORMER: Mapping[str, str] = {
    "warmup_ratio": f"{_GONE}: give warmup_steps, which below 1 is a share of the run",
    "group_by_length": f"{_GONE}, and all blocks have one length: leave it out",
    "evaluation_strategy": f"{_GONE}: give eval_strategy",
    "per_gpu_train_batch_size": f"{_GONE}: give per_device_train_batch_size",
    "per_gpu_eval_batch_size": f"{_GONE}: give per_device_eval_batch_size",
    "no_cuda": f"{_GONE}: give use_cpu",
    "use_mps_device": f"{_GONE}: leave it out, the device is found",
    "adafactor": f"{_GONE}: give optim",
    "half_precision_backend": f"{_GONE}: leave it out",
    "fp16_backend": f"{_GONE}: leave it out",
    "fp16_opt_level": f"{_GONE}: leave it out",
    "logging_dir": f"{_GONE}: set the environment variable TENSORBOARD_LOGGING_DIR",
    "overwrite_output_dir": f"{_GONE}: name a new output_dir, or give resume_from_checkpoint",
    "save_safetensors": f"{_GONE}: leave it out, weights are always safetensors",
    "include_tokens_per_second": f"{_GONE}: leave it out, tokens_per_second is always logged",
    "include_inputs_for_metrics": f"{_GONE}: leave it out, an evaluation here has the loss alone",
    "dispatch_batches": f"{_GONE}: give accelerator_config, e.g. {{dispatch_batches: true}}",
    "split_batches": f"{_GONE}: give accelerator_config, e.g. {{split_batches: true}}",
    "push_to_hub_model_id": f"{_GONE}: give hub_model_id",
    "push_to_hub_organization": f"{_GONE}: give hub_model_id",
    "push_to_hub_token": f"{_GONE}: give hub_token",
    "fsdp_min_num_params": f"{_GONE}: give fsdp_config, e.g. {{min_num_params: 1000000}}",
    "fsdp_transformer_layer_cls_to_wrap": f"{_GONE}: give fsdp_config, e.g. {{transformer_layer_cls_to_wrap: ...}}",
    "torchdynamo": f"{_GONE}: give torch_compile_backend",
    "jit_mode_eval": f"{_GONE}: leave it out",
    "use_ipex": f"{_GONE}: leave it out",
    "past_index": f"{_GONE}: leave it out",
    "ray_scope": f"{_GONE}: leave it out",
    "mp_parameters": f"{_GONE}: leave it out",
    "tpu_num_cores": f"{_GONE}: leave it out",
    "tpu_metrics_debug": f"{_GONE}: give debug",
    "sharded_ddp": f"{_GONE}: give fsdp",
    "xpu_backend": f"{_GONE}: give ddp_backend",
    "use_legacy_prediction_loop": f"{_GONE}: leave it out",
}


def refuse_without_effect(training: TrainingArguments, given: Collection[str]) -> None:
    """Raise a UserError for an argument that was given and that pretraining would not do, with the reason."""
    for name, argument in ARGUMENTS.items():
        if argument.effect != "refused" or name not in given:
            continue
        value = getattr(training, name)
        if value not in (argument.taken or (default_of(name),)):
            raise UserError(f"{name} is {shown(value)}, but {argument.words}.")


def refuse_in_a_sweep(training: Mapping[str, object], source: str) -> None:
    """Raise a UserError for what a sweep's training section tells and its loop would not do, with the reason."""
    for name, value in training.items():
        argument = ARGUMENTS.get(name)
        if name == "optim" and value not in ("adamw_torch", "adamw_torch_fused"):
            raise UserError(
                f"{source}: training.optim is {getattr(value, 'value', value)}, but a sweep trains with torch's AdamW alone: "
                "give adamw_torch or adamw_torch_fused."
            )
        if argument is None or argument.sweep is not None or value is None:
            continue
        if name in AXES or value not in (argument.taken or (default_of(name),)):
            words = OF_A_SWEEP.get(name, argument.words if argument.effect == "refused" else NOT_IN_A_SWEEP)
            raise UserError(f"{source}: training.{name} is {shown(value)}, but {words}.")


def unknown_setting(what: str, name: str, known: list[str]) -> str:
    """The sentence for a setting that is not known: one that transformers had once, or the nearest that is."""
    return f"{what} is unknown: {FORMER[name]}." if name in FORMER else unknown_key(what, name, known)


def default_of(name: str) -> object:
    """What pretraining takes where an argument is not given."""
    if name in TRAINING_DEFAULTS:
        return TRAINING_DEFAULTS[name]
    (field,) = (field for field in dataclasses.fields(TrainingArguments) if field.name == name)
    return field.default if field.default is not dataclasses.MISSING else None
