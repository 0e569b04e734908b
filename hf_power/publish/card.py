"""The model card: a pure function of run.json, recipe.json, eval.json, export.json, config.json and the files beside them.

A number that is in none of them, and does not follow from them by a formula written here, cannot be in a card.
"""

import json
import math
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig

from hf_power.checkpoints.locate import weight_files, weights_sha256
from hf_power.checkpoints.seal import RUN_FILE
from hf_power.data.text import PYTHON_STDLIB
from hf_power.evaluate.heldout import EVAL_FILE
from hf_power.export.export import EXPORT_FILE
from hf_power.models import count_parameters
from hf_power.publish.markdown import (
    Facts,
    as_markdown,
    heading_text,
    is_local_path,
    known_facts,
    public_text,
    safe_text,
)
from hf_power.recipe import FILE_NAME as RECIPE_FILE
from hf_power.recipe import Recipe, warnings_for
from hf_power.records.errors import NotFoundError, UserError, refused_by, shown
from hf_power.records.files import replaced
from hf_power.records.schema import read_object
from hf_power.schedule import TOKENS_PER_BETA

SCHEMA = 1
CARD_FILE = "README.md"
TEMPLATE = Path(__file__).parent / "templates" / "card.md"
FAMILIES = ("granite", "granitemoe", "llama", "mixtral")  # whose parameters `count_parameters` can count
PAPER = Recipe()
TUNED = ("a", "b", "batch_exponent", "max_lr")
VALIDITY = ("widths", "tokens_per_step", "tokens")
METRICS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy of the next token",
}

_EMPTY_SECTION = re.compile(r"^## .*\n+(?=## )", re.MULTILINE)
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def make_card(
    folder: str | os.PathLike[str], *, license: str | None = None, repo_id: str | None = None, branch: str | None = None
) -> ModelCard:
    """The card of a run, checkpoint or export: what it is, how it was made, what it can do, how far to trust it.

    Whatever a file does not say is left out with its line or section; so is an eval.json of other weights. Numbers have
    4 significant digits. Derived ones: beta = tokens_per_step / 4096, perplexity = exp(loss), training FLOPs =
    flops_per_token * tokens_seen, tokens per second = tokens_seen / train_seconds, tokens per parameter = tokens_seen /
    active parameters, passes over the data = tokens_seen / train_tokens, the parameter counts of config.json, and the
    factors of `hf_power.recipe.warnings_for`.

    Args:
        folder: output of pretrain, anneal or export, or a checkpoint-N folder.
        license: its identifier on the Hub; by default that of the run's settings.
        repo_id: user/name to load the model from; by default the folder's name.
        branch: of that repository, where the folder lies if it is a checkpoint, otherwise where a checkpoint of its run
            lies that can be annealed.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder is no run and no export, a file is not JSON of schema 1, or there is no licence.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}: pass the output of pretrain, anneal or export.")
    run, export = _read(folder / RUN_FILE), _read(folder / EXPORT_FILE)
    if not run and not export:
        raise UserError(
            f"{folder} is no run: it has neither {RUN_FILE} nor {EXPORT_FILE}, so pass the output of pretrain, anneal or "
            "export."
        )
    found = Facts(
        run=run,
        export=export,
        evaluation=_evaluation(folder),
        recipe=_read(folder / RECIPE_FILE),
        config=_read(folder / "config.json", schema=None),
    )
    license = check_license(license or run["settings"]["run"]["license"])
    files = {path.name for path in folder.iterdir()}
    repo = repo_id or folder.resolve().name
    found["derived"] = _derived(found, _counts(folder, found["config"]))
    card_data = _card_data(found, license, repo.rpartition("/")[2])
    with refused_by(f"the records of {folder}"):
        card: ModelCard = ModelCard.from_template(
            card_data,
            template_path=str(TEMPLATE),
            **as_markdown(found),
            title=heading_text(repo.rpartition("/")[2]),
            license=license,
            repo=json.dumps(repo),
            branch=json.dumps(branch) if branch else "",
            metric_names=METRICS,
            stage=_stage(run["schedule"], run["tokens_seen"] or 0),
            dataset=_dataset_text(run["data"], run),
            eval_dataset=_dataset_text(found["evaluation"]["data"], run),
            is_local=_is_local(run["data"], run),
            beyond=_beyond(folder, found),
            by_hand=[
                f"`{name}`" for name in TUNED if run["schedule"].get(name, getattr(PAPER, name)) != getattr(PAPER, name)
            ],
            has_weights=bool(weight_files(folder)),
            has_tokenizer="tokenizer_config.json" in files,
            has_picture="lr_and_loss.png" in files,
            is_checkpoint="trainer_state.json" in files,
        )
    card.text = _EMPTY_SECTION.sub("", re.sub(r"\n{3,}", "\n\n", card.text))
    return card


def write_card(
    folder: str | os.PathLike[str], *, license: str | None = None, repo_id: str | None = None, branch: str | None = None
) -> Path:
    """Write the card of a folder as its README.md, see `make_card`, and return the path."""
    path = Path(folder) / CARD_FILE
    card = make_card(folder, license=license, repo_id=repo_id, branch=branch)
    with replaced(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8", newline="\n")
    return path


def check_license(name: Any) -> str:
    """The licence, if it can be an identifier of the Hub.

    Raises:
        ValueError: none is given, or it is malformed.
    """
    if not name:
        raise UserError("the licence of the model is missing: pass --license, or set run.license, e.g. apache-2.0.")
    if not isinstance(name, str) or not _LICENSE.fullmatch(name):
        raise UserError(
            f"license must be an identifier of the Hub such as apache-2.0, mit or other, got {shown(name)}."
        )
    return str(name)


def _read(path: Path, schema: int | None = SCHEMA) -> Facts:
    """The content of a JSON file; no facts if there is no such file."""
    return Facts(known_facts(read_object(path, schema=schema))) if path.is_file() else Facts()


def _evaluation(folder: Path) -> Facts:
    """eval.json; no facts if the folder's weights have changed since."""
    evaluation = _read(folder / EVAL_FILE)
    scored = evaluation["model"]["weights_sha256"]
    return Facts() if scored and scored != weights_sha256(folder) else evaluation


