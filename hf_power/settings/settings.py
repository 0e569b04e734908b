"""What a pretraining run is told: one YAML of five sections, checked before anything is started."""

import dataclasses
import difflib
import enum
import inspect
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, MixtralConfig, TrainingArguments

from hf_power.compat import CHECKPOINTING, own_name, recorded_name, refuse_two_values
from hf_power.data.text import DataArguments
from hf_power.mup import mup_config
from hf_power.recipe import Recipe
from hf_power.records.errors import NotFoundError, UserError, refused_by, shown
from hf_power.records.schema import fits, kinds_of, parse_json
from hf_power.schedule import PowerLR

DEEPEST = 50  # levels of a YAML; PyYAML's time grows with their square
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
# Of this machine, secret, or said anew by whoever trains on.
NOT_RECORDED = {"output_dir", "resume_from_checkpoint", "recipe", "push_to_hub", "allow_changed"}
NOT_RECORDED |= {f"hub_{name}" for name in ("token", "model_id", "strategy", "private_repo", "always_push", "revision")}


@dataclass
class ModelArguments:
    """Shape of a Llama- or Mixtral-style model trained from scratch."""

    model_type: str = field(default="llama", metadata={"help": "llama or mixtral."})
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    intermediate_size: int = field(default=640, metadata={"help": "Width of the MLP, or of one expert."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Depth."})
    num_attention_heads: int = field(default=4, metadata={"help": "Query heads."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "KV heads; None: as many as query heads."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "One matrix for embedding and lm_head."})
    num_local_experts: int = field(default=8, metadata={"help": "Experts (mixtral)."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts of each token (mixtral)."})
    model_config: dict | str | None = field(  # type: ignore[type-arg]  # HfArgumentParser takes bare dict only
        default=None, metadata={"help": "Any other argument of LlamaConfig or MixtralConfig, as a mapping."}
    )

    def config(self, **numbers: Any) -> Any:
        """The plain LlamaConfig or MixtralConfig; `numbers` (vocab_size ...) yield to model_config.

        Raises:
            ValueError: another model_type, an unknown key of model_config, or sizes that do not divide.
        """
        families: dict[str, Any] = {"llama": LlamaConfig, "mixtral": MixtralConfig}
        if self.model_type not in families:
            raise UserError(f"there is no muP rule for model_type {self.model_type!r}: use llama or mixtral.")
        family, shape = families[self.model_type], dataclasses.asdict(self)
        shape = {k: v for k, v in shape.items() if k not in ("model_type", "model_config") and v is not None}
        known = {f.name for f in dataclasses.fields(family)}
        extra = self.model_config or {}
        if isinstance(extra, str):
            extra = parse_json(extra.encode(errors="replace"), "model_config", "give a mapping of config arguments")
        if not isinstance(extra, dict):
            raise UserError(f"model_config must be a mapping of config arguments, got {shown(extra)}: correct it.")
        for name in extra:
            if name not in known:
                raise UserError(unknown_key(f"model_config.{name}", name, sorted(known)))
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}: correct it.")
        if self.hidden_size % self.num_attention_heads and "head_dim" not in extra:
            raise UserError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}: "
                "change one of them."
            )
        shape.setdefault("num_key_value_heads", self.num_attention_heads)
        with refused_by("the model's config"):
            return family(**numbers | {k: v for k, v in shape.items() if k in known} | extra)


@dataclass
class MupArguments:
    """muP, see `hf_power.mup_config`."""

    mup: bool = field(default=True, metadata={"help": "False: plain Llama/Mixtral with one learning rate."})
    base_width: int = field(default=256, metadata={"help": "hidden_size at which muP changes nothing."})
    base_intermediate_size: int | None = field(default=None, metadata={"help": "MLP width at base_width."})
    base_head_dim: int | None = field(default=None, metadata={"help": "Head size at which logits have Llama's scale."})
    base_num_layers: int | None = field(default=None, metadata={"help": "Depth of the proxies (CompleteP)."})
    preset: str = field(default="paper", metadata={"help": "paper, ibm or power_of_two."})
    embedding_multiplier: float | None = field(default=None, metadata={"help": "Wins over the preset."})
    residual_multiplier: float | None = field(default=None, metadata={"help": "Wins over the preset."})
    attention_multiplier: float | None = field(default=None, metadata={"help": "Wins over the preset."})
    initializer_range: float | None = field(default=None, metadata={"help": "Wins over the preset."})

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `mup_config`."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "mup"}


@dataclass
class RunArguments:
    """Length of the run, and the numbers it is to use."""

    tokens: str | None = field(default=None, metadata={"help": "Length of the run, e.g. 30M or 2.1B tokens."})
    recipe: str | None = field(default=None, metadata={"help": "recipe.json or Hub repository with tuned numbers."})
    max_eval_tokens: str = field(default="200k", metadata={"help": "Held-out tokens used in an evaluation."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps in a row without a finite gradient: stop."})
    allow_changed: str | None = field(
        default=None,
        metadata={
            "help": "On resume: settings, a,b, that may differ though they make another run (dataset, seed ...)."
        },
    )
    license: str | None = field(default=None, metadata={"help": "Of the model, e.g. apache-2.0; a push needs one."})


SECTIONS: dict[str, Any] = {
    "model": ModelArguments,
    "mup": MupArguments,
    "data": DataArguments,
    "run": RunArguments,
    "training": TrainingArguments,
}
# What pretraining takes where transformers.TrainingArguments has the defaults of fine-tuning.
TRAINING_DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "power",
    "learning_rate": 0.02,  # eta_max of the paper
    "weight_decay": 0.1,  # with beta2 and clipping as in IBM's code; the paper does not say
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 500,
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,  # a NaN loss is shown as it is
    "train_sampling_strategy": "sequential",  # the blocks come in a seeded order already
}


@dataclass
class Settings:
    """The sections, and which of their values were given rather than left at their defaults."""

    model: ModelArguments
    mup: MupArguments
    data: DataArguments
    run: RunArguments
    training: TrainingArguments
    given: frozenset[str] = frozenset()

    @classmethod
    def from_dict(cls, sections: dict[str, Any]) -> "Settings":
        """Build settings from a mapping of sections, as in a YAML recipe or run.json."""
        flat = flatten(sections, "settings")
        parts = {}
        for name, kind in SECTIONS.items():
            names = {f.name for f in dataclasses.fields(kind)}
            values = (TRAINING_DEFAULTS if name == "training" else {}) | flat
            with refused_by("settings"):
                parts[name] = kind(**{k: v for k, v in values.items() if k in names})
        return cls(**parts, given=frozenset(name for name, value in flat.items() if value is not None))

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The sections with the values that were given, without output paths and tokens; `from_dict` reads it back."""
        sections: dict[str, dict[str, Any]] = {}
        for section, kind in SECTIONS.items():
            names = [f.name for f in dataclasses.fields(kind) if f.name in self.given - NOT_RECORDED]
            values = {recorded_name(name): getattr(getattr(self, section), name) for name in names}
            sections[section] = {k: v.value if isinstance(v, enum.Enum) else v for k, v in values.items()}
        return sections

    def apply_recipe(self) -> Recipe | None:
        """Take the tuned numbers from ``run.recipe``, and return it.

        Law, cap, weight decay and muP's numbers are the recipe's; warmup and tail are, unless some were given. Under
        another schedule than power the cap and the law are left out: see `Recipe.peak_lr`.

        Raises:
            ValueError: if a given value, or the model, contradicts the recipe; both are named.
        """
        if self.run.recipe is None:
            return None
        recipe = Recipe.load(self.run.recipe)
        if not self.mup.mup:
            raise UserError("mup is False in the settings, but a recipe's numbers hold under muP only: leave mup out.")
        _agree("model_type", recipe.model_type or self.model.model_type, self.model.model_type)
        numbers, power = recipe.settings(), self.training.lr_scheduler_type == "power"
        if not power:
            del numbers["learning_rate"]
        for name, value in numbers.items():
            part = self.mup if hasattr(self.mup, name) else self.training
            _agree(name, value, getattr(part, name) if name in self.given else value)
            setattr(part, name, value)
        self.given |= set(numbers)
        if power:
            kwargs = dict(self.training.lr_scheduler_kwargs or {})
            for name, value in recipe.schedule_kwargs().items():
                _agree(f"lr_scheduler_kwargs.{name}", value, kwargs.get(name, value))
                kwargs[name] = value
            self.training.lr_scheduler_kwargs = self._lengths(recipe) | kwargs
            self.given |= {"lr_scheduler_kwargs"}
        return recipe

    def _lengths(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe's warmup and tail, each left out where the settings give one."""
        lengths, given = recipe.lengths(), self.training.lr_scheduler_kwargs or {}
        if "warmup_steps" in self.given:
            lengths.pop("warmup_tokens", None)
        if {"decay_tokens", "decay_start_tokens"} & set(given):
            del lengths["decay_ratio"]
        return lengths

    def check(self) -> None:
        """Every check that needs no data and no weights.

        Raises:
            ValueError: a missing or impossible value, in one sentence.
        """
        if "output_dir" not in self.given or not self.training.output_dir:
            raise UserError("output_dir is missing: name the run folder, e.g. --output_dir runs/first.")
        if self.run.tokens is None:
            raise UserError("tokens is missing: give the length of the run, e.g. --tokens 30M.")
        if parse_tokens(self.run.tokens, "tokens") < 1:
            raise UserError(f"tokens must be positive, got {self.run.tokens!r}.")
        parse_tokens(self.run.max_eval_tokens, "max_eval_tokens")
        self.allowed_changes()
        config = self.model.config()
        self._check_layer()
        refuse_reentrant(config, getattr(self.training, f"{CHECKPOINTING}_kwargs"))
        if self.mup.mup:
            mup_config(config, **self.mup.arguments())
        kwargs = self.training.lr_scheduler_kwargs or {}
        if self.training.lr_scheduler_type == "power":
            known = [p for p in inspect.signature(PowerLR).parameters if p not in ("optimizer", "last_epoch")]
            for name in kwargs:
                if name not in known:
                    raise UserError(unknown_key(f"lr_scheduler_kwargs.{name}", name, known))

    def allowed_changes(self) -> set[str]:
        """The names in ``run.allow_changed``.

        Raises:
            ValueError: one that is no setting.
        """
        names = {own_name(name.strip()) for name in (self.run.allow_changed or "").split(",")} - {""}
        known = [f.name for kind in SECTIONS.values() for f in dataclasses.fields(kind)]
        for name in names:
            if name.split(".")[0] not in known:
                raise UserError(unknown_key(f"allow_changed: {name}", name, known))
        return names

    def _check_layer(self) -> None:
        """Build one layer without weights: much of a config is only refused by the model's own code."""
        config = self.model.config(vocab_size=2**20)  # the tokenizer's is not known yet
        config.num_hidden_layers = 1
        with refused_by("the model's config"), torch.device("meta"):
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # from_config would partition it under ZeRO 3


def load_yaml(path: str) -> dict[str, Any]:
    """The sections of a YAML recipe, flattened and checked: key -> value.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown section or key (with the nearest name), or a value of the wrong type.
    """
    sections = read_yaml(path)
    return flatten(sections if sections is not None else {}, path)


def read_yaml(path: str) -> Any:
    """The content of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML.
    """
    import yaml

    if not Path(path).is_file():
        raise NotFoundError(f"there is no settings file at {path}: pass one of scripts/recipes or your own.")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("it is nested too deep, so flatten it")
            if isinstance(event, yaml.AliasEvent):  # a few of them grow without bounds when they are written out
                raise ValueError(f"the alias *{event.anchor} is not taken, write its value out")
        return yaml.load(text, Loader=_unique_keys())
    # PyYAML's constructors raise any of these for a tagged scalar that is none, such as !!bool x.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{path} is not YAML: {why}.") from error


def _unique_keys() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """SafeLoader that refuses a key that is there twice, of which PyYAML takes the last in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"the key {key} is there twice{str(node.start_mark).rstrip()}")
            return super().construct_mapping(node, deep)

    return Loader


def flatten(sections: Any, source: str) -> dict[str, Any]:
    """Key -> value over all sections, each key and type checked; `source` names the file in errors."""
    if not isinstance(sections, dict):
        raise UserError(f"{source} must hold the sections {', '.join(SECTIONS)}, got {type(sections).__name__}.")
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        if section not in SECTIONS:
            raise UserError(unknown_key(f"{source}: section {section}", str(section), list(SECTIONS)))
        if not isinstance(values, dict):
            raise UserError(f"{source}: section {section} must hold keys and values, got {shown(values)}.")
        hints = typing.get_type_hints(SECTIONS[section])
        names = [f.name for f in dataclasses.fields(SECTIONS[section]) if f.init]
        refuse_two_values(values, f"{source}: {section}")
        for key, value in values.items():
            if (name := own_name(key)) not in names:
                raise UserError(unknown_key(f"{source}: {section}.{key}", str(key), names))
            flat[name] = _typed(f"{source}: {section}.{key}", value, hints[name])
    return flat


def parse_tokens(value: str | int | float, name: str) -> int:
    """A number of tokens: 30000000, 3e7, "30M", "2.1B".

    Raises:
        ValueError: if it is not a number with an optional k, M, B or T.
    """
    text = str(value).strip().replace("_", "").replace(",", "")
    factor = UNITS.get(text[-1:], 1.0)
    try:
        return round(float(text[:-1] if factor > 1 else text) * factor)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name} must be a number of tokens such as 30M or 2.1B, got {shown(value)}.") from error


def unknown_key(what: str, name: str, known: list[str]) -> str:
    """The sentence for a key that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"{what} is unknown" + (
        f": did you mean {near[0]}?" if near else f": use one of {', '.join(known[:12])} ..."
    )


def unknown_flag(name: str) -> str:
    """The sentence for a command-line flag that no section knows."""
    return unknown_key(f"--{name}", name, [f.name for kind in SECTIONS.values() for f in dataclasses.fields(kind)])


def _typed(what: str, value: Any, hint: Any) -> Any:
    """The value, as one of the types that the hint allows (YAML reads 2e-2 as a string)."""
    kinds = kinds_of(hint)
    if fits(value, hint) and value == value:
        return value
    if isinstance(value, str) and any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds):
        return value
    if str in kinds and fits(value, float):
        return str(value)
    if float in kinds and isinstance(value, str):
        try:
            if (number := float(value)) == number:
                return number
        except ValueError:
            pass
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
    raise UserError(f"{what} must be {names}, got {shown(value)}.")


def _agree(name: str, recipe: Any, given: Any) -> None:
    if given != recipe:
        raise UserError(
            f"{name} is {given} in the settings but {recipe} in the recipe: leave it out, or use another recipe; the "
            "law only holds with the numbers it was tuned with."
        )


def refuse_reentrant(config: Any, checkpointing: dict[str, Any] | None) -> None:
    """Activation checkpointing of the reentrant kind takes its gradient from the balancing loss, in silence.

    It runs the layers without gradients at first, and the router logits that the loss is made of are from that pass.

    Args:
        config: of the model that is to be trained.
        checkpointing: the Trainer's activation_checkpointing_kwargs.

    Raises:
        ValueError: use_reentrant where config.output_router_logits asks for the balancing loss.
    """
    if getattr(config, "output_router_logits", False) and (checkpointing or {}).get("use_reentrant"):
        raise UserError(
            "use_reentrant is True in the kwargs of activation checkpointing, which leaves the experts' balancing loss "
            "without a gradient: set use_reentrant to False."
        )
