"""Downstream tasks of lm-evaluation-harness, beside the held-out loss in eval.json."""

import difflib
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState

from hf_power.checkpoints.locate import find_model, weights_sha256
from hf_power.evaluate.heldout import DTYPES, SCHEMA, output_path, write_eval
from hf_power.records.errors import MissingPackageError, NotFoundError, UserError
from hf_power.records.machine import hardware, versions

# The paper's mean of six, and its perplexity of WikiText. Its "ARC" is one number: which of the two sets it is, or their
# mean, is not stated, so both are run. Nor are shots, normalization of answers, or the WikiText split: compare with care.
PAPER_TASKS = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "hellaswag",
    "openbookqa",
    "piqa",
    "winogrande",
    "wikitext",
)
# The further columns of its table of 3B models. minerva_math needs lm_eval[math]; humaneval and mbpp run code that the
# model wrote, and need HF_ALLOW_CODE_EVAL=1 as consent.
PAPER_GENERATION_TASKS = ("gsm8k", "minerva_math", "humaneval", "mbpp", "mmlu")
NAMED_TASKS = {"paper": PAPER_TASKS, "paper-generation": PAPER_GENERATION_TASKS}


def run_tasks(
    model: str | os.PathLike[str],
    tasks: list[str] | str,
    *,
    tasks_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    output: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a causal language model, and add them to its eval.json.

    Under accelerate, on any number of processes, each holds the whole model and takes its share of the questions.

    Args:
        model: folder of a model (run, checkpoint, export), or a Hub repository.
        tasks: names of tasks and groups of lm_eval, or "paper" or "paper-generation", see NAMED_TASKS.
        tasks_dir: folder with YAML files of further tasks; data_files in them are relative to the working directory.
        num_fewshot: examples before each question; None for each task's own number.
        limit: questions of each task, the first ones; None for all. A score with a limit is no result.
        batch_size: questions per process and step, >= 1.
        dtype: one of DTYPES of `hf_power.evaluate.heldout`; None for the one that the weights were saved in.
        output: JSON file to write; by default eval.json in the folder. Its metrics, and tasks that are not run again,
            stay if they are of the same weights.

    Returns:
        {task: {metric: value, "num_samples"}}, what is under "tasks" in the file; {} on every process but the first.

    Raises:
        ValueError, FileNotFoundError: bad input, an unknown task, or a task whose data cannot be had, before the model
            is loaded.
        ImportError: if lm_eval, or what a task needs besides, is missing.
    """
    names = list(NAMED_TASKS.get(tasks, (tasks,)) if isinstance(tasks, str) else tasks)
    _check(names, batch_size, limit, dtype)
    state = PartialState()
    with state.main_process_first():
        folder, about = find_model(model)
    about["weights_sha256"] = weights_sha256(folder)
    path = output_path(folder, about, output)
    with state.main_process_first():
        manager, leaves = _load_tasks(names, tasks_dir)
    import lm_eval

    start = time.perf_counter()
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": dtype or "auto"},
        tasks=names,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        device=str(state.device),
        limit=limit,
        log_samples=False,
        task_manager=manager,
        confirm_run_unsafe_code=_may_run_code(),
    )
    if results is None:  # another process has them
        return {}
    settings = {
        "limit": limit,
        "batch_size": batch_size,
        "dtype": str(results["config"]["model_dtype"]).removeprefix("torch."),
        "versions": versions() | {"lm_eval": lm_eval.__version__},
        "hardware": hardware(SimpleNamespace(device=state.device, world_size=state.num_processes)),
        "seconds": round(time.perf_counter() - start, 3),
    }
    scores, how = _scores(results, leaves), {}
    for task in scores:
        own = {"num_fewshot": results["n-shot"].get(task), "task_version": str(results["versions"].get(task))}
        how[task] = own | settings
    write_eval(path, {"schema": SCHEMA, "model": about, "tasks": scores, "tasks_settings": how})
    return scores


def _check(names: list[str], batch_size: int, limit: int | None, dtype: str | None) -> None:
    if not names:
        raise UserError(f"tasks is empty: name some, or one of {', '.join(NAMED_TASKS)}.")
    for what, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise UserError(f"{what} must be at least 1, got {value}: raise it.")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    unsafe = [name for name in names if name.startswith(("humaneval", "mbpp"))]
    if unsafe and not _may_run_code():
        raise UserError(
            f"{unsafe[0]} runs code that the model wrote: set HF_ALLOW_CODE_EVAL=1 where that is safe, or leave it out."
        )


def _may_run_code() -> bool:
    return os.environ.get("HF_ALLOW_CODE_EVAL") == "1"


def _load_tasks(names: list[str], tasks_dir: str | os.PathLike[str] | None) -> tuple[Any, dict[str, list[str]]]:
    """The task manager, and for each name the single tasks that it stands for, with their data loaded."""
    if tasks_dir is not None and not Path(tasks_dir).is_dir():
        raise NotFoundError(f"tasks_dir must be a folder with YAML files, got {tasks_dir}: check the path.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackageError(
            'lm_eval is needed for tasks and not installed: run pip install "hf_power[eval]".'
        ) from error
    manager = TaskManager(include_path=None if tasks_dir is None else str(tasks_dir))
    leaves: dict[str, list[str]] = {}
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}" if near else "see `lm-eval ls tasks`, or pass tasks_dir"
            raise UserError(f"there is no task {name!r}: {hint}.")
        try:
            parts = list(manager.load([name])["tasks"])
        except ImportError as error:
            raise MissingPackageError(
                f"the task {name} needs a package that is missing ({error.name}): install it."
            ) from error
        except OSError as error:  # of a connection, of a file, of a repository
            raise NotFoundError(
                f"the data of the task {name} cannot be had ({type(error).__name__}): connect to the Hub, or run it once "
                "with a connection to keep them in the cache."
            ) from error
        for other, others in leaves.items():
            if both := set(parts) & set(others):
                raise UserError(f"the task {min(both)} is in {other} and in {name}: leave one of them out.")
        leaves[name] = parts
    return manager, leaves


def _scores(results: dict[str, Any], leaves: dict[str, list[str]]) -> dict[str, Any]:
    """{task: {metric: value, "num_samples"}}: of a group its mean where it defines one, else each of its tasks."""
    scores = {}
    for name, parts in leaves.items():
        for task in [name] if _metrics(results, name) else parts:
            counted = parts if task == name else [task]
            samples = sum(results["n-samples"][part]["effective"] for part in counted)
            scores[task] = _metrics(results, task) | {"num_samples": samples}
    return scores


def _metrics(results: dict[str, Any], name: str) -> dict[str, float]:
    """The numbers among a task's results; lm_eval's "metric,filter" without a filter that is called none."""
    found = results["results"].get(name, {}).items()
    return {key.removesuffix(",none"): float(v) for key, v in found if "," in key and isinstance(v, int | float)}
