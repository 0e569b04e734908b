"""A repository of the Hub: may we write there, and is what lies there what lies here?"""

import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import huggingface_hub as hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hf_power.records.errors import UserError
from hf_power.records.files import git_blob_id, read_json, sha256
from hf_power.records.schema import Json

# Seconds to wait before the second and before the third attempt; the client adds waits of its own within each of them.
WAITS = (5.0, 20.0)
# A request that brings no byte for so many seconds is given up. Left alone, the client would wait for ever.
SILENCE = 60.0
# HTTP statuses of a trouble that may have passed at the next attempt.
LATER = frozenset({408, 409, 412, 429, 500, 502, 503, 504})
# What the Hub itself puts into a new repository.
UNTOUCHED = frozenset({".gitattributes"})
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
LAST_CHECKPOINT = "last-checkpoint/"
Result = TypeVar("Result")


class IncompletePushError(RuntimeError):
    """The Hub took an upload without an error, and holds something else than was sent."""


def client(token: str | None = None) -> HfApi:
    """The Hub's client with a token; a UserError if there is none, or the Hub is switched off."""
    if constants.is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or leave push_to_hub out.")
    token = token or hub.get_token()
    if not token:
        raise UserError(
            "there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    session = hub.get_session()  # It is shared by the whole process; a timeout that somebody has set is left alone.
    if session.timeout.read is None:
        session.timeout = SILENCE
    return HfApi(token=token)


def check_repo_id(repo_id: str) -> None:
    """Raise a UserError unless it can be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(
            f"{repo_id!r} cannot be the name of a repository: pass user/name or organization/name, of letters, digits, "
            "'-', '_' and '.'."
        ) from error


def open_repository(api: HfApi, repo_id: str, *, private: bool | None, lineage: str, overwrite: bool) -> str:
    """Create the repository unless it exists, see that this run may write there, and return its full name.

    A repository whose run.json has the lineage of the run is the run's own. One that holds something else is a
    UserError unless it may be overwritten; for what the client raises, see `explain` and `is_passing`.
    """
    full = str(api.create_repo(repo_id, private=private, exist_ok=True).repo_id)
    # create_repo says nothing where the repository exists and the token may only read.
    api.auth_check(full, write=True)
    names = {file.path for file in _tree(api, full, "main")}
    if overwrite or names <= UNTOUCHED or (record(api, full, "run.json") or {}).get("lineage") == lineage:
        return full
    raise UserError(
        f"the repository {full} holds something else already ({len(names)} files, {sorted(names - UNTOUCHED)[0]} among "
        "them): pass another name, or --overwrite to replace it."
    )


def record(api: HfApi, repo_id: str, name: str, revision: str = "main") -> dict[str, Json] | None:
    """The content of a JSON file of the repository; None if there is no such file."""
    if not api.file_exists(repo_id, name, revision=revision):
        return None
    path = hub.hf_hub_download(repo_id, name, revision=revision, token=api.token, endpoint=api.endpoint)
    return read_json(Path(path))


def mirror(api: HfApi, repo_id: str, revision: str, folder: Path, message: str) -> str:
    """Make a revision hold the files of a folder, in one commit, check that it does, and return that commit.

    What is there already, by size and hash, is not sent. Other files of the revision stay, but for weights and a
    last-checkpoint of an earlier upload, which would be loaded beside, or instead of, today's. A missing branch is made
    from the repository's first commit. Other names, sizes or hashes after the upload are an IncompletePushError.
    """
    # This is the first question to the Hub, so that one that is down is noticed before any file is hashed.
    branches = {branch.name for branch in api.list_repo_refs(repo_id).branches}
    if revision not in branches:
        # From the first commit and not from main, whose weights a checkpoint's branch must not hold.
        first = api.list_repo_commits(repo_id)[-1].commit_id
        api.create_branch(repo_id, branch=revision, revision=first, exist_ok=True)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    missing, surplus = _differences(api, repo_id, revision, files)
    if missing or surplus:
        add = [hub.CommitOperationAdd(name, files[name]) for name in missing]
        delete = [hub.CommitOperationDelete(name) for name in surplus]
        api.create_commit(repo_id, [*add, *delete], commit_message=message, revision=revision)
        # An upload may arrive cut although no error was reported, so that the Hub is asked again what it holds.
        missing, surplus = _differences(api, repo_id, revision, files)
        if missing or surplus:
            raise IncompletePushError(
                f"{', '.join([*missing, *surplus])} of {repo_id}@{revision} differ from what was sent, though the Hub "
                "reported no error"
            )
    return str(api.repo_info(repo_id, revision=revision).sha)


def with_patience(attempt: Callable[[], Result], report: Callable[[str], None]) -> Result:
    """Call until it succeeds, fails for good, or the attempts (one more than WAITS) are used up."""
    for wait in WAITS:
        try:
            return attempt()
        except Exception as error:
            if not is_passing(error):
                raise
            report(f"{explain(error)} (again in {wait:g} s)")
            time.sleep(wait)
    return attempt()


def is_passing(error: BaseException) -> bool:
    """Whether a later attempt may succeed: no connection, a server's error, or an upload that did not arrive whole."""
    if isinstance(error, IncompletePushError):
        return True
    if (status := _status(error)) is not None:
        return status in LATER
    return any(isinstance(e, OSError | HTTPError) for e in _causes(error))


def explain(error: BaseException) -> str:
    """What went wrong at the Hub, in one sentence without a full stop, and what to do where something can be done."""
    status, text = _status(error), " ".join(str(error).split())
    if isinstance(error, IncompletePushError | ValueError) and status is None:
        return text.rstrip(".")
    if isinstance(error, GatedRepoError):
        return "the repository is gated: ask its owner for access"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub refused the token (401): log in again with `hf auth login`, or set HF_TOKEN to a valid one"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or the token may not see it ({status}): check name and token"
    if status is None and is_passing(error):
        return f"the Hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})"
    said = getattr(error, "server_message", None) or text
    if status in (402, 403, 413):
        return f"the Hub refused the upload ({status}): {said[:200].rstrip('.')}"
    return f"the Hub failed ({status or type(error).__name__}): {said[:200].rstrip('.')}"


def _differences(api: HfApi, repo_id: str, revision: str, files: dict[str, Path]) -> tuple[list[str], list[str]]:
    """Names that the revision lacks or holds with other content, and names that it should not hold."""
    there = {file.path: file for file in _tree(api, repo_id, revision)}
    missing = [name for name, path in files.items() if not _same(path, there.get(name))]
    return missing, [name for name in there if name not in files and _is_stale(name)]


def _is_stale(name: str) -> bool:
    return name.startswith(LAST_CHECKPOINT) or ("/" not in name and any(fnmatch(name, weights) for weights in WEIGHTS))


def _same(path: Path, file: RepoFile | None) -> bool:
    """Whether size and hash agree: the SHA-256 of a large file, git's own id of a small one."""
    if file is None or file.size != path.stat().st_size:
        return False
    return sha256(path) == file.lfs.sha256 if file.lfs else git_blob_id(path) == file.blob_id


def _tree(api: HfApi, repo_id: str, revision: str) -> list[RepoFile]:
    """The files of a revision, without its folders."""
    return [
        item for item in api.list_repo_tree(repo_id, recursive=True, revision=revision) if isinstance(item, RepoFile)
    ]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, which the client wraps in others."""
    responses = (getattr(e, "response", None) for e in _causes(error))
    return next((int(r.status_code) for r in responses if r is not None and hasattr(r, "status_code")), None)
