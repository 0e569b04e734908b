"""The tuned numbers and where they came from, as recipe.json."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from hf_power.mup import FAMILIES, PRESETS
from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.files import write_json
from hf_power.records.schema import fits, parse_json
from hf_power.schedule import DECAY_SHAPES, LAW, TOKENS_PER_BETA, power_law

SCHEMA = 1
FILE_NAME = "recipe.json"
KNOWN_HORIZON = ("warmup_stable_decay", "cosine", "linear", "inverse_sqrt")  # schedules whose peak may have a law
MAX_SAMPLES = 500
POWER_TO_WSD = 4.0 / 4.6  # the paper's a of the schedule (eq. 7) over its a of the optima of WSD (eq. 6)


@dataclass(frozen=True)
class Recipe:
    """What one sweep on small models found, to hold for every run after it.

    The learning rate is ``min(max_lr, a * beta**batch_exponent * n**b)`` with n the tokens seen and
    ``beta = min(tokens_per_step, critical_batch_tokens) / 4096`` (eq. 7 of Shen et al., arXiv:2408.13359, which has no
    critical batch); muP carries it over widths. The defaults are the paper's.

    Attributes:
        a: scale of the law, > 0.
        b: exponent of the tokens, < 0.
        batch_exponent: exponent of the batch.
        critical_batch_tokens: batch above which the rate no longer rises, in tokens per step; None for none.
        max_lr: eta_max, the cap, > 0.
        weight_decay: AdamW's coefficient at base width; the law only holds for the one it was tuned with.
        model_type: "llama" or "mixtral", of the proxies; None for any.
        tokenizer: `hf_power.data.blocks.tokenizer_fingerprint` of the proxies' tokenizer; None for any.
        warmup_tokens: length of the proxies' warmup, in tokens; None for unknown.
        decay_ratio: length of the proxies' tail over the run, in [0, 1].
        decay_shape: of the tail, one of `hf_power.schedule.DECAY_SHAPES`.
        base_width: hidden_size at which muP changes nothing.
        preset: muP preset, see `mup_config`.
        embedding_multiplier, residual_multiplier, initializer_range: muP's constants.
        attention_multiplier, base_intermediate_size, base_head_dim, base_num_layers: arguments of `mup_config` that the
            proxies were given; None for its own choice.
        laws: schedule -> {"a", "b", "batch_exponent", "critical_batch_tokens"}, the best peak of a schedule that knows
            its horizon (eq. 6).
        intervals: 95 % of "a" (Power's own), "b", "batch_exponent" and "critical_batch_tokens", as [low, high].
        samples: bootstrap draws [a, b, batch_exponent] of the fitted law, at most 500.
        validity: what the fit has seen: "widths", "tokens_per_step" and "tokens" as [min, max], "extrapolates_to".
        provenance: how the numbers were found (versions, data fingerprint, sweep).
    """

    a: float = 4.0
    b: float = -0.51
    batch_exponent: float = 1.0
    critical_batch_tokens: float | None = None
    max_lr: float = 0.02
    weight_decay: float = 0.1
    model_type: str | None = None
    tokenizer: str | None = None
    warmup_tokens: int | None = None
    decay_ratio: float = 0.1
    decay_shape: str = "exponential"
    base_width: int = 256
    preset: str = "paper"
    embedding_multiplier: float = 12.0
    residual_multiplier: float = 0.22
    initializer_range: float = 0.1
    attention_multiplier: float | None = None
    base_intermediate_size: int | None = None
    base_head_dim: int | None = None
    base_num_layers: int | None = None
    laws: dict[str, dict[str, Any]] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    samples: list[list[float]] = field(default_factory=list)
    validity: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in NUMBERS:
            _number(name, getattr(self, name))
        for name in OPTIONAL_NUMBERS:
            if getattr(self, name) is not None and _number(name, getattr(self, name)) <= 0 and name != "warmup_tokens":
                raise UserError(f"recipe: {name} must be positive or null, got {shown(getattr(self, name))}.")
        for name in WHOLE_NUMBERS:
            if (getattr(self, name) or 0) % 1:
                raise UserError(f"recipe: {name} must be a whole number, got {shown(getattr(self, name))}.")
        if not isinstance(self.preset, str) or not isinstance(self.provenance, dict):
            raise UserError(f"recipe: preset must be a name and provenance a mapping, got {shown(self.preset)}.")
        if self.a <= 0 or self.b >= 0 or self.max_lr <= 0 or self.base_width < 1:
            raise UserError(
                "recipe: a, max_lr and base_width must be positive and b negative, got "
                f"a={self.a}, b={self.b}, max_lr={self.max_lr}, base_width={self.base_width}."
            )
        _choice("preset", self.preset, tuple(PRESETS))
        _choice("decay_shape", self.decay_shape, tuple(DECAY_SHAPES))
        if self.model_type is not None:
            _choice("model_type", self.model_type, tuple(FAMILIES))
        if not (self.tokenizer is None or isinstance(self.tokenizer, str)):
            raise UserError(f"recipe: tokenizer must be a fingerprint or null, got {shown(self.tokenizer)}.")
        if not 0 <= self.decay_ratio <= 1 or (self.warmup_tokens or 0) < 0 or self.weight_decay < 0:
            raise UserError(
                "recipe: decay_ratio must lie between 0 and 1, warmup_tokens and weight_decay must not be negative, got "
                f"{self.decay_ratio}, {self.warmup_tokens} and {self.weight_decay}."
            )
        _check_laws(self.laws)
        _check_intervals(self.intervals)
        _check_samples(self.samples)
        _check_validity(self.validity)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe from a file, a folder with a recipe.json, or a Hub repository.

        Raises:
            FileNotFoundError: if there is no such file or repository.
            ValueError: if the content is not a recipe of this schema.
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
        content = parse_json(text if isinstance(text, bytes) else text.encode(), source, "write it with Recipe.save")
        if not isinstance(content, dict) or not fits(content.get("schema"), int) or content["schema"] != SCHEMA:
            found = shown(content.get("schema") if isinstance(content, dict) else type(content).__name__)
            raise UserError(f"{source} is not a recipe of schema {SCHEMA}, got {found}: write it with Recipe.save.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(content) - known - {"schema"})
        missing = sorted(known - set(content))
        if unknown or missing:
            what = f"has unknown keys {shown(unknown)} or lacks {missing}"
            raise UserError(f"{source} {what}: write it with Recipe.save.")
        return cls(**{k: v for k, v in content.items() if k != "schema"})

    @classmethod
    def from_fit(
        cls, fit: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], laws: Mapping[str, dict[str, Any]] | None = None
    ) -> "Recipe":
        """The recipe of a fit and the rows of its sweep.

        Power's a is the one measured on rows of schedule "power"; without such rows it is the fitted a times 4 / 4.6, the
        paper's ratio, and the provenance says that it was assumed.

        Args:
            fit: the content of fit.json.
            rows: of the sweep; the first one tells the proxies' settings, which are one for all (those of a sweep from
                elsewhere tell none, and the defaults hold).
            laws: schedule -> law of further schedules, see `hf_power.fit.fit.fit_laws`.

        Raises:
            ValueError: a fit that makes no recipe, for example with b >= 0.
        """
        law, power, first = fit["law"], fit.get("power"), rows[0]
        numbers: dict[str, Any] = {name: law[name] for name in LAW}
        intervals = {name: fit["intervals"].get(name) for name in LAW}
        numbers["a"] = power["a"] if power else law["a"] * POWER_TO_WSD
        intervals["a"] = power["interval"] if power else [end * POWER_TO_WSD for end in intervals["a"]]
        caps = [row["max_lr"] for row in rows if row["schedule"] == "power"]
        if caps:
            numbers["max_lr"] = max(caps)
        return cls(
            **numbers | _proxies_settings(rows),
            laws={**(laws or {}), fit["schedule"]: {name: law[name] for name in LAW}},
            intervals=intervals,
            samples=[list(sample) for sample in fit["samples"][:MAX_SAMPLES]],
            validity=dict(fit["validity"]),
            provenance={
                **{name: fit[name] for name in ("schedule", "sweep_sha256", "num_rows", "num_diverged", "num_failed")},
                "scale": "measured on the power rows" if power else "assumed, not measured: 4 / 4.6 of the fitted a",
                "proxies": {
                    "tokens": sum(row.get("trained_tokens", 0) for row in rows),
                    "flops": sum(row.get("trained_tokens", 0) * row.get("flops_per_token", 0) for row in rows),
                },
                **{name: first[name] for name in ("data", "versions", "hardware", "settings") if name in first},
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write recipe.json atomically."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    def peak_lr(self, tokens: int, tokens_per_step: int, schedule: str = "warmup_stable_decay") -> float:
        """The best peak of a schedule that knows its horizon, ``a * beta**c * tokens**b`` (eq. 6); max_lr is Power's cap.

        Args:
            tokens: T, the length of the run with its decay.
            tokens_per_step: tokens of one optimizer step over all processes.
            schedule: one that `laws` holds.

        Raises:
            ValueError: the schedule was not fitted, or it is "power", which needs no horizon.
        """
        if schedule == "power":
            raise UserError("power needs no horizon and so has no peak of its own: use lr_scheduler_type='power'.")
        if schedule not in self.laws:
            raise UserError(
                f"the recipe has no law for {schedule}, only for {', '.join(self.laws) or 'power'}: sweep that schedule, "
                "or give a learning_rate."
            )
        return power_law(tokens, tokens_per_step=tokens_per_step, **self.laws[schedule])

    def lr_interval(self, tokens: float, tokens_per_step: int) -> tuple[float, float]:
        """95 % interval of Power's uncapped law after `tokens` tokens; without samples both ends are the law itself.

        The samples are draws of the fitted law, which Power's own differs from by a factor: the 2.5 and 97.5 % quantiles
        of the draws' rates over the median draw's, times the recipe's own rate.
        """
        rate = power_law(tokens, tokens_per_step=tokens_per_step, **self.schedule_kwargs())
        if not self.samples or not math.isfinite(rate):
            return rate, rate
        a, b, c = np.asarray(self.samples, dtype=float).T
        batch = min(tokens_per_step, self.critical_batch_tokens or math.inf)
        logs = np.log(a) + c * math.log(batch / TOKENS_PER_BETA) + b * math.log(tokens)
        low, middle, high = np.quantile(logs, (0.025, 0.5, 0.975))
        return rate * math.exp(low - middle), rate * math.exp(high - middle)

    def schedule_kwargs(self) -> dict[str, float]:
        """The law, as arguments of `get_power_schedule`."""
        return {name: getattr(self, name) for name in LAW if getattr(self, name) is not None}

    def lengths(self) -> dict[str, Any]:
        """Warmup and tail, as arguments of `get_power_schedule`; a run may have others."""
        names = ("warmup_tokens", "decay_ratio", "decay_shape")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def settings(self) -> dict[str, Any]:
        """The same numbers under the names that pretraining gives them; a run may not contradict them."""
        numbers = {name: getattr(self, name) for name in ("weight_decay", "preset", *MUP)}
        return {"learning_rate": self.max_lr} | {name: value for name, value in numbers.items() if value is not None}


MUP = (
    *("base_width", "embedding_multiplier", "residual_multiplier", "initializer_range"),
    *("attention_multiplier", "base_intermediate_size", "base_head_dim", "base_num_layers"),
)
NUMBERS = ("a", "b", "batch_exponent", "max_lr", "weight_decay", "decay_ratio", *MUP[:4])
OPTIONAL_NUMBERS = ("critical_batch_tokens", "warmup_tokens", *MUP[4:])
WHOLE_NUMBERS = ("warmup_tokens", "base_width", "base_intermediate_size", "base_head_dim", "base_num_layers")


def _proxies_settings(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the runs of the sweep were made with, as far as their rows tell."""
    first = rows[0]
    found: dict[str, Any] = {
        name: first[name] for name in ("model_type", "weight_decay", "decay_shape") if name in first
    }
    if "warmup_tokens" in first:  # whole steps: the smallest batch comes nearest to what was asked for
        found["warmup_tokens"] = max(row["warmup_tokens"] for row in rows)
    found["tokenizer"] = first.get("data", {}).get("tokenizer")
    if "settings" in first:
        mup = {k: v for k, v in first["settings"].get("mup", {}).items() if v is not None and k in (*MUP, "preset")}
        found |= PRESETS[mup.get("preset", "paper")] | mup
    if "decay_tokens" in first:
        longest = max(rows, key=lambda row: row["tokens"] / row["tokens_per_step"])
        steps, tail = (longest[name] // longest["tokens_per_step"] for name in ("tokens", "decay_tokens"))
        # A tail is a whole number of steps: the shortest ratio that gives it is the one that was asked for.
        ratios = (round(tail / steps, digits) for digits in range(1, 16))
        found["decay_ratio"] = next((ratio for ratio in ratios if round(ratio * steps) == tail), tail / steps)
    return found


def _number(name: str, value: Any) -> float:
    if fits(value, float) and math.isfinite(value):
        return value  # type: ignore[no-any-return]
    raise UserError(f"recipe: {name} must be a finite number, got {shown(value)}.")


def _choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in tuple(choices):
        raise UserError(f"recipe: {name} must be one of {', '.join(choices)}, got {shown(value)}.")


def _pair(name: str, value: Any) -> None:
    if not isinstance(value, list) or len(value) != 2 or _number(name, value[0]) > _number(name, value[1]):
        raise UserError(f"recipe: {name} must be a list [low, high], got {shown(value)}.")


def _mapping(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict) or not set(value) <= set(known):
        raise UserError(f"recipe: {name} must be a mapping with keys out of {', '.join(known)}, got {shown(value)}.")


def _check_laws(laws: Any) -> None:
    _mapping("laws", laws, KNOWN_HORIZON)
    for schedule, law in laws.items():
        name = f"laws.{schedule}"
        if not isinstance(law, dict) or set(law) != set(LAW):
            raise UserError(f"recipe: {name} must be a mapping with the keys {', '.join(LAW)}, got {shown(law)}.")
        for key, value in law.items():
            positive = key in ("a", "critical_batch_tokens")
            if not (value is None and key == LAW[-1]) and _number(f"{name}.{key}", value) <= 0 and positive:
                raise UserError(f"recipe: {name}.{key} must be positive, got {shown(value)}.")


def _check_intervals(intervals: Any) -> None:
    _mapping("intervals", intervals, LAW)
    for name, ends in intervals.items():
        if not (ends is None and name == LAW[-1]):
            _pair(f"intervals.{name}", ends)


def _check_samples(samples: Any) -> None:
    if not isinstance(samples, list) or len(samples) > MAX_SAMPLES:
        raise UserError(f"recipe: samples must be a list of at most {MAX_SAMPLES} draws, got {type(samples).__name__}.")
    for sample in samples:
        if not isinstance(sample, list) or len(sample) != 3 or _number("samples", sample[0]) <= 0:
            raise UserError(f"recipe: a sample must be a list [a > 0, b, batch_exponent], got {shown(sample)}.")
        for value in sample[1:]:
            _number("samples", value)


def _check_validity(validity: Any) -> None:
    _mapping("validity", validity, ("widths", "tokens_per_step", "tokens", "extrapolates_to"))
    if not isinstance(validity.get("widths", []), list):
        raise UserError(f"recipe: validity.widths must be a list of widths, got {shown(validity['widths'])}.")
    for width in validity.get("widths", []):
        _number("validity.widths", width)
    for name in ("tokens_per_step", "tokens"):
        if name in validity:
            _pair(f"validity.{name}", validity[name])
    reach = validity.get("extrapolates_to", {})
    _mapping("validity.extrapolates_to", reach, ("tokens", "tokens_per_step", "sd_octaves"))
    for name, value in reach.items():
        _number(f"validity.extrapolates_to.{name}", value)


def warnings_for(
    recipe: Recipe, *, tokens: int, tokens_per_step: int, width: int | None = None, weight_decay: float | None = None
) -> list[str]:
    """Sentences on where a run lies outside of what the recipe's fit has seen, with the factors.

    Args:
        recipe: its validity may be empty, which says nothing.
        tokens: length of the run.
        tokens_per_step: its batch.
        width: hidden_size, None if unknown.
        weight_decay: None for the recipe's.
    """
    found = []
    for name, value, what in (("tokens", tokens, "tokens"), ("tokens_per_step", tokens_per_step, "tokens per step")):
        if off := _outside(value, recipe.validity.get(name, [])):
            found.append(f"{value:,} {what} are {off} of the sweep{_reach(recipe, name, value)}.")
    widths = [x for x in recipe.validity.get("widths", []) if x]  # 0: a sweep from elsewhere that does not tell
    if width is not None and (off := _outside(width, widths)):
        found.append(f"the width {width:,} is {off} of the sweep: muP alone carries the rate there.")
    critical = recipe.critical_batch_tokens
    if critical is not None and tokens_per_step > critical:
        found.append(
            f"{tokens_per_step:,} tokens per step are {tokens_per_step / critical:.3g} times the critical batch, "
            f"{critical:,.0f}: the rate no longer rises with the batch, a smaller one learns as much per token."
        )
    if weight_decay is not None and weight_decay != recipe.weight_decay:
        found.append(
            f"weight decay is {weight_decay:g}, the sweep had {recipe.weight_decay:g}: the law only holds for its own."
        )
    return found


def _outside(value: float, seen: list[float]) -> str:
    """How far a value lies outside of those seen, as a factor; empty if it does not."""
    if not seen or min(seen) <= value <= max(seen):
        return ""
    if value > max(seen):
        return f"{value / max(seen):.3g} times the largest, {max(seen):,},"
    return f"{min(seen) / value:.3g} times below the smallest, {min(seen):,},"


def _reach(recipe: Recipe, name: str, value: float) -> str:
    reach = recipe.validity.get("extrapolates_to", {})
    if name not in reach or value < recipe.validity[name][0]:
        return ""
    side = "within" if value <= reach[name] else "beyond"
    return f", {side} the {reach[name]:,} up to which its fit is sure of the rate"
