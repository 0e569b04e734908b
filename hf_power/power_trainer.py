"""The stock Trainer, with the tokens in its logs and with held-out losses and saved models that can be trusted."""

import datetime
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from hf_power.experts import ExpertLoad


class PowerTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """The stock Trainer; its logs also hold the tokens seen, tokens per second and the learning rate of every group."""

    run: dict[str, Any]
    first_step: int  # where this process began
    expert_load: ExpertLoad | None = None  # of a mixture of experts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens and group learning rates, so that every tracker in report_to gets them."""
        if "learning_rate" in logs and "initial_lr" in self.optimizer.param_groups[0]:
            logs["tokens"] = self.run["tokens_seen"] + (
                (self.state.global_step - self.run["steps"]) * self.run["tokens_per_step"]
            )
            if start_time is not None:
                seconds = max(1e-9, datetime.datetime.now().timestamp() - start_time)
                steps = self.state.global_step - self.first_step
                logs["tokens_per_second"] = round(steps * self.run["tokens_per_step"] / seconds, 1)
            base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            for i, group in enumerate(self.optimizer.param_groups):
                name = group.get("name", f"group{i}")
                logs[f"lr/{name}"] = logs["learning_rate"] * float(base_lrs[i]) / float(base_lrs[0])
            if self.expert_load is not None:
                logs |= self.expert_load.read()
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss of the blocks, each counted once on any number of processes, and of the text alone.

        The stock loop takes the mean of a batch for each of its blocks, with those that only fill up the last batches, and
        of a mixture of experts it adds the balancing loss.
        """
        model, rows = self.model.eval(), []
        for batch in dataloader:
            blocks = batch["input_ids"]
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = model(input_ids=blocks).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), blocks[:, 1:], reduction="none").mean(dim=1)
            rows.append(self.accelerator.gather_for_metrics(nll).cpu())
        losses = torch.cat(rows).double()
        metrics = {f"{metric_key_prefix}_loss": float(losses.mean())}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(losses))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the stock one, which under FSDP saves tied weights twice, and beside shards neither config nor tokenizer."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        weights = None
        if self.accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT":
            weights = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            if weights is None:
                self.model.config.save_pretrained(output_dir)
            else:
                weights = {k: v for k, v in weights.items() if k not in self.model.all_tied_weights_keys}
                self.model.save_pretrained(output_dir, state_dict=weights)
            self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME)
