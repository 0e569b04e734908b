"""What a run begins with: settings, what it goes on from, first record, preview of the schedule, and its data."""

import datetime
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_power.data.order import BlockStream, stream_blocks
from hf_power.data.packing import PackedText, pack_both
from hf_power.data.text import load_text
from hf_power.data.tokenizer import check_token_ids, load_tokenizer, tokenizer_fingerprint
from hf_power.pretrain.resume import TOKENIZER, changes, is_of, other_machine, vocab_size_of
from hf_power.recipe import Recipe
from hf_power.records.errors import UserError, shown
from hf_power.records.machine import hardware, versions
from hf_power.records.run import Change, Run
from hf_power.schedule import Schedule
from hf_power.schedule.lengths import Progress, plan_schedule
from hf_power.settings.settings import Settings

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class Start:
    """What a run is told, and where it goes on.

    `max_steps` and what the recipe says are written into the training section of the settings. `kind` is "pretrain" or
    "anneal"; `resume` is the verified checkpoint that it goes on from, None for a run that begins, and `before` its
    record.
    """

    settings: Settings
    folder: Path
    kind: str
    resume: Path | None = None
    before: Run | None = None
    recipe: Recipe | None = None

    @property
    def tokens(self) -> int:
        """The length that the run is to have, in tokens."""
        return int(self.settings.run.tokens or 0)


def tokens_per_step(settings: Settings) -> int:
    """Tokens of one optimizer step over all processes."""
    args = settings.training
    return int(args.train_batch_size * args.gradient_accumulation_steps * tokens_per_row(settings))


