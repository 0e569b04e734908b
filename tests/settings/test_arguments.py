"""The table of all fields of TrainingArguments: complete, as the docs have it, and each refusal one sentence.

That the others do what their rows say is in tests/pretrain/test_dry_run.py.
"""

import dataclasses
import inspect
import os
from pathlib import Path

import pytest
from sentences import refused
from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_power.cli import parse_settings
from hf_power.cli.parser import SettingsParser
from hf_power.compat import CHECKPOINTING, OLD
from hf_power.mup.optimizer import ADAMW, MupAdamW
from hf_power.records.errors import UserError
from hf_power.settings import contradictions
from hf_power.settings.arguments import ARGUMENTS, AXES, FORMER, OF_A_SWEEP, default_of, refuse_in_a_sweep
from hf_power.settings.contradictions import WITHOUT_MUP, refuse_schedule
from hf_power.settings.settings import Settings

DOCS = Path(__file__).parent.parent.parent / "docs" / "arguments.md"
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}
# transformers 5.22 and older have these under their old names alone.
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"} if CHECKPOINTING == OLD else set()
REFUSED = [name for name, argument in ARGUMENTS.items() if argument.effect == "refused"]
OTHER_VALUES = {
    "optim_target_modules": "mlp",
    "liger_kernel_config": {"rope": True},
    "include_for_metrics": ["loss"],
    "label_names": ["labels"],
    "train_sampling_strategy": "random",
    "length_column_name": "words",
    "data_seed": 7,
    "do_train": False,
    "do_eval": False,
}


