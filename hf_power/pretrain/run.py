"""Recipe + config + data -> a Trainer's run: pretrain, resume, anneal."""

import contextlib
import datetime
import math
import os
import signal
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ProgressCallback,
    set_seed,
)
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from hf_power.checkpoints.seal import RUN_FILE
from hf_power.data import blocks as hf_data
from hf_power.data.text import load_text, require_datasets
from hf_power.evaluate.heldout import EVAL_FILE
from hf_power.models import flops_per_token
from hf_power.mup import MupAdamW, mup_config, mup_init_
from hf_power.plan.plan import describe_run
from hf_power.plots import figures as plots
from hf_power.pretrain.bad_numbers import BadNumbers
from hf_power.pretrain.callbacks import RunRecord, SealCheckpoints, TokenProgress
from hf_power.pretrain.disk import full_disk_told
from hf_power.pretrain.experts import ExpertLoad, MeasureExperts
from hf_power.pretrain.resume import (
    TOKENIZER,
    changes,
    checkpoint_to_resume,
    is_of,
    other_data,
    read_record,
    refuse_other_engine,
    verify,
)
from hf_power.pretrain.signals import StopOnSignal, StoppedBySignalError
from hf_power.pretrain.speed import speed_up_
from hf_power.pretrain.trainer import PowerTrainer
from hf_power.publish.push_guard import PushGuard, refuse_sharded
from hf_power.recipe import FILE_NAME as RECIPE_FILE
from hf_power.recipe import Recipe, warnings_for
from hf_power.records.errors import UserError
from hf_power.records.files import free_bytes, only_one, write_json
from hf_power.records.machine import hardware, tune_cpu, versions
from hf_power.records.schema import read_run
from hf_power.schedule import PowerLR
from hf_power.settings.settings import Settings, parse_tokens

SCHEMA = 1


def pretrain(settings: Settings) -> dict[str, Any]:
    """Train a model from scratch, or go on from a checkpoint (``training.resume_from_checkpoint``).

    The run folder becomes a model repository: weights, config, tokenizer, generation config, run.json,
    lr_and_loss.png, and the checkpoints.

    Args:
        settings: see `hf_power.settings.settings.Settings`.

    Returns:
        The content of run.json.

    Raises:
        ValueError, FileNotFoundError: bad input, before any training.
        StoppedBySignalError: SIGTERM or SIGINT to any process; a checkpoint is sealed, and the process should end.
        NonFiniteError: run.max_skipped_steps steps in a row without a finite loss and gradient.
    """
    recipe = settings.apply_recipe()
    settings.check()
    folder = Path(settings.training.output_dir or "")
    resume = checkpoint_to_resume(settings, folder)
    return _train(settings, folder, "pretrain", resume, read_record(resume) if resume else {}, recipe)


