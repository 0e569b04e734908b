"""The tail of a trunk, as a run of its own: the learning rate decays from one of the trunk's checkpoints."""

import math
import os
from pathlib import Path

from hf_power.pretrain.resume import checkpoint_to_resume, read_record, verify
from hf_power.pretrain.run import train_run
from hf_power.pretrain.start import Start
from hf_power.recipe import FILE_NAME as RECIPE_FILE
from hf_power.recipe import Recipe
from hf_power.records.errors import UserError
from hf_power.records.run import Run
from hf_power.settings.sections import Tokens, parse_tokens
from hf_power.settings.settings import Settings

# What the schedule knows of the trunk's own tail, which the new one replaces.
TAIL = ("decay_ratio", "decay_tokens", "decay_start_tokens")


def anneal(
    checkpoint: str | os.PathLike[str],
    tokens: str = "10%",
    output_dir: str | None = None,
    decay_shape: str | None = None,
    repo: str | None = None,
    dataset: str | None = None,
    resume_from_checkpoint: str | None = None,
) -> Run:
    """Decay the learning rate from a trunk checkpoint to a finished model; the trunk can go on afterwards.

    The schedule, data order and optimizer state are those of the trunk; the tail begins at the checkpoint's tokens.

    Args:
        checkpoint: a checkpoint-N folder of `hf_power.pretrain.run.pretrain`.
        tokens: length of the tail, in tokens ("2M") or in percent of the finished run ("10%", eq. 8's usual length).
        output_dir: the new run folder; by default beside the trunk's, with -anneal-N.
        decay_shape: of the tail; by default the trunk's.
        repo: push the finished model to this repository of the Hub, with the licence of the trunk's settings.
        dataset: where the trunk's data lie now; by default where the trunk read them.
        resume_from_checkpoint: "true" goes on with the tail that was begun in the new run folder, or begins it there.

    Returns:
        The record of the new run.

    Raises:
        UserError: no intact checkpoint there, an impossible length, or a folder with another run.
    """
    source = Path(checkpoint)
    verify(source)
    trunk = read_record(source)
    _refuse_decaying(source, trunk)
    settings = _tail_settings(trunk, _tail_length(tokens, trunk), decay_shape)
    folder = Path(output_dir) if output_dir else source.parent.with_name(f"{source.parent.name}-anneal-{trunk.steps}")
    settings.training.output_dir = str(folder)
    if repo is not None:
        settings.training.push_to_hub, settings.training.hub_model_id = True, repo
    if dataset is not None:
        settings.data.dataset = dataset
    settings.training.resume_from_checkpoint = resume_from_checkpoint
    own = checkpoint_to_resume(settings, folder)
    before = read_record(own) if own else trunk
    if own and before.parent != f"{source.parent.name}/{source.name}":
        raise UserError(f"{own} is not of a tail from {source}: pass another --output_dir.")
    recipe = Recipe.load(source / RECIPE_FILE) if (source / RECIPE_FILE).exists() else None
    return train_run(Start(settings, folder, "anneal", own or source, before, recipe))


def _refuse_decaying(source: Path, trunk: Run) -> None:
    if trunk.schedule is None:
        raise UserError(f"{source} was not trained under the power schedule: anneal takes checkpoints of one that was.")
    begun = trunk.schedule["decay_start_tokens"]
    if begun is not None and trunk.tokens_seen > begun:
        raise UserError(
            f"{source} lies in its run's own decay, which began at token {begun:,}: take a checkpoint before it, or train "
            "the trunk with decay_ratio 0."
        )


def _tail_settings(trunk: Run, length: int, decay_shape: str | None) -> Settings:
    """The settings of the trunk, with a tail of so many tokens from where its checkpoint stands."""
    settings = Settings.from_dict(dict(trunk.settings))
    kwargs = {name: v for name, v in settings.schedule_kwargs.items() if name not in TAIL}
    kwargs |= {"decay_start_tokens": trunk.tokens_seen, "decay_tokens": length}
    if decay_shape is not None:
        kwargs["decay_shape"] = decay_shape
    settings.training.lr_scheduler_kwargs = kwargs
    # A mean is kept in place of a tail, and the trunk's does not reach into this folder.
    settings.run.average_window = None
    settings.run.tokens = Tokens(trunk.tokens_seen + length)
    settings.given |= {"lr_scheduler_kwargs", "tokens"}
    return settings


def _tail_length(tokens: str, trunk: Run) -> int:
    """The length that was asked for, in tokens, rounded up to whole steps of the trunk."""
    text = str(tokens).strip()
    if text.endswith("%"):
        try:
            share = float(text[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise UserError(f"--tokens must be a percentage between 0% and 100% or a number of tokens, got {tokens!r}.")
        # The share is of the finished run, trunk and tail together.
        length = round(trunk.tokens_seen * share / (1 - share))  # A rounding error must not add a step.
    else:
        length = parse_tokens(text, "--tokens")
    steps = math.ceil(length / trunk.tokens_per_step)
    if steps < 1:
        raise UserError(f"--tokens must be positive, got {tokens!r}: pass e.g. 10% or 2M.")
    return steps * trunk.tokens_per_step
