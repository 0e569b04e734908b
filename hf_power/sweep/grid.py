"""The grid of a sweep: what is to be trained, read from a YAML and checked before anything is started."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from hf_power.records.errors import UserError, shown
from hf_power.schedule import PAPER_MAX_LR, Law
from hf_power.settings.any_model import sizes_of
from hf_power.settings.arguments import refuse_in_a_sweep
from hf_power.settings.read import flatten, read_yaml
from hf_power.settings.sections import OF_TOKENS, SECTIONS, names_of, parse_tokens, unknown_key
from hf_power.settings.settings import Settings

SCHEDULES = ("warmup_stable_decay", "power", "cosine", "linear", "inverse_sqrt")
# Significant digits of a learning rate or a scale. A number of a row can be typed again, and a value that was reached in
# two ways is one value.
FEW_DIGITS = 4
# What scale_width changes.
SCALED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")

# As a YAML has them, name of the section -> key -> value. `Settings.from_dict` checks them.
Sections = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Grid:
    """A sweep: the ``sweep`` section of its YAML; the other sections are those of pretraining.

    Attributes:
        sections: model, mup, data, run and training, as pretraining takes them; the model's hidden_size is the first
            width. They stay as they were written, since the ids of the rows are hashes of them.
        widths: hidden sizes, the shape scaled by `hf_power.mup.config.scale_width`.
        tokens_per_step: batch sizes, in tokens, multiples of block_size.
        tokens: horizons T, in tokens, decay included; whole numbers of steps of every batch.
        schedules: name -> learning rates to begin with; for "power" scales, in multiples of the law's a.
        seeds: of the initialization and the data order.
        law: of the power runs, whose scales multiply its a; None means that it is fitted on this sweep's
            warmup_stable_decay rows.
        warmup_tokens: linear warmup, the same for every horizon.
        decay_ratio: length of the tail over the horizon (warmup_stable_decay, power, inverse_sqrt).
        decay_shape: of the tail: linear, 1-sqrt or cosine.
        max_lr: the cap of the power runs.
        factor: between neighbouring learning rates where the sweep adds some.
        max_extensions: how often learning rates are added beyond an edge at which the best one lies; 0 means never.
        start_exponent: another batch B begins at learning rates times (B / first batch)**start_exponent, in whole
            factors, because the optimum grows with the batch; this is only a start, and the sweep extends from there.
        max_tokens: budget of the whole sweep; None means that there is none.
    """

    sections: Sections
    widths: tuple[int, ...]
    tokens_per_step: tuple[int, ...]
    tokens: tuple[int, ...]
    schedules: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...] = (0,)
    law: Law | None = None
    warmup_tokens: int = 0
    decay_ratio: float = 0.1
    decay_shape: str = "linear"
    max_lr: float = PAPER_MAX_LR
    factor: float = 2.0
    max_extensions: int = 4
    start_exponent: float = 0.7
    max_tokens: int | None = None

    @cached_property
    def settings(self) -> Settings:
        """The sections, parsed once."""
        return Settings.from_dict(self.sections)

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: a worker's devices are its own, and TrainingArguments keep those of their process."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def tail_tokens(self, horizon: int, tokens_per_step: int) -> int:
        """Length of a horizon's decay, in tokens: whole steps, and at least one."""
        return max(1, round(self.decay_ratio * horizon / tokens_per_step)) * tokens_per_step

    def sections_at(self, width: int, tokens_per_step: int) -> Sections:
        """The sections at a width and batch, without a schedule."""
        # A copy, because the sections of one grid are the start of many rows.
        result, model = copy.deepcopy(self.sections), self.settings.model
        if self.settings.is_plain:
            written = model.any_config()
            sizes = sizes_of(written, model.at_width(written, width))
            mapping = cast("dict[str, object]", model.model_config)
            result["model"] = {"model_type": model.model_type, "model_config": mapping | sizes}
            if self.settings.mup.base_config is not None:
                result["mup"]["base_config"] = self.settings.mup.base_config
        else:
            scaled = model.at_width(model.config(), width)
            own = {name: getattr(model, name) for name in names_of("model")}
            result["model"] = own | {name: getattr(scaled, name) for name in SCALED}
        training = result.setdefault("training", {})
        # A sweep has one process per run and never accumulates, so the batch alone makes the tokens of a step.
        training["per_device_train_batch_size"] = tokens_per_step // self.settings.data.block_size
        training["gradient_accumulation_steps"] = 1
        return result


def few_digits(value: float) -> float:
    """The value at FEW_DIGITS significant digits."""
    return float(f"{value:.{FEW_DIGITS}g}")


