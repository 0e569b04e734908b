"""The tuned numbers and where they came from, as recipe.json."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from transformers import CONFIG_MAPPING

from hf_power.mup.config import PRESETS
from hf_power.recipe.forecast import Forecast
from hf_power.recipe.interval import predictive_factors
from hf_power.recipe.proxies import MUP, proxies_settings
from hf_power.recipe.shown import plot_recipe, recipe_summary
from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.files import parse_json, write_json
from hf_power.records.rows import Row
from hf_power.records.run import Intervals, PowerScale, Sample, Validity
from hf_power.records.schema import Finite, Json, Limit, Positive, PositiveNumber, check_fields, decode, encode, one_of
from hf_power.records.summary import Summarized, Summary
from hf_power.schedule import DECAY_SHAPES, PAPER_LAW, PAPER_MAX_LR, Law
from hf_power.schedule.presets import POWER_TO_WSD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 1
FILE_NAME = "recipe.json"
MAX_SAMPLES = 500
_FEW = Limit(lambda words: f"{words} of at most {MAX_SAMPLES} draws", lambda draws: len(draws) <= MAX_SAMPLES)
_FAMILY = Limit(
    lambda words: words.replace("a text", "a model type of transformers, e.g. llama"),
    lambda name: name in CONFIG_MAPPING,
)
_REMEDY = "pass the recipe.json that hf-power fit wrote"

# A schedule that knows its horizon, and so may have a law of its peak.
KnownHorizon = Literal["warmup_stable_decay", "cosine", "linear", "inverse_sqrt"]


@dataclass(frozen=True)
class _Fit:
    """What a recipe takes out of fit.json."""

    schedule: str
    law: Law
    intervals: Intervals
    samples: list[Sample]
    validity: Validity
    power: PowerScale | None
    scatter_octaves: Finite = 0.0


@dataclass(frozen=True, repr=False)
class Recipe(Summarized):
    """What one sweep on small models found, to hold for every run after it.

    The learning rate is ``min(max_lr, a * size**size_exponent * beta**batch_exponent * n**b)`` with n the tokens seen and
    ``beta = min(tokens_per_step, B_crit) / 4096``, ``B_crit = critical_batch_tokens * (n / 1e9)**critical_batch_growth``
    (eq. 7 of Shen et al., arXiv:2408.13359, which has neither a critical batch nor a size). Over widths muP carries it, or
    under standard parameterization the size. The defaults are the paper's.

    Attributes:
        a: scale of the law, > 0.
        b: exponent of the tokens, < 0.
        batch_exponent: exponent of the batch.
        critical_batch_tokens: batch at 1e9 tokens above which the rate no longer rises, in tokens per step; None means that
            there is none.
        critical_batch_growth: exponent of the tokens in the critical batch.
        size: "parameters" or "width", what the size counts, as the sweep counted it; None where the law has none.
        size_exponent: of the size.
        parameterization: "mup", or "standard" where the proxies were not under muP.
        max_lr: eta_max, the cap, > 0.
        weight_decay: AdamW's coefficient at base width; the law only holds for the one it was tuned with. None: not known.
        model_type: of the proxies, "llama" or "mixtral" or that of any other causal LM of transformers; None for any.
        form: of the proxies' muP, "multiplier" or "plain", see `hf_power.mup`; the plain form has no
            other numbers of muP than base_width or base_config, initializer_range and embedding_multiplier.
        tokenizer: `hf_power.data.tokenizer.tokenizer_fingerprint` of the proxies' tokenizer; None for any.
        warmup_tokens: length of the proxies' warmup, in tokens; None for unknown.
        decay_ratio: length of the proxies' tail over the run, in [0, 1].
        decay_shape: of the tail, one of `hf_power.schedule.DECAY_SHAPES`.
        base_width: hidden_size at which muP changes nothing.
        preset: muP preset, see `mup_config`.
        embedding_multiplier, residual_multiplier, initializer_range: muP's constants.
        attention_multiplier, base_intermediate_size, base_attention_width, base_head_dim, base_num_layers: arguments of
            `mup_config` that the proxies were given; None for its own choice.
        base_config: of the plain form, the config of the model at its base in place of base_width; None for base_width.
        laws: schedule -> the law of the best peak of a schedule that knows its horizon (eq. 6).
        intervals: 95 % of "a" (Power's own) and of the law's other numbers, as [low, high].
        samples: bootstrap draws of the fitted law, at most 500, see `hf_power.records.run.Sample`.
        scatter_octaves: scatter of cells around the law, see `hf_power.fit.result.Fit`.
        validity: what the fit has seen: "widths", "parameters", "tokens_per_step" and "tokens" as [min, max],
            "extrapolates_to", "misfit".
        forecast: of the loss at the end of a run; None where the sweep tells none.
        provenance: how the numbers were found (versions, data fingerprint, sweep).
    """

    a: Finite = PAPER_LAW.a
    b: Finite = PAPER_LAW.b
    batch_exponent: Finite = PAPER_LAW.batch_exponent
    critical_batch_tokens: PositiveNumber | None = None
    critical_batch_growth: Finite = 0.0
    size: Literal["parameters", "width"] | None = None
    size_exponent: Finite = 0.0
    parameterization: Literal["mup", "standard"] = "mup"
    max_lr: Finite = PAPER_MAX_LR
    weight_decay: Finite | None = 0.1
    model_type: Annotated[str, _FAMILY] | None = None
    form: Literal["multiplier", "plain"] = "multiplier"
    tokenizer: str | None = None
    warmup_tokens: int | None = None
    decay_ratio: Finite = 0.1
    decay_shape: Annotated[str, one_of(DECAY_SHAPES)] = "exponential"
    base_width: int = 256
    preset: Annotated[str, one_of(PRESETS)] = "paper"
    embedding_multiplier: Finite = 12.0
    residual_multiplier: Finite = 0.22
    initializer_range: Finite = 0.1
    attention_multiplier: PositiveNumber | None = None
    base_intermediate_size: Positive | None = None
    base_attention_width: Positive | None = None
    base_head_dim: Positive | None = None
    base_num_layers: Positive | None = None
    base_config: dict[str, Json] | None = None
    laws: dict[KnownHorizon, Law] = field(default_factory=dict)
    intervals: Intervals = field(default_factory=Intervals)
    samples: Annotated[list[Sample], _FEW] = field(default_factory=list)
    scatter_octaves: Finite = 0.0
    validity: Validity = field(default_factory=Validity)
    forecast: Forecast | None = None
    provenance: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "recipe")
        if self.a <= 0 or self.b >= 0 or self.max_lr <= 0 or self.base_width < 1:
            raise UserError(
                "recipe: a, max_lr and base_width must be positive and b negative, got "
                f"a={self.a}, b={self.b}, max_lr={self.max_lr}, base_width={self.base_width}."
            )
        if not 0 <= self.decay_ratio <= 1 or (self.warmup_tokens or 0) < 0 or (self.weight_decay or 0) < 0:
            raise UserError(
                "recipe: decay_ratio must lie between 0 and 1, warmup_tokens and weight_decay must not be negative, got "
                f"{self.decay_ratio}, {self.warmup_tokens} and {self.weight_decay}."
            )
        for name, value in ((f"{of}.{key}", x) for of, law in self.laws.items() for key, x in law.to_dict().items()):
            if value is not None and not math.isfinite(value):
                raise UserError(f"recipe: laws.{name} must be a finite number, got {value}.")
            if value is not None and value <= 0 and name.endswith((".a", ".critical_batch_tokens")):
                raise UserError(f"recipe: laws.{name} must be positive, got {value}.")

    @property
    def law(self) -> Law:
        """Power's own law, uncapped."""
        critical = self.critical_batch_tokens, self.critical_batch_growth
        return Law(self.a, self.b, self.batch_exponent, *critical, self.size, self.size_exponent)

    @property
    def proxies(self) -> dict[str, float]:
        """The "tokens" and "flops" of the runs of its sweep; empty if the provenance does not tell."""
        told = self.provenance.get("proxies")
        return {k: v for k, v in told.items() if isinstance(v, int | float)} if isinstance(told, dict) else {}

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe from a file, a folder with a recipe.json, or a Hub repository.

        Raises:
            NotFoundError: if there is no such file or repository.
            UserError: if the content is not a recipe of this schema.
        """
        path = Path(source)
        if path.is_dir():
            path = path / FILE_NAME
        if not path.exists() and path.suffix != ".json" and str(source).count("/") == 1:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(str(source), FILE_NAME))
        if not path.exists():
            raise NotFoundError(f"there is no recipe at {source}: pass a recipe.json, its folder, or a Hub repository.")
        return cls.from_json(path.read_bytes(), str(source))

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "recipe") -> "Recipe":
        """Parse the text of a recipe.json; `source` names it in errors."""
        content = parse_json(text if isinstance(text, bytes) else text.encode(), source, _REMEDY)
        if isinstance(content, dict) and (what := _other_file(content)):
            raise UserError(f"{source} is {what} and no recipe: {_REMEDY}.")
        if not isinstance(content, dict) or type(content.get("schema")) is not int or content["schema"] != SCHEMA:
            found = shown(content.get("schema") if isinstance(content, dict) else type(content).__name__)
            raise UserError(f"{source} is not a recipe of schema {SCHEMA}, got {found}: {_REMEDY}.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(content) - known - {"schema"})
        missing = sorted(known - set(content))
        if unknown or missing:
            raise UserError(f"{source} has unknown keys {shown(unknown)} or lacks {missing}: {_REMEDY}.")
        values = {name: value for name, value in content.items() if name != "schema"}
        return decode(cls, values, source, _REMEDY, closed=True)

    @classmethod
    def from_fit(
        cls,
        fit: Mapping[str, object],
        rows: Sequence[Row],
        laws: Mapping[str, object] | None = None,
        told: Mapping[str, object] | None = None,
    ) -> "Recipe":
        """The recipe of a fit and the rows of its sweep.

        Power's a is the one measured on rows of schedule "power"; without such rows it is the fitted a times 4 / 4.6, the
        paper's ratio, and the provenance says that it was assumed.

        Args:
            fit: the content of fit.json.
            rows: of the sweep; the first one tells the proxies' settings, which are one for all (those of a sweep from
                elsewhere tell none, and the defaults hold).
            laws: schedule -> law of further schedules, see `hf_power.fit.fit.fit_laws`.
            told: fields of the recipe that neither says.

        Raises:
            UserError: a fit that makes no recipe, for example with b >= 0.
        """
        found = decode(_Fit, fit, "the fit", "make it with hf-power fit")
        intervals: Intervals = {**found.intervals}
        if found.power is None:
            low, high = found.intervals["a"]
            a, intervals["a"] = found.law.a * POWER_TO_WSD, (low * POWER_TO_WSD, high * POWER_TO_WSD)
        else:
            a, intervals["a"] = found.power["a"], found.power["interval"]
        caps = [row.max_lr for row in rows if row.schedule == "power" and row.max_lr is not None]
        law = {f.name: getattr(found.law, f.name) for f in fields(Law)} | {"a": a}
        numbers = {**law, **({"max_lr": max(caps)} if caps else {}), **proxies_settings(rows), **(told or {})}
        flops = sum(row.trained_tokens * row.flops_per_token for row in rows)
        about = {name: getattr(rows[0], name) for name in ("data", "versions", "hardware", "settings")}
        provenance = {
            **{name: fit[name] for name in ("schedule", "sweep_sha256", "num_rows", "num_diverged", "num_failed")},
            "scale": "measured on the power rows" if found.power else "assumed, not measured: 4 / 4.6 of the fitted a",
            "proxies": {"tokens": sum(row.trained_tokens for row in rows), "flops": flops},
            **{name: value for name, value in about.items() if value},
        }
        parts: dict[str, object] = {
            "intervals": intervals,
            "samples": found.samples[:MAX_SAMPLES],
            "validity": found.validity,
        }
        parts["scatter_octaves"] = found.scatter_octaves
        parts["laws"] = dict(laws or {}) | {found.schedule: found.law}
        return decode(cls, {**numbers, **parts, "provenance": provenance}, "recipe", _REMEDY, closed=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write recipe.json atomically."""
        write_json(path, {"schema": SCHEMA, **encode(self)})

    def peak_lr(
        self, tokens: int, tokens_per_step: int, schedule: str = "warmup_stable_decay", size: float | None = None
    ) -> float:
        """The best peak of a schedule that knows its horizon, by its law (eq. 6); max_lr is Power's cap.

        Args:
            tokens: T, the length of the run with its decay.
            tokens_per_step: tokens of one optimizer step over all processes.
            schedule: one that `laws` holds.
            size: the model's parameters or width, where the recipe has a `size`.

        Raises:
            UserError: the schedule was not fitted, it is "power", which needs no horizon, or the size is missing.
        """
        if schedule == "power":
            raise UserError("power needs no horizon and so has no peak of its own: use lr_scheduler_type='power'.")
        if schedule not in self.laws:
            raise UserError(
                f"the recipe has no law for {schedule}, only for {', '.join(self.laws) or 'power'}: sweep that schedule, "
                "or give a learning_rate."
            )
        return self.laws[schedule].lr(tokens, tokens_per_step, size)

    def lr_interval(self, tokens: float, tokens_per_step: int, size: float | None = None) -> tuple[float, float]:
        """95 % interval for the best rate of Power's uncapped law after `tokens` tokens.

        It is predictive: of the law, by its draws, and of the scatter of cells around it. Without either both ends are the
        law itself. The samples are draws of the fitted law, which Power's own differs from by a factor.
        """
        rate = self.law.lr(tokens, tokens_per_step, size)
        low, high = self.factors(tokens, tokens_per_step, size)
        return (rate * low, rate * high) if math.isfinite(rate) else (rate, rate)

    def factors(self, tokens: float, tokens_per_step: int, size: float | None = None) -> tuple[float, float]:
        """The ends of the 95 % interval over the rate, of any of the recipe's laws."""
        place = tokens, tokens_per_step, size
        return predictive_factors(self.samples, self.size, self.scatter_octaves, place)

    def summary(self) -> Summary:
        """The law, where it was measured, and the settings that it holds for."""
        return recipe_summary(self)

    def plot(self, tokens: Sequence[float] | None = None, tokens_per_step: Sequence[int] | None = None) -> "Figure":
        """The rate over the tokens for a few batches, see `hf_power.recipe.shown.plot_recipe`."""
        return plot_recipe(self, tokens, tokens_per_step)

    def schedule_kwargs(self, size: float | None = None) -> dict[str, float]:
        """The law of a model of this size, as arguments of `get_power_schedule`."""
        return {name: value for name, value in self.law.at(size).to_dict().items() if value is not None}

    def lengths(self) -> dict[str, float | str]:
        """Warmup and tail, as arguments of `get_power_schedule`; a run may have others."""
        names = ("warmup_tokens", "decay_ratio", "decay_shape")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def settings(self) -> dict[str, object]:
        """The same numbers under the names that pretraining gives them; a run may not contradict them."""
        names = ("weight_decay", *self._mup_names())
        numbers = {name: getattr(self, name) for name in names}
        return {"learning_rate": self.max_lr} | {name: value for name, value in numbers.items() if value is not None}

    def _mup_names(self) -> tuple[str, ...]:
        """The fields that are settings of muP."""
        if self.parameterization == "standard":
            return ()
        if self.form == "multiplier":
            return ("preset", *MUP)
        return (
            "base_width" if self.base_config is None else "base_config",
            "initializer_range",
            "embedding_multiplier",
        )


def _other_file(content: Mapping[str, object]) -> str | None:
    """What a record of ours is that was given for a recipe; None for everything else."""
    marks = {
        "the run.json of a run": {"kind", "lineage"},
        "a fit.json": {"cells", "center"},
        "a plan.json": {"milestones", "compute"},
        "a verify.json": {"verdict", "regret"},
        "an eval.json": {"metrics", "model"},
    }
    return next((what for what, keys in marks.items() if keys <= set(content)), None)
