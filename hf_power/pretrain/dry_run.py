"""A training of one number, before the data are touched: what the libraries would refuse later, they refuse now."""

import copy
import io
import json
import os
import tempfile

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from hf_power.records.errors import refused_by, shown
from hf_power.records.run import Run
from hf_power.settings.settings import Settings


def dry_run(settings: Settings, run: Run) -> None:
    """Make the trackers, Trainer, loaders, optimizer and schedule of a run for a model of one number, and save them.

    To tokenize may take hours, and none of these depends on it. Nothing is written outside of a temporary folder, no
    tracker is begun, and nothing is pushed. Where the model will be sharded the Trainer is left out, because engines are
    set up only once in a process.

    Args:
        settings: with ``training.max_steps``.
        run: the first record of the run.

    Raises:
        UserError: what a library says against a value, or that a package is missing.
    """
    given = settings.training
    # A tracker says that its package is missing when it is made, and begins when the training does.
    with refused_by("report_to"):
        for tracker in get_reporting_integration_callbacks(given.report_to):
            tracker()
    if given.torch_compile:
        with refused_by("torch_compile"):
            torch.compile(
                nn.Identity(), backend=given.torch_compile_backend or "inductor", mode=given.torch_compile_mode
            )
    # What cannot be written is a fault of ours, and is not wrapped; it has to show before there is work to lose.
    json.dumps(run.to_json())
    by_launcher = (
        os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or given.parallelism_config is not None
    )
    if (given.world_size > 1 and (by_launcher or given.fsdp)) or given.deepspeed_plugin is not None:
        return
    verbosity = logging.get_verbosity()
    with tempfile.TemporaryDirectory() as folder:
        try:
            _train_nothing(_copied(given, folder))
        finally:
            logging.set_verbosity(verbosity)


def _copied(given: TrainingArguments, folder: str) -> TrainingArguments:
    """Arguments of which the Trainer may change what it likes."""
    args = copy.copy(given)
    args.accelerator_config = copy.deepcopy(given.accelerator_config)
    args.output_dir, args.report_to, args.push_to_hub, args.disable_tqdm = folder, [], False, True
    args.label_smoothing_factor = 0.0  # The Trainer asks a model's config about it, and the model here has none.
    return args


def _train_nothing(args: TrainingArguments) -> None:
    rows = [{"x": 0.0}]
    with refused_by("an argument of the training"):
        trainer = Trainer(nn.Linear(1, 1), args, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
        trainer.get_train_dataloader()
        trainer.get_eval_dataloader()
        optimizer = trainer.create_optimizer()
        trainer.save_model()
        trainer.save_state()
        torch.save(optimizer.state_dict(), io.BytesIO())
    # Power has been planned by now, see `hf_power.pretrain.start.outlook`; it would look for tokens here.
    if args.lr_scheduler_type != "power":
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        with refused_by(f"lr_scheduler_type {name} with lr_scheduler_kwargs {shown(args.lr_scheduler_kwargs or {})}"):
            scheduler = trainer.create_scheduler(args.max_steps, optimizer)
            # The ends of warmup and run are where a schedule divides by nothing.
            warmup = args.get_warmup_steps(args.max_steps)
            for step in (0, warmup, warmup + 1, args.max_steps - 1, args.max_steps):
                for factor in scheduler.lr_lambdas if isinstance(scheduler, LambdaLR) else ():
                    factor(step)
