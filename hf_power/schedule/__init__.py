"""The learning rate as a function of the tokens seen, in values and pure functions.

* law.py: `Law`, the uncapped law, and the checks of its numbers.
* presets.py: `PRESETS`, published laws by their names, and `chosen_law`, the one that arguments ask for.
* shape.py: `power_lr` and `Schedule`: cap, warmup and tail around the law.
* lengths.py: `plan_schedule`, a schedule from the arguments of `PowerLR`, which has lengths in steps too.
* cosine.py, tuned.py: `with_peak` and `from_cosine`, the law and the cap that follow from a tuned peak of cosine.
* words.py: `describe`, a schedule in one line, and `sketch`, in characters.
"""

from hf_power.schedule.law import (
    CRITICAL_AT_TOKENS,
    LAW_NAMES,
    PAPER_LAW,
    PAPER_MAX_LR,
    PAPER_OPTIMA,
    TOKENS_PER_BETA,
    Law,
    beta,
    check_cap,
    check_length,
    check_number,
)
from hf_power.schedule.shape import DECAY_SHAPES, Schedule, power_lr

__all__ = [
    "CRITICAL_AT_TOKENS",
    "DECAY_SHAPES",
    "LAW_NAMES",
    "PAPER_LAW",
    "PAPER_MAX_LR",
    "PAPER_OPTIMA",
    "TOKENS_PER_BETA",
    "Law",
    "Schedule",
    "beta",
    "check_cap",
    "check_length",
    "check_number",
    "power_lr",
]
