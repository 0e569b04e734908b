"""Measure a model on held-out text or on tasks: accelerate launch scripts/evaluate_model.py RUN [--tasks paper].

`hf-power evaluate` does the same: the body of main is the same there, and the arguments are read in one place.

Python puts the folder of a script first on its path. A script named evaluate.py would therefore hide the library `evaluate`.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import EvaluateArguments, ExitCode, ending, is_first_process
from hf_power.data.text import DataArguments
from hf_power.evaluate.heldout import evaluate_model, evaluation_text, scores_text, written_to
from hf_power.evaluate.tasks import NAMED_TASKS, Tasks, run_tasks
from hf_power.publish.card import card_command
from hf_power.settings.sections import parse_tokens


def main(arguments: EvaluateArguments, data: DataArguments) -> int:
    """Measure any checkpoint on held-out text, or on lm-evaluation-harness tasks: evaluate RUN [--tasks paper]."""
    if arguments.tasks is None:
        made = evaluate_model(
            arguments.model,
            data,
            batch_size=arguments.batch_size,
            max_tokens=None if arguments.max_tokens is None else parse_tokens(arguments.max_tokens, "--max_tokens"),
            dtype=arguments.dtype,
            output=arguments.output,
        )
        text = evaluation_text(made)
    else:
        names = arguments.tasks if arguments.tasks in NAMED_TASKS else arguments.tasks.split(",")
        scores = run_tasks(
            arguments.model,
            Tasks(names, arguments.tasks_dir, arguments.num_fewshot, arguments.limit),
            batch_size=arguments.batch_size,
            dtype=arguments.dtype,
            output=arguments.output,
        )
        text = scores_text(scores)
    if is_first_process():
        print(text)
        print(ending(card_command(arguments.model), written_to(arguments.model, arguments.output)))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb("evaluate", function=main))
