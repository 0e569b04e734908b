"""Checkpoints that can be trusted: sealed by a manifest, verified before use, newest intact one first; `examine`."""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from transformers import AutoConfig, AutoTokenizer

from hf_power.data.tokenizer import check_token_ids
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.files import flush, read_record, sha256, temporaries, temporary_name, write_json
from hf_power.records.run import RUN_FILE, Run
from hf_power.records.schema import Count, encode

MANIFEST = "manifest.json"
# A checkpoint holds this file from before its first file until it is sealed.
SAVING = ".saving"
SCHEMA = 1
# The verbs evaluate and publish add these to a sealed checkpoint.
LATER = ("eval.json", "push.json")
# Files for people may be added to a sealed checkpoint: no loader of one with a tokenizer.json reads any of them.
NOTES = (".md", ".txt", ".log", ".png")


@dataclass(frozen=True)
class Entry:
    """A file of a checkpoint as it was sealed: its size in bytes, and its SHA-256 in hexadecimal digits."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json: the files of a checkpoint by their names, paths with slashes from its folder on."""

    files: dict[str, Entry]


def seal(folder: Path, known: Mapping[str, Entry] | None = None) -> None:
    """Write manifest.json, the last file of a checkpoint: size and SHA-256 of every other file.

    A folder without it was not finished. Entries of files that are known already are taken from `known`.
    """
    inside = sorted(p for p in folder.rglob("*") if p.name not in (MANIFEST, SAVING) and not p.name.endswith(".tmp"))
    # A link to nothing has neither a size nor a hash.
    inside = [p for p in inside if p.exists()]
    names = {p.relative_to(folder).as_posix(): p for p in inside if p.is_file()}
    entries = {
        name: (known or {}).get(name) or Entry(path.stat().st_size, sha256(path)) for name, path in names.items()
    }
    # All that the manifest speaks of must be on the disk before the manifest is.
    for path in [*inside, folder, folder.parent]:
        flush(path)
    write_json(folder / MANIFEST, {"schema": SCHEMA, **encode(Manifest(entries))})
    flush(folder)
    (folder / SAVING).unlink(missing_ok=True)


def problems(folder: Path, complete: bool = False) -> list[str]:
    """What is wrong with a checkpoint, a phrase each; an empty list if it is as it was sealed.

    A file that was added is a problem because a tokenizer or the Trainer would read it; notes and hidden ones they
    never do. With `complete`, a part that was never in it is a problem too, see `missing_parts`.
    """
    try:
        entries = sealed(folder)
    except NotFoundError:
        return [f"{MANIFEST} is missing, so its saving was not finished"]
    except UserError:
        return [f"{MANIFEST} cannot be read"]
    found = {name: _problem(folder, name, entry) for name, entry in entries.items()}
    found |= {name: "was added after it was sealed" for name in _names(folder) if name not in (*entries, *LATER)}
    wrong = [f"{name} {what}" for name, what in found.items() if what]
    if wrong or not complete:
        return wrong
    return [f"no {part} is in it" for part in missing_parts(folder)]


def sealed(folder: Path) -> dict[str, Entry]:
    """The entries of a checkpoint's manifest by file name; a NotFoundError if there is none, else a UserError."""
    return read_record(folder / MANIFEST, Manifest, schema=SCHEMA, remedy="take another checkpoint").files


def missing_parts(folder: Path) -> list[str]:
    """What an intact checkpoint lacks for a run to go on as if it had not stopped; an empty list if nothing."""
    names = {PurePosixPath(name).parts[0] for name in sealed(folder)}
    if any(name.startswith("global_step") for name in names):
        # DeepSpeed's engine keeps weights, optimizer and random numbers in a folder of its own.
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
    """Whether the saving of a checkpoint was begun by `SealCheckpoints` and did not come to its end.

    A folder without a manifest that lacks the mark too, and is not empty, is somebody else's and is left alone.
    """
    return not (folder / MANIFEST).exists() and ((folder / SAVING).exists() or not any(folder.iterdir()))


