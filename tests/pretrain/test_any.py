"""A Qwen3 of model_type any from its first step to the Hub: as the Trainer of a script of one's own, resumed, annealed, loaded."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from sentences import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_power
from hf_power.data.text import DataArguments
from hf_power.evaluate.heldout import data_of_run, evaluate_model
from hf_power.export.export import export_model
from hf_power.pretrain import run as train
from hf_power.pretrain.anneal import anneal
from hf_power.publish.card import make_card
from hf_power.publish.push import publish
from hf_power.records.errors import UserError
from hf_power.settings.settings import Settings, build_model

QWEN3 = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16}
QWEN3 |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
TRUNK = {"lr_scheduler_kwargs": {"a": 8.0, "decay_ratio": 0.0}}


@pytest.fixture(scope="module")
def any_sections(sections):
    def build(folder, config=None, **training):
        made = sections(folder, **training)
        made["model"] = {"model_type": "any", "model_config": config or QWEN3}
        made["mup"] = made["mup"] | {"embedding_multiplier": 4.0}
        return made

    return build


@pytest.fixture(scope="module")
def trunk(any_sections, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "trunk"
    train.pretrain(Settings.from_dict(any_sections(folder, **TRUNK)))
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_resumed_run_is_the_run(trunk, any_sections, tmp_path):
    half = tmp_path / "trunk"
    shutil.copytree(trunk, half, ignore=shutil.ignore_patterns("checkpoint-12"))
    (half / "model.safetensors").unlink()
    (half / "run.json").write_text((half / "checkpoint-8" / "run.json").read_text())
    train.pretrain(Settings.from_dict(any_sections(half, resume_from_checkpoint="true", **TRUNK)))
    assert same(weights(half), weights(trunk))
    other = any_sections(half, QWEN3 | {"intermediate_size": 96}, resume_from_checkpoint="true", **TRUNK)
    with refused(UserError, "model_config is", "leave it as it was"):
        train.pretrain(Settings.from_dict(other | {"run": other["run"] | {"tokens": 2048}}))


@pytest.mark.slow
def test_annealed_scored_told_published_and_loaded_again(trunk, tmp_path, hub):
    tail = anneal(trunk / "checkpoint-8", "20%", str(tmp_path / "tail"))
    folder = tmp_path / "tail"
    assert tail.flops_per_token == pytest.approx(
        6 * (2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 80) + 400 * 32 + 2 * 32 * 32)
    )
    data, _ = data_of_run(folder)
    scored = evaluate_model(folder, DataArguments(**data), max_tokens=320)
    assert scored.metrics["loss"] == pytest.approx(tail.held_out_loss, abs=0.5)
    card = str(make_card(folder, license="mit"))
    for part in (
        "`Qwen3ForCausalLM`",
        "with muP",
        "multipliers are folded into the weights",
        "| base width | 16 |",
        "| embedding multiplier | 4",
        "- mup",
    ):
        assert part in card
    with refused(UserError, "it is a stock qwen3 already, so there is nothing to export"):
        export_model(folder, tmp_path / "out", "llama")
    publish(folder, "tester/qwen3", license="mit")
    model = AutoModelForCausalLM.from_pretrained("tester/qwen3")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert same({n: p for n, p in model.state_dict().items() if n in weights(folder)}, weights(folder))
    assert len(AutoTokenizer.from_pretrained("tester/qwen3")) == 400
    # How it was made travels with it, and whoever trains it on gets muP's groups.
    groups = hf_power.mup_param_groups(model, lr=0.01)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx({g.name: g.base_lr for g in tail.groups})


def test_standard_parameterization_is_the_stock_init(any_sections, tmp_path, trunk):
    made = any_sections(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(trunk)
    torch.manual_seed(0)
    model = build_model(Settings.from_dict(made | {"mup": {"mup": False}}), tokenizer)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(model.config)
    assert same(dict(model.named_parameters()), dict(stock.named_parameters()))
    assert not hasattr(model.config, "hf_power_mup")
