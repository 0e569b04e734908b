"""The card says what the files say, all of it and nothing else, whatever the files hold."""

import copy
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from sentences import refused
from transformers import MixtralConfig

from hf_power import Recipe, cli, mup_config
from hf_power.checkpoints.locate import weights_sha256
from hf_power.export.export import export_model
from hf_power.pretrain import run as train
from hf_power.publish.card import make_card, write_card
from hf_power.records.files import write_json
from hf_power.settings.settings import Settings

pytest.importorskip("jinja2")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

METRICS = {"loss": 5.794920276826428, "perplexity": 328.6259838312364, "bits_per_byte": 4.2004762, "accuracy": 0.0242}
EVAL = {"schema": 1, "model": {"name": "annealed", "model_type": "granite", "parameters": 36512}, "metrics": METRICS}
EVAL |= {"num_tokens": 620, "num_bytes": 1234}
EVAL |= {
    "data": {
        "dataset": "corpus.jsonl",
        "split": "train",
        "eval_fraction": 0.05,
        "fingerprint": "209430601e2532e9",
        "tokenizer": "e55d233fdaa25646",
        "block_size": 32,
    }
}
EVAL |= {"dtype": "float32", "batch_size": 8, "processes": 1, "versions": {"hf_power": "0.1.0", "evaluate": "0.4.6"}}
EVAL |= {"hardware": {"device": "cpu", "device_name": "x86_64", "processes": 1, "cpu_cores": 2}, "seconds": 0.017}
EVAL |= {
    "tasks": {
        "arc_easy": {"acc,none": 0.25125, "acc_stderr,none": 0.0125, "num_samples": 2376},
        "wikitext": {"word_perplexity,none": 1234.56, "num_samples": 62},
    }
}
RECIPE = Recipe(
    a=2.0,
    b=-0.5,
    batch_exponent=0.7,
    critical_batch_tokens=8192.0,
    max_lr=0.01,
    model_type="llama",
    base_width=16,
    laws={"warmup_stable_decay": {"a": 2.3, "b": -0.5, "batch_exponent": 0.7, "critical_batch_tokens": 8192.0}},
    intervals={"a": [1.7, 2.31], "b": [-0.55, -0.45], "batch_exponent": [0.6, 0.81], "critical_batch_tokens": None},
    samples=[[2.0, -0.5, 0.7, None, 0.0, 0.0], [2.1, -0.51, 0.7, None, 0.0, 0.0]],
    validity={
        "widths": [16],
        "tokens_per_step": [128, 1024],
        "tokens": [512, 1024],
        "extrapolates_to": {"tokens": 8192, "tokens_per_step": 2048, "sd_octaves": 0.25},
    },
    provenance={"scale": "measured on the power rows", "proxies": {"tokens": 26163200, "flops": 6912108134400.0}},
)
EXEMPT = {"4096", "95", "2408.13359", "2024"}  # beta's unit, the intervals' level, the paper


@pytest.fixture
def annealed(runs, tmp_path):
    """The annealed run with an evaluation and a recipe."""
    shutil.copytree(runs / "annealed", tmp_path / "annealed", ignore=shutil.ignore_patterns("checkpoint-*"))
    run = read(tmp_path / "annealed" / "run.json")
    del run["settings"]["run"]["license"]
    write_json(tmp_path / "annealed" / "run.json", run)
    digest = {"weights_sha256": weights_sha256(tmp_path / "annealed")}
    write_json(tmp_path / "annealed" / "eval.json", {**EVAL, "model": {**EVAL["model"], **digest}})
    RECIPE.save(tmp_path / "annealed" / "recipe.json")
    return tmp_path / "annealed"


@pytest.fixture
def exported(annealed):
    """The annealed run as a plain Llama; it takes run.json and recipe.json along."""
    export_model(annealed, annealed.with_name("annealed-llama"), "llama")
    return annealed.with_name("annealed-llama")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change(path, **keys):
    write_json(path, read(path) | keys)


def card(folder, **options):
    return str(make_card(folder, **{"license": "apache-2.0", **options}))


