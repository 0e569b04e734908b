"""Downstream tasks of lm-evaluation-harness, beside the held-out loss in eval.json: `Tasks` and `run_tasks`."""

import difflib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from accelerate import PartialState

from hf_power.checkpoints.locate import find_model, weights_sha256
from hf_power.evaluate.heldout import add_to_file, alone_at, check_options, output_path
from hf_power.records.errors import MissingPackageError, NotFoundError, UserError
from hf_power.records.machine import hardware, refuse_alone, versions
from hf_power.records.results import Evaluation
from hf_power.records.schema import Json

if TYPE_CHECKING:
    import torch
    from lm_eval.tasks import TaskManager

# The paper's mean of six, and its perplexity of WikiText. Its "ARC" is one number: which of the two sets it is, or their
# mean, is not stated, so both are run. Nor are shots, normalization of answers, or the WikiText split: compare with care.
PAPER_TASKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande", "wikitext")
# The further columns of its table of 3B models. minerva_math needs lm_eval[math]; humaneval and mbpp run code that the
# model wrote, and need HF_ALLOW_CODE_EVAL=1 as consent.
PAPER_GENERATION_TASKS = ("gsm8k", "minerva_math", "humaneval", "mbpp", "mmlu")
NAMED_TASKS = {"paper": PAPER_TASKS, "paper-generation": PAPER_GENERATION_TASKS}


Scores = dict[str, dict[str, float]]  # task -> metric -> value, with "num_samples"
# What lm_eval gives for each of its tasks and groups; the value of a metric may also be a text, "N/A".
_Results = TypedDict(
    "_Results",
    {
        "results": dict[str, dict[str, object]],
        "n-samples": dict[str, dict[str, int]],
        "n-shot": dict[str, int],
        "versions": dict[str, float | str],
        "config": dict[str, object],
    },
)


@dataclass(frozen=True)
class Tasks:
    """Which questions are asked: names of tasks and groups of lm_eval, or one of NAMED_TASKS.

    The folder has YAML files of further tasks; data_files in them are relative to the working directory. `num_fewshot`
    are examples before each question, None for each task's own number. `limit` takes the first questions of each task,
    and a score with a limit is no result.
    """

    names: list[str] | str
    folder: str | os.PathLike[str] | None = None
    num_fewshot: int | None = None
    limit: int | None = None

    @property
    def single(self) -> list[str]:
        """The names one by one."""
        return list(NAMED_TASKS.get(self.names, (self.names,)) if isinstance(self.names, str) else self.names)


def run_tasks(
    model: str | os.PathLike[str],
    tasks: Tasks,
    *,
    batch_size: int = 8,
    dtype: str | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Scores:
    """Run tasks of lm-evaluation-harness on a causal language model, and add them to its eval.json.

    Under accelerate, on any number of processes, each holds the whole model and takes its share of the questions.

    Args:
        model: folder of a model (run, checkpoint, export), or a Hub repository.
        tasks: see `Tasks`.
        batch_size: questions per process and step, >= 1.
        dtype: one of `hf_power.evaluate.results.DTYPES`; None for the one that the weights were saved in.
        output: JSON file to write; by default eval.json in the folder. Its metrics, and tasks that are not run again,
            stay if they are of the same weights.

    Returns:
        {task: {metric: value, "num_samples"}}, what is under "tasks" in the file; {} on every process but the first.

    Raises:
        UserError: bad input, an unknown task, or a task whose data cannot be had, before the model is loaded; or
            lm_eval, or what a task needs besides, is missing.
    """
    _check(tasks, batch_size, dtype)
    state = PartialState()
    refuse_alone(state.num_processes)  # type: ignore[has-type]  # accelerate sets it where mypy does not see it.
    with state.main_process_first():
        folder, about = find_model(model)
    about["weights_sha256"] = weights_sha256(folder)
    path = output_path(folder, about, output)
    with state.main_process_first():
        manager, leaves = _load_tasks(tasks)
    import lm_eval  # It takes seconds to import, so that mistakes are told without it.

    with alone_at(path, state.is_main_process):
        start = time.perf_counter()
        results: _Results | None = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": dtype or "auto"},
            tasks=tasks.single,
            num_fewshot=tasks.num_fewshot,
            batch_size=batch_size,
            device=str(state.device),
            limit=tasks.limit,
            log_samples=False,
            task_manager=manager,
            confirm_run_unsafe_code=_may_run_code(),
        )
        if results is None:  # Only the first process gets them.
            return {}
        settings = _settings(results, tasks, batch_size, state)
        settings["seconds"] = round(time.perf_counter() - start, 3)
        scores = _scores(results, leaves)
        how = {task: {**_how(results, task), **settings} for task in scores}
        add_to_file(path, Evaluation(model=about, tasks=scores, tasks_settings=how))
        return scores


