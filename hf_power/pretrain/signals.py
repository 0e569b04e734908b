"""SIGTERM and SIGINT: every process stops at the same step, after one sealed checkpoint."""

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedBySignalError(Exception):
    """The run has saved a checkpoint and stopped because of a signal, whose number is ``signal``."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class StopOnSignal(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Turns a signal to any process into a checkpoint and a stop of all of them; a second signal changes nothing.

    Goes before `SealCheckpoints`, which acts on control.should_save. `received` is the agreed signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = self._flag = 0
        self._old: dict[int, Any] = {}
        self._group: Any = None
        self._work: Any = None
        self._tensor = torch.zeros((), dtype=torch.int64)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the handlers, and a group of its own for the agreement, which needs no device."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the flag of the last step, which all processes have agreed on, and start this step's agreement."""
        if self._group is None:
            self.received = self._flag
        else:
            if self._work is not None:
                self._work.wait()
                self.received = int(self._tensor)
            if not self.received:
                self._tensor = torch.tensor(self._flag, dtype=torch.int64)
                self._work = dist.all_reduce(self._tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the open agreement; a group that is left to the interpreter's end can abort the process there."""
        if self._work is not None:
            self._work.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = self._work = None

    def restore(self) -> None:
        """Give the handlers back; to be called however the training ended."""
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old = {}

    def _note(self, number: int, frame: Any) -> None:
        self._flag = self._flag or number
