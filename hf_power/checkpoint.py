"""Checkpoints that can be trusted: sealed by a manifest, verified before use, newest intact one first."""

import json
import re
from pathlib import Path
from typing import Any

from hf_power.files import sha256, write_json

MANIFEST = "manifest.json"
RUN_FILE = "run.json"  # what the run was and how far it got, in the run folder and in every checkpoint
SCHEMA = 1


def seal(folder: Path, known: dict[str, Any] | None = None) -> None:
    """Write manifest.json, the last file of a checkpoint: size and SHA-256 of every other file.

    A folder without it was not finished. Entries of files that are known already are taken from `known`.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.endswith(".tmp"))
    names = {p.relative_to(folder).as_posix(): p for p in files}
    entries = {name: (known or {}).get(name) or _entry(path) for name, path in names.items()}
    write_json(folder / MANIFEST, {"schema": SCHEMA, "files": entries})


def problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, a phrase each; an empty list if it is as it was sealed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = manifest["files"].items()
        wanted = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in entries}
    except FileNotFoundError:
        return [f"{MANIFEST} is missing, so its saving was not finished"]
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError):
        return [f"{MANIFEST} cannot be read"]
    found = []
    for path, (size, digest) in wanted.items():
        name = path.relative_to(folder).as_posix()
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
        elif sha256(path) != digest:
            found.append(f"{name} has other content than when it was sealed")
    return found


def saved_under_fsdp(folder: Path) -> bool:
    """True for a checkpoint whose optimizer only FSDP reads; accelerate names its weights pytorch_model_fsdp."""
    return any(folder.glob("pytorch_model_fsdp*"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint-N folders of a run, newest (largest N) first."""
    numbered = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_intact(run: Path) -> tuple[Path, dict[str, list[str]]]:
    """The newest checkpoint that verifies, and what is wrong with those after it.

    Raises:
        FileNotFoundError: if the run has no intact checkpoint; the message names each and its problem.
    """
    broken: dict[str, list[str]] = {}
    for folder in checkpoints(run):
        found = problems(folder)
        if not found:
            return folder, broken
        broken[folder.name] = found
    details = "; ".join(f"{name}: {', '.join(found)}" for name, found in broken.items())
    raise FileNotFoundError(
        f"there is nothing to resume from in {run}" + (f" ({details})" if details else "") + ": "
        "leave out --resume_from_checkpoint to start anew in an empty folder."
    )


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}
