"""What ends a run from outside: SIGTERM and SIGINT, after one sealed checkpoint, and a disk that is full."""

import contextlib
import errno
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_power.checkpoints.seal import checkpoint_bytes, checkpoints, newest_intact, remove_leftovers, unfinished
from hf_power.data.text import cache_folder, source_bytes
from hf_power.pretrain.record import RunRecord
from hf_power.records.errors import DiskError, NotFoundError
from hf_power.records.files import free_bytes
from hf_power.settings.settings import Settings

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# By its number, the handler of a signal as signal.signal gives it back.
Handlers = dict[int, Callable[[int, FrameType | None], object] | int | None]


class StoppedBySignalError(Exception):
    """The run has saved a checkpoint and stopped because of a signal, whose number is ``signal``."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class StopOnSignal(TrainerCallback):
    """Turns a signal to any process into a checkpoint and a stop of all of them; a second signal changes nothing.

    Goes before `SealCheckpoints`, which acts on control.should_save. `received` is the agreed signal's number, or 0.
    """

    def __init__(self) -> None:
        self.received = self._flag = 0
        self._old: Handlers = {}
        self._group: dist.ProcessGroup | None = None
        self._work: dist.Work | None = None
        self._tensor = torch.zeros((), dtype=torch.int64)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Install the handlers, and a group of its own for the agreement, which needs no device."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        # Python installs handlers in the main thread alone; a sweep or a notebook may train in another one.
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Read the flag of the last step, which all processes have agreed on, and start this step's agreement."""
        if self._group is None:
            self.received = self._flag
        else:
            if self._work is not None:
                self._work.wait()
                self.received = int(self._tensor)
            # The agreement runs beside the next step, so that no step waits for it.
            if not self.received:
                self._tensor = torch.tensor(self._flag, dtype=torch.int64)
                self._work = dist.all_reduce(self._tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if self.received:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The Trainer takes a stop for the end of the epoch, which is only reached after the run has gone on."""
        if self.received and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._flag = self._flag or number


FULL = ["No space left on device", "Disk quota exceeded", "Not enough disk space", "PytorchStreamWriter failed"]
# torch's writer says no more than this at the end of a file that could not be written.
FULL += ["unexpected pos", "iostream error"]
READ_ONLY = ["Read-only file system"]


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that the disk or a quota is full.

    safetensors and torch keep the system's number in their text only; torch's writer not even there.
    """
    return _says(error, (errno.ENOSPC, errno.EDQUOT), FULL)


def _says(error: BaseException, numbers: tuple[int, ...], texts: list[str]) -> bool:
    seen: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in seen:
        seen.append(at)
        at = at.__cause__ or at.__context__
    return any(getattr(e, "errno", None) in numbers or any(text in str(e) for text in texts) for e in seen)


@contextlib.contextmanager
def full_disk_told(settings: Settings, record: RunRecord) -> Iterator[None]:
    """A disk that is full or read-only, as a DiskError: what is missing, and which checkpoint is safe.

    An unfinished checkpoint is removed from the run's folder.
    """
    try:
        yield
    except Exception as error:
        read_only = _says(error, (errno.EROFS,), READ_ONLY)
        if not read_only and not disk_is_full(error):
            raise
        folder, safe = record.folder, "no checkpoint was finished before"
        with contextlib.suppress(NotFoundError):
            safe = f"{newest_intact(folder)[0].name} is intact"
        if read_only:
            raise DiskError(
                f"the disk of {folder} is read-only now; {safe}: make it writable and go on with "
                "--resume_from_checkpoint true."
            ) from error
        disk, size = _what_is_missing(settings, record)
        if settings.training.process_index == 0:
            remove_leftovers(folder)
        raise DiskError(
            f"the disk of {disk} is full: {size}; {safe}: free some space and go on with --resume_from_checkpoint true."
        ) from error


def _what_is_missing(settings: Settings, record: RunRecord) -> tuple[Path, str]:
    """The folder that could not be written to, and how much is needed there and free."""
    folder, parameters = record.folder, record.run.parameters
    if parameters is None:
        # There is no model yet, so the data were being written: text as it is, and four bytes for a token of two or more.
        disk, needed, what = cache_folder(settings.data), 3 * source_bytes(settings.data), "text and tokens take about"
    else:
        disk, needed, what = folder, checkpoint_bytes(folder, parameters), "a checkpoint takes"
    # What is left of an unfinished checkpoint is counted as free. It is removed, but the frames of the error still hold
    # a file of it open, and the system frees it only when that is closed.
    halves = [p for half in checkpoints(folder) if unfinished(half) for p in half.rglob("*") if p.is_file()]
    free = free_bytes(disk) + sum(p.stat().st_size for p in halves)
    if not needed:  # a dataset of the Hub, of which not even the text is here
        return disk, f"{free / 1e6:,.1f} MB are free, and how much the dataset needs is not known"
    missing = max(0, needed - free)
    return disk, f"{what} {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free, {missing / 1e6:,.1f} MB are missing"
