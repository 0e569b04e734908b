"""The sections of a run's settings: what each may hold, and what pretraining takes where nothing is given."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import TrainingArguments

from hf_power.compat import PreTrainedConfig, arguments_of
from hf_power.data.text import DataArguments
from hf_power.models import ANY, FAMILIES, PLAIN_FAMILIES
from hf_power.mup.scale import scale_width
from hf_power.records.errors import UserError, refused_by, shown
from hf_power.records.files import parse_json
from hf_power.schedule import PAPER_MAX_LR
from hf_power.settings.any_model import config_of_mapping, mapping_of, names_of_config, sizes_of, with_own_rope
from hf_power.settings.any_model import unknown_key as unknown_key

UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")


class Tokens(int):
    """A number of tokens that remembers how it was written, because run.json records "30M" and not 30000000.

    >>> tokens = Tokens("2.1M")
    >>> tokens + 0, str(tokens), f"{tokens:,}"
    (2100000, '2.1M', '2,100,000')
    """

    text: str

    def __new__(cls, value: object, name: str = "tokens") -> "Tokens":
        """Take over a text or a number; `name` is what the error calls it."""
        made = super().__new__(cls, parse_tokens(value, name))
        made.text = str(value)
        return made

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return repr(self.text)


OF_TOKENS = "a number of tokens such as 30M or 2.1B"


def parse_tokens(value: object, name: str, kind: str = OF_TOKENS) -> int:
    """A number of tokens: 30000000, 30_000_000, "30,000,000", 3e7, "30M", "30m", "2.1B".

    Raises:
        UserError: if it is negative, or not a number with an optional k, M, B or T. A comma that is no mark of thousands is refused,
            because "2,1B" may be meant for 2.1B.
    """
    text = str(value).strip().replace("_", "")
    factor = UNITS.get(text[-1:].lower(), 1.0)
    number = text[:-1] if factor > 1 else text
    if THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    try:
        if not float(number).is_integer() and factor == 1:
            raise ValueError("a part of a token")
        tokens = round(float(number) * factor)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name} must be {kind}, got {shown(value)}.") from error
    if tokens < 0:
        raise UserError(f"{name} must be at least 0, got {shown(value)}: leave the sign out.")
    return tokens


def short_tokens(tokens: int) -> str:
    """A number of tokens to six digits: 2.1B, 1.2288M.

    >>> short_tokens(2_100_000_000), short_tokens(1_228_800), short_tokens(640)
    ('2.1B', '1.2288M', '640')
    """
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= factor:
            return f"{tokens / factor:.6g}{unit}"
    return str(tokens)


class Default(int):
    """A number that stands where none was given."""


@dataclass
class ModelArguments:
    """Shape of a model trained from scratch: of a Llama or Mixtral by its sizes, of any causal LM by its config."""

    model_type: str = field(
        default="llama", metadata={"help": "llama, mixtral, or any: any causal LM of transformers, by model_config."}
    )
    hidden_size: int = field(
        default=Default(256), metadata={"help": "Width; with model_type any, what model_config is scaled to."}
    )
    intermediate_size: int = field(default=640, metadata={"help": "Width of the MLP, or of one expert."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Depth."})
    num_attention_heads: int = field(default=4, metadata={"help": "Query heads."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "KV heads; None: as many as query heads."})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "One matrix for embedding and lm_head."})
    num_local_experts: int = field(default=8, metadata={"help": "Experts (mixtral)."})
    num_experts_per_tok: int = field(default=2, metadata={"help": "Experts of each token (mixtral)."})
    model_config: dict | str | None = field(  # type: ignore[type-arg]  # HfArgumentParser takes bare dict only
        default=None,
        metadata={"help": "Any other argument of the config, as a mapping; with model_type any also a config.json."},
    )
    # Sizes that do not grow with hidden_size, as `mup.base_config` tells; None where it cannot tell them.
    fixed: tuple[str, ...] | None = field(default=(), init=False)

    def __post_init__(self) -> None:
        """With model_type any, model_config becomes the mapping that records and rows have."""
        if self.model_type != ANY:
            return
        for known in dataclasses.fields(self):
            beside = known.name not in ("model_type", "model_config", "hidden_size", "fixed")
            if beside and getattr(self, known.name) != known.default:
                raise UserError(
                    f"{known.name} stands beside model_type any, with which all sizes are in model_config: move it there."
                )
        self.model_config = mapping_of(self.model_config, "model_config")
        width = getattr(self.any_config(), "hidden_size", None)
        if isinstance(self.hidden_size, Default) and isinstance(width, int):
            self.hidden_size = Default(width)

    @property
    def family(self) -> str:
        """The model type of transformers."""
        return str(self._mapping()["model_type"]) if self.model_type == ANY else self.model_type

    def config(self, **numbers: int | None) -> PreTrainedConfig:
        """The plain config of the model; `numbers` (vocab_size ...) yield to model_config.

        Raises:
            UserError: another model_type, an unknown key of model_config, or sizes that do not divide.
        """
        if self.model_type == ANY:
            return self._scaled(numbers)
        if self.model_type not in PLAIN_FAMILIES:
            raise UserError(
                f"model_type {self.model_type!r} has no sizes here: use llama or mixtral, or any with a model_config of that "
                "model_type."
            )
        family, shape = FAMILIES[self.model_type].config_class, dataclasses.asdict(self)
        shape = {k: v for k, v in shape.items() if k not in ("model_type", "model_config", "fixed") and v is not None}
        known = arguments_of(family)
        extra = self._extra(known)
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
            return family(**{**numbers, **{k: v for k, v in shape.items() if k in known}, **extra})

    def any_config(self) -> PreTrainedConfig:
        """The config of model_config, as it is written there."""
        return config_of_mapping(self._mapping())

    def _scaled(self, numbers: dict[str, int | None]) -> PreTrainedConfig:
        """The config of any causal LM, scaled to a hidden_size that was given."""
        config = self.any_config()
        if not isinstance(self.hidden_size, Default):
            config = self.at_width(config, self.hidden_size)
        given, names = self._mapping(), names_of_config(type(config))
        # Blocks are never padded, and an embedding with a padding token would never learn the row of that token.
        for name, value in {"pad_token_id": None, **numbers}.items():
            if names.get(name, name) not in given:
                setattr(config, name, value)
        return config

    def at_width(self, config: PreTrainedConfig, hidden_size: int) -> PreTrainedConfig:
        """A config at another width, for which model_type any has the sizes that grow, and the others `scale_width`."""
        if hidden_size != config.hidden_size and self.fixed is None:
            raise UserError(
                f"base_config has the hidden_size {config.hidden_size} of model_config, so that nothing tells which sizes grow "
                f"with it to {hidden_size}: give base_config another width."
            )
        return scale_width(config, hidden_size, fixed=self.fixed or ())

    def _mapping(self) -> dict[str, object]:
        """model_config as a mapping, which a flag gives as JSON."""
        extra: object = self.model_config or {}
        if isinstance(extra, str):
            extra = parse_json(extra.encode(errors="replace"), "model_config", "give a mapping of config arguments")
        if not isinstance(extra, dict):
            raise UserError(f"model_config must be a mapping of config arguments, got {shown(extra)}: correct it.")
        return extra

    def _extra(self, known: set[str]) -> dict[str, object]:
        """model_config, of names that the config class knows."""
        extra = with_own_rope(self._mapping(), FAMILIES[self.model_type].config_class)
        for name in extra:
            if name not in known:
                raise UserError(unknown_key(f"model_config.{name}", name, sorted(known)))
        return extra


# What the section mup may hold with model_type any.
PLAIN_FORM = ("mup", "base_width", "base_config", "initializer_range", "embedding_multiplier")


@dataclass
class MupArguments:
    """muP, see `hf_power.mup_config`."""

    mup: bool = field(default=True, metadata={"help": "False: plain Llama/Mixtral with one learning rate."})
    base_width: int = field(default=256, metadata={"help": "hidden_size at which muP changes nothing."})
    base_config: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={"help": "With model_type any: config at the base, where not all sizes grow; mapping or config.json."},
    )
    base_intermediate_size: int | None = field(default=None, metadata={"help": "MLP width at base_width."})
    base_attention_width: int | None = field(default=None, metadata={"help": "Heads x head size at base_width."})
    base_head_dim: int | None = field(default=None, metadata={"help": "Head size at which logits have Llama's scale."})
    base_num_layers: int | None = field(default=None, metadata={"help": "Depth of the proxies (CompleteP)."})
    preset: str = field(default="paper", metadata={"help": "paper, ibm or power_of_two."})
    embedding_multiplier: float | None = field(
        default=None, metadata={"help": "Wins over the preset; with model_type any, 1 where it is left out."}
    )
    residual_multiplier: float | None = field(default=None, metadata={"help": "Wins over the preset."})
    attention_multiplier: float | None = field(default=None, metadata={"help": "Wins over the preset."})
    initializer_range: float | None = field(default=None, metadata={"help": "Wins over the preset."})

    def __post_init__(self) -> None:
        if self.base_config is not None:
            self.base_config = mapping_of(self.base_config, "base_config")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `mup_config`."""
        own = dataclasses.asdict(self)
        return {name: value for name, value in own.items() if name not in ("mup", "base_config")}

    def plain_arguments(self, model: ModelArguments, config: PreTrainedConfig) -> dict[str, Any]:
        """The arguments of `mup_init_` in the plain form, for a config of the model."""
        multiplier = {"embedding_multiplier": self.embedding_multiplier}
        if self.base_config is None:
            return {"base_width": self.base_width, **multiplier}
        written = model.any_config()
        if not isinstance(model.hidden_size, Default):
            written = model.at_width(written, model.hidden_size)
        base = config_of_mapping(cast("dict[str, object]", self.base_config), "base_config")
        # Token ids and lengths are those of the run.
        with refused_by("base_config"):
            of_base = type(config).from_dict({**config.to_dict(), **sizes_of(written, base)})
        return {"base_config": of_base, **multiplier}

    def refuse_multipliers(self) -> None:
        """Raise a UserError for what belongs to the multiplier form of muP, where the plain form is asked for."""
        for known in dataclasses.fields(self):
            if known.name not in PLAIN_FORM and getattr(self, known.name) != known.default:
                raise UserError(
                    f"{known.name} belongs to the multipliers of muP, which a model of model_type any has folded into its "
                    "weights: leave it out."
                )


