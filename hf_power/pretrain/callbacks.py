"""Trainer callbacks: a progress bar in tokens, the record of the run, sealed checkpoints."""

import threading
import time
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.utils.logging import tqdm

from hf_power.checkpoints.seal import MANIFEST, RUN_FILE, SAVING, checkpoint_bytes, remove_leftovers, rotate, seal
from hf_power.pretrain.experts import MEASURES
from hf_power.recipe import FILE_NAME, Recipe
from hf_power.records.errors import DiskError
from hf_power.records.files import free_bytes, write_json
from hf_power.schedule import PowerLR


class TokenProgress(ProgressCallback):  # type: ignore[misc]  # transformers is untyped
    """A progress bar that counts tokens: loss, learning rate, tokens per second and time left."""

    def __init__(self, tokens_per_step: int, total_tokens: int) -> None:
        super().__init__()
        self.tokens_per_step, self.total_tokens = tokens_per_step, total_tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the tokens of the step."""
        if self.training_bar is not None:
            self.training_bar.update((state.global_step - self.current_step) * self.tokens_per_step)
            self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss and the base learning rate."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", lr=f"{logs['learning_rate']:.2e}")


class RunRecord(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Keeps run.json: in every checkpoint, and in the run folder at each save and at the end.

    Args:
        run: what is known before training; the callback adds tokens_seen, loss_curve, train_seconds and status.
        folder: the run folder.
        recipe: whose numbers the run uses; a copy goes into every checkpoint.
    """

    def __init__(self, run: dict[str, Any], folder: Path, recipe: Recipe | None = None) -> None:
        self.run, self.folder, self.recipe = run, folder, recipe
        self._seconds_before = float(run.get("train_seconds", 0.0))

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Start the clock; list the parameter groups as the optimizer has them."""
        self.started, self._steps_at_start, self._over = time.monotonic(), state.global_step, False
        self._tokens_at_start = self.run["tokens_seen"]
        optimizer = lr_scheduler.optimizer
        self.run["groups"] = [
            {
                "name": group.get("name", f"group{i}"),
                "base_lr": float(group.get("initial_lr", group["lr"])),
                "weight_decay": group["weight_decay"],
                "eps": group.get("eps"),
                "parameters": sum(p.numel() for p in group["params"]),
            }
            for i, group in enumerate(optimizer.param_groups)
        ]
        if isinstance(lr_scheduler, PowerLR):
            self.run["schedule"] = lr_scheduler.describe()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add a point to the loss curve."""
        if not self._over:
            self._count(state)
        keys = ("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", *MEASURES)
        point = {key: float(logs[key]) for key in keys if logs and key in logs}
        if "loss" in point or "eval_loss" in point:
            self.run["loss_curve"].append({"step": state.global_step, "tokens": self.run["tokens_seen"], **point})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the checkpoint with run.json."""
        self._count(state)
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / RUN_FILE, self.run)
            if self.recipe is not None:
                self.recipe.save(checkpoint / FILE_NAME)
            write_json(self.folder / RUN_FILE, self.run)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bring the counters up to the last step; an evaluation after it takes no training time."""
        self._count(state)
        self._over = True

    def _count(self, state: Any) -> None:
        steps = state.global_step - self._steps_at_start
        self.run["steps"] = state.global_step
        self.run["tokens_seen"] = self._tokens_at_start + steps * self.run["tokens_per_step"]
        self.run["train_seconds"] = round(self._seconds_before + time.monotonic() - self.started, 3)


class SealCheckpoints(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the rotation and remove what a killed save left."""
        self._limit, args.save_total_limit = args.save_total_limit, None
        if state.is_world_process_zero:
            for name in remove_leftovers(Path(args.output_dir)):
                print(f"{name} is removed: its saving was not finished")
        args.distributed_state.wait_for_everyone()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before a save: wait for the last seal, see that the disk has room, and mark the folder as unfinished.

        Raises:
            OSError: less is free than a checkpoint takes.
        """
        if not control.should_save:
            return
        self.wait()
        run = Path(args.output_dir)
        _require_space(run, model)
        if state.is_world_process_zero:
            checkpoint = run / f"checkpoint-{state.global_step}"
            if not (checkpoint / MANIFEST).exists():
                checkpoint.mkdir(parents=True, exist_ok=True)  # another process may begin to save before this one
                (checkpoint / SAVING).touch()
        args.distributed_state.wait_for_everyone()  # nobody writes into a folder that is not marked

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint when every process has written its part."""
        args.distributed_state.wait_for_everyone()  # each process writes its random numbers
        if not state.is_world_process_zero:
            return
        self.wait()
        best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._thread = threading.Thread(target=self._seal, args=(checkpoint, best), name="seal")
        self._thread.start()
        if not self.background:
            self.wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        except BaseException as error:  # for the training's thread
            self._error = error


def _require_space(run: Path, model: Any) -> None:
    needed = checkpoint_bytes(run, sum(p.numel() for p in model.parameters() if p.requires_grad))
    missing = needed - free_bytes(run)
    if missing > 0:
        raise DiskError(
            f"the disk of {run} has {missing / 1e6:,.1f} MB too little for the next checkpoint: free some space and go on "
            "with --resume_from_checkpoint true."
        )
