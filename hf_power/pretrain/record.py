"""What a run tells while it trains: RunRecord keeps run.json, TokenProgress the bar, ExpertLoad the load of the experts."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.logging import tqdm

from hf_power.checkpoints.callback import output_folder
from hf_power.models import SOFTMAX_ROUTERS, experts_per_token, num_experts
from hf_power.pretrain.speed import attention_of
from hf_power.recipe import FILE_NAME, Recipe
from hf_power.records.errors import UserError
from hf_power.records.run import Computation, ParameterGroup, Run, ScheduleRecord, SinceLog
from hf_power.scheduler import PowerLR

MEASURES = ("aux_loss", "load_max", "load_min", "idle_experts", "router_entropy_nats")


class ExpertLoad:
    """Measures the routing of one forward pass of a model of `hf_power.models.SOFTMAX_ROUTERS`.

    With E experts of which each token takes k, f = tokens of an expert / tokens (sums to k), p = softmax of the router's
    logits and P = mean of p over tokens, f and P for each layer::

        aux_loss             = E * sum_i mean_layers(f_i) * mean_layers(P_i)     k if the load is even
        load_max             = max over layers and experts of f_i * E / k        1 if even, at most E / k
        load_min             = min of the same                                   0: an expert without a token
        idle_experts         = number of experts without a token, all layers together
        router_entropy_nats  = mean over tokens and layers of -sum_i p_i ln p_i, at most ln E

    aux_loss is that of the model itself (Switch Transformer, arXiv:2101.03961, eq. 4 to 6, over all layers) before
    ``router_aux_loss_coef``, and is measured whether the model trains with it or not. Every token counts, padding too.
    Each process measures its own share of the batch.

    The first forward pass after `start` asks the decoder for its router logits; they leave three small sums on the
    device, which `read` copies to the host. What activation checkpointing runs again in the backward pass is not a
    pass of the decoder, so it does not count. All other passes cost two Python calls.

    Args:
        model: of transformers, not wrapped by an engine.

    Raises:
        UserError: a model without experts.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        if config.model_type not in SOFTMAX_ROUTERS:
            raise UserError(
                f"{type(model).__name__} has no experts whose load could be measured: pass a GraniteMoe or Mixtral model."
            )
        self.num_experts, self.top_k = num_experts(config), experts_per_token(config)
        self._started = False
        self._sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        decoder = model.base_model
        # Hooks that come after torch.compile has seen the model are ignored, so these stay and look at a flag.
        decoder.register_forward_pre_hook(self._ask, with_kwargs=True)
        decoder.register_forward_hook(self._measure)

    def start(self) -> None:
        """Measure the next forward pass."""
        self._started, self._sums = True, None

    def read(self) -> dict[str, float]:
        """MEASURES -> value of the pass after `start`, each once; the only wait for the device.

        It is empty if `start` was not called since the last `read`; a UserError if there was no forward pass since
        then.
        """
        if self._sums is None:
            if self._started:
                raise UserError("there was no forward pass since start: run the model before the load is read.")
            return {}
        shares, probabilities, entropy = self._sums
        self._sums = None
        load = shares * (self.num_experts / self.top_k)
        aux_loss = self.num_experts * (shares.mean(dim=0) * probabilities.mean(dim=0)).sum()
        values = torch.stack([aux_loss, load.max(), load.min(), (load == 0).sum(), entropy.mean()]).tolist()
        return dict(zip(MEASURES, values, strict=True))

    def _ask(
        self, decoder: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        return args, {**kwargs, "output_router_logits": True} if self._started else kwargs

    def _measure(self, decoder: nn.Module, args: tuple[object, ...], output: MoeModelOutputWithPast) -> None:
        if not self._started:
            return
        self._started = False
        layers = [self._layer(logits.detach()) for logits in output.router_logits or ()]
        shares, probabilities, entropy = (torch.stack(values) for values in zip(*layers, strict=True))
        self._sums = shares, probabilities, entropy

    def _layer(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of one layer's logits (tokens, experts): f (experts), P (experts), entropy ()."""
        log_p = logits.float().log_softmax(dim=-1)
        p = log_p.exp()
        chosen = torch.zeros_like(p).scatter_(1, logits.topk(self.top_k, dim=-1).indices, 1.0)
        return chosen.mean(dim=0), p.mean(dim=0), -(p * log_p).sum(dim=-1).mean()


class MeasureExperts(TrainerCallback):
    """Starts the measurement in the first micro-batch of each step that the Trainer will log.

    A callback sees the logs too late to add to them for every tracker, so the Trainer's ``log`` takes ``load.read()``.
    """

    def __init__(self, load: ExpertLoad) -> None:
        self.load = load

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start if the step that begins ends in a log."""
        step = state.global_step + 1
        every = args.logging_strategy == IntervalStrategy.STEPS and step % state.logging_steps == 0
        if every or (step == 1 and args.logging_first_step):
            self.load.start()


# What a point of the loss curve holds of a log.
CURVE = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", *MEASURES)


class RunRecord(TrainerCallback):
    """Keeps run.json: in every checkpoint, with the recipe, and in the run folder at each save and at the end.

    It alone holds the `Run`, to which it adds what the Trainer, its optimizer and its model say of themselves, the
    counters and the loss curve. Others read `run`, and hand a changed one to `update`. `started` is of the monotonic
    clock; `first_step` steps were done before this process. Tokens are those of the sequences that were trained on:
    each one that this process reads stands for `tokens_per_row` tokens of the run, over all processes.
    """

    def __init__(self, run: Run, folder: Path, tokens_per_row: int, recipe: Recipe | None = None) -> None:
        self.run, self.folder, self.recipe = run, folder, recipe
        self.started, self.first_step = time.monotonic(), run.steps
        # What goes into a checkpoint beside the record, and the checkpoint whose weights the Trainer has taken back.
        self.since_log: SinceLog | None = None
        self.taken_back: Run | None = None
        self._tokens_per_row, self._rows = tokens_per_row, 0
        self._begun_at, self._over = run, False

    def update(self, run: Run) -> None:
        """Take the record with something new in it in the place of the old one."""
        self.run = run

    def tokens_after(self, step: int) -> int:
        """Tokens of the whole run after a step that this process has done or is about to do."""
        return self.run.tokens_seen + (step - self.run.steps) * self.run.tokens_per_step

    def count(self, rows: int) -> None:
        """So many sequences of a micro-batch have been trained on."""
        self._rows += rows

    def save(self) -> None:
        """Write run.json into the run folder."""
        self.run.save(self.folder)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        lr_scheduler: LRScheduler | None = None,
        model: PreTrainedModel | None = None,
        **kwargs: object,
    ) -> None:
        """Start the clock; list the parameter groups as the optimizer has them, and how the run computes."""
        self.started, self._begun_at, self._over = time.monotonic(), replace(self.run, steps=state.global_step), False
        self._rows = 0
        # The state of a checkpoint brings its logging_steps, eval_steps and save_steps back, and today's count.
        state.compute_steps(args, state.max_steps)
        if lr_scheduler is not None and model is not None:
            made = _computation(lr_scheduler.optimizer, model)
            groups = _groups(lr_scheduler.optimizer, self.run.groups)
            self.update(replace(self.run, groups=groups, computation=made))
        if isinstance(lr_scheduler, PowerLR):
            self.update(replace(self.run, schedule=cast(ScheduleRecord, lr_scheduler.schedule.to_dict())))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Add a point to the loss curve."""
        if not self._over:
            self._count(state)
        found = {key: float(logs[key]) for key in CURVE if logs and key in logs}
        # The last evaluation may be of weights that were taken back, whose point is in the curve already.
        if "loss" in found or ("eval_loss" in found and self.taken_back is None):
            point = {"step": state.global_step, "tokens": self.run.tokens_seen, **found}
            self.update(replace(self.run, loss_curve=[*self.run.loss_curve, point]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Complete the checkpoint with run.json."""
        self._count(state)
        if state.is_world_process_zero:
            checkpoint = output_folder(args) / f"checkpoint-{state.global_step}"
            run = replace(self.run, weights_step=self.run.steps, weights_tokens=self.run.tokens_seen)
            replace(run, since_log=self.since_log).save(checkpoint)
            if self.recipe is not None:
                self.recipe.save(checkpoint / FILE_NAME)
            self.save()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A run is one epoch, whereas the Trainer counts one more each time that it goes on, and eval_delay with it."""
        if args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay > 1:
            control.should_evaluate = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Bring the counters up to the last step; an evaluation after it takes no training time."""
        self._count(state)
        self._over = True

    def _count(self, state: TrainerState) -> None:
        begun, seconds = self._begun_at, time.monotonic() - self.started
        tokens = begun.tokens_seen + self._rows * self._tokens_per_row
        took = round(begun.train_seconds + seconds, 3)
        self.update(replace(self.run, steps=state.global_step, tokens_seen=tokens, train_seconds=took))
        steps = state.global_step - begun.steps
        if tokens == begun.tokens_seen + steps * begun.tokens_per_step:
            return
        self.update(replace(self.run, status="failed"))
        if state.is_world_process_zero:
            self.save()
        raise RuntimeError(
            f"{steps} steps have read {tokens - begun.tokens_seen:,} tokens, where {begun.tokens_per_step:,} were to be read "
            "in each, so the learning rate was that of another batch: this is a fault of hf_power."
        )


def _computation(optimizer: Optimizer, model: PreTrainedModel) -> Computation:
    inner = optimizer
    while isinstance(wrapped := getattr(inner, "optimizer", None), Optimizer):  # accelerate has wrapped it.
        inner = wrapped
    made: Computation = {"optimizer": type(inner).__name__}
    if "betas" in inner.param_groups[0]:
        first, second = inner.param_groups[0]["betas"]
        made["betas"] = (float(first), float(second))
    if "fused" in inner.param_groups[0]:
        made["fused"] = bool(inner.param_groups[0]["fused"])
    made["weights"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    made["mixed_precision"] = str(AcceleratorState().mixed_precision)
    made["attention"] = attention_of(model)
    return made


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | torch.Tensor) else None


def _groups(optimizer: Optimizer, before: list[ParameterGroup] | None) -> list[ParameterGroup]:
    """The groups; `before` are those of the checkpoint, whose rates hold under a schedule that does not keep its own.

    Only the power schedule takes up another rate, and it keeps it in the groups.
    """
    kept = {group.name: group.base_lr for group in before or []}
    return [
        ParameterGroup(
            name=group.get("name", f"group{i}"),
            base_lr=_number(group.get("initial_lr", kept.get(group.get("name", f"group{i}"), group["lr"]))),
            weight_decay=_number(group.get("weight_decay")),
            eps=_number(group.get("eps")),
            parameters=sum(p.numel() for p in group["params"]),
        )
        for i, group in enumerate(optimizer.param_groups)
    ]


class TokenProgress(ProgressCallback):
    """A progress bar that counts tokens: loss, learning rate, tokens per second and time left."""

    def __init__(self, tokens_per_step: int, total_tokens: int) -> None:
        super().__init__()
        self.tokens_per_step, self.total_tokens = tokens_per_step, total_tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Open the bar where the run stands."""
        self.current_step = state.global_step
        if state.is_world_process_zero:
            left = (state.max_steps - state.global_step) * self.tokens_per_step
            self.training_bar = tqdm(
                total=self.total_tokens,
                initial=self.total_tokens - left,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                desc="Training",
                mininterval=0.5,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count the tokens of the step."""
        if self.training_bar is not None:
            self.training_bar.update((state.global_step - self.current_step) * self.tokens_per_step)
            self.current_step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Show the loss and the base learning rate."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", lr=f"{logs['learning_rate']:.2e}")
