"""Recipe + config + data -> a Trainer's run: pretrain, and the steps that it shares with anneal."""

import contextlib
import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainingArguments, set_seed
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from hf_power.checkpoints.callback import SealCheckpoints, output_folder
from hf_power.checkpoints.ema import FOLDER as KEPT
from hf_power.checkpoints.ema import AverageWeights
from hf_power.data.order import collate_blocks
from hf_power.data.text import require_datasets
from hf_power.models import SOFTMAX_ROUTERS, flops_per_token
from hf_power.mup.optimizer import optimizer_of
from hf_power.plan.plan import describe_run
from hf_power.plots import figures
from hf_power.plots.runs import plot_lr_and_loss
from hf_power.pretrain.average import record_of_kept
from hf_power.pretrain.bad_numbers import BadNumbers
from hf_power.pretrain.course import OnCourse
from hf_power.pretrain.dry_run import dry_run
from hf_power.pretrain.record import ExpertLoad, RunRecord, TokenProgress
from hf_power.pretrain.resume import (
    checkpoint_to_resume,
    other_data,
    read_record,
    refuse_other_engine,
    vocab_size_of,
)
from hf_power.pretrain.speed import speed_up_
from hf_power.pretrain.start import (
    RunData,
    Start,
    finished_run,
    new_run,
    now,
    outlook,
    run_data,
    steps_to_come,
    tokens_per_row,
    tokens_per_step,
    use_cosine_peak,
    use_known_horizon,
)
from hf_power.pretrain.stops import StopOnSignal, StoppedBySignalError, full_disk_told
from hf_power.pretrain.trainer import Guards, PowerTrainer
from hf_power.publish.push import PushGuard, refuse_sharded
from hf_power.recipe import FILE_NAME as RECIPE_FILE
from hf_power.recipe import warnings_for
from hf_power.records.errors import UserError, shown
from hf_power.records.files import LOCK, free_bytes, only_one, refuse_at_work
from hf_power.records.machine import refuse_alone, tune_cpu
from hf_power.records.results import EVAL_FILE
from hf_power.records.run import Change, Run
from hf_power.schedule import LAW_NAMES, Schedule
from hf_power.schedule.words import whose
from hf_power.settings.settings import Settings, build_model


def pretrain(settings: Settings) -> Run:
    """Train a model from scratch, or go on from a checkpoint (``training.resume_from_checkpoint``).

    The run folder becomes a model repository: weights, config, tokenizer, generation config, run.json,
    lr_and_loss.png, and the checkpoints.

    Args:
        settings: see `hf_power.settings.settings.Settings`.

    Returns:
        The record of the run, which is the content of run.json.

    Raises:
        UserError: bad input, before any training.
        StoppedBySignalError: SIGTERM or SIGINT to any process; a checkpoint is sealed, and the process should end.
        NonFiniteError: run.max_skipped_steps steps in a row without a finite loss and gradient.
    """
    recipe = settings.apply_recipe()
    settings.check()
    folder = output_folder(settings.training)
    resume = checkpoint_to_resume(settings, folder)
    before = read_record(resume) if resume else None
    return train_run(Start(settings, folder, "pretrain", resume, before, recipe))


def train_run(start: Start) -> Run:
    """Train to the end of the settings, and return the record of the run."""
    settings, args, folder = start.settings, start.settings.training, start.folder
    require_datasets()
    figures.require_matplotlib()
    _check_engine(args)
    per_step = tokens_per_step(settings)
    if start.recipe is not None and args.lr_scheduler_type != "power":
        use_known_horizon(settings, start.recipe, per_step)
    use_cosine_peak(settings, per_step)
    if finished := finished_run(start):
        if args.should_save:
            print(f"the run in {folder} is finished: raise tokens to train on", flush=True)
        return finished
    run = new_run(start, per_step)
    args.max_steps = run.steps + steps_to_come(run)
    # A number that no schedule can follow is refused here, before the data are touched.
    schedule, changed = outlook(start, run)
    # A sweep or an evaluation in the folder has a lock of another name.
    refuse_at_work(folder, "wait for its end, or take another --output_dir", f"{LOCK}-*")
    dry_run(settings, run)
    record = RunRecord(run, folder, tokens_per_row(settings), start.recipe)
    with only_one(folder) if args.process_index == 0 else contextlib.nullcontext(), full_disk_told(settings, record):
        return _train_alone(start, record, schedule, changed)


