import functools
import gc
import json
import os
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import pytest
import torch
from hub import Hub, pointed_at

from hf_power.plots import figures
from hf_power.records.files import replaced

torch.set_num_threads(1)  # tiny models: a second thread costs more than it does, and sums keep one order


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A jsonl file of 60 small modules of the standard library: about 130 kB of real text."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    small = [p for p in sorted(stdlib.glob("*.py")) if p.stat().st_size < 6000][:60]
    lines = [json.dumps({"text": p.read_text(encoding="utf-8")}) for p in small]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "corpus.jsonl"


@pytest.fixture(scope="session")
def sections(corpus):
    """Sections of a run that takes a second: 12 steps of 4 blocks of 32 tokens."""

    def build(folder, tokens=12 * 128, **training):
        model = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2}
        return {
            "model": model,
            "mup": {"base_width": 16},
            "data": {
                "dataset": str(corpus),
                "vocab_size": 400,
                "block_size": 32,
                "num_proc": 1,
                "data_cache_dir": str(corpus.parent / "cache"),
            },
            "run": {"tokens": tokens, "max_eval_tokens": 640},
            "training": {
                "output_dir": str(folder),
                "per_device_train_batch_size": 4,
                "logging_steps": 1,
                "save_steps": 4,
                "learning_rate": 0.01,
                "lr_scheduler_kwargs": {"a": 8.0},
                "warmup_steps": 2,
                "disable_tqdm": True,
                **training,
            },
        }

    return build


@pytest.fixture(scope="session", autouse=True)
def no_garbage_in_the_imports():
    """accelerate collects garbage at the end of each training: a second over all that the imports have made, and none without."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_picture():
    """The picture at the end of a run is turned into pixels once, which takes longer than a tiny run; tests/plots looks at it."""
    save, pixels = figures.save, []

    @functools.wraps(save)
    def save_once(figure, path):
        path = Path(path)
        if path.name != "lr_and_loss.png":
            return save(figure, path)
        if not pixels:
            pixels.append(save(figure, path).read_bytes())
        with replaced(path) as temporary:
            temporary.write_bytes(pixels[0])
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", save_once)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_template():
    """The template of the card is compiled once, which takes half as long as all else in a push of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", functools.cache(jinja2.Environment.compile))
        yield


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on 127.0.0.1, the client of this process pointed at it; the client's waits between attempts are cut short."""
    sleep = time.sleep
    with Hub() as hub, pointed_at(hub, monkeypatch, tmp_path / "home"):
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 200))
        yield hub
