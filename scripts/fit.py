"""Fit the law to a sweep: python scripts/fit.py runs/sweep, or runs.csv --columns learning_rate=lr ...

`hf-power fit` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys
from pathlib import Path

from hf_power.cli import run_verb
from hf_power.cli.arguments import ExitCode, FitArguments
from hf_power.fit.report import fit_sweep


def main(arguments: FitArguments) -> int:
    """Fit the law to a sweep: fit runs/sweep; or to another tool's: fit runs.csv --columns learning_rate=lr ..."""
    text = fit_sweep(
        Path(arguments.sweep),
        Path(arguments.output_dir) if arguments.output_dir else None,
        schedule=arguments.schedule,
        batch_exponent=arguments.exponent(),
        critical_batch=arguments.most(),
        size=arguments.exponent_of(),
        elsewhere=arguments.elsewhere(),
        published=arguments.compare,
    )
    print(text)
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb("fit", function=main))
