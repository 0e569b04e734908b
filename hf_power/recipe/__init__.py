"""The tuned numbers of a sweep, as recipe.json, and where they hold.

* recipe.py: `Recipe`, its laws for a known horizon (`KnownHorizon`), and how far apart new optima lie (`predictive_factors`).
* forecast.py: `Forecast`, the loss at the end of a run over size, tokens and batch, with its interval.
* proxies.py: which numbers of muP the runs of a sweep had.
* beyond.py: `warnings_for`, where a run lies beyond what the recipe's sweep has seen, in sentences.
"""

from hf_power.recipe.beyond import warnings_for
from hf_power.recipe.forecast import Forecast
from hf_power.recipe.recipe import FILE_NAME, KnownHorizon, Recipe, predictive_factors

__all__ = ["FILE_NAME", "Forecast", "KnownHorizon", "Recipe", "predictive_factors", "warnings_for"]