def header(text):
    return yaml.load(text.split("---\n")[1], Loader=yaml.CSafeLoader)


def prose(text):
    """The card without its header, its code and its citation."""
    return re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def numbers_in(content):
    if isinstance(content, dict):
        return {n for key, value in content.items() if key != "loss_curve" for n in numbers_in(value)}
    if isinstance(content, list):
        return {n for value in content for n in numbers_in(value)}
    return {content} if isinstance(content, int | float) and not isinstance(content, bool) else set()


def texts_in(content):
    if isinstance(content, dict):
        return {text for key, value in content.items() for text in {key} | texts_in(value)}
    if isinstance(content, list):
        return {text for value in content for text in texts_in(value)}
    return {content} if isinstance(content, str) else set()


def derived(files):
    """The quantities that make_card documents, by the formulas that it documents."""
    run, recipe = files.get("run.json", {}), files.get("recipe.json", {})
    found = set()
    if run:
        seen, weights = run["tokens_seen"], run["parameters"]
        found |= {run["tokens_per_step"] / 4096, math.exp(run["held_out_loss"]), run["flops_per_token"] * seen}
        found |= {seen / run["train_seconds"], seen / weights, seen / run["data"]["train_tokens"]}
        if recipe:
            validity = recipe["validity"]
            factors = {seen / validity["tokens"][1], files["config.json"]["hidden_size"] / validity["widths"][0]}
            found |= {float(f"{factor:.3g}") for factor in factors}
            found.add(recipe["critical_batch_tokens"] / 4096)
    return found


def unexplained(text, folder):
    """Numbers in the prose that are neither in a JSON file of the folder nor derived."""
    files = {path.name: read(path) for path in folder.glob("*.json") if not path.name.startswith("tokenizer")}
    body = prose(text).replace("`apache-2.0`", "")
    for known in sorted(texts_in(files) | {folder.name}, key=len, reverse=True):
        if re.search("[0-9]", known):
            body = body.replace(f"`{known}`", "")
            body = body.replace(known, "") if re.search("[a-zA-Z]", known) else body
    known = numbers_in(files) | derived(files)
    printable = {float(f"{n:.4g}") for n in known} | {float(n) for n in known} | {float(round(n)) for n in known}
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", body)
    return [x for x in found if x not in EXEMPT and float(x.rstrip(",").replace(",", "")) not in printable]


def assert_clean(text):
    """It parses, and nothing in it stands for something that is not known."""
    ModelCardData(**header(text))
    for mark in ("None", "nan", "NaN", "inf,", "null", "Undefined", "More Information", "{}", "TODO", "[]"):
        assert mark not in prose(text), mark
    for line in prose(text).replace("|  |", "| |").replace("|  |", "| |").splitlines():
        assert not line.startswith("|") or line.endswith("|"), line
        assert not re.search(r"``|\S  | [.,]", line), line
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        assert body.strip(), title


@pytest.mark.slow
def test_header_survives_a_round_trip(annealed):
    path = write_card(annealed, license="apache-2.0", repo_id="user/model")
    loaded = ModelCard.load(path)
    assert path.read_text(encoding="utf-8") == str(loaded)
    data = loaded.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert data.tags == ["hf_power", "power-scheduler", "mup", "granite"]
    assert data.model_name == "model"
    assert data.to_dict() == ModelCardData(**header(str(loaded))).to_dict()
    assert {"datasets", "language", "base_model"}.isdisjoint(data.to_dict())
    assert [p.name for p in annealed.glob(".*")] == []


def test_model_index_holds_the_values_of_eval_json(annealed):
    results = ModelCardData(**header(card(annealed))).eval_results
    held_out = {r.metric_type: r.metric_value for r in results if r.dataset_type == "local"}
    assert held_out == METRICS
    assert {r.dataset_name for r in results if r.dataset_type == "local"} == {"a local dataset, held-out part"}
    tasks = {(r.dataset_type, r.metric_type): r.metric_value for r in results if r.dataset_type != "local"}
    assert tasks == {("arc_easy", "acc"): 0.25125, ("wikitext", "word_perplexity"): 1234.56}


