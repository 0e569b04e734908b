"""The stock Trainer, with the tokens in its logs and with held-out losses and saved models that can be trusted."""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from hf_power.checkpoints.seal import RUN_FILE
from hf_power.compat import name_cpu_without_index
from hf_power.evaluate.heldout import block_losses
from hf_power.pretrain.bad_numbers import BadNumbers, poison_if_not_finite, refuse_non_finite
from hf_power.pretrain.callbacks import RunRecord, SealCheckpoints
from hf_power.pretrain.experts import ExpertLoad
from hf_power.records.errors import UserError
from hf_power.records.files import write_json
from hf_power.register import check_parts

# What PowerTrainer replaces; under another name it would never be called.
REPLACED = ["compute_loss", "training_step", "get_batch_samples", "log", "floating_point_ops", "evaluation_loop"]
REPLACED += ["save_model", "_get_grad_norm", "_load_rng_state", "_load_optimizer_and_scheduler"]
REPLACED += ["_load_from_checkpoint", "_load_best_model"]
check_parts(REPLACED)
NUMBERS = ("weight_decay", "betas", "eps")  # of a parameter group; the rate is the schedule's


class PowerTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """The stock Trainer; its logs also hold the tokens seen, tokens per second and the learning rate of every group."""

    run: dict[str, Any]
    first_step: int  # where this process began
    expert_load: ExpertLoad | None = None  # of a mixture of experts
    bad_numbers: BadNumbers
    seals: SealCheckpoints
    record: RunRecord
    _random_numbers_of: str | None = None  # a checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights by the names that they have in a file: the stock one goes on without those it does not find.

        Experts and routers have other names in a checkpoint than in the model, so it would leave them as they were
        initialized, with a warning alone.

        Raises:
            ValueError: weights that the file lacks, has besides, or has in another shape.
        """
        if self.is_fsdp_enabled:  # which loads by names of its own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        dtype = next(self.model.parameters()).dtype
        saved, found = type(self.model).from_pretrained(resume_from_checkpoint, dtype=dtype, output_loading_info=True)
        wrong = {what: sorted(map(str, names)) for what, names in found.items() if names}
        if wrong:
            raise UserError(
                f"{resume_from_checkpoint} does not hold the weights of this model ({wrong}): take another checkpoint."
            )
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """As the stock one, by the names in the file."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Not yet: a loader draws a number when it begins, as it did in the run that was saved, before the checkpoint."""
        self._random_numbers_of = checkpoint

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock one; the first batches of a resumed run are followed by the random numbers of its checkpoint."""
        batches = super().get_batch_samples(*args, **kwargs)
        super()._load_rng_state(self._random_numbers_of)
        self._random_numbers_of = None
        return batches

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """As the stock one; a loss that is not finite makes every gradient so, and with it the norm on all processes."""
        computed = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if return_outputs:
            return poison_if_not_finite(computed[0]), computed[1]
        return poison_if_not_finite(computed)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As the stock one; what is not finite stays out of the sum that is logged."""
        return self.bad_numbers.finite_loss(super().training_step(model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm; a step whose norm is not finite is skipped: by the fused optimizer on the device, without a wait."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        bad = self.bad_numbers.bad_step(grad_norm)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            return grad_norm  # fp16 skips by itself; DeepSpeed has stepped already
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad
        elif bool(bad):  # the others can only be asked from here
            optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens and group learning rates, so that every tracker in report_to gets them."""
        if "learning_rate" in logs and "initial_lr" in self.optimizer.param_groups[0]:
            logs["tokens"] = self.run["tokens_seen"] + (
                (self.state.global_step - self.run["steps"]) * self.run["tokens_per_step"]
            )
            if start_time is not None:
                # start_time is the wall clock's, which jumps
                seconds = max(1e-9, time.monotonic() - self.record.started)
                steps = self.state.global_step - self.first_step
                logs["tokens_per_second"] = round(steps * self.run["tokens_per_step"] / seconds, 1)
            base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            for i, group in enumerate(self.optimizer.param_groups):
                name = group.get("name", f"group{i}")
                logs[f"lr/{name}"] = logs["learning_rate"] * float(base_lrs[i]) / float(base_lrs[0])
            if self.expert_load is not None:
                logs |= self.expert_load.read()
        self.bad_numbers.read(self.state.global_step, self.accelerator.gather)
        if "loss" in logs:
            self.bad_numbers.correct(logs)
            for warning in self.bad_numbers.warnings(logs, self.state.global_step):
                if self.args.should_save:
                    print(f"  WARNING      {warning}", flush=True)
        super().log(logs, start_time)
        self._stop_if_too_many()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the stock one; but of AdamW only the moments are the checkpoint's, its numbers are today's arguments."""
        today = [{name: group[name] for name in NUMBERS if name in group} for group in self.optimizer.param_groups]
        name_cpu_without_index(self.args)
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, numbers in zip(self.optimizer.param_groups, today, strict=True):
            group.update(numbers)

    def _stop_if_too_many(self) -> None:
        if not self.bad_numbers.stop_at:
            return
        folder = Path(self.args.output_dir)
        self.run["status"] = "failed"
        if self.args.should_save:
            write_json(folder / RUN_FILE, self.run)
        self.seals.join()  # so that the last checkpoint can be named
        raise self.bad_numbers.error(folder)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """FLOPs of a micro-batch from the run's own count; the stock one walks over all parameters each time."""
        return float(inputs["input_ids"].numel() * self.run["flops_per_token"])

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
            with torch.no_grad(), self.compute_loss_context_manager():
                losses = block_losses(model, batch["input_ids"])
            rows.append(self.accelerator.gather_for_metrics(losses).cpu())
        losses = torch.cat(rows).double()
        metrics = {f"{metric_key_prefix}_loss": float(losses.mean())}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(losses))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the stock one, which under FSDP saves tied weights twice, and beside shards neither config nor tokenizer.

        Raises:
            NonFiniteError: weights that are not finite, or too many skipped steps: nothing is saved.
        """
        self.bad_numbers.read(self.state.global_step, self.accelerator.gather)
        self._stop_if_too_many()
        self.seals.join()
        refuse_non_finite(self.model, Path(self.args.output_dir))
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