def _train_alone(start: Start, record: RunRecord, schedule: Schedule | None, changed: list[Change]) -> Run:
    """All that takes time or writes, while no other run is at work in the folder."""
    args, resume = start.settings.training, start.resume
    pushes = args.push_to_hub
    guard = _push_guard(start, record.run)
    tune_cpu(args)
    # The first process fills the cache, from which the others then read.
    with args.main_process_first(desc="data"):
        data = run_data(start, record.run)
    record.update(replace(record.run, data=data.packed.about()))
    if start.before and (other := other_data(start.settings, record.run, start.before)):
        changed = [*changed, other]
    record.update(replace(record.run, changes=[*record.run.changes, *changed]))
    model = _model(start, data.tokenizer, record)
    if args.should_save:
        _announce(start, record.run, schedule, changed)
    # The guard reads the manifest at once, so with it the training waits until a checkpoint is sealed.
    stop, seals = StopOnSignal(), SealCheckpoints(background=not guard)
    trainer = _trainer(start, record, model, data, seals)
    if resume:
        refuse_other_engine(resume, trainer.is_fsdp_enabled)
    if pushes:
        refuse_sharded(getattr(trainer.accelerator.state, "fsdp_plugin", None))
    window = start.settings.run.average_window
    kept = [] if window is None else [AverageWeights(window)]
    # A signal asks for a save that is then sealed, and the guard pushes what is sealed: so they stand in this order.
    for callback in (*kept, stop, seals, *([guard] if guard else [])):
        trainer.add_callback(callback)
    _train(trainer, record, stop, resume)
    # A stream has read more by now, and may have skipped some of it.
    record.update(replace(record.run, data=data.packed.about()))
    _finish(trainer, record)
    if kept and args.should_save:
        record_of_kept(record.run).save(record.folder / KEPT)
    if guard:
        guard.finish()
    return record.run


def _train(trainer: PowerTrainer, record: RunRecord, stop: StopOnSignal, resume: Path | None) -> None:
    """Train to the last step; raise where a signal came before it."""
    stopped = False
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        # A run that has done its last step has only to finish, so a signal no longer stops it.
        stopped = stop.received > 0 and trainer.state.global_step < trainer.args.max_steps
        if stopped:
            _stopped(trainer, record, stop.received)
    finally:
        trainer.guards.seals.join()
        # The process of a run that was stopped is about to end, and a second signal must not end it before that.
        if not stopped:
            stop.restore()


def _model(start: Start, tokenizer: PreTrainedTokenizerBase, record: RunRecord) -> PreTrainedModel:
    """The model, ready to be trained, its size on record."""
    settings = start.settings
    # The seed is set here, so that the first weights do not depend on what was drawn before.
    set_seed(settings.training.seed)
    with _whole_tensors(settings.training):
        model = build_model(settings, tokenizer, vocab_size_of(start.resume))
        counted = replace(
            record.run,
            parameters=model.num_parameters(),
            parameters_without_embeddings=model.num_parameters(exclude_embeddings=True),
            flops_per_token=flops_per_token(model.config, settings.data.block_size),
        )
    record.update(counted)
    return speed_up_(model, settings.training, settings.data.block_size)


def _trainer(
    start: Start, record: RunRecord, model: PreTrainedModel, data: RunData, seals: SealCheckpoints
) -> PowerTrainer:
    settings, args = start.settings, start.settings.training
    # The data begin at the checkpoint's tokens already, so the Trainer must not skip any.
    args.ignore_data_skip = True
    # The start of the run is behind one that goes on.
    args.eval_on_start = args.eval_on_start and start.resume is None
    trainer = PowerTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.packed.held_out,
        processing_class=data.tokenizer,
        data_collator=collate_blocks,
        optimizer_cls_and_kwargs=optimizer_of(args) if settings.mup.mup else None,
        callbacks=[record],
        guards=Guards(
            record=record,
            bad_numbers=BadNumbers(record, settings.run.max_skipped_steps, settings.data.block_size),
            seals=seals,
            expert_load=ExpertLoad(model) if model.config.model_type in SOFTMAX_ROUTERS else None,
        ),
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        run = record.run
        total = run.tokens_seen + (args.max_steps - run.steps) * run.tokens_per_step
        trainer.add_callback(TokenProgress(run.tokens_per_step, total))
    if start.recipe is not None and start.recipe.forecast is not None:
        # The callbacks are called in order, so that the record has the log before this reads it.
        sizes = {"parameters": record.run.parameters, "width": settings.model.hidden_size}
        forecast = start.recipe.forecast
        trainer.add_callback(OnCourse(record, forecast, sizes.get(forecast.size or "")))
    return trainer


