import json
import os

import pytest

from hf_power.checkpoints.seal import MANIFEST, problems, seal
from hf_power.publish.sources import branch_name, link_checkpoint, without_local_paths
from hf_power.records.run import Run
from hf_power.settings.sections import short_tokens


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ({"kind": "pretrain", "tokens_seen": 2_100_000_000, "schedule": None}, "trunk-2.1B-tokens"),
        ({"kind": "pretrain", "tokens_seen": 900, "schedule": {"decay_start_tokens": 900}}, "trunk-900-tokens"),
        ({"kind": "pretrain", "tokens_seen": 901, "schedule": {"decay_start_tokens": 900}}, "decay-901-tokens"),
        ({"kind": "anneal", "tokens_seen": 10**12, "schedule": {"decay_start_tokens": 9}}, "anneal-1T-tokens"),
    ],
)
def test_branch_says_phase_and_tokens(run, name):
    assert branch_name(Run(**run)) == name


def test_names_of_neighbouring_checkpoints_differ():
    per_step = 4 * 2**20
    names = [short_tokens(step * per_step) for step in range(1000, 250_000, 100)]  # up to a trillion
    assert len(set(names)) == len(names)


def test_without_local_paths():
    content = {
        "data": {"dataset": "data/mine", "local": True},
        "settings": {"data": {"dataset": "data/mine", "data_cache_dir": "/cache"}, "model": {"hidden_size": 3}},
        "other": ["/home/me/x.jsonl", "HuggingFaceFW/fineweb-edu", 3],
    }
    assert without_local_paths(content) == {
        "data": {"dataset": "mine", "local": True},
        "settings": {"data": {"dataset": "mine"}, "model": {"hidden_size": 3}},
        "other": ["x.jsonl", "HuggingFaceFW/fineweb-edu", 3],
    }


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_is_linked_resealed_and_without_what_is_private(tmp_path, monkeypatch, links):
    source, target = tmp_path / "checkpoint-8", tmp_path / "staged"
    (source / "sub").mkdir(parents=True)
    for name, content in {
        "model.safetensors": "weights",
        "sub/shard": "shard",
        "run.json": json.dumps({"data": {"dataset": "/home/me/x.jsonl"}}),
        "training_args.bin": "output_dir",
        ".hidden": "x",
    }.items():
        (source / name).write_text(content)
    seal(source)
    (source / "eval.json").write_text("{}")  # later than the seal
    if not links:  # as on a file system that has none

        def no_links(*_):
            raise OSError("no hard links")

        monkeypatch.setattr(os, "link", no_links)
    link_checkpoint(source, target)
    assert problems(target) == []
    names = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert names == {"model.safetensors", "sub/shard", "run.json", "eval.json", MANIFEST}
    assert set(json.loads((target / MANIFEST).read_text())["files"]) == names - {MANIFEST}
    assert json.loads((target / "run.json").read_text()) == {"data": {"dataset": "x.jsonl"}}
    assert os.path.samefile(source / "model.safetensors", target / "model.safetensors") == links
    assert (target / "sub" / "shard").read_text() == "shard"