def _counts(folder: Path, config: Facts) -> dict[str, int]:
    if config["model_type"] not in FAMILIES:
        return {}
    with refused_by(str(folder / "config.json")):
        counts = count_parameters(AutoConfig.from_pretrained(folder))
    if counts["active_parameters"] == counts["parameters"]:
        del counts["active_parameters"]
    return counts


def _derived(found: Facts, counts: dict[str, int]) -> Facts:
    run, schedule = found["run"], found["run"]["schedule"]
    seen, loss = run["tokens_seen"], run["held_out_loss"]
    numbers = {
        "beta": _ratio(run["tokens_per_step"], TOKENS_PER_BETA),
        "critical_beta": _ratio(schedule["critical_batch_tokens"], TOKENS_PER_BETA),
        "perplexity": math.exp(loss) if loss and loss < 700 else None,  # 700: e**710 is no float
        "flops": float(run["flops_per_token"] * seen) if seen and run["flops_per_token"] else None,
        "tokens_per_second": _ratio(seen, run["train_seconds"]),
        "tokens_per_parameter": _ratio(seen, counts.get("active_parameters", counts.get("parameters"))),
        "passes": _ratio(seen, run["data"]["train_tokens"]),
    }
    return Facts(counts | {name: value for name, value in numbers.items() if value})


def _ratio(part: Any, whole: Any) -> float | None:
    return part / whole if part and whole else None


def _stage(schedule: Facts, tokens_seen: int) -> str:
    """trunk, decaying or decayed; empty under another schedule than power."""
    start = schedule["decay_start_tokens"] or math.inf
    if not schedule or not tokens_seen:
        return ""
    if tokens_seen <= start:
        return "trunk"
    return "decayed" if tokens_seen >= start + (schedule["decay_tokens"] or 0) else "decaying"