# Share of a horizon that rounding it to whole steps may change: about 2 % of the rate, which no sweep can tell.
MOST_ROUNDED = 0.05
NEEDED = ("widths", "tokens_per_step", "tokens", "schedules")
# Of Power's shapes, those that warmup_stable_decay of transformers has, too: one grid has one shape.
DECAY_SHAPES = ("linear", "1-sqrt", "cosine")
# Wide enough for every use, and narrow enough that a wrong unit or a slip of the pen is noticed.
RANGES = {
    "decay_ratio": (0.0, 1.0),
    "max_lr": (1e-12, 1e6),
    "factor": (1.01, 100.0),
    "start_exponent": (-2.0, 2.0),
    "max_extensions": (0.0, 100.0),
}
LAW_RANGES = {"a": (1e-12, 1e12), "b": (-10.0, -1e-6), "batch_exponent": (-10.0, 10.0)}


def load_grid(path: str) -> Grid:
    """Read and check the YAML of a sweep; a UserError for a key or value that is missing, unknown or out of range."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("sweep"), dict):
        raise UserError(f"{path} lacks the section sweep: a grid has it beside {', '.join(SECTIONS)}.")
    # For its checks alone: a row keeps the sections as they were written.
    flatten({name: values for name, values in content.items() if name != "sweep"}, path)
    return parse_grid(content, path)


def parse_grid(content: dict[str, dict[str, object]], source: str) -> Grid:
    """A `Grid` of the sections of a YAML, every value checked; `source` names it in errors."""
    values, where = content["sweep"], f"{source}: sweep"
    known = [field.name for field in dataclasses.fields(Grid) if field.name != "sections"]
    for key in values:
        if key not in known:
            raise UserError(unknown_key(f"{where}.{key}", str(key), known))
    for key in NEEDED:
        if not values.get(key):
            raise UserError(f"{where}.{key} is missing or empty: name at least one.")
    if not isinstance(seeds := values.get("seeds", ()), list | tuple):
        # One number would be a seed, and is mostly meant for how many there are.
        raise UserError(f"{where}.seeds must be a list, got {shown(seeds)}: write [0, 1, 2] for three seeds.")
    numbers = {key: _number(values[key], f"{where}.{key}", *ends) for key, ends in RANGES.items() if key in values}
    law = values.get("law")
    grid = Grid(
        sections={name: dict(section) for name, section in content.items() if name != "sweep"},
        widths=_axis(values["widths"], f"{where}.widths", kind="a whole number such as 256"),
        tokens_per_step=_axis(values["tokens_per_step"], f"{where}.tokens_per_step"),
        tokens=_axis(values["tokens"], f"{where}.tokens"),
        seeds=_axis(values.get("seeds", Grid.seeds), f"{where}.seeds", smallest=0, kind="a whole number such as 0"),
        schedules=_schedules(values["schedules"], f"{where}.schedules"),
        warmup_tokens=_tokens(values, "warmup_tokens", where) or 0,
        max_tokens=_tokens(values, "max_tokens", where),
        decay_ratio=numbers.get("decay_ratio", Grid.decay_ratio),
        max_lr=numbers.get("max_lr", Grid.max_lr),
        factor=numbers.get("factor", Grid.factor),
        start_exponent=numbers.get("start_exponent", Grid.start_exponent),
        max_extensions=int(numbers.get("max_extensions", Grid.max_extensions)),
        decay_shape=_decay_shape(values.get("decay_shape", Grid.decay_shape), where),
        law=None if law is None else _law(law, f"{where}.law"),
    )
    _check_settings(grid, source)
    _check_batches(grid, source)
    grid = dataclasses.replace(grid, tokens=_whole_steps(grid, where))
    _check_lengths(grid, source)
    _check_law(grid, source)
    return grid


def _axis(value: object, name: str, smallest: int = 1, kind: str = OF_TOKENS) -> tuple[int, ...]:
    axis = tuple(parse_tokens(each, name, kind) for each in (value if isinstance(value, list | tuple) else [value]))
    if not axis:
        raise UserError(f"{name} is empty: name at least one.")
    if len(set(axis)) < len(axis):
        raise UserError(f"{name} names a value twice, got {list(axis)}: name each once.")
    if min(axis) < smallest:
        raise UserError(f"{name} must be at least {smallest}, got {min(axis)}: correct it.")
    return axis


def _whole_steps(grid: Grid, where: str) -> tuple[int, ...]:
    """The horizons, each the nearest number of tokens that is a whole number of steps of every batch.

    A horizon is one for all batches, so that its cells are compared and fitted as one. What is changed is printed, and a
    change that would be more than a rounding is refused.
    """
    step, listed = math.lcm(*grid.tokens_per_step), " and ".join(f"{batch:,}" for batch in grid.tokens_per_step)
    found = []
    for horizon in grid.tokens:
        near = max(1, round(horizon / step)) * step
        if abs(near - horizon) > MOST_ROUNDED * horizon:
            ends = sorted({max(1, horizon // step) * step, (horizon // step + 1) * step})
            raise UserError(
                f"{where}.tokens: {horizon:,} tokens are no whole number of steps of {listed}: take "
                f"{' or '.join(f'{end:,}' for end in ends)}."
            )
        found.append(near)
    if len(set(found)) < len(found):
        raise UserError(
            f"{where}.tokens: {list(grid.tokens)} are the same number of steps of {listed}: set them apart."
        )
    if changed := [f"{n:,} for {asked:,}" for n, asked in zip(found, grid.tokens, strict=True) if n != asked]:
        print(f"horizons in whole steps of {listed}: {', '.join(changed)}", flush=True)
    return tuple(found)


def _tokens(values: dict[str, object], key: str, where: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    return parse_tokens(value, f"{where}.{key}")


def _number(value: object, name: str, low: float, high: float) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan  # NaN is in no range.
    if not low <= number <= high:
        raise UserError(f"{name} must be a number between {low:g} and {high:g}, got {value!r}.")
    return number


def _decay_shape(value: object, where: str) -> str:
    if not isinstance(value, str) or value not in DECAY_SHAPES:
        raise UserError(f"{where}.decay_shape must be linear, 1-sqrt or cosine, got {value!r}.")
    return value


def _schedules(schedules: object, where: str) -> dict[str, tuple[float, ...]]:
    if not isinstance(schedules, dict):
        raise UserError(f"{where} must map names to learning rates, got {schedules!r}.")
    parsed = {}
    for name, values in schedules.items():
        what = f"{where}.{name}"
        if name not in SCHEDULES:
            raise UserError(unknown_key(what, str(name), list(SCHEDULES)))
        rates = [_number(value, what, 1e-12, 1e6) for value in (values if isinstance(values, list) else [values])]
        if not rates:
            raise UserError(f"{what} is empty: name learning rates{' (scales of a)' if name == 'power' else ''}.")
        # The rows have FEW_DIGITS of a rate, under which two rates must not become one.
        if len({few_digits(rate) for rate in rates}) < len(rates):
            raise UserError(f"{what} names a learning rate twice, got {rates}: name each once.")
        parsed[name] = tuple(rates)
    return parsed


def _law(law: object, where: str) -> Law:
    if not isinstance(law, dict) or set(law) != set(LAW_RANGES):
        raise UserError(f"{where} must have the keys {', '.join(LAW_RANGES)}, got {law!r}.")
    return Law.from_dict({name: _number(law[name], f"{where}.{name}", *ends) for name, ends in LAW_RANGES.items()})


def _check_settings(grid: Grid, source: str) -> None:
    base = grid.settings
    if not base.mup.mup:
        raise UserError(f"{source}: a sweep needs muP (mup: true): without it nothing carries over widths.")
    if base.run.recipe is not None:
        raise UserError(f"{source}: a sweep makes a recipe and takes none, got {base.run.recipe!r}: remove run.recipe.")
    refuse_in_a_sweep(grid.sections.get("training", {}), source)
    # A shape that the model's own code refuses is the user's, and must not look like a bug in the middle of the sweep.
    base.check_layer()
    base.check_mup(base.model.config())
    if base.data.streaming:
        raise UserError(f"{source}: a sweep reads its data many times over: set streaming to false.")


def _check_batches(grid: Grid, source: str) -> None:
    block = grid.settings.data.block_size
    for batch in grid.tokens_per_step:
        if batch % block:
            below = batch // block * block
            near = " or ".join(f"{each:,}" for each in (below, below + block) if each)
            raise UserError(
                f"{source}: tokens_per_step {batch:,} is no whole number of blocks of {block:,} (block_size): take {near}."
            )


def _check_lengths(grid: Grid, source: str) -> None:
    for batch in grid.tokens_per_step:
        for horizon in grid.tokens:
            tail = grid.tail_tokens(horizon, batch)
            if grid.warmup_tokens + tail >= horizon:
                raise UserError(
                    f"{source}: {horizon:,} tokens leave no room between a warmup of {grid.warmup_tokens:,} tokens and a "
                    f"decay of {tail:,}: take a longer horizon, or a shorter warmup or decay_ratio."
                )
    # A width at which the heads or the MLP would not be whole is refused here, before the data are loaded.
    for width in grid.widths:
        grid.sections_at(width, grid.tokens_per_step[0])


def _check_law(grid: Grid, source: str) -> None:
    if "power" not in grid.schedules or grid.law is not None:
        return
    if "warmup_stable_decay" not in grid.schedules:
        raise UserError(f"{source}: power needs a law: give sweep.law, or sweep warmup_stable_decay to fit it on.")
    if min(len(grid.tokens), len(grid.tokens_per_step)) < 2:
        raise UserError(
            f"{source}: power's law is fitted on two horizons and two batches or more, got {len(grid.tokens)} and "
            f"{len(grid.tokens_per_step)}: add some, or give sweep.law."
        )
