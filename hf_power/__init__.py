"""hf_power: find the learning rate on small models, keep it for every batch size, token budget and model size."""

from hf_power.coord_check import coord_check
from hf_power.mup import MupAdamW, mup_config, mup_init_, mup_param_groups
from hf_power.pretrain.callbacks import SealCheckpoints
from hf_power.recipe import Recipe
from hf_power.register import register_power_scheduler
from hf_power.schedule import PowerLR, get_power_schedule, power_lr
from hf_power.version import __version__

__all__ = [
    "MupAdamW",
    "PowerLR",
    "Recipe",
    "SealCheckpoints",
    "__version__",
    "coord_check",
    "get_power_schedule",
    "mup_config",
    "mup_init_",
    "mup_param_groups",
    "power_lr",
    "register_power_scheduler",
]

register_power_scheduler()
