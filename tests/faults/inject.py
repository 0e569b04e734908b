"""Runs a verb of hf-power that is killed at one place: python tests/faults/inject.py PLACE COUNT VERB ARGS...

At its COUNT-th pass of PLACE the process gets SIGKILL from itself, where a file is written there after half of its bytes.
The library is as it is: the places are functions that are wrapped from outside. `python tests/faults/inject.py` lists them.
"""

import functools
import importlib
import itertools
import os
import random
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A function, what is done in its COUNT-th call, and which calls count.

    `target` is MODULE:ATTRIBUTE; what the module itself has imported (MODULE:json.dump) is wrapped for that module alone.
    """

    target: str
    kill: Callable[..., None]
    counts: Callable[..., bool] = lambda *args, **kwargs: True


def before(run: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Nothing of the call happens."""
    die(run)


def after(run: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """All of the call has happened."""
    function(*args, **kwargs)
    die(run)


def half_of(argument: int) -> Callable[..., None]:
    """The file that this argument names, or an open one, has half of its bytes."""

    def kill(run: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        file = args[argument]
        if hasattr(file, "flush"):
            file.flush()
            file = file.fileno()
        os.truncate(file, os.stat(file).st_size // 2)
        die(run)

    return kill


def half_written(run: int, function: Callable[..., Any], file: int, content: bytes) -> None:
    """os.write writes half."""
    function(file, content[: len(content) // 2])
    die(run)


def half_removed(run: int, function: Callable[..., Any], folder: Path) -> None:
    """shutil.rmtree removes half of the files; their order is the file system's, so any."""
    names = sorted(os.listdir(folder))
    for name in random.sample(names, (len(names) + 1) // 2):
        os.unlink(folder / name)
    die(run)


def die(run: int) -> None:
    """Kill the run; from a forked worker too, which lives on as an orphan."""
    os.kill(run, signal.SIGKILL)


def names(argument: int, part: str) -> Callable[..., bool]:
    """Calls in which this argument, a path or an open file, has a certain part."""

    def has_it(*args: Any, **kwargs: Any) -> bool:
        given = args[argument]
        return part in (os.fspath(given) if isinstance(given, str | os.PathLike) else str(given.name))

    return has_it


MODEL = "transformers.models.granite.modeling_granite"
PLACES = {
    "forward": Place(f"{MODEL}:GraniteDecoderLayer.forward", before),
    "optimizer": Place("torch.optim:AdamW.step", after),
    "mark": Place("pathlib:Path.touch", before, names(0, ".saving")),
    "weights": Place("transformers.modeling_utils:safe_save_file", half_of(1), names(1, "checkpoint-")),
    "between": Place("torch:save", before),
    "state": Place("torch:save", half_of(1)),
    "trainer_state": Place("transformers:TrainerState.save_to_json", half_of(1)),
    "record": Place("hf_power.records.files:json.dump", half_of(1), names(1, "run.json")),
    "rename": Place("hf_power.records.files:os.replace", before),
    "hash": Place("hf_power.checkpoints.seal:sha256", before),
    "seal": Place("hf_power.records.files:json.dump", half_of(1), names(1, "manifest.json")),
    "sealed": Place("hf_power.records.files:os.replace", after, names(1, "manifest.json")),
    "rotate": Place("hf_power.checkpoints.seal:shutil.rmtree", half_removed),
    "load": Place("torch:load", before),
    "tokenizer": Place("transformers:PreTrainedTokenizerFast.save_pretrained", after, names(1, "hf_power_tokenizers")),
    "tokenize": Place("hf_power.data.packing:_join", before),
    "cache": Place("datasets.arrow_writer:ArrowWriter.finalize", before),
    "cached": Place("datasets.arrow_dataset:shutil.move", before),
    "evaluate": Place("hf_power.pretrain.trainer:PowerTrainer.evaluation_loop", before),
    "model": Place(
        "transformers.modeling_utils:safe_save_file", half_of(1), lambda *a, **k: "checkpoint-" not in str(a[1])
    ),
    "picture": Place("hf_power.plots.figures:save", half_of(1)),
    "row": Place("hf_power.records.rows:os.write", half_written),
}


def arm(name: str, count: int) -> None:
    """Let the `count`-th pass of a place be the end of this process."""
    place = PLACES[name]
    module_name, _, path = place.target.partition(":")
    *parents, last = path.split(".")
    owner: Any = importlib.import_module(module_name)
    for parent in parents:
        inner = getattr(owner, parent)
        if isinstance(inner, types.ModuleType):  # a copy that only the module sees
            inner = types.SimpleNamespace(**vars(inner))
            setattr(owner, parent, inner)
        owner = inner
    function, passes, run = getattr(owner, last), itertools.count(1), os.getpid()

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if place.counts(*args, **kwargs) and next(passes) == count:
            place.kill(run, function, *args, **kwargs)
        return function(*args, **kwargs)

    setattr(owner, last, wrapped)


def main(argv: list[str]) -> int:
    """Arm one place and run the verb."""
    if len(argv) < 3 or argv[0] not in PLACES:
        print(f"{__doc__}\nplaces: {', '.join(PLACES)}")
        return 2
    arm(argv[0], int(argv[1]))
    from hf_power.cli import run_verb

    return run_verb(argv[2], argv[3:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
