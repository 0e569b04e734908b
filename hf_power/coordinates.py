"""Coordinate check: does muP hold for this model? Slopes of output changes over width, and a verdict.

The idea is Yang et al.'s (arXiv:2203.03466, appendix D.1), on changes of outputs instead of outputs: what a module puts
out at initialization hides a learning rate that is wrong, what training adds to it does not.

At each width, the model of ``scale_width(config, width)`` under muP takes a few steps of AdamW (betas 0.9, 0.95) on one
fixed batch of random tokens, without dropout. The change after step t is ``sqrt(mean((output_t - output_0)**2))`` of
what enters the first block, of each block's attention, router and MLP or MoE (before the residual multiplier), of the final
norm (over the multiplier in its gain) and of the logits. It shows errors in init, learning rates and multipliers; one in weight
decay needs hundreds of steps to show. The caller's random numbers are left alone.

muP is a limit, and the defaults of `coord_check` are there to be near it at width 64. A vocabulary or a batch larger
than the width adds overlaps between tokens, and a large init adds what the initial readout (lm_head, router) makes of
its changed input; both die out as width**-0.5 and bend correct slopes downwards. With 256 tokens in vocabulary and batch
and an init of 0.1, correct logits measure -0.25 and correct routers -0.4; with the defaults -0.06 and -0.17. A constant
init has no exponent, so a check at 0.02 holds for the model that is trained at 0.1.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, linear_regression
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel

from hf_power.compat import PreTrainedConfig
from hf_power.models import PLAIN_FAMILIES, head_dim
from hf_power.mup.config import mup_config
from hf_power.mup.controls import Control, control_of
from hf_power.mup.init import initializer_range as own_initializer_range
from hf_power.mup.init import mup_init_, new_model, set_initializer_range
from hf_power.mup.optimizer import mup_param_groups
from hf_power.mup.rules import mup_record
from hf_power.mup.scale import scale_width
from hf_power.mup.watch import quieten_readouts_, watched
from hf_power.records.errors import UserError, refused_by

MAX_SLOPE = 0.25  # Correct models measure up to 0.18 with the defaults, and errors in a rule 0.44 or more.
MIN_WIDTHS = 4
MAX_STEPS = 10

FORMS = ("multiplier", "plain")


class Change(TypedDict):
    """A measurement: RMS of (output - output before training), in the output's units, as a mean over seeds."""

    module: str
    step: int
    width: int
    change: float


class Slope(TypedDict):
    """Least squares of log2(change) over log2(width) of one module after one step."""

    module: str
    step: int
    slope: float


@dataclass(frozen=True)
class CoordCheck:
    """Result of `coord_check`: its measurements, the rows; steps count from 1."""

    rows: list[Change]

    @cached_property
    def slopes(self) -> list[Slope]:
        """The slope of every module after every step.

        It is 0 where muP holds and the exponent of the error where it does not. It is nan where a change is 0 (the
        module did not learn) or not finite.
        """
        points: dict[tuple[str, int], list[tuple[int, float]]] = {}
        for row in self.rows:
            points.setdefault((row["module"], row["step"]), []).append((row["width"], row["change"]))
        return [{"module": module, "step": step, "slope": _slope(p)} for (module, step), p in points.items()]

    @property
    def worst(self) -> Slope:
        """The entry of slopes that is farthest from 0; nan counts as farthest."""
        return max(self.slopes, key=lambda s: math.inf if math.isnan(s["slope"]) else abs(s["slope"]))

    @property
    def passed(self) -> bool:
        """Whether every slope lies within -MAX_SLOPE and MAX_SLOPE, both excluded."""
        return abs(self.worst["slope"]) < MAX_SLOPE

    @property
    def verdict(self) -> str:
        """One line: passed or FAILED, the worst slope, the limit and the widths."""
        worst, widths = self.worst, sorted({row["width"] for row in self.rows})
        return (
            f"{'passed' if self.passed else 'FAILED'}: worst slope {worst['slope']:+.2f} ({worst['module']}, step "
            f"{worst['step']}), limit {MAX_SLOPE:g}, widths {', '.join(map(str, widths))}"
        )

    def table(self) -> str:
        """Markdown: a row per module, a column per step, slopes outside the limit in bold, then the verdict."""
        modules = list(dict.fromkeys(s["module"] for s in self.slopes))
        steps = sorted({s["step"] for s in self.slopes})
        slopes = {(s["module"], s["step"]): s["slope"] for s in self.slopes}
        name_width = max(len(name) for name in [*modules, "module"])
        lines = [
            f"| {'module':<{name_width}} | " + " | ".join(f"step {step:<4}" for step in steps) + " |",
            f"|{'-' * (name_width + 2)}|" + "----------:|" * len(steps),
        ]
        for module in modules:
            cells = [slopes[module, step] for step in steps]
            text = [f"{c:+.2f}" if abs(c) < MAX_SLOPE else f"**{c:+.2f}**" for c in cells]
            lines.append(f"| {module:<{name_width}} | " + " | ".join(f"{t:>9}" for t in text) + " |")
        return "\n".join([*lines, "", self.verdict])


