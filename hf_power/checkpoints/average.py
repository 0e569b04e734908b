"""The mean of the weights of several checkpoints, or the one that a run has kept: shares, and the merge, a file at a time."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_power.checkpoints.ema import FILE
from hf_power.checkpoints.locate import check_weights, weight_files
from hf_power.records.errors import UserError
from hf_power.records.files import free_bytes, replaced
from hf_power.schedule import DECAY_SHAPES

KINDS = ("uniform", "ema", "decay")


def shares(kind: str, tokens: Sequence[int], decay_shape: str = "exponential") -> list[float]:
    """The share of each checkpoint in an average; they add up to 1.

    With n_0 < ... < n_k the tokens of the checkpoints::

        uniform   1 / (k + 1)
        ema       proportional to 2**(-(n_k - n_j) / h), with the half-life h a quarter of n_k - n_0
        decay     w_0 - w_1 at first, w_j - w_(j+1), w_k at last, with w_0 = 1 and w_j = f((n_(j-1/2) - n_0) / (n_k - n_0))

    The last gives what was learned between two checkpoints the weight that a tail of the shape f from n_0 to n_k would have
    given it, by the middle n_(j-1/2) of the two (Tian et al. 2025, arXiv:2507.17634). Of equal distances and a linear
    tail that is the uniform average with half a share for the first and the last.

    Args:
        kind: one of `KINDS`.
        tokens: of the checkpoints, in rising order, at least two; of a Trainer that does not count them, the steps.
        decay_shape: f, of the kind "decay", one of `hf_power.schedule.DECAY_SHAPES`.

    Raises:
        UserError: another kind or shape, or fewer than two checkpoints.
    """
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    if decay_shape not in DECAY_SHAPES:
        raise UserError(f"decay_shape must be one of {', '.join(DECAY_SHAPES)}, got {decay_shape!r}.")
    if len(tokens) < 2:
        raise UserError(
            f"an average needs at least two checkpoints, got {len(tokens)}: take a larger part, or save more often."
        )
    first, last = tokens[0], tokens[-1]
    if kind == "uniform":
        return [1 / len(tokens)] * len(tokens)
    if kind == "ema":
        parts = [2.0 ** (-4 * (last - n) / (last - first)) for n in tokens]
        return [part / sum(parts) for part in parts]
    middles = [((a + b) / 2 - first) / (last - first) for a, b in pairwise(tokens)]
    weights = [1.0, *map(DECAY_SHAPES[decay_shape], middles), 0.0]
    return [a - b for a, b in pairwise(weights)]


def merge(folders: Sequence[Path], parts: Sequence[float], target: Path) -> None:
    """Write the mean of the weights of several checkpoints in the files of the last one.

    Sums are made in fp32 and written in the type of the last checkpoint. What is no number with a fraction is the last one's.
    One file of weights is in memory at a time, with one tensor of each other checkpoint.

    Args:
        folders: of checkpoints with safetensors.
        parts: share of each.
        target: a folder that is there.

    Raises:
        UserError: weights in another form than safetensors, cut, or of another model; too little room on the disk.
    """
    for folder in folders:
        _check_form(folder)
    last = weight_files(folders[-1])
    _check_room(last, target)
    with ExitStack() as stack:
        held = [_opened(stack, folder) for folder in folders]
        for path in last:
            with safe_open(path, "pt") as file:
                names = list(file.keys())
                metadata = file.metadata()
            merged = {name: _mean(name, held, parts, folders) for name in names}
            with replaced(target / path.name) as temporary:
                save_file(merged, temporary, metadata=metadata)
            del merged
    _copy_index(folders[-1], target)


def merge_kept(checkpoint: Path, target: Path) -> None:
    """Write the mean that `AverageWeights` has kept in a checkpoint in the files of its weights, and in their type.

    Raises:
        UserError: no mean there, weights in another form than safetensors, or of another model; too little room on the disk.
    """
    if not (checkpoint / FILE).is_file():
        raise UserError(
            f"{checkpoint} has no {FILE}: a mean is kept where average_window is set or AverageWeights is among the callbacks, "
            "so take another kind."
        )
    _check_form(checkpoint)
    files = weight_files(checkpoint)
    _check_room(files, target)
    mean = load_file(checkpoint / FILE)
    with ExitStack() as stack:
        if lacking := mean.keys() - _opened(stack, checkpoint).keys():
            raise UserError(
                f"{checkpoint / FILE} has {min(lacking)}, which the weights beside it lack: take another checkpoint."
            )
    for path in files:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        tensors |= {name: mean[name].to(tensors[name].dtype) for name in tensors.keys() & mean.keys()}
        with replaced(target / path.name) as temporary:
            save_file(tensors, temporary, metadata=metadata)
    _copy_index(checkpoint, target)


def _check_form(folder: Path) -> None:
    check_weights(folder)
    if not (files := weight_files(folder)) or files[0].suffix != ".safetensors":
        raise UserError(
            f"{folder} has no model.safetensors: an average needs whole weights in that form, as save_pretrained and the "
            "Trainer write them without FSDP's shards."
        )


def _check_room(files: Sequence[Path], target: Path) -> None:
    needed = sum(path.stat().st_size for path in files)
    if needed > free_bytes(target):
        raise UserError(f"the disk of {target} has no room for {needed / 1e6:,.1f} MB of weights: free some space.")


def _copy_index(checkpoint: Path, target: Path) -> None:
    for index in checkpoint.glob("model*.safetensors.index.json"):
        shutil.copyfile(index, target / index.name)


def _opened(stack: ExitStack, folder: Path) -> dict[str, Any]:
    """Tensor -> the open file that holds it."""
    found: dict[str, Any] = {}
    for path in weight_files(folder):
        file = stack.enter_context(safe_open(path, "pt"))
        found |= dict.fromkeys(file.keys(), file)
    return found


def _mean(
    name: str, held: Sequence[Mapping[str, Any]], parts: Sequence[float], folders: Sequence[Path]
) -> torch.Tensor:
    last: torch.Tensor = held[-1][name].get_tensor(name)
    if not last.is_floating_point():
        return last
    total = last.float() * parts[-1]
    for files, part, folder in zip(held[:-1], parts[:-1], folders[:-1], strict=True):
        if name not in files or (tensor := files[name].get_tensor(name)).shape != last.shape:
            raise UserError(
                f"{folder} and {folders[-1]} are not of one model ({name} differs): average one run's checkpoints."
            )
        total += tensor.float() * part
    return total.to(last.dtype)
