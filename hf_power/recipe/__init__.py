"""The tuned numbers of a sweep, as recipe.json, and where they hold.

* recipe.py: `Recipe`, and its laws for a known horizon (`KnownHorizon`).
* interval.py: how far apart new optima lie (`predictive_factors`).
* shown.py: a recipe in a sentence and in a picture (`recipe_summary`, `plot_recipe`).
* forecast.py: `Forecast`, the loss at the end of a run over size, tokens and batch, with its interval.
* proxies.py: which numbers of muP the runs of a sweep had.
* beyond.py: `warnings_for`, where a run lies beyond what the recipe's sweep has seen, in sentences.
"""

from hf_power.recipe.beyond import warnings_for
from hf_power.recipe.forecast import Forecast
from hf_power.recipe.interval import predictive_factors
from hf_power.recipe.recipe import FILE_NAME, KnownHorizon, Recipe

__all__ = ["FILE_NAME", "Forecast", "KnownHorizon", "Recipe", "predictive_factors", "warnings_for"]
