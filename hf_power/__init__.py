"""hf_power: find the learning rate on small models, keep it for every batch size, token budget and model size."""

import importlib
import itertools
import os
import sys
from typing import TYPE_CHECKING, Any

from hf_power.version import __version__

if TYPE_CHECKING:
    from hf_power.checkpoints.callback import SealCheckpoints
    from hf_power.checkpoints.ema import AverageWeights
    from hf_power.coordinates import coord_check
    from hf_power.mup.config import mup_config
    from hf_power.mup.init import mup_init_
    from hf_power.mup.optimizer import MupAdamW, mup_adamw, mup_param_groups
    from hf_power.plots.schedule import plot_schedule
    from hf_power.recipe import Recipe
    from hf_power.register import register_power_scheduler
    from hf_power.schedule import power_lr
    from hf_power.schedule.tuned import from_cosine
    from hf_power.scheduler import PowerLR, get_power_schedule

# Whoever imports hf_power for its schedule pays for nothing else: the other public names are loaded when they are asked for.
_WHERE = {
    "AverageWeights": "checkpoints.ema",
    "MupAdamW": "mup.optimizer",
    "PowerLR": "scheduler",
    "Recipe": "recipe",
    "SealCheckpoints": "checkpoints.callback",
    "coord_check": "coordinates",
    "from_cosine": "schedule.tuned",
    "get_power_schedule": "scheduler",
    "mup_adamw": "mup.optimizer",
    "mup_config": "mup.config",
    "mup_init_": "mup.init",
    "mup_param_groups": "mup.optimizer",
    "plot_schedule": "plots.schedule",
    "power_lr": "schedule",
    "register_power_scheduler": "register",
}

__all__ = [
    "AverageWeights",
    "MupAdamW",
    "PowerLR",
    "Recipe",
    "SealCheckpoints",
    "__version__",
    "coord_check",
    "from_cosine",
    "get_power_schedule",
    "mup_adamw",
    "mup_config",
    "mup_init_",
    "mup_param_groups",
    "plot_schedule",
    "power_lr",
    "register_power_scheduler",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_power' has no attribute {name!r}")
    value: Any = getattr(importlib.import_module(f"hf_power.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether this process is `hf-power` or `python -m hf_power.cli`.

    It registers the schedule itself before it runs a verb, and answers --help without the seconds that transformers takes.
    """
    return os.path.basename(sys.argv[0] if sys.argv else "") == "hf-power" or (
        "-m",
        "hf_power.cli",
    ) in itertools.pairwise(sys.orig_argv)


if not _is_command_line():
    # Imported and not looked up, so that after a reload the names are those of the reloaded modules.
    from hf_power.register import register_power_scheduler
    from hf_power.schedule import power_lr
    from hf_power.scheduler import PowerLR, get_power_schedule

    register_power_scheduler()
