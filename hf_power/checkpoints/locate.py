"""A model by its name: a folder on this disk, or a repository of the Hub."""

import hashlib
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hf_power.checkpoints.seal import MANIFEST, problems
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.schema import read_object


def find_model(model: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """A model's folder on this disk, downloaded from the Hub if it is none, and what a record says of it.

    Args:
        model: folder, or Hub repository.

    Returns:
        The folder, and {"name": of the folder or repository, "revision": commit (Hub only), "model_type"}.

    Raises:
        ValueError: a folder without config or weights, or a checkpoint that is not as it was sealed.
        FileNotFoundError: neither a folder nor a repository that can be read; the sentence says which it is.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        place = folder.resolve()
        name = f"{place.parent.name}/{place.name}" if place.name.startswith("checkpoint-") else place.name
        about = {"name": name}
        if (folder / MANIFEST).exists() and (found := problems(folder)):
            raise UserError(f"the checkpoint {folder} cannot be used: {', '.join(found)}; take an earlier one.")
    else:
        folder = _download(str(model))
        about = {"name": str(model), "revision": folder.name}
    if not (folder / "config.json").is_file() or not weight_files(folder):
        raise UserError(
            f"{model} is no model, config.json or the weights are missing: pass a finished run, one of its checkpoint-N "
            "folders, or an export."
        )
    try:
        config = {"model_type": (str, None)}
        raw = read_object(folder / "config.json", config, schema=None, required=("model_type",))
        about["model_type"] = raw["model_type"]
    except UserError as error:
        raise UserError(
            f"{folder / 'config.json'} is no config of a model: pass a folder that was saved whole."
        ) from error
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


def _download(name: str) -> Path:
    patterns = {"allow_patterns": ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"], "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, **patterns))
    except HFValidationError as error:
        raise NotFoundError(f"there is no model at {name}: pass a folder, or a Hub repository.") from error
    except GatedRepoError as error:
        raise NotFoundError(
            f"the Hub repository {name} is gated: ask for access on its page, then log in with hf auth login."
        ) from error
    except RepositoryNotFoundError as error:
        raise NotFoundError(
            f"there is no folder {name}, and no Hub repository of that name that you may read: correct the name, or log "
            "in with hf auth login if it is private."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise NotFoundError(
            f"there is no folder {name}, and the Hub cannot be reached (or HF_HUB_OFFLINE is set) and has not been asked "
            "for it before: pass a folder, or connect to the Hub."
        ) from error