def _check(tasks: Tasks, batch_size: int, dtype: str | None) -> None:
    if not tasks.single:
        raise UserError(f"tasks is empty: name some, or one of {', '.join(NAMED_TASKS)}.")
    check_options({"batch_size": (batch_size, 1), "limit": (tasks.limit, 1)}, dtype)
    unsafe = [name for name in tasks.single if name.startswith(("humaneval", "mbpp"))]
    if unsafe and not _may_run_code():
        raise UserError(
            f"{unsafe[0]} runs code that the model wrote: set HF_ALLOW_CODE_EVAL=1 where that is safe, or leave it out."
        )


def _may_run_code() -> bool:
    # The name is that of the metric code_eval, which runs the code and asks for the same consent.
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"


def _load_tasks(tasks: Tasks) -> tuple["TaskManager", dict[str, list[str]]]:
    """The task manager, and for each name the single tasks that it stands for, with their data loaded."""
    if tasks.folder is not None and not Path(tasks.folder).is_dir():
        raise NotFoundError(f"tasks_dir must be a folder with YAML files, got {tasks.folder}: check the path.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackageError(
            'lm_eval is needed for tasks and not installed: run pip install "hf_power[eval]".'
        ) from error
    manager = TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))
    leaves: dict[str, list[str]] = {}
    for name in tasks.single:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}" if near else "see `lm-eval ls tasks`, or pass tasks_dir"
            raise UserError(f"there is no task {name!r}: {hint}.")
        parts = _parts(manager, name)
        for other, others in leaves.items():
            if both := set(parts) & set(others):
                raise UserError(f"the task {min(both)} is in {other} and in {name}: leave one of them out.")
        leaves[name] = parts
    return manager, leaves


def _parts(manager: "TaskManager", name: str) -> list[str]:
    """The single tasks of a task or group, with their data loaded."""
    try:
        return list(manager.load([name])["tasks"])
    except ImportError as error:
        raise MissingPackageError(
            f"the task {name} needs a package that is missing ({error.name}): install it."
        ) from error
    except OSError as error:  # There is no connection, no such file, or no such repository.
        raise NotFoundError(
            f"the data of the task {name} cannot be had ({type(error).__name__}): connect to the Hub, or run it once "
            "with a connection to keep them in the cache."
        ) from error


def _scores(results: _Results, leaves: dict[str, list[str]]) -> Scores:
    """{task: {metric: value, "num_samples"}}: of a group its mean where it defines one, else each of its tasks."""
    scores: Scores = {}
    for name, parts in leaves.items():
        for task in [name] if _metrics(results, name) else parts:
            counted = parts if task == name else [task]
            samples = sum(results["n-samples"][part]["effective"] for part in counted)
            scores[task] = _metrics(results, task) | {"num_samples": samples}
    return scores


def _metrics(results: _Results, name: str) -> dict[str, float]:
    """The numbers among a task's results; lm_eval's "metric,filter" without a filter that is called none."""
    found = results["results"].get(name, {}).items()
    return {key.removesuffix(",none"): float(v) for key, v in found if "," in key and isinstance(v, int | float)}


def _settings(results: _Results, tasks: Tasks, batch_size: int, state: PartialState) -> dict[str, Json]:
    """How all tasks were run."""
    import lm_eval

    processes = state.num_processes  # type: ignore[has-type]  # accelerate sets it where mypy does not see it.
    return {
        "limit": tasks.limit,
        "batch_size": batch_size,
        "dtype": str(results["config"]["model_dtype"]).removeprefix("torch."),
        "versions": {**versions(), "lm_eval": lm_eval.__version__},
        "hardware": cast("dict[str, Json]", hardware(cast("torch.device", state.device), processes)),
    }


def _how(results: _Results, task: str) -> dict[str, Json]:
    """How a task was run, as far as it may be another way than the others."""
    return {"num_fewshot": results["n-shot"].get(task), "task_version": str(results["versions"].get(task))}
