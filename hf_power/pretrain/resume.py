"""Going on from a checkpoint: which one, whether it has all that a run needs, and what may be another now."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from transformers import AutoConfig

from hf_power.checkpoints.ema import FOLDER as KEPT
from hf_power.checkpoints.locate import weight_files
from hf_power.checkpoints.seal import (
    MANIFEST,
    checkpoints,
    missing_parts,
    newest_intact,
    problems,
    saved_under_fsdp,
    unfinished,
)
from hf_power.recipe import FILE_NAME as RECIPE_FILE
from hf_power.recipe import Recipe
from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.files import read_json
from hf_power.records.run import RUN_FILE, Change, Run
from hf_power.records.schema import Json
from hf_power.schedule import LAW_NAMES
from hf_power.settings.read import flatten
from hf_power.settings.sections import NOT_RECORDED, SECTIONS, TRAINING_DEFAULTS
from hf_power.settings.settings import Settings

# Another value of these makes another run: other weights, other text, or a law that was not tuned for it.
_GUARDED = {f.name for f in dataclasses.fields(SECTIONS["mup"])} | {"model_config", "seed", "streaming"}
_SHAPE = {f.name for f in dataclasses.fields(SECTIONS["model"])} - {"model_config"}
TOKENIZER = {"tokenizer", "vocab_size"}
_LAW = {f"lr_scheduler_kwargs.{name}" for name in LAW_NAMES}


def checkpoint_to_resume(settings: Settings, folder: Path) -> Path | None:
    """The verified checkpoint that the settings ask for, or None for a run that begins.

    ``resume_from_checkpoint: true`` begins the run where no checkpoint was ever finished, so that one command both starts
    and resumes.

    Raises:
        UserError: a folder that holds another run, or a checkpoint that is damaged or lacks a part.
        NotFoundError: no such checkpoint, or none in the folder that is intact.
    """
    wanted = settings.training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        refuse_other_run(folder)
        return None
    if str(wanted).lower() != "true":
        checkpoint = Path(str(wanted))
        if not is_of(folder, checkpoint):
            refuse_other_run(folder)
        verify(checkpoint)
        return checkpoint
    if all(unfinished(p) for p in checkpoints(folder)):
        # A run may have finished without a checkpoint; its model must not be written over.
        if (read_json(folder / RUN_FILE) or {}).get("status") == "finished":
            refuse_other_run(folder)
        if settings.training.should_save:
            print(f"there is no checkpoint in {folder} yet: the run begins", flush=True)
        return None
    found, broken = newest_intact(folder, complete=True)
    if settings.training.should_save:
        for name, what in broken.items():
            print(f"{name} is not used: {', '.join(what)}", flush=True)
    return found


def is_of(folder: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint is one of the run folder's own."""
    return checkpoint.resolve().parent == folder.resolve()


def refuse_other_run(folder: Path) -> None:
    """Raise a UserError for a folder in which a run has begun."""
    if (folder / RUN_FILE).exists() or checkpoints(folder):
        raise UserError(
            f"the output folder {folder} holds a run already: pass --resume_from_checkpoint true to go on with it, or "
            "another --output_dir."
        )


def verify(checkpoint: Path) -> None:
    """Raise unless a checkpoint is there, intact, and complete."""
    if not checkpoint.is_dir():
        raise NotFoundError(f"there is no checkpoint at {checkpoint}: pass a checkpoint-N folder of a run.")
    if there := sorted(checkpoint.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name)):
        names = ", ".join(path.name for path in there)
        raise UserError(f"{checkpoint} is a run and no checkpoint: pass one of those in it, {names}.")
    if checkpoint.name == KEPT and not (checkpoint / MANIFEST).exists():
        raise UserError(
            f"{checkpoint} is the mean that a run has kept, without the optimizer to go on with: run hf-power average "
            f"{checkpoint.parent} --kind window, and pass the checkpoint in the new folder."
        )
    if not weight_files(checkpoint) and not (checkpoint / "trainer_state.json").exists():
        raise NotFoundError(
            f"{checkpoint} holds neither weights nor trainer_state.json: pass a checkpoint-N folder of a run."
        )
    if found := problems(checkpoint):
        raise UserError(f"the checkpoint {checkpoint} cannot be used: {', '.join(found)}; take an earlier one.")
    if missing := missing_parts(checkpoint):
        raise UserError(
            f"the checkpoint {checkpoint} has no {' and no '.join(missing)}, without which training would start anew in "
            "part: take another checkpoint, saved with save_only_model false."
        )


def read_record(folder: Path) -> Run:
    """run.json of a checkpoint, with all that going on from it needs."""
    run = Run.load(folder, required=("tokens_seen", "tokens_per_step", "steps", "settings"))
    # It may be null, which says that there is no tail; where it is missing, nothing says whether there is one.
    if run.schedule is not None and "decay_start_tokens" not in run.schedule:
        raise UserError(
            f"{folder / RUN_FILE} lacks schedule.decay_start_tokens: take a checkpoint that hf_power wrote."
        )
    return run


def vocab_size_of(checkpoint: Path | None) -> int | None:
    """Rows of the embedding of a checkpoint that a run goes on from; None for a run that begins."""
    return None if checkpoint is None else int(AutoConfig.from_pretrained(checkpoint).vocab_size)


