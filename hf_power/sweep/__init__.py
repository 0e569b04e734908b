"""A grid of small models, trained side by side: measurements of the learning rate, one row for each run.

grid.py      what is to be trained, and its YAML: Grid, load_grid, few_digits
jobs.py      which runs come next, at which learning rates: Group, Job, groups_of, next_job, row_settings, rate_factors
stacked.py   models of one shape computed as one, and their batches: stack, SweepData, BlocksOfSeeds
ensemble.py  models that take their optimizer steps together: Ensemble
trunks.py    from a job to its rows, one ensemble after another: prepare, run_group, run_job
crew.py      who trains them side by side, and the progress bar: Crew
aim.py       the rate that a sweep is to find out: Aim
interval.py  how well it is known, and what further runs are expected to add: Known
choice.py    which runs tell most about it: next_answer
run.py       the whole sweep, which a killed one goes on with: run_sweep, rows_text, aim_text
cost.py      what a sweep will cost, from a short measurement: estimate
"""

from typing import TYPE_CHECKING

from hf_power.records.exports import lazily

if TYPE_CHECKING:
    from hf_power.records.sweep import Sweep
    from hf_power.sweep.aim import Aim
    from hf_power.sweep.cost import estimate
    from hf_power.sweep.grid import Grid, load_grid
    from hf_power.sweep.run import run_sweep

__all__ = ["Aim", "Grid", "Sweep", "estimate", "load_grid", "run_sweep"]

__getattr__ = lazily(
    __name__,
    {
        "Aim": "sweep.aim",
        "Grid": "sweep.grid",
        "Sweep": "records.sweep",
        "estimate": "sweep.cost",
        "load_grid": "sweep.grid",
        "run_sweep": "sweep.run",
    },
)
