import json
import os
import pickle
import sysconfig
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_power.data import blocks as data
from hf_power.data.blocks import BlockStream, collate_blocks, fingerprint, load_tokenizer, pack
from hf_power.data.text import DataArguments, load_text

STDLIB = Path(sysconfig.get_paths()["stdlib"])
ODD_TEXTS = ["", " \n\t ", "naïve café — 漢字 🙂\r\n", f"a text that quotes {data.END_OF_TEXT} in passing", "x" * 5000]


@pytest.fixture(scope="module")
def texts():
    """47 documents: small modules of the standard library and odd ones."""
    sources = [path for path in sorted(STDLIB.glob("*.py")) if path.stat().st_size < 9000]
    return [path.read_text(encoding="utf-8") for path in sources[:42]] + ODD_TEXTS


@pytest.fixture(scope="module")
def tokenizer(texts, tmp_path_factory):
    args = DataArguments(vocab_size=600, data_cache_dir=str(tmp_path_factory.mktemp("tokenizer")))
    return load_tokenizer(args, Dataset.from_dict({"text": texts}))


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(data, "DOCUMENTS_PER_BATCH", 10)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_blocks(num_blocks=10, block_size=4):
    ids = np.arange(num_blocks * block_size).reshape(num_blocks, block_size)
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("numpy")


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


# --- tokenizer


def test_trained_tokenizer_round_trip(tokenizer, texts):
    for text in texts:
        if data.END_OF_TEXT not in text:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 600
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.unk_token == data.END_OF_TEXT
    assert tokenizer.pad_token is None


def test_trained_tokenizer_is_deterministic_and_cached(texts, tokenizer, tmp_path, monkeypatch):
    train = Dataset.from_dict({"text": texts})
    args = DataArguments(vocab_size=600, data_cache_dir=str(tmp_path))
    first = load_tokenizer(args, train)
    assert first.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()  # trained apart
    with monkeypatch.context() as patch:
        patch.setattr(data, "_train_bpe", None)
        assert load_tokenizer(args, train).get_vocab() == first.get_vocab()
    (folder,) = (tmp_path / "hf_power_tokenizers").iterdir()
    args.vocab_size = 500
    assert len(load_tokenizer(args, train)) == 500
    load_tokenizer(args, train.select(range(30)))
    assert len(list(folder.parent.iterdir())) == 3


def test_tokenizer_is_trained_on_a_bounded_sample(texts, monkeypatch):
    monkeypatch.setattr(data, "TOKENIZER_CHARACTERS", 1000)
    train = Dataset.from_dict({"text": [None, *texts]})
    for dataset in (train, train.to_iterable_dataset()):
        assert sum(len(text) for text in data._sample_text(dataset)) == 1000


def test_tokenizer_is_written_whole_or_not_at_all(texts, tokenizer, tmp_path, monkeypatch):
    train = Dataset.from_dict({"text": texts})
    args = DataArguments(vocab_size=600, data_cache_dir=str(tmp_path))
    folder = tmp_path / "hf_power_tokenizers"

    def interrupted(path):
        Path(path).mkdir()
        Path(path, "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_train_bpe", lambda *_: SimpleNamespace(save_pretrained=interrupted))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(args, train)
    assert not list(folder.iterdir())

    def overtaken(path):
        tokenizer.save_pretrained(path)
        tokenizer.save_pretrained(final)

    monkeypatch.setattr(data, "_train_bpe", lambda *_: SimpleNamespace(save_pretrained=tokenizer.save_pretrained))
    final = data._trained_tokenizer(args, train)
    for file in Path(final).iterdir():
        file.unlink()
    Path(final).rmdir()
    monkeypatch.setattr(data, "_train_bpe", lambda *_: SimpleNamespace(save_pretrained=overtaken))
    assert load_tokenizer(args, train).get_vocab() == tokenizer.get_vocab()
    assert [str(path) for path in folder.iterdir()] == [final]


def test_tokenizer_from_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(DataArguments(tokenizer=str(tmp_path)), None)
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_errors(tokenizer, tmp_path, cache):
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match=r"slow' must be a fast one \(tokenizer.json\), got ByT5Tokenizer: convert"):
        load_tokenizer(DataArguments(tokenizer=str(tmp_path / "slow")), None)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(
        ValueError, match="no_eos' must have an eos token to end documents with, got none: set eos_token"
    ):
        load_tokenizer(DataArguments(tokenizer=str(tmp_path / "no_eos")), None)
    train = Dataset.from_dict({"text": ["ab ab ab"]})
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 \(bytes and eos\), got 256: raise it"):
        load_tokenizer(DataArguments(vocab_size=256, data_cache_dir=cache), train)
    with pytest.warns(UserWarning, match=r"gives 25\d tokens, fewer than vocab_size=4096: size the model"):
        load_tokenizer(DataArguments(data_cache_dir=cache), train)


# --- blocks