def refuse_other_engine(checkpoint: Path, sharding: bool) -> None:
    """Raise a UserError for a checkpoint of FSDP without it, and the other way round."""
    if sharding != saved_under_fsdp(checkpoint):
        was, now = ("without FSDP", "under it") if sharding else ("under FSDP", "without it")
        raise UserError(
            f"the checkpoint {checkpoint} was saved {was} and this run is {now}, which cannot read its optimizer: go on "
            "with the accelerate config that it was trained with, on any number of processes."
        )


def changes(settings: Settings, run: Run, before: Run, checkpoint: Path) -> list[Change]:
    """The settings that are others than in the record of the checkpoint; all of them are taken up.

    Raises:
        UserError: the model's shape, or without leave (run.allow_changed): muP, the data, the tokenizer, the seed, or a
            number that the checkpoint's recipe has tuned.
    """
    old, new = (_values(record.settings) for record in (before, run))
    # Names with a dot are keys of lr_scheduler_kwargs, of which one that was left out has changed too.
    names = [name for name in [*old, *new] if name in new or "." in name]
    differ = {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}
    fixed = dict.fromkeys(_SHAPE, "whose weights do not fit another model")
    fixed["optim"] = "whose moments no other optimizer can read"
    fixed["lr_scheduler_type"] = "whose schedule's state no other schedule can read"
    if settings.training.lr_scheduler_type != "power":
        fixed["learning_rate"] = "and only the power schedule takes up another rate or horizon"
    allowed, guarded = settings.allowed_changes(), _GUARDED | TOKENIZER | _tuned(checkpoint)
    for name, (was, now) in differ.items():
        what = f"{name} is {shown(now)} but {shown(was)} in {checkpoint}"
        if name in fixed:
            raise UserError(f"{what}, {fixed[name]}: leave it as it was, or train a new run.")
        if name in guarded and name not in allowed:
            raise UserError(
                f"{what}: leave it as it was, or pass --allow_changed {name} to go on all the same, with a run that is "
                "partly another."
            )
    rows = vocab_size_of(checkpoint)
    if (asked := settings.model.config(vocab_size=rows).vocab_size) != rows:
        raise UserError(
            f"vocab_size is {asked} in model_config but {rows} in the model of {checkpoint}, whose weights do not fit "
            "another model: leave it as it was, or train a new run."
        )
    differ["tokens_per_step"] = before.tokens_per_step, run.tokens_per_step
    return _changed(before, differ)


def other_machine(run: Run, before: Run) -> list[Change]:
    """What a run goes on with that makes its numbers others in the last digits: devices, processes, packages."""
    parts = ((before.versions, run.versions), (before.hardware, run.hardware))
    names = ("device", "device_name", "processes")
    differ = {
        name: (old.get(name), new[name])
        for old, new in cast("tuple[tuple[dict[str, Json], dict[str, Json]], ...]", parts)
        for name in new
        if name in old and (name in run.versions or name in names)
    }
    return _changed(before, differ)


def _changed(before: Run, values: Mapping[str, tuple[object, object]]) -> list[Change]:
    return [
        Change(before.steps, before.tokens_seen, name, cast(Json, was), cast(Json, now))
        for name, (was, now) in values.items()
        if was != now
    ]


def other_data(settings: Settings, run: Run, before: Run) -> Change | None:
    """The change if the blocks are not those of the checkpoint's run though they are cut in the same way.

    A pretraining run that has no leave for it ends with a UserError.
    """
    was, now = (record.data.get("fingerprint") if record.data else None for record in (before, run))
    old = _values(before.settings)
    # Data that are cut in another way have other blocks, which `changes` has named already.
    same = all(old[name] == getattr(settings.data, name) for name in ("block_size", "streaming", *TOKENIZER))
    if not same or was in (None, now):
        return None
    if run.kind == "pretrain" and "dataset" not in settings.allowed_changes():
        raise UserError(
            f"the data have the fingerprint {now}, but {was} when the checkpoint was saved, so their text is another: "
            "restore it, or pass --allow_changed dataset to go on with other text."
        )
    return Change(before.steps, before.tokens_seen, "fingerprint of the data", was, now)


def _tuned(checkpoint: Path) -> set[str]:
    """Names of the settings that the checkpoint's recipe has tuned."""
    if not (checkpoint / RECIPE_FILE).exists():
        return set()
    return {*Recipe.load(checkpoint / RECIPE_FILE).settings()} | _LAW


def _values(sections: Mapping[str, object]) -> dict[str, object]:
    """Every setting of a run, those that were not given at their defaults; lr_scheduler_kwargs by their dotted names."""
    values = {
        f.name: None if f.default is dataclasses.MISSING else f.default
        for kind in SECTIONS.values()
        for f in dataclasses.fields(kind)
        if f.init and f.name not in NOT_RECORDED
    }
    values |= TRAINING_DEFAULTS | flatten(json.loads(json.dumps(sections)), "the checkpoint's settings")
    kwargs = values.pop("lr_scheduler_kwargs") or {}
    values |= {f"lr_scheduler_kwargs.{name}": value for name, value in kwargs.items()}
    return {name: getattr(value, "value", value) for name, value in values.items()}
