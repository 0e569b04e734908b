"""AverageWeights: a Trainer's callback that keeps a running mean of the weights, and saves it as a model at the end."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_power.checkpoints.callback import output_folder
from hf_power.records.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "average.safetensors"  # In a checkpoint; no loader of a model takes it for weights.
FOLDER = "average"  # In the output_dir: the finished model.


class AverageWeights(TrainerCallback):
    """Keeps a mean of the weights over about the last part of the steps so far, for a run that may end at any moment.

    After step t the mean moves by ``gamma = 1 / (1 + window * t)`` towards the weights: the shares fall as
    ``t**(1 / window - 1)`` into the past, so that the mean reaches back over the same part of every run and needs no horizon
    (polynomial-decay averaging of Shamir and Zhang 2013, arXiv:1212.1824, with ``window = 1 / (1 + eta)``).

    Each checkpoint gets the mean as average.safetensors, from which a resumed run goes on, and the end of the training
    OUTPUT_DIR/average, a model of its own. It keeps one more copy of the trainable weights, in fp32. It goes before
    `hf_power.SealCheckpoints`, because it adds to a checkpoint.

    Args:
        window: the part of the steps that the mean reaches back over, in (0, 1].

    Raises:
        UserError: a window outside of its range, or weights in shards (FSDP, ZeRO 3).
    """

    def __init__(self, window: float = 0.1) -> None:
        if isinstance(window, bool) or not isinstance(window, int | float) or not 0 < window <= 1:
            raise UserError(
                f"window must lie above 0 and up to 1, got {window!r}: pass 0.1 for the last tenth of the run."
            )
        self.window = float(window)
        self._mean: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Begin with the weights as they are, or go on with the mean of the checkpoint."""
        weights = _weights(model)
        if any(hasattr(tensor, "full_tensor") or not tensor.numel() for tensor in weights.values()):
            raise UserError(
                "AverageWeights needs whole weights, and these are in shards: average the checkpoints instead."
            )
        self._mean = {name: tensor.detach().float().clone() for name, tensor in weights.items()}
        if not state.global_step:
            return
        saved = output_folder(args) / f"checkpoint-{state.global_step}" / FILE
        if not saved.is_file():
            warnings.warn(
                f"there is no {saved}, so the average begins anew with the weights of step {state.global_step}.",
                stacklevel=2,
            )
            return
        for name, tensor in load_file(saved).items():
            self._mean[name].copy_(tensor)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Move the mean towards the weights."""
        part = 1 / (1 + self.window * state.global_step)
        with torch.no_grad():
            for name, tensor in _weights(model).items():
                self._mean[name].lerp_(tensor.detach().float(), part)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Add the mean to the checkpoint."""
        if state.is_world_process_zero:
            save_file(self._mean, output_folder(args) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class: "PreTrainedTokenizerBase | None" = None,
        **kwargs: object,
    ) -> None:
        """Save the mean as a model; the one that was trained keeps its own weights."""
        if not state.is_world_process_zero or not isinstance(model, PreTrainedModel):
            return
        folder = output_folder(args) / FOLDER
        weights: dict[str, Any] = dict(model.state_dict())
        weights |= {name: mean.to(weights[name].dtype) for name, mean in self._mean.items()}
        # A tied tensor has two names in the state, of which parameters are listed under one.
        tied = {tensor.data_ptr(): name for name, tensor in _weights(model).items()}
        for name, tensor in model.state_dict().items():
            if (twin := tied.get(tensor.data_ptr())) is not None:
                weights[name] = weights[twin]
        # The Trainer turns the cache off for training, and the finished model is to generate with it.
        used, model.config.use_cache = model.config.use_cache, True
        model.save_pretrained(folder, state_dict=weights)
        model.config.use_cache = used
        if processing_class is not None:
            processing_class.save_pretrained(folder)


def _weights(model: nn.Module | None) -> dict[str, nn.Parameter]:
    """The trainable weights, each once."""
    return {} if model is None else {name: p for name, p in model.named_parameters() if p.requires_grad}
