import pickle

import numpy as np
import pytest
from datasets import Dataset

from hf_power.data import packing
from hf_power.data.order import fingerprint
from hf_power.data.packing import pack
from hf_power.data.text import DataArguments, load_text
from hf_power.data.tokenizer import END_OF_TEXT


def as_rows(blocks):
    if isinstance(blocks, Dataset):
        return blocks[:]["input_ids"].tolist()
    return [[int(token) for token in row["input_ids"]] for row in blocks]


def reference_blocks(texts, tokenizer, block_size, documents_per_batch):
    """Token by token, with no batch call and no numpy."""
    blocks = []
    for first in range(0, len(texts), documents_per_batch):
        block = []
        for text in texts[first : first + documents_per_batch]:
            for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
                block.append(token)
                if len(block) == block_size:
                    blocks.append(block)
                    block = []
    return blocks


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_pack_matches_the_reference(block_size, texts, tokenizer, small_batches):
    plain = [text for text in texts if END_OF_TEXT not in text]
    blocks = pack(Dataset.from_dict({"text": plain}), tokenizer, block_size=block_size, num_proc=1)
    assert as_rows(blocks) == reference_blocks(plain, tokenizer, block_size, 10)
    assert blocks.features["input_ids"].feature.dtype == "int32"
    assert isinstance(blocks[0]["input_ids"], np.ndarray)


def test_pack_keeps_every_document(texts, tokenizer):
    blocks = pack(Dataset.from_dict({"text": texts, "id": range(len(texts))}), tokenizer, block_size=1)
    documents, ids = [], []
    for token in blocks[:]["input_ids"][:, 0].tolist():
        if token == tokenizer.eos_token_id:
            documents.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(token)
    assert documents == texts  # also the one that quotes the end of text
    assert not ids


def test_null_text_is_an_empty_document(tokenizer):
    blocks = pack(Dataset.from_dict({"text": ["a", None, "a"]}), tokenizer, block_size=5)
    a, eos = tokenizer.encode("a")[0], tokenizer.eos_token_id
    assert as_rows(blocks) == [[a, eos, eos, a, eos]]


@pytest.mark.slow
@pytest.mark.parametrize("num_documents", [40, 47])
def test_blocks_do_not_depend_on_num_proc(num_documents, texts, tokenizer, small_batches, monkeypatch):
    train = Dataset.from_dict({"text": texts[:num_documents]})
    whole = as_rows(pack(train, tokenizer, block_size=64, num_proc=1))
    used = []
    original = Dataset.map

    def spy(self, *args, **kwargs):
        used.append((len(self), kwargs["num_proc"]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", spy)
    assert as_rows(pack(train, tokenizer, block_size=64, num_proc=3)) == whole
    assert used == [(30, 3), (num_documents - 30, None)]
    used.clear()
    pack(train.select(range(12)), tokenizer, block_size=64, num_proc=8)
    assert used == [(12, None)]


def test_streamed_blocks_equal_stored_ones(texts, tokenizer, small_batches):
    train = Dataset.from_dict({"text": texts})
    stored = pack(train, tokenizer, block_size=64, num_proc=1)
    streamed = pack(train.to_iterable_dataset(num_shards=1), tokenizer, block_size=64)
    assert as_rows(streamed) == as_rows(stored)
    assert isinstance(next(iter(streamed))["input_ids"], np.ndarray)


def test_second_pack_hits_the_cache(texts, tokenizer, tmp_path, cache, monkeypatch, write_jsonl):
    name = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    args = DataArguments(dataset=name, data_cache_dir=cache)
    first = pack(load_text(args)[0], tokenizer, block_size=64)
    used = pickle.loads(pickle.dumps(tokenizer))
    used(["a", "b c d e"], truncation=True, max_length=2)
    assert used.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_raw_tokenizer", None)  # tokenizing would fail
        second = pack(load_text(args)[0], used, block_size=64)
    assert second.cache_files == first.cache_files
    assert all(str(cache) in file["filename"] for file in second.cache_files)
    assert fingerprint(first) == fingerprint(second) != fingerprint(pack(load_text(args)[0], used, block_size=32))


@pytest.mark.parametrize("stream", [False, True])
def test_pack_errors(stream, tokenizer):
    train = Dataset.from_dict({"text": ["a", "a"]})
    train = train.to_iterable_dataset() if stream else train
    message = "The data has 4 tokens, fewer than one block of 5 in any 1000 documents: pass more text"
    with pytest.raises(ValueError, match=message):
        pack(train, tokenizer, block_size=5)
    with pytest.raises(ValueError, match="block_size must be at least 1 token, got 0: pass the sequence length"):
        pack(train, tokenizer, block_size=0)


def test_fingerprint_of_a_stream():
    rows = [{"text": f"ä{i}", "input_ids": [i, 2]} for i in range(5)]
    streams = [Dataset.from_list(part).to_iterable_dataset() for part in (rows, rows, rows[:4])]
    ids = [fingerprint(stream) for stream in streams]
    assert ids[0] == ids[1] != ids[2]
    assert fingerprint(streams[0].with_format("numpy")) == ids[0]
