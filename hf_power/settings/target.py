"""The run that a sweep and a plan are for, from the YAML that will start it."""

from dataclasses import fields

from hf_power.settings.read import load_yaml
from hf_power.settings.sections import SECTIONS
from hf_power.settings.settings import Settings

# What the sections run and training say of a run's size; the rest of them, a recipe or a folder say, may not be there yet.
OF_A_TARGET = {
    "run": ["tokens"],
    "training": ["per_device_train_batch_size", "gradient_accumulation_steps"],
}


def load_target(path: str) -> Settings:
    """The settings of a YAML, for its model, data, length and batch.

    Raises:
        NotFoundError, UserError: as `load_yaml`.
    """
    flat = load_yaml(path)
    names = {section: [f.name for f in fields(SECTIONS[section])] for section in ("model", "data")} | OF_A_TARGET
    return Settings.from_dict({section: {n: flat[n] for n in each if n in flat} for section, each in names.items()})


def tokens_on_one_device(settings: Settings) -> int:
    """Tokens of an optimizer step, where one device trains."""
    args = settings.training
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * settings.data.block_size
