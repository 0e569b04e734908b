"""The arguments of the verb average."""

from dataclasses import dataclass, field

from hf_power.data.text import option


@dataclass(frozen=True)
class AverageArguments:
    """A finished model from the last checkpoints of a trunk, without training."""

    run: str = field(
        metadata={"positional": True, "help": "run folder with checkpoints, of pretrain or of any Trainer"}
    )
    kind: str = option(
        "uniform", "uniform, ema, decay: the weights that stand for a tail; window: what average_window has kept"
    )
    last: str | None = option(None, "part of the run's tokens whose checkpoints are averaged; default: 20%")
    output_dir: str | None = option(None, "the new run folder; default: beside the run, with -average-N")
    decay_shape: str | None = option(None, "of --kind decay; default: the run's")
    dataset: str | None = option(None, "where the run's data lie now; default: where the run read them")
