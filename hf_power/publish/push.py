"""A run folder -> a repository of the Hub: what goes where, staged beside the run until the Hub is seen to hold it.

The finished model goes to main, checkpoints to branches named by phase and tokens. Everything that is to be pushed first
lies in RUN/.push/REVISION@STEP/, as hard links, so rotation cannot take it away, and goes when the push is verified.
"""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hf_power.checkpoints.seal import RUN_FILE, checkpoints, problems
from hf_power.export.export import EXPORT_FILE
from hf_power.publish.card import make_card, write_card
from hf_power.publish.remote import (
    LAST_CHECKPOINT,
    check_repo_id,
    client,
    explain,
    is_passing,
    mirror,
    open_repository,
    record,
    with_patience,
)
from hf_power.publish.staging import PRIVATE, TRAINING_STATE, branch_name, link_checkpoint, link_files
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.files import read_json, write_json
from hf_power.records.schema import PUSH, read_object

SCHEMA = 1
STAGING = ".push"
STATE_FILE = "push.json"
CHECKPOINTS = ("none", "last", "all")
DONE = ("verified", "kept")


def publish(
    folder: str | os.PathLike[str],
    repo_id: str | None = None,
    *,
    checkpoints: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
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
        The content of push.json; "complete" says whether everything was verified.

    Raises:
        ValueError, FileNotFoundError: bad input, nothing was sent.
    """
    folder = Path(folder)
    state = _state(folder)
    staged = any(Publisher.staged_in(folder))
    lineage = _check(folder, may_lack_weights=staged)
    repo_id = repo_id or state.get("repo")
    if repo_id is None:
        raise UserError(f"{folder} was not pushed before: name the repository, e.g. --repo user/{folder.name}.")
    publisher = Publisher(
        folder,
        repo_id,
        lineage=lineage,
        checkpoints=checkpoints or state.get("checkpoints", "none"),
        license=license or state.get("license"),
        private=private,
        overwrite=overwrite,
        revision=state.get("revision", "main"),
    )
    if _weights(folder):
        make_card(folder, license=publisher.license)  # a missing licence is said before anything is sent
        publisher.checkpoints()
    try:
        publisher.open()
    except Exception as error:
        if not is_passing(error):
            raise UserError(f"{explain(error)}.") from error
    if _weights(folder):
        publisher.stage_run()
    return publisher.push_all()


class Publisher:
    """Stages what a run is to push and pushes it; knows and writes push.json.

    Args:
        folder: the run folder.
        repo_id: with or without namespace.
        lineage: of the run, see run.json.
        checkpoints: see `publish`.
        license: of the model.
        private: for a new repository.
        overwrite: take a repository that holds something else.
        token: by default the one that was logged in with.
        revision: of the finished model.
        keep_waiting: push a model that still waits even if a newer one is staged.

    Raises:
        ValueError: an impossible name, no token, or the Hub is switched off.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        *,
        lineage: str,
        checkpoints: str = "none",
        license: str | None = None,
        private: bool | None = None,
        overwrite: bool = False,
        token: str | None = None,
        revision: str = "main",
        keep_waiting: bool = False,
    ) -> None:
        check_repo_id(repo_id)
        if checkpoints not in CHECKPOINTS:
            raise UserError(f"checkpoints must be one of {', '.join(CHECKPOINTS)}, got {checkpoints!r}.")
        self.api = client(token)
        self.folder, self.lineage, self.revision = folder, lineage, revision
        self.license, self.private, self.overwrite = license, private, overwrite
        self.keep_waiting = keep_waiting
        before = _state(folder)
        same = repo_id in (before.get("repo"), str(before.get("repo")).rpartition("/")[2])
        self.state: dict[str, Any] = {
            "schema": SCHEMA,
            "repo": repo_id,
            "revision": revision,
            "checkpoints": checkpoints,
            "license": license,
            "complete": False,
            "targets": {k: v for k, v in before["targets"].items() if v["status"] in DONE} if same else {},
        }
        self._opened = False
        self._lock, self._busy = threading.Condition(), ""
        for half in (folder / STAGING).glob(".*"):
            shutil.rmtree(half)

    @staticmethod
    def staged_in(folder: Path) -> list[Path]:
        """What waits in a run folder, checkpoints first, older ones first."""
        found = list((folder / STAGING).glob("[!.]*@*"))  # a dot: still being staged
        return sorted(found, key=lambda p: ("-tokens@" not in p.name, _step(p)))

    def open(self) -> None:
        """Create the repository unless it is there, once; see `hf_power.publish.remote.open_repository`."""
        if not self._opened:
            self.state["repo"] = open_repository(
                self.api, self.state["repo"], private=self.private, lineage=self.lineage, overwrite=self.overwrite
            )
            self._opened = True

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the folder that are to go up, newest first.

        Raises:
            ValueError: if one of them does not verify.
        """
        wanted = {"none": 0, "last": 1, "all": None}[self.state["checkpoints"]]
        found = checkpoints(self.folder)[:wanted]
        for checkpoint in found:
            if broken := problems(checkpoint):
                raise UserError(
                    f"{checkpoint} cannot be published: {', '.join(broken)}; remove it, or pass --checkpoints none."
                )
        return found

    def stage_run(self) -> None:
        """Stage the finished model and the checkpoints that go with it."""
        found = self.checkpoints()
        if self.state["checkpoints"] == "all":
            for checkpoint in found:
                self.stage_checkpoint(checkpoint)
        self.stage_model(self.folder, found[0] if found else None)

    def stage_model(self, source: Path, checkpoint: Path | None) -> None:
        """Stage the model of a folder for main.

        Args:
            source: run folder, export or checkpoint.
            checkpoint: the newest one that goes up: into last-checkpoint/, or named in the card if it has a branch.
        """
        run = read_json(source / RUN_FILE) or {}
        branch = None
        with self._staging(self.revision, run.get("steps", 0)) as target:
            link_files(source, target, (*PRIVATE, *TRAINING_STATE))
            if checkpoint is not None and self.state["checkpoints"] == "last":
                link_checkpoint(checkpoint, target / LAST_CHECKPOINT)
            elif checkpoint is not None:
                branch = branch_name(read_json(checkpoint / RUN_FILE) or {})
            write_card(target, license=self.license, repo_id=self.state["repo"], branch=branch)

    def stage_checkpoint(self, checkpoint: Path) -> None:
        """Stage a whole checkpoint for a branch of its own."""
        run = read_json(checkpoint / RUN_FILE) or {}
        branch = branch_name(run)
        with self._staging(branch, run["steps"]) as target:
            link_checkpoint(checkpoint, target)
            write_card(target, license=self.license, repo_id=self.state["repo"], branch=branch)

    def record_failure(self, name: str, error: Exception) -> None:
        """Report and record that something could not be staged."""
        with self._lock:
            self.state["targets"][name] = {"status": "failed", "error": f"could not be staged: {error}"}
        warn(f"{name} could not be staged ({error}); it is safe where it is, and the rest goes on")

    def push_all(self) -> dict[str, Any]:
        """Push all that is staged, each with several attempts; report and record what came of it.

        Returns:
            The content of push.json.
        """
        waiting = self.staged_in(self.folder)
        with self._lock:
            for staged in waiting:
                self.state["targets"][_revision(staged)] = {"step": _step(staged), "status": "waiting"}
        for staged in waiting:
            with self._lock:
                if not staged.exists():  # a newer one took its place
                    continue
                self._busy = staged.name
            try:
                if not self._push(staged):
                    break
            finally:
                with self._lock:
                    self._busy = ""
                    self._lock.notify_all()
        self._save()
        return self.state

    def _push(self, staged: Path) -> bool:
        """Whether it makes sense to go on with the next one."""
        revision = _revision(staged)
        entry: dict[str, Any] = {"step": _step(staged), "status": "waiting"}
        self.state["targets"][revision] = entry
        self._save()
        try:
            with_patience(lambda: self._mirror(staged, revision, entry), warn)
        except Exception as error:
            entry |= {"status": "failed", "error": explain(error)}
            warn(f"{self.state['repo']}@{revision} is not complete: {entry['error']}; everything is kept")
            self._save()
            return not is_passing(error)
        shutil.rmtree(staged)
        self._save()
        return True

    def _mirror(self, staged: Path, revision: str, entry: dict[str, Any]) -> None:
        self.open()
        ours = read_json(staged / RUN_FILE) or {}
        if revision == self.revision and ours.get("kind") == "pretrain" and not self.overwrite:
            theirs = record(self.api, self.state["repo"], RUN_FILE, revision) or {}
            if theirs.get("kind") == "anneal":
                entry |= {"status": "kept", "reason": "the repository holds an annealed model of this run"}
                return
        commit = mirror(self.api, self.state["repo"], revision, staged, _message(ours))
        sizes = [path.stat().st_size for path in staged.rglob("*") if path.is_file()]
        entry |= {"status": "verified", "commit": commit, "files": len(sizes), "bytes": sum(sizes)}

    def _save(self) -> None:
        with self._lock:
            states = {entry["status"] for entry in self.state["targets"].values()}
            self.state["complete"] = states <= set(DONE) and not self.staged_in(self.folder)
            write_json(self.folder / STATE_FILE, self.state)

    @contextlib.contextmanager
    def _staging(self, revision: str, step: int) -> Iterator[Path]:
        """An empty folder that becomes .push/REVISION@STEP, in the place of older ones that are not on their way."""
        name = quote(revision, safe="")
        half = self.folder / STAGING / f".{name}@{step}"
        half.mkdir(parents=True)
        try:
            yield half
        except BaseException:
            shutil.rmtree(half)
            raise
        whole = half.with_name(half.name[1:])
        with self._lock:
            self._lock.wait_for(lambda: self._busy != whole.name)
            for older in (self.folder / STAGING).glob(f"{name}@*"):
                if older == whole or not (older.name == self._busy or self.keep_waiting):
                    shutil.rmtree(older)
            half.rename(whole)


def report_text(folder: Path) -> tuple[str, bool]:
    """What came of the last push, for a person, and whether it is complete."""
    state = _state(folder)
    lines = []
    for revision, entry in state["targets"].items():
        size = f", {entry['files']} files, {entry['bytes']:,} bytes" if entry["status"] == "verified" else ""
        why = "".join(f": {entry[key]}" for key in ("error", "reason") if key in entry)
        lines.append(f"  {revision:<28} {entry['status']}{size}{why}")
    if state["complete"]:
        return "\n".join([f"{state['repo']}: complete; names, sizes and hashes checked", *lines]), True
    head = f"{state['repo']}: NOT complete; the model is safe in {folder}"
    return "\n".join([head, *lines, f"complete it with: hf-power publish {folder}"]), False


def warn(text: str) -> None:
    """Say something about the push, at once, beside the training's own output."""
    print(f"push: {text}", file=sys.stderr, flush=True)


