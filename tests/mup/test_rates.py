"""A muP model whose optimizer has other rates than muP's is seen in any Trainer, by the rates that the table gives."""

import pytest
import torch
import transformers
from sentences import refused
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import hf_power
from hf_power.mup.check import rates_beside_mup

BASE, WIDTH = 8, 64  # hidden matrices have an eighth of the base rate


def llama(**kwargs):
    shape = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaConfig(vocab_size=64, **shape | kwargs)


@pytest.fixture
def model():
    config = hf_power.mup_config(llama(), base_width=BASE)
    return hf_power.mup_init_(AutoModelForCausalLM.from_config(config))


def said_by(model, tmp_path, recwarn, **kwargs):
    """What a stock Trainer warns of when it makes its optimizer and schedule."""
    adamw = {"weight_decay": 0.1, "adam_beta2": 0.95}
    args = TrainingArguments(
        str(tmp_path / "out"), learning_rate=0.02, use_cpu=True, report_to="none", **adamw, **kwargs.pop("args", {})
    )
    if kwargs.pop("mup", False):
        kwargs["optimizers"] = (hf_power.mup_adamw(model, args), None)
    Trainer(model, args, **kwargs).create_optimizer_and_scheduler(10)
    return [str(x.message) for x in recwarn if "muP" in str(x.message)]


@pytest.mark.parametrize("schedule", ["linear", "power"])
def test_a_plain_optimizer_is_seen_under_every_schedule(model, schedule, tmp_path, recwarn):
    law = {"tokens_per_step": 64} if schedule == "power" else None
    args = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": law}
    (said,) = said_by(model, tmp_path, recwarn, args=args)
    assert "_proj.weight at 8 times its muP learning rate" in said  # hidden_size / base_width
    assert "optimizer_cls_and_kwargs=MupAdamW.for_trainer(args)" in said


def test_a_model_that_was_saved_and_is_trained_further_is_still_one(model, tmp_path, recwarn):
    model.save_pretrained(tmp_path / "saved")
    (said,) = said_by(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tmp_path, recwarn)
    assert "at 8 times" in said


def test_nothing_is_said_where_there_is_nothing_to_say(model, tmp_path, recwarn):
    assert not said_by(model, tmp_path, recwarn, mup=True)
    assert not said_by(AutoModelForCausalLM.from_config(llama()), tmp_path, recwarn)
    at_base = AutoModelForCausalLM.from_config(hf_power.mup_config(llama(), base_width=WIDTH))
    assert not said_by(at_base, tmp_path, recwarn)


def test_an_optimizer_by_hand(model):
    groups = hf_power.mup_param_groups(model, lr=0.02)
    assert rates_beside_mup(model, torch.optim.AdamW(groups, lr=0.02)) is None
    groups[1]["lr"] *= 3
    assert "at 3 times" in rates_beside_mup(model, torch.optim.AdamW(groups, lr=0.02))
    groups[1]["lr"] = 0.0  # frozen
    assert rates_beside_mup(model, torch.optim.AdamW(groups, lr=0.02)) is None
    shards = [torch.nn.Parameter(p.detach().flatten()) for p in model.parameters()]
    assert rates_beside_mup(model, torch.optim.AdamW(shards, lr=0.02)) is None


def test_a_model_with_parts_that_have_no_rule_is_left_to_its_owner(model):
    model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(2, 2)))
    assert rates_beside_mup(model, torch.optim.AdamW(model.parameters(), lr=0.02)) is None


@pytest.mark.skipif(transformers.__version__ < "5.2", reason="the Trainer takes no factory")
def test_mup_adamw_is_the_optimizer_of_the_factory(model, tmp_path):
    """For the Trainers that take no factory."""
    args = TrainingArguments(str(tmp_path), learning_rate=0.02, weight_decay=0.1, adam_beta2=0.95, use_cpu=True)
    of_factory = Trainer(model, args, optimizer_cls_and_kwargs=hf_power.MupAdamW.for_trainer(args)).create_optimizer()
    own = Trainer(model, args, optimizers=(hf_power.mup_adamw(model, args), None)).create_optimizer()
    assert type(own) is type(of_factory)
    assert own.defaults == of_factory.defaults
    for one, other in zip(own.param_groups, of_factory.param_groups, strict=True):
        assert all(a is b for a, b in zip(one.pop("params"), other.pop("params"), strict=True))
        assert one == other


def test_a_trainer_without_factories_is_named(model):
    """Before transformers 5.2 the Trainer hands parameters to what it takes for an optimizer's class."""
    with refused(ValueError, "has no optimizer factories", "optimizers=(hf_power.mup_adamw(model, args), None)"):
        hf_power.MupAdamW(list(model.parameters()), lr=0.02)
