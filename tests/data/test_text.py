import json
import subprocess
import sysconfig
from pathlib import Path

import datasets
import pytest
from datasets import Dataset
from transformers import HfArgumentParser
from warm import python

from hf_power.data import text as text_module
from hf_power.data.order import fingerprint
from hf_power.data.text import DataArguments, load_text, local_files, python_files, python_sources

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def test_arguments_parse():
    (args,) = HfArgumentParser(DataArguments).parse_args_into_dataclasses(["--block_size", "64", "--streaming", "True"])
    assert args == DataArguments(block_size=64, streaming=True)


def test_python_stdlib_is_split_by_file(cache):
    *parts, counts = load_text(DataArguments(data_cache_dir=cache))
    train, held_out = (set(part["text"]) - {""} for part in parts)
    assert all(part.column_names == ["text"] for part in parts)
    # files with equal text (copies, empty __init__.py) may fall on either side: the split is by path
    assert len(train & held_out) <= 2
    assert 0.03 < len(parts[1]) / (len(parts[0]) + len(parts[1])) < 0.07
    assert (STDLIB / "argparse.py").read_bytes().decode() in train | held_out
    assert not any("site-packages" in path for path, _ in python_sources(STDLIB))
    assert counts.read == len(parts[0]) + len(parts[1]) + counts.skipped == len(python_files(STDLIB))


def test_python_sources_skips_packages_and_broken_encodings(tmp_path):
    for name in ("b.py", "a/z.py", "a.py", "site-packages/no.py", "a/dist-packages/no.py", "no.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(f"# {name}\r\n".encode())
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    expected = [(name, f"# {name}\r\n") for name in ("a.py", "a/z.py", "b.py")]
    assert list(python_sources(tmp_path)) == expected


def test_python_stdlib_is_cached(cache, monkeypatch):
    args = DataArguments(data_cache_dir=cache)
    first = load_text(args)[:2]
    written = {file: file.stat().st_mtime_ns for file in Path(cache).rglob("*.arrow")}
    second = load_text(args)[:2]
    assert [part.cache_files for part in first] == [part.cache_files for part in second]
    assert {file: file.stat().st_mtime_ns for file in Path(cache).rglob("*.arrow")} == written
    assert fingerprint(first[0]) == fingerprint(second[0]) != fingerprint(first[1])
    monkeypatch.setattr(text_module, "python_version", lambda: "3.99.0")
    assert fingerprint(load_text(args)[0]).startswith("python-3.99.0-")


@pytest.mark.slow
def test_python_stdlib_fingerprint_is_the_same_in_another_process(cache, tmp_path):
    here = fingerprint(load_text(DataArguments(data_cache_dir=cache))[0])
    script = (
        "from hf_power.data.order import fingerprint\nfrom hf_power.data.text import DataArguments, load_text\n"
        f"print(fingerprint(load_text(DataArguments(data_cache_dir={str(tmp_path / 'other')!r}))[0]))"
    )
    there = subprocess.run([python(), "-c", script], capture_output=True, text=True, check=True)
    assert there.stdout.split()[-1] == here


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_give_the_same_documents(suffix, streaming, tmp_path, cache, write_jsonl):
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
    train, held_out = ([row["text"] for row in part] for part in load_text(args)[:2])
    assert held_out
    assert len(held_out) == 3 or streaming  # of which the share is 0.25 on average alone
    assert sorted(train + held_out) == sorted(texts)
    assert train == [text for text in texts if text in train]  # the order is that of the files


def test_local_names(tmp_path):
    for name in ("a.txt", "b.txt", "a[1].txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(name):
        return [Path(file).relative_to(tmp_path).as_posix() for file in local_files(str(tmp_path / name))]

    assert found("") == ["a.txt", "a[1].txt", "b.txt", "sub/c.txt"]
    assert found("a.txt") == ["a.txt"]
    assert found("a[1].txt") == ["a[1].txt"]
    assert found("[ab].txt") == ["a.txt", "b.txt"]
    assert found("**/*.txt") == ["a.txt", "a[1].txt", "b.txt", "sub/c.txt"]
    assert local_files("HuggingFaceFW/fineweb") == local_files("wikitext") == []


def test_a_file_name_with_brackets_is_not_a_pattern(tmp_path, cache, write_jsonl):
    write_jsonl(tmp_path / "a1.jsonl", [{"text": "wrong"}] * 2)
    name = write_jsonl(tmp_path / "a[1].jsonl", [{"text": "right"}] * 2)
    assert load_text(DataArguments(dataset=name, data_cache_dir=cache))[0]["text"] == ["right"]


def test_held_out_documents_and_text_column(tmp_path, cache, write_jsonl):
    rows = [{"id": i, "body": f"document {i}", "title": "t"} for i in range(40)]
    name = write_jsonl(tmp_path / "a.jsonl", rows)
    args = DataArguments(dataset=name, text_column="body", eval_fraction=0.1, data_cache_dir=cache)
    train, held_out, _ = load_text(args)
    assert train.column_names == held_out.column_names == ["text"]
    assert (len(train), len(held_out)) == (36, 4)
    assert train["text"] == [row["body"] for row in rows if row["body"] in set(train["text"])]
    assert set(train["text"]) | set(held_out["text"]) == {row["body"] for row in rows}
    assert load_text(args)[1]["text"] == held_out["text"]
    args.split, args.eval_split = "train[:30]", "train[30:]"
    train, held_out, _ = load_text(args)
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
def test_broken_json_line_is_named(bad, tmp_path, cache, write_jsonl):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "fine"}] * 3)
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n\n' + bad + '\n{"text": "fine"}\n')
    args = DataArguments(dataset=str(tmp_path), data_cache_dir=cache)
    with pytest.raises(ValueError, match=r"b\.jsonl:3: broken JSON \(.*\): repair or delete the line, or "):
        load_text(args)


