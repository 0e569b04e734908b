"""From the rows of a sweep to the law of the optimal learning rate.

* rows.py: runs from elsewhere (`read_csv`), and whether runs may be fitted together (`check_one_source`).
* result.py: a cell of a sweep and its optimum (`Cell`), and the content of fit.json (`Fit`).
* cells.py: the parabola of each cell (`fit_cells`).
* law.py: weighted least squares, the critical batch, and a bootstrap of all of it (`FittedLaw`).
* validity.py: what cells must have to carry a law, what follows from a law, and how far it may be trusted.
* fit.py: all of it in turn (`fit_law`, `fit_laws`), and Power's own scale (`fit_power`).
* report.py: from files to files, with pictures (`fit_sweep`), and to text (`fit_text`).
"""
