"""What waits in a run folder to be pushed, and the one that stages and pushes it: `PushOptions`, `Publisher`, `staged_in`.

Everything that is to be pushed first lies in RUN/.push/REVISION@STEP/, as hard links, so that the rotation of checkpoints
cannot take it away. It goes when the Hub is seen to hold it.
"""

import contextlib
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote, unquote

from hf_power.checkpoints.seal import checkpoints, problems
from hf_power.publish import remote
from hf_power.publish.card import write_card
from hf_power.publish.sources import PRIVATE, TRAINING_STATE, branch_name, link_checkpoint, link_files
from hf_power.records.errors import UserError
from hf_power.records.results import Push, Target
from hf_power.records.run import RUN_FILE, Run

STAGING = ".push"
CHECKPOINTS: dict[str, int | None] = {"none": 0, "last": 1, "all": None}  # how many of the newest go up
DONE = ("verified", "kept")


@dataclass(frozen=True)
class PushOptions:
    """What of a run goes to which repository of the Hub, named with or without the namespace.

    Attributes:
        checkpoints: "none"; "last", into last-checkpoint/ on the model's own branch; "all", each on one of its own.
        private: for a new repository; None means the default of the user or the organization.
        overwrite: take a repository that holds something else.
        revision: of the finished model.
        keep_waiting: push a model that still waits even if a newer one is staged.
    """

    repo: str
    lineage: str
    checkpoints: str = "none"
    license: str | None = None
    private: bool | None = None
    overwrite: bool = False
    revision: str = "main"
    keep_waiting: bool = False

    def __post_init__(self) -> None:
        remote.check_repo_id(self.repo)
        if self.checkpoints not in CHECKPOINTS:
            raise UserError(f"checkpoints must be one of {', '.join(CHECKPOINTS)}, got {self.checkpoints!r}.")