def test_without_an_evaluation_the_results_are_those_of_the_run(annealed):
    (annealed / "eval.json").unlink()
    loss = read(annealed / "run.json")["held_out_loss"]
    results = ModelCardData(**header(card(annealed))).eval_results
    assert {r.metric_type: r.metric_value for r in results} == {"loss": loss, "perplexity": math.exp(loss)}
    assert f"{loss:.4g}" in section(card(annealed), "Results")
    assert re.search(
        rf"\*\*{loss:.4g} nats per token\*\*, on [\d,]+ tokens .*, held out of its training", card(annealed)
    )


def test_without_any_loss_the_first_screen_says_so(runs):
    text = card(runs / "trunk" / "checkpoint-8").split("\n| what |")[0]
    assert "Its loss on held-out text is not known: it was not evaluated." in text


def test_an_evaluation_of_other_weights_is_left_out(annealed, runs):
    assert "bits per byte" in card(annealed)
    shutil.copy(runs / "trunk" / "model.safetensors", annealed)
    assert "bits per byte" not in card(annealed)


@pytest.mark.parametrize("kind", ["annealed", "exported"])
def test_python_block_runs_as_it_stands(kind, request, monkeypatch, capsys):
    folder = request.getfixturevalue(kind)
    (code,) = re.findall(r"```python\n(.*?)```", card(folder), flags=re.DOTALL)
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(code, names)
    assert len(capsys.readouterr().out) > len("The first")
    assert type(names["model"]).__name__ == {"annealed": "Granite", "exported": "Llama"}[kind] + "ForCausalLM"


@pytest.mark.slow
def test_trunk_tells_how_to_anneal_it_and_that_works(runs, tmp_path, monkeypatch):
    text = card(runs / "trunk", repo_id="user/trunk", branch="trunk-1.024k-tokens")
    (commands,) = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    download, anneal = commands.splitlines()
    assert download == 'hf download "user/trunk" --revision "trunk-1.024k-tokens" --local-dir checkpoint'
    shutil.copytree(runs / "trunk" / "checkpoint-8", tmp_path / "checkpoint")  # what the first line would have fetched
    monkeypatch.chdir(tmp_path)
    assert cli.main(anneal.split()[1:]) == 0
    assert (tmp_path / "annealed" / "model.safetensors").exists()
    assert "not been decayed" in text
    assert "--dataset" in text
    branch = card(runs / "trunk" / "checkpoint-8", repo_id="user/trunk", branch="trunk-1.024k-tokens")
    assert 'from_pretrained("user/trunk", revision="trunk-1.024k-tokens")' in branch
    assert "was planned for 1,536 tokens; these weights have seen 1,024" in branch


@pytest.mark.parametrize("kind", ["annealed", "exported", "trunk"])
def test_every_number_is_in_a_file(kind, request, runs):
    folder = runs / "trunk" if kind == "trunk" else request.getfixturevalue(kind)
    text = card(folder)
    assert unexplained(text, folder) == []
    assert unexplained(text + "\nIt has 777 layers, 12.5 heads.", folder) == ["777", "12.5"]
    assert_clean(text)


def test_the_demo_s_card_is_of_the_files_beside_it():
    folder = Path(__file__).parents[2] / "model_cards" / "demo"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert unexplained(text, folder) == []
    assert_clean(text)
    evaluation = read(folder / "eval.json")
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [
        evaluation["metrics"][name] for name in ("loss", "perplexity", "bits_per_byte", "accuracy")
    ]


