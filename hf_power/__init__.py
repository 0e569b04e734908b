"""Find the learning rate on small models, keep it for every batch size, token budget and model size.

In any Trainer: lr_scheduler_type="power" after `import hf_power`. help(hf_power.NAME) tells more of each:
    plot_schedule, from_cosine     see a schedule; Power's numbers from a good cosine
    PowerLR, get_power_schedule    the schedule in a loop of one's own; power_lr, its formula
    mup_config, mup_init_          muP for a config and for a model's weights
    MupAdamW, mup_adamw            its optimizer for a Trainer; mup_param_groups, for any AdamW
    coord_check                    is muP right for this model?
    SealCheckpoints, AverageWeights    callbacks
    register_power_scheduler       what the import does

From a sweep to a checked model, a package each (help(hf_power.fit) has more), and `hf-power --help` for a shell:
    hf_power.sweep.run_sweep(hf_power.sweep.load_grid("grid.yaml"), "runs/sweep")  -> Sweep
    hf_power.fit.fit_law(sweep)  -> Fit            hf_power.fit.read_csv("runs.csv")
    hf_power.Recipe.load("recipe.json")            .plot()
    hf_power.plan.make_plan(recipe, hf_power.plan.Target(tokens, tokens_per_step, ...))  -> Plan
    hf_power.verify.verify(settings)  -> Page
    hf_power.evaluate.evaluate_model, hf_power.export.export_model
Sweep, Fit, Plan and Page have .to_frame() (pandas).
"""

import importlib
import itertools
import os
import sys
import typing

from hf_power.version import __version__ as __version__

if typing.TYPE_CHECKING:
    from hf_power.checkpoints.callback import SealCheckpoints as SealCheckpoints
    from hf_power.checkpoints.ema import AverageWeights as AverageWeights
    from hf_power.coordinates import coord_check as coord_check
    from hf_power.mup.config import mup_config as mup_config
    from hf_power.mup.init import mup_init_ as mup_init_
    from hf_power.mup.optimizer import MupAdamW as MupAdamW
    from hf_power.mup.optimizer import mup_adamw as mup_adamw
    from hf_power.mup.optimizer import mup_param_groups as mup_param_groups
    from hf_power.plots.schedule import plot_schedule as plot_schedule
    from hf_power.recipe import Recipe as Recipe
    from hf_power.schedule.tuned import from_cosine as from_cosine

# Whoever imports hf_power for its schedule pays for nothing else: the other public names are loaded when they are asked for.
# The list of names is this one; with an `__all__` beside it, help(hf_power) would be 900 lines long.
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

# Packages whose own names are public too; `hf_power.fit.fit_law` needs no further import.
_PACKAGES = ("evaluate", "export", "fit", "plan", "plots", "sweep", "verify")


def __getattr__(name: str) -> typing.Any:
    if name in _PACKAGES:
        return importlib.import_module(f"hf_power.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'hf_power' has no attribute {name!r}")
    value: typing.Any = getattr(importlib.import_module(f"hf_power.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*_WHERE, *_PACKAGES, "__doc__", "__version__"})


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
    from hf_power.register import register_power_scheduler as register_power_scheduler
    from hf_power.schedule import power_lr as power_lr
    from hf_power.scheduler import PowerLR as PowerLR
    from hf_power.scheduler import get_power_schedule as get_power_schedule

    register_power_scheduler()
