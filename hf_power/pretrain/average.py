"""A finished model without a tail: the mean of a trunk's last checkpoints, as a run folder of its own."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from hf_power.checkpoints.average import KINDS, merge, merge_kept, shares
from hf_power.checkpoints.locate import weight_files
from hf_power.checkpoints.seal import LATER, MANIFEST, checkpoints, problems, seal
from hf_power.evaluate.heldout import evaluate_model
from hf_power.pretrain.resume import refuse_other_run
from hf_power.pretrain.start import now
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.files import only_one, read_json, write_json
from hf_power.records.run import RUN_FILE, Average, Run
from hf_power.settings.settings import Settings

WINDOW = "window"  # The kind of a mean that was kept while the run trained.
LAST = "20%"
# What a checkpoint holds for going on with its training, beside the model.
STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state|trainer_state|training_args|average\.safetensors)")


def average(
    run: str | os.PathLike[str],
    kind: str = "uniform",
    last: str | None = None,
    output_dir: str | None = None,
    decay_shape: str | None = None,
) -> Path:
    """Make a finished model of a trunk's last checkpoints, without training; the trunk can go on afterwards.

    The new folder has the averaged model, and in checkpoint-N the same weights with the optimizer and the data position of
    the last checkpoint, from which `anneal` and `pretrain` go on. Checkpoints of a Trainer of transformers are taken too;
    they are counted in steps.

    Args:
        run: a run folder with checkpoints.
        kind: "uniform", "ema" or "decay", see `hf_power.checkpoints.average.shares`; or "window", the mean that the run has
            kept in its last checkpoint, see `AverageWeights`.
        last: the part of the run's tokens whose checkpoints are averaged, by default "20%"; not of the kind "window", whose
            part was set when the run began.
        output_dir: the new folder; by default beside the run, with -average-N.
        decay_shape: of the kind "decay"; by default that of the run.

    Returns:
        The new folder.

    Raises:
        UserError: fewer than two intact checkpoints there, none with a kept mean, one that has begun to decay, or a folder with
            another run.
    """
    source = Path(run)
    if not source.is_dir():
        raise NotFoundError(f"there is no run folder at {source}: pass the output_dir of a training.")
    _check_kind(kind, last, decay_shape)
    chosen = _chosen(source, _share(last or LAST)) if kind in KINDS else _intact(source, 1.0)[-1:]
    records = [Run.load_if_there(folder) for folder in chosen]
    newest = records[-1]
    _refuse_decaying(chosen, records)
    positions = [_position(folder, record) for folder, record in zip(chosen, records, strict=True)]
    shape = decay_shape or (newest and newest.schedule and newest.schedule.get("decay_shape")) or "exponential"
    parts = shares(kind, positions, shape) if kind in KINDS else [1.0]
    number = chosen[-1].name.removeprefix("checkpoint-")
    folder = Path(output_dir) if output_dir else source.with_name(f"{source.name}-average-{number}")
    refuse_other_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        if kind == WINDOW:
            merge_kept(chosen[-1], folder)
        else:
            merge(chosen, parts, folder)
        _copy_model(chosen[-1], folder)
        made = Average(kind, positions, [round(part, 12) for part in parts], shape if kind == "decay" else None)
        if newest is not None:
            _write(folder, chosen[-1], newest, made)
    return folder


def _check_kind(kind: str, last: str | None, decay_shape: str | None) -> None:
    if kind not in (*KINDS, WINDOW):
        raise UserError(f"kind must be one of {', '.join((*KINDS, WINDOW))}, got {kind!r}.")
    if kind == WINDOW and last is not None:
        raise UserError(
            f"--last {last} is not of the kind window, whose part of the run is its average_window: leave it out."
        )
    if kind != "decay" and decay_shape is not None:
        raise UserError(f"--decay_shape {decay_shape} is of the kind decay alone, got the kind {kind}: leave it out.")


def evaluate_average(folder: Path, dataset: str | None = None) -> Run | None:
    """Score the averaged model on the held-out text of its run, as a run does at its end; None without a record."""
    record = Run.load_if_there(folder)
    if record is None:
        return None
    scored = (record.data or {}).get("held_out_tokens")
    data = Settings.from_dict(dict(record.settings)).data
    if dataset is not None:
        data.dataset = dataset
    result = evaluate_model(folder, data, max_tokens=scored)
    loss = (result.metrics or {}).get("loss")
    record = replace(record, held_out_loss=None if loss is None else float(loss), finished=now(), status="finished")
    record.save(folder)
    return record


def record_of_kept(run: Run) -> Run:
    """The record of the mean that a run has kept while it trained; `hf-power evaluate RUN/average` scores it."""
    made = Average(WINDOW, [run.tokens_seen], [1.0])
    run = replace(run, weights_step=run.steps, weights_tokens=run.tokens_seen, held_out_loss=None)
    return replace(run, kind="average", name=f"{run.name}-average", average=made)


def _share(last: str) -> float:
    text = str(last).strip()
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise UserError(f"--last must be a percentage above 0% and up to 100%, got {last!r}: pass e.g. 20%.")
    return share


def _chosen(source: Path, share: float) -> list[Path]:
    """The intact checkpoints in the last part of the run, oldest first: two or more."""
    intact = _intact(source, share)
    if len(intact) < 2:
        raise UserError(
            f"{source} has {len(intact)} intact checkpoints in the last {share:.0%} of its tokens, and an average needs two: "
            "pass a larger --last, or train with a smaller save_steps and a larger save_total_limit."
        )
    return intact


def _intact(source: Path, share: float) -> list[Path]:
    """The checkpoints in the last part of the run, oldest first; those that are not intact are left out, with a word."""
    found = [folder for folder in checkpoints(source) if weight_files(folder)]
    if not found:
        raise NotFoundError(f"{source} has no checkpoint-N folder with weights: pass the output_dir of a training.")
    positions = [_position(folder, Run.load_if_there(folder)) for folder in found]
    inside = [folder for folder, n in zip(found, positions, strict=True) if n >= (1 - share) * positions[0]]
    intact = []
    for folder in inside:
        # A Trainer without SealCheckpoints has no manifests.
        if (folder / MANIFEST).exists() and (wrong := problems(folder)):
            print(f"{folder.name} is not used: {', '.join(wrong)}", flush=True)
        else:
            intact.append(folder)
    return intact[::-1]


def _position(folder: Path, record: Run | None) -> int:
    """The tokens of a checkpoint, or where nothing tells them its steps."""
    return record.tokens_seen if record is not None and record.tokens_seen else int(folder.name.split("-")[1])


def _refuse_decaying(folders: list[Path], records: list[Run | None]) -> None:
    for folder, record in zip(folders, records, strict=True):
        if record is not None and record.stage in ("decaying", "decayed"):
            raise UserError(
                f"{folder} lies in its run's own decay, and an average is made in place of one: train the trunk with "
                "decay_ratio 0, or move that checkpoint away."
            )


def _copy_model(checkpoint: Path, folder: Path) -> None:
    """Config, tokenizer and recipe; what belongs to the training, the weights and the records stay where they are."""
    weights = {path.name for path in weight_files(checkpoint)}
    for path in checkpoint.iterdir():
        own = path.name in (MANIFEST, RUN_FILE, *LATER, *weights) or path.name.endswith(".index.json")
        if path.is_file() and not own and not path.name.startswith(".") and not STATE.match(path.name):
            shutil.copyfile(path, folder / path.name)
    config = read_json(folder / "config.json") or {}
    # The Trainer turns the cache off for training, and the finished model is to generate with it.
    write_json(folder / "config.json", {**config, "use_cache": True})


def _write(folder: Path, checkpoint: Path, newest: Run, made: Average) -> None:
    """The record of the average, and the checkpoint from which a training may go on."""
    parent = f"{checkpoint.parent.name}/{checkpoint.name}"
    record = replace(
        newest, name=folder.name, kind="average", average=made, parent=parent, held_out_loss=None, since_log=None
    )
    record = replace(record, status="stopped", started=now(), finished=None)
    inside = folder / checkpoint.name
    inside.mkdir()
    averaged = weight_files(folder)
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint)
        if not path.is_file() or path.name in (MANIFEST, RUN_FILE, *LATER) or path in weight_files(checkpoint):
            continue
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        _link(path, inside / name)
    for path in averaged:
        _link(path, inside / path.name)
    record.save(inside)
    seal(inside)
    record.save(folder)


def _link(source: Path, target: Path) -> None:
    """The same file under another name, without room on the disk where the file system can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