def test_what_an_annealed_card_says(annealed):
    text = card(annealed)
    screen, evaluation = text.split("\n| what |")[0], read(annealed / "eval.json")
    assert f"Held-out loss: **{evaluation['metrics']['loss']:.4g} nats per token**, on" in screen
    assert f"{evaluation['num_tokens']:,} tokens of " in screen
    assert "from the trunk's checkpoint `trunk/checkpoint-8`" in text
    assert "`eta(n) = min(max_lr, a * beta^c * n^b) = min(0.01, 2 * 0.03125^0.7 * n^-0.5)`" in text
    assert "| `hidden` | 23,552 | 0.005 | 0.2 | 5e-09 |" in section(text, "muP")
    assert "lr_and_loss.png" in text
    assert "| `a` | 2 | 1.7 to 2.31 |" in section(text, "Recipe")
    assert "2,048 tokens are 2 times the largest, 1,024, of the sweep, within the 8,192" in section(text, "Recipe")
    assert "the width 32 is 2 times the largest, 16, of the sweep" in section(text, "Recipe")
    assert "It lies outside" in section(text, "Limits")
    assert "| `arc_easy` | `acc,none` | 0.2512 | 2,376 |" in section(text, "Results")
    assert "| FLOPs of the recipe's proxies | 6.912e+12 |" in section(text, "Hardware and cost")
    assert "2408.13359" in section(text, "Citation")


def test_a_run_within_its_recipe_says_so(annealed):
    recipe = read(annealed / "recipe.json")
    recipe["validity"] |= {"widths": [16, 32], "tokens": [512, 4096]}
    write_json(annealed / "recipe.json", recipe)
    assert "This model lies within it." in card(annealed)
    assert "outside" not in card(annealed)


def test_what_an_exported_card_says(exported):
    text = card(exported)
    assert "muP's multipliers are folded into the weights" in text
    difference = read(exported / "export.json")["proof"]["max_relative_difference"]
    assert f"| largest relative difference of the logits | {difference:.4g} |" in section(text, "Export")
    assert "llama" in header(text)["tags"]
    assert "base_model" not in header(text)
    change(exported / "export.json", source={"name": "user/annealed"})
    assert header(card(exported))["base_model"] == "user/annealed"
    for name in ("run.json", "recipe.json"):
        (exported / name).unlink()
    alone = card(exported)
    assert_clean(alone)
    assert "How the weights were trained is not recorded" in alone
    assert unexplained(alone, exported) == ["36,512", "23,712"]  # counted from config.json


def test_a_recipe_is_named_as_missing(annealed):
    (annealed / "recipe.json").unlink()
    assert "`a`, `b`, `batch_exponent`, `max_lr` were set by hand" in section(card(annealed), "Recipe")
    run = read(annealed / "run.json")
    run["schedule"] |= {"a": 4.0, "b": -0.51, "batch_exponent": 1.0, "max_lr": 0.02}
    write_json(annealed / "run.json", run)
    assert "the schedule's numbers are the paper's, not fitted here" in section(card(annealed), "Recipe")


def test_a_recipe_without_a_sweep_claims_none(annealed):
    assert "Found by a sweep" in section(card(annealed), "Recipe")
    Recipe().save(annealed / "recipe.json")
    assert "Not fitted here: the recipe names no sweep" in section(card(annealed), "Recipe")
    assert "was not tuned on these data" in section(card(annealed), "Limits")


def test_a_mixture_of_experts_has_active_parameters(annealed):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "vocab_size": 100, "num_key_value_heads": 2}
    mup_config(MixtralConfig(**shape, **experts), base_width=16).save_pretrained(annealed)
    expert = 3 * 32 * 64
    rest = 2 * (4 * 32 * 32 + 4 * 32 + 2 * 32) + 32 + 2 * 100 * 32  # attention, router, norms; last norm; embeddings
    text = card(annealed)
    assert f"| parameters | {2 * 4 * expert + rest:,} |" in text
    assert f"| active parameters per token | {2 * expert + rest:,} |" in text
    assert f"{2048 / (2 * expert + rest):.4g} tokens per active parameter" in text
    assert {"moe", "granitemoe", "mup"} <= set(header(text)["tags"])


@pytest.mark.slow
def test_another_schedule_is_named_with_its_peak(sections, tmp_path):
    options = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": None, "save_strategy": "no"}
    train.pretrain(Settings.from_dict(sections(tmp_path / "cosine", tokens=4 * 128, **options)))
    text = card(tmp_path / "cosine")
    assert "`cosine` of transformers, with a peak learning rate of 0.01" in section(text, "Schedule")
    assert "power-scheduler" not in header(text)["tags"]
    assert "trunk" not in text
    assert unexplained(text, tmp_path / "cosine") == []
    assert_clean(text)


