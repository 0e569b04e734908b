"""What a sweep is to find out: the learning rate at one target, and how well."""

from dataclasses import dataclass

from hf_power.records.errors import UserError
from hf_power.settings.sections import parse_tokens
from hf_power.settings.target import load_target, tokens_on_one_device

# Half of the interval, in octaves. A rate that is known less well than to a factor of 16 either way is not known.
WIDEST_OCTAVES = 4.0


@dataclass(frozen=True)
class Aim:
    """The rate at a horizon and batch, in tokens, to so many octaves.

    `octaves` is half of the 95 % interval of a new cell's optimum, see `hf_power.fit.result.Fit.predict`. With a width the
    law may have an exponent of it; None: muP carries the rate over widths.

    Raises:
        UserError: a number out of range.
    """

    tokens: int
    tokens_per_step: int
    octaves: float
    width: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.octaves <= WIDEST_OCTAVES:
            raise UserError(
                f"--until must be above 0 and at most {WIDEST_OCTAVES:g} octaves, got {self.octaves}: 0.3 is a factor of "
                f"{2**0.3:.2f} either way."
            )
        for name in ("tokens", "tokens_per_step", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}: correct it.")
        if self.tokens < self.tokens_per_step:
            raise UserError(
                f"the target's {self.tokens:,} tokens are less than one step of {self.tokens_per_step:,}: correct one of them."
            )


def aim_of(
    octaves: float,
    *,
    tokens: str | None = None,
    tokens_per_step: str | None = None,
    width: int | None = None,
    target: str | None = None,
) -> Aim:
    """The aim of the options of `hf-power sweep`; the settings of a target (YAML) say what the options leave out.

    Raises:
        UserError: neither says the tokens or the batch, or a number is out of range.
    """
    length = None if tokens is None else parse_tokens(tokens, "--tokens")
    batch = None if tokens_per_step is None else parse_tokens(tokens_per_step, "--tokens_per_step")
    if target is not None:
        settings = load_target(target)
        length, batch = length or settings.run.tokens, batch or tokens_on_one_device(settings)
        width = width or settings.model.hidden_size
    if length is None or batch is None:
        raise UserError(
            "--until is about the rate of one run: give its --tokens and --tokens_per_step, or its settings as --target."
        )
    return Aim(length, batch, octaves, width)