@pytest.mark.parametrize("block_size", [1, 7, 256])
def test_pack_matches_the_reference(block_size, texts, tokenizer, small_batches):
    plain = [text for text in texts if data.END_OF_TEXT not in text]
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


def test_second_pack_hits_the_cache(texts, tokenizer, tmp_path, cache, monkeypatch):
    name = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    args = DataArguments(dataset=name, data_cache_dir=cache)
    first = pack(load_text(args)[0], tokenizer, block_size=64)
    used = pickle.loads(pickle.dumps(tokenizer))
    used(["a", "b c d e"], truncation=True, max_length=2)
    assert used.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_raw_tokenizer", None)  # tokenizing would fail
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


# --- order


def reference_order(num_blocks, seed, num_epochs):
    return [
        int(row) for epoch in range(num_epochs) for row in np.random.default_rng([seed, epoch]).permutation(num_blocks)
    ]


def test_block_stream_matches_the_reference():
    blocks = make_blocks()
    rows = as_rows(blocks)
    stream = BlockStream(blocks, seed=3, start=0, stop=35)
    assert len(stream) == 35
    order = [rows.index(row) for row in as_rows(stream)]
    assert order == reference_order(10, 3, 4)[:35]
    epochs = [order[first : first + 10] for first in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert as_rows(BlockStream(blocks, seed=4, start=0, stop=35)) != as_rows(stream)


@pytest.mark.parametrize("start", [0, 1, 9, 10, 23, 34, 35])
def test_block_stream_resumes_at_any_position(start):
    blocks = make_blocks()
    whole = as_rows(BlockStream(blocks, seed=0, start=0, stop=35))
    assert as_rows(BlockStream(blocks, seed=0, start=start, stop=35)) == whole[start:]
    assert as_rows(BlockStream(blocks, seed=0, start=0, stop=start)) == whole[:start]


@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (7, 0), (32, 0), (4, 2)])
def test_order_does_not_depend_on_batches_or_workers(batch_size, num_workers):
    stream = BlockStream(make_blocks(), seed=0, start=3, stop=35)
    loader = DataLoader(stream, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_blocks)
    assert torch.cat([batch["input_ids"] for batch in loader]).tolist() == as_rows(stream)


def test_block_stream_reads_a_batch_at_once():
    blocks, reads = make_blocks(), []

    class Spy:
        def __len__(self):
            return len(blocks)

        def __getitem__(self, rows):
            reads.append(rows)
            return blocks[rows]

    stream = BlockStream(Spy(), seed=0, start=0, stop=100)
    items = stream.__getitems__([8, 9, 10, 11, 50])
    assert len(reads) == 1
    assert [item["input_ids"].shape for item in items] == [(4,)] * 5
    assert [item["input_ids"].tolist() for item in items] == [as_rows(stream)[i] for i in (8, 9, 10, 11, 50)]


@pytest.mark.parametrize(
    ("num_blocks", "fields"),
    [(10, {"start": -1}), (10, {"start": 6}), (10, {"seed": -1}), (0, {})],
)
def test_block_stream_errors(num_blocks, fields):
    arguments = {"seed": 0, "start": 0, "stop": 5, **fields}
    blocks = make_blocks(10).select(range(num_blocks))
    with pytest.raises(ValueError, match=f"needs 0 <= start <= stop, .* and {num_blocks} blocks: correct them"):
        BlockStream(blocks, **arguments)


@pytest.mark.parametrize("index", [-1, 5])
def test_block_stream_index_error(index):
    with pytest.raises(IndexError, match=rf"has items 0 to 4, got \[{index}\]: stay within"):
        BlockStream(make_blocks(), seed=0, start=2, stop=7)[index]


def test_stream_blocks_is_endless_and_resumes(monkeypatch):
    monkeypatch.setattr(data, "STREAM_SHUFFLE_BLOCKS", 4)
    blocks = make_blocks().to_iterable_dataset().with_format("numpy")
    whole = as_rows(data.stream_blocks(blocks, seed=0, start=0).take(35))
    assert sorted(whole[:10]) == as_rows(make_blocks()) != whole[:10]
    assert whole != as_rows(data.stream_blocks(blocks, seed=1, start=0).take(35))
    for start in (1, 9, 10, 23):
        resumed = data.stream_blocks(blocks, seed=0, start=start)
        assert as_rows(resumed.take(35 - start)) == whole[start:]


def test_spread_blocks():
    blocks = make_blocks(num_blocks=10)
    assert as_rows(data.spread_blocks(blocks, 4)) == [as_rows(blocks)[i] for i in (0, 2, 5, 7)]
    assert as_rows(data.spread_blocks(blocks, 99)) == as_rows(blocks)
    assert as_rows(data.spread_blocks(blocks.to_iterable_dataset(), 3)) == as_rows(blocks)[:3]


def test_collate_blocks():
    batch = collate_blocks([{"input_ids": np.array([1, 2, 3], dtype=np.int32)}, {"input_ids": np.array([4, 5, 6])}])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1
