"""From a recipe to the plan of a run: its text, plan.json and its picture."""

import os
from dataclasses import replace
from pathlib import Path

from hf_power.plan.plan import make_plan, plan_text
from hf_power.plan.record import PLAN_FILE, Plan, scale_table, table_text
from hf_power.plan.target import Machine, Target
from hf_power.plots.figures import save
from hf_power.plots.runs import plot_plan
from hf_power.recipe import Recipe
from hf_power.records.errors import UserError
from hf_power.settings.sections import parse_tokens, short_tokens
from hf_power.settings.settings import Settings
from hf_power.settings.target import load_target, tokens_on_one_device

# The fewest steps of the check that comes next: of a shorter one the warmup and the tail are most.
PILOT_STEPS = 100
DEVICES = (8, 64, 512)  # A plan says memory and days for these, as far as they divide the batch.


def plan_run(
    recipe: str,
    *,
    tokens: str | None = None,
    tokens_per_step: str | None = None,
    target: str | None = None,
    parameters: str | None = None,
    block_size: int | None = None,
    devices: int = 8,
    flops_per_device: float = 989e12,
    utilisation: float | None = None,
    output_dir: str | os.PathLike[str] | None = None,
) -> str:
    """The plan of a run under a recipe, as text; with output_dir also plan.json and plan.png.

    Args:
        recipe: see `Recipe.load`.
        tokens: length of the run, e.g. "1T"; None: the target's.
        tokens_per_step: global batch in tokens, e.g. "4M"; None: the target's on one device.
        target: YAML of the run, whose model section gives the parameters; or
        parameters: their number, e.g. "3.5B".
        block_size: tokens per sequence; None: the target's, or 4096.
        devices, flops_per_device, utilisation: see `hf_power.plan.target.Machine`.
        output_dir: where to write.

    Raises:
        NotFoundError: there is no such recipe or target.
        UserError: neither or both of target and parameters, or bad numbers.
    """
    if (target is None) == (parameters is None):
        raise UserError(f"a plan needs either --target or --parameters, got {target!r} and {parameters!r}.")
    machine = Machine(devices, flops_per_device, utilisation)
    loaded = Recipe.load(recipe)
    settings = None if target is None else load_target(target)
    length = _length(tokens, tokens_per_step, settings)
    if settings is None:
        size = parse_tokens(parameters or 0, "--parameters", "a number of parameters such as 350M or 3.5B")
        run, batch = Target(*length, parameters=size, block_size=block_size or 4096), 1
    else:
        config = settings.model.config(vocab_size=settings.data.vocab_size)
        run = Target(*length, config=config, block_size=block_size or settings.data.block_size)
        batch = settings.training.per_device_train_batch_size
    plan = _with_scale(make_plan(loaded, run, machine, proxies=loaded.proxies), run, machine, batch)
    text = plan_text(plan)
    if plan.scale is not None:
        text += f"\non H100-like devices, activations recomputed (! does not fit into 80 GB):\n{table_text(plan.scale)}"
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder)
        save(plot_plan(plan), folder / "plan.png")
        text += f"\nwrote: {folder / PLAN_FILE}, {folder / 'plan.png'}"
    # The pilot has the width of the run, which no proxy had, and the length of the longest proxy.
    pilot = min(length[0], max([PILOT_STEPS * length[1], *loaded.validity.get("tokens", ())[1:]]))
    where = Path(target).parent / "verify" if target else "runs/verify"
    return (
        f"{text}\nnext: hf-power verify {target or 'RUN.yaml'} --recipe {recipe} "
        f"--tokens {short_tokens(pilot)} --output_dir {where}"
    )


def _length(tokens: str | None, tokens_per_step: str | None, settings: Settings | None) -> tuple[int, int]:
    """Tokens of the run and of a step; what the options leave out is the target's."""
    length = parse_tokens(tokens, "--tokens") if tokens else settings.run.tokens if settings else None
    batch = parse_tokens(tokens_per_step, "--tokens_per_step") if tokens_per_step else None
    if settings is not None and batch is None:
        batch = tokens_on_one_device(settings)
    if length is None or batch is None:
        raise UserError(
            "a plan needs the length of the run and its batch: give --tokens and --tokens_per_step, e.g. 1T and 4M."
        )
    if length < batch:
        raise UserError(
            f"{length:,} tokens are less than one step of {batch:,}: correct --tokens or --tokens_per_step."
        )
    return length, batch


def _with_scale(plan: Plan, run: Target, machine: Machine, per_device_batch_size: int) -> Plan:
    """The plan with its table, where the batch can be divided between any of the numbers of devices."""
    sequences, left = divmod(run.tokens_per_step, run.block_size)
    # A batch of which a part of a block is left is refused by the table.
    devices = [count for count in DEVICES if left or sequences % count == 0]
    if run.config is None or not devices:
        return plan
    rows = scale_table(run.config, run, per_device_batch_size=per_device_batch_size, devices=devices, machine=machine)
    return replace(plan, scale=tuple(rows))