def test_stages_of_the_decay(annealed):
    change(annealed / "run.json", kind="pretrain", parent=None)
    assert "It is **decayed**: its learning rate was decayed from 1,024 tokens on." in card(annealed)
    change(annealed / "run.json", tokens_seen=1536, weights_tokens=1536)
    assert "It is being decayed: its learning rate decays from 1,024 tokens on." in card(annealed)
    change(annealed / "run.json", tokens_seen=1024, weights_tokens=1024)
    assert "It is a **trunk**" in card(annealed)


def test_the_card_is_a_function_of_the_files(annealed, tmp_path, monkeypatch):
    first = card(annealed)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setattr("time.time", lambda: 0.0)
    for name in ("run.json", "eval.json"):
        os.utime(annealed / name, (0, 0))
    assert card(annealed) == first
    assert card(Path(os.path.relpath(annealed))) == first


@pytest.mark.slow
def test_missing_files_leave_no_trace(annealed):
    for name in ("eval.json", "recipe.json", "config.json", "lr_and_loss.png", "tokenizer_config.json"):
        (annealed / name).unlink()
        assert_clean(card(annealed))
    (annealed / "model.safetensors").unlink()
    assert "How to load it" not in card(annealed)
    write_json(annealed / "run.json", {"schema": 1, "kind": "pretrain"})
    assert_clean(card(annealed))
    assert re.findall("\n## (.*)", card(annealed)) == ["Limits", "Licence", "Citation"]
    change(annealed / "run.json", data={"local": True}, hardware={"cpu_cores": 2}, versions={})
    assert_clean(card(annealed))


def keys_of(content, path=()):
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*path, key))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("annealed", name) for name in ("run.json", "eval.json", "config.json")),
        *(("exported", name) for name in ("run.json", "export.json", "config.json")),
    ],
)
def test_missing_facts_leave_no_trace(kind, name, request):
    folder = request.getfixturevalue(kind)
    whole = read(folder / name)
    for path in keys_of(whole):
        if path[0] in ("schema", "source_config") or "loss_curve" in path:
            continue
        for missing in ("gone", None, math.nan):
            content = copy.deepcopy(whole)
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            if missing == "gone":
                del parent[path[-1]]
            elif isinstance(parent[path[-1]], int | float):
                parent[path[-1]] = missing
            else:
                continue
            if name == "config.json" and missing != "gone":
                continue  # a stock loader refuses those
            write_json(folder / name, content)
            text = card(folder)
            assert_clean(text)
            assert text.rstrip().endswith("```"), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "dataset", ["/data/secret/x.jsonl", "C:\\secret\\x", "./secret.jsonl", "~/secret", "secret.parquet"]
)
def test_private_texts_stay_out(annealed, dataset):
    token, host = "hf_" + "AbCdEfGhIj" * 3, "node17.secret.example"
    run = read(annealed / "run.json")
    run |= {"parent": "/home/secret/trunk/checkpoint-8", "host": host, "hub_token": token}
    run["data"] |= {"dataset": dataset, "cache": "/secret/cache"}
    run["settings"]["data"] |= {"dataset": dataset, "dataset_config": token}
    run["settings"]["training"] |= {"hub_token": token, "output_dir": "/secret/out"}
    run["hardware"] |= {"host": host, "device_name": "/secret/device"}
    run["versions"] |= {"transformers": "/secret/src/transformers"}
    write_json(annealed / "run.json", run)
    recipe = read(annealed / "recipe.json")
    recipe["provenance"] |= {"host": host, "token": token, "scale": f"read from /secret/x by {token}"}
    write_json(annealed / "recipe.json", recipe)
    change(annealed / "eval.json", data=EVAL["data"] | {"dataset": dataset, "config_name": "/secret", "split": token})
    text = card(annealed)
    for private in ("secret", token, host, "/home", str(annealed.parent)):
        assert private not in text
    assert "| dataset | a local dataset |" in text
    assert run["data"]["fingerprint"] in text
    assert_clean(text)


