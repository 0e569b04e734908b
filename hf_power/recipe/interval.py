"""The interval of a new cell's best rate around a recipe's law."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from hf_power.records.run import Sample
from hf_power.schedule import Law


def predictive_factors(
    samples: Sequence[Sample],
    kind: Literal["parameters", "width"] | None,
    scatter_octaves: float,
    place: tuple[float, float, float | None],
) -> tuple[float, float]:
    """The ends of the 95 % interval of a new cell's optimum, over the law's rate there.

    ``2**(-+1.96 * sqrt(spread**2 + scatter_octaves**2))`` with the standard deviation of log2 of the draws' rates.

    Args:
        samples: draws of the law.
        kind: what its size counts.
        scatter_octaves: of cells around the law, Student's quantile over the normal one included.
        place: tokens, tokens per step, and the size.
    """
    draws = [Law(*draw[:5], kind, draw[5]) for draw in samples] if place[0] > 0 else []
    spread = float(np.std([math.log2(draw.lr(*place)) for draw in draws])) if draws else 0.0
    half = 1.959964 * math.hypot(spread, scatter_octaves)
    return 2**-half, 2**half
