"""Runs from elsewhere, and which runs may be fitted together."""

import json

import pandas
import pytest
from samples import ROW, record
from sentences import refused

from hf_power.fit.elsewhere import read_csv
from hf_power.fit.rows import check_one_source
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
    (first, second, third), notes = read_csv(path, columns, block_size=2048, schedule="cosine")
    assert notes == []
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
    rows, _ = read_csv(path)
    assert [r.trunk for r in rows] == ["linear/64/8192/0.001/7"] * 2
    assert [r.status for r in rows] == ["finished", "diverged"]


def test_tsv(tmp_path):
    path = write(tmp_path / "s.tsv", "learning_rate\ttokens_per_step\ttokens\tloss", "0.001\t8192\t1e6\t3.1")
    (row,), _ = read_csv(path, schedule="cosine")
    assert row.tokens == 1_000_000


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
        ("learning_rate,tokens_per_step,tokens,loss\n.1,8,,3\n", {}, ["line 2 of", "tokens must be a number, got ''"]),
        ("learning_rate,tokens_per_step,tokens,loss\n.1,8,x,3\n", {}, ["tokens must be a number, got 'x'"]),
        ("learning_rate,tokens_per_step,tokens,loss\n[.1],8,9,3\n", {}, ["learning_rate must be a number, got '[.1]'"]),
        ("learning_rate,tokens_per_step,tokens,loss\n.1,-8,9,3\n", {}, ["tokens_per_step must not be negative"]),
        (
            "learning_rate,tokens_per_step,tokens,loss\n.1,8,9,3,5\n",
            {},
            ["has 5 cells, but the header has 4", "quotes"],
        ),
        ("learning_rate,tokens_per_step,tokens,loss\n.1,8,9,\n,8,9,\n", {}, ["8 to 8, too few for tokens"]),
        ("learning_rate,tokens_per_step,tokens,loss\n,8,9,\n", {}, ["has no run with a learning rate"]),
        ("lr,lr\n", {}, ["has two columns 'lr'"]),
        ("", {}, ["is empty: pass a CSV"]),
        (
            "learning_rate,tokens_per_step,tokens,loss,state\n.1,8,9,3,odd\n",
            {},
            ["state must be finished, diverged, crashed or the like, got 'odd'"],
        ),
    ],
)
def test_bad_csv(tmp_path, text, arguments, parts):
    (tmp_path / "s.csv").write_text(text)
    with refused(UserError, *parts):
        read_csv(tmp_path / "s.csv", **arguments)


LINES = ["learning_rate,tokens_per_step,tokens,loss", "0.001,8192,2000000,3.1", "0.002,8192,2000000,3.2"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("0.001,8192,2000000,-3", ["a loss is -3", "log-likelihoods"]),
        ("1.5,8192,2000000,3", ["the learning rates reach 1.5", "percent"]),
        ("-3.5,8192,2000000,3", ["a learning rate is -3.5", "logarithms"]),
        ("0.001,32,2000000,3", ["tokens_per_step is 32 to 8192", "counts sequences", "batch=COLUMN"]),
        ("0.001,512,9e9,3", ["counts sequences"]),
        ("0.001,8192,0.002,3", ["of 0.002 tokens would have", "lines likely have other units"]),
        ("0.001,8192.5,2000000,3", ["tokens_per_step must be whole, got 8192.5"]),
        ("0.001,8192,2000000,3", ["does not say which learning-rate schedule", "pass --schedule, one of"]),
    ],
)
def test_units_and_schedule_are_asked_for(tmp_path, line, parts):
    with refused(UserError, *parts):
        read_csv(write(tmp_path / "s.csv", *LINES, line))


