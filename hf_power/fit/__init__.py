"""From the rows of a sweep to the law of the optimal learning rate.

* table.py, elsewhere.py, units.py: the rows of a CSV (`read_csv`), as trackers and spreadsheets write them, in their units.
* rows.py: which rows make a cell and have diverged, and whether they may be fitted together (`check_one_source`).
* result.py: a cell of a sweep and its optimum (`Cell`), and the content of fit.json (`Fit`).
* cells.py: the U-curve of each cell (`fit_cells`); skew.py: whether its flanks differ (`fit_skew`); optima.py: the optima in
  log2.
* squares.py: weighted least squares and intervals.
* form.py: which form of the law left-out cells support (`choose_form`); law.py: the law of a form (`FittedLaw`).
* misfit.py: where a law fails within its own cells, in words.
* validity.py: what cells must have to carry a law, what follows from a law, and how far it may be trusted.
* forecast.py: from the cells to the loss of a larger run (`fit_forecast`).
* curve.py: a loss curve and its schedule (`read_curve`, `longer`, `with_tail`).
* curves.py: from loss curves to that of another schedule (`fit_curves`).
* curve_report.py: the same from files to text and files (`forecast_curves`).
* fit.py: all of it in turn (`fit_law`, `fit_laws`), and Power's own scale (`fit_power`).
* published.py: laws of others, and what they cost on the cells (`compare`).
* report.py: from files to files, with pictures (`fit_sweep`); text.py: to text (`fit_text`), which begins with
  the fit's sentence (`Fit.headline`).
"""

from typing import TYPE_CHECKING

from hf_power.records.exports import lazily

if TYPE_CHECKING:
    from hf_power.fit.elsewhere import read_csv
    from hf_power.fit.fit import fit_law
    from hf_power.fit.forecast import fit_forecast
    from hf_power.fit.result import Fit

__all__ = ["Fit", "fit_forecast", "fit_law", "read_csv"]

__getattr__ = lazily(
    __name__,
    {
        "Fit": "fit.result",
        "fit_forecast": "fit.forecast",
        "fit_law": "fit.fit",
        "read_csv": "fit.elsewhere",
    },
)
