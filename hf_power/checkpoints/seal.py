"""Checkpoints that can be trusted: sealed by a manifest, verified before use, newest intact one first."""

import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.files import flush, sha256, temporaries, temporary_name, write_json
from hf_power.records.schema import read_object

MANIFEST = "manifest.json"
RUN_FILE = "run.json"  # what the run was and how far it got, in the run folder and in every checkpoint
SAVING = ".saving"  # in a checkpoint from before its first file until it is sealed
SCHEMA = 1
LATER = ("eval.json", "push.json")  # what evaluate and publish add to a sealed checkpoint
NOTES = (".md", ".txt", ".log", ".png")  # for people; no loader of a checkpoint with a tokenizer.json reads any


def seal(folder: Path, known: dict[str, Any] | None = None) -> None:
    """Write manifest.json, the last file of a checkpoint: size and SHA-256 of every other file.

    A folder without it was not finished. Entries of files that are known already are taken from `known`.
    """
    inside = sorted(p for p in folder.rglob("*") if p.name not in (MANIFEST, SAVING) and not p.name.endswith(".tmp"))
    inside = [p for p in inside if p.exists()]  # no link to nothing
    names = {p.relative_to(folder).as_posix(): p for p in inside if p.is_file()}
    entries = {name: (known or {}).get(name) or _entry(path) for name, path in names.items()}
    for path in [*inside, folder, folder.parent]:
        flush(path)
    write_json(folder / MANIFEST, {"schema": SCHEMA, "files": entries})
    flush(folder)
    (folder / SAVING).unlink(missing_ok=True)


def problems(folder: Path, complete: bool = False) -> list[str]:
    """What is wrong with a checkpoint, a phrase each; an empty list if it is as it was sealed.

    A file that was added is a problem because a tokenizer or the Trainer would read it; notes and hidden ones they never do.

    Args:
        folder: the checkpoint.
        complete: of one that is as it was sealed, a part that was never in it is a problem too, see `missing_parts`.
    """
    try:
        entries = sealed(folder)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing, so its saving was not finished"]
    except UserError:
        return [f"{MANIFEST} cannot be read"]
    found = {name: _problem(folder, name, entry) for name, entry in entries.items()}
    found |= {name: "was added after it was sealed" for name in _names(folder) if name not in (*entries, *LATER)}
    wrong = [f"{name} {what}" for name, what in found.items() if what]
    if wrong or not complete:
        return wrong
    return [f"no {part} is in it" for part in missing_parts(folder)]


def sealed(folder: Path) -> dict[str, Any]:
    """The entries of a checkpoint's manifest, file name -> {"bytes", "sha256"}, as they are written there.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: it is none of this schema.
    """
    table = {"files": (dict, None), "files.*": (dict, None)}
    content: dict[str, Any] = read_object(folder / MANIFEST, table, schema=SCHEMA, required=("files",))["files"]
    return content


def missing_parts(folder: Path) -> list[str]:
    """What an intact checkpoint lacks for a run to go on as if it had not stopped; an empty list if nothing."""
    names = {PurePosixPath(name).parts[0] for name in sealed(folder)}
    if any(name.startswith("global_step") for name in names):  # DeepSpeed's engine has all but the Trainer's part
        needed = {"trainer_state.json": ["trainer_state.json"], "run.json": [RUN_FILE]}
    else:
        needed = {
            "weights": ["model.safetensors", "model.safetensors.index.json", "pytorch_model_fsdp*"],
            "optimizer": ["optimizer.pt", "optimizer.bin", "optimizer_[0-9]*"],
            "scheduler.pt": ["scheduler.pt"],
            "random numbers (rng_state)": ["rng_state*.pth"],
            "trainer_state.json": ["trainer_state.json"],
            "run.json": [RUN_FILE],
            "tokenizer": ["tokenizer.json", "*.model", "vocab.*"],
            "tokenizer_config.json": ["tokenizer_config.json"],
            "config.json": ["config.json"],
        }
    return [part for part, patterns in needed.items() if not any(fnmatch(name, p) for name in names for p in patterns)]