@pytest.mark.parametrize(("unit", "factor"), [("thousands", 1e3), ("millions", 1e6), ("billions", 1e9)])
def test_the_likely_unit_of_tokens_is_named(tmp_path, unit, factor):
    lines = [f"0.001,{b},{n / factor},3" for b in (65536, 262144) for n in (2e9, 8e9)]
    with refused(UserError, f"likely counts {unit}", f"multiply it by {factor:.0e}".replace("e+0", "e")):
        read_csv(write(tmp_path / "s.csv", LINES[0], *lines))


def test_steps_for_tokens_are_named_and_may_be_mapped(tmp_path):
    lines = [f"0.001,{b},{n // b},3" for b in (65536, 262144) for n in (2**31, 2**33)]
    path = write(tmp_path / "s.csv", LINES[0], *lines)
    with refused(UserError, "likely counts steps", "steps=COLUMN"):
        read_csv(path)
    rows, _ = read_csv(path, {"steps": "tokens"}, schedule="cosine")
    assert [r.tokens for r in rows] == [2**31, 2**33] * 2


def test_perplexities_are_named(tmp_path):
    with refused(UserError, "the lowest loss is 11.02", "perplexities"):
        read_csv(write(tmp_path / "s.csv", LINES[0], "0.001,8192,2000000,11.02", "0.001,8192,2000000,13"))


def test_states_empty_cells_and_repeats(tmp_path):
    """A crashed run's last loss is no result, an empty loss is a failed run, an export that repeats itself counts once."""
    lines = ["Learning_Rate,tokens_per_step,tokens,loss,State,name"]
    lines += ["0.001,8192,2e6,3.1,finished,a", "0.002,8192,2e6,5.5,crashed,b", "0.004,8192,2e6,,failed,c"]
    lines += [",,,,,", "0.008,8192,2e6,NaN,crashed,d", "0.001,8192,2e6,3.1,finished,a", ",,,,running,e"]
    rows, notes = read_csv(write(tmp_path / "s.csv", *lines), schedule="cosine")
    assert [(r.learning_rate, r.status, r.loss) for r in rows] == [
        (0.001, "finished", 3.1),
        (0.002, "failed", None),
        (0.004, "failed", None),
        (0.008, "diverged", None),
    ]
    assert notes == [
        "1 of 5 rows repeat another one in all that is read, and count once",
        "1 failed runs lack what tells their cell, and are passed over",
    ]


def test_several_models_are_no_seeds(tmp_path):
    rates = (0.001, 0.002, 0.004, 0.008)
    lines = [f"{lr},8192,2e6,{loss + 10 * lr},{size}" for size, loss in ((1e6, 3.1), (2e6, 3.0)) for lr in rates]
    path = write(tmp_path / "s.csv", LINES[0] + ",N", *lines)
    with refused(UserError, "have the losses 3.01 and 3.11", "more than seeds do", "map parameters="):
        read_csv(path, schedule="cosine")
    rows, _ = read_csv(path, {"parameters": "N"}, schedule="cosine")
    assert [r.parameters for r in rows] == [1_000_000] * 4 + [2_000_000] * 4


SPREADSHEET = "name;lr;B;T;L\nµ;0,001;65.536;1.048.576.000;2,913\nx;6,905E-04;65.536;1.048.576.000;2,95\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (SPREADSHEET.replace("x", "x"), "cp1252"),
        (SPREADSHEET, "utf-16"),
        (SPREADSHEET, "utf-16-le"),
        ("sep=;\n" + SPREADSHEET, "utf-8-sig"),
        (SPREADSHEET.replace(";", "\t"), "utf-16"),
        (SPREADSHEET.replace(";", "|").replace(",", "."), "utf-8"),
        ('name,lr,B,T,L\n"µ, a",0.001,"65,536","1,048,576,000",2.913\nx,6.905e-4,65536.0,1.048576B,2.95\n', "utf-8"),
        ("name,lr,B,T,L\nµ,0.001,65 536,1'048'576'000,2.913\nx,.0006905,65536,1.048576e9,2.95,,\n", "utf-8"),
    ],
)
def test_what_spreadsheets_write(tmp_path, text, encoding):
    if "|" in text:
        text = text.replace("65.536", "65536").replace("1.048.576.000", "1048576000")
    path = tmp_path / "s.csv"
    path.write_bytes(text.encode(encoding))
    columns = {"learning_rate": "lr", "tokens_per_step": "B", "tokens": "T", "loss": "L"}
    rows, _ = read_csv(path, columns, schedule="cosine")
    found = [(r.learning_rate, r.tokens_per_step, r.tokens, r.loss) for r in rows]
    assert found == [(0.001, 65536, 1_048_576_000, 2.913), (0.0006905, 65536, 1_048_576_000, 2.95)]


