"""Finish a model from a checkpoint: accelerate launch scripts/anneal.py --from RUN/checkpoint-N --tokens 10%.

`hf-power anneal` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import AnnealArguments, ExitCode, ending, is_first_process, print_push, run_text
from hf_power.pretrain.anneal import anneal


def main(arguments: AnnealArguments) -> int:
    """Finish a model from any trunk checkpoint: anneal --from RUN/checkpoint-N --tokens 10%."""
    run = anneal(
        arguments.checkpoint,
        arguments.tokens,
        arguments.output_dir,
        decay_shape=arguments.decay_shape,
        repo=arguments.repo,
        dataset=arguments.dataset,
        resume_from_checkpoint=arguments.resume_from_checkpoint,
    )
    if not is_first_process():
        return ExitCode.DONE
    folder = arguments.folder(run.name)
    print(run_text(run))
    print(ending(f"hf-power evaluate {folder}", folder))
    return print_push(folder) if arguments.repo else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb("anneal", function=main))
