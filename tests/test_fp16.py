"""fp16: the steps that the gradient scaler skips count as tokens seen, whatever the optimizer, in both Trainers.

accelerate wants a GPU for fp16, so its Trainer's accelerator is switched over after it was made: the products are cast to
fp16 on the CPU, and a real GradScaler of torch, with a scale that overflows at first, skips steps and halves the scale.
"""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_power
from hf_power.pretrain import run as train
from hf_power.pretrain.trainer import PowerTrainer
from hf_power.settings.settings import Settings

SKIPPED = 3
BLOCK, BATCH, STEPS = 8, 2, 8
PER_STEP = BLOCK * BATCH


def switch_to_fp16(accelerator):
    """The accelerator as it would be on a GPU; its scale fits into the gradients after SKIPPED halvings."""
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)


class Overflow(torch.autograd.Function):
    """Nothing forward; backward, a gradient that is infinite, as it is where a scaled one leaves the range of fp16."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def overflows(trainer_class):
    """The class of a Trainer under fp16 whose first SKIPPED steps overflow."""

    class Overflowing(trainer_class):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            switch_to_fp16(self.accelerator)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return Overflow.apply(loss) if self.state.global_step < SKIPPED else loss

    return Overflowing


def law(tokens):
    return hf_power.power_lr(tokens, tokens_per_step=PER_STEP, max_lr=0.02, a=16.0) if tokens else 0.02


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_skipped_steps_count_in_the_stock_trainer(tmp_path, optimizer):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    before = model.lm_head.weight.detach().clone()
    data = [{"input_ids": list(range(i, i + BLOCK)), "labels": list(range(i, i + BLOCK))} for i in range(BATCH * STEPS)]
    args = TrainingArguments(
        str(tmp_path), learning_rate=0.02, lr_scheduler_type="power", lr_scheduler_kwargs={"a": 16.0, "decay_ratio": 0.0},
        optim=optimizer, per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = overflows(Trainer)(model=model, args=args, train_dataset=data)
    trainer.train()
    rates = [point["learning_rate"] for point in trainer.state.log_history if "learning_rate" in point]
    assert rates == pytest.approx([law(step * PER_STEP) for step in range(STEPS)], rel=1e-12)
    assert trainer.lr_scheduler.tokens_seen == STEPS * PER_STEP
    # The steps were skipped indeed: AdamW has made the others, and the scale was halved in each.
    optimizer = trainer.optimizer.optimizer
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS - SKIPPED}
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (16 - SKIPPED)
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muP", "adamw_torch", "adamw_torch_fused"])
def test_skipped_steps_count_in_pretrain_and_are_on_record(sections, tmp_path, monkeypatch, optimizer):
    monkeypatch.setattr(train, "PowerTrainer", overflows(PowerTrainer))

    def run(name, **training):
        settings = sections(tmp_path / name, lr_scheduler_kwargs={"a": 8.0}, warmup_steps=0, **training)
        if optimizer != "muP":
            settings["mup"] = {"mup": False}
            settings["training"]["optim"] = optimizer
        return train.pretrain(Settings.from_dict(settings)).to_json()

    whole = run("whole")
    assert [skipped["step"] for skipped in whole["skipped_steps"]] == [1, 2, 3]
    assert (whole["tokens_seen"], whole["steps"], whole["computation"]["mixed_precision"]) == (1536, 12, "fp16")
    # Tokens of the schedule and of the data are the same in every checkpoint, so a resume is the same run.
    for step in (4, 8, 12):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        state = torch.load(checkpoint / "scheduler.pt", weights_only=True)
        assert state == {"tokens_seen": step * 128, "last_epoch": step}
        assert json.loads((checkpoint / "run.json").read_text())["tokens_seen"] == step * 128
    again = run("again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again["held_out_loss"] == whole["held_out_loss"]
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "again")]
    assert same[0] == same[1]
