"""Runs under random settings, stopped and gone on with: python tests/pretrain/stopping.py [--cases 300] [--seed 0].

A case is drawn by a function that picks one of several values, so that hypothesis and a seeded generator draw alike. It is
trained twice: to its end, and with a SIGTERM in one of its steps, after which the same command goes on. Either both are
the same to the bit, weights and record, or the settings are refused before the text is read.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import hf_power.pretrain.start as start
from hf_power.cli import main
from hf_power.plots import figures
from hf_power.pretrain.trainer import PowerTrainer

WORDS = "river stone cloud engine garden paper silver window market signal harbor winter copper valley bridge candle"
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SCHEDULES = [
    ("power", {"a": 16.0}),
    ("power", {"a": 16.0, "decay_ratio": 0.0}),
    ("power", {"a": 4.0, "b": -0.3, "decay_ratio": 0.4, "decay_shape": "1-sqrt", "min_lr_ratio": 0.1}),
    ("power", {"a": 16.0, "warmup_to": "max", "decay_shape": "cosine", "critical_batch_tokens": 40}),
    ("cosine", {}),
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("polynomial", {"power": 2.0}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 3}),
    ("reduce_lr_on_plateau", {"patience": 0, "threshold": 0.5}),
]
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"]
# What the record of a run says of the clock and of when and where it was made.
OF_THE_CLOCK = ("train_seconds", "started", "finished", "name", "lineage")


def write_text(folder):
    """Two sources of text, a file and a folder of three, of invented documents."""
    draw, words = random.Random(0), WORDS.split()
    folder.mkdir(parents=True)
    (folder / "many").mkdir()
    for name, documents in (("one.jsonl", 1200), ("many/a.jsonl", 500), ("many/b.jsonl", 400), ("many/c.jsonl", 300)):
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=12))}) for _ in range(documents)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_case(pick):
    """The settings of a run, as YAML would hold them, and the step in which it is stopped."""
    batch, accumulation, block = pick([1, 2, 3]), pick([1, 1, 2, 3]), pick([8, 16])
    steps, muped = pick([5, 6, 8]), pick([True, True, False])
    schedule, numbers = pick(SCHEDULES)
    every = pick([1, 2, 3])
    model = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model |= {"tie_word_embeddings": pick([True, False])} | pick([{}, {}, EXPERTS])
    extra = pick([{}, {}, {"attention_dropout": 0.2}, {"vocab_size": 320}, {"dtype": "bfloat16"}])
    data = {"block_size": block, "streaming": pick([False, False, True]), "dataset": pick(["one.jsonl", "many"])}
    training = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.02,
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": numbers,
        "warmup_steps": pick([0, 2]),
        "logging_strategy": pick(["steps", "steps", "no"]),
        "logging_steps": pick([1, 2, 3]),
        "logging_first_step": pick([False, True]),
        "eval_strategy": pick(["no", "steps", "steps"]),
        "eval_steps": every,
        "eval_delay": pick([0, 0, 2]),
        "eval_on_start": pick([False, False, True]),
        "save_strategy": pick(["steps", "steps", "no", "best"]),
        "save_steps": pick([every, 2, 4, 0.5]),
        "save_total_limit": pick([None, 1, 3]),
        "load_best_model_at_end": pick([False, False, True]),
        "metric_for_best_model": "eval_loss",
        "seed": pick([0, 7]),
        "max_grad_norm": pick([1.0, 0.0, 0.1]),
        "bf16": pick([False, False, True]),
        "dataloader_num_workers": pick([0, 0, 1, 2]),
        "neftune_noise_alpha": pick([None, None, 5.0]),
        "label_smoothing_factor": pick([0.0, 0.0, 0.1]),
        "gradient_checkpointing": pick([False, False, True]),
        "weight_decay": pick([0.1, 0.0]),
        "include_num_input_tokens_seen": pick([False, True]),
    }
    if not muped:
        training["optim"] = pick(OPTIMIZERS)
    if schedule == "reduce_lr_on_plateau":
        training["eval_strategy"] = "steps"
    if training["load_best_model_at_end"]:
        training |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": every, "eval_delay": 0}
    if training["save_strategy"] == "best" and training["eval_strategy"] == "no":
        training["eval_strategy"] = "steps"
    if training["eval_strategy"] == "no":
        for name in ("eval_steps", "eval_delay", "metric_for_best_model"):
            del training[name]
    if training["dataloader_num_workers"]:
        training |= {"dataloader_persistent_workers": pick([False, True]), "dataloader_prefetch_factor": pick([1, 3])}
    settings = {
        "model": model | ({"model_config": extra} if extra else {}),
        "mup": {"base_width": 8} if muped else {"mup": False},
        "data": data,
        "run": {"tokens": steps * batch * accumulation * block, "max_eval_tokens": 4 * block},
        "training": {name: value for name, value in training.items() if value is not None},
    }
    return {"settings": settings, "stop": pick([1, 2, 3, 4]), "elsewhere": pick([False, False, True])}


class Place:
    """A folder with the texts, in which cases are trained in this process."""

    def __init__(self, folder):
        self.folder = folder
        if not (folder / "text").exists():
            write_text(folder / "text")
        self.texts_read = 0

    def check(self, case):
        """Train a case both ways; "refused" or "equal", or an AssertionError that says what differs."""
        for name in ("whole", "stopped", "other"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        code, said = self.train(case, "whole")
        if code == 2:
            assert not self.texts_read, f"refused after the text was read: {said}"
            assert not (self.folder / "whole").exists(), said
            assert len(said.strip().splitlines()) == 1, said
            return "refused"
        assert code == 0, said
        code, said = self.train(case, "stopped", stop=case["stop"])
        assert code == 143, said
        target, resume = "stopped", "true"
        if case["elsewhere"]:
            target, resume = "other", str(next((self.folder / "stopped").glob(f"checkpoint-{case['stop']}")))
        code, said = self.train(case, target, resume=resume)
        assert code == 0, said
        whole, other = self.folder / "whole", self.folder / target
        one, two = (known(folder) for folder in (whole, other))
        assert one == two, difference(one, two)
        same = (whole / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
        assert same, "the weights differ"
        return "equal"

    def train(self, case, name, stop=None, resume=None):
        """Exit code and last lines of a run; `stop` is the step in which it gets a SIGTERM."""
        settings = json.loads(json.dumps(case["settings"]))
        settings["data"] |= {
            "dataset": str(self.folder / "text" / settings["data"]["dataset"]),
            "vocab_size": 300,
            "num_proc": 1,
            "data_cache_dir": str(self.folder / "cache"),
        }
        settings["training"] |= {"output_dir": str(self.folder / name), "report_to": "none", "use_cpu": True}
        settings["training"] |= {"disable_tqdm": True}
        if resume is not None:
            settings["training"]["resume_from_checkpoint"] = resume
        path = self.folder / "settings.json"
        path.with_suffix(".yaml").write_text(json.dumps(settings), encoding="utf-8")
        output = io.StringIO()
        with self._watched(settings, stop), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                code = main(["pretrain", str(path.with_suffix(".yaml"))])
            except Exception:
                code = 1
                traceback.print_exc()
        said = output.getvalue()
        return code, "\n".join(said.strip().splitlines()[-12 if code == 1 else -1 :])

    @contextlib.contextmanager
    def _watched(self, settings, stop):
        """Count the readings of the text, and send the signal; a run that was stopped leaves signals ignored."""
        step, load, picture = PowerTrainer.training_step, start.load_text, figures.save
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        self.texts_read = passes = 0
        last = None if stop is None else (stop - 1) * settings["training"]["gradient_accumulation_steps"] + 1

        def training_step(trainer, *args, **kwargs):
            nonlocal passes
            passes += 1
            if passes == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(trainer, *args, **kwargs)

        def load_text(*args, **kwargs):
            self.texts_read += 1
            return load(*args, **kwargs)

        PowerTrainer.training_step, start.load_text = training_step, load_text
        figures.save = lambda figure, path: (
            None
        )  # It takes longer than the training, and is no part of what is compared.
        try:
            yield
        finally:
            PowerTrainer.training_step, start.load_text, figures.save = step, load, picture
            for number, handler in handlers.items():
                signal.signal(number, handler)


def known(folder):
    """What run.json of a finished run says, without the clock."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run["loss_curve"] = [{k: v for k, v in point.items() if k != "tokens_per_second"} for point in run["loss_curve"]]
    return {name: value for name, value in run.items() if name not in OF_THE_CLOCK}


def difference(one, two):
    """The entries of two records that differ; of lists, those that the other has not got."""
    lines = []
    for name in {**one, **two}:
        a, b = one.get(name), two.get(name)
        if a == b:
            continue
        if isinstance(a, list) and isinstance(b, list):
            a, b = [each for each in a if each not in b], [each for each in b if each not in a]
        lines.append(f"{name}: {a}\n  but {b}")
    return "\n".join(lines)


def campaign(cases, seed, folder):
    """Check many cases and print the ones that do not hold; their number."""
    place, counts = Place(folder), {"equal": 0, "refused": 0}
    gc.freeze()  # The Trainer collects garbage at each start, which looks at all that was imported.
    failed = 0
    for number in range(seed, seed + cases):
        case = draw_case(random.Random(number).choice)
        try:
            counts[place.check(case)] += 1
        except AssertionError as error:
            failed += 1
            print(f"case {number}: {json.dumps(case)}\n{error}\n", flush=True)
    print(f"{cases} cases from seed {seed}: {counts['equal']} equal, {counts['refused']} refused, {failed} failed")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(bool(campaign(given.cases, given.seed, given.folder or Path(temporary))))
