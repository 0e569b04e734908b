"""What the table of arguments says, trained: neutral ones end bit-equal, honoured ones act, the dry run refuses.

That the table is complete, and what it refuses, is in tests/settings/test_arguments.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentences import refused
from torch import nn
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.utils import logging

from hf_power.compat import CHECKPOINTING
from hf_power.pretrain import run as train
from hf_power.pretrain.dry_run import dry_run
from hf_power.publish.push import PushGuard
from hf_power.records.errors import UserError
from hf_power.records.run import Run
from hf_power.settings.arguments import ARGUMENTS
from hf_power.settings.settings import Settings

TESTS = Path(__file__).parent.parent
TOKENS = 6 * 128
# Another value of each argument of which the table says that no number depends on it.
NEUTRAL = {
    "average_tokens_across_devices": False,
    "use_cache": True,
    "torch_empty_cache_steps": 1,
    "log_on_each_node": False,
    "logging_nan_inf_filter": True,
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": False,
    "run_name": "name",
    "project": "project",
    "trackio_space_id": "a/b",
    "trackio_bucket_id": "a/b",
    "trackio_static_space_id": "a/b",
    "prediction_loss_only": False,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 1,
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 1,
    "dataloader_multiprocessing_context": "fork",
    "remove_unused_columns": False,
    "skip_memory_metrics": False,
    "local_rank": 0,
}
# Arguments that move the weights: without muP what is no AdamW.
MOVES = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 2},
    "learning_rate": {"learning_rate": 0.004},
    "lr_scheduler_type": {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}},
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"a": 4.0}},
    "warmup_steps": {"warmup_steps": 0.5},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.01},
    "label_smoothing_factor": {"label_smoothing_factor": 0.2},
    "bf16": {"bf16": True},
    "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
    "seed": {"seed": 7},
}
# Where the others are tried out; the file names the argument.
ELSEWHERE = {
    "output_dir": "pretrain/test_train.py",
    "fp16": "settings/test_arguments.py",
    "fsdp_config": "settings/test_arguments.py",
    "tf32": "pretrain/test_dry_run.py",
    "use_cpu": "pretrain/test_dry_run.py",
    "torch_compile": "pretrain/test_speed.py",
    "report_to": "pretrain/test_dry_run.py",
    "parallelism_config": "pretrain/test_train.py",
    "load_best_model_at_end": "pretrain/test_train.py",
    "greater_is_better": "pretrain/test_train.py",
    "metric_for_best_model": "settings/test_arguments.py",
    "resume_from_checkpoint": "pretrain/test_resume.py",
    "deepspeed": "pretrain/test_processes.py",
}


def trained(sections, folder, mup=True, tokens=TOKENS, **training):
    """Folder, record, weights."""
    made = sections(folder, tokens, **{"save_strategy": "no", "use_cpu": True, **training})
    made["mup"]["mup"] = mup
    record = train.pretrain(Settings.from_dict(made)).to_json()
    return record, load_file(folder / "model.safetensors")


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def base(sections, tmp_path_factory):
    return trained(sections, tmp_path_factory.mktemp("runs") / "base")


@pytest.mark.slow
def test_what_is_neutral_ends_bit_equal(base, sections, tmp_path):
    """All at once: each of them moves nothing, unless two would undo each other to the last bit."""
    assert set(NEUTRAL) == {name for name, argument in ARGUMENTS.items() if argument.effect == "neutral"}
    verbosity = logging.get_verbosity()
    try:
        record, weights = trained(sections, tmp_path / "run", **NEUTRAL)
        assert logging.get_verbosity() == logging.ERROR
    finally:
        logging.set_verbosity(verbosity)
    assert equal(base[1], weights)
    assert record["held_out_loss"] == base[0]["held_out_loss"]
    losses = [[point["loss"] for point in each["loss_curve"] if "loss" in point] for each in (record, base[0])]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVES)
def test_what_is_honoured_moves_the_weights(name, base, sections, tmp_path):
    record, weights = trained(sections, tmp_path / "run", **MOVES[name])
    assert record["status"] == "finished"
    assert not equal(base[1], weights)


@pytest.fixture
def trainers(monkeypatch):
    """The Trainers of the runs, as they stand after their last step."""
    seen, finish = [], train._finish

    def look(trainer, record):
        seen.append(trainer)
        finish(trainer, record)

    monkeypatch.setattr(train, "_finish", look)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_the_optimizer_is_the_one_that_was_asked_for(optim, base, sections, tmp_path, trainers):
    """The class that takes the steps; under muP torch's AdamW is fused or not as asked."""
    options = {"optim_args": "momentum=0.5"} if optim == "sgd" else {}
    record, weights = trained(sections, tmp_path / "run", mup=optim == "adamw_torch", optim=optim, **options)
    names = {"adamw_torch": "AdamW", "adafactor": "Adafactor", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop"}
    optimizer = trainers[0].optimizer.optimizer
    assert type(optimizer).__name__ == names[optim]
    assert not optimizer.defaults.get("fused")
    assert optimizer.defaults.get("momentum", 0) == (0.5 if optim == "sgd" else 0)
    assert record["settings"]["training"]["optim"] == optim
    if optim == "adamw_torch":
        # The same formula in another order of operations.
        assert all(torch.allclose(base[1][name], weights[name], atol=1e-5) for name in weights)
    else:
        assert not equal(base[1], weights)


@pytest.mark.slow
def test_logs_evaluations_and_saves_are_those_that_were_asked_for(sections, tmp_path):
    evals = {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 3, "per_device_eval_batch_size": 3}
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_only_model": True}
    logs = {"logging_strategy": "steps", "logging_steps": 4, "logging_first_step": True}
    more = {"include_num_input_tokens_seen": "all", "eval_on_start": True}
    record, _ = trained(sections, tmp_path / "run", **evals, **saves, **logs, **more)
    curve = record["loss_curve"]
    assert [point["step"] for point in curve if "loss" in point] == [1, 4]
    # The end of a run has an evaluation of its own.
    assert [point["step"] for point in curve if "eval_loss" in point] == [0, 4, 6, 6]
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-5", "checkpoint-6"]
    assert not list((tmp_path / "run").glob("checkpoint-*/optimizer.pt"))
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == TOKENS


@pytest.mark.slow
def test_what_moves_no_number_on_a_cpu_arrives(base, sections, tmp_path, trainers):
    """Layers that are computed again, deterministic algorithms, and a look for the first values that are not finite."""
    given = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}, "full_determinism": True}
    try:
        _, weights = trained(sections, tmp_path / "run", debug="underflow_overflow", **given)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    model = trainers[0].model
    assert getattr(model, f"is_{CHECKPOINTING}")
    assert any("DebugUnderflowOverflow" in repr(hook) for hook in model.model.norm._forward_hooks.values())
    assert equal(base[1], weights)


