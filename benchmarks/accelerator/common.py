"""What the parts share: the clock, the ceiling, the proxies' settings and the rows, written as they come."""

import contextlib
import functools
import gc
import io
import json
import time
import warnings
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_power.data.packing import pack
from hf_power.data.text import DataArguments, load_text
from hf_power.data.tokenizer import load_tokenizer
from hf_power.pretrain import run as train
from hf_power.sweep import ensemble

ROOT = Path(__file__).resolve().parents[2]
ROWS_FILE = "rows.jsonl"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Rows:
    """The rows of a sitting: each is on the disk as soon as it is measured, so that a sitting can be cut short."""

    def __init__(self, folder):
        self.path = Path(folder) / ROWS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, part, **row):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, **row}) + "\n")
        print(part, json.dumps(row), flush=True)

    def read(self, part=None):
        """All rows, or those of a part since it was last begun: what an attempt left that was cut short is not among them."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        rows = [json.loads(line) for line in lines]
        if part is None:
            return rows
        begun = max((i for i, row in enumerate(rows) if row.get("of") == part), default=0)
        return [row for row in rows[begun:] if row["part"] == part]

    def done(self, part):
        return any(row.get("done") for row in self.read(part))


class Clock:
    """Times the steps of whichever optimizer runs: from the end of step `warmup` to that of step `warmup` + `steps`.

    Attributes:
        seconds: of the timed steps; the device has done its work at both ends.
        first_seconds: from the clock's start to the end of the first step, compilation included.
        waits: waits for the device within the timed steps, where the backend reports them (CUDA).
    """

    def __init__(self, warmup, steps):
        self.warmup, self.steps, self.seen = warmup, steps, 0
        self.seconds = self.waits = self.peak_bytes = None

    def __enter__(self):
        self.made = now()
        self.caught = warnings.catch_warnings(record=True)
        self.messages = self.caught.__enter__()
        warnings.simplefilter("always")
        self.handle = register_optimizer_step_post_hook(self._after)
        return self

    def __exit__(self, *error):
        self.handle.remove()
        self.caught.__exit__(*error)
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            self.waits = sum("called a synchronizing" in str(m.message) for m in self.messages)
            self.peak_bytes = torch.cuda.max_memory_allocated()
        free_memory()

    def _after(self, optimizer, args, kwargs):
        self.seen += 1
        if self.seen == 1:
            self.first_seconds = now() - self.made
        if self.seen == self.warmup:
            now()
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.set_sync_debug_mode("warn")
            self.started = time.perf_counter()
        if self.seen == self.warmup + self.steps:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            self.seconds = now() - self.started

    def row(self, tokens_per_step):
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "tokens_per_step": tokens_per_step,
            "tokens_per_second": self.steps * tokens_per_step / self.seconds,
            "first_step_seconds": self.first_seconds,
            "waits_in_timed_steps": self.waits,
            "peak_bytes": self.peak_bytes,
        }


def free_memory():
    """Give what no tensor holds any more back to the device."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def now():
    """Seconds, when the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ceiling(size):
    """FLOPs per second of bf16 products of two square matrices of random numbers, the best of 5 times 10."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        started = now()
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * size**3 / (now() - started))
    return best


@functools.cache
def _text_and_tokenizer(dataset, block_size, vocab_size):
    named = DataArguments(dataset=dataset, block_size=block_size, vocab_size=vocab_size)
    text, *_ = load_text(named)
    return text, load_tokenizer(named, text)


@functools.cache
def _blocks(dataset, block_size, vocab_size):
    return pack(*_text_and_tokenizer(dataset, block_size, vocab_size), block_size=block_size)


def tokenizer_of(given):
    """The tokenizer of the settings' text, trained once a process."""
    return _text_and_tokenizer(given.data.dataset, given.data.block_size, given.data.vocab_size)[1]


def data(given):
    """Tokenizer and packed blocks of the settings' text, prepared once a process."""
    return tokenizer_of(given), _blocks(given.data.dataset, given.data.block_size, given.data.vocab_size)


@contextlib.contextmanager
def only_the_training():
    """Runs of `pretrain` in this block are initialized on the device, which saves minutes, and end with their last step.

    A billion weights take half a minute of a CPU's random numbers, and the finished model's evaluation and its 5 GB are
    no part of a step.
    """
    build, new, finish = train.build_model, ensemble.build_model, train._finish

    def on_device(function):
        def built(*args):
            with torch.device(DEVICE):
                return function(*args)

        return built

    train.build_model, ensemble.build_model = on_device(build), on_device(new)
    train._finish = lambda *args: None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        train.build_model, ensemble.build_model = build, new
        train._finish = finish
