"""A run folder -> a repository of the Hub: the verb `publish`, `report_text` of what came of it, and `PushGuard`.

The finished model goes to main, checkpoints to branches that are named by phase and tokens.
"""

import os
import threading
from pathlib import Path

from accelerate.utils import FullyShardedDataParallelPlugin
from huggingface_hub.utils import disable_progress_bars
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_power.checkpoints.locate import check_weights
from hf_power.checkpoints.seal import problems
from hf_power.publish.card import check_license, make_card
from hf_power.publish.publisher import Publisher, PushOptions, staged_in, warn
from hf_power.publish.remote import explain, is_passing
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.files import only_one, refuse_at_work
from hf_power.records.results import EXPORT_FILE, Export, Push
from hf_power.records.run import RUN_FILE, Run


def publish(
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    checkpoints: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
) -> Push:
    """Push a finished run, an exported model or a checkpoint, or complete a push that was not; see that it arrived.

    What the repository holds already, by size and hash, is not sent again.

    Args:
        folder: output of pretrain, anneal or export, or a checkpoint-N folder.
        repo_id: user/name; by default that of the folder's push.json.
        checkpoints: of a run: "none"; "last", into last-checkpoint/ on main; "all", each on a branch of its own such as
            trunk-2.1B-tokens. By default what push.json says, else none.
        license: of the model, e.g. "apache-2.0"; by default that of the run's settings or of push.json.
        private: for a new repository.
        overwrite: take a repository that holds something else.

    Returns:
        The content of push.json; `complete` says whether everything was verified.

    Raises:
        UserError: bad input, and nothing was sent.
    """
    folder = Path(folder)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise UserError(f"a launcher has started {started} processes, each of which would push: publish without it.")
    refuse_at_work(folder, "wait for its end, or publish one of its checkpoint-N folders")
    before = Push.load_if_there(folder)
    # What a killed run has staged can be pushed even if the run has no finished model yet.
    lineage = _check(folder, may_lack_weights=bool(staged_in(folder)))
    repo_id = repo_id or (before.repo if before else None)
    if repo_id is None:
        raise UserError(f"{folder} was not pushed before: name the repository, e.g. --repo user/{folder.name}.")
    options = PushOptions(
        repo_id,
        lineage,
        checkpoints=checkpoints or (before and before.checkpoints) or "none",
        license=license or (before.license if before else None),
        private=private,
        overwrite=overwrite,
        revision=(before and before.revision) or "main",
    )
    with only_one(folder):
        return _published(folder, options)


def _published(folder: Path, options: PushOptions) -> Push:
    """What came of the push, while nothing else is at work in the folder."""
    publisher = Publisher(folder, options)
    if _weights(folder):
        # A missing licence and a damaged checkpoint are said before anything is sent.
        make_card(folder, license=options.license)
        publisher.checkpoints()
    # A Hub that is down for the moment is no reason to stop: what is staged is tried below, and kept if that fails too.
    try:
        publisher.open()
    except Exception as error:
        if not is_passing(error):
            raise UserError(f"{explain(error)}.") from error
    if _weights(folder):
        publisher.stage_run()
    return publisher.push_all()


def report_text(folder: Path) -> tuple[str, bool]:
    """What came of the last push, for a person, and whether it is complete; a NotFoundError without push.json."""
    state = Push.load_if_there(folder)
    if state is None:
        raise NotFoundError(f"{folder} was not pushed before: give the command hf-power publish {folder}.")
    lines = []
    for revision, target in state.targets.items():
        size = "" if target.bytes is None else f", {target.files} files, {target.bytes:,} bytes"
        why = "".join(f": {text}" for text in (target.error, target.reason) if text is not None)
        lines.append(f"  {revision:<28} {target.status}{size}{why}")
    if state.complete:
        return "\n".join([f"{state.repo}: complete; names, sizes and hashes checked", *lines]), True
    head = f"{state.repo}: NOT complete; the model is safe in {folder}"
    return "\n".join([head, *lines, f"complete it with: hf-power publish {folder}"]), False