def test_what_acts_between_processes_arrives(tmp_path):
    given = {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False}
    given |= {"ddp_static_graph": True, "ddp_timeout": 77}
    settings = Settings.from_dict({"training": {"output_dir": str(tmp_path), "use_cpu": True, **given}})
    handler = Trainer(nn.Linear(1, 1), settings.training).accelerator.ddp_handler
    assert (handler.find_unused_parameters, handler.bucket_cap_mb, handler.broadcast_buffers) == (True, 7, False)
    assert (handler.static_graph, settings.training.ddp_timeout_delta.seconds) == (True, 77)
    with refused(UserError, "settings cannot be used"):  # There is nothing to choose a backend for.
        Settings.from_dict({"training": {"output_dir": str(tmp_path), "use_cpu": True, "ddp_backend": "gloo"}})


def test_the_options_of_a_push_arrive(hub, tmp_path):
    given = {
        "push_to_hub": True,
        "hub_token": hub.token,
        "hub_private_repo": True,
        "hub_model_id": "tester/m",
        "hub_strategy": "end",
    }
    given |= {"hub_always_push": True, "hub_revision": "other"}
    args = Settings.from_dict({"training": {"output_dir": str(tmp_path), "use_cpu": True, **given}}).training
    guard = PushGuard(args, tmp_path, lineage="", license="apache-2.0")
    assert guard.strategy == "end"
    options = guard.publisher.options
    assert (options.private, options.revision, options.keep_waiting) == (True, "other", True)


def test_every_row_that_is_honoured_is_tried_out():
    here = Path(__file__).read_text()
    for name, argument in ARGUMENTS.items():
        if argument.effect == "honoured" and name not in MOVES and CHECKPOINTING not in name:
            text = (TESTS / ELSEWHERE[name]).read_text() if name in ELSEWHERE else here.partition("def trained")[2]
            assert name in text or "gradient_checkpointing" in name, name


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"dispatch_batches": True, "even_batches": False, "split_batches": True}, "file"])
def test_a_run_with_an_accelerator_config_goes_on_exactly(form, base, sections, tmp_path):
    if form == "file":
        form = str(tmp_path / "accelerator.json")
        Path(form).write_text('{"use_seedable_sampler": false, "non_blocking": true}')
    given = {"accelerator_config": form, "save_strategy": "steps", "save_steps": 3}
    record, weights = trained(sections, tmp_path / "run", **given)
    assert equal(base[1], weights)  # On one process none of them moves a number.
    assert record["settings"]["training"]["accelerator_config"]["use_seedable_sampler"] == isinstance(form, dict)
    again = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-3")}
    assert equal(base[1], trained(sections, tmp_path / "again", **given, **again)[1])


