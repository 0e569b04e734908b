"""Losses, gradients and weights that are not finite: skip, count, stop, and never save; and losses that jump."""

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_power.checkpoints.seal import newest_intact
from hf_power.records.errors import UserError

WINDOW = 20  # logs that a loss is compared with
IDLE_LOGS = 5  # in a row


class NonFiniteError(RuntimeError):
    """Training cannot go on from here: too many skipped steps in a row, or weights that are not finite."""


class BadNumbers:
    """What is not finite in a run, noted on the device and read when the Trainer logs or saves.

    Args:
        run: the run's record; it gets ``skipped_steps``, a list of {step, tokens, blocks}: the tokens of the whole run
            and the positions in the seeded order of blocks, [first, end), that the step has read; and ``loss_spikes``.
        max_in_a_row: so many skipped steps, one after the other, end the run; at least 1.
        block_size: tokens of a block.

    Raises:
        ValueError: max_in_a_row below 1.
    """

    def __init__(self, run: dict[str, Any], max_in_a_row: int, block_size: int) -> None:
        if max_in_a_row < 1:
            raise UserError(f"max_skipped_steps must be at least 1, got {max_in_a_row}: pass e.g. 10.")
        self.run, self.max_in_a_row, self.block_size = run, max_in_a_row, block_size
        self.skipped, self.spikes = run.setdefault("skipped_steps", []), run.setdefault("loss_spikes", [])
        self.stop_at: list[int] = []  # the steps in a row that are too many
        self._row: list[int] = []
        for step in reversed([point["step"] for point in self.skipped]):  # a resumed run counts on
            if step != run["steps"] - len(self._row):
                break
            self._row.insert(0, step)
        self._steps: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []
        self._since_log = [0, 0, 0]  # steps skipped, micro-batches, those with a finite loss
        self._idle = 0

    def finite_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch for the log's sum: 0 where it is not finite, which is noted."""
        finite = torch.isfinite(loss)
        self._losses.append(finite)
        return torch.where(finite, loss, torch.zeros_like(loss))

    def bad_step(self, grad_norm: Any) -> torch.Tensor:
        """Note a step by its gradient's norm over all processes: 1.0 if it is to be skipped, else 0.0, on the device."""
        if hasattr(grad_norm, "full_tensor"):  # sharded
            grad_norm = grad_norm.full_tensor()
        bad = (~torch.isfinite(torch.as_tensor(grad_norm).detach())).float()
        self._steps.append(bad)
        return bad

    def read(self, last_step: int, gather: Any) -> None:
        """Take what was noted up to a step into the record; waits for the device. Every process must call it.

        Args:
            last_step: number of the last step that was noted.
            gather: of a tensor, over all processes.
        """
        if not self._losses:
            return
        finite = gather(torch.stack(self._losses).float().mean().reshape(1)).mean()
        *steps, share = torch.stack([*self._steps, finite]).tolist()
        self._since_log[1] += len(self._losses)
        self._since_log[2] += share * len(self._losses)
        first = last_step - len(steps) + 1
        self._steps, self._losses = [], []
        for step, bad in enumerate(steps, start=first):
            self._row = [*self._row, step] if bad else []
            if bad:
                self._since_log[0] += 1
                self.skipped.append({"step": step, **self._read_in(step)})
            if len(self._row) >= self.max_in_a_row and not self.stop_at:
                self.stop_at = self._row

    def correct(self, logs: dict[str, float]) -> None:
        """Make the loss of a log the mean over its finite micro-batches; say how many steps were skipped.

        A log of nothing finite has no loss; the norm of a skipped step's gradient is left out.
        """
        skipped, losses, finite = self._since_log
        self._since_log = [0, 0, 0]
        if skipped:
            logs["skipped_steps"] = skipped
        if finite < losses:
            if finite:
                logs["loss"] *= losses / finite
            else:
                del logs["loss"]
        if "grad_norm" in logs and not math.isfinite(logs["grad_norm"]):
            del logs["grad_norm"]

    def warnings(self, logs: dict[str, float], step: int) -> list[str]:
        """Sentences on a log: a loss that jumped, experts that stay idle.

        A loss is a spike above median + 3 x (third quartile - first quartile) of the 20 logs before it.
        """
        said = []
        before = [point["loss"] for point in self.run["loss_curve"] if "loss" in point][-WINDOW:]
        if len(before) == WINDOW and "loss" in logs:
            low, median, high = statistics.quantiles(before, n=4)
            if logs["loss"] > median + 3 * (high - low):
                self.spikes.append({"step": step, "loss": float(logs["loss"]), "median": median})
                said.append(f"the loss of step {step} is {logs['loss']:.4f}; the {WINDOW} logs before: {median:.4f}")
        if "idle_experts" in logs:
            self._idle = self._idle + 1 if logs["idle_experts"] > 0 else 0
            if self._idle == IDLE_LOGS:
                said.append(f"experts have got no token in {IDLE_LOGS} logs in a row: the router may be dead")
        return said

    def error(self, folder: Path) -> NonFiniteError:
        """The sentence for too many skipped steps: which, what they read, and where to go on."""
        steps, first, last = self.stop_at, self._read_in(self.stop_at[0]), self._read_in(self.stop_at[-1])
        return NonFiniteError(
            f"the loss or gradient was not finite in {len(steps)} steps in a row, {steps[0]} to {steps[-1]}, which read "
            f"tokens {first['tokens'][0]:,} to {last['tokens'][1]:,} (blocks {first['blocks'][0]} to "
            f"{last['blocks'][1]} of the seeded order): {_go_on(folder)}."
        )

    def _read_in(self, step: int) -> dict[str, list[int]]:
        end = self.run["tokens_seen"] + (step - self.run["steps"]) * self.run["tokens_per_step"]
        tokens = [end - self.run["tokens_per_step"], end]
        return {"tokens": tokens, "blocks": [n // self.block_size for n in tokens]}


def poison_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss; one that is not finite gets a gradient of NaN, which tells every process to skip the step."""
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, 1.0, float("nan"))


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity; every process must call it, for shards are summed up."""
    names, norms = [], []
    for name, parameter in model.named_parameters():
        norm = torch.linalg.vector_norm(parameter.detach(), 1, dtype=torch.float32)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        names.append(name)
    return [name for name, bad in zip(names, (~torch.isfinite(torch.stack(norms))).tolist(), strict=True) if bad]


def refuse_non_finite(model: nn.Module, folder: Path) -> None:
    """Raise instead of saving weights that are not finite.

    Raises:
        NonFiniteError: such weights, with the last good checkpoint of the run folder.
    """
    if names := non_finite_weights(model):
        raise NonFiniteError(
            f"{len(names)} weights such as {names[0]} are not finite and are not saved: {_go_on(folder)}."
        )


def _go_on(folder: Path) -> str:
    try:
        return f"go on from {newest_intact(folder)[0]} with a lower learning rate or other data"
    except FileNotFoundError:
        return "no checkpoint was saved before, so start again with a lower learning rate or other data"
