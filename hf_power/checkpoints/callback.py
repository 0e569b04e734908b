"""SealCheckpoints: a Trainer's callback that seals each checkpoint, and rotates them after the seal."""

import threading
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_power.checkpoints.seal import MANIFEST, SAVING, checkpoint_bytes, remove_leftovers, rotate, seal
from hf_power.records.errors import DiskError
from hf_power.records.files import free_bytes


def output_folder(args: TrainingArguments) -> Path:
    """The run folder of a Trainer; TrainingArguments name one of their own where none was given."""
    return Path(args.output_dir or "")


class SealCheckpoints(TrainerCallback):
    """Seals each checkpoint of a Trainer, stops before a save that the disk cannot hold, and rotates after the seal.

    Takes save_total_limit out of the Trainer's arguments while it trains, because the Trainer deletes older checkpoints
    before the new one is sealed. Callbacks that add files to a checkpoint go before this one.

    Args:
        background: hash beside the training; the next save and the end of the training wait for it. False where something
            after this callback reads the manifest at once.
    """

    def __init__(self, background: bool = True) -> None:
        self.background = background
        self._limit: int | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Take over the rotation and remove what a killed save left."""
        # The Trainer would delete the older checkpoint before the new one is sealed.
        self._limit, args.save_total_limit = args.save_total_limit, None
        if state.is_world_process_zero:
            for name in remove_leftovers(output_folder(args)):
                print(f"{name} is removed: its saving was not finished")
        args.distributed_state.wait_for_everyone()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Before a save: wait for the last seal, raise a DiskError without room, and mark the folder as unfinished."""
        if model is None or not control.should_save:
            return
        self.wait()
        run = output_folder(args)
        _require_space(run, model)
        if state.is_world_process_zero:
            checkpoint = run / f"checkpoint-{state.global_step}"
            if not (checkpoint / MANIFEST).exists():
                # Another process may begin to save before this one, so the folder may be there.
                checkpoint.mkdir(parents=True, exist_ok=True)
                (checkpoint / SAVING).touch()
        # Nobody may write into a folder before it is marked.
        args.distributed_state.wait_for_everyone()

    on_epoch_end = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Seal the checkpoint when every process has written its part."""
        # Each process writes its own random numbers, so the checkpoint is not complete before all have come here.
        args.distributed_state.wait_for_everyone()
        if not state.is_world_process_zero:
            return
        self.wait()
        best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
        checkpoint = output_folder(args) / f"checkpoint-{state.global_step}"
        self._thread = threading.Thread(target=self._seal, args=(checkpoint, best), name="seal")
        self._thread.start()
        if not self.background:
            self.wait()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Wait for the last seal and give the limit back."""
        self.wait()
        args.save_total_limit = self._limit

    def join(self) -> None:
        """Return when no checkpoint is being sealed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Return when no checkpoint is being sealed; raise what went wrong with the last."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _seal(self, checkpoint: Path, best: Path | None) -> None:
        try:
            seal(checkpoint)
            if self._limit is not None and self._limit > 0:
                rotate(checkpoint.parent, self._limit, best, known=checkpoint)
        except BaseException as error:
            # A thread cannot raise in another one: the training's thread raises it in its next `wait`.
            self._error = error


def _require_space(run: Path, model: nn.Module) -> None:
    needed = checkpoint_bytes(run, sum(p.numel() for p in model.parameters() if p.requires_grad))
    missing = needed - free_bytes(run)
    if missing > 0:
        raise DiskError(
            f"the disk of {run} has {missing / 1e6:,.1f} MB too little for the next checkpoint: free some space and go on "
            "with --resume_from_checkpoint true."
        )
