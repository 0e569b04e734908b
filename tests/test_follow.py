"""What any Trainer says of the power schedule when it begins, and what it adds to the logs."""

import warnings

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import hf_power
from hf_power.mup.check import rate_without_mup

SIZES = {"vocab_size": 32, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 1}


class Tracker(TrainerCallback):
    """Stands where a tracker stands: among the callbacks that the Trainer is made with."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def train(folder, model=None, optimizer=None, tracker=None, **values):
    model = model or GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0))
    rows = {"input_ids": [list(range(8))] * 64, "labels": [list(range(8))] * 64}
    given = {"max_steps": 8, "per_device_train_batch_size": 4, "logging_steps": 2, "lr_scheduler_type": "power"}
    given |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder), **{**given, **values})
    made = None if optimizer is None else (optimizer(model), None)
    trainer = Trainer(
        model,
        args,
        train_dataset=datasets.Dataset.from_dict(rows),
        callbacks=[tracker] if tracker else None,
        **({"optimizers": made} if made else {}),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return trainer, [str(warning.message) for warning in caught]


def line(capsys):
    (found,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("power: ")]
    return found


def test_defaults_of_transformers_are_answered_with_the_rate_to_set(tmp_path, capsys):
    said = train(tmp_path)[1]
    found = line(capsys)
    assert "32 tokens per step (beta 0.00781)" in found
    assert "the cap 5e-05 always binds" in found
    assert "the paper's, from its own data" in found
    # The law of the first step of 32 tokens: 4 / 128 * 32**-.51 = .0053.
    assert any("set learning_rate=0.0053 under muP" in text and "peak_lr" in text for text in said)


def test_logs_have_the_tokens_and_the_rates_of_groups_that_differ(tmp_path, capsys):
    def two(model):
        weights = list(model.parameters())
        return torch.optim.AdamW(
            [{"params": weights[:2], "lr": 1e-3, "name": "first"}, {"params": weights[2:], "lr": 1e-4}], lr=1e-3
        )

    tracker = Tracker()
    trainer, _ = train(tmp_path, optimizer=two, tracker=tracker, learning_rate=1e-3)
    logged = [log for log in tracker.logs if "loss" in log]
    assert [log["tokens_seen"] for log in logged] == [64, 128, 192, 256]
    for log in logged:
        assert log["lr/first"] == log["learning_rate"]
        assert log["lr/group1"] == pytest.approx(0.1 * log["learning_rate"])
    assert [log["tokens_seen"] for log in trainer.state.log_history if "loss" in log] == [64, 128, 192, 256]


def test_alike_groups_add_no_rates_and_a_second_training_no_second_callback(tmp_path, capsys):
    trainer, _ = train(tmp_path, learning_rate=1e-3, lr_scheduler_kwargs={"a": 1.0, "b": -0.4})
    assert "law: your own" in line(capsys)
    assert not any(key.startswith("lr/") for log in trainer.state.log_history for key in log)
    trainer.train()
    assert line(capsys)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names.count("FollowSchedule") == 1


def test_trained_weights_are_warned_of_and_new_ones_of_their_config_are_not(tmp_path, capsys):
    GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "m")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    new = AutoModelForCausalLM.from_config(loaded.config)
    sentence = "the weights come from"
    assert any(sentence in text and "tokens_seen" in text for text in train(tmp_path, loaded, learning_rate=1e-3)[1])
    assert not any(sentence in text for text in train(tmp_path, new, learning_rate=1e-3)[1])
    loaded.eval()
    going_on = {"lr_scheduler_kwargs": {"tokens_seen": 1_000_000}}
    assert not any(sentence in text for text in train(tmp_path, loaded, learning_rate=1e-3, **going_on)[1])


def test_other_schedules_say_nothing(tmp_path, capsys):
    trainer, said = train(tmp_path, lr_scheduler_type="cosine", learning_rate=0.5)
    assert "power:" not in capsys.readouterr().out
    assert not said or not any("muP" in text for text in said)
    assert not any("tokens_seen" in log for log in trainer.state.log_history)


def test_a_high_peak_without_mup_is_warned_of():
    """Kaplan et al.: .003239 - .0001395 ln 2.6e6 = 1.18e-3 for 2.6M parameters, and .02 is 17 times that."""

    class Model(torch.nn.Module):
        def __init__(self, **config):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(2_600_000, device="meta"))
            self.config = GPT2Config(**config)

    assert "17 times what is usual for 2,600,000 parameters without muP (0.0012)" in rate_without_mup(Model(), 0.02)
    assert rate_without_mup(Model(), 0.004) is None
    assert rate_without_mup(Model(hf_power_mup={"base_width": 8}), 0.02) is None


@pytest.mark.parametrize(("values", "warns"), [({}, True), ({"weight_decay": 0.1, "adam_beta2": 0.95}, False)])
def test_mup_under_the_defaults_of_the_arguments_is_warned_of(values, warns, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **values)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hf_power.MupAdamW.for_trainer(args)
    assert [("weight_decay=0.1, adam_beta2=0.95" in str(each.message)) for each in caught] == [True] * warns
