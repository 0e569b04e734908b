import json
import multiprocessing

import pytest
from sentences import says

from hf_power.records.rows import append_rows, check_one_source, read_csv, read_rows

ROW = {
    "schema": 1,
    "id": "a1",
    "status": "finished",
    "reason": None,
    "model_type": "llama",
    "width": 64,
    "parameters": 100_000,
    "parameters_without_embeddings": 60_000,
    "tokens_per_step": 8192,
    "tokens": 1_000_000,
    "schedule": "warmup_stable_decay",
    "learning_rate": 0.01,
    "law": None,
    "max_lr": 0.02,
    "warmup_tokens": 100_000,
    "decay_tokens": 100_000,
    "decay_shape": "exponential",
    "weight_decay": 0.1,
    "seed": 0,
    "loss": 3.5,
    "train_loss": 3.4,
    "trunk": "t1",
    "trained_tokens": 1_000_000,
    "flops_per_token": 4e5,
    "seconds": 2.5,
    "block_size": 256,
    "settings": {"run": {"tokens": "1M"}},
    "data": {"dataset": "d", "fingerprint": "f", "tokenizer": "t", "held_out_tokens": 200_000},
    "versions": {"torch": "2"},
    "hardware": {"device": "cpu"},
}


def row(**changes):
    return ROW | changes


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "sweep.jsonl"
    rows = [row(), row(id="a2", status="diverged", loss=None, reason="loss is nan")]
    append_rows(path, rows)
    append_rows(path, [row(id="a3", weight_decay=0)])
    assert read_rows(path) == ([*rows, row(id="a3", weight_decay=0)], [])


def test_a_torn_line_stays_alone_and_is_named(tmp_path):
    path = tmp_path / "sweep.jsonl"
    append_rows(path, [row()])
    torn = json.dumps(row(id="ä"), ensure_ascii=False).encode()
    with open(path, "ab") as file:
        file.write(torn[: torn.index("ä".encode()) + 1])  # killed within a character
    append_rows(path, [row(id="a2")])
    rows, problems = read_rows(path)
    assert [r["id"] for r in rows] == ["a1", "a2"]
    assert problems == ["line 2 is cut off and not used"]


def test_every_cut_of_the_last_line_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "sweep.jsonl"
    whole = (json.dumps(row()) + "\n" + json.dumps(row(id="a2"))).encode()
    start = whole.index(b"\n") + 1
    for end in range(start + 1, len(whole), 7):
        path.write_bytes(whole[:end])
        assert read_rows(path) == ([row()], ["line 2 is cut off and not used"])
    path.write_bytes(whole)
    assert len(read_rows(path)[0]) == 2


def test_the_first_of_two_rows_with_one_id_is_kept(tmp_path):
    path = write(tmp_path / "sweep.jsonl", row(), "", row(loss=1.0))
    assert read_rows(path) == ([row()], ["line 3 repeats the id a1 of line 1 and is not used"])


def _append(path, process):
    for i in range(40):
        append_rows(path, [row(id=f"{process}-{i}-{j}", reason="x" * 2000) for j in range(3)])


def test_processes_that_append_at_once_lose_and_tear_nothing(tmp_path):
    path = tmp_path / "sweep.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_append, args=(path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows, problems = read_rows(path)
    assert not problems
    assert {r["id"] for r in rows} == {f"{p}-{i}-{j}" for p in range(4) for i in range(40) for j in range(3)}
    ids = [r["id"] for r in rows]
    assert all(ids[i][:-1] == ids[i + 1][:-1] == ids[i + 2][:-1] for i in range(0, len(ids), 3))  # one write, one block


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (row(schema=2), ["line 2 of", "not a row of schema 1, got 2"]),
        (row(schema=True), ["not a row of schema 1, got True"]),
        ([1], ["not a row of schema 1, got 'list'"]),
        ({"schema": 1, "id": "x"}, ["line 2 of", "lacks status, reason, model_type"]),
        (row(tokens="1M"), ["tokens must be int, got '1M'"]),
        (row(tokens=1e6), ["tokens must be int, got 1000000.0"]),
        (row(seed=True), ["seed must be int, got True"]),
        (row(loss="3"), ["loss must be int or float or null, got '3'"]),
        (row(loss=float("nan")), ["loss is nan, which is not finite"]),
        (row(learning_rate=0), ["learning_rate must be positive, got 0"]),
        (row(tokens_per_step=-1), ["tokens_per_step must be positive, got -1"]),
        (row(status="done"), ["status must be one of finished, diverged, failed, got 'done'"]),
        (row(loss=None), ["a loss if and only if it is finished, got finished, None"]),
        (row(status="failed"), ["a loss if and only if it is finished, got failed, 3.5"]),
    ],
)
def test_wrong_rows(tmp_path, line, parts):
    path = write(tmp_path / "sweep.jsonl", row(id="a0"), line)
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    says(caught, *parts)


def test_no_rows(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_rows(tmp_path / "sweep.jsonl")
    says(caught, "there is no sweep at", "pass the sweep.jsonl")
    with pytest.raises(ValueError) as caught:
        read_rows(write(tmp_path / "sweep.jsonl", '{"schema": 1, "id'))
    says(caught, "has no intact row")


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError) as caught:
        append_rows(tmp_path / "sweep.jsonl", [row(loss=float("inf"))])
    says(caught, "has a number that is not finite: write null")
    assert not (tmp_path / "sweep.jsonl").exists()


