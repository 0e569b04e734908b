"""What a pretraining run is told: five sections, checked before anything is started, and the model that they describe."""

import copy
import dataclasses
import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.trainer_pt_utils import AcceleratorConfig

from hf_power.checkpoints.ema import AverageWeights
from hf_power.compat import CHECKPOINTING, PreTrainedConfig, own_name, recorded_name
from hf_power.data.text import DataArguments
from hf_power.data.tokenizer import check_token_ids, num_token_ids
from hf_power.models import ANY, count_parameters, num_experts, without_memory
from hf_power.mup.check import refuse_without_rule
from hf_power.mup.config import mup_config
from hf_power.mup.init import initializer_range, mup_init_, new_model, set_initializer_range
from hf_power.recipe import Recipe
from hf_power.records.errors import UserError, refused_by, shown
from hf_power.settings.any_model import config_of_mapping, fixed_sizes
from hf_power.settings.arguments import refuse_without_effect
from hf_power.settings.contradictions import refuse_contradictions, refuse_optimizer, refuse_schedule
from hf_power.settings.read import flatten
from hf_power.settings.sections import (
    NOT_RECORDED,
    SECTIONS,
    TRAINING_DEFAULTS,
    ModelArguments,
    MupArguments,
    RunArguments,
    Tokens,
    names_of,
    parse_tokens,
    unknown_key,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from transformers import PreTrainedTokenizerBase

    from hf_power.records.run import Sections

T = TypeVar("T")
# The lengths among the arguments of the power schedule.
TOKEN_LENGTHS = ("warmup_tokens", "decay_tokens", "decay_start_tokens", "critical_batch_tokens")


@dataclass
class Settings:
    """The sections, and which of their values were given rather than left at their defaults."""

    model: ModelArguments
    mup: MupArguments
    data: DataArguments
    run: RunArguments
    training: TrainingArguments
    given: frozenset[str] = frozenset()
    # The YAML that they were read from, to be named in the command that comes next.
    file: str | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Lengths among the arguments of the schedule may be texts such as 30M, as those of the run may."""
        kwargs: object = self.training.lr_scheduler_kwargs or {}
        if not isinstance(kwargs, dict):
            raise UserError(f'lr_scheduler_kwargs must be a mapping such as {{"a": 4.0}}, got {shown(kwargs)}.')
        for name in TOKEN_LENGTHS:
            if isinstance(kwargs.get(name), str):
                kwargs[name] = parse_tokens(kwargs[name], f"lr_scheduler_kwargs.{name}")
        if self.mup.base_config is not None:
            self._compare_with_base()

    def _compare_with_base(self) -> None:
        """Two configs tell which sizes grow with the width."""
        if not self.is_plain:
            raise UserError("base_config is of model_type any alone: give base_width and base_intermediate_size.")
        if "base_width" in self.given:
            raise UserError("base_width stands beside base_config, which has a hidden_size of its own: leave it out.")
        config = self.model.any_config()
        base = config_of_mapping(cast("dict[str, object]", self.mup.base_config), "base_config")
        if type(base) is not type(config):
            raise UserError(
                f"base_config is of a {base.model_type}, but model_config of a {config.model_type}: give one kind."
            )
        self.model.fixed = None if base.hidden_size == config.hidden_size else fixed_sizes(config, base)

    @property
    def is_plain(self) -> bool:
        """Whether the model is a stock class that muP's multipliers are folded into, or that has none."""
        return self.model.model_type == ANY

    @classmethod
    def from_dict(cls, sections: Mapping[str, object]) -> "Settings":
        """Build settings from a mapping of sections, as in a YAML recipe or run.json."""
        flat = flatten(sections, "settings")
        return cls(
            model=_section(ModelArguments, flat),
            mup=_section(MupArguments, flat),
            data=_section(DataArguments, flat),
            run=_section(RunArguments, flat),
            training=_section(TrainingArguments, TRAINING_DEFAULTS | flat),
            given=frozenset(name for name, value in flat.items() if value is not None),
        )

    def to_dict(self) -> "Sections":
        """The sections with the values that were given, without output paths and tokens; `from_dict` reads it back."""
        sections: dict[str, dict[str, object]] = {}
        for section in SECTIONS:
            names = [name for name in names_of(section) if name in self.given - NOT_RECORDED]
            values = {recorded_name(name): getattr(getattr(self, section), name) for name in names}
            sections[section] = {name: _recorded(value) for name, value in values.items()}
        return cast("Sections", sections)

    def changed(self, **sections: Mapping[str, object]) -> "Settings":
        """A copy with other values, such as ``changed(training={"seed": 1})``, which then are given; None takes one back.

        It is cheap, because TrainingArguments are not set up anew. Values are taken as they are, but lengths in tokens
        and enumerations may be texts.
        """
        parts: dict[str, object] = {}
        given = set(self.given)
        for section, values in sections.items():
            part = copy.copy(getattr(self, section))
            for name, value in values.items():
                before = getattr(part, name)
                setattr(part, name, type(before)(value) if isinstance(before, enum.Enum) and value else value)
                given = given - {name} if value is None else given | {name}
            if isinstance(part, RunArguments):
                part.__post_init__()
            parts[section] = part
        return dataclasses.replace(self, **parts, given=frozenset(given))  # type: ignore[arg-type]

    @property
    def schedule_kwargs(self) -> dict[str, object]:
        """The arguments of the schedule; TrainingArguments has made a mapping of them if they came as text."""
        return dict(cast("Mapping[str, object]", self.training.lr_scheduler_kwargs or {}))

    def model_config_for(self, tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None = None) -> PreTrainedConfig:
        """The config of the run's model, muP's multipliers included, for blocks of `data.block_size` tokens.

        Without a vocab_size here or in model_config the embedding has a row for every id of the tokenizer.

        Raises:
            UserError: a vocab_size that is not above the largest id of the tokenizer.
        """
        config = self.model.config(
            vocab_size=vocab_size or num_token_ids(tokenizer),
            max_position_embeddings=self.data.block_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        check_token_ids(tokenizer, config.vocab_size, "the model")
        return self.under_mup(config) if self.mup.mup else config

    def under_mup(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The plain config with muP's multipliers, or in the plain form with the initializer_range of the section mup."""
        if not self.is_plain:
            return mup_config(config, **self.mup.arguments())
        if self.mup.initializer_range is not None:
            set_initializer_range(config, self.mup.initializer_range)
        return config

    def apply_recipe(self) -> Recipe | None:
        """Take the tuned numbers from ``run.recipe``, and return it.

        Law, cap, weight decay and muP's numbers are the recipe's; warmup and tail are, unless some were given. Under
        another schedule than power the cap and the law are left out: see `Recipe.peak_lr`.

        Raises:
            UserError: if a given value, or the model, contradicts the recipe; both are named.
        """
        if self.run.recipe is None:
            return None
        recipe = Recipe.load(self.run.recipe)
        if self.mup.mup != (recipe.parameterization == "mup"):
            what = "a recipe's numbers hold under muP only: leave mup out"
            if self.mup.mup:
                what = "the sweep of the recipe had standard parameterization: set mup to False"
            raise UserError(f"mup is {self.mup.mup} in the settings, but {what}.")
        _agree("model_type", recipe.model_type or self.model.family, self.model.family)
        if self.mup.mup and self.is_plain != (recipe.form == "plain"):
            raise UserError(
                f"the recipe was tuned with the {recipe.form} form of muP: "
                + ("leave model_type any." if self.is_plain else "give model_type any with a model_config.")
            )
        if self.is_plain and self.mup.mup and "initializer_range" not in self.given:
            # A value that stands in model_config must be the recipe's, too.
            config = self.model.any_config()
            written = {"initializer_range", "init_std", "initializer_std"} & set(
                cast("dict[str, object]", self.model.model_config)
            )
            if written:
                _agree("initializer_range", recipe.initializer_range, initializer_range(config))
        numbers, power = recipe.settings(), self.training.lr_scheduler_type == "power"
        if not power:
            del numbers["learning_rate"]
        for name, value in numbers.items():
            part = self.mup if hasattr(self.mup, name) else self.training
            _agree(name, value, getattr(part, name) if name in self.given else value)
            setattr(part, name, value)
        self.given |= set(numbers)
        if "base_config" in numbers:
            self._compare_with_base()
        if power:
            kwargs = self.schedule_kwargs
            for name in ("law", "peak_lr"):
                if name in kwargs:
                    raise UserError(
                        f"lr_scheduler_kwargs.{name} is a law beside that of the recipe: leave one of them out."
                    )
            for name, value in recipe.schedule_kwargs(self.size_for(recipe)).items():
                _agree(f"lr_scheduler_kwargs.{name}", value, kwargs.get(name, value))
                kwargs[name] = value
            # The recipe's warmup and tail are each left out where the settings give one.
            lengths = recipe.lengths()
            if "warmup_steps" in self.given:
                lengths.pop("warmup_tokens", None)
            if {"decay_tokens", "decay_start_tokens"} & set(kwargs):
                del lengths["decay_ratio"]
            self.training.lr_scheduler_kwargs = {**lengths, **kwargs}
            self.given |= {"lr_scheduler_kwargs"}
        return recipe

    def size_for(self, recipe: Recipe) -> int | None:
        """The size of the model that the recipe's law asks for; None where it has none."""
        if recipe.size != "parameters":
            return self.model.hidden_size if recipe.size else None
        return count_parameters(self.model.config(vocab_size=self.data.vocab_size))["parameters"]

    def check(self) -> None:
        """Every check that needs no data and no weights.

        Raises:
            UserError: a missing or impossible value, in one sentence.
        """
        if "output_dir" not in self.given or not self.training.output_dir:
            raise UserError("output_dir is missing: name the run folder, e.g. --output_dir runs/first.")
        if self.run.tokens is None:
            raise UserError("tokens is missing: give the length of the run, e.g. --tokens 30M.")
        if self.run.tokens < 1:
            raise UserError(f"tokens must be positive, got {self.run.tokens!r}.")
        self.allowed_changes()
        if self.run.average_window is not None:
            AverageWeights(self.run.average_window)
        config = self.model.config()
        self.check_layer()
        refuse_reentrant(config, getattr(self.training, f"{CHECKPOINTING}_kwargs"))
        if self.mup.mup:
            self.check_mup(config)
        self.check_arguments()

    def check_mup(self, config: PreTrainedConfig) -> None:
        """Refuse a model for which muP has no rule."""
        if self.is_plain:
            self.mup.refuse_multipliers()
            refuse_without_rule(self.under_mup(config), **self.mup.plain_arguments(self.model, config))
        else:
            mup_config(config, **self.mup.arguments())

    def check_arguments(self) -> None:
        """Refuse arguments of the training that would change nothing, or that no run can follow."""
        args = self.training
        refuse_without_effect(args, self.given)
        refuse_contradictions(args, self.given)
        refuse_optimizer(args, self.given, self.mup.mup)
        refuse_schedule(args, self.schedule_kwargs)
        if args.label_smoothing_factor and num_experts(self.model.config()):
            raise UserError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but the smoothed loss leaves out the experts' "
                "balancing loss: leave it out."
            )
        if self.data.streaming and self.data.skip_bad_lines and args.dataloader_num_workers:
            raise UserError(
                f"skip_bad_lines={self.data.skip_bad_lines} of a stream is counted in one process, got "
                f"dataloader_num_workers={args.dataloader_num_workers}: set it to 0, or streaming to false."
            )
        if self.data.streaming and args.dataloader_num_workers > 1:
            raise UserError(
                f"dataloader_num_workers is {args.dataloader_num_workers}, but the order of a stream holds for one reading "
                "process: give at most 1, or store the data."
            )

    def allowed_changes(self) -> set[str]:
        """The names in ``run.allow_changed``; a UserError for one that is no setting."""
        names = {own_name(name.strip()) for name in (self.run.allow_changed or "").split(",")} - {""}
        known = [name for section in SECTIONS for name in names_of(section)]
        for name in names:
            if name.split(".")[0] not in known:
                raise UserError(unknown_key(f"allow_changed: {name}", name, known))
        return names

    def check_layer(self) -> None:
        """Build one layer without weights: much of a config is only refused by the model's own code."""
        config = self.model.config(vocab_size=2**20)  # the tokenizer's is not known yet
        if not self.is_plain:  # The layers of another family may be of several kinds.
            config.num_hidden_layers = 1
        without_memory(config)


def _section(kind: Callable[..., T], values: Mapping[str, object]) -> T:
    """A section of those among the values that it knows."""
    known = {f.name for f in dataclasses.fields(cast("type[DataclassInstance]", kind))}
    with refused_by("settings"):
        return kind(**{name: value for name, value in values.items() if name in known})


def _recorded(value: object) -> object:
    """A value as JSON has it and as `TrainingArguments` take it."""
    if isinstance(value, AcceleratorConfig):
        return value.to_dict()
    return value.value if isinstance(value, enum.Enum) else value.text if isinstance(value, Tokens) else value


def _agree(name: str, recipe: object, given: object) -> None:
    if given != recipe:
        raise UserError(
            f"{name} is {given} in the settings but {recipe} in the recipe: leave it out, or use another recipe; the "
            "law only holds with the numbers it was tuned with."
        )


def refuse_reentrant(config: PreTrainedConfig, checkpointing: Mapping[str, object] | None) -> None:
    """Raise a UserError for activation checkpointing of the reentrant kind where a balancing loss is asked for.

    It runs the layers without gradients at first, and the router logits that the loss is made of are from that pass, so
    that the loss would lose its gradient in silence.
    """
    if getattr(config, "output_router_logits", False) and (checkpointing or {}).get("use_reentrant"):
        raise UserError(
            "use_reentrant is True in the kwargs of activation checkpointing, which leaves the experts' balancing loss "
            "without a gradient: set use_reentrant to False."
        )


def build_model(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> PreTrainedModel:
    """The model of the settings, see `Settings.model_config_for`, initialized from torch's global random numbers."""
    config = settings.model_config_for(tokenizer, vocab_size)
    model = new_model(config)
    if not settings.mup.mup:
        return model
    return mup_init_(model, **(settings.mup.plain_arguments(settings.model, config) if settings.is_plain else {}))
