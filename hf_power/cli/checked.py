"""What coord-check checks: the config of its file, and the arguments of `hf_power.coord_check`."""

from collections.abc import Iterator
from typing import Any

from hf_power.cli.arguments import CoordCheckArguments
from hf_power.cli.parser import parse_settings
from hf_power.compat import PreTrainedConfig
from hf_power.coordinates import CoordCheck, coord_check
from hf_power.models import ANY, PLAIN_FAMILIES
from hf_power.mup.check import refuse_without_rule
from hf_power.mup.controls import CONTROLS
from hf_power.records.errors import UserError
from hf_power.settings.any_model import WIDTHS, config_file, config_of_file, fitting


def checked_model(arguments: CoordCheckArguments) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The config, made small where it is too large for the widths, and the other arguments of the check.

    The numbers of muP are those of the settings, of which the plain form has embedding_multiplier alone.
    """
    path = config_file(arguments.recipe) if arguments.recipe else None
    mup: dict[str, Any] = {}
    widths, fixed = arguments.widths or WIDTHS, list(arguments.fixed or ())
    if path is not None:
        config = config_of_file(path)
    else:
        settings = parse_settings([arguments.recipe] if arguments.recipe else [])
        is_any = settings.model.model_type == ANY
        config = settings.model.config()
        fixed = fixed or list(settings.model.fixed or ())
        mup = settings.mup.arguments()
        if is_any or arguments.form == "plain":
            mup = {"embedding_multiplier": mup["embedding_multiplier"]}
    if path is not None or config.model_type not in PLAIN_FAMILIES:
        refuse_without_rule(config, base_width=config.hidden_size)
        config, is_small = fitting(config, widths, fixed)
        if is_small:
            print(
                f"checked on a {config.model_type} of the same kind with small sizes: {config.num_hidden_layers} layers, "
                f"hidden_size {config.hidden_size}, {getattr(config, 'num_attention_heads', 0)} heads"
            )
    # The check has an initializer_range of its own, see its documentation, and a base that is the smallest width.
    mup = {name: value for name, value in mup.items() if value is not None and name != "initializer_range"}
    mup["base_width"] = arguments.base_width
    own = {"widths": widths, "steps": arguments.steps, "device": arguments.device, "bf16": arguments.bf16}
    return config, mup | own | {"form": arguments.form, "fixed": fixed}


def measured_controls(config: PreTrainedConfig, chosen: dict[str, Any]) -> Iterator[tuple[str, CoordCheck]]:
    """Every control that applies to a model whose check has been made with these arguments, after one step."""
    for name in CONTROLS:
        try:
            yield name, coord_check(config, control=name, **chosen | {"steps": 1})
        except UserError:  # The model has no such part, because all else has been taken before.
            continue
