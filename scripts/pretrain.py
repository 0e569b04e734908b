"""Train a model from scratch: accelerate launch scripts/pretrain.py SETTINGS.yaml [--key value ...].

`hf-power pretrain` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import ExitCode, ending, is_first_process, print_push, run_text
from hf_power.pretrain.run import pretrain
from hf_power.settings.settings import Settings


def main(settings: Settings) -> int:
    """Train a model from scratch: pretrain SETTINGS.yaml [--key value ...]."""
    # The run takes the push out of its arguments, so that the Trainer does not push as well.
    pushes = settings.training.push_to_hub
    run = pretrain(settings)
    if not is_first_process():
        return ExitCode.DONE
    folder = settings.training.output_dir or ""
    print(run_text(run))
    print(ending(f"hf-power evaluate {folder}", folder))
    return print_push(folder) if pushes else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb("pretrain", function=main))