def test_broken_json_array_is_named(tmp_path, cache):
    (tmp_path / "a.json").write_text('[{"text": "fine"},\n{"text": "fine"}\n{"text": "no comma"}]')
    with pytest.raises(ValueError, match=r"a\.json:3: broken JSON"):
        load_text(DataArguments(dataset=str(tmp_path / "a.json"), data_cache_dir=cache))


def text_errors():
    return {
        "fraction 0": ({"eval_fraction": 0.0}, "eval_fraction must lie between 0 and 1, got 0.0: pass"),
        "fraction 1": ({"eval_fraction": 1.0}, "eval_fraction must lie between 0 and 1, got 1.0: pass"),
        "stdlib split": ({"split": "test"}, "has no splits, columns or lines to choose from, got split='test'"),
        "no held-out file": ({"eval_fraction": 1e-12}, "holds out 0 of the [0-9]+ documents of 'python-stdlib': pass"),
        "missing column": (
            {"dataset": "many.jsonl", "text_column": "body"},
            "many.jsonl has no column 'body': pass --text_column with one of text, id, t, or",
        ),
        "wrong column": (
            {"dataset": "many.jsonl", "text_column": "id"},
            "many.jsonl:1: id is the number 0 and no text: ",
        ),
        "no text": (
            {"dataset": "numbers.jsonl"},
            "numbers.jsonl has no column 'text': pass --text_column with one of id, or",
        ),
        "empty": ({"dataset": "empty.jsonl"}, r"has 0 document\(s\) with text, too few to hold one out"),
        "one": ({"dataset": "one.txt"}, r"has 1 document\(s\) with text, too few to hold one out"),
        "short stream": ({"dataset": "one.txt", "streaming": True}, "The training part of .* has no documents"),
        "streamed column": (
            {"dataset": "many.jsonl", "text_column": "body", "streaming": True},
            "many.jsonl has no column 'body': pass --text_column with one of text, id, t, or",
        ),
        "unknown": (
            {"dataset": "table.xlsx"},
            "table.xlsx is of no kind that can be read: convert it to one of .txt, ",
        ),
        "unknown beside": ({"dataset": "."}, "table.xlsx is of no kind that can be read: convert"),
        "sliced stream": (
            {"dataset": "many.jsonl", "streaming": True, "split": "train[:9]"},
            "only be read whole, as the",
        ),
        "other split": ({"dataset": "many.jsonl", "split": "test"}, "split 'test' cannot be used: Unknown split"),
        "config of files": ({"dataset": "many.jsonl", "dataset_config": "en"}, "'en' is for datasets of the Hub, and"),
        "column of .txt": ({"dataset": "one.txt", "text_column": "body"}, "which have no columns: leave it out"),
        "skip": ({"skip_bad_lines": -1}, "skip_bad_lines must be at least 0, got -1: leave it out"),
        "skip elsewhere": (
            {"dataset": "org/name", "skip_bad_lines": 1},
            "is for files on this disk, and 'org/name' is none",
        ),
    }


@pytest.mark.parametrize("case", text_errors())
def test_text_errors(case, tmp_path, cache, monkeypatch, write_jsonl):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "many.jsonl", [{"text": "a", "id": i, "t": "b"} for i in range(20)])
    write_jsonl(tmp_path / "numbers.jsonl", [{"id": 1}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "one.txt").write_text("alone")
    (tmp_path / "table.xlsx").touch()
    fields, message = text_errors()[case]
    with pytest.raises(ValueError, match=message):
        load_text(DataArguments(**{"data_cache_dir": cache, **fields}))


@pytest.mark.parametrize("name", ["none.jsonl", "none/*.txt", "./none", "/none/none", "empty_folder"])
def test_missing_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no file of type \.txt, .*, \.arrow"):
        load_text(DataArguments(dataset=name))