def _state(folder: Path) -> dict[str, Any]:
    """push.json; {} before the first push."""
    path, parts = folder / STATE_FILE, ("repo", "complete", "targets")
    return read_object(path, PUSH, required=parts, remedy="delete it to push anew") if path.is_file() else {}


def _revision(staged: Path) -> str:
    return unquote(staged.name.rpartition("@")[0])


def _step(staged: Path) -> int:
    return int(staged.name.rpartition("@")[2])


def _check(folder: Path, may_lack_weights: bool) -> str:
    """The lineage of what is to be published, after every check that needs no network."""
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}: pass the output of pretrain, anneal or export.")
    known = read_json(folder / RUN_FILE) or read_json(folder / EXPORT_FILE)
    if not known or "lineage" not in known:
        raise UserError(
            f"{folder} is no run: it has neither {RUN_FILE} nor {EXPORT_FILE} of pretrain, anneal or export."
        )
    if folder.name.startswith("checkpoint-") and (found := problems(folder)):
        raise UserError(f"the checkpoint {folder} cannot be published: {', '.join(found)}; take an earlier one.")
    if not may_lack_weights and not _weights(folder):
        raise UserError(
            f"{folder} has no finished model: go on with its training, or publish one of its checkpoint folders."
        )
    return str(known["lineage"])


def _weights(folder: Path) -> list[Path]:
    return list(folder.glob("*.safetensors"))


def _message(run: dict[str, Any]) -> str:
    return f"{run['kind']}: {run['tokens_seen']:,} tokens, step {run['steps']}" if run else "export"