def _announce(start: Start, run: Run, schedule: Schedule | None, changed: list[Change]) -> None:
    """Print what the run will do, what has changed in it, and what speaks against it."""
    args, recipe = start.settings.training, start.recipe
    print(describe_run(run, args.max_steps - run.steps, _disk(args, run), schedule), flush=True)
    for each in changed:
        print(f"  changed      {each.name} {shown(each.before)} -> {shown(each.after)}", flush=True)
    if recipe is None:
        if schedule is not None:
            kwargs = start.settings.schedule_kwargs
            law = kwargs.get("law")
            numbers = {name: kwargs.get(name) for name in LAW_NAMES}
            print(f"  law          {whose(None if law is None else str(law), numbers)}", flush=True)
        return
    width = start.settings.model.hidden_size
    for warning in warnings_for(recipe, tokens=run.total_tokens, tokens_per_step=run.tokens_per_step, width=width):
        print(f"  WARNING      {warning}", flush=True)


def _disk(args: TrainingArguments, run: Run) -> tuple[int, int]:
    """Bytes that the run will write (fp32: weights and two moments per checkpoint), and bytes free."""
    steps = args.max_steps - run.steps
    every = args.save_steps if args.save_steps >= 1 else args.max_steps * args.save_steps
    written = math.ceil(steps / every) if args.save_strategy == "steps" else 1
    # The rotation leaves two checkpoints even where the limit is one.
    kept = min(written, max(2, args.save_total_limit or written))
    return (run.parameters or 0) * (12 * kept + 4), free_bytes(output_folder(args))


def _check_engine(args: TrainingArguments) -> None:
    """Refuse a launch in which the processes do not know of each other, and a DeepSpeed that replaces what is ours."""
    refuse_alone(args.world_size)
    deepspeed = args.deepspeed_plugin.deepspeed_config if args.deepspeed_plugin is not None else {}
    for part, ours in (("optimizer", "muP's parameter groups"), ("scheduler", "the run's learning-rate schedule")):
        if part in deepspeed:
            raise UserError(
                f"the DeepSpeed config brings its own {part}, which would replace {ours}: take the section {part} out of it."
            )


@contextlib.contextmanager
def _whole_tensors(args: TrainingArguments) -> Iterator[None]:
    """ZeRO 3 would build models of empty tensors, and muP needs their shapes; DeepSpeed shards when training begins."""
    unset_hf_deepspeed_config()
    yield
    if args.deepspeed_plugin is not None:
        set_hf_deepspeed_config(args.deepspeed_plugin.hf_ds_config)


def _push_guard(start: Start, run: Run) -> PushGuard | None:
    """What pushes in the Trainer's place, on the first process; the others push nothing."""
    args = start.settings.training
    if args.push_to_hub and args.process_index == 0:
        return PushGuard(args, start.folder, lineage=run.lineage or "", license=start.settings.run.license)
    # The Trainer would push by itself, and would store the token in training_args.bin.
    args.push_to_hub, args.hub_token = False, None
    return None


def _finish(trainer: PowerTrainer, record: RunRecord) -> None:
    """Held-out loss, then the model, the record and the picture into the run folder."""
    metrics = trainer.evaluate()
    status = "finished" if trainer.state.global_step >= trainer.args.max_steps else "stopped"
    if trainer.is_world_process_zero():
        # Killed while it writes the model, the run must not say of the new weights what is true of the old ones.
        record.update(replace(record.run, weights_step=None, weights_tokens=None))
        record.save()
    of = record.taken_back or record.run
    weights = replace(record.run, weights_step=of.steps, weights_tokens=of.tokens_seen)
    record.update(replace(weights, held_out_loss=metrics["eval_loss"], status=status, finished=now()))
    if trainer.is_fsdp_enabled:
        # Checkpoints may be shards, but the finished model is whole.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    # The Trainer has turned the cache off for training, and the saved model is to generate with it.
    trainer.model.config.use_cache = True
    trainer.save_model(str(record.folder))
    if trainer.is_world_process_zero():
        # The results that lie there are of the weights that lay there before.
        (record.folder / EVAL_FILE).unlink(missing_ok=True)
        if record.recipe is not None:
            record.recipe.save(record.folder / RECIPE_FILE)
        figures.save(plot_lr_and_loss(record.run), record.folder / "lr_and_loss.png")
        # The record comes last, because it says that the run is finished.
        record.save()


def _stopped(trainer: PowerTrainer, record: RunRecord, number: int) -> NoReturn:
    """The run's record says so; no evaluation, no model, no push: whoever sent the signal does not wait for them."""
    record.update(replace(record.run, status="stopped"))
    if trainer.is_world_process_zero():
        record.save()
    steps = record.run.steps
    checkpoint, name = record.folder / f"checkpoint-{steps}", signal.Signals(number).name
    raise StoppedBySignalError(
        number, f"stopped by {name} after step {steps}: go on from {checkpoint} with --resume_from_checkpoint true."
    )