def anneal(
    checkpoint: str | os.PathLike[str],
    tokens: str = "10%",
    output_dir: str | None = None,
    decay_shape: str | None = None,
    repo: str | None = None,
    dataset: str | None = None,
    resume_from_checkpoint: str | None = None,
) -> dict[str, Any]:
    """Decay the learning rate from a trunk checkpoint to a finished model; the trunk can go on afterwards.

    The schedule, data order and optimizer state are those of the trunk; the tail begins at the checkpoint's tokens.

    Args:
        checkpoint: a checkpoint-N folder of `pretrain`.
        tokens: length of the tail, in tokens ("2M") or in percent of the finished run ("10%", eq. 8's usual length).
        output_dir: the new run folder; by default beside the trunk's, with -anneal-N.
        decay_shape: of the tail; by default the trunk's.
        repo: push the finished model to this repository of the Hub, with the licence of the trunk's settings.
        dataset: where the trunk's data lie now; by default where the trunk read them.
        resume_from_checkpoint: "true" goes on with the tail that was begun in the new run folder, or begins it there.

    Returns:
        The content of the new run.json.

    Raises:
        ValueError, FileNotFoundError: no intact checkpoint there, an impossible length, or a folder with another run.
    """
    source = Path(checkpoint)
    verify(source)
    trunk = read_record(source)
    start = trunk["tokens_seen"]
    schedule = trunk.get("schedule")
    if schedule is None:
        raise UserError(f"{source} was not trained under the power schedule: anneal takes checkpoints of one that was.")
    if schedule["decay_start_tokens"] is not None and start > schedule["decay_start_tokens"]:
        raise UserError(
            f"{source} lies in its run's own decay, which began at token {schedule['decay_start_tokens']:,}: take a "
            "checkpoint before it, or train the trunk with decay_ratio 0."
        )
    length = _tail_length(tokens, start, trunk["tokens_per_step"])
    settings = Settings.from_dict(trunk["settings"])
    kwargs = dict(settings.training.lr_scheduler_kwargs or {})
    for name in ("decay_ratio", "decay_tokens", "decay_start_tokens"):
        kwargs.pop(name, None)
    kwargs |= {"decay_start_tokens": start, "decay_tokens": length}
    if decay_shape is not None:
        kwargs["decay_shape"] = decay_shape
    settings.training.lr_scheduler_kwargs = kwargs
    settings.run.tokens = str(start + length)
    folder = (
        Path(output_dir) if output_dir else source.parent.with_name(f"{source.parent.name}-anneal-{trunk['steps']}")
    )
    settings.training.output_dir = str(folder)
    settings.given |= {"lr_scheduler_kwargs", "tokens"}
    if repo is not None:
        settings.training.push_to_hub, settings.training.hub_model_id = True, repo
    if dataset is not None:
        settings.data.dataset = dataset
    settings.training.resume_from_checkpoint = resume_from_checkpoint
    own = checkpoint_to_resume(settings, folder)
    record = read_record(own) if own else trunk
    if own and record.get("parent") != f"{source.parent.name}/{source.name}":
        raise UserError(f"{own} is not of a tail from {source}: pass another --output_dir.")
    recipe = Recipe.load(source / RECIPE_FILE) if (source / RECIPE_FILE).exists() else None
    return _train(settings, folder, "anneal", own or source, record, recipe)


