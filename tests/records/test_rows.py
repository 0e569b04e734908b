import json
import multiprocessing
from dataclasses import replace

import pytest
from samples import ROW, record
from sentences import refused

from hf_power.records.rows import append_rows, load_rows


def row(**changes):
    return ROW | changes


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "sweep.jsonl"
    rows = [record(), record(id="a2", status="diverged", loss=None, reason="loss is nan")]
    append_rows(path, rows)
    append_rows(path, [record(id="a3", weight_decay=0, extension=1)])
    assert load_rows(path) == ([*rows, record(id="a3", weight_decay=0, extension=1)], [])
    assert json.loads(path.read_text().splitlines()[0]) == row()


def test_a_torn_line_stays_alone_and_is_named(tmp_path):
    path = tmp_path / "sweep.jsonl"
    append_rows(path, [record()])
    torn = json.dumps(row(id="ä"), ensure_ascii=False).encode()
    with open(path, "ab") as file:
        file.write(torn[: torn.index("ä".encode()) + 1])  # killed within a character
    append_rows(path, [record(id="a2")])
    rows, problems = load_rows(path)
    assert [r.id for r in rows] == ["a1", "a2"]
    assert problems == ["line 2 is cut off and not used"]


def test_every_cut_of_the_last_line_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "sweep.jsonl"
    whole = (json.dumps(row()) + "\n" + json.dumps(row(id="a2"))).encode()
    start = whole.index(b"\n") + 1
    for end in range(start + 1, len(whole), 7):
        path.write_bytes(whole[:end])
        assert load_rows(path) == ([record()], ["line 2 is cut off and not used"])
    path.write_bytes(whole)
    assert len(load_rows(path)[0]) == 2


def test_the_first_of_two_rows_with_one_id_is_kept(tmp_path):
    path = write(tmp_path / "sweep.jsonl", row(), "", row(loss=1.0))
    assert load_rows(path) == ([record()], ["line 3 repeats the id a1 of line 1 and is not used"])


def _append(path, process):
    for i in range(40):
        append_rows(path, [record(id=f"{process}-{i}-{j}", reason="x" * 2000) for j in range(3)])


@pytest.mark.slow
def test_processes_that_append_at_once_lose_and_tear_nothing(tmp_path):
    path = tmp_path / "sweep.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows, problems = load_rows(path)
    assert not problems
    assert {r.id for r in rows} == {f"{p}-{i}-{j}" for p in range(4) for i in range(40) for j in range(3)}
    ids = [r.id for r in rows]
    assert all(ids[i][:-1] == ids[i + 1][:-1] == ids[i + 2][:-1] for i in range(0, len(ids), 3))  # one write, one block


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (row(schema=2), ["line 2 of", "not a row of schema 1, got 2"]),
        (row(schema=True), ["not a row of schema 1, got True"]),
        ([1], ["not a row of schema 1, got 'list'"]),
        ({"schema": 1, "id": "x"}, ["line 2 of", "lacks model_type, width, parameters"]),
        (row(tokens="1M"), ["tokens must be a whole number above 0, got '1M'"]),
        (row(tokens=1e6), ["tokens must be a whole number above 0, got 1000000.0"]),
        (row(seed=True), ["seed must be a whole number or null, got True"]),
        (row(loss="3"), ["loss must be a finite number or null, got '3'"]),
        (row(loss=float("nan")), ["loss must be a finite number or null, got nan"]),
        (row(learning_rate=0), ["learning_rate must be a finite number above 0, got 0"]),
        (row(tokens_per_step=-1), ["tokens_per_step must be a whole number above 0, got -1"]),
        (row(status="done"), ["status must be one of finished, diverged, failed, got 'done'"]),
        (row(loss=None), ["a loss if and only if it is finished, got finished, None"]),
        (row(status="failed"), ["a loss if and only if it is finished, got failed, 3.5"]),
    ],
)
def test_wrong_rows(tmp_path, line, parts):
    path = write(tmp_path / "sweep.jsonl", row(id="a0"), line)
    with refused(ValueError, *parts):
        load_rows(path)


def test_no_rows(tmp_path):
    with refused(FileNotFoundError, "there is no sweep at", "pass the sweep.jsonl"):
        load_rows(tmp_path / "sweep.jsonl")
    with refused(ValueError, "has no intact row"):
        load_rows(write(tmp_path / "sweep.jsonl", '{"schema": 1, "id'))


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with refused(ValueError, "has a number that is not finite: write null"):
        append_rows(tmp_path / "sweep.jsonl", [replace(record(), loss=float("inf"))])
    assert not (tmp_path / "sweep.jsonl").exists()