@dataclass
class RunArguments:
    """Length of the run, and the numbers it is to use. Lengths may be given as text, such as 30M; they become `Tokens`."""

    tokens: Tokens | None = field(default=None, metadata={"help": "Length of the run, e.g. 30M or 2.1B tokens."})
    recipe: str | None = field(default=None, metadata={"help": "recipe.json or Hub repository with tuned numbers."})
    max_eval_tokens: Tokens = field(default=Tokens("200k"), metadata={"help": "Held-out tokens used in an evaluation."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps in a row without a finite gradient: stop."})
    average_window: float | None = field(
        default=None,
        metadata={
            "help": "Keep a mean of the weights over about this part of the steps, e.g. 0.1, in OUTPUT_DIR/average; not in a "
            "tail by anneal."
        },
    )
    allow_changed: str | None = field(
        default=None,
        metadata={
            "help": "On resume: settings, a,b, that may differ though they make another run (dataset, seed ...)."
        },
    )
    license: str | None = field(default=None, metadata={"help": "Of the model, e.g. apache-2.0; a push needs one."})

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tokens | None):
            self.tokens = Tokens(self.tokens, "tokens")
        if not isinstance(self.max_eval_tokens, Tokens):
            self.max_eval_tokens = Tokens(self.max_eval_tokens, "max_eval_tokens")


SECTIONS: dict[str, type] = {
    "model": ModelArguments,
    "mup": MupArguments,
    "data": DataArguments,
    "run": RunArguments,
    "training": TrainingArguments,
}
# What pretraining takes where transformers.TrainingArguments has the defaults of fine-tuning.
TRAINING_DEFAULTS: dict[str, object] = {
    "lr_scheduler_type": "power",
    "learning_rate": PAPER_MAX_LR,
    # Weight decay, beta2 and clipping are those of IBM's code, because the paper does not tell its own.
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 500,
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,  # A NaN loss is shown as it is.
    "train_sampling_strategy": "sequential",  # The blocks come in a seeded order already.
}
# A record leaves out what belongs to this machine, what is secret, and what whoever trains on says anew.
NOT_RECORDED = {"output_dir", "resume_from_checkpoint", "recipe", "push_to_hub", "allow_changed"}
NOT_RECORDED |= {f"hub_{name}" for name in ("token", "model_id", "strategy", "private_repo", "always_push", "revision")}


def names_of(section: str) -> list[str]:
    """The settings of a section."""
    return [f.name for f in dataclasses.fields(SECTIONS[section]) if f.init]
