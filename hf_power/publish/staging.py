"""What of a run folder may leave this machine, under which name, linked into a folder of its own."""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hf_power.checkpoints.seal import MANIFEST, RUN_FILE, seal, sealed
from hf_power.evaluate.heldout import EVAL_FILE
from hf_power.export.export import EXPORT_FILE
from hf_power.publish.markdown import is_local_path
from hf_power.recipe import FILE_NAME
from hf_power.records.files import read_json, write_json

RECORDS = (RUN_FILE, FILE_NAME, EVAL_FILE, EXPORT_FILE, "trainer_state.json")  # may name local paths
PRIVATE = ("training_args.bin", "push.json", "README.md", ".*")  # README.md: the card is made anew
TRAINING_STATE = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json", MANIFEST)


def branch_name(run: dict[str, Any]) -> str:
    """The branch of a checkpoint by its run.json: trunk-2.1B-tokens; decay- in the run's own tail, anneal- in a later one.

    >>> branch_name({"kind": "pretrain", "tokens_seen": 2_097_152_000, "schedule": {"decay_start_tokens": None}})
    'trunk-2.09715B-tokens'
    """
    tokens, start = run["tokens_seen"], (run.get("schedule") or {}).get("decay_start_tokens")
    phase = "trunk" if start is None or tokens <= start else "decay"
    if run["kind"] == "anneal":
        phase = "anneal"
    return f"{phase}-{short_tokens(tokens)}-tokens"


def short_tokens(tokens: int) -> str:
    """A number of tokens to six digits: 2.1B, 1.2288M.

    >>> short_tokens(2_100_000_000), short_tokens(1_228_800), short_tokens(640)
    ('2.1B', '1.2288M', '640')
    """
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= factor:
            return f"{tokens / factor:.6g}{unit}"
    return str(tokens)


def without_local_paths(content: Any, local: tuple[str, ...] = ()) -> Any:
    """JSON content with the base name in the place of every local path, and without folders of this machine.

    Args:
        content: of run.json and the like; what its data section calls local is a path, however it looks.
        local: further texts that are paths.
    """
    if isinstance(content, dict):
        data = content.get("data")
        if isinstance(data, dict) and data.get("local"):
            local = (*local, data["dataset"])
        return {k: without_local_paths(v, local) for k, v in content.items() if not str(k).endswith("_dir")}
    if isinstance(content, list):
        return [without_local_paths(value, local) for value in content]
    if isinstance(content, str) and (content in local or is_local_path(content)):
        return Path(content).name
    return content


def link_checkpoint(source: Path, target: Path) -> None:
    """A whole checkpoint but for what is private, sealed anew."""
    target.mkdir(exist_ok=True)
    link_files(source, target, (*PRIVATE, MANIFEST))
    for sub in source.iterdir():
        if sub.is_dir():
            shutil.copytree(sub, target / sub.name, copy_function=_link_file)
    seal(target, known={name: entry for name, entry in sealed(source).items() if name not in RECORDS})


def link_files(source: Path, target: Path, skip: tuple[str, ...]) -> None:
    """Hard links to the files of a folder; the records are written anew, without local paths."""
    for path in source.iterdir():
        if not path.is_file() or any(fnmatch(path.name, pattern) for pattern in skip):
            continue
        if path.name in RECORDS:
            write_json(target / path.name, without_local_paths(read_json(path)))
        else:
            _link_file(path, target / path.name)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
