"""A mixture of experts through every verb: pretrain, anneal, sweep, fit, plan, export, evaluate, card."""

import json
import math

import pytest
import yaml
from sentences import refused

from hf_power.cli import main
from hf_power.pretrain import run as train
from hf_power.pretrain.record import MEASURES
from hf_power.records.rows import load_rows
from hf_power.settings.settings import Settings

pytestmark = pytest.mark.slow

LAYERS, EXPERTS, TOP_K, VOCABULARY = 2, 4, 2, 400
AUX_LOSS_COEF = 0.01
WIDTH, EXPERT = 32, 16  # of the proxies; the target is twice as wide
BATCH = 128
WARMUP = 1024


def expected_parameters(width, expert):
    """Hand-counted: all, those that a token passes, and those of the routers; embedding and head are tied."""
    attention, one_expert, router = 4 * width * width, 3 * width * expert, EXPERTS * width
    norms, embedding = (2 * LAYERS + 1) * width, VOCABULARY * width
    whole = embedding + norms + LAYERS * (attention + router + EXPERTS * one_expert)
    return whole, whole - LAYERS * (EXPERTS - TOP_K) * one_expert, LAYERS * router


def verb(*argv):
    assert main([str(part) for part in argv]) == 0


def content(path):
    return json.loads(path.read_text())


def curve(run):
    return [point for point in run["loss_curve"] if "loss" in point]


@pytest.fixture(scope="module")
def flow(sections, tmp_path_factory):
    """The folder of one pass through the verbs: run, tail, sweep, plan, target, and the exports of tail and target."""
    folder = tmp_path_factory.mktemp("moe")
    base = sections(folder / "run", use_cpu=True, save_steps=40)
    balanced = {"output_router_logits": True, "router_aux_loss_coef": AUX_LOSS_COEF}
    base["model"] |= {"model_type": "mixtral", "intermediate_size": EXPERT, "num_local_experts": EXPERTS}
    base["model"] |= {"num_experts_per_tok": TOP_K, "model_config": balanced}
    base["mup"] |= {"preset": "power_of_two"}
    base["run"] = {"max_eval_tokens": 2560, "license": "mit"}
    (folder / "moe.yaml").write_text(yaml.safe_dump(base))
    verb("pretrain", folder / "moe.yaml", "--tokens", 80 * BATCH)
    verb("anneal", "--from", folder / "run/checkpoint-40", "--tokens", 10 * BATCH, "--output_dir", folder / "tail")

    grid = {key: base[key] for key in ("model", "data", "run")} | {"training": {"weight_decay": 0.1, "use_cpu": True}}
    grid["mup"] = {"base_width": WIDTH, "preset": "power_of_two"}
    grid["sweep"] = {"widths": [WIDTH], "tokens_per_step": [BATCH], "tokens": [64 * BATCH, 128 * BATCH, 256 * BATCH]}
    grid["sweep"] |= {"schedules": {"warmup_stable_decay": [0.01, 0.02, 0.04]}, "warmup_tokens": WARMUP}
    grid["sweep"] |= {"decay_ratio": 0.25}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(grid))
    verb("sweep", folder / "sweep.yaml", "--output_dir", folder / "sweep", "--workers", 1)
    verb("fit", folder / "sweep", "--batch_exponent", 1)

    target = {"model": base["model"] | {"hidden_size": 2 * WIDTH, "intermediate_size": 2 * EXPERT}}
    target["model"]["num_attention_heads"] = 4
    target |= {"data": base["data"], "run": base["run"]}
    target["training"] = {"per_device_train_batch_size": 4, "logging_steps": 8, "save_strategy": "no", "use_cpu": True}
    (folder / "target.yaml").write_text(yaml.safe_dump(target))
    recipe, length = folder / "sweep/recipe.json", ["--tokens", 160 * BATCH]
    cell = [*length, "--tokens_per_step", BATCH, "--output_dir", folder / "plan"]
    verb("plan", recipe, "--target", folder / "target.yaml", *cell)
    verb("pretrain", folder / "target.yaml", "--recipe", recipe, *length, "--output_dir", folder / "target")

    for name in ("tail", "target"):
        verb("export", folder / name, "--to", "mixtral")
        for model in (name, f"{name}-mixtral"):
            verb("evaluate", folder / model)
            verb("card", folder / model)
    return folder


