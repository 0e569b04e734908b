"""Every file of a checkpoint damaged in every way: told by name and not used, or proved to change nothing.

The run has dropout, so that its random numbers count. What a run stands for, its weights bit by bit and its losses, is
compared with the same run that nothing has disturbed.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_power.checkpoints.seal import LATER, MANIFEST, newest_intact, problems, seal
from hf_power.pretrain import run as train
from hf_power.settings.settings import Settings


def cut(size):
    """To `size` bytes; a negative one counts from the end."""
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def flipped(place):
    """One bit of the byte at a place between 0, the first, and 1, the last."""

    def damage(path):
        content = bytearray(path.read_bytes())
        content[round(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


DAMAGES = {
    "one byte cut off": cut(-1),
    "nothing left": cut(0),
    "first byte": flipped(0),
    "middle byte": flipped(0.5),
    "last byte": flipped(1),
    "deleted": Path.unlink,
}
# What transformers, accelerate or a tokenizer look for in a folder, beside what this run has saved there.
FOREIGN = (
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors.index.json", "pytorch_model_fsdp.bin"),
    *("adapter_model.safetensors", "adapter_config.json", "optimizer.bin", "scaler.pt", "rng_state_0.pth", "latest"),
    *("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json"),
    *("chat_template.jinja", "recipe.json", "part/adapter_model.safetensors"),
    *("pytorch_model_fsdp_0/0.distcp", "optimizer_0/0.distcp", "global_step8/states.pt"),
)


@pytest.fixture(scope="module")
def whole(sections, tmp_path_factory):
    """The sections of a run, and its folder once nothing has disturbed it; a mixture of experts has the same files."""
    folder = tmp_path_factory.mktemp("whole") / "run"

    def build(out, **training):
        given = sections(out, **training)
        given["model"] |= {"model_config": {"attention_dropout": 0.1}}
        return given

    train.pretrain(Settings.from_dict(build(folder)))
    return build, folder


@pytest.fixture
def interrupted(whole, tmp_path):
    """`interrupted(name)`: a new folder of the run as it was after ten of twelve steps."""

    def build(name="run"):
        shutil.copytree(whole[1], tmp_path / name, ignore=shutil.ignore_patterns("checkpoint-12"))
        return tmp_path / name

    return build


@pytest.fixture
def goes_on(whole, capsys):
    """Resume a folder; True if it ends like the undisturbed run, and what was said."""
    build, folder = whole

    def resume(run):
        (run / "model.safetensors").unlink(missing_ok=True)
        capsys.readouterr()
        train.pretrain(Settings.from_dict(build(run, resume_from_checkpoint="true")))
        return result(run) == result(folder), capsys.readouterr().out

    return resume


def result(run):
    """The weights of a finished run, bit by bit, and its losses."""
    weights = {name: weight.numpy().tobytes() for name, weight in load_file(run / "model.safetensors").items()}
    curve = json.loads((run / "run.json").read_text())["loss_curve"]
    return weights, [(point["step"], point.get("loss"), point.get("eval_loss")) for point in curve]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def manifest(folder):
    try:
        return json.loads((folder / MANIFEST).read_text())
    except (ValueError, OSError):
        return None


@pytest.mark.slow
def test_a_checkpoint_holds_what_is_damaged_here(interrupted):
    names = files(interrupted() / "checkpoint-8")
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "run.json", MANIFEST} <= set(names)
    assert not set(names) & set(FOREIGN)


@pytest.mark.parametrize("what", DAMAGES)
def test_each_file_is_missed_by_its_name(interrupted, what):
    """A manifest without its last line feed says what it said, and is the only damage that may pass."""
    run = interrupted()
    folder, unnoticed = run / "checkpoint-8", []
    for name in files(folder):
        kept, said = (folder / name).read_bytes(), manifest(folder)
        DAMAGES[what](folder / name)
        found, broken = newest_intact(run)
        if found == folder and (name, manifest(folder)) != (MANIFEST, said):
            unnoticed.append(name)
        if found != folder:
            assert found.name == "checkpoint-4"
            (phrase,) = broken["checkpoint-8"]
            assert phrase.startswith(f"{name} "), phrase
        (folder / name).write_bytes(kept)
    assert unnoticed == []
    assert problems(folder) == []


@pytest.mark.slow
def test_no_byte_of_the_manifest_can_change_unnoticed(interrupted):
    folder = interrupted() / "checkpoint-8"
    said = manifest(folder)
    content = (folder / MANIFEST).read_bytes()
    for place in range(0, len(content), 3):
        flipped(place / (len(content) - 1))(folder / MANIFEST)
        assert problems(folder) or manifest(folder) == said, place
        (folder / MANIFEST).write_bytes(content)


@pytest.mark.slow
def test_a_run_goes_on_before_the_damage_to_the_same_end(interrupted, goes_on, tmp_path):
    """Each damage to one of the files; that every damage to every file is noticed is what the tests above are about."""
    names = ("model.safetensors", "optimizer.pt", "rng_state.pth", "tokenizer.json", MANIFEST)
    kinds = [kind for kind in DAMAGES if kind != "one byte cut off"]  # which a manifest survives
    failed = {}
    for name, kind in zip(names, kinds, strict=True):
        run = interrupted(kind)
        DAMAGES[kind](run / "checkpoint-8" / name)
        same, said = goes_on(run)
        if not same or f"checkpoint-8 is not used: {name} " not in said:
            failed[name] = kind, same, said
        assert problems(run / "checkpoint-8") == []  # it is made anew on the way
        shutil.rmtree(run)
    assert failed == {}


@pytest.mark.slow
def test_a_manifest_without_its_last_line_feed_changes_nothing(interrupted, goes_on):
    run = interrupted()
    DAMAGES["one byte cut off"](run / "checkpoint-8" / MANIFEST)
    same, said = goes_on(run)
    assert same
    assert "is not used" not in said


@pytest.mark.slow
def test_what_the_folder_of_the_run_holds_beside_the_checkpoints_is_not_read(interrupted, goes_on):
    for number, damage in enumerate((lambda path: path.write_bytes(b"\0 no such file"), Path.unlink)):
        run = interrupted(f"run{number}")
        names = [p.name for p in run.iterdir() if p.is_file()]
        assert {"run.json", "config.json", "model.safetensors", "tokenizer.json"} <= set(names)
        for name in names:
            damage(run / name)
        same, said = goes_on(run)
        assert same
        assert "is not used" not in said


@pytest.mark.slow
def test_a_checkpoint_sealed_without_a_part_is_not_used_or_goes_on_to_the_same_end(interrupted, goes_on, tmp_path):
    """Someone deletes a file and seals anew, or a callback of one's own has sealed too early."""
    refused, left = {}, []
    for name in files(interrupted("pattern") / "checkpoint-8"):
        if name == MANIFEST:
            continue
        run = interrupted(f"without-{name}")
        (run / "checkpoint-8" / name).unlink()
        seal(run / "checkpoint-8")
        found, broken = newest_intact(run, complete=True)
        if found.name == "checkpoint-4":
            (refused[name],) = broken["checkpoint-8"]
        else:
            left.append(run)
    # What is refused by any name is refused by one rule, and the run goes on from the checkpoint before.
    same, said = goes_on(tmp_path / "without-optimizer.pt")
    assert same
    assert f"checkpoint-8 is not used: {refused['optimizer.pt']}" in said
    assert left
    for run in left:
        same, said = goes_on(run)
        assert same, run
        assert "is not used" not in said
    parts = {"model.safetensors": "weights", "optimizer.pt": "optimizer", "rng_state.pth": "rng_state"}
    parts["tokenizer.json"] = "tokenizer"
    whole_names = ("scheduler.pt", "trainer_state.json", "run.json", "tokenizer_config.json", "config.json")
    parts |= {name: name for name in whole_names}
    assert refused.keys() == parts.keys()
    for name, part in parts.items():
        assert re.fullmatch(rf"no [^,]*{part}[^,]* is in it", refused[name]), refused[name]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_was_not_there_at_the_seal_is_named(interrupted, name):
    run = interrupted()
    foreign = run / "checkpoint-8" / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(b"{}")
    assert newest_intact(run) == (run / "checkpoint-4", {"checkpoint-8": [f"{name} was added after it was sealed"]})


@pytest.mark.slow
def test_what_is_added_and_never_read_changes_nothing(interrupted, goes_on):
    """Records of evaluate, card and publish, notes, and what a file browser, a download or a network disk hides."""
    run = interrupted()
    for name in (
        *LATER,
        "README.md",
        "notes.txt",
        "merges.txt",
        "vocab.txt",
        ".DS_Store",
        ".nfs0001",
        "half.tmp",
        ".cache/huggingface/tokenizer.json.lock",
    ):
        (run / "checkpoint-8" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "checkpoint-8" / name).write_bytes(b"\0")
    same, said = goes_on(run)
    assert same
    assert "is not used" not in said
