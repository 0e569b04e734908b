"""verl under the Power schedule: put this file beside the data and start with VERL_USE_EXTERNAL_MODULES=power_engine."""

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import hf_power


# verl's own engine is registered without a vendor, and one with a vendor goes before it.
@EngineRegistry.register("language_model", backend=["fsdp", "fsdp2"], device="cuda", vendor="nvidia")
class PowerEngine(FSDPEngineWithLMHead):
    def _build_lr_scheduler(self, optimizer):
        config = self.optimizer_config
        # Tokens of a step: data.train_batch_size times the mean length of a sequence.
        return hf_power.get_power_schedule(
            optimizer, config.lr_warmup_steps, config.total_training_steps, tokens_per_step=192, decay_ratio=0.4
        )
