"""Published laws by their names, as arguments of the schedule: whose numbers they are, and what they were measured under."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hf_power.records.errors import UserError, shown
from hf_power.schedule.law import LAW_NAMES, PAPER_LAW, PAPER_OPTIMA, TOKENS_PER_BETA, Law

# The paper's a of the schedule over its a of the optima of WSD (eq. 7 and 6), for a law that was measured on WSD alone.
POWER_TO_WSD = PAPER_LAW.a / PAPER_OPTIMA.a


@dataclass(frozen=True)
class Preset:
    """A published law of the learning rate, in the units of `Law`: tokens, and batches in sequences of 4096 tokens.

    Attributes:
        law: as its source has it.
        of: "power": the law that the schedule follows. "warmup_stable_decay": the best peak of a run of so many tokens.
        parameterization: under which the rates were measured.
        optimizer: with which they were measured.
        source: who measured it, and where.
        caution: what keeps its rates from being those of AdamW under hf_power's muP; empty where nothing does.
    """

    law: Law
    of: Literal["power", "warmup_stable_decay"]
    parameterization: str
    optimizer: str
    source: str
    caution: str = ""

    @property
    def power(self) -> Law:
        """The law that the Power schedule follows: of peaks of WSD with 4 / 4.6 of their scale, the paper's ratio."""
        return self.law if self.of == "power" else replace(self.law, a=self.law.a * POWER_TO_WSD)


def _through(rate: float, tokens: float, tokens_per_step: float, b: float, batch_exponent: float) -> Law:
    """The law through a rate at so many tokens and tokens per step."""
    return Law(rate / (tokens**b * (tokens_per_step / TOKENS_PER_BETA) ** batch_exponent), b, batch_exponent)


PRESETS: Mapping[str, Preset] = {
    "paper": Preset(
        PAPER_LAW,
        "power",
        "muP (base width 256)",
        "AdamW",
        "Shen et al. 2024, arXiv:2408.13359, eq. 7",
    ),
    # .0063 * sqrt(B / 64) * (2.5e9 / T)**.3, with B in sequences of 4096 tokens.
    "delphi": Preset(
        _through(0.0063, 2.5e9, 64 * TOKENS_PER_BETA, -0.3, 0.5),
        "warmup_stable_decay",
        "Complete(d)P of Qwen3",
        "AdamH",
        "Marin's Delphi suite 2026, experiments/scaling_law_sweeps/completed_adamh.py and openathena.ai/blog/delphi",
        "its rates are those of AdamH, which holds the norm of each matrix: under AdamW take its exponents and find a yourself",
    ),
}


def chosen_law(arguments: Mapping[str, Any], name: str | None = None) -> Law:
    """The law of a preset, the paper's without one, with those of LAW_NAMES that the arguments hold in the place of its own.

    Raises:
        UserError: a name that no preset has.
    """
    given = {key: arguments[key] for key in LAW_NAMES if arguments.get(key) is not None}
    return replace(preset(name or "paper").power, **given)


def preset(name: str) -> Preset:
    """The preset of this name; a UserError where there is none."""
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise UserError(f"there is no law of the name {shown(name)}: take one of {known}, or give a and b.")
    return PRESETS[name]