def tokens_per_row(settings: Settings) -> int:
    """Tokens that all processes read while one of them reads a sequence; those that share a sequence read it once."""
    args = settings.training
    parallel = args.parallelism_config
    sharers = 1
    if parallel is not None:
        sharers = math.prod(size or 1 for size in (parallel.tp_size, parallel.cp_size, parallel.sp_size))
    return int(args.world_size // sharers * settings.data.block_size)


def finished_run(start: Start) -> Run | None:
    """The record of a run that was asked to go on and has nothing left to do; None if it has."""
    resume, before, folder = start.resume, start.before, start.folder
    if resume is None or before is None or not is_of(folder, resume) or start.tokens > before.tokens_seen:
        return None
    run = Run.load_if_there(folder)
    if run is None or run.status != "finished":
        return None
    return Run.load(folder, required=("name", "tokens_seen", "train_seconds", "held_out_loss"))


def new_run(start: Start, per_step: int) -> Run:
    """What run.json says before the first step, of `per_step` tokens."""
    settings, resume, before = start.settings, start.resume, start.before or Run()
    seen, there = before.tokens_seen, _record_there(start.folder)
    # A run that was stopped between its last checkpoint and its model has seen all its tokens and may still go on.
    only_to_finish = resume is not None and is_of(start.folder, resume) and seen - start.tokens < before.tokens_per_step
    if start.tokens <= seen and not only_to_finish:
        raise UserError(
            f"the checkpoint has seen {seen:,} tokens, the run is to have {start.tokens:,}: raise tokens to train on."
        )
    parent = before.parent
    if resume and start.kind == "anneal" and before.kind != "anneal":
        parent = f"{resume.parent.name}/{resume.name}"
    return Run(
        kind=start.kind,
        name=start.folder.name,
        status="running",
        lineage=before.lineage or uuid.uuid4().hex,
        parent=parent,
        average=before.average,
        tokens_seen=seen,
        total_tokens=start.tokens,
        tokens_per_step=per_step,
        steps=before.steps,
        weights_step=there.weights_step,
        weights_tokens=there.weights_tokens,
        train_seconds=before.train_seconds,
        seed=settings.training.seed,
        settings=settings.to_dict(),
        versions=versions(),
        hardware=hardware(settings.training.device, settings.training.world_size),
        started=now(),
        loss_curve=before.loss_curve,
        skipped_steps=before.skipped_steps,
        loss_spikes=before.loss_spikes,
        changes=before.changes,
        since_log=before.since_log,
        groups=before.groups,
    )


def _record_there(folder: Path) -> Run:
    """What a run folder says of the weights in it; a record that cannot be read says nothing, and is written anew."""
    try:
        return Run.load_if_there(folder) or Run()
    except UserError:
        return Run()


def outlook(start: Start, run: Run) -> tuple[Schedule | None, list[Change]]:
    """The power schedule of a run, and what has changed in it since its checkpoint.

    Every number of both is checked here, before the data are read.
    """
    schedule = _preview(start.settings, run)
    if start.resume is None or start.before is None:
        return schedule, []
    changed = other_machine(run, start.before)
    # An anneal begins with settings that are not its trunk's, so only those of one that goes on are compared.
    if start.kind == "pretrain" or start.before.kind == start.kind:
        changed = [*changes(start.settings, run, start.before, start.resume), *changed]
    return schedule, changed


def use_known_horizon(settings: Settings, recipe: Recipe, per_step: int) -> None:
    """The recipe's peak, warmup and tail for a schedule that is told its length, each unless it was given."""
    args, schedule = settings.training, str(getattr(settings.training.lr_scheduler_type, "value", ""))
    tokens = int(settings.run.tokens or 0)
    if "learning_rate" not in settings.given:
        args.learning_rate = recipe.peak_lr(tokens, per_step, schedule, settings.size_for(recipe))
    if "warmup_steps" not in settings.given and recipe.warmup_tokens is not None:
        args.warmup_steps = round(recipe.warmup_tokens / per_step)
    if schedule == "warmup_stable_decay":
        tail: dict[str, int | str] = {"num_decay_steps": round(recipe.decay_ratio * tokens / per_step)}
        # transformers has no exponential decay, so its own default stays in the place of one.
        if recipe.decay_shape != "exponential":
            tail["decay_type"] = recipe.decay_shape
        args.lr_scheduler_kwargs = {**tail, **settings.schedule_kwargs}
    settings.given |= {"learning_rate", "warmup_steps", "lr_scheduler_kwargs"}


def use_cosine_peak(settings: Settings, per_step: int) -> None:
    """The law and cap of a peak of cosine, which the record then has: a tail or a resumed run keeps them as they are."""
    args, kwargs = settings.training, settings.schedule_kwargs
    peak = kwargs.pop("peak_lr", None)
    if peak is None or args.lr_scheduler_type != "power":
        return
    if "learning_rate" in settings.given and args.learning_rate != peak:
        raise UserError(
            f"lr_scheduler_kwargs.peak_lr is {shown(peak)} and learning_rate {args.learning_rate}, and both are the cap: "
            "leave one of them out."
        )
    steps = math.ceil((settings.run.tokens or 0) / per_step)
    lengths = {"num_training_steps": steps, "num_warmup_steps": args.get_warmup_steps(steps)}
    found = plan_schedule(peak_lr=peak, tokens_per_step=per_step, max_lr=peak, **lengths, **kwargs)
    law = {name: value for name, value in found.law.to_dict().items() if value is not None}
    args.learning_rate = found.max_lr
    args.lr_scheduler_kwargs = {**{name: value for name, value in kwargs.items() if name != "law"}, **law}
    settings.given |= {"learning_rate", "lr_scheduler_kwargs"}


def steps_to_come(run: Run) -> int:
    """Optimizer steps from where a run stands to its end; the last one may pass it."""
    return math.ceil((run.total_tokens - run.tokens_seen) / run.tokens_per_step)


def now() -> str:
    """The time in UTC, in ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _preview(settings: Settings, run: Run) -> Schedule | None:
    args = settings.training
    if args.lr_scheduler_type != "power":
        return None
    return plan_schedule(
        Progress(run.tokens_seen, run.steps) if run.tokens_seen else None,
        max_lr=args.learning_rate,
        num_warmup_steps=args.get_warmup_steps(args.max_steps),
        num_training_steps=args.max_steps,
        **{"tokens_per_step": run.tokens_per_step, **settings.schedule_kwargs},
    )


@dataclass(frozen=True)
class RunData:
    """The data of a run: all of them, and the training blocks in their order from where the run goes on."""

    train: "BlockStream | IterableDataset"
    tokenizer: PreTrainedTokenizerBase
    packed: PackedText


def run_data(start: Start, run: Run) -> RunData:
    """Load the data of a run from the position on that its record tells; a UserError for another tokenizer."""
    from datasets import IterableDataset

    settings = start.settings
    tokenizer = _known_tokenizer(start)
    if tokenizer is not None:
        # What it does not fit to is said before the data are touched.
        _check_tokenizer(start, tokenizer)
    texts = load_text(settings.data)
    if tokenizer is None:
        tokenizer = load_tokenizer(settings.data, texts.train)
        _check_tokenizer(start, tokenizer)
    packed = pack_both(settings.data, tokenizer, texts, settings.run.max_eval_tokens)
    block, seed = packed.block_size, settings.training.seed
    # The blocks that the run has read are left out of their seeded order.
    first = run.tokens_seen // block
    if isinstance(packed.train, IterableDataset):
        return RunData(stream_blocks(packed.train, seed=seed, start=first), tokenizer, packed)
    # A run that has only to finish reads no block, but its loader refuses to be empty.
    steps = max(1, settings.training.max_steps - run.steps)
    stop = first + steps * run.tokens_per_step // block
    return RunData(BlockStream(packed.train, seed=seed, start=first, stop=stop), tokenizer, packed)


def _known_tokenizer(start: Start) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the checkpoint or of the settings; None for one that is yet to be trained on the text."""
    if start.resume and not start.settings.allowed_changes() & TOKENIZER:
        own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(start.resume)
        return own
    return load_tokenizer(start.settings.data, None) if start.settings.data.tokenizer else None


def _check_tokenizer(start: Start, tokenizer: PreTrainedTokenizerBase) -> None:
    resume, recipe = start.resume, start.recipe
    if resume is None:
        start.settings.model_config_for(tokenizer)
    else:
        check_token_ids(tokenizer, vocab_size_of(resume) or 0, f"the model of {resume}")
    fingerprint = tokenizer_fingerprint(tokenizer)
    if recipe is not None and recipe.tokenizer not in (None, fingerprint):
        raise UserError(
            f"the tokenizer of the run is {fingerprint}, that of the recipe {recipe.tokenizer}: pass the tokenizer that "
            "the recipe was tuned with; the law counts its tokens."
        )
