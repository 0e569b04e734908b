"""BadNumbers: steps that are not finite are skipped and counted, too many end the run, and losses that jump are told."""

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_power.checkpoints.seal import newest_intact
from hf_power.pretrain.record import RunRecord
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.run import LossSpike, SinceLog, SkippedStep

# A loss is compared with those of so many logs before it.
WINDOW = 20
# An expert without a token in one log is chance; in so many in a row its router may be dead.
IDLE_LOGS = 5


class NonFiniteError(RuntimeError):
    """Training cannot go on from here: too many skipped steps in a row, or weights that are not finite."""


class BadNumbers:
    """What is not finite in a run, noted on the device and read when the Trainer logs or saves.

    The record gets ``skipped_steps``, a list of {step, tokens, blocks}: the tokens of the whole run and the positions
    in the seeded order of blocks, [first, end), that the step has read; and ``loss_spikes``. Once max_in_a_row (at
    least 1) steps are skipped one after the other, `stop_at` names them; it is empty as long as the run may go on.
    """

    def __init__(self, record: RunRecord, max_in_a_row: int, block_size: int) -> None:
        if max_in_a_row < 1:
            raise UserError(f"max_skipped_steps must be at least 1, got {max_in_a_row}: pass e.g. 10.")
        self.record, self.max_in_a_row, self.block_size = record, max_in_a_row, block_size
        self.stop_at: list[int] = []
        self._row: list[int] = []
        # A resumed run counts on: the last skipped steps before the checkpoint are part of the row.
        for step in reversed([skipped.step for skipped in record.run.skipped_steps]):
            if step != record.run.steps - len(self._row):
                break
            self._row.insert(0, step)
        self._steps: list[torch.Tensor] = []
        self._losses: list[torch.Tensor] = []
        # Steps skipped since the last log, micro-batches, and those with a finite loss; a resumed run counts on here too.
        since = record.run.since_log or SinceLog()
        self.since_log: tuple[int, int, float] = (since.skipped, since.losses, since.finite)
        self._idle = 0

    def finite_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch for the log's sum: 0 where it is not finite, which is noted."""
        # The note stays on the device: asking it here would make every micro-batch wait.
        finite = torch.isfinite(loss)
        self._losses.append(finite)
        return torch.where(finite, loss, torch.zeros_like(loss))

    def bad_step(self, grad_norm: torch.Tensor | float) -> torch.Tensor:
        """Note a step by its gradient's norm over all processes: 1.0 if it is to be skipped, else 0.0, on the device."""
        bad = (~torch.isfinite(_whole(torch.as_tensor(grad_norm)).detach())).float()
        self._steps.append(bad)
        return bad

    def read(self, last_step: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take what was noted up to a step into the record, gathered over all processes; it waits for the device."""
        if not self._losses:
            return
        finite = gather(torch.stack(self._losses).float().mean().reshape(1)).mean()
        # One copy to the host for all that was noted since the last read.
        *steps, share = torch.stack([*self._steps, finite]).tolist()
        skipped, losses, known = self.since_log
        self.since_log = (skipped + round(sum(steps)), losses + len(self._losses), known + share * len(self._losses))
        first = last_step - len(steps) + 1
        self._steps, self._losses = [], []
        for step, bad in enumerate(steps, start=first):
            self._row = [*self._row, step] if bad else []
            if bad:
                run = self.record.run
                self.record.update(replace(run, skipped_steps=[*run.skipped_steps, self._read_in(step)]))
            if len(self._row) >= self.max_in_a_row and not self.stop_at:
                self.stop_at = self._row

    def correct(self, logs: dict[str, float]) -> None:
        """Make the loss of a log the mean over its finite micro-batches; say how many steps were skipped.

        A log of nothing finite has no loss; the norm of a skipped step's gradient is left out.
        """
        skipped, losses, finite = self.since_log
        self.since_log = (0, 0, 0.0)
        if skipped:
            logs["skipped_steps"] = skipped
        if finite < losses:
            # The Trainer divides by all micro-batches, those that were left out of the sum too.
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
        before = [point["loss"] for point in self.record.run.loss_curve if "loss" in point][-WINDOW:]
        if len(before) == WINDOW and "loss" in logs:
            low, median, high = statistics.quantiles(before, n=4)
            if logs["loss"] > median + 3 * (high - low):
                spike, run = LossSpike(step, float(logs["loss"]), median), self.record.run
                self.record.update(replace(run, loss_spikes=[*run.loss_spikes, spike]))
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
            f"tokens {first.tokens[0]:,} to {last.tokens[1]:,} (blocks {first.blocks[0]} to {last.blocks[1]} of the "
            f"seeded order): {_go_on(folder)}."
        )

    def _read_in(self, step: int) -> SkippedStep:
        end = self.record.tokens_after(step)
        first = end - self.record.run.tokens_per_step
        return SkippedStep(step, (first, end), (first // self.block_size, end // self.block_size))


def poison_if_not_finite(loss: torch.Tensor) -> torch.Tensor:
    """The same loss; one that is not finite gets a gradient of NaN, which tells every process to skip the step."""
    finite = torch.isfinite(loss.detach())
    return loss * torch.where(finite, 1.0, float("nan"))


def non_finite_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity; every process must call it, for shards are summed up."""
    names, norms = [], []
    for name, parameter in model.named_parameters():
        norms.append(_whole(torch.linalg.vector_norm(parameter.detach(), 1, dtype=torch.float32)))
        names.append(name)
    return [name for name, bad in zip(names, (~torch.isfinite(torch.stack(norms))).tolist(), strict=True) if bad]


def refuse_non_finite(model: nn.Module, folder: Path) -> None:
    """Raise a NonFiniteError instead of saving weights that are not finite; it names the last good checkpoint."""
    if names := non_finite_weights(model):
        raise NonFiniteError(
            f"{len(names)} weights such as {names[0]} are not finite and are not saved: {_go_on(folder)}."
        )


def _whole(value: torch.Tensor) -> torch.Tensor:
    """The value of all shards together, on every process; every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _go_on(folder: Path) -> str:
    try:
        return f"go on from {newest_intact(folder)[0]} with a lower learning rate or other data"
    except NotFoundError:
        return "no checkpoint was saved before, so start again with a lower learning rate or other data"
