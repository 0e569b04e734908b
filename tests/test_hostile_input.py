"""Files from elsewhere, broken in every way: one sentence and exit code 2, no traceback, nothing written beside."""

import copy
import hashlib
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import FULL, ROW

from hf_power import cli
from hf_power.checkpoints.seal import problems, seal
from hf_power.records.files import parse_json, read_object
from hf_power.records.run import Run
from hf_power.records.schema import encode
from hf_power.settings.settings import Settings
from hf_power.sweep.run import stages_of, within_budget

SETTINGS = {
    "model": {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mup": {"base_width": 16, "preset": "paper"},
    "data": {"dataset": "/there/is/no/corpus.jsonl", "vocab_size": 400, "block_size": 32, "num_proc": 1},
    "run": {"tokens": "1M", "max_eval_tokens": 640},
    "training": {"output_dir": "OUT", "learning_rate": 0.01, "lr_scheduler_kwargs": {"a": 8.0}, "save_steps": 4},
}
GRID = SETTINGS | {
    "training": {"weight_decay": 0.1},
    "sweep": {"widths": [32], "tokens_per_step": [128], "tokens": [1280], "schedules": {"cosine": [0.01, 0.02]}},
}
RUN = {"schema": 1, "kind": "pretrain", "name": "run", "status": "finished", "lineage": "0" * 32, "tokens_seen": 1536}
RUN |= {"total_tokens": 1536, "tokens_per_step": 128, "steps": 12, "train_seconds": 2.5, "flops_per_token": 1e6}
RUN |= {"held_out_loss": 3.5, "seed": 42, "settings": {**SETTINGS, "run": {"tokens": "1M", "license": "mit"}}}
RUN |= {"schedule": {"a": 4.0, "b": -0.51, "decay_start_tokens": 9, "decay_tokens": 9, "critical_batch_tokens": None}}
RUN |= {"data": {"dataset": "user/name", "split": "train", "held_out_tokens": 640, "train_tokens": 4096}}
RUN |= {"versions": {"torch": "2"}, "hardware": {"device": "cpu", "processes": 1}}
RUN |= {"loss_curve": [{"tokens": 128, "loss": 5.0, "learning_rate": 0.01}]}
EVAL = {"schema": 1, "model": {"name": "run", "model_type": "llama"}, "metrics": {"loss": 3.5, "perplexity": 33.1}}
EVAL |= {"num_tokens": 640, "data": {"dataset": "user/name", "block_size": 32}}
EVAL |= {"tasks": {"piqa": {"acc": 0.5, "num_samples": 10}}}
MANIFEST = {
    "schema": 1,
    "files": {"a.bin": {"bytes": 3, "sha256": "0" * 64}, "sub/b": {"bytes": 1, "sha256": "f" * 64}},
}
ODD = st.sampled_from(
    [
        None,
        True,
        "",
        "x",
        "nan",
        "../../etc",
        "/etc/passwd",
        "a\nb",
        "\x1b[2J",
        -1,
        0,
        0.5,
        math.nan,
        math.inf,
        -math.inf,
        1e308,
        10**30,
        -(10**400),
        [],
        {},
        [[]],
        [1, "x"],
        {"a": {"b": [None]}},
        "x" * 5000,
        "hf_" + "A" * 30,
    ]
)


def places(content, path=()):
    """Every key and index of a nested value, as a path."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw, valid):
    """The valid value with one to three keys dropped, replaced, renamed or nested."""
    content = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent = content
        for key in path:
            parent = parent[key]
        kind = draw(st.sampled_from(["drop", "replace", "replace", "rename", "nest"]))
        if kind == "drop":
            del parent[last]
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["hiden_size", "schema", "../x", "/x", "a\nb", ""]))] = parent.pop(last)
        else:
            parent[last] = [parent[last]] if kind == "nest" else copy.deepcopy(draw(ODD))
    return content


@st.composite
def broken(draw, text):
    """The bytes of a valid file, cut, flipped, or of another kind altogether."""
    raw = text.encode()
    kind = draw(st.sampled_from(["cut", "flip", "bom", "utf-16", "binary", "deep", "twice", "insert"]))
    at = draw(st.integers(0, max(0, len(raw) - 1)))
    return {
        "cut": raw[:at],
        "flip": raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :],
        "bom": b"\xef\xbb\xbf" + raw,
        "utf-16": text.encode("utf-16"),
        "binary": draw(st.binary(max_size=60)),
        "deep": b"[" * draw(st.sampled_from([50, 5000, 50_000])),
        "twice": raw + raw,
        "insert": raw[:at]
        + draw(st.sampled_from([b"&a ", b"*a ", b"!!python/name:os.system ", b"\0", b"- "]))
        + raw[at:],
    }[kind]


def as_bytes(valid, dump):
    return st.one_of(mutated(valid).map(lambda x: dump(x).encode()), broken(dump(valid)))


def tree(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_verb(capsys, folder, argv, out=None):
    """Run a verb: exit code 0 in silence, or 2 and one sentence, nothing else, on stderr; and every file that was there is as it was, none beside `out`."""
    before = tree(folder)
    capsys.readouterr()
    code = cli.main([str(part) for part in argv])
    said = capsys.readouterr().err
    assert code in (0, 2)
    if code:
        assert re.fullmatch(rf"hf-power {argv[0]}: [^\n]{{1,2100}}[.?]\n", said), said  # one line, and nothing else
        assert not re.search(r"[.!?]\s+[A-Z][a-z]+ ", said), said
    else:
        assert not said
    after = tree(folder)
    new = {p for p in after if p not in before or after[p] != before[p]}
    assert all(out is not None and p.is_relative_to(out) for p in new), new
    return said


def json_text(value):
    return json.dumps(value)


def yaml_text(value):
    return yaml.safe_dump(value)


RECIPE = {"schema": 1, **encode(FULL)}
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 400, "intermediate_size": 80}
KINDS = {
    "recipe": (RECIPE, json_text, "recipe.json"),
    "settings": (SETTINGS, yaml_text, "run.yaml"),
    "target": (SETTINGS, yaml_text, "run.yaml"),
    "grid": (GRID, yaml_text, "grid.yaml"),
    "row": (ROW, json_text, "sweep.jsonl"),
    "run": (RUN, json_text, "run.json"),
    "run-evaluate": (RUN, json_text, "run.json"),
    "evaluation": (EVAL, json_text, "eval.json"),
    "recipe-card": (RECIPE, json_text, "recipe.json"),
}


def read_with(kind, capsys, folder, content):
    """The verb that reads a file of the kind, and stops early."""
    out, path = folder / "out", folder / KINDS[kind][2]
    card = kind in ("run", "evaluation", "recipe-card")
    if card:
        (folder / "run.json").write_text(json.dumps(RUN))
    if kind == "settings":
        content = content.replace(b"OUT", str(out).encode())
    if kind == "target":
        # Without draws of the law, the intervals of which would take half of the time of a good target's plan.
        (folder / "recipe.json").write_text(json.dumps(RECIPE | {"samples": []}))
    path.write_bytes(content)
    plan = ["plan", folder / "recipe.json", "--tokens", "1M", "--tokens_per_step", "4k"]
    argv = {
        "recipe": [*plan, "--parameters", "1M"],
        "target": [*plan, "--target", path],
        "settings": ["pretrain", path, "--output_dir", out, "--dataset", "/there/is/no/corpus.jsonl"],
        "grid": ["sweep", path, "--output_dir", out, "--dry-run"],
        "row": ["fit", path, "--output_dir", out],
        "run-evaluate": ["evaluate", folder],
    }.get(kind, ["card", folder])
    return check_verb(capsys, folder, argv, folder / "README.md" if card else out)


def without_data(grid, folder, workers):
    """In the place of `cost.estimate`: all that it does with a grid before it needs the data."""
    for group in (group for stage in within_budget(grid, stages_of(grid)) for group in stage):
        Settings.from_dict(grid.sections_at(group.width, group.tokens_per_step)).model.config()


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    monkeypatch.setattr("hf_power.sweep.cost.estimate", without_data)
    monkeypatch.setattr("hf_power.sweep.cost.estimate_text", lambda cost: "parsed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_hundreds_of_broken_files_are_one_sentence_each(kind, capsys, monkeypatch):
    """100 files of each of nine kinds."""
    monkeypatch.chdir(tempfile.mkdtemp())
    valid, dump, _ = KINDS[kind]

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(as_bytes(valid, dump))
    def every(content):
        with tempfile.TemporaryDirectory() as folder:
            read_with(kind, capsys, Path(folder), content)
        assert not list(Path.cwd().iterdir())

    every()


def test_the_files_are_good_until_they_are_broken(tmp_path, capsys):
    assert not read_with("grid", capsys, tmp_path, yaml_text(GRID).encode())
    assert not read_with("target", capsys, tmp_path, yaml_text(SETTINGS).encode())
    assert not read_with("evaluation", capsys, tmp_path, json_text(EVAL).encode())
    said = read_with("settings", capsys, tmp_path, yaml_text(SETTINGS).encode())
    assert "/there/is/no/corpus.jsonl" in said  # all that comes before the data


@pytest.mark.slow
@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(as_bytes(MANIFEST, json_text))
def test_a_manifest_is_checked_without_an_error(content):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "manifest.json").write_bytes(content)
        assert all(isinstance(phrase, str) for phrase in problems(Path(folder)))


@pytest.mark.parametrize("name", ["/etc/hostname", "../x", "a/../a.bin", "out/x", "HERE/a.bin", "a\0b"])
def test_a_manifest_does_not_leave_its_folder(tmp_path, name):
    run = tmp_path / "run"
    (run / "a").mkdir(parents=True)
    for path in (tmp_path / "x", run / "a.bin"):
        path.write_bytes(b"abc")
    (run / "out").symlink_to(tmp_path)
    name = name.replace("HERE", str(run))
    entry = {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}
    (run / "manifest.json").write_text(json.dumps({"schema": 1, "files": {"a.bin": entry, name: entry}}))
    assert problems(run) == [f"{name} lies outside of the folder"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda run: run["schedule"].pop("decay_start_tokens"), "lacks schedule.decay_start_tokens"),
        (lambda run: run.pop("tokens_seen"), "lacks tokens_seen"),
        (lambda run: run.update(tokens_per_step=0), "tokens_per_step must be a whole number or null of at least 1"),
        (lambda run: run.update(schedule=None), "was not trained under the power schedule"),
        (lambda run: run.update(settings=[]), "settings must be an object, got []"),
    ],
)
def test_anneal_from_a_broken_record(tmp_path, capsys, change, part):
    run, folder = copy.deepcopy(RUN), tmp_path / "checkpoint-4"
    change(run)
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    parts = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    for name in (*parts, "config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).touch()
    seal(folder)
    said = check_verb(capsys, tmp_path, ["anneal", "--from", folder, "--output_dir", tmp_path / "out"])
    assert part in said


def test_a_shard_beyond_its_folder_is_not_exported(tmp_path, capsys):
    config = CONFIG | {"model_type": "granite"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"")
    index = {"weight_map": {"model.norm.weight": "../x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    argv = ["export", tmp_path, "--to", "llama", "--output_dir", tmp_path / "out"]
    assert "names '../x.safetensors', which is no file beside it" in check_verb(capsys, tmp_path, argv)


@pytest.mark.slow
def test_tokens_and_host_names_are_written_nowhere(tmp_path, sections, capsys, monkeypatch):
    secrets = ["hf_" + "Secret" * 5, "hf_" + "Other" * 6, "a-host-of-ours"]
    monkeypatch.setenv("HF_TOKEN", secrets[1])
    monkeypatch.setenv("HOSTNAME", secrets[2])
    monkeypatch.setattr("socket.gethostname", lambda: secrets[2])
    monkeypatch.setattr("platform.node", lambda: secrets[2])
    folder = tmp_path / "run"
    content = sections(folder, hub_token=secrets[0])
    (tmp_path / "run.yaml").write_text(yaml_text(content))
    said = ""
    for argv in (["pretrain", tmp_path / "run.yaml"], ["evaluate", folder], ["card", folder, "--license", "mit"]):
        assert cli.main([str(part) for part in argv]) == 0
        shown = capsys.readouterr()
        said += shown.out + shown.err
    assert "held-out loss" in said
    names = {"run.json", "eval.json", "README.md"}
    texts = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert names <= {str(name) for name in texts}
    for secret in secrets:
        assert secret not in said
        assert not [name for name, text in texts.items() if secret.encode() in text]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"a: &x [1]\nb: *x", "the alias *x is not taken"),
        (b"model: {hidden_size: 1, hidden_size: 2}", "the key hidden_size is there twice"),
        (b"model: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (b"[" * 20_000 + b"]" * 20_000, "nested too deep"),
        (b"model: {hidden_size: !!bool x}", "is not YAML"),
        (b"model: {hidden_size: .nan}", "hidden_size must be int, got nan"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_yaml_that_is_refused(tmp_path, capsys, text, part):
    (tmp_path / "a.yaml").write_bytes(text)
    assert cli.main(["pretrain", str(tmp_path / "a.yaml")]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra", [{"hidden_act": "nope"}, {"rope_parameters": {"rope_type": "nope"}}, {"vocab_size": -5}, {"head_dim": -4}]
)
def test_a_config_that_only_the_model_refuses(tmp_path, capsys, extra):
    model = SETTINGS["model"] | {"model_config": extra}
    (tmp_path / "a.yaml").write_text(yaml_text(SETTINGS | {"model": model}))
    argv = ["pretrain", tmp_path / "a.yaml", "--output_dir", tmp_path / "out"]
    assert "the model's config cannot be used: " in check_verb(capsys, tmp_path, argv)


def test_a_folder_or_a_loop_of_links_for_a_file(tmp_path, capsys):
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "recipe.json").mkdir()
    for path in (tmp_path, tmp_path / "loop.json"):
        check_verb(capsys, tmp_path, ["plan", path, "--tokens", "1", "--tokens_per_step", "1", "--parameters", "1"])
        check_verb(capsys, tmp_path, ["pretrain", path])
        check_verb(capsys, tmp_path, ["fit", path])
        check_verb(capsys, tmp_path, ["card", path])


def test_what_json_must_be(tmp_path):
    with pytest.raises(ValueError, match="the key 'a' is there twice"):
        parse_json(b'{"a": 1, "a": 2}', "x.json", "mend it")
    (tmp_path / "run.json").write_text(json.dumps(RUN | {"tokens_seen": -5}))
    with pytest.raises(ValueError, match=r"run\.json: tokens_seen must be .* of at least 0, got -5: take"):
        Run.load(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in RUN.items() if k != "data"}))
    with pytest.raises(ValueError, match=r"run\.json lacks data\.held_out_tokens"):
        Run.load(tmp_path, required=("data.held_out_tokens",))
    with pytest.raises(ValueError, match="schema 2, got 1"):
        read_object(tmp_path / "run.json", schema=2)
