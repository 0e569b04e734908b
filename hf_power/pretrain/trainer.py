"""PowerTrainer overrides private parts of transformers' Trainer: tokens in its logs, losses and saves that can be trusted."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from hf_power.checkpoints.callback import SealCheckpoints, output_folder
from hf_power.checkpoints.older import add_older_names
from hf_power.compat import name_cpu_without_index
from hf_power.models import block_losses
from hf_power.pretrain.bad_numbers import BadNumbers, poison_if_not_finite, refuse_non_finite
from hf_power.pretrain.record import ExpertLoad, MeasureExperts, RunRecord
from hf_power.records.errors import UserError
from hf_power.records.run import Run, SinceLog
from hf_power.register import check_parts

# What PowerTrainer replaces; under another name it would never be called.
REPLACED = ["compute_loss", "training_step", "get_batch_samples", "log", "floating_point_ops", "evaluation_loop"]
REPLACED += ["save_model", "_get_grad_norm", "_load_rng_state", "_load_optimizer_and_scheduler"]
REPLACED += ["_load_from_checkpoint", "_load_best_model", "_determine_best_metric"]
check_parts(REPLACED)
# The numbers of a parameter group that are today's at a resume; its rate is the schedule's.
NUMBERS = ("weight_decay", "betas", "eps")

# The micro-batches of a step, and the number of tokens in them that a loss counts.
Batches: TypeAlias = tuple[list[dict[str, torch.Tensor]], torch.Tensor | int | None]


@dataclass(frozen=True)
class Guards:
    """What a PowerTrainer asks and tells while it trains; the load of the experts is there for a mixture alone."""

    record: RunRecord
    bad_numbers: BadNumbers
    seals: SealCheckpoints
    expert_load: ExpertLoad | None = None


class PowerTrainer(Trainer):
    """The stock Trainer; its logs also hold the tokens seen, tokens per second and the learning rate of every group."""

    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    # The run prints a preview of its own, and its logs have more than what is added to those of any Trainer.
    tells_schedule = True

    def __init__(self, *, guards: Guards, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.guards = guards
        self._random_numbers_of: str | None = None
        if guards.expert_load is not None:
            self.add_callback(MeasureExperts(guards.expert_load))
        # Blocks have one length, so a mean of means is exact. The other way, a sum over the whole batch's tokens, multiplies
        # a mixture of experts' balancing loss, which is a mean already, by accumulation steps x processes.
        self.model_accepts_loss_kwargs = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights by the names that they have in a file: the stock one goes on without those it does not find.

        Experts and routers have other names in a checkpoint than in the model, so it would leave them as they were
        initialized, with a warning alone. Weights that the file lacks, has besides, or has in another shape are a
        UserError here.
        """
        if self.is_fsdp_enabled:
            # FSDP loads its shards by names of its own.
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        dtype = next(self.model.parameters()).dtype
        load = functools.partial(type(self.model).from_pretrained, resume_from_checkpoint, dtype=dtype)
        # With this flag it gives a pair, which its type does not say.
        saved, found = cast("tuple[PreTrainedModel, dict[str, set[str]]]", load(output_loading_info=True))
        wrong = {what: sorted(map(str, names)) for what, names in found.items() if names}
        if wrong:
            raise UserError(
                f"{resume_from_checkpoint} does not hold the weights of this model ({wrong}): take another checkpoint."
            )
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """As the stock one, by the names in the file."""
        best = self.state.best_model_checkpoint
        if best is not None:
            self.guards.record.taken_back = Run.load(Path(best), required=("steps", "tokens_seen"))
        if best is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(best)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the stock one; under save_strategy best, a save that a signal asked for is not taken back."""
        asked = self.control.should_save
        return super()._determine_best_metric(metrics, trial) or asked

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Not yet: a loader draws a number when it begins, as it did in the run that was saved, before the checkpoint."""
        self._random_numbers_of = checkpoint

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Batches:
        """As the stock one; the first batches of a resumed run are followed by the random numbers of its checkpoint."""
        batches: Batches = super().get_batch_samples(*args, **kwargs)
        if self._random_numbers_of is not None:
            super()._load_rng_state(self._random_numbers_of)
            self._random_numbers_of = None
            self._go_on_with_log()
        return batches

    def _go_on_with_log(self) -> None:
        """Take up what the checkpoint has summed up for the next log, so that this is the mean of all its steps."""
        record = self.guards.record
        if (since := record.run.since_log) is not None:
            self._tr_loss += since.loss
            self._globalstep_last_logged -= since.steps
            record.update(replace(record.run, since_log=None))

    def _since_log(self) -> SinceLog | None:
        """What is summed up for the next log; every process must call it."""
        steps = self.state.global_step - self._globalstep_last_logged
        loss = float(self.accelerator.gather(self._tr_loss.reshape(1)).mean())
        skipped, losses, finite = self.guards.bad_numbers.since_log
        return SinceLog(steps, loss, int(skipped), int(losses), finite) if steps else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, object]:
        """As the stock one; a loss that is not finite makes every gradient so, and with it the norm on all processes."""
        computed = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if isinstance(computed, tuple):
            return poison_if_not_finite(computed[0]), computed[1]
        return poison_if_not_finite(computed)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As the stock one; what is not finite stays out of the sum that is logged, and what was read is counted."""
        self.guards.record.count(len(inputs["input_ids"]))
        return self.guards.bad_numbers.finite_loss(super().training_step(model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        """The norm; a step whose norm is not finite is skipped: by the fused optimizer on the device, without a wait."""
        stock: Callable[..., torch.Tensor | float] = super()._get_grad_norm
        norm = stock(model, grad_norm=grad_norm)
        bad = self.guards.bad_numbers.bad_step(norm)
        optimizer: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            # The scaler of fp16 skips such a step by itself, and DeepSpeed has done the step already.
            return norm
        if optimizer.defaults.get("fused"):
            # The fused step reads this attribute, which is meant for a scaler of gradients, and does nothing if it is 1.
            setattr(optimizer, "found_inf", bad)  # noqa: B010
        elif bool(bad):
            # Other optimizers can only be kept from their step by taking the gradients away, which waits for the device.
            optimizer.zero_grad(set_to_none=True)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens and group learning rates, so that every tracker in report_to gets them."""
        if "learning_rate" in logs and "initial_lr" in self.optimizer.param_groups[0]:
            record = self.guards.record
            logs["tokens_seen"] = record.tokens_after(self.state.global_step)
            if start_time is not None:
                # The record's clock never jumps; start_time is of the wall clock, which may be set.
                seconds = max(1e-9, time.monotonic() - record.started)
                steps = self.state.global_step - record.first_step
                logs["tokens_per_second"] = round(steps * record.run.tokens_per_step / seconds, 1)
            base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            for i, group in enumerate(self.optimizer.param_groups):
                name = group.get("name", f"group{i}")
                logs[f"lr/{name}"] = logs["learning_rate"] * float(base_lrs[i]) / float(base_lrs[0])
            if self.guards.expert_load is not None:
                logs |= self.guards.expert_load.read()
        self.guards.bad_numbers.read(self.state.global_step, self.accelerator.gather)
        if "loss" in logs:
            self.guards.bad_numbers.correct(logs)
            for warning in self.guards.bad_numbers.warnings(logs, self.state.global_step):
                if self.args.should_save:
                    print(f"  WARNING      {warning}", flush=True)
        super().log(logs, start_time)
        self._stop_if_too_many()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the stock one; but of AdamW only the moments are the checkpoint's, its numbers are today's arguments."""
        # The checkpoint's optimizer brings its old numbers back, so today's are kept aside.
        today = [{name: group[name] for name in NUMBERS if name in group} for group in self.optimizer.param_groups]
        name_cpu_without_index(self.args)
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        loaded: list[dict[str, Any]] = []
        watch = inner.register_load_state_dict_pre_hook(lambda optimizer, state: loaded.append(state))
        super()._load_optimizer_and_scheduler(checkpoint)
        watch.remove()
        if loaded and not self.is_fsdp_enabled:
            _keep_types(inner, loaded[0])
        for group, numbers in zip(self.optimizer.param_groups, today, strict=True):
            group.update(numbers)

    def _stop_if_too_many(self) -> None:
        if not self.guards.bad_numbers.stop_at:
            return
        record = self.guards.record
        record.update(replace(record.run, status="failed"))
        if self.args.should_save:
            record.save()
        # The last checkpoint must be sealed before it can be named as the one to go on from.
        self.guards.seals.join()
        raise self.guards.bad_numbers.error(output_folder(self.args))

    def floating_point_ops(self, inputs: dict[str, torch.Tensor | Any]) -> int:
        """FLOPs of a micro-batch from the run's own count; the stock one walks over all parameters each time."""
        return int(inputs["input_ids"].numel() * (self.guards.record.run.flops_per_token or 0.0))

    def evaluation_loop(
        self,
        dataloader: DataLoader[dict[str, torch.Tensor]],
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
        # A loader draws a random number when it begins, which those of the training must not feel: workers that persist
        # begin once in a run and once more when it goes on.
        with torch.random.fork_rng(devices=[]):
            for batch in dataloader:
                with torch.no_grad(), self.compute_loss_context_manager():
                    losses = block_losses(model, batch["input_ids"])
                rows.append(self.accelerator.gather_for_metrics(losses).cpu())
        losses = torch.cat(rows).double()
        metrics = {f"{metric_key_prefix}_loss": float(losses.mean())}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=len(losses))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the stock one, which under FSDP saves tied weights twice, and beside shards neither config nor tokenizer.

        Raises:
            NonFiniteError: weights that are not finite, or too many skipped steps: nothing is saved.
        """
        self.guards.bad_numbers.read(self.state.global_step, self.accelerator.gather)
        self._stop_if_too_many()
        self.guards.seals.join()
        refuse_non_finite(self.model, output_folder(self.args))
        if _internal_call:
            self.guards.record.since_log = self._since_log()
        folder = Path(output_dir) if output_dir else output_folder(self.args)
        if self.is_fsdp_enabled:
            self._save_sharded(folder)
        else:
            super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            add_older_names(folder)

    def _save_sharded(self, folder: Path) -> None:
        weights = None
        if self.accelerator.state.fsdp_plugin.state_dict_type.name == "FULL_STATE_DICT":
            weights = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            if weights is None:
                self.model.config.save_pretrained(folder)
            else:
                weights = {k: v for k, v in weights.items() if k not in self.model.all_tied_weights_keys}
                self.model.save_pretrained(folder, state_dict=weights)
            self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / TRAINING_ARGS_NAME)


def _keep_types(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
    """Give the state of an optimizer the types of its checkpoint: torch has cast it to that of the weights.

    Adafactor keeps its state in fp32 beside weights in bf16, so that a cast makes another run.
    """
    names = [name for group in loaded["param_groups"] for name in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        state = optimizer.state[parameter]
        for key, value in loaded["state"].get(name, {}).items():
            if torch.is_tensor(value) and value.dtype != state[key].dtype:
                state[key] = value.to(state[key].device, copy=True)