RUNS = [
    {"learning_rate": lr, "tokens_per_step": 512, "tokens": 51200, "loss": loss}
    for lr, loss in ((0.01, 3.5), (0.02, 3.25))
]
FRAME = pandas.DataFrame(RUNS)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(map(json.dumps, RUNS)),
        json.dumps(RUNS, indent=1),
        "\n".join(json.dumps(run, indent=1) for run in RUNS),  # of `jq .`
        json.dumps({"project": "sweeps", "tags": ["a"], "runs": RUNS}, indent=1),
        json.dumps({f"run-{i}": run for i, run in enumerate(RUNS)}),
        json.dumps({"_type": "table", "columns": list(FRAME), "data": FRAME.to_numpy().tolist()}),
        FRAME.to_json(),
        FRAME.to_json(orient="split"),
        FRAME.to_json(orient="index"),
        FRAME.to_json(orient="table"),
        json.dumps(FRAME.to_dict(orient="list")),
    ],
    ids=["lines", "list", "values", "named", "by-name", "wandb", "columns", "split", "index", "table", "lists"],
)
def test_json_in_the_shapes_that_tools_write(tmp_path, text):
    rows, _ = read_csv(write(tmp_path / "runs.json", text), {}, schedule="cosine")
    assert [(row.learning_rate, row.tokens_per_step, row.tokens, row.loss) for row in rows] == [
        (0.01, 512, 51200, 3.5),
        (0.02, 512, 51200, 3.25),
    ]


def test_the_answer_of_mlflow(tmp_path):
    def pairs(run, names):
        return [{"key": name, "value": run[name]} for name in names]

    parts = {"metrics": ["loss"], "params": ["learning_rate", "tokens_per_step", "tokens"]}
    answer = {
        "runs": [{"info": {}, "data": {part: pairs(run, names) for part, names in parts.items()}} for run in RUNS]
    }
    columns = {name: f"data.{part}.{name}" for part, names in parts.items() for name in names}
    rows, _ = read_csv(write(tmp_path / "runs.json", json.dumps(answer, indent=1)), columns, schedule="cosine")
    assert [(row.learning_rate, row.tokens, row.loss) for row in rows] == [(0.01, 51200, 3.5), (0.02, 51200, 3.25)]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"loss": 3,}', "the JSON at line 1 of "),
        ('{"loss": 3}\n{"loss": ', "the JSON at line 2 of "),
        ("[1, 2]", "line 1 of "),
        ('{"columns": ["loss", "lr"], "data": [[3]]}', "the table in "),
    ],
)
def test_json_that_is_no_table_is_one_sentence(tmp_path, text, part):
    with refused(UserError, part):
        read_csv(write(tmp_path / "runs.json", text), {}, schedule="cosine")


def test_a_workbook_and_what_is_no_text_are_refused(tmp_path):
    for content, part in (
        (b"PK\x03\x04abc", "a workbook"),
        (b"a\0\0\0b" * 99, "not text in UTF-8"),
        (b"\x81,", "not text"),
    ):
        (tmp_path / "s.csv").write_bytes(content)
        with refused(UserError, part, "export the runs as CSV"):
            read_csv(tmp_path / "s.csv")


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
