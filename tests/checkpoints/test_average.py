"""Averages of checkpoints against sums by hand and a slow twin of a decayed tail."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentences import refused

from hf_power.checkpoints.average import merge, shares
from hf_power.records.errors import UserError


def test_shares_by_hand():
    assert shares("uniform", [10, 20, 30, 40]) == [0.25] * 4
    ema = shares("ema", [0, 10, 40])
    assert ema == pytest.approx(np.array([1 / 16, 1 / 8, 1]) / (1 / 16 + 1 / 8 + 1))
    # Of equal distances and a linear tail: half a share at both ends.
    assert shares("decay", [0, 10, 20], "linear") == pytest.approx([0.25, 0.5, 0.25])
    assert sum(shares("decay", [3, 10, 21, 30], "exponential")) == pytest.approx(1)


def test_decay_gives_each_step_the_weight_of_a_tail():
    """Steps of a walk, each times f at the middle of it, end where the average of the walk's points does."""
    walk = np.random.default_rng(0).standard_normal(9).cumsum()
    f = [1 - (j + 0.5) / 8 for j in range(8)]
    decayed = walk[0] + sum(f[j] * (walk[j + 1] - walk[j]) for j in range(8))
    assert np.dot(shares("decay", list(range(0, 90, 10)), "linear"), walk) == pytest.approx(decayed)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (("mean", [1, 2]), ("kind must be one of uniform, ema, decay", "'mean'")),
        (("decay", [1, 2], "cubic"), ("decay_shape must be one of", "'cubic'")),
        (("ema", [1]), ("at least two checkpoints, got 1",)),
    ],
)
def test_bad_averages_are_refused(values, parts):
    with refused(UserError, *parts):
        shares(*values)


def write(folder, value, shards=False, **more):
    folder.mkdir()
    tensors = {"a": torch.full((2, 3), value), "b": torch.full((4,), value, dtype=torch.bfloat16), **more}
    if not shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    save_file({"a": tensors.pop("a")}, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(tensors, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = str({"weight_map": names}).replace("'", '"')
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_weights_are_added_in_their_shares(shards, tmp_path):
    folders = [write(tmp_path / str(i), float(i), shards=shards and i == 2) for i in range(3)]
    (tmp_path / "out").mkdir()
    merge(folders, [0.5, 0.25, 0.25], tmp_path / "out")
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert found["a"].tolist() == [[0.75] * 3] * 2
    assert found["b"].dtype == torch.bfloat16
    assert (tmp_path / "out/model.safetensors.index.json").exists() == shards


def test_checkpoints_of_two_models_are_refused(tmp_path):
    folders = [write(tmp_path / "1", 1.0), write(tmp_path / "2", 1.0, c=torch.zeros(1))]
    with refused(UserError, "are not of one model", "c differs"):
        merge(folders, [0.5, 0.5], tmp_path)
    (tmp_path / "3").mkdir()
    with refused(UserError, "has no model.safetensors"):
        merge([folders[0], tmp_path / "3"], [0.5, 0.5], tmp_path)