def test_router_is_a_group(flow):
    run = content(flow / "run/run.json")
    whole, _, routers = expected_parameters(WIDTH, EXPERT)
    assert run["parameters"] == whole
    groups = {group["name"]: group for group in run["groups"]}
    assert groups["router"]["parameters"] == routers
    assert groups["hidden"]["parameters"] == whole - routers - (VOCABULARY + 2 * LAYERS + 1) * WIDTH
    for name in ("hidden", "router"):  # twice as wide as base_width
        assert (groups[name]["base_lr"], groups[name]["weight_decay"]) == (0.01 / 2, 0.1 * 2)
    assert groups["embedding"]["base_lr"] == groups["vector"]["base_lr"] == 0.01


def test_curve_has_the_load_and_the_tail_goes_on(flow):
    run, tail = content(flow / "run/run.json"), content(flow / "tail/run.json")
    for point in curve(run) + curve(tail):
        assert set(MEASURES) < set(point)
        assert 0 <= point["load_min"] <= 1 <= point["load_max"] <= EXPERTS / TOP_K
        assert 0 <= point["idle_experts"] <= LAYERS * (EXPERTS - TOP_K)
        assert 0 < point["router_entropy_nats"] <= math.log(EXPERTS) + 1e-6
        assert point["aux_loss"] == pytest.approx(TOP_K, rel=0.2)  # even loads, more or less
    assert curve(tail)[:40] == curve(run)[:40]
    assert len(curve(tail)) == 50
    assert curve(tail)[-1]["learning_rate"] < curve(tail)[39]["learning_rate"] / 3


def test_rows_of_the_sweep(flow):
    rows, problems = load_rows(flow / "sweep/sweep.jsonl")
    assert problems == []
    assert {(row.model_type, row.status, row.width) for row in rows} == {("mixtral", "finished", WIDTH)}
    assert {row.parameters for row in rows} == {expected_parameters(WIDTH, EXPERT)[0]}
    assert {row.loss < math.log(VOCABULARY) for row in rows} == {True}


def test_recipe_is_for_mixtures_and_the_target_follows_it(flow):
    recipe, run = content(flow / "sweep/recipe.json"), content(flow / "target/run.json")
    assert recipe["model_type"] == "mixtral"
    stable = [point for point in curve(run) if WARMUP < point["tokens"] <= 120 * BATCH]
    assert len(stable) == 14
    for point in stable:  # the rate of the step that was taken
        law = recipe["a"] * BATCH / 4096 * (point["tokens"] - BATCH) ** recipe["b"]
        assert point["learning_rate"] == pytest.approx(min(recipe["max_lr"], law), rel=1e-9)
    router = next(group for group in run["groups"] if group["name"] == "router")
    assert router["base_lr"] == recipe["max_lr"] / 2
    assert (flow / "target/recipe.json").read_bytes() == (flow / "sweep/recipe.json").read_bytes()
    dense = yaml.safe_load((flow / "target.yaml").read_text())
    dense["model"] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    dense["run"] |= {"tokens": "4k", "recipe": str(flow / "sweep/recipe.json")}
    dense["training"]["output_dir"] = str(flow / "dense")
    with refused(ValueError, "model_type", "mixtral", "llama"):
        train.pretrain(Settings.from_dict(dense))


@pytest.mark.parametrize("name", ["tail", "target"])
def test_card_names_the_experts_and_the_evaluation(flow, name):
    run = content(flow / name / "run.json")
    whole, active, _ = expected_parameters(*((WIDTH, EXPERT) if name == "tail" else (2 * WIDTH, 2 * EXPERT)))
    for model, kind in ((name, "GraniteMoe"), (f"{name}-mixtral", "Mixtral")):
        loss, text = content(flow / model / "eval.json")["metrics"]["loss"], (flow / model / "README.md").read_text()
        assert loss == pytest.approx(run["held_out_loss"], abs=1e-5)  # neither has the balancing loss in it
        assert f"| loss (nats per token) | {loss:.4g} |" in text
        assert f"      value: {loss!r}\n" in text
        assert f"| architecture | `{kind}ForCausalLM` |" in text
        assert f"| parameters | {whole:,} |" in text
        assert f"| active parameters per token | {active:,} |" in text
        assert f"| experts | {EXPERTS} |" in text
        assert f"| experts per token | {TOP_K} |" in text
        assert "- moe\n" in text


def test_row_is_the_held_out_loss_of_pretraining(flow):
    """Of the text alone: the balancing loss, .02 here, belongs to the training."""
    row = next(row for row in load_rows(flow / "sweep/sweep.jsonl")[0] if row.tokens == 64 * BATCH)
    row.settings["training"] |= {"output_dir": str(flow / "twin"), "save_strategy": "no"}
    run = train.pretrain(Settings.from_dict(row.settings)).to_json()
    assert run["held_out_loss"] == pytest.approx(row.loss, abs=1e-4)
