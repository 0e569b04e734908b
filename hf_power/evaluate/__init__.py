"""Held-out losses and downstream tasks of any causal language model.

heldout.py   `evaluate_model`: loss, perplexity, accuracy and bits per byte of packed text; `add_to_file` of eval.json.
tasks.py     `run_tasks`: tasks of lm-evaluation-harness, named by `Tasks`.
metrics/     the metric as a module for `evaluate.load`, and the bytes that tokens stand for.
"""

from typing import TYPE_CHECKING

from hf_power.records.exports import lazily

if TYPE_CHECKING:
    from hf_power.evaluate.heldout import evaluate_model
    from hf_power.evaluate.tasks import Tasks, run_tasks

__all__ = ["Tasks", "evaluate_model", "run_tasks"]

__getattr__ = lazily(
    __name__,
    {
        "Tasks": "evaluate.tasks",
        "evaluate_model": "evaluate.heldout",
        "run_tasks": "evaluate.tasks",
    },
)
