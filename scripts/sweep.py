"""Train a grid of small models: accelerate launch scripts/sweep.py GRID.yaml --output_dir runs/sweep [--dry_run].

`hf-power sweep` does the same: the body of main is the same there, and the arguments are read in one place.
"""

import sys

from hf_power.cli import run_verb
from hf_power.cli.arguments import ExitCode, SweepArguments, ending
from hf_power.records.rows import ROWS_FILE
from hf_power.sweep.cost import cost_text, estimate, estimate_text
from hf_power.sweep.grid import load_grid
from hf_power.sweep.run import aim_text, rows_text, run_sweep


def main(arguments: SweepArguments) -> int:
    """Train a grid of small models: sweep GRID.yaml --output_dir runs/sweep [--dry_run]."""
    grid, aim = load_grid(arguments.grid), arguments.aim()
    if arguments.dry_run:
        print(estimate_text(estimate(grid, arguments.output_dir, arguments.workers)))
        print(ending(f"hf-power sweep {arguments.grid} --output_dir {arguments.output_dir}"))
        return ExitCode.DONE
    print(cost_text(grid, aim), flush=True)
    rows = run_sweep(grid, arguments.output_dir, workers=arguments.workers, aim=aim)
    print(rows_text(rows) if aim is None else f"{aim_text(grid, rows, aim)}\n{rows_text(rows)}")
    print(ending(f"hf-power fit {arguments.output_dir}", f"{arguments.output_dir}/{ROWS_FILE}"))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb("sweep", function=main))
