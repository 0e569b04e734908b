"""A task of four lines of text on the disk."""

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def prompt(line, task_name=None):
    return Doc(task_name=task_name, query=line["text"][:40], choices=[line["text"][40:60], " zz"], gold_index=0)


TASKS_TABLE = [
    LightevalTaskConfig(
        name="tiny",
        prompt_function=prompt,
        hf_repo="text",
        hf_subset="default",
        hf_avail_splits=["train"],
        evaluation_splits=["train"],
        metrics=[Metrics.loglikelihood_acc],
    )
]
