"""What the big run will do: python scripts/plan.py RECIPE.json --tokens 1T --tokens_per_step 4M --parameters 3.5B.

`hf-power plan` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import ExitCode, PlanArguments
from hf_power.plan.report import plan_run


def main(arguments: PlanArguments) -> int:
    """What the big run will do: plan RECIPE.json --tokens 1T --tokens_per_step 4M --parameters 3.5B."""
    text = plan_run(
        arguments.recipe,
        tokens=arguments.tokens,
        tokens_per_step=arguments.tokens_per_step,
        target=arguments.target,
        parameters=arguments.parameters,
        block_size=arguments.block_size,
        devices=arguments.devices,
        flops_per_device=arguments.flops_per_device,
        utilisation=arguments.utilisation,
        output_dir=arguments.output_dir,
    )
    print(text)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb("plan", function=main))