def _check(folder: Path, may_lack_weights: bool) -> str:
    """The lineage of what is to be published, after every check that needs no network."""
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}: pass the output of pretrain, anneal or export.")
    known = Run.load_if_there(folder) or Export.load_if_there(folder)
    if known is None or known.lineage is None:
        raise UserError(
            f"{folder} is no run: it has neither {RUN_FILE} nor {EXPORT_FILE} of pretrain, anneal or export."
        )
    if folder.name.startswith("checkpoint-") and (found := problems(folder)):
        raise UserError(f"the checkpoint {folder} cannot be published: {', '.join(found)}; take an earlier one.")
    if not may_lack_weights and not _weights(folder):
        raise UserError(
            f"{folder} has no finished model: go on with its training, or publish one of its checkpoint folders."
        )
    check_weights(folder)
    return known.lineage


def _weights(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


CHECKPOINTS = {HubStrategy.CHECKPOINT: "last", HubStrategy.ALL_CHECKPOINTS: "all"}


class PushGuard(TrainerCallback):
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
        UserError: no token, no licence, an impossible name, missing rights, or a repository that holds something else.
            A Hub that cannot be reached is reported, no more.
    """

    def __init__(self, args: TrainingArguments, folder: Path, *, lineage: str, license: str | None) -> None:
        check_license(license)
        self.strategy, self.folder = HubStrategy(args.hub_strategy), folder
        options = PushOptions(
            args.hub_model_id or folder.name,
            lineage,
            checkpoints=CHECKPOINTS.get(self.strategy, "none"),
            license=license,
            private=args.hub_private_repo,
            revision=args.hub_revision or "main",
            keep_waiting=args.hub_always_push,
        )
        self.publisher = Publisher(folder, options, args.hub_token)
        # The Trainer must not push as well, and it would write the token into training_args.bin.
        args.push_to_hub, args.hub_token = False, None
        # Bars of uploads would be drawn across the training's own.
        disable_progress_bars()
        try:
            self.publisher.open()
        except Exception as error:
            if not is_passing(error):
                raise UserError(f"{explain(error)}.") from error
            warn(f"{explain(error)}; the training goes on, and the push is tried again at each save and at the end")
        # A daemon, so that a training that ends with an error does not wait for a slow upload.
        self._wake, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True, name="push")
        self._thread.start()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Stage what the strategy asks for and wake the thread."""
        if self.strategy == HubStrategy.END:
            return
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        try:
            if self.strategy == HubStrategy.ALL_CHECKPOINTS:
                self.publisher.stage_checkpoint(checkpoint)
            self.publisher.stage_model(checkpoint, None if self.strategy == HubStrategy.EVERY_SAVE else checkpoint)
        except Exception as error:  # Whatever it is, a full disk for example: the training is worth more than the push.
            self.publisher.record_failure(checkpoint.name, error)
        self._wake.set()

    def finish(self) -> Push:
        """Stage the finished model, wait for the thread, try once more what has failed; gives push.json's content."""
        try:
            self.publisher.stage_run()
        except Exception as error:
            self.publisher.record_failure(self.folder.name, error)
        self._over = True
        self._wake.set()
        self._thread.join()
        # Whatever the thread could not push is tried once more, now that nothing else is left to do.
        return self.publisher.push_all()

    def _work(self) -> None:
        while not self._over:
            self._wake.wait()
            self._wake.clear()
            if not self._over:
                self.publisher.push_all()


def refuse_sharded(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Raise a UserError for FSDP that saves shards, because a push of them would contain no weights."""
    if plugin is None:
        return
    # The plugin takes a text or the enumeration's member, and turns the text into a member when it is built.
    kind = getattr(plugin.state_dict_type, "name", plugin.state_dict_type)
    if kind != "FULL_STATE_DICT":
        raise UserError(
            f"push_to_hub needs whole weights, and FSDP is set to save {kind}: set fsdp_state_dict_type to "
            "FULL_STATE_DICT in the accelerate config, or leave push_to_hub out."
        )