def _train(
    settings: Settings,
    folder: Path,
    kind: str,
    resume: Path | None,
    before: dict[str, Any],
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Train to the end of the settings, from a verified checkpoint and its record or (None, {}) from nothing."""
    require_datasets()
    plots.require_matplotlib()
    args = settings.training
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise UserError(
            f"the launcher has started {started} processes, and each takes itself for the only one: set "
            "ACCELERATE_USE_CPU=true where there is no accelerator."
        )
    if args.deepspeed_plugin is not None:
        _refuse_own_optimizer(args.deepspeed_plugin.deepspeed_config)
    per_step = _tokens_per_step(settings)
    if recipe is not None and args.lr_scheduler_type != "power":
        _use_known_horizon(settings, recipe, per_step)
    if resume and _is_finished(folder, resume, parse_tokens(settings.run.tokens or 0, "tokens"), before):
        if args.should_save:
            print(f"the run in {folder} is finished: raise tokens to train on", flush=True)
        return read_run(folder, required=("name", "tokens_seen", "train_seconds", "held_out_loss"))
    run = _new_run(settings, folder, kind, per_step, before, resume)
    args.max_steps = run["steps"] + math.ceil((run["total_tokens"] - run["tokens_seen"]) / per_step)
    schedule = _dry_schedule(settings, run)  # checks every number of the schedule before the data are touched
    begun = kind == "pretrain" or before.get("kind") == kind  # an anneal begins with what is another than in its trunk
    changed = changes(settings, run, before, resume) if resume and begun else []
    with (
        only_one(folder) if args.process_index == 0 else contextlib.nullcontext(),
        full_disk_told(settings, run, folder),
    ):
        return _train_alone(settings, run, folder, resume, before, recipe, schedule, changed)


def _train_alone(
    settings: Settings,
    run: dict[str, Any],
    folder: Path,
    resume: Path | None,
    before: dict[str, Any],
    recipe: Recipe | None,
    schedule: PowerLR | None,
    changed: list[str],
) -> dict[str, Any]:
    """All that takes time or writes, while no other run is at work in the folder."""
    args = settings.training
    pushes = args.push_to_hub
    guard = _push_guard(settings, run, folder)
    tune_cpu(args)
    with args.main_process_first(desc="data"):
        train, held_out, tokenizer = _data(settings, run, resume, recipe)
    if resume and (other := other_data(settings, run, before)):
        changed.append(other)
    set_seed(args.seed)
    with _whole_tensors(args):
        model = build_model(settings, tokenizer)
        run["parameters"] = model.num_parameters()
        run["parameters_without_embeddings"] = model.num_parameters(exclude_embeddings=True)
        run["flops_per_token"] = flops_per_token(model.config, settings.data.block_size)
    speed_up_(model, args, settings.data.block_size)
    args.ignore_data_skip = True  # the data begin at the checkpoint's tokens already
    if args.should_save:
        print(describe_run(run, args.max_steps - run["steps"], _disk(args, run), schedule), flush=True)
        for phrase in changed:
            print(f"  changed      {phrase}", flush=True)
        shape = {
            "tokens": run["total_tokens"],
            "tokens_per_step": run["tokens_per_step"],
            "width": settings.model.hidden_size,
        }
        for warning in warnings_for(recipe, **shape) if recipe else ():
            print(f"  WARNING      {warning}", flush=True)
    trainer = _trainer(settings, folder, model, tokenizer, train, held_out, RunRecord(run, folder, recipe))
    if resume:
        refuse_other_engine(resume, trainer.is_fsdp_enabled)
    if pushes:
        refuse_sharded(getattr(trainer.accelerator.state, "fsdp_plugin", None))
    stop = StopOnSignal()
    trainer.add_callback(stop)
    trainer.seals = SealCheckpoints(background=not guard)  # the guard reads the manifest at once
    trainer.add_callback(trainer.seals)
    if guard:
        trainer.add_callback(guard)
    stopped = False
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        # a run that is done has only to finish
        stopped = stop.received > 0 and trainer.state.global_step < args.max_steps
        if stopped:
            _stopped(trainer, run, folder, stop.received)
    finally:
        trainer.seals.join()
        if not stopped:  # else the process is about to end: a second signal must not be its end in between
            stop.restore()
    _finish(trainer, run, folder, recipe)
    if guard:
        guard.finish()
    return run


def build_model(settings: Settings, tokenizer: Any) -> Any:
    """The model of the settings, initialized from torch's global random numbers."""
    config = settings.model.config(
        vocab_size=len(tokenizer),
        max_position_embeddings=settings.data.block_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if not settings.mup.mup:
        return AutoModelForCausalLM.from_config(config)
    return mup_init_(AutoModelForCausalLM.from_config(mup_config(config, **settings.mup.arguments())))


def _refuse_own_optimizer(deepspeed: dict[str, Any]) -> None:
    for part, ours in (("optimizer", "muP's parameter groups"), ("scheduler", "the run's learning-rate schedule")):
        if part in deepspeed:
            raise UserError(
                f"the DeepSpeed config brings its own {part}, which would replace {ours}: take the section {part} out of it."
            )


@contextlib.contextmanager
def _whole_tensors(args: Any) -> Iterator[None]:
    """ZeRO 3 would build models of empty tensors, and muP needs their shapes; DeepSpeed shards when training begins."""
    unset_hf_deepspeed_config()
    yield
    if args.deepspeed_plugin is not None:
        set_hf_deepspeed_config(args.deepspeed_plugin.hf_ds_config)


def _tail_length(tokens: str, start: int, tokens_per_step: int) -> int:
    text = str(tokens).strip()
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise UserError(f"--tokens must be a percentage between 0% and 100% or a number of tokens, got {tokens!r}.")
        length = start * share / (1 - share)
    else:
        length = parse_tokens(text, "--tokens")
    steps = math.ceil(length / tokens_per_step)
    if steps < 1:
        raise UserError(f"--tokens must be positive, got {tokens!r}: pass e.g. 10% or 2M.")
    return steps * tokens_per_step


def _tokens_per_step(settings: Settings) -> int:
    args = settings.training
    parallel = args.parallelism_config
    sharers = 1 if parallel is None else parallel.tp_size * parallel.cp_size * parallel.sp_size
    sequences = args.train_batch_size * args.gradient_accumulation_steps * (args.world_size // sharers)
    return int(sequences * settings.data.block_size)


def _new_run(
    settings: Settings, folder: Path, kind: str, per_step: int, before: dict[str, Any], resume: Path | None
) -> dict[str, Any]:
    """What run.json says before the first step."""
    total = parse_tokens(settings.run.tokens or 0, "tokens")
    seen = before.get("tokens_seen", 0)
    only_to_finish = resume is not None and is_of(folder, resume) and seen - total < before["tokens_per_step"]
    if total <= seen and not only_to_finish:  # stopped between its last checkpoint and its model
        raise UserError(
            f"the checkpoint has seen {seen:,} tokens, the run is to have {total:,}: raise tokens to train on."
        )
    parent = before.get("parent")
    if resume and kind == "anneal" and before.get("kind") != "anneal":
        parent = f"{resume.parent.name}/{resume.name}"
    return {
        "schema": SCHEMA,
        "kind": kind,
        "name": folder.name,
        "status": "running",
        "lineage": before.get("lineage") or uuid.uuid4().hex,
        "parent": parent,
        "tokens_seen": seen,
        "total_tokens": total,
        "tokens_per_step": per_step,
        "steps": before.get("steps", 0),
        "train_seconds": before.get("train_seconds", 0.0),
        "seed": settings.training.seed,
        "settings": settings.to_dict(),
        "versions": versions(),
        "hardware": hardware(settings.training),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "loss_curve": before.get("loss_curve", []),
        "skipped_steps": before.get("skipped_steps", []),
        "loss_spikes": before.get("loss_spikes", []),
    }


def _is_finished(folder: Path, resume: Path, tokens: int, before: dict[str, Any]) -> bool:
    if not is_of(folder, resume) or tokens > before["tokens_seen"] or not (folder / RUN_FILE).exists():
        return False
    return bool(read_run(folder).get("status") == "finished")


def _push_guard(settings: Settings, run: dict[str, Any], folder: Path) -> PushGuard | None:
    """What pushes in the Trainer's place, on the first process; the others push nothing."""
    args = settings.training
    if args.push_to_hub and args.process_index == 0:
        return PushGuard(args, folder, lineage=run["lineage"], license=settings.run.license)
    args.push_to_hub, args.hub_token = False, None
    return None


def _dry_schedule(settings: Settings, run: dict[str, Any]) -> PowerLR | None:
    """The schedule of the run over a dummy parameter: raises on bad numbers, and tells the milestones."""
    args = settings.training
    if args.lr_scheduler_type != "power":
        return None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kwargs = {"tokens_per_step": run["tokens_per_step"], **(args.lr_scheduler_kwargs or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run's own schedule will warn
        schedule = PowerLR(optimizer, args.get_warmup_steps(args.max_steps), args.max_steps, **kwargs)
    if run["tokens_seen"]:
        schedule.load_state_dict({"tokens_seen": run["tokens_seen"], "last_epoch": run["steps"]})
    return schedule


def _use_known_horizon(settings: Settings, recipe: Recipe, per_step: int) -> None:
    """The recipe's peak, warmup and tail for a schedule that is told its length, each unless it was given."""
    args, schedule = settings.training, str(getattr(settings.training.lr_scheduler_type, "value", ""))
    tokens = parse_tokens(settings.run.tokens or 0, "tokens")
    if "learning_rate" not in settings.given:
        args.learning_rate = recipe.peak_lr(tokens, per_step, schedule)
    if "warmup_steps" not in settings.given and recipe.warmup_tokens is not None:
        args.warmup_steps = round(recipe.warmup_tokens / per_step)
    if schedule == "warmup_stable_decay":
        tail: dict[str, Any] = {"num_decay_steps": round(recipe.decay_ratio * tokens / per_step)}
        if recipe.decay_shape != "exponential":  # which transformers lacks
            tail["decay_type"] = recipe.decay_shape
        args.lr_scheduler_kwargs = tail | (args.lr_scheduler_kwargs or {})
    settings.given |= {"learning_rate", "warmup_steps", "lr_scheduler_kwargs"}


def _data(
    settings: Settings, run: dict[str, Any], resume: Path | None, recipe: Recipe | None = None
) -> tuple[Any, Any, Any]:
    """Training blocks from the run's position on, held-out blocks, tokenizer."""
    args, block = settings.training, settings.data.block_size
    train_text, held_out_text = load_text(settings.data)
    if resume and not settings.allowed_changes() & TOKENIZER:
        tokenizer = AutoTokenizer.from_pretrained(resume)
    else:
        tokenizer = hf_data.load_tokenizer(settings.data, train_text)
    if resume and len(tokenizer) != (size := AutoConfig.from_pretrained(resume).vocab_size):
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model of {resume} {size}: pass one of as many tokens, or "
            "the model's own."
        )
    fingerprint = hf_data.tokenizer_fingerprint(tokenizer)
    if recipe is not None and recipe.tokenizer not in (None, fingerprint):
        raise UserError(
            f"the tokenizer of the run is {fingerprint}, that of the recipe {recipe.tokenizer}: pass the tokenizer that "
            "the recipe was tuned with; the law counts its tokens."
        )
    max_eval_tokens = parse_tokens(settings.run.max_eval_tokens, "max_eval_tokens")
    train, held_out, run["data"] = hf_data.pack_both(
        settings.data, tokenizer, train_text, held_out_text, max_eval_tokens
    )
    start = run["tokens_seen"] // block
    if settings.data.streaming:
        return hf_data.stream_blocks(train, seed=args.seed, start=start), held_out, tokenizer
    run["data"]["train_tokens"] = len(train) * block
    steps = max(1, args.max_steps - run["steps"])  # a run that has only to finish reads none, but its loader needs one
    stop = start + steps * run["tokens_per_step"] // block
    return hf_data.BlockStream(train, seed=args.seed, start=start, stop=stop), held_out, tokenizer


def _trainer(
    settings: Settings, folder: Path, model: Any, tokenizer: Any, train: Any, held_out: Any, record: RunRecord
) -> PowerTrainer:
    args, run = settings.training, record.run
    trainer = PowerTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=hf_data.collate_blocks,
        optimizer_cls_and_kwargs=MupAdamW.for_trainer(args) if settings.mup.mup else None,
        callbacks=[record],
    )
    trainer.run, trainer.record, trainer.first_step = run, record, run["steps"]
    trainer.bad_numbers = BadNumbers(run, settings.run.max_skipped_steps, settings.data.block_size)
    if getattr(model.config, "num_local_experts", None):
        trainer.expert_load = ExpertLoad(model)
        trainer.add_callback(MeasureExperts(trainer.expert_load))
    # Blocks have one length, so a mean of means is exact. The other way, a sum over the whole batch's tokens, multiplies a
    # mixture of experts' balancing loss, which is a mean already, by accumulation steps x processes.
    trainer.model_accepts_loss_kwargs = False
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        total = run["tokens_seen"] + (args.max_steps - run["steps"]) * run["tokens_per_step"]
        trainer.add_callback(TokenProgress(run["tokens_per_step"], total))
    return trainer


def _finish(trainer: PowerTrainer, run: dict[str, Any], folder: Path, recipe: Recipe | None) -> None:
    """Held-out loss, then the model, the record and the picture into the run folder."""
    metrics = trainer.evaluate()
    run["held_out_loss"] = metrics["eval_loss"]
    run["status"] = "finished" if trainer.state.global_step >= trainer.args.max_steps else "stopped"
    run["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if trainer.is_fsdp_enabled:  # checkpoints may be shards, the finished model is whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.model.config.use_cache = True  # the Trainer turned it off for training; the saved model is for use
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (folder / EVAL_FILE).unlink(missing_ok=True)  # of the weights that were there before
        if recipe is not None:
            recipe.save(folder / RECIPE_FILE)
        plots.plot_lr_and_loss(run, folder / "lr_and_loss.png")
        write_json(folder / RUN_FILE, run)  # last: it says that the run is finished


def _stopped(trainer: PowerTrainer, run: dict[str, Any], folder: Path, number: int) -> NoReturn:
    """The run's record says so; no evaluation, no model, no push: whoever sent the signal does not wait for them."""
    run["status"] = "stopped"
    if trainer.is_world_process_zero():
        write_json(folder / RUN_FILE, run)
    checkpoint, name = folder / f"checkpoint-{run['steps']}", signal.Signals(number).name
    raise StoppedBySignalError(
        number,
        f"stopped by {name} after step {run['steps']}: go on from {checkpoint} with --resume_from_checkpoint true.",
    )


def _disk(args: Any, run: dict[str, Any]) -> tuple[int, int]:
    """Bytes that the run will write (fp32: weights and two moments per checkpoint), and bytes free."""
    steps = args.max_steps - run["steps"]
    every = args.save_steps if args.save_steps >= 1 else args.max_steps * args.save_steps
    written = math.ceil(steps / every) if args.save_strategy == "steps" else 1
    kept = min(written, max(2, args.save_total_limit or written))  # rotation leaves two
    return run["parameters"] * (12 * kept + 4), free_bytes(Path(args.output_dir))
