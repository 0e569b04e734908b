"""Runs from elsewhere, and which runs may be fitted together."""

import pytest
from examples import ROW, record
from sentences import refused

from hf_power.fit.rows import check_one_source, read_csv
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.rows import Row

DATA = ROW["data"]


def bare(row):
    return Row(
        schedule=row.schedule, tokens=row.tokens, tokens_per_step=row.tokens_per_step, learning_rate=row.learning_rate
    )


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_csv_with_names_of_its_own(tmp_path):
    path = write(tmp_path / "s.csv", "lr,bs,D,smooth loss", "0.001,32,2e9,3.1", "0.002,32,2e9,nan", "0.001,32,2e9,3.2")
    columns = {"learning_rate": "lr", "batch": "bs", "tokens": "D", "loss": "smooth loss"}
    first, second, third = read_csv(path, columns, block_size=2048, schedule="cosine")
    assert first == Row(
        learning_rate=0.001,
        tokens_per_step=65536,
        tokens=2_000_000_000,
        loss=3.1,
        schedule="cosine",
        trunk="cosine/0/65536/0.001/0",
    )
    assert (second.status, second.loss) == ("diverged", None)
    assert (third.seed, third.trunk) == (1, "cosine/0/65536/0.001/1")  # a repetition


def test_csv_with_our_names(tmp_path):
    path = write(
        tmp_path / "s.csv",
        "learning_rate,tokens_per_step,tokens,loss,seed,width,schedule,other",
        "0.001,8192,1000000,3.1,7,64,linear,x",
        "0.001,8192,2000000,inf,7,64,linear,x",
    )
    rows = read_csv(path)
    assert [r.trunk for r in rows] == ["linear/64/8192/0.001/7"] * 2
    assert [r.status for r in rows] == ["finished", "diverged"]


def test_tsv(tmp_path):
    path = write(tmp_path / "s.tsv", "learning_rate\ttokens_per_step\ttokens\tloss", "0.001\t8192\t1e6\t3.1")
    assert read_csv(path)[0].tokens == 1_000_000


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
    with refused(UserError, *parts):
        read_csv(tmp_path / "s.csv", **arguments)


def test_no_csv(tmp_path):
    with refused(NotFoundError, "there is no sweep at", "pass a CSV file with a header"):
        read_csv(tmp_path / "s.csv")


def test_rows_of_one_source_pass():
    steps = 8192, 65536
    rows = [
        record(tokens_per_step=b, tokens=t, warmup_tokens=-(-100_000 // b) * b, decay_tokens=t // 10 // b * b)
        for b in steps
        for t in (1_000_000, 8_000_000)
    ]
    check_one_source([*rows, record(schedule="cosine", warmup_tokens=0, decay_tokens=0, decay_shape="cosine")])
    check_one_source([bare(r) for r in rows])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data": DATA | {"fingerprint": "g"}}, ["data fingerprint, f and g"]),
        ({"data": DATA | {"tokenizer": "u"}}, ["tokenizer, t and u"]),
        ({"data": DATA | {"held_out_tokens": 9}}, ["held-out tokens, 200000 and 9"]),
        ({"weight_decay": 0.0, "schedule": "cosine"}, ["weight decay, 0.1 and 0.0"]),
        ({"model_type": "mixtral"}, ["model type, llama and mixtral"]),
        ({"warmup_tokens": 120_000}, ["warmup tokens, 100000 and 120000"]),
        ({"decay_tokens": 200_000}, ["share of the decay, 0.1 and 0.2"]),
        ({"decay_shape": "linear"}, ["decay shape, exponential and linear"]),
    ],
)
def test_rows_of_two_sources_are_refused(changes, parts):
    with refused(UserError, "the rows differ in", "must not be fitted together", *parts):
        check_one_source([record(), record(**changes)])


def test_rows_without_a_source_do_not_mix_with_rows_that_have_one():
    with refused(UserError, "weight decay, 0.1 and None"):
        check_one_source([record(), bare(record())])
