"""What a run will do and cost, said before its first step.

* target.py: the run, its machine, and how it uses the memory there (`Target`, `Machine`, `Layout`).
* footprint.py: all bytes on a device (`footprint`), and those of a micro-step's activations (`activation_bytes`).
* loss.py: the loss at its end, with other batches (`planned_loss`).
* record.py: the content of plan.json (`Plan`), and a run on several numbers of devices (`scale_table`).
* plan.py: the recipe at a target (`make_plan`), and as text (`plan_text`, `describe_run`).
* report.py: from a recipe to a plan's files, with a picture (`plan_run`).
"""

from typing import TYPE_CHECKING

from hf_power.records.exports import lazily

if TYPE_CHECKING:
    from hf_power.plan.plan import make_plan
    from hf_power.plan.record import Plan
    from hf_power.plan.target import Machine, Target

__all__ = ["Machine", "Plan", "Target", "make_plan"]

__getattr__ = lazily(
    __name__,
    {
        "Machine": "plan.target",
        "Plan": "plan.record",
        "Target": "plan.target",
        "make_plan": "plan.plan",
    },
)