def test_datasets_of_the_hub_are_linked(annealed):
    run = read(annealed / "run.json")
    run["data"] |= {"dataset": "user/texts", "local": False}
    write_json(annealed / "run.json", run)
    change(annealed / "eval.json", data=EVAL["data"] | {"dataset": "user/texts", "config_name": "en"})
    text = card(annealed)
    assert header(text)["datasets"] == ["user/texts"]
    assert header(text)["model-index"][0]["results"][0]["dataset"]["config"] == "en"
    assert "| dataset | [`user/texts`](https://huggingface.co/datasets/user/texts) |" in text
    run["data"] |= {"local": True}  # a folder of that name
    write_json(annealed / "run.json", run)
    change(annealed / "eval.json", data=EVAL["data"] | {"dataset": "texts"})
    assert "user/texts" not in card(annealed)
    assert "texts" not in header(card(annealed))["model-index"][0]["results"][0]["dataset"]["name"]
    run["data"] |= {"dataset": "python-stdlib", "local": False}
    write_json(annealed / "run.json", run)
    assert "datasets" not in header(card(annealed))
    assert "the sources of Python's standard library" in card(annealed)


HOSTILE = "a|b `c` <script>\n---\n# x {{ 7 - 70 }} \x00 'q': y ```"


def test_hostile_texts_change_neither_table_nor_header(annealed):
    folder = annealed.with_name("x|y `z` #1 {{ 7 - 70 }}\n---")
    annealed.rename(folder)
    run = read(folder / "run.json")
    run |= {"name": HOSTILE, "parent": HOSTILE}
    run["data"] |= {"fingerprint": HOSTILE, "dataset": HOSTILE}
    run["hardware"]["device_name"] = HOSTILE
    run["groups"][0]["name"] = HOSTILE
    run["versions"] = {HOSTILE: HOSTILE}
    write_json(folder / "run.json", run)
    tasks = {HOSTILE: {HOSTILE: 0.5, "num_samples": 3}}
    change(folder / "eval.json", tasks=tasks, data=EVAL["data"] | {"dataset": HOSTILE, "split": HOSTILE})
    text = card(folder)
    assert_clean(text)
    assert ModelCardData(**header(text)).to_dict() == make_card(folder, license="apache-2.0").data.to_dict()
    assert "-63" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    tables = "\n".join(rows).split("|---|")
    assert len(tables) > 6
    for line in rows:
        assert line.count("|") in (3, 4, 5, 6)
        assert line.count("`") % 2 == 0
    assert re.findall("\n## (.*)", text) == re.findall("\n## (.*)", text.replace("script", ""))
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", prose(text))


def test_licence_comes_from_the_settings_or_is_asked_for(annealed):
    with refused(ValueError, "licence", "--license", "run.license", "apache-2.0"):
        make_card(annealed)
    with refused(ValueError, "license", "Apache 2.0"):
        make_card(annealed, license="Apache 2.0\nx: y")
    run = read(annealed / "run.json")
    run["settings"]["run"]["license"] = "mit"
    write_json(annealed / "run.json", run)
    assert make_card(annealed).data.license == "mit"
    assert make_card(annealed, license="apache-2.0").data.license == "apache-2.0"


def test_what_is_no_run_is_refused(annealed, tmp_path):
    with refused(FileNotFoundError, "there is no folder", "nowhere"):
        card(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused(ValueError, "is no run", "run.json", "export.json"):
        card(tmp_path / "empty")
    for name in ("run.json", "eval.json", "recipe.json"):
        whole = (annealed / name).read_text()
        for content, part in (("{", "is not JSON"), ('{"schema": 2}', "schema 1"), ("[1]", "schema 1")):
            (annealed / name).write_text(content)
            with refused(ValueError, name, part):
                card(annealed)
        (annealed / name).write_text(whole)
    assert not (annealed / "README.md").exists()
