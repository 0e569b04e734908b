"""Pictures of results: each function returns a matplotlib Figure, and `figures.save` writes it.

All of them raise `MissingPackageError` where matplotlib is not installed.

* figures.py: what every picture is made with (`save`, `require_matplotlib`).
* cells.py: a sweep's cells (`plot_cells`). law.py: a fitted law (`plot_law`, `plot_map`). curves.py: loss curves (`plot_curves`).
* schedule.py: a schedule before its run (`plot_schedule`).
* runs.py: a planned run (`plot_plan`), a run (`plot_lr_and_loss`). coordinates.py: muP's check (`plot_coord_check`).
"""

from typing import TYPE_CHECKING

from hf_power.records.exports import lazily

if TYPE_CHECKING:
    from hf_power.plots.cells import plot_cells
    from hf_power.plots.coordinates import plot_coord_check
    from hf_power.plots.figures import save
    from hf_power.plots.law import plot_law, plot_map
    from hf_power.plots.runs import plot_lr_and_loss, plot_plan
    from hf_power.plots.schedule import plot_schedule

__all__ = [
    "plot_cells",
    "plot_coord_check",
    "plot_law",
    "plot_lr_and_loss",
    "plot_map",
    "plot_plan",
    "plot_schedule",
    "save",
]

__getattr__ = lazily(
    __name__,
    {
        "plot_cells": "plots.cells",
        "plot_coord_check": "plots.coordinates",
        "plot_law": "plots.law",
        "plot_lr_and_loss": "plots.runs",
        "plot_map": "plots.law",
        "plot_plan": "plots.runs",
        "plot_schedule": "plots.schedule",
        "save": "plots.figures",
    },
)
