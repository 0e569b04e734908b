import json
import os
import sysconfig
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from datasets import Dataset

from hf_power.data import packing
from hf_power.data.text import DataArguments
from hf_power.data.tokenizer import END_OF_TEXT, load_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
ODD_TEXTS = ["", " \n\t ", "naïve café — 漢字 🙂\r\n", f"a text that quotes {END_OF_TEXT} in passing", "x" * 5000]


@pytest.fixture(scope="session")
def texts():
    """47 documents: small modules of the standard library and odd ones."""
    sources = [path for path in sorted(STDLIB.glob("*.py")) if path.stat().st_size < 9000]
    return [path.read_text(encoding="utf-8") for path in sources[:42]] + ODD_TEXTS


@pytest.fixture(scope="session")
def tokenizer(texts, tmp_path_factory):
    args = DataArguments(vocab_size=600, data_cache_dir=str(tmp_path_factory.mktemp("tokenizer")))
    return load_tokenizer(args, Dataset.from_dict({"text": texts}))


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(packing, "DOCUMENTS_PER_BATCH", 10)


@pytest.fixture
def write_jsonl():
    def write(path, rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
