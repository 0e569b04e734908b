"""Pushing during training: in a thread beside it, never in its way, and nothing is forgotten."""

import threading
from pathlib import Path
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin
from huggingface_hub.utils import disable_progress_bars
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from hf_power.publish.card import check_license
from hf_power.publish.push import Publisher, warn
from hf_power.publish.remote import explain, is_passing
from hf_power.records.errors import UserError

CHECKPOINTS = {HubStrategy.CHECKPOINT: "last", HubStrategy.ALL_CHECKPOINTS: "all"}


class PushGuard(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """TrainingArguments' push_to_hub with its four strategies, verified.

    ==================  ==============================================================================================
    hub_strategy        what is pushed
    ==================  ==============================================================================================
    end                 the finished model, to main (or hub_revision)
    every_save          the model at each save too
    checkpoint          and the last checkpoint, to last-checkpoint/
    all_checkpoints     as every_save, and each checkpoint on a branch of its own, such as trunk-2.1B-tokens
    ==================  ==============================================================================================

    A checkpoint is staged (hard links) before the training goes on and pushed from there, so it may be rotated away. A
    push that fails is reported at once and tried again at the next save and at the end. Without hub_always_push a model
    that still waits gives way to a newer one.

    Args:
        args: TrainingArguments; push_to_hub and hub_token are taken out of them, so that the Trainer neither pushes by
            itself nor stores the token.
        folder: the run folder.
        lineage: of the run.
        license: of the model.

    Raises:
        ValueError: no token, no licence, an impossible name, missing rights, or a repository that holds something else.
            A Hub that cannot be reached is reported, no more.
    """

    def __init__(self, args: Any, folder: Path, *, lineage: str, license: str | None) -> None:
        check_license(license)
        self.strategy, self.folder = HubStrategy(args.hub_strategy), folder
        self.publisher = Publisher(
            folder,
            args.hub_model_id or folder.name,
            lineage=lineage,
            checkpoints=CHECKPOINTS.get(self.strategy, "none"),
            license=license,
            private=args.hub_private_repo,
            token=args.hub_token,
            revision=args.hub_revision or "main",
            keep_waiting=args.hub_always_push,
        )
        args.push_to_hub, args.hub_token = False, None
        disable_progress_bars()  # of uploads; the training has one of its own
        try:
            self.publisher.open()
        except Exception as error:
            if not is_passing(error):
                raise UserError(f"{explain(error)}.") from error
            warn(f"{explain(error)}; the training goes on, and the push is tried again at each save and at the end")
        self._wake, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True, name="push")
        self._thread.start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stage what the strategy asks for and wake the thread."""
        if self.strategy == HubStrategy.END:
            return
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        try:
            if self.strategy == HubStrategy.ALL_CHECKPOINTS:
                self.publisher.stage_checkpoint(checkpoint)
            self.publisher.stage_model(checkpoint, None if self.strategy == HubStrategy.EVERY_SAVE else checkpoint)
        except Exception as error:  # a full disk, for example: the training is worth more than the push
            self.publisher.record_failure(checkpoint.name, error)
        self._wake.set()

    def finish(self) -> dict[str, Any]:
        """Stage the finished model, wait for the thread, and try once more what has failed.

        Returns:
            The content of push.json.
        """
        try:
            self.publisher.stage_run()
        except Exception as error:
            self.publisher.record_failure(self.folder.name, error)
        self._over = True
        self._wake.set()
        self._thread.join()
        return self.publisher.push_all()

    def _work(self) -> None:
        while not self._over:
            self._wake.wait()
            self._wake.clear()
            if not self._over:
                self.publisher.push_all()


def refuse_sharded(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Raise a ValueError for FSDP that saves shards, of which a push would contain no weights."""
    if plugin is not None and plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise UserError(
            f"push_to_hub needs whole weights, and FSDP is set to save {plugin.state_dict_type.name}: set "
            "fsdp_state_dict_type to FULL_STATE_DICT in the accelerate config, or leave push_to_hub out."
        )
