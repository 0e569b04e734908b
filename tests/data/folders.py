"""Folders of text as crawls have them, made at random, with the count of what is in them that a reader must find."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import string
from dataclasses import dataclass, field

import pyarrow
from pyarrow import parquet

LETTERS = string.ascii_letters + "  \n\t,;'\"\\/{}[]" + "éß漢🙂\x00\u2028\ufeff"


@dataclass
class Folder:
    """What lies in a folder: texts, empty documents, and (file, line) of those that cannot be read."""

    column: str
    texts: list[str] = field(default_factory=list)
    empty: int = 0
    bad: list[tuple[str, int]] = field(default_factory=list)
    refused: str | None = None  # the file that makes the whole folder unreadable

    @property
    def documents(self):
        return len(self.texts) + self.empty + len(self.bad)


def a_text(rng):
    return "".join(rng.choice(LETTERS) for _ in range(rng.choice([1, 5, 30, 300])))


def other(rng):
    """The value of another column: of any type, another in each row."""
    return rng.choice([None, 7, 10**30, 1.5, True, "x", "\ud83d", [1, "a"], {"a": {"b": [None]}}, [], "é"])


def row(rng, column, value):
    """An object with the text column, which may be nested, among others."""
    fields = {f"c{i}": other(rng) for i in range(rng.randrange(3))}
    outer, _, inner = column.partition(".")
    fields[outer] = {inner: value, "more": other(rng)} if inner else value
    return dict(rng.sample(list(fields.items()), len(fields)))


def drawn(rng):
    """What a document is: its kind, and its text where it has one."""
    kind = rng.choices(["text", "empty", "null", "bad"], [80, 7, 7, 3])[0]
    return kind, a_text(rng) if kind == "text" else "" if kind == "empty" else None


def note(folder, path, line, kind, text):
    if kind == "text":
        folder.texts.append(text)
    elif kind == "bad":
        folder.bad.append((path, line))
    else:
        folder.empty += 1


BAD_LINES = (
    b'{"text": "cut of',
    b"{oops}",
    b"42",
    b'"a bare text"',
    b"null",
    b'["text"]',
    b'{"%s": 12}',
    b'{"%s": "half \\ud83d of a character"}',
    b'{"%s": "caf\xe9"}',
    b'{"%s": "x"} {"%s": "y"}',
    b"\xff\xfe{\x00",
)


def bad_line(rng, column):
    outer, _, inner = column.partition(".")
    line = rng.choice(BAD_LINES)
    if inner and line.startswith(b'{"%s": '):
        line = b'{"%s": {"' + inner.encode() + b'": ' + line.removeprefix(b'{"%s": ') + b"}"
        line = line if line.count(b"%s") == 1 else b"{"
    return line.replace(b"%s", outer.encode())


def jsonl(rng, folder, path, count):
    end, ascii_only = rng.choice(["\n", "\r\n"]), rng.random() < 0.5
    lines, number, before = [b"\xef\xbb\xbf" if rng.random() < 0.2 else b""], 0, len(folder.texts)
    for _ in range(count):
        while rng.random() < 0.1:
            lines.append(rng.choice(["", "  ", "\t"]).encode() + end.encode())
            number += 1
        kind, text = drawn(rng)
        number += 1
        if kind == "bad":
            line = bad_line(rng, folder.column)
        else:
            fields = row(rng, folder.column, text)
            if kind == "null" and rng.random() < 0.5 and len(folder.texts) > before:
                fields.pop(folder.column.partition(".")[0])
            line = json.dumps(fields, ensure_ascii=ascii_only or "\\ud83d" in json.dumps(fields)).encode()
        lines.append(line + end.encode())
        note(folder, path, number, kind, text)
    return b"".join(lines).removesuffix(end.encode() if rng.random() < 0.3 else b"")


def json_array(rng, folder, path, count):
    if rng.random() < 0.3:
        text = a_text(rng)
        note(folder, path, 1, "text", text)
        return json.dumps(row(rng, folder.column, text), indent=1).encode()
    lines = []
    for number in range(count):
        kind, text = drawn(rng)
        value = rng.choice(["bare", 3, None]) if kind == "bad" else row(rng, folder.column, text)
        lines.append(json.dumps(value))
        note(folder, path, number + 2, kind, text)
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def table(rng, folder, path, count):
    content, writer = io.StringIO(), None
    names = rng.sample([folder.column, "id", "other"], 3)
    writer = csv.DictWriter(
        content, names, dialect="excel" if ".csv" in path.lower() else "excel-tab", lineterminator="\n"
    )
    writer.writeheader()
    for _ in range(count):
        kind, text = drawn(rng)
        text = text if kind != "null" else ""
        line = content.getvalue().count("\n") + 1
        if kind == "bad":
            content.write(
                rng.choice(["one", '"a"b", 1', "a\udce9" + (",," if ".csv" in path.lower() else "\t\t")]) + "\n"
            )
            if "\udce9" in content.getvalue().rpartition("\n")[0].rpartition("\n")[2] and names[0] != folder.column:
                kind = "empty"  # the byte lies in another column, and the text of the row is empty
        else:
            writer.writerow({folder.column: text, "id": rng.randrange(9), "other": "x"})
        note(folder, path, line, kind, text)
    return content.getvalue().encode("utf-8", "surrogateescape")


def columns(rng, folder, path, count):
    """A parquet or arrow table; its text column may be of any type of texts, one of its texts no UTF-8."""
    values = []
    for number in range(1, count + 1):
        kind, text = drawn(rng)
        values.append(b"caf\xe9" if kind == "bad" else None if text is None else text.encode())
        note(folder, path, number, kind, text)
    bad = any(v and v[-1:] == b"\xe9" for v in values)
    kinds = [pyarrow.binary(), pyarrow.large_binary()] if bad else [pyarrow.string(), pyarrow.large_string()]
    array = pyarrow.array(values, pyarrow.binary()).cast(rng.choice(kinds))
    if rng.random() < 0.3 and not bad:
        array = array.dictionary_encode()
    outer, _, inner = folder.column.partition(".")
    if inner:
        array = pyarrow.StructArray.from_arrays([array, pyarrow.array(range(count))], [inner, "n"])
    made = pyarrow.table({"id": pyarrow.array(range(count)), outer: array})
    sink = io.BytesIO()
    if ".parquet" in path.lower():
        parquet.write_table(made, sink, row_group_size=rng.choice([2, 1000]))
    else:
        new = pyarrow.ipc.new_stream if rng.random() < 0.5 else pyarrow.ipc.new_file
        with new(sink, made.schema) as writer:
            writer.write_table(made, max_chunksize=3)
    return sink.getvalue()


def plain(rng, folder, path, count):
    kind, text = drawn(rng)
    if kind == "bad":
        folder.bad.append((path, 2))
        return b"a line\nna\xefve\n"
    text = (text or "").removeprefix("\ufeff")
    note(folder, path, 1, "text" if text else "empty", text)
    return (b"\xef\xbb\xbf" if rng.random() < 0.2 else b"") + text.encode()


def zst(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


WRITERS = {
    ".jsonl": jsonl,
    ".ndjson": jsonl,
    ".json": json_array,
    ".csv": table,
    ".tsv": table,
    ".txt": plain,
    ".parquet": columns,
    ".arrow": columns,
}
COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


def make(root, seed):
    """Fill a folder, and say what is in it."""
    rng = random.Random(seed)
    folder = Folder(rng.choice(["text", "text", "body", "a.b"]))
    kinds = list(WRITERS) if folder.column != "a.b" else [kind for kind in WRITERS if kind not in (".csv", ".tsv")]
    chosen = rng.choices(kinds, k=rng.randrange(1, 5))
    for number, suffix in enumerate(chosen):
        packed = "" if suffix in (".parquet", ".arrow") else rng.choice(["", "", *COMPRESSORS])
        below = root / rng.choice(["", "", "deep", "deep/er"])
        below.mkdir(parents=True, exist_ok=True)
        path = below / f"{number}{rng.choice([suffix, suffix.upper()])}{packed}"
        content = COMPRESSORS[packed](WRITERS[suffix](rng, folder, str(path), rng.choice([1, 3, 20])))
        if rng.random() < 0.03 and (packed or suffix in (".parquet", ".arrow")):
            content, folder.refused = content[: len(content) // 2], str(path)
        path.write_bytes(content)
        if rng.random() < 0.2:
            os.symlink(path, below / f"link-{path.name}")
    beside(rng, root, folder)
    return folder


def beside(rng, root, folder):
    """What must not be read: hidden files and folders, notes, and a link that leads back to the top."""
    if rng.random() < 0.3:
        (root / ".git").mkdir()
        (root / ".git" / "x.jsonl").write_text('{"text": "hidden"}\n')
        (root / ".hidden.txt").write_text("hidden")
    if rng.random() < 0.3:
        (root / "README.md").write_text("notes")
    if rng.random() < 0.2:
        os.symlink(root, root / "loop", target_is_directory=True)
    if rng.random() < 0.03 and not folder.refused:
        (root / "x.docx").touch()
        folder.refused = str(root / "x.docx")
