"""The model card: a pure function of run.json, recipe.json, eval.json, export.json, config.json and the files beside them.

A number that is in none of them, and does not follow from them by a formula written here, cannot be in a card.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_power.checkpoints.locate import weight_files
from hf_power.data.text import PYTHON_STDLIB
from hf_power.models import NUM_EXPERTS, count_parameters
from hf_power.mup.rules import RECORD
from hf_power.publish.sources import (
    Facts,
    Sources,
    as_code,
    facts_as_markdown,
    heading_text,
    is_local_path,
    known_facts,
    public_text,
    read_sources,
    safe_text,
)
from hf_power.recipe import Recipe, warnings_for
from hf_power.records.errors import UserError, refused_by, shown
from hf_power.records.files import replaced
from hf_power.records.run import Data, Run
from hf_power.schedule import TOKENS_PER_BETA

METRICS = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy of the next token",
}

# user/name; a relative folder of a local dataset may look the same, so that `is_local` is asked as well.
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def check_license(name: object) -> str:
    """The licence; a UserError if none is given or it cannot be an identifier of the Hub."""
    if not name:
        raise UserError("the licence of the model is missing: pass --license, or set run.license, e.g. apache-2.0.")
    if not isinstance(name, str) or not _LICENSE.fullmatch(name):
        raise UserError(
            f"license must be an identifier of the Hub such as apache-2.0, mit or other, got {shown(name)}."
        )
    return name


def card_command(model: str) -> str:
    """The command line that makes the card of a model, with a place for the licence where its record has none."""
    run = Run.load_if_there(Path(model))
    return f"hf-power card {model}" + ("" if run and run.license else " --license LICENSE")


def card_data(sources: Sources, license: str, name: str, perplexity: float | None) -> ModelCardData:
    """The YAML header; the perplexity of the run's own held-out loss is for a model that has no eval.json."""
    run, config = sources.run, sources.config
    data: Data = run.data or {}
    dataset = data.get("dataset") or ""
    is_hub_id = _HUB_ID.fullmatch(dataset) and not is_local(data, run)
    source = sources.export.source.get("name") or ""
    is_muped = config.get("mup") or config.get(RECORD) or sources.export.to
    tags = ["hf_power", *(["power-scheduler"] if run.schedule else []), *(["mup"] if is_muped else [])]
    tags += [str(config["model_type"])] if config.get("model_type") else []
    tags += ["moe"] if any(config.get(name) for name in NUM_EXPERTS) else []
    results = _results(sources, perplexity)
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


def dataset_text(data: Data, run: Run) -> str:
    """A dataset as Markdown; empty if it is not known."""
    name = data.get("dataset")
    if not name:
        return ""
    if is_local(data, run):
        return "a local dataset"
    if name == PYTHON_STDLIB:
        return f"the sources of Python's standard library (`{PYTHON_STDLIB}`)"
    if _HUB_ID.fullmatch(name):
        return f"[`{name}`](https://huggingface.co/datasets/{name})"
    return as_code(name) or ""


def is_local(data: Data, run: Run) -> bool:
    """Whether a dataset lies on somebody's disk; eval.json only has the last part of its path."""
    name, trained_on = data.get("dataset") or "", run.data or {}
    if data.get("local") or is_local_path(name):
        return True
    # eval.json names the last part of a local path only, which the run's record can still tell.
    same = bool(name) and name == PurePosixPath(trained_on.get("dataset") or "").name
    return same and data is not trained_on and is_local(trained_on, run)


class _Place(NamedTuple):
    """What a result was measured on."""

    type: str
    name: str
    config: str | None = None
    split: str | None = None

    def result(self, kind: str, name: str, value: float) -> EvalResult:
        return EvalResult(
            task_type="text-generation",
            dataset_type=self.type,
            dataset_name=self.name,
            dataset_config=self.config,
            dataset_split=self.split,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )


def _results(sources: Sources, perplexity: float | None) -> list[EvalResult]:
    """What the model-index says: held-out metrics, and those of every task."""
    run, evaluation = sources.run, sources.evaluation
    metrics: Mapping[str, float | None] = evaluation.metrics or {}
    data = (evaluation.data if metrics else run.data) or {}
    # The run's own loss is of its held-out text, and stands in where nobody has evaluated the model.
    if not metrics:
        metrics = {"loss": run.held_out_loss, "perplexity": perplexity}
    name = "a local dataset" if is_local(data, run) else public_text(data.get("dataset"))
    held_out = _Place(
        "local" if name == "a local dataset" else name or "unknown",
        f"{name}, held-out part" if name else "held-out text",
        public_text(data.get("config_name")),
        public_text(data.get("split")),
    )
    rows = [(held_out, kind, what, metrics.get(kind)) for kind, what in METRICS.items()]
    for task, values in (evaluation.tasks or {}).items():
        # A standard error is no metric, and the Hub would list it as one.
        place = _Place(safe_text(task), safe_text(task))
        scores = {
            safe_text(key): value for key, value in values.items() if key != "num_samples" and "stderr" not in key
        }
        rows += [(place, what.partition(",")[0], what, value) for what, value in scores.items()]
    return [
        place.result(kind, what, value)
        for place, kind, what, value in rows
        if value is not None and math.isfinite(value)
    ]


CARD_FILE = "README.md"
EVIDENCE_FILE = "evidence.html"
TEMPLATE = Path(__file__).parent / "templates" / "card.md"
PAPER = Recipe()
TUNED = ("a", "b", "batch_exponent", "max_lr")