def other_value(name):
    """A value that is not what is done anyway."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    default = default_of(name)
    return not default if isinstance(default, bool) else default + 12


def settings(folder="runs/a", mup=True, data=None, model=None, **training):
    sections = {"run": {"tokens": "1M"}, "mup": {"mup": mup}, "data": data or {}, "model": model or {}}
    return Settings.from_dict(sections | {"training": {"output_dir": folder, "use_cpu": True, **training}})


def test_every_field_has_a_row_and_every_row_a_field():
    assert set(ARGUMENTS) - NEWER == set(FIELDS)


def test_the_docs_have_the_table():
    rows = ["| argument | pretrain, anneal | what it does, or why not | sweep |", "|---|---|---|---|"]
    for name, argument in ARGUMENTS.items():
        sweep = f"refused: {OF_A_SWEEP[name]}" if name in OF_A_SWEEP else "refused"
        sweep = f"honoured: {argument.sweep}" if argument.sweep else sweep
        rows.append(f"| `{name}` | {argument.effect} | {argument.words} | {sweep} |")
    rows += ["", "| former argument | |", "|---|---|", *(f"| `{name}` | {words} |" for name, words in FORMER.items())]
    head, mark, _ = DOCS.read_text().partition("<!-- the table -->\n")
    expected = head + mark + "\n".join(rows) + "\n"
    if os.environ.get("HF_POWER_WRITE_GOLDENS"):
        DOCS.write_text(expected)
    assert DOCS.read_text() == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name):
    with refused(UserError, f"{name} is ", "but ", ARGUMENTS[name].words):
        settings(**{name: other_value(name)}).check_arguments()


def test_what_is_done_anyway_is_taken():
    given = {name: (ARGUMENTS[name].taken or (default_of(name),))[0] for name in REFUSED if name != "num_train_epochs"}
    settings(**given).check_arguments()


@pytest.mark.parametrize("name", FORMER)
def test_a_former_argument_is_refused_with_what_to_write_today(name):
    assert name not in FIELDS
    with refused(UserError, f"training.{name} is unknown: transformers has taken it out"):
        settings(**{name: True})


def test_a_former_argument_is_refused_on_the_command_line_too():
    parser = SettingsParser("pretrain", "")
    for name in FORMER:
        with refused(UserError, f"--{name} is unknown: transformers has taken it out"):
            parser.read([f"--{name}", "1"])


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "parallelism_config"])
def test_a_sweep_honours_or_refuses_each_field(name):
    """By the value alone: what it honours is trained in tests/sweep/test_sweep.py."""
    value = "adamw_torch" if name == "optim" else "anything else"
    if ARGUMENTS[name].sweep is not None:
        refuse_in_a_sweep({name: value}, "s.yaml")
        return
    with refused(UserError, f"s.yaml: training.{name} is 'anything else', but "):
        refuse_in_a_sweep({name: value}, "s.yaml")
    if name not in (*AXES, "num_train_epochs"):
        refuse_in_a_sweep({name: (ARGUMENTS[name].taken or (default_of(name),))[0]}, "s.yaml")


def test_a_length_and_an_axis_are_refused_at_their_defaults_too():
    with refused(UserError, "num_train_epochs is 3, but the length of a run is told in tokens"):
        settings(num_train_epochs=3).check_arguments()
    for name in ("num_train_epochs", "seed", "learning_rate"):
        with refused(UserError, f"s.yaml: training.{name} is ", "give "):
            refuse_in_a_sweep({name: default_of(name)}, "s.yaml")


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_mup_trains_with_adamw_alone(optim):
    """Of every name that transformers has; those of packages that are not installed say which one is missing."""
    given = settings(optim=optim)
    if optim in ("adamw_torch", "adamw_torch_fused"):
        given.check_arguments()
        kwargs = MupAdamW.for_trainer(given.training)[1]
        assert kwargs["fused"] == (optim == "adamw_torch_fused")
        return
    why = (
        f"optim {optim} cannot be used: " if optim in ADAMW else f"optim is {optim}, but muP has a rule for AdamW alone"
    )
    with refused(UserError, why):
        given.check_arguments()
    with refused(UserError, why):
        MupAdamW.for_trainer(given.training)


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_without_mup_the_trainers_own_optimizers_train(optim):
    given = settings(optim=optim, mup=False)
    if optim in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"):
        given.check_arguments()
        return
    known = optim in (*ADAMW, *WITHOUT_MUP)
    with refused(UserError, f"optim {optim} cannot be used: " if known else f"optim is {optim}, but hf_power does not"):
        given.check_arguments()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"optim_args": "rank=64"}, ("optim_args: rank=64 has no effect under optim adamw_torch_fused",)),
        (
            {"optim": "sgd", "optim_args": "momentum=0.9,rank=64", "mup": False},
            ("rank=64 has no effect under optim sgd",),
        ),
        ({"optim": "sgd", "optim_args": "momentum", "mup": False}, ("optim sgd cannot be used",)),
        ({"optim": "sgd", "adam_beta1": 0.8, "mup": False}, ("adam_beta1 has no effect under optim sgd",)),
        ({"optim": "adafactor", "adam_epsilon": 1e-6, "mup": False}, ("adam_epsilon has no effect",)),
        ({"save_strategy": "epoch"}, ("save_strategy is epoch", "no epochs")),
        ({"logging_strategy": "epoch"}, ("logging_strategy is epoch", "no epochs")),
        ({"eval_strategy": "epoch"}, ("eval_strategy is epoch", "no epochs")),
        ({"eval_steps": 10}, ("eval_steps has no effect while eval_strategy is no",)),
        ({"eval_delay": 10}, ("eval_delay has no effect while eval_strategy is no",)),
        ({"metric_for_best_model": "loss"}, ("metric_for_best_model has no effect",)),
        ({"save_strategy": "best", "eval_strategy": "no"}, ("save_strategy best saves nothing",)),
        ({"eval_strategy": "steps", "metric_for_best_model": "accuracy"}, ("'accuracy'", "the loss alone: give loss")),
        ({f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}, ("_checkpointing_kwargs has no effect without",)),
        ({"fsdp_config": {"min_num_params": 0}}, ("fsdp_config has no effect without fsdp",)),
        ({"debug": "tpu_metrics_debug"}, ("debug is tpu_metrics_debug", "does not train on TPUs")),
        ({"per_device_train_batch_size": 0}, ("per_device_train_batch_size must be at least 1, got 0",)),
        ({"gradient_accumulation_steps": 0}, ("gradient_accumulation_steps must be at least 1, got 0",)),
        ({"save_steps": 0}, ("save_steps must be positive, got 0",)),
        ({"fp16": True}, ("fp16 has no effect on a CPU: give bf16",)),
        ({"seed": -1}, ("seed must not be negative, got -1",)),
        ({"weight_decay": -0.1}, ("weight_decay must not be negative, got -0.1",)),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            ("num_steps would make the batch another", "give gradient_accumulation_steps"),
        ),
        ({"dataloader_num_workers": 2, "data": {"streaming": True}}, ("dataloader_num_workers is 2", "of a stream")),
        (
            {"label_smoothing_factor": 0.1, "model": {"model_type": "mixtral"}},
            ("label_smoothing_factor is 0.1", "the experts' balancing loss"),
        ),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, ("constant has no arguments",)),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, ("warmup_steps is 3", "constant has no warmup")),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"a": 1}}, ("lr_scheduler_kwargs.a is unknown",)),
        ({"lr_scheduler_kwargs": {"num_warmup_steps": 1}}, ("lr_scheduler_kwargs.num_warmup_steps is unknown",)),
    ],
)
def test_what_is_contradictory_is_refused(given, parts):
    with pytest.raises(UserError) as caught:
        settings(**given).check_arguments()
    for part in parts:
        assert part in str(caught.value)


def test_several_processes_refuse_what_would_change_the_batch():
    args = settings(accelerator_config={"split_batches": True}).training
    contradictions._refuse_accelerator_config(args)
    args.distributed_state.num_processes = 2
    try:
        with refused(UserError, "accelerator_config has split_batches", "the batch of one process"):
            contradictions._refuse_accelerator_config(args)
        args.accelerator_config.split_batches, args.accelerator_config.even_batches = False, False
        with refused(UserError, "accelerator_config has even_batches false", "leave it out"):
            contradictions._refuse_accelerator_config(args)
    finally:
        args.distributed_state.num_processes = 1


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_a_name_that_no_schedule_has_is_refused(name):
    """Those that hand their arguments on are tried out when the run begins."""
    more = {"eval_strategy": "steps"} if name in ("reduce_lr_on_plateau", "greedy") else {}
    args = settings(lr_scheduler_type=name, **more).training
    refuse_schedule(args, [])
    if more:
        return
    with pytest.raises(UserError, match=r"lr_scheduler_kwargs\.nonsense"):
        refuse_schedule(args, ["nonsense"])


@pytest.mark.parametrize(
    ("key", "value", "near"), [("lr_scheduler_type", "powr", "power"), ("optim", "adamw_torc", "adamw_torch")]
)
def test_a_choice_that_is_none_names_the_nearest(key, value, near):
    with pytest.raises(UserError, match=rf"settings: training.{key} '{value}' is unknown: did you mean {near}\?$"):
        settings(**{key: value})
    with pytest.raises(
        UserError, match=rf"command line: argument --{key}: '{value}' is unknown: did you mean {near}\?$"
    ):
        parse_settings([f"--{key}", value])


def test_a_switch_turned_off_is_recorded_under_its_own_name():
    given = parse_settings(["--no_skip_memory_metrics", "--no-dataloader-pin-memory", "--no_tie_word_embeddings"])
    record = given.to_dict()
    assert record["training"] == {"skip_memory_metrics": False, "dataloader_pin_memory": False}
    assert record["model"] == {"tie_word_embeddings": False}


def test_a_text_beside_a_bool_is_taken_from_the_command_line():
    given = parse_settings(["--include_num_input_tokens_seen", "non_padding"])
    assert given.training.include_num_input_tokens_seen == "non_padding"


def test_an_accelerator_config_is_recorded_and_read_back():
    given = settings(accelerator_config={"dispatch_batches": True})
    record = given.to_dict()
    assert record["training"]["accelerator_config"]["dispatch_batches"] is True
    assert Settings.from_dict(record).to_dict() == record


def test_the_names_of_transformers_are_still_there():
    assert {*ADAMW, *WITHOUT_MUP} <= {name.value for name in OptimizerNames}
    assert inspect.signature(TrainingArguments).parameters.keys() == FIELDS.keys()