def _beyond(folder: Path, found: Facts) -> list[str] | None:
    """Where the run lies outside of what its recipe's fit has seen; None if that cannot be told."""
    if not found["recipe"]:
        return None
    recipe, run, width = Recipe.load(folder / RECIPE_FILE), found["run"], found["config"]["hidden_size"]
    tokens, per_step = run["tokens_seen"], run["tokens_per_step"]
    validity = [recipe.validity.get(name) for name in VALIDITY]
    if not (tokens and per_step and width and all(validity) and any(recipe.validity["widths"])):
        return None
    weight_decay = run["settings"]["training"].get("weight_decay")
    return warnings_for(recipe, tokens=tokens, tokens_per_step=per_step, width=width, weight_decay=weight_decay)


def _is_local(data: Facts, run: Facts) -> bool:
    """Whether a dataset lies on somebody's disk; eval.json only has the last part of its path."""
    name, trained_on = data["dataset"] or "", run["data"]
    if data["local"] or is_local_path(name):
        return True
    same = bool(name) and name == PurePosixPath(trained_on["dataset"] or "").name
    return same and data is not trained_on and _is_local(trained_on, run)


def _dataset_text(data: Facts, run: Facts) -> str:
    """A dataset as Markdown; empty if it is not known."""
    name = data["dataset"]
    if not name:
        return ""
    if _is_local(data, run):
        return "a local dataset"
    if name == PYTHON_STDLIB:
        return f"the sources of Python's standard library (`{PYTHON_STDLIB}`)"
    if _HUB_ID.fullmatch(name):
        return f"[`{name}`](https://huggingface.co/datasets/{name})"
    return as_markdown(name) or ""


def _card_data(found: Facts, license: str, name: str) -> ModelCardData:
    """The YAML header."""
    run, export, config = found["run"], found["export"], found["config"]
    dataset = run["data"]["dataset"] or ""
    is_hub_id = _HUB_ID.fullmatch(dataset) and not _is_local(run["data"], run)
    source = export["source"]["name"] or ""
    tags = ["hf_power", *(["power-scheduler"] if run["schedule"] else [])]
    tags += ["mup"] if config["mup"] or export else []
    tags += [config["model_type"]] if config["model_type"] else []
    tags += ["moe"] if config["num_local_experts"] else []
    results = _results(found)
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=[dataset] if is_hub_id else None,
        base_model=source if _HUB_ID.fullmatch(source) and not is_local_path(source) else None,
        model_name=(" ".join(name.split()) or "model") if results else None,
        eval_results=results or None,
    )


def _results(found: Facts) -> list[EvalResult]:
    """What the model-index says: held-out metrics, and those of every task."""
    run, evaluation = found["run"], found["evaluation"]
    metrics: dict[str, Any] = evaluation["metrics"]
    data = evaluation["data"] if metrics else run["data"]
    if not metrics:
        metrics = {"loss": run["held_out_loss"], "perplexity": found["derived"]["perplexity"]}
    name = "a local dataset" if _is_local(data, run) else public_text(data["dataset"])
    held_out = {
        "dataset_type": "local" if name == "a local dataset" else name or "unknown",
        "dataset_name": f"{name}, held-out part" if name else "held-out text",
        "dataset_config": public_text(data["config_name"]),
        "dataset_split": public_text(data["split"]),
    }
    rows = [(held_out, name, METRICS[name], metrics[name]) for name in METRICS if name in metrics]
    for task, values in evaluation["tasks"].items():
        where: dict[str, str | None] = {"dataset_type": safe_text(task), "dataset_name": safe_text(task)}
        scores = {
            safe_text(key): value for key, value in values.items() if key != "num_samples" and "stderr" not in key
        }
        rows += [(where, name.partition(",")[0], name, value) for name, value in scores.items()]
    return [
        EvalResult(task_type="text-generation", metric_type=kind, metric_name=name, metric_value=value, **where)
        for where, kind, name, value in rows
        if isinstance(value, int | float)
    ]