def saved_under_fsdp(folder: Path) -> bool:
    """True for a checkpoint whose optimizer only FSDP reads; accelerate names its weights pytorch_model_fsdp."""
    return any(folder.glob("pytorch_model_fsdp*"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint-N folders of a run, newest (largest N) first."""
    numbered = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_intact(run: Path, complete: bool = False) -> tuple[Path, dict[str, list[str]]]:
    """The newest checkpoint that verifies, and what is wrong with those after it, see `problems`.

    Raises:
        NotFoundError: if the run has no intact checkpoint; the message names each and its problem.
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
    """Delete the checkpoints that are `unfinished`; returns their names.

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
    """Delete the oldest sealed checkpoints beyond `limit`, and only those that have two newer intact ones; their names.

    The one to `keep`, such as the best, stays in any case, and a limit of 1 counts as 2. The one that is `known` to be
    intact, such as that which was just sealed, is not hashed again.
    """
    folders = [p for p in checkpoints(run) if (p / MANIFEST).exists()]
    if len(folders) <= limit:
        return []
    intact = 0
    removed = []
    # Newest first, so that by the time a folder is beyond the limit the two that must stay have been found.
    for place, folder in enumerate(folders):
        if intact >= 2 and place >= limit and folder != keep:
            _remove(folder)
            removed.append(folder.name)
        elif intact < 2:
            intact += folder == known or not problems(folder)
    return removed


def _ids_without_embedding(folder: Path) -> list[str]:
    """What keeps a run from going on with a checkpoint's tokenizer, by the same rule as at its start."""
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
        check_token_ids(tokenizer, int(config.vocab_size), "its model")
    except UserError as error:
        return [str(error).rstrip(".")]
    return []


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves nothing that looks like one."""
    gone = temporary_name(folder)
    os.rename(folder, gone)
    shutil.rmtree(gone)


def _problem(folder: Path, name: str, entry: Entry) -> str | None:
    pure, path = PurePosixPath(name), folder / name
    try:
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:
        # The name has a zero byte or half a surrogate pair, which no file system takes.
        inside = False
    if not inside or pure.is_absolute() or ".." in pure.parts:
        return "lies outside of the folder"
    if not os.path.isfile(path):
        return "is missing"
    # The size is asked first because hashing a large file takes seconds.
    if path.stat().st_size != entry.bytes:
        return f"has {path.stat().st_size} bytes instead of {entry.bytes}"
    return None if sha256(path) == entry.sha256 else "has other content than when it was sealed"


def _names(folder: Path) -> list[str]:
    """The files of a checkpoint but for the manifest, notes, temporary and hidden ones."""
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [p for p in names if p.name != MANIFEST and p.suffix not in (".tmp", *NOTES)]
    return [p.as_posix() for p in names if not any(part.startswith(".") for part in p.parts)]


@dataclass(frozen=True)
class Examined:
    """A checkpoint: its name, the tokens it has seen if it says so, and what is wrong with it, a phrase each."""

    name: str
    tokens: int | None
    problems: list[str]


@dataclass(frozen=True)
class Examination:
    """The checkpoints of a run, newest first, and the name of the one that --resume_from_checkpoint true takes.

    `remaining_tokens` are left to train from there; None if that is not known.
    """

    checkpoints: list[Examined]
    resume: str | None
    remaining_tokens: int | None


def examine(run: Path) -> Examination:
    """Look at every checkpoint of a run folder, and change nothing; a NotFoundError without the folder."""
    if not run.is_dir():
        raise NotFoundError(f"there is no run folder at {run}: pass the output_dir of a training.")
    # A stock Trainer's checkpoints have other parts, so only a run of hf_power is asked for those that it needs.
    ours = (run / RUN_FILE).exists()
    found = [_examined(folder, ours) for folder in checkpoints(run)]
    if not ours and not found:
        raise NotFoundError(f"{run} has neither run.json nor a checkpoint-N folder: pass the output_dir of a training.")
    resume, remaining = next((each for each in found if not each[0].problems), (None, None))
    return Examination([each for each, _ in found], None if resume is None else resume.name, remaining)


def examined_text(result: Examination) -> str:
    """The result of `examine` as a table and a sentence."""
    lines = [f"{'checkpoint':<20} {'tokens':>16}  state"]
    for row in result.checkpoints:
        tokens = "-" if row.tokens is None else f"{row.tokens:,}"
        lines.append(f"{row.name:<20} {tokens:>16}  {', '.join(row.problems) or 'intact'}")
    if result.resume is None:
        return "\n".join([*lines, "nothing can be resumed"])
    rest = "" if result.remaining_tokens is None else f", {result.remaining_tokens:,} tokens remain to train"
    return "\n".join([*lines, f"--resume_from_checkpoint true takes {result.resume}{rest}"])


def _examined(folder: Path, ours: bool) -> tuple[Examined, int | None]:
    """A checkpoint, and the tokens that remain to train after it."""
    found = problems(folder, complete=ours)
    try:
        record = Run.load(folder, required=("tokens_seen",))
    except NotFoundError:
        return Examined(folder.name, None, found), None
    except UserError as error:
        return Examined(folder.name, None, found or [str(error)]), None
    if ours and not found and (folder / "tokenizer.json").is_file():
        found = _ids_without_embedding(folder)
    # Nothing says how long the run was to be where total_tokens is missing.
    remaining = max(0, record.total_tokens - record.tokens_seen) if record.total_tokens else None
    return Examined(folder.name, record.tokens_seen, found), remaining
