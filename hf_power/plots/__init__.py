"""Pictures of results: each function returns a matplotlib Figure, and `figures.save` writes it.

All of them raise `MissingPackageError` where matplotlib is not installed.

* figures.py: what every picture is made with (`save`, `require_matplotlib`).
* cells.py: a sweep's cells (`plot_cells`). law.py: a fitted law (`plot_law`, `plot_map`). curves.py: loss curves (`plot_curves`).
* schedule.py: a schedule before its run (`plot_schedule`).
* runs.py: a planned run (`plot_plan`), a run (`plot_lr_and_loss`), muP's check (`plot_coord_check`).
"""