# A heading whose lines were all left out, because no file said anything for them.
_EMPTY_SECTION = re.compile(r"^## .*\n+(?=## )", re.MULTILINE)


def make_card(
    folder: str | os.PathLike[str], *, license: str | None = None, repo_id: str | None = None, branch: str | None = None
) -> ModelCard:
    """The card of a run, checkpoint or export: what it is, how it was made, what it can do, how far to trust it.

    Whatever a file does not say is left out with its line or section; so is an eval.json of other weights. Numbers have
    4 significant digits. Derived ones: beta = tokens_per_step / 4096, perplexity = exp(loss), training FLOPs =
    flops_per_token * tokens_seen, tokens per second = tokens_seen / train_seconds, tokens per parameter = weights_tokens /
    active parameters, passes over the data = weights_tokens / train_tokens, the parameter counts of config.json, and the
    factors of `hf_power.recipe.warnings_for`.

    Args:
        folder: output of pretrain, anneal or export, or a checkpoint-N folder.
        license: its identifier on the Hub; by default that of the run's settings.
        repo_id: user/name to load the model from; by default the folder's name.
        branch: of that repository, where the folder lies if it is a checkpoint, otherwise where a checkpoint of its run
            lies that can be annealed.

    Raises:
        UserError: there is no such folder, it is no run and no export, a file is not JSON of schema 1, or there is no
            licence.
    """
    folder = Path(folder)
    sources = read_sources(folder)
    license = check_license(license or sources.run.license)
    repo = repo_id or folder.resolve().name
    name = repo.rpartition("/")[2]
    derived = _derived(sources, _counts(folder, sources.config))
    data = card_data(sources, license, name, derived.get("perplexity"))
    context: dict[str, object] = {
        **facts_as_markdown({**sources.facts, "derived": known_facts(derived)}),
        **_texts(folder, sources),
        "title": heading_text(name),
        "license": license,
        "repo": json.dumps(repo),
        "branch": json.dumps(branch) if branch else "",
    }
    # Values that no template can show, and a header that the Hub would refuse, come from the files.
    with refused_by(f"the records of {folder}"):
        card: ModelCard = ModelCard.from_template(data, str(TEMPLATE), None, **context)
    # The template leaves gaps where it leaves something out.
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


def _texts(folder: Path, sources: Sources) -> dict[str, object]:
    """What the template shows beside the facts of the files."""
    run, schedule = sources.run, sources.facts["run"].part("schedule")
    files = {path.name for path in folder.iterdir()}
    by_hand = [name for name in TUNED if schedule.get(name, getattr(PAPER, name)) != getattr(PAPER, name)]
    return {
        "metric_names": METRICS,
        "stage": run.stage,
        "dataset": dataset_text(run.data or {}, run),
        "eval_dataset": dataset_text(sources.evaluation.data or {}, run),
        "is_local": is_local(run.data or {}, run),
        "beyond": _beyond(sources),
        "by_hand": [f"`{name}`" for name in by_hand],
        "has_weights": bool(weight_files(folder)),
        "has_tokenizer": "tokenizer_config.json" in files,
        "has_picture": "lr_and_loss.png" in files,
        "has_evidence": EVIDENCE_FILE in files,
        "is_checkpoint": "trainer_state.json" in files,
    }


def _counts(folder: Path, config: Facts) -> dict[str, int]:
    if str(config.get("model_type")) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return {}
    with refused_by(str(folder / "config.json")):
        counts = count_parameters(AutoConfig.from_pretrained(folder))
    # A dense model has no line of its own for them.
    if counts["active_parameters"] == counts["parameters"]:
        del counts["active_parameters"]
    return counts


def _derived(sources: Sources, counts: dict[str, int]) -> dict[str, float]:
    """The numbers that follow from those of the files; what cannot be told, or is 0, is left out."""
    run, schedule, data = sources.run, sources.run.schedule or {}, sources.run.data or {}
    seen, loss = run.tokens_of_weights, run.held_out_loss
    numbers = {
        **counts,
        "beta": _ratio(run.tokens_per_step, TOKENS_PER_BETA),
        "critical_beta": _ratio(schedule.get("critical_batch_tokens"), TOKENS_PER_BETA),
        "perplexity": math.exp(loss) if loss and loss < 700 else None,  # Python's floats end at exp(709).
        "flops": float((run.flops_per_token or 0) * run.tokens_seen),
        "tokens_per_second": _ratio(run.tokens_seen, run.train_seconds),
        "tokens_per_parameter": _ratio(seen, counts.get("active_parameters", counts.get("parameters"))),
        "passes": _ratio(seen, data.get("train_tokens")),
    }
    return {name: value for name, value in numbers.items() if value}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None


def _beyond(sources: Sources) -> list[str] | None:
    """Where the run lies outside of what its recipe's fit has seen; None if that cannot be told."""
    recipe, run, width = sources.recipe, sources.run, sources.config.get("hidden_size")
    if recipe is None or not isinstance(width, int):
        return None
    seen = [recipe.validity.get(name) for name in ("widths", "tokens_per_step", "tokens")]
    # A sweep from elsewhere that does not tell its widths has zeros for them.
    if not (run.tokens_seen and run.tokens_per_step and width and all(seen) and any(recipe.validity["widths"])):
        return None
    # Of the facts, because a record may hold NaN, which differs from any recipe's.
    weight_decay = sources.facts["run"].part("settings").part("training").get("weight_decay")
    return warnings_for(
        recipe,
        tokens=run.tokens_of_weights,
        tokens_per_step=run.tokens_per_step,
        width=width,
        weight_decay=weight_decay if isinstance(weight_decay, int | float) else None,
    )