def coord_check(
    config: PreTrainedConfig,
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    base_width: int | None = None,
    vocab_size: int = 64,
    initializer_range: float = 0.02,
    steps: int = 4,
    lr: float = 0.002,
    weight_decay: float = 0.0,
    seeds: Sequence[int] = (0, 1, 2),
    batch_size: int = 1,
    seq_len: int = 16,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    form: str | None = None,
    fixed: Sequence[str] = (),
    control: str | None = None,
    verbose: bool = False,
    init: Callable[[PreTrainedModel], object] = mup_init_,
    param_groups: Callable[..., list[dict[str, Any]]] = mup_param_groups,
    **mup_kwargs: Any,
) -> CoordCheck:
    """Train the model at several widths for a few steps and measure how its outputs change, as the module says.

    Args:
        config: of any causal LM at any width; 2 layers are enough.
        widths: values of hidden_size, at least MIN_WIDTHS different ones, which `scale_width` can make.
        base_width: where muP changes nothing; None for the smallest width. A smaller one makes errors harder to see.
        vocab_size, initializer_range: replace the config's (>= 2) and the preset's; small ones are nearer to the limit.
        steps: optimizer steps, from 1 to MAX_STEPS.
        lr, weight_decay: AdamW's at base width; lr of a tenth of initializer_range moves weights but stays near linear.
        seeds: the changes are averaged over these seeds of weights and batch.
        batch_size, seq_len: shape of the batch, in sequences and tokens.
        device: where the models are trained; the CPU draws their weights and batches, so that they are the same.
        bf16: forward passes under bf16 autocast, as in training; the weights stay fp32.
        form: one of FORMS; None for "multiplier" where there is one (Llama, Mixtral), "plain" for all others.
        fixed: sizes that do not grow, e.g. num_attention_heads and num_key_value_heads; needs base_width None.
        control: a key of `hf_power.mup.controls.CONTROLS`, which is measured in the place of muP.
        verbose: print what will be trained, before it is.
        init, param_groups: called as `mup_init_` and `mup_param_groups` are, with a model that is under muP already.
        **mup_kwargs: more arguments of `mup_config` (preset and so on), or embedding_multiplier of the plain form.

    Raises:
        UserError: a number out of range, no seeds, or a model that `scale_width`, `mup_config` or `mup_init_` refuses.
    """
    widths = _checked_widths(widths, steps, seeds, vocab_size)
    wrong = control_of(control)
    init, param_groups = (init, param_groups) if wrong is None else (wrong.init or init, wrong.groups)
    small = _small(config, vocab_size, initializer_range)
    form = _form(small, form, wrong, mup_kwargs)
    made = _models(small, widths, base_width, fixed, form, mup_kwargs)
    if form == "plain" and wrong is None:
        _hear(scale_width(_small(config, vocab_size, own_initializer_range(config)), widths[0], fixed=fixed), made[1])
    trial = _Trial(steps, lr, weight_decay, (batch_size, seq_len), _device(device), bf16, made[1], init, param_groups)
    if verbose:
        _tell(widths, seeds, steps, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # mup_init_ would warn of the check's init, not of the config's.
        return CoordCheck([row for ready in made[0] for row in trial.rows(ready, seeds)])


def _hear(config: PreTrainedConfig, make: Callable[[PreTrainedModel], object]) -> None:
    """Let mup_init_ warn of a model with the config's own init, in place of the check's."""
    with torch.random.fork_rng(devices=[]):
        make(new_model(config, dtype=torch.float32))


def _tell(widths: Sequence[int], seeds: Sequence[int], steps: int, device: str | torch.device) -> None:
    models = f"{len(widths) * len(seeds)} models, of widths {', '.join(map(str, widths))}"
    print(f"training {models}, for {steps} steps on {device}", flush=True)


def _device(device: str | torch.device) -> torch.device:
    with refused_by(f"the device {str(device)!r}"):
        return torch.empty(0, device=device).device


def _small(config: PreTrainedConfig, vocab_size: int, initializer_range: float) -> PreTrainedConfig:
    """The config with the numbers of the check."""
    small = copy.deepcopy(config)
    # A padding token would have to lie inside of the small vocabulary.
    small.vocab_size, small.pad_token_id = vocab_size, None
    set_initializer_range(small, initializer_range)
    return small


def _form(config: PreTrainedConfig, form: str | None, control: Control | None, mup_kwargs: dict[str, Any]) -> str:
    """The form of muP to check; standard parameterization is that of the stock model, and so of the plain form."""
    if form not in (None, *FORMS):
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
    if control is not None and control.is_standard:
        return "plain"
    form = form or ("multiplier" if config.model_type in PLAIN_FAMILIES else "plain")
    if form == "plain" and (others := [name for name in mup_kwargs if name != "embedding_multiplier"]):
        raise UserError(f"{', '.join(others)} belongs to mup_config, and the plain form of muP has none: leave it out.")
    return form


def _models(
    small: PreTrainedConfig,
    widths: Sequence[int],
    base_width: int | None,
    fixed: Sequence[str],
    form: str,
    mup_kwargs: dict[str, Any],
) -> tuple[list[PreTrainedConfig], Callable[[PreTrainedModel], object]]:
    """The config of every width, so that one that is refused costs no training, and what brings its model under muP."""
    base = base_width or widths[0]
    if fixed and base != widths[0]:
        raise UserError(f"base_width must be the smallest width {widths[0]} where sizes are fixed, got {base}.")
    configs = [scale_width(small, width, fixed=fixed) for width in widths]
    if form == "multiplier":
        numbers = {"base_width": base, "initializer_range": small.initializer_range, **_fixed_bases(configs[0], fixed)}
        return [mup_config(each, **mup_kwargs | numbers) for each in configs], mup_init_
    of_base: dict[str, Any] = {"base_config": configs[0]} if fixed else {"base_width": base}
    return configs, functools.partial(mup_init_, **of_base, embedding_multiplier=mup_kwargs.get("embedding_multiplier"))


def _fixed_bases(smallest: PreTrainedConfig, fixed: Sequence[str]) -> dict[str, int]:
    """The arguments of `mup_config` that say which sizes do not grow."""
    bases = {}
    if "num_attention_heads" in fixed:
        bases["base_attention_width"] = smallest.num_attention_heads * head_dim(smallest)
    if "intermediate_size" in fixed:
        bases["base_intermediate_size"] = smallest.intermediate_size
    return bases


def _checked_widths(widths: Sequence[int], steps: int, seeds: Sequence[int], vocab_size: int) -> list[int]:
    """The different widths, in order; the other numbers are checked with them."""
    widths = sorted(set(widths))
    if len(widths) < MIN_WIDTHS:
        raise UserError(f"a slope needs at least {MIN_WIDTHS} different widths, got {widths}: add widths.")
    if not 1 <= steps <= MAX_STEPS:
        raise UserError(f"steps must be from 1 to {MAX_STEPS}, got {steps}: choose a number in that range.")
    if not seeds:
        raise UserError("seeds must hold at least one seed, got none: pass for example seeds=(0, 1, 2).")
    if vocab_size < 2:
        raise UserError(f"vocab_size must be at least 2, got {vocab_size}: the default is 64.")
    return widths


@dataclass(frozen=True)
class _Trial:
    """How each model is trained: the arguments of `coord_check` of these names."""

    steps: int
    lr: float
    weight_decay: float
    batch_shape: tuple[int, int]
    device: torch.device
    bf16: bool
    make: Callable[[PreTrainedModel], object]
    init: Callable[[PreTrainedModel], object]
    param_groups: Callable[..., list[dict[str, Any]]]

    def rows(self, config: PreTrainedConfig, seeds: Sequence[int]) -> Iterator[Change]:
        """The measurements at the width of one config, averaged over the seeds."""
        runs = []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):  # Only the CPU's generator is seeded here.
                torch.default_generator.manual_seed(seed)
                tokens = torch.randint(config.vocab_size, self.batch_shape)
                model = new_model(config, dtype=torch.float32)
                self.make(model)
                if self.init is not mup_init_:
                    self.init(model)
                if mup_record(model) is None:
                    quieten_readouts_(model)
                runs.append(self._changes(model.train(False).to(self.device), tokens.to(self.device)))
        for module, step in runs[0]:
            change = fmean(run[module, step] for run in runs)
            yield {"module": module, "step": step, "width": config.hidden_size, "change": change}

    def _changes(self, model: PreTrainedModel, tokens: torch.Tensor) -> dict[tuple[str, int], float]:
        """RMS change of every watched output after each step, by (module, step)."""
        groups = self.param_groups(model, lr=self.lr, weight_decay=self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        outputs = watched(model)
        before: dict[str, torch.Tensor] = {}
        changes = {}
        for step in range(self.steps + 1):
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
                result = model(input_ids=tokens, labels=tokens, use_cache=False)
            # These come after logits_scaling, which lm_head's own output lacks.
            outputs["logits"] = outputs.pop("tied logits", result.logits.detach().float())
            if step == 0:
                before = dict(outputs)
            for module in before if step else ():
                changes[module, step] = (outputs[module] - before[module]).square().mean().sqrt().item()
            if step < self.steps:
                optimizer.zero_grad()
                result.loss.backward()
                optimizer.step()
        return changes


def _slope(points: list[tuple[int, float]]) -> float:
    if any(change == 0.0 or not math.isfinite(change) for _, change in points):
        return math.nan
    widths, changes = zip(*points, strict=True)
    return linear_regression([math.log2(w) for w in widths], [math.log2(c) for c in changes]).slope
