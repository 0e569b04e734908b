"""A model by its name, a folder on this disk or a repository of the Hub, and whether its files are whole."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import safetensors
from huggingface_hub import errors, snapshot_download

from hf_power.checkpoints.seal import MANIFEST, SAVING, problems, unfinished
from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.files import read_record, refuse_at_work, refuse_pointer
from hf_power.records.run import Model, Run

_WHOLE = "pass a folder that was saved whole"
_OF_A_MODEL = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")


@dataclass(frozen=True)
class _Config:
    """What is read of a model's config.json."""

    model_type: str


def find_model(model: str | os.PathLike[str]) -> tuple[Path, Model]:
    """A model's folder on this disk, downloaded from the Hub if it is none, and what a record says of it.

    The record has the name of the folder or repository, the revision (the commit; of the Hub only), the model_type, and
    of a run's weights the step and the tokens after which they were saved.

    Raises:
        UserError: a folder without config or weights, or in which a training is at work, weights that are not whole, or
            a checkpoint that is not as it was sealed.
        NotFoundError: neither a folder nor a repository that can be read; the sentence says which it is.
    """
    folder = Path(model).expanduser()
    if folder.is_file():
        raise UserError(
            f"{folder} is a file and no model: pass a finished run, one of its checkpoint-N folders, or an export."
        )
    if folder.is_dir():
        place = folder.resolve()
        name = f"{place.parent.name}/{place.name}" if place.name.startswith("checkpoint-") else place.name
        about: Model = {"name": name}
        refuse_at_work(
            folder, "wait for its end, or pass one of its checkpoint-N folders, because the model is made anew"
        )
        if (folder / SAVING).exists() and unfinished(folder):
            raise UserError(
                f"the saving of the checkpoint {folder} was not finished: wait for it, or take an earlier one."
            )
        if (folder / MANIFEST).exists() and (found := problems(folder)):
            raise UserError(f"the checkpoint {folder} cannot be used: {', '.join(found)}; take an earlier one.")
    else:
        folder = download(str(model))
        about = {"name": str(model), "revision": folder.name}
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise UserError(
            f"{model} is no model, config.json or the weights are missing: pass a finished run, one of its checkpoint-N "
            "folders, or an export."
        )
    check_weights(folder)
    refuse_pointer(folder / "config.json")
    try:
        about["model_type"] = read_record(folder / "config.json", _Config, schema=None).model_type
    except UserError as error:
        raise UserError(
            f"{folder / 'config.json'} is no config of a model: pass a folder that was saved whole."
        ) from error
    # Somebody else's run.json may lie beside a model from elsewhere.
    with contextlib.suppress(UserError):
        if (run := Run.load_if_there(folder)) is not None and run.tokens_seen:
            about |= {"weights_step": run.step_of_weights, "weights_tokens": run.tokens_of_weights}
    return folder, about


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the weight files one after another in the order of their names; for a single one, the Hub's own."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weights of a model folder, in the order of their names."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


class _Index(TypedDict, total=False):
    """The index of weights in several files: tensor -> file."""

    weight_map: dict[str, str]


def shards(folder: Path) -> list[Path]:
    """The files that the index of a model names; [] without an index.

    Raises:
        UserError: an index that cannot be read, or that names a file elsewhere.
        NotFoundError: a file that is not there.
    """
    # transformers takes whole weights before an index, and safetensors before torch's own files.
    whole, suffix = ("model", "safetensors") if list(folder.glob("*.safetensors")) else ("pytorch_model", "bin")
    index = folder / f"{whole}.{suffix}.index.json"
    if not index.exists() or (folder / f"{whole}.{suffix}").exists():
        return []
    content = read_record(index, _Index, schema=None, remedy=_WHOLE)
    names = sorted(set(content.get("weight_map", {}).values()))
    # An index from elsewhere could otherwise name any file of this machine.
    if beyond := next((name for name in names if Path(name).name != name), None):
        raise UserError(f"{index} names {shown(beyond)}, which is no file beside it: do not use the folder.")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise NotFoundError(f"{folder / missing[0]}, which {index.name} names, is not there: {_WHOLE}.")
    return [folder / name for name in names]


def check_weights(folder: Path) -> None:
    """Raise a UserError that names the weight file which is missing, cut, or a pointer of Git LFS."""
    for path in {*shards(folder), *weight_files(folder)}:
        refuse_pointer(path)
        if path.suffix == ".safetensors":
            try:
                with safetensors.safe_open(path, "pt"):
                    pass
            except safetensors.SafetensorError as error:
                raise UserError(f"{path} cannot be read as safetensors ({error}): {_WHOLE}.") from error


def download(name: str, files: Sequence[str] = _OF_A_MODEL) -> Path:
    """The folder with files of a Hub repository; a NotFoundError for one that is not there, gated, or out of reach."""
    try:
        # What lies in folders of a repository, such as older checkpoints, is not the model.
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except errors.HFValidationError as error:
        raise NotFoundError(f"there is no model at {name}: pass a folder, or a Hub repository.") from error
    except errors.GatedRepoError as error:
        raise NotFoundError(
            f"the Hub repository {name} is gated: ask for access on its page, then log in with hf auth login."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise NotFoundError(
            f"there is no folder {name}, and no Hub repository of that name that you may read: correct the name, or log "
            "in with hf auth login if it is private."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        raise NotFoundError(
            f"there is no folder {name}, and the Hub cannot be reached (or HF_HUB_OFFLINE is set) and has not been asked "
            "for it before: pass a folder, or connect to the Hub."
        ) from error
