"""Ten steps of verl's optimizer under the engine that verl itself chooses; its own loop asks for NCCL."""

import os

import torch
from transformers import AutoModelForCausalLM
from verl.workers.config.optimizer import FSDPOptimizerConfig
from verl.workers.engine.base import EngineRegistry

os.environ |= {"VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
engine_class = EngineRegistry.get_engine_cls("language_model", "fsdp")
engine = engine_class.__new__(engine_class)
engine.optimizer_config = FSDPOptimizerConfig(lr=0.02, lr_warmup_steps=2, total_training_steps=10)
model = AutoModelForCausalLM.from_pretrained("model")
optimizer = engine._build_optimizer(model)
scheduler = engine._build_lr_scheduler(optimizer)
for blocks in torch.randint(0, 400, (10, 6, 32)):
    model(input_ids=blocks, labels=blocks).loss.backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
