"""What a resumed run takes up, what it refuses without leave, and that one command starts, resumes and finishes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sentences import refused

from hf_power import Recipe
from hf_power.checkpoints.seal import SAVING, seal
from hf_power.pretrain import run as train
from hf_power.pretrain.anneal import anneal
from hf_power.settings.settings import Settings

PER_STEP = 128


@pytest.fixture(scope="module")
def trunk(sections, tmp_path_factory):
    """An open-ended trunk of 12 steps with checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "trunk"
    return folder, train.pretrain(
        Settings.from_dict(sections(folder, lr_scheduler_kwargs={"a": 8.0, "decay_ratio": 0.0}))
    ).to_json()


@pytest.fixture
def go_on(trunk, sections, tmp_path):
    """Resume the trunk's checkpoint-8 with other settings, in a new folder."""

    def start(change=None, **training):
        kwargs = {"lr_scheduler_kwargs": {"a": 8.0, "decay_ratio": 0.0}} | training
        sec = sections(tmp_path / "run", resume_from_checkpoint=str(trunk[0] / "checkpoint-8"), **kwargs)
        for section, values in (change or {}).items():
            sec[section] |= values
        return train.pretrain(Settings.from_dict(sec)).to_json()

    return start


def changed(out):
    return [line.split("changed ")[1].strip() for line in out.splitlines() if line.startswith("  changed ")]


@pytest.mark.slow
def test_nothing_changed_is_nothing_said(go_on, capsys):
    go_on()
    assert changed(capsys.readouterr().out) == []


@pytest.mark.slow
def test_what_the_law_counts_is_listed_and_taken_up(go_on, capsys):
    """Another cap, scale, batch, length: all in the closed form of every step after the resume."""
    run = go_on(
        {"run": {"tokens": 2048}},
        learning_rate=0.004,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        lr_scheduler_kwargs={"a": 2.0, "decay_ratio": 0.0},
    )
    assert set(changed(capsys.readouterr().out)) == {
        "tokens '1536' -> '2048'",
        "learning_rate 0.01 -> 0.004",
        "per_device_train_batch_size 4 -> 2",
        "gradient_accumulation_steps 1 -> 4",
        "lr_scheduler_kwargs.a 8.0 -> 2.0",
        "tokens_per_step 128 -> 256",
    }
    rates = {p["step"]: p["learning_rate"] for p in run["loss_curve"] if "loss" in p and p["step"] > 8}
    assert len(rates) == 4
    for step, rate in rates.items():
        assert rate == pytest.approx(min(0.004, 2 * 256 / 4096 * (1024 + (step - 9) * 256) ** -0.51), rel=1e-12)


