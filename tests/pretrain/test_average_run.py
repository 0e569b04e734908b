"""A trunk that is finished by an average: its weights, its record, what goes on from it; and a mean kept in training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sentences import refused
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hf_power
from hf_power.checkpoints.seal import problems
from hf_power.pretrain.anneal import anneal
from hf_power.pretrain.average import average, evaluate_average
from hf_power.pretrain.run import pretrain
from hf_power.publish.card import write_card
from hf_power.records.errors import UserError
from hf_power.records.run import Run
from hf_power.settings.settings import Settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trunk(sections, tmp_path_factory):
    """12 steps with checkpoints 4, 8 and 12, at the numbers that follow from a peak of cosine."""
    folder = tmp_path_factory.mktemp("averages") / "trunk"
    given = sections(folder, lr_scheduler_kwargs={"peak_lr": 0.01, "decay_ratio": 0})
    del given["training"]["learning_rate"]
    pretrain(Settings.from_dict(given))
    return folder


@pytest.fixture(scope="module")
def averaged(trunk):
    folder = average(trunk, "uniform", "60%")
    evaluate_average(folder)
    return folder


def test_the_record_of_a_run_with_a_peak_has_the_law_that_follows(trunk):
    run = Run.load(trunk)
    found = hf_power.from_cosine(
        peak_lr=0.01, tokens=12 * 128, tokens_per_step=128, warmup_tokens=2 * 128, decay_ratio=0
    )
    assert run.schedule["a"] == pytest.approx(found.law.a, rel=1e-9)
    assert run.schedule["max_lr"] == 0.01
    kwargs = run.settings["training"]["lr_scheduler_kwargs"]
    assert "peak_lr" not in kwargs
    assert kwargs["a"] == run.schedule["a"]


def test_two_caps_are_refused(sections, tmp_path):
    given = sections(tmp_path / "two", lr_scheduler_kwargs={"peak_lr": 0.02})
    with refused(UserError, "peak_lr is 0.02 and learning_rate 0.01", "leave one of them out"):
        pretrain(Settings.from_dict(given))


def test_weights_are_the_mean_and_the_model_is_whole(trunk, averaged):
    parts = [load_file(trunk / f"checkpoint-{n}" / "model.safetensors") for n in (8, 12)]
    found = load_file(averaged / "model.safetensors")
    for name, tensor in found.items():
        assert torch.allclose(tensor, (parts[0][name] + parts[1][name]) / 2, atol=1e-7), name
    config = json.loads((averaged / "config.json").read_text())
    assert config["mup"] == json.loads((trunk / "config.json").read_text())["mup"]
    assert config["use_cache"] is True
    assert AutoModelForCausalLM.from_pretrained(averaged).config.model_type == "granite"


def test_record_and_card_say_which_kind_it_is(averaged):
    run = Run.load(averaged)
    assert (run.kind, run.stage, run.status, run.parent) == ("average", "averaged", "finished", "trunk/checkpoint-12")
    assert (run.average.kind, run.average.tokens, run.average.shares) == ("uniform", [8 * 128, 12 * 128], [0.5, 0.5])
    scored = json.loads((averaged / "eval.json").read_text())
    assert run.held_out_loss == scored["metrics"]["loss"]
    card = write_card(averaged, license="apache-2.0").read_text()
    assert "It is an **average**" in card
    assert "mean of 2 checkpoints" in card


def test_anneal_goes_on_from_an_average(averaged):
    checkpoint = averaged / "checkpoint-12"
    assert not problems(checkpoint, complete=True)
    run = anneal(checkpoint, "50%")
    assert (run.kind, run.parent, run.tokens_seen) == ("anneal", f"{averaged.name}/checkpoint-12", 24 * 128)
    assert run.average.tokens == [8 * 128, 12 * 128]
    assert run.stage == "decayed"
    with refused(UserError, "lies in its run's own decay"):
        average(averaged.with_name(f"{averaged.name}-anneal-12"), last="100%")


def test_what_cannot_be_averaged_is_refused(trunk, averaged, tmp_path):
    with refused(UserError, "has 1 intact checkpoints in the last 10% of its tokens"):
        average(trunk, last="10%")
    with refused(UserError, "--last must be a percentage", "'half'"):
        average(trunk, last="half")
    with refused(UserError, "--last 20% is not of the kind window"):
        average(trunk, "window", last="20%")
    with refused(UserError, "--decay_shape linear is of the kind decay alone", "kind ema"):
        average(trunk, "ema", decay_shape="linear")
    with refused(UserError, "holds a run already"):
        average(trunk, last="60%")
    with refused(UserError, "there is no run folder"):
        average(tmp_path / "nothing")
    with refused(UserError, "has no checkpoint-N folder with weights"):
        average(tmp_path)


def test_pretrain_keeps_a_mean_where_it_is_asked_to(sections, tmp_path):
    given = sections(tmp_path / "kept", tokens=4 * 128, lr_scheduler_kwargs={"a": 8.0, "decay_ratio": 0})
    given["run"]["average_window"] = 0.5
    pretrain(Settings.from_dict(given))
    folder = tmp_path / "kept/average"
    kept, trained = load_file(folder / "model.safetensors"), load_file(tmp_path / "kept/model.safetensors")
    assert set(kept) == set(trained)
    assert not torch.equal(kept["model.norm.weight"], trained["model.norm.weight"])
    run = Run.load(folder)
    assert (run.stage, run.average.kind, run.average.tokens) == ("averaged", "window", [4 * 128])

    # A tail needs the optimizer beside the mean.
    with refused(UserError, "is the mean that a run has kept", "--kind window"):
        anneal(folder)
    made = average(tmp_path / "kept", "window")
    again = load_file(made / "checkpoint-4/model.safetensors")
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    tail = anneal(made / "checkpoint-4", "20%")
    assert (tail.kind, tail.parent, tail.tokens_seen) == ("anneal", f"{made.name}/checkpoint-4", 5 * 128)
    assert not (tmp_path / f"{made.name}-anneal-4/average").exists()
    given["run"]["average_window"] = 2.0
    with refused(UserError, "window must lie above 0 and up to 1, got 2.0"):
        pretrain(Settings.from_dict(given))


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})


def plain(folder, steps, resume=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": torch.arange(8) + i % 8, "labels": torch.arange(8) + i % 8} for i in range(64)]
    given = {"max_steps": steps, "save_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    given |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    weights, mean = Weights(), hf_power.AverageWeights(window=0.5)
    trainer = Trainer(model, TrainingArguments(str(folder), **given), train_dataset=rows, callbacks=[weights, mean])
    trainer.add_callback(hf_power.SealCheckpoints())
    trainer.train(resume_from_checkpoint=resume)
    return first, weights.seen


def test_a_mean_kept_in_training_is_that_of_a_loop_and_survives_a_resume(tmp_path):
    mean, seen = plain(tmp_path / "whole", 8)
    for t, weights in enumerate(seen, start=1):
        part = 1 / (1 + 0.5 * t)
        mean = {name: (1 - part) * mean[name] + part * weights[name] for name in mean}
    found = GPT2LMHeadModel.from_pretrained(tmp_path / "whole/average")
    for name, tensor in found.named_parameters():
        assert torch.allclose(tensor, mean[name], atol=1e-6), name
    assert not problems(tmp_path / "whole/checkpoint-8")
    plain(tmp_path / "parts", 4)
    plain(tmp_path / "parts", 8, resume=str(tmp_path / "parts/checkpoint-4"))
    again = load_file(tmp_path / "parts/average/model.safetensors")
    for name, tensor in load_file(tmp_path / "whole/average/model.safetensors").items():
        assert torch.equal(again[name], tensor), name


def test_checkpoints_of_any_trainer_are_averaged_by_their_steps(tmp_path):
    plain(tmp_path / "run", 8)
    folder = average(tmp_path / "run", last="60%")
    parts = [load_file(tmp_path / f"run/checkpoint-{n}/model.safetensors") for n in (4, 8)]
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.allclose(tensor, (parts[0][name] + parts[1][name]) / 2, atol=1e-7), name
    assert evaluate_average(folder) is None
    assert not (folder / "average.safetensors").exists()


@pytest.mark.parametrize("window", [0, 1.5, "0.1", True])
def test_windows_out_of_range_are_refused(window):
    with refused(UserError, "window must lie above 0 and up to 1", repr(window)):
        hf_power.AverageWeights(window)
