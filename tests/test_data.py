import json
import os
import pickle
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, HfArgumentParser, PreTrainedTokenizerFast

from hf_power import data
from hf_power.data import BlockStream, DataArguments, collate_blocks, fingerprint, load_text, load_tokenizer, pack

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


# --- arguments and text


def test_arguments_parse():
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(["--block_size", "64", "--streaming", "True"])
    assert args == DataArguments(block_size=64, streaming=True)


def test_python_stdlib_is_split_by_file(cache):
    parts = load_text(DataArguments(data_cache_dir=cache))
    train, held_out = (set(part["text"]) - {""} for part in parts)
    assert all(part.column_names == ["text"] for part in parts)
    # files with equal text (copies, empty __init__.py) may fall on either side: the split is by path
    assert len(train & held_out) <= 2
    assert 0.03 < len(parts[1]) / (len(parts[0]) + len(parts[1])) < 0.07
    assert (STDLIB / "argparse.py").read_bytes().decode() in train | held_out
    assert not any("site-packages" in path for path, _ in data._python_sources(STDLIB))


def test_python_sources_skips_packages_and_broken_encodings(tmp_path):
    for name in ("b.py", "a/z.py", "a.py", "site-packages/no.py", "a/dist-packages/no.py", "no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"# {name}\r\n".encode())
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    expected = [(name, f"# {name}\r\n") for name in ("a.py", "a/z.py", "b.py")]
    assert list(data._python_sources(tmp_path)) == expected


def test_python_stdlib_is_cached(cache, monkeypatch):
    args = DataArguments(data_cache_dir=cache)
    first = load_text(args)
    written = {file: file.stat().st_mtime_ns for file in Path(cache).rglob("*.arrow")}
    second = load_text(args)
    assert [part.cache_files for part in first] == [part.cache_files for part in second]
    assert {file: file.stat().st_mtime_ns for file in Path(cache).rglob("*.arrow")} == written
    assert fingerprint(first[0]) == fingerprint(second[0]) != fingerprint(first[1])
    monkeypatch.setattr(data, "python_version", lambda: "3.99.0")
    assert fingerprint(load_text(args)[0]).startswith("python-3.99.0-")


@pytest.mark.slow
def test_python_stdlib_fingerprint_is_the_same_in_another_process(cache, tmp_path):
    here = fingerprint(load_text(DataArguments(data_cache_dir=cache))[0])
    script = (
        "from hf_power.data import *\n"
        f"print(fingerprint(load_text(DataArguments(data_cache_dir={str(tmp_path / 'other')!r}))[0]))"
    )
    there = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert there.stdout.split()[-1] == here


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_give_the_same_documents(suffix, streaming, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(data, "STREAM_EVAL_DOCUMENTS", 3)
    texts = [f"document {i}\nwith « two » lines" for i in range(12)]
    folder = tmp_path / "in"
    folder.mkdir()
    for number, half in enumerate((texts[:6], texts[6:])):
        file, rows = folder / f"part{number}{suffix}", Dataset.from_dict({"text": half, "id": range(6)})
        if suffix == ".txt":
            for i, text in enumerate(half):
                (folder / f"{number}-{i}.txt").write_text(text, encoding="utf-8")
        elif suffix == ".parquet":
            rows.to_parquet(file)
        elif suffix == ".arrow":
            rows.save_to_disk(folder / "saved")
            (folder / "saved" / "data-00000-of-00001.arrow").rename(file)
            for leftover in (folder / "saved").iterdir():
                leftover.unlink()
        elif suffix == ".json":
            file.write_text(json.dumps(rows.to_list(), indent=1))
        else:
            write_jsonl(file, rows.to_list())
    args = DataArguments(dataset=str(folder), streaming=streaming, data_cache_dir=cache, eval_fraction=0.25)
    train, held_out = ([row["text"] for row in part] for part in load_text(args))
    assert (len(train), len(held_out)) == (9, 3)
    assert sorted(train + held_out) == sorted(texts)
    if streaming:
        assert held_out + train == texts


def test_local_names(tmp_path):
    for name in ("a.txt", "b.txt", "a[1].txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(name):
        return [Path(file).relative_to(tmp_path).as_posix() for file in data._local_files(str(tmp_path / name))]

    assert found("") == ["a.txt", "a[1].txt", "b.txt", "sub/c.txt"]
    assert found("a.txt") == ["a.txt"]
    assert found("a[1].txt") == ["a[1].txt"]
    assert found("[ab].txt") == ["a.txt", "b.txt"]
    assert found("**/*.txt") == ["a.txt", "a[1].txt", "b.txt", "sub/c.txt"]
    assert data._local_files("HuggingFaceFW/fineweb") == data._local_files("wikitext") == []


def test_a_file_name_with_brackets_is_not_a_pattern(tmp_path, cache):
    write_jsonl(tmp_path / "a1.jsonl", [{"text": "wrong"}] * 2)
    name = write_jsonl(tmp_path / "a[1].jsonl", [{"text": "right"}] * 2)
    assert load_text(DataArguments(dataset=name, data_cache_dir=cache))[0]["text"] == ["right"]


def test_held_out_documents_and_text_column(tmp_path, cache):
    rows = [{"id": i, "body": f"document {i}", "title": "t"} for i in range(40)]
    name = write_jsonl(tmp_path / "a.jsonl", rows)
    args = DataArguments(dataset=name, text_column="body", eval_fraction=0.1, data_cache_dir=cache)
    train, held_out = load_text(args)
    assert train.column_names == held_out.column_names == ["text"]
    assert (len(train), len(held_out)) == (36, 4)
    assert set(train["text"]) | set(held_out["text"]) == {row["body"] for row in rows}
    assert load_text(args)[1]["text"] == held_out["text"]
    args.split, args.eval_split = "train[:30]", "train[30:]"
    train, held_out = load_text(args)
    assert (train["text"], held_out["text"]) == ([r["body"] for r in rows[:30]], [r["body"] for r in rows[30:]])
    args.streaming, args.split, args.eval_split = True, "train", "train"
    assert [row["text"] for row in load_text(args)[0]] == [row["body"] for row in rows]


def test_other_names_go_to_load_dataset(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_text(DataArguments(dataset="org/name", dataset_config="en", split="train[:9]", eval_split="test"))
    common = {"streaming": False, "cache_dir": None}
    assert calls == [(("org/name", "en"), {"split": split, **common}) for split in ("train[:9]", "test")]


@pytest.mark.parametrize("bad", ["{oops}", '{"text": "cut of', "42", '{"text": "\\x"}'])
def test_broken_json_line_is_named(bad, tmp_path, cache):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}] * 3)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n\n' + bad + '\n{"text": "fine"}\n')
    args = DataArguments(dataset=str(tmp_path), data_cache_dir=cache)
    with pytest.raises(ValueError, match=r"b\.jsonl:3: broken JSON \(.*\): repair or delete the line\.$"):
        load_text(args)


def test_broken_json_array_is_named(tmp_path, cache):
    (tmp_path / "a.json").write_text('[{"text": "fine"},\n{"text": "fine"}\n{"text": "no comma"}]')
    with pytest.raises(ValueError, match=r"a\.json:3: broken JSON"):
        load_text(DataArguments(dataset=str(tmp_path / "a.json"), data_cache_dir=cache))


def text_errors():
    return {
        "fraction 0": ({"eval_fraction": 0.0}, "eval_fraction must lie between 0 and 1, got 0.0: pass"),
        "fraction 1": ({"eval_fraction": 1.0}, "eval_fraction must lie between 0 and 1, got 1.0: pass"),
        "stdlib split": ({"split": "test"}, "has no splits or columns to choose from, got split='test'"),
        "no held-out file": ({"eval_fraction": 1e-12}, "holds out 0 of the [0-9]+ documents of 'python-stdlib': pass"),
        "missing column": (
            {"dataset": "many.jsonl", "text_column": "body"},
            "one that is missing: pass one of text, t",
        ),
        "wrong column": (
            {"dataset": "many.jsonl", "text_column": "id"},
            r"of type Value\('int64'\): pass one of text, t",
        ),
        "no text": ({"dataset": "numbers.jsonl"}, r"is missing: pass one of \(the data has no column of strings\)"),
        "empty": ({"dataset": "empty.jsonl"}, "has no documents: pass more data"),
        "one": ({"dataset": "one.txt"}, r"has 1 document\(s\), too few to hold one out"),
        "short stream": ({"dataset": "many.jsonl", "streaming": True}, "The training part of .* has no documents"),
        "streamed column": (
            {"dataset": "many.jsonl", "text_column": "body", "streaming": True},
            "one that is missing: pass one of text, t",
        ),
        "mixed": ({"dataset": "."}, r"must be files of one type of .*, got \.jsonl, \.txt: choose"),
        "unknown": ({"dataset": "table.csv"}, r"must be files of one type of .*, got \.csv: choose"),
    }


@pytest.mark.parametrize("case", text_errors())
def test_text_errors(case, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "many.jsonl", [{"text": "a", "id": i, "t": "b"} for i in range(20)])
    write_jsonl(tmp_path / "numbers.jsonl", [{"id": 1}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "one.txt").write_text("alone")
    (tmp_path / "table.csv").write_text("text\na\n")
    fields, message = text_errors()[case]
    with pytest.raises(ValueError, match=message):
        load_text(DataArguments(**{"data_cache_dir": cache, **fields}))


@pytest.mark.parametrize("name", ["none.jsonl", "none/*.txt", "./none", "/none/none", "empty_folder"])
def test_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no file of type \.txt, .*, \.arrow: check"):
        load_text(DataArguments(dataset=name))


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


def test_collate_blocks():
    batch = collate_blocks([{"input_ids": np.array([1, 2, 3], dtype=np.int32)}, {"input_ids": np.array([4, 5, 6])}])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[1, 2, 3], [4, 5, 6]]
    batch["labels"][0, 0] = -100
    assert batch["input_ids"][0, 0] == 1