@pytest.mark.slow
def test_another_sequence_length_goes_on_from_the_tokens(go_on, capsys):
    run = go_on({"data": {"block_size": 16}})
    assert "tokens_per_step 128 -> 64" in changed(capsys.readouterr().out)
    assert (run["tokens_seen"], run["steps"]) == (1536, 8 + 512 // 64)


@pytest.mark.slow
def test_the_numbers_of_adamw_are_those_of_today(go_on, capsys):
    """The optimizer's state brings back the old ones."""
    run = go_on(weight_decay=0.3, adam_epsilon=1e-6)
    assert set(changed(capsys.readouterr().out)) == {"weight_decay 0.1 -> 0.3", "adam_epsilon 1e-08 -> 1e-06"}
    groups = {group["name"]: group for group in run["groups"]}
    assert groups["embedding"]["weight_decay"] == 0.3
    assert groups["hidden"]["weight_decay"] == pytest.approx(0.6)  # width 32 over a base of 16
    assert groups["hidden"]["eps"] == pytest.approx(5e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"mup": {"base_width": 8}}, "base_width"),
        ({"mup": {"embedding_multiplier": 3.0}}, "embedding_multiplier"),
        ({"data": {"vocab_size": 300}}, "vocab_size"),
        ({"training": {"seed": 1}}, "seed"),
        ({"model": {"model_config": {"attention_dropout": 0.1}}}, "model_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_another_run_needs_leave(go_on, tmp_path, capsys, change, name):
    with refused(ValueError, f"{name} is ", "checkpoint-8: leave it as it was, or pass --allow_changed", name):
        go_on(change)
    assert not (tmp_path / "run").exists()
    if name == "vocab_size":  # the embedding has no room for a larger tokenizer
        with refused(
            ValueError, "token ids up to 419, but the model of", "has a vocab_size of 400", "raise vocab_size"
        ):
            go_on({"data": {"vocab_size": 420}, "run": {"allow_changed": name}})
    run = go_on(change | {"run": {"allow_changed": f"dataset, {name}"}})
    assert run["status"] == "finished"
    assert any(line.startswith(f"{name} ") for line in changed(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("change", "name", "why"),
    [
        ({"model": {"hidden_size": 64}}, "hidden_size is 64 but 32", "whose weights do not fit another model"),
        ({"model": {"num_hidden_layers": 1}}, "num_hidden_layers is 1 but 2", "whose weights do not fit"),
        (
            {"training": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": None}},
            "lr_scheduler_type is 'cosine' but 'power'",
            "whose schedule's state no other schedule can read",
        ),
    ],
)
def test_what_cannot_be_another(go_on, tmp_path, change, name, why):
    with refused(ValueError, name, why, "leave it as it was, or train a new run"):
        go_on(change | {"run": {"allow_changed": "hidden_size,num_hidden_layers,lr_scheduler_type"}})
    assert not (tmp_path / "run").exists()


def test_an_unknown_name_in_allow_changed(go_on):
    with pytest.raises(ValueError) as caught:
        go_on({"run": {"allow_changed": "base_widht"}})
    assert str(caught.value) == "allow_changed: base_widht is unknown: did you mean base_width?"


@pytest.mark.slow
def test_other_text_needs_leave_and_the_same_text_elsewhere_does_not(go_on, corpus, tmp_path, capsys):
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    same, other = tmp_path / "same.jsonl", tmp_path / "other.jsonl"
    same.write_text("".join(lines), encoding="utf-8")
    other.write_text("".join(lines[1:]), encoding="utf-8")
    with refused(ValueError, "the data have the fingerprint ", "so their text is", "pass --allow_changed dataset"):
        go_on({"data": {"dataset": str(other)}})
    go_on({"data": {"dataset": str(same)}})
    assert changed(capsys.readouterr().out) == [f"dataset '{corpus}' -> '{same}'"]
    shutil.rmtree(tmp_path / "run")
    go_on({"data": {"dataset": str(other)}, "run": {"allow_changed": "dataset"}})
    assert any(line.startswith("fingerprint of the data ") for line in changed(capsys.readouterr().out))


@pytest.mark.slow
def test_the_recipe_s_rate_needs_leave(trunk, sections, tmp_path):
    """Trained by a recipe, resumed without it and with another cap."""
    Recipe(base_width=16, tokenizer=trunk[1]["data"]["tokenizer"], warmup_tokens=256).save(tmp_path / "recipe.json")
    sec = sections(tmp_path / "run", tokens=512)
    for name in ("learning_rate", "lr_scheduler_kwargs", "warmup_steps"):
        del sec["training"][name]
    sec["run"]["recipe"] = str(tmp_path / "recipe.json")
    train.pretrain(Settings.from_dict(sec))
    sec["run"] |= {"tokens": 1024}
    sec["training"] |= {"resume_from_checkpoint": "true"}
    other = json.loads(json.dumps(sec))
    other["training"]["learning_rate"] = 0.01
    del other["run"]["recipe"]
    other["mup"] |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "initializer_range": 0.1}
    with refused(ValueError, "learning_rate is 0.01 but 0.02 in", "pass --allow_changed learning_rate"):
        train.pretrain(Settings.from_dict(other))
    assert train.pretrain(Settings.from_dict(sec)).tokens_seen == 1024


@pytest.mark.slow
def test_a_schedule_with_a_horizon_keeps_its_rate(sections, tmp_path):
    kind = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": None}
    train.pretrain(Settings.from_dict(sections(tmp_path / "a", **kind)))
    sec = sections(
        tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"), **kind | {"learning_rate": 0.005}
    )
    with refused(ValueError, "learning_rate is 0.005 but 0.01 in", "only the power schedule takes up another rate"):
        train.pretrain(Settings.from_dict(sec))


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("optimizer.pt", "optimizer"),
        ("scheduler.pt", "scheduler.pt"),
        ("rng_state.pth", r"random numbers (rng_state)"),
        ("trainer_state.json", "trainer_state.json"),
        ("model.safetensors", "weights"),
    ],
)
def test_a_sealed_checkpoint_without_a_part_is_refused(trunk, sections, tmp_path, part, said):
    """The stock Trainer begins that part anew in silence."""
    copy = tmp_path / "checkpoint-8"
    shutil.copytree(trunk[0] / "checkpoint-8", copy)
    (copy / part).unlink()
    seal(copy)
    for start in (
        lambda: train.pretrain(Settings.from_dict(sections(tmp_path / "run", resume_from_checkpoint=str(copy)))),
        lambda: anneal(copy, "10%", str(tmp_path / "run")),
    ):
        with refused(
            ValueError, f"checkpoint-8 has no {said}, without which training would start anew in part", "take another"
        ):
            start()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_command_begins_goes_on_and_finishes(trunk, sections, tmp_path, capsys, monkeypatch):
    """Killed in its first save, after its last checkpoint, and not at all: the weights of the trunk each time."""
    folder = tmp_path / "run"
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4" / SAVING).touch()
    (folder / "run.json").write_text(json.dumps({"schema": 1, "status": "running"}))
    kwargs = {"a": 8.0, "decay_ratio": 0.0}
    settings = sections(folder, resume_from_checkpoint="true", lr_scheduler_kwargs=kwargs)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.pretrain(Settings.from_dict(settings))
    assert f"there is no checkpoint in {folder} yet: the run begins" in capsys.readouterr().out
    assert not (folder / "model.safetensors").exists()
    run = train.pretrain(Settings.from_dict(settings)).to_json()
    mine, whole = (load_file(f / "model.safetensors") for f in (folder, trunk[0]))
    assert all(torch.equal(mine[name], whole[name]) for name in whole)
    assert run["held_out_loss"] == trunk[1]["held_out_loss"]
    assert (run["status"], run["steps"], run["tokens_seen"]) == ("finished", 12, 1536)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train.pretrain(Settings.from_dict(settings)).to_json() == run
    assert f"the run in {folder} is finished: raise tokens to train on" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.slow
def test_tokens_that_are_no_whole_number_of_steps(sections, tmp_path, monkeypatch):
    """The last step goes beyond them; a run that is killed after it has only to finish, and no other run has."""
    settings = sections(tmp_path / "run", tokens=1000, resume_from_checkpoint="true")
    with monkeypatch.context() as patch:
        patch.setattr(train, "_finish", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.pretrain(Settings.from_dict(settings))
    less = sections(tmp_path / "run", tokens=800, resume_from_checkpoint="true")
    with refused(ValueError, "the checkpoint has seen 1,024 tokens, the run is to have 800: raise tokens to train on."):
        train.pretrain(Settings.from_dict(less))
    run = train.pretrain(Settings.from_dict(settings)).to_json()
    assert (run["status"], run["tokens_seen"], run["steps"]) == ("finished", 1024, 8)