def tried(folder, steps=20, **training):
    """The dry run alone, as it stands in a run of so many steps."""
    given = {"output_dir": str(folder), "use_cpu": True, "lr_scheduler_type": "linear", **training}
    settings = Settings.from_dict({"mup": {"mup": False}, "training": given})
    settings.training.max_steps = steps
    dry_run(settings, Run(settings=settings.to_dict()))
    return settings


def test_a_dry_run_leaves_nothing_behind(tmp_path):
    verbosity, before = logging.get_verbosity(), sorted(tmp_path.rglob("*"))
    settings = tried(tmp_path / "run", log_level="error")
    assert sorted(tmp_path.rglob("*")) == before
    assert logging.get_verbosity() == verbosity
    assert settings.training.output_dir == str(tmp_path / "run")


PLATEAU = {"eval_strategy": "steps", "eval_steps": 5}


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            ("warmup_stable_decay with lr_scheduler_kwargs {}", "num_decay"),
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, ("cosine_with_min_lr", "min_lr")),
        ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, ("cosine_warmup_with_min_lr", "min_lr")),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1.0}},
            ("polynomial with lr_scheduler_kwargs {'lr_end': 1.0}", "lr_end"),
        ),
        (
            {
                "lr_scheduler_type": "warmup_stable_decay",
                "lr_scheduler_kwargs": {"num_decay_steps": 2, "decay_type": "x"},
            },
            ("decay_type",),
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"a": 1}, **PLATEAU}, ("plateau", "'a'")),
        ({"lr_scheduler_type": "greedy", "lr_scheduler_kwargs": {"a": 1}, **PLATEAU}, ("greedy", "'a'")),
        ({"fsdp": "full_shard"}, ("fsdp",)),
        ({"report_to": "wandb"}, ("report_to cannot be used", "wandb")),
        ({"report_to": "nonsense"}, ("report_to cannot be used", "nonsense")),
        ({"dataloader_persistent_workers": True}, ("persistent_workers",)),
        ({"dataloader_num_workers": -1}, ("num_workers",)),
        (
            {"dataloader_multiprocessing_context": "spoon", "dataloader_num_workers": 1},
            ("multiprocessing_context", "spoon"),
        ),
        ({"adam_beta1": 1.5}, ("beta",)),
        ({"seed": 2**33}, ("2**32",)),
    ],
)
def test_what_a_library_would_refuse_late_is_refused_before_the_data(given, parts, tmp_path):
    with refused(UserError, *parts):
        tried(tmp_path / "run", **given)


def test_what_a_machine_cannot_do_is_refused_as_it_is_read(tmp_path):
    with refused(UserError, "settings cannot be used", "tf32"):
        tried(tmp_path, tf32=True)
    with refused(UserError, "settings cannot be used", "bf16"):
        tried(tmp_path, bf16=True, use_cpu=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "parts"), [({"torch_compile_backend": "nonsense"}, ("nonsense",)), ({"torch_compile_mode": "x"}, ("x",))]
)
def test_a_compiler_that_there_is_not(given, parts, tmp_path):
    with refused(UserError, *parts):
        tried(tmp_path / "run", torch_compile=True, **given)


VALID = {
    "warmup_stable_decay": {"num_decay_steps": 4},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.5},
}


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType if kind.value != "power"])
def test_every_schedule_of_transformers_is_tried_out(name, tmp_path):
    """With arguments that the library takes, of which a twin is made here."""
    more = PLATEAU if name in ("reduce_lr_on_plateau", "greedy") else {}
    get_scheduler(name, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 0, 20, VALID.get(name, {}))
    tried(tmp_path / "run", lr_scheduler_type=name, lr_scheduler_kwargs=VALID.get(name, {}), **more)


def test_nothing_is_tokenized_before_a_refusal(sections, tmp_path, monkeypatch):
    def touched(*args):
        raise AssertionError("the data were touched")

    monkeypatch.setattr(train, "run_data", touched)
    for given in ({"max_steps": 12}, {"optim": "sgd"}, {"lr_scheduler_type": "greedy"}, {"report_to": "wandb"}):
        with pytest.raises(UserError):
            train.pretrain(Settings.from_dict(sections(tmp_path / "run", use_cpu=True, **given)))
