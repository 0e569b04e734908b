"""What each reader makes of text as it is, one situation at a time; tests/data/test_folders.py mixes them."""

import bz2
import gzip
import json
import os
import sys

import pyarrow
import pytest
from sentences import refused

from hf_power.data.documents import Counts, read_documents
from hf_power.data.files import local_files
from hf_power.data.store import stored
from hf_power.records.errors import NotFoundError, UserError

HALF = '{"text": "half \\ud83d of a character"}'


@pytest.fixture
def read(tmp_path):
    """The texts and counts of one file with a name and a content."""

    def run(name, content, column="text", limit=0):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        counts = Counts(limit)
        texts = list(read_documents([str(tmp_path / name)], column, counts))
        return texts, (counts.read, counts.empty, counts.skipped)

    return run


@pytest.mark.parametrize(
    ("name", "content", "texts", "counts"),
    [
        (
            "x.jsonl",
            '\ufeff{"text": "a"}\r\n\r\n \n{"text": "b", "meta": {"x": 1}}\n{"meta": "web", "text": "c"}',
            "abc",
            (3, 0, 0),
        ),
        ("x.jsonl", '{"text": "a"}\n{"text": ""}\n{"text": null}\n{"id": 1}\n', "a", (4, 3, 0)),
        ("x.jsonl", '{"text": "a", "id": ' + "1" * 5000 + "}\n", "a", (1, 0, 0)),
        ("x.jsonl", b'{"text": "a", "author": "Ren\xe9", "half": "\\ud83d"}\n', "a", (1, 0, 0)),
        ("x.jsonl", '{"text": "\\ud83d\\ude42"}\n{"text": "\\u0000"}\n{"text": "\ufeff"}', "🙂\x00\ufeff", (3, 0, 0)),
        ("x.jsonl", '{"text": "a\tb"}\n', ["a\tb"], (1, 0, 0)),
        ("x.jsonl", "", "", (0, 0, 0)),
        ("x.json", '[{"text": "a"},\n{"text": "b"}\n ]\n', "ab", (2, 0, 0)),
        ("x.json", "[]", "", (0, 0, 0)),
        ("x.json", '{\n "text": "a",\n "id": 1\n}\n', "a", (1, 0, 0)),
        ("x.json", '{"text": "a"}\n{"text": "b"}\n', "ab", (2, 0, 0)),
        ("x.txt", b"\xef\xbb\xbfa\r\nb\x00", ["a\r\nb\x00"], (1, 0, 0)),
        ("x.txt", "", "", (1, 1, 0)),
        ("x.csv", '\ufeff"text",id\n"a, ""b""\nc",1\n\nd,2\n,3\n', ['a, "b"\nc', "d"], (3, 1, 0)),
        ("x.csv", "id,text\n1," + "a" * 200_000 + "\n", ["a" * 200_000], (1, 0, 0)),
        ("x.tsv", "text\tid\na,b\t1\n", ["a,b"], (1, 0, 0)),
        ("x.csv", b"id,text\nRen\xe9,a\n", "a", (1, 0, 0)),
        ("x.jsonl.bz2", bz2.compress(b'{"text": "a"}\n') + bz2.compress(b'{"text": "b"}\n'), "ab", (2, 0, 0)),
    ],
)
def test_text_goes_in_as_it_is(name, content, texts, counts, read):
    assert read(name, content) == (list(texts), counts)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("x.jsonl", '"upload finished"', "broken JSON (not an object but a text)"),
        ("x.jsonl", "null", "broken JSON (not an object but null)"),
        ("x.jsonl", '{"text": 12345}', "text is the number 12345 and no text"),
        ("x.jsonl", '{"text": ["a"]}', "text is a list and no text"),
        ("x.jsonl", '{"text": true}', "text is a truth value and no text"),
        ("x.jsonl", HALF, "\\ud83d is half of a character, which UTF-8 cannot hold"),
        ("x.jsonl", b'{"text": "caf\xe9"}', "the byte 0xe9 is no UTF-8"),
        ("x.jsonl", '{"text": "UTF-16"}'.encode("utf-16"), "the byte 0xff is no UTF-8"),
        ("x.jsonl", "[" * 100_000, "broken JSON (it is nested too deep)"),
        ("x.ndjson", '{"text": "cut', "broken JSON (Unterminated string"),
        ("x.csv", "one", "it has 1 cells and the first line 2"),
        ("x.csv", "one,two,three", "it has 3 cells and the first line 2"),
        ("x.csv", '"a"b",1', "broken CSV ("),
        ("x.csv", b"caf\xe9,1", "the byte 0xe9 is no UTF-8"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(name, line, said, read):
    good = ["text,id\n", "a,1\n", "b,2\n"] if name == "x.csv" else ["\n", '{"text": "a"}\n', '{"text": "b"}\n']
    line = line if isinstance(line, bytes) else line.encode()
    content = "".join(good[:2]).encode() + line + b"\n" + good[2].encode()
    with refused(UserError, f"{name}:3: {said}", "repair or delete the line", "--skip_bad_lines N"):
        read(name, content)
    assert read(name, content, limit=1) == (["a", "b"], (3, 0, 1))
    with refused(UserError, f"{name}:4: {said}", "more than skip_bad_lines=1", "raise skip_bad_lines"):
        read(name, content.replace(line + b"\n", line + b"\n" + line + b"\n"), limit=1)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.json", '[{"text": "a"},\n{"text": "b"}\n{"text": "no comma"}]', ("x.json:3: broken JSON", "in an array")),
        ("x.csv", 'text,id\na,1\n"b,2\nc,3\n', ("x.csv:3: a quote is opened and never closed",)),
        ("x.jsonl.gz", b"no gzip", ("x.jsonl.gz cannot be read beyond line 0", "cut, damaged or of another kind")),
        ("x.jsonl.zst", b"no zstd", ("x.jsonl.zst cannot be read beyond line 0",)),
        ("x.jsonl.xz", b"no xz", ("x.jsonl.xz cannot be read beyond line 0",)),
        ("x.parquet", b"PAR1 and no more", ("x.parquet cannot be read beyond line 0",)),
        ("x.arrow", b"nothing", ("x.arrow cannot be read beyond line 0",)),
        ("x.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("x.txt is a pointer of Git LFS",)),
        ("x.jsonl", '{"id": 1}\n' * 5, ("x.jsonl has no column 'text': pass --text_column with one of id, or",)),
        ("x.jsonl", '{"id": 1}\n{broken', ("x.jsonl has no column 'text': pass --text_column with one of id, or",)),
        ("x.csv", "id;text\n1;a\n", ("x.csv has no column 'text': pass --text_column with one of id;text, or",)),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_whatever_may_be_skipped(name, content, parts, read):
    with refused(UserError, *parts):
        read(name, content, limit=9)


def test_a_wrong_column_is_refused_before_the_whole_file_is_read(read):
    with refused(UserError, "has no column 'body': pass --text_column with one of text"):
        read("x.jsonl", '{"text": "a"}\n' * 1000 + "{broken", "body")
    assert read("x.jsonl", '{"id": 1}\n{"text": "a"}\n' * 1000)[1] == (2000, 1000, 0)


@pytest.mark.parametrize(("column", "found"), [("a.b", ["x"]), ("a.b.c", None), ("a.c", None)])
def test_nested_columns(column, found, read, tmp_path):
    row = {"a": {"b": "x"}} if column != "a.b.c" else {"a": {"b": {"d": "x"}}}
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist([row])
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name, content in (("x.jsonl", json.dumps(row)), ("x.arrow", sink.getvalue().to_pybytes())):
        if found is None:
            with refused(UserError, f"has no column '{column}': pass --text_column with one of a, or"):
                read(name, content, column)
        else:
            assert read(name, content, column)[0] == found


def test_files_are_read_once_and_hidden_ones_not_at_all(tmp_path):
    for name in (
        "a.jsonl",
        ".git/x.jsonl",
        ".hidden.txt",
        "sub/b.CSV",
        "sub/.ipynb_checkpoints/b.csv",
        "README.md",
        "_SUCCESS",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    os.symlink(tmp_path / "a.jsonl", tmp_path / "sub" / "again.jsonl")
    os.link(tmp_path / "a.jsonl", tmp_path / "z.jsonl")
    os.symlink(tmp_path, tmp_path / "sub" / "loop")
    expected = [str(tmp_path / "a.jsonl"), str(tmp_path / "sub" / "b.CSV")]
    assert local_files(str(tmp_path)) == expected
    assert local_files(f"{tmp_path}/**") == local_files(f"{tmp_path}/*") == expected
    assert local_files(str(tmp_path / ".git")) == [str(tmp_path / ".git" / "x.jsonl")]  # it was asked for
    os.symlink(tmp_path / "gone", tmp_path / "c.jsonl")
    with refused(NotFoundError, "c.jsonl is a link to nothing"):
        local_files(str(tmp_path))


def test_what_datasets_writes_beside_its_tables_is_no_text(tmp_path):
    for name in (
        "dataset_dict.json",
        "train/data-0.arrow",
        "train/state.json",
        "train/dataset_info.json",
        "state.json/x.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(file, tmp_path) for file in local_files(str(tmp_path))] == [
        "state.json/x.txt",
        "train/data-0.arrow",
    ]


def test_stored_text_is_read_anew_when_a_file_or_an_argument_is_another(tmp_path):
    file = tmp_path / "x.jsonl"

    def texts(column="text", limit=0):
        documents, counts = stored([str(file)], column, limit, tmp_path / "cache")
        return documents["text"][:], counts.skipped

    file.write_text('{"text": "a", "b": "x"}\n')
    state = file.stat()
    assert texts() == texts() == (["a"], 0)
    assert texts("b") == (["x"], 0)
    # The same size and the same time of change, as after an unpacking.
    file.write_text('{"text": "c", "b": "x"}\n')
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert texts() == (["c"], 0)
    file.write_text('{"text": "c"}\n{}}\n')
    assert texts(limit=1) == (["c"], 1)
    with refused(UserError, "x.jsonl:2: broken JSON"):
        texts()
    assert not [path for path in (tmp_path / "cache" / "hf_power_text").iterdir() if path.name.startswith("tmp")]


@pytest.mark.skipif(sys.platform == "win32", reason="names of bytes")
def test_names_of_files_may_be_strange(read):
    assert read("a b[1]*é.jsonl", '{"text": "a"}\n') == (["a"], (1, 0, 0))


def test_a_split_for_tests_is_not_trained_on(tmp_path):
    for name in ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    with refused(UserError, "data/train-00000-of-00001.jsonl, and another one, data/test-00000-of-00001.jsonl"):
        local_files(str(tmp_path))
    assert local_files(str(tmp_path / "data/train*")) == [str(tmp_path / "data/train-00000-of-00001.jsonl")]


def test_gzip_without_its_suffix_and_chats(read):
    assert read("x.jsonl", gzip.compress(b'{"text": "a"}\n'))[0] == ["a"]
    with refused(UserError, "text is a list and no text (chats and token ids have to be made into one text each)"):
        read("y.jsonl", '{"text": [{"role": "user", "content": "a"}]}\n')