def unfinished(folder: Path) -> bool:
    """Whether a checkpoint's saving began under our eyes and did not come to its end."""
    return not (folder / MANIFEST).exists() and ((folder / SAVING).exists() or not any(folder.iterdir()))


def saved_under_fsdp(folder: Path) -> bool:
    """True for a checkpoint whose optimizer only FSDP reads; accelerate names its weights pytorch_model_fsdp."""
    return any(folder.glob("pytorch_model_fsdp*"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint-N folders of a run, newest (largest N) first."""
    numbered = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_intact(run: Path, complete: bool = False) -> tuple[Path, dict[str, list[str]]]:
    """The newest checkpoint that verifies, and what is wrong with those after it.

    Args:
        run: the run folder.
        complete: it must also have every part that `hf-power pretrain` goes on from, see `problems`.

    Raises:
        FileNotFoundError: if the run has no intact checkpoint; the message names each and its problem.
    """
    broken: dict[str, list[str]] = {}
    for folder in checkpoints(run):
        found = problems(folder, complete)
        if not found:
            return folder, broken
        broken[folder.name] = found
    details = "; ".join(f"{name}: {', '.join(found)}" for name, found in broken.items())
    raise NotFoundError(
        f"there is nothing to resume from in {run}" + (f" ({details})" if details else "") + ": "
        "leave out --resume_from_checkpoint to start anew in an empty folder."
    )


def checkpoint_bytes(run: Path, parameters: int) -> int:
    """Bytes that the next checkpoint takes: as the last one, or fp32 weights and two moments, and 5 % more."""
    last = [folder for folder in checkpoints(run) if (folder / MANIFEST).exists()][:1]
    parts = [p.stat().st_size for folder in last for p in folder.rglob("*") if p.is_file()]
    return int(1.05 * (sum(parts) or 12 * parameters))


def remove_leftovers(run: Path) -> list[str]:
    """Delete the checkpoints whose saving began under our eyes and was not finished; returns their names.

    With them goes what a killed process has left under a temporary name, and the mark of one that was sealed all the same.
    """
    found = [p for p in checkpoints(run) if unfinished(p)]
    for folder in found:
        _remove(folder)
    for path in temporaries(run):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in checkpoints(run):
        if (folder / MANIFEST).exists():
            (folder / SAVING).unlink(missing_ok=True)
    return [folder.name for folder in found]


def rotate(run: Path, limit: int, keep: Path | None = None, known: Path | None = None) -> list[str]:
    """Delete the oldest sealed checkpoints beyond `limit`, and only those that have two newer intact ones.

    Args:
        run: the run folder.
        limit: how many sealed checkpoints stay; 1 counts as 2.
        keep: one that stays in any case, such as the best.
        known: one that is intact for certain and is not hashed again, such as that which was just sealed.

    Returns:
        The names of those deleted.
    """
    folders = [p for p in checkpoints(run) if (p / MANIFEST).exists()]
    if len(folders) <= limit:
        return []
    intact = 0
    removed = []
    for place, folder in enumerate(folders):
        if intact >= 2 and place >= limit and folder != keep:
            _remove(folder)
            removed.append(folder.name)
        elif intact < 2:
            intact += folder == known or not problems(folder)
    return removed


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves nothing that looks like one."""
    gone = temporary_name(folder)
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _problem(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    pure, path, size = PurePosixPath(name), folder / name, entry.get("bytes")
    try:
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a zero byte, or half a surrogate pair
        inside = False
    if not inside or pure.is_absolute() or ".." in pure.parts:
        return "lies outside of the folder"
    if not os.path.isfile(path):
        return "is missing"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes instead of {shown(size)}"
    return None if sha256(path) == entry.get("sha256") else "has other content than when it was sealed"


def _names(folder: Path) -> list[str]:
    """The files of a checkpoint but for the manifest, notes, temporary and hidden ones."""
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [p for p in names if p.name != MANIFEST and p.suffix not in (".tmp", *NOTES)]
    return [p.as_posix() for p in names if not any(part.startswith(".") for part in p.parts)]


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
