"""The sections of a run's settings: what each may hold, and what pretraining takes where nothing is given."""

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_power.compat import PreTrainedConfig, arguments_of
from hf_power.data.text import DataArguments
from hf_power.models import FAMILIES, PLAIN_FAMILIES
from hf_power.records.errors import UserError, refused_by, shown
from hf_power.records.files import parse_json
from hf_power.schedule import PAPER_MAX_LR
from hf_power.settings.any_model import config_of_mapping

ANY = "any"  # The model_type of a section whose model_config says it all.
UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
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


def parse_tokens(value: object, name: str) -> int:
    """A number of tokens: 30000000, 30_000_000, "30,000,000", 3e7, "30M", "2.1B".

    Raises:
        UserError: if it is not a number with an optional k, M, B or T. A comma that is no mark of thousands is refused,
            because "2,1B" may be meant for 2.1B.
    """
    text = str(value).strip().replace("_", "")
    factor = UNITS.get(text[-1:], 1.0)
    number = text[:-1] if factor > 1 else text
    if THOUSANDS.fullmatch(number):
        number = number.replace(",", "")
    try:
        return round(float(number) * factor)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name} must be a number of tokens such as 30M or 2.1B, got {shown(value)}.") from error


@dataclass
class ModelArguments:
    """Shape of a Llama- or Mixtral-style model trained from scratch."""

    model_type: str = field(default="llama", metadata={"help": "llama or mixtral; in coord-check also any."})
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

    def config(self, **numbers: int | None) -> PreTrainedConfig:
        """The plain LlamaConfig or MixtralConfig; `numbers` (vocab_size ...) yield to model_config.

        Raises:
            UserError: another model_type, an unknown key of model_config, or sizes that do not divide.
        """
        if self.model_type == ANY:
            raise UserError(
                "model_type any is taken by coord-check alone: train such a model with mup_init_ and MupAdamW in a script of "
                "your own."
            )
        if self.model_type not in PLAIN_FAMILIES:
            raise UserError(f"there is no muP rule for model_type {self.model_type!r}: use llama or mixtral.")
        family, shape = FAMILIES[self.model_type].config_class, dataclasses.asdict(self)
        shape = {k: v for k, v in shape.items() if k not in ("model_type", "model_config") and v is not None}
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
        """The config of any causal LM, whose arguments all stand in model_config, with its model_type.

        Raises:
            UserError: a size beside model_config, or what `config_of_mapping` refuses.
        """
        for known in dataclasses.fields(self):
            if known.name not in ("model_type", "model_config") and getattr(self, known.name) != known.default:
                raise UserError(
                    f"{known.name} stands beside model_type any, with which all sizes are in model_config: move it there."
                )
        return config_of_mapping(self._mapping())

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
        extra = self._mapping()
        for name in extra:
            if name not in known:
                raise UserError(unknown_key(f"model_config.{name}", name, sorted(known)))
        return extra


@dataclass
class MupArguments:
    """muP, see `hf_power.mup_config`."""

    mup: bool = field(default=True, metadata={"help": "False: plain Llama/Mixtral with one learning rate."})
    base_width: int = field(default=256, metadata={"help": "hidden_size at which muP changes nothing."})
    base_intermediate_size: int | None = field(default=None, metadata={"help": "MLP width at base_width."})
    base_attention_width: int | None = field(default=None, metadata={"help": "Heads x head size at base_width."})
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
    """Length of the run, and the numbers it is to use. Lengths may be given as text, such as 30M; they become `Tokens`."""

    tokens: Tokens | None = field(default=None, metadata={"help": "Length of the run, e.g. 30M or 2.1B tokens."})
    recipe: str | None = field(default=None, metadata={"help": "recipe.json or Hub repository with tuned numbers."})
    max_eval_tokens: Tokens = field(default=Tokens("200k"), metadata={"help": "Held-out tokens used in an evaluation."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps in a row without a finite gradient: stop."})
    average_window: float | None = field(
        default=None,
        metadata={
            "help": "Keep a mean of the weights over about this part of the steps, e.g. 0.1, in OUTPUT_DIR/average."
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


def unknown_key(what: str, name: str, known: list[str]) -> str:
    """The sentence for a key that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"{what} is unknown" + (
        f": did you mean {near[0]}?" if near else f": use one of {', '.join(known[:12])} ..."
    )