class Publisher:
    """Stages what a run is to push and pushes it; it alone writes push.json.

    One thread may stage while another one pushes. The token, by default the one that was logged in with, is no part of
    the options, so that no record and no error sentence can hold it. Without one, with the Hub switched off, or with a
    push.json that cannot be read it raises a UserError.
    """

    def __init__(self, folder: Path, options: PushOptions, token: str | None = None) -> None:
        self.api = remote.client(token)
        self.folder, self.options = folder, options
        before = Push.load_if_there(folder)
        # push.json has the full name, and an option of `TrainingArguments` often has the name without its namespace.
        same = before is not None and options.repo in (before.repo, before.repo.rpartition("/")[2])
        kept = before.targets if before is not None and same else {}
        self.state = Push(
            repo=options.repo,
            revision=options.revision,
            checkpoints=options.checkpoints,
            license=options.license,
            complete=False,
            targets={name: target for name, target in kept.items() if target.status in DONE},
        )
        self._opened = False
        # The name of the staged folder that is on its way, "" for none. The lock also guards the state.
        self._lock, self._busy = threading.Condition(), ""
        # A process that was killed while it staged leaves a half of it.
        for half in (folder / STAGING).glob(".*"):
            shutil.rmtree(half)

    def open(self) -> None:
        """Create the repository unless it is there, once; see `hf_power.publish.remote.open_repository`."""
        if not self._opened:
            full = remote.open_repository(
                self.api,
                self.state.repo,
                private=self.options.private,
                lineage=self.options.lineage,
                overwrite=self.options.overwrite,
            )
            with self._lock:
                self.state = replace(self.state, repo=full)
            self._opened = True

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the folder that are to go up, newest first; a UserError if one is not as it was sealed."""
        found = checkpoints(self.folder)[: CHECKPOINTS[self.options.checkpoints]]
        for checkpoint in found:
            if broken := problems(checkpoint):
                raise UserError(
                    f"{checkpoint} cannot be published: {', '.join(broken)}; remove it, or pass --checkpoints none."
                )
        return found

    def stage_run(self) -> None:
        """Stage the finished model and the checkpoints that go with it."""
        found = self.checkpoints()
        # Checkpoints go first: the card of the model names the branch of the newest one.
        if self.options.checkpoints == "all":
            for checkpoint in found:
                self.stage_checkpoint(checkpoint)
        self.stage_model(self.folder, found[0] if found else None)

    def stage_model(self, source: Path, checkpoint: Path | None) -> None:
        """Stage the model of a run folder, export or checkpoint for the branch of the finished model.

        The checkpoint, the newest one that goes up, goes into last-checkpoint/, or is named in the card if it has a
        branch.
        """
        run = Run.load_if_there(source)
        branch = None
        with self._staging(self.options.revision, run.step_of_weights if run else 0) as target:
            link_files(source, target, (*PRIVATE, *TRAINING_STATE))
            if checkpoint is not None and self.options.checkpoints == "last":
                link_checkpoint(checkpoint, target / remote.LAST_CHECKPOINT)
            elif checkpoint is not None:
                branch = branch_name(Run.load(checkpoint))
            write_card(target, license=self.options.license, repo_id=self.state.repo, branch=branch)

    def stage_checkpoint(self, checkpoint: Path) -> None:
        """Stage a whole checkpoint for a branch of its own."""
        run = Run.load(checkpoint)
        branch = branch_name(run)
        with self._staging(branch, run.steps) as target:
            link_checkpoint(checkpoint, target)
            write_card(target, license=self.options.license, repo_id=self.state.repo, branch=branch)

    def record_failure(self, name: str, error: Exception) -> None:
        """Report and record that something could not be staged."""
        self._record(name, Target(status="failed", error=f"could not be staged: {error}"))
        warn(f"{name} could not be staged ({error}); it is safe where it is, and the rest goes on")

    def push_all(self) -> Push:
        """Push all that is staged, each with several attempts; report and record what came of it in push.json."""
        waiting = staged_in(self.folder)
        for staged in waiting:
            self._record(_revision(staged), Target(step=_step(staged)))
        for staged in waiting:
            with self._lock:
                if not staged.exists():  # A newer one took its place in the meantime.
                    continue
                self._busy = staged.name
            try:
                if not self._push(staged):  # The Hub is not there, so that the others would only wait in vain.
                    break
            finally:
                with self._lock:
                    self._busy = ""
                    self._lock.notify_all()
        self._save()
        return self.state

    def _push(self, staged: Path) -> bool:
        """Push one staged folder; whether it makes sense to go on with the next one."""
        revision, waiting = _revision(staged), Target(step=_step(staged))
        self._record(revision, waiting)
        self._save()
        try:
            target = remote.with_patience(lambda: self._mirror(staged, revision, waiting), warn)
        except Exception as error:
            target = replace(waiting, status="failed", error=remote.explain(error))
            warn(f"{self.state.repo}@{revision} is not complete: {target.error}; everything is kept")
            self._record(revision, target)
            self._save()
            return not remote.is_passing(error)
        self._record(revision, target)
        # Only now may it go, because the Hub was seen to hold it.
        shutil.rmtree(staged)
        self._save()
        return True

    def _mirror(self, staged: Path, revision: str, waiting: Target) -> Target:
        """One attempt to bring a staged folder to the Hub, and what came of it."""
        self.open()
        ours = Run.load_if_there(staged)
        # A trunk that is published after its annealed model must not take that one's place.
        if revision == self.options.revision and ours and ours.kind == "pretrain" and not self.options.overwrite:
            theirs = remote.record(self.api, self.state.repo, RUN_FILE, revision) or {}
            if theirs.get("kind") == "anneal":
                return replace(waiting, status="kept", reason="the repository holds an annealed model of this run")
        commit = remote.mirror(self.api, self.state.repo, revision, staged, _message(ours))
        sizes = [path.stat().st_size for path in staged.rglob("*") if path.is_file()]
        return replace(waiting, status="verified", commit=commit, files=len(sizes), bytes=sum(sizes))

    def _record(self, name: str, target: Target) -> None:
        with self._lock:
            self.state = replace(self.state, targets={**self.state.targets, name: target})

    def _save(self) -> None:
        with self._lock:
            done = all(target.status in DONE for target in self.state.targets.values())
            self.state = replace(self.state, complete=done and not staged_in(self.folder))
            self.state.save(self.folder)

    @contextlib.contextmanager
    def _staging(self, revision: str, step: int) -> Iterator[Path]:
        """An empty folder that becomes .push/REVISION@STEP, in the place of older ones that are not on their way."""
        # A branch may have slashes in its name, which a folder may not.
        name = quote(revision, safe="")
        half = self.folder / STAGING / f".{name}@{step}"
        half.mkdir(parents=True)
        try:
            yield half
        except BaseException:
            shutil.rmtree(half)
            raise
        whole = half.with_name(half.name[1:])
        # The thread that pushes reads the folder of that name, which must not change under it.
        with self._lock:
            self._lock.wait_for(lambda: self._busy != whole.name)
            for older in (self.folder / STAGING).glob(f"{name}@*"):
                if older == whole or not (older.name == self._busy or self.options.keep_waiting):
                    shutil.rmtree(older)
            half.rename(whole)


def staged_in(folder: Path) -> list[Path]:
    """What waits in a run folder, checkpoints first, older ones first."""
    found = list((folder / STAGING).glob("[!.]*@*"))  # A name that begins with a dot is still being staged.
    return sorted(found, key=lambda p: ("-tokens@" not in p.name, _step(p)))


def warn(text: str) -> None:
    """Say something about the push, at once, beside the training's own output."""
    print(f"push: {text}", file=sys.stderr, flush=True)


def _revision(staged: Path) -> str:
    return unquote(staged.name.rpartition("@")[0])


def _step(staged: Path) -> int:
    return int(staged.name.rpartition("@")[2])


def _message(run: Run | None) -> str:
    """Of the commit."""
    return f"{run.kind}: {run.tokens_of_weights:,} tokens, step {run.step_of_weights}" if run else "export"