def test_csv_with_names_of_its_own(tmp_path):
    path = write(tmp_path / "s.csv", "lr,bs,D,smooth loss", "0.001,32,2e9,3.1", "0.002,32,2e9,nan", "0.001,32,2e9,3.2")
    columns = {"learning_rate": "lr", "batch": "bs", "tokens": "D", "loss": "smooth loss"}
    first, second, third = read_csv(path, columns, block_size=2048, schedule="cosine")
    assert first == {
        "learning_rate": 0.001,
        "tokens_per_step": 65536,
        "tokens": 2_000_000_000,
        "loss": 3.1,
        "width": 0,
        "schedule": "cosine",
        "seed": 0,
        "status": "finished",
        "trunk": "cosine/0/65536/0.001/0",
    }
    assert (second["status"], second["loss"]) == ("diverged", None)
    assert (third["seed"], third["trunk"]) == (1, "cosine/0/65536/0.001/1")  # a repetition


def test_csv_with_our_names(tmp_path):
    path = write(
        tmp_path / "s.csv",
        "learning_rate,tokens_per_step,tokens,loss,seed,width,schedule,other",
        "0.001,8192,1000000,3.1,7,64,linear,x",
        "0.001,8192,2000000,inf,7,64,linear,x",
    )
    rows = read_csv(path)
    assert [r["trunk"] for r in rows] == ["linear/64/8192/0.001/7"] * 2
    assert [r["status"] for r in rows] == ["finished", "diverged"]


def test_tsv(tmp_path):
    path = write(tmp_path / "s.tsv", "learning_rate\ttokens_per_step\ttokens\tloss", "0.001\t8192\t1e6\t3.1")
    assert read_csv(path)[0]["tokens"] == 1_000_000


@pytest.mark.parametrize(
    ("text", "arguments", "parts"),
    [
        (
            "lr,tokens\n",
            {"columns": {"learning_rate": "l_r"}},
            ["no column 'l_r' for learning_rate", "did you mean 'lr' of lr, tokens"],
        ),
        ("lr,tokens\n", {}, ["no column 'learning_rate' for learning_rate, it has lr, tokens"]),
        ("learning_rate,tokens,batch,loss\n", {}, ["gives the batch in sequences: pass block_size"]),
        ("learning_rate,tokens,loss\n", {}, ["no column 'tokens_per_step' for tokens_per_step"]),
        ("a\n", {"columns": {"rate": "a"}}, ["columns maps 'rate', which no row has: choose from learning_rate"]),
        ("learning_rate,tokens_per_step,tokens,loss\n", {}, ["has no row below its header"]),
        ("learning_rate,tokens_per_step,tokens,loss\n.1,8,9,\n", {}, ["line 2 of", "loss must be a number, got ''"]),
        ("learning_rate,tokens_per_step,tokens,loss\n.1,8\n", {}, ["tokens must be a number, got None"]),
        ("learning_rate,tokens_per_step,tokens,loss\n-1,8,9,3\n", {}, ["learning_rate must be positive", "got '-1'"]),
        ("learning_rate,tokens_per_step,tokens,loss\n.1,8.5,9,3\n", {}, ["tokens_per_step must be positive and whole"]),
    ],
)
def test_bad_csv(tmp_path, text, arguments, parts):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_csv(tmp_path / "s.csv", **arguments)
    says(caught, *parts)


def test_no_csv(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_csv(tmp_path / "s.csv")
    says(caught, "there is no sweep at", "pass a CSV file with a header")


def test_rows_of_one_source_pass():
    steps = 8192, 65536
    rows = [
        row(tokens_per_step=b, tokens=t, warmup_tokens=-(-100_000 // b) * b, decay_tokens=t // 10 // b * b)
        for b in steps
        for t in (1_000_000, 8_000_000)
    ]
    check_one_source([*rows, row(schedule="cosine", warmup_tokens=0, decay_tokens=0, decay_shape="cosine")])
    check_one_source([{k: r[k] for k in ("schedule", "tokens", "tokens_per_step", "learning_rate")} for r in rows])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data": ROW["data"] | {"fingerprint": "g"}}, ["data fingerprint, f and g"]),
        ({"data": ROW["data"] | {"tokenizer": "u"}}, ["tokenizer, t and u"]),
        ({"data": ROW["data"] | {"held_out_tokens": 9}}, ["held-out tokens, 200000 and 9"]),
        ({"weight_decay": 0.0, "schedule": "cosine"}, ["weight decay, 0.1 and 0.0"]),
        ({"model_type": "mixtral"}, ["model type, llama and mixtral"]),
        ({"warmup_tokens": 120_000}, ["warmup tokens, 100000 and 120000"]),
        ({"decay_tokens": 200_000}, ["share of the decay, 0.1 and 0.2"]),
        ({"decay_shape": "linear"}, ["decay shape, exponential and linear"]),
    ],
)
def test_rows_of_two_sources_are_refused(changes, parts):
    with pytest.raises(ValueError) as caught:
        check_one_source([row(), row(**changes)])
    says(caught, "the rows differ in", "must not be fitted together", *parts)


def test_rows_without_a_source_do_not_mix_with_rows_that_have_one():
    bare = {k: ROW[k] for k in ("schedule", "tokens", "tokens_per_step", "learning_rate")}
    with pytest.raises(ValueError) as caught:
        check_one_source([row(), bare])
    says(caught, "weight decay, 0.1 and None")
