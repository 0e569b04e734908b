"""The settings files and cards of the paper's four models, against Table 4 of Shen et al. 2024 (arXiv:2408.13359)."""

import copy
import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_power import Recipe, mup_config, mup_param_groups
from hf_power.cli import parse_settings
from hf_power.models import count_parameters, flops_per_token
from hf_power.plan.plan import make_plan
from hf_power.plan.report import plan_run
from hf_power.plan.target import Target
from hf_power.pretrain import run as train
from hf_power.schedule import power_lr
from hf_power.scheduler import PowerLR
from hf_power.settings.sections import parse_tokens

ROOT = Path(__file__).parents[2]
VOCABULARY, TOKENS_PER_STEP, DEVICES = 49152, 4_194_304, 64

# Width, layers, heads, KV heads, MLP, experts, m, residual multiplier, parameters, active ones, tokens, and the end.
TABLE_4 = {
    "powerlm-1b": (1536, 40, 24, 24, 4096, 0, 6, 0.22, "1.2B", "1.2B", 1.0e12, 100e9),
    "powermoe-1b": (1024, 24, 16, 8, 512, 32, 4, 0.28, "1.3B", "377M", 1.1e12, 100e9),
    "powerlm-3b": (2304, 40, 36, 36, 9216, 0, 8, 0.22, "3.5B", "3.5B", 1.25e12, 250e9),
    "powermoe-3b": (1536, 32, 24, 8, 512, 40, 6, 0.22, "3.3B", "800M", 3.0e12, 500e9),
}
PAPER = list(TABLE_4)
MOE = ["powermoe-1b", "powermoe-3b"]


def settings(name, *flags):
    return parse_settings([str(ROOT / f"scripts/recipes/{name}.yaml"), "--use_cpu", "True", *flags])


@functools.cache
def config(name, *flags):
    """Under muP; the tokenizer's vocabulary yields to the file's."""
    given = settings(name, *flags)
    return mup_config(given.model.config(vocab_size=1), **given.mup.arguments())


@functools.cache
def counts(name):
    return count_parameters(config(name))


def matrices(name):
    """Entries of attention, of one expert or MLP, and of the router, of one layer, and of the embedding, by hand."""
    width, _, heads, kv_heads, inner, experts, *_ = TABLE_4[name]
    attention = 2 * width * 64 * heads + 2 * width * 64 * kv_heads
    return attention, 3 * width * inner, width * experts, VOCABULARY * width


def printed(number, digits):
    """To so many significant digits, as a paper prints it."""
    text = f"{number:.{digits - 1}e}"
    value = float(text)
    return f"{value / 1e9:g}B" if value >= 1e9 else f"{value / 1e6:g}M"


@pytest.mark.parametrize("name", [*PAPER, "demo", "target"])
def test_settings_are_checked(name):
    given = settings(name)
    given.check()
    assert given.training.output_dir == f"runs/{name}"


@pytest.mark.parametrize("name", PAPER)
def test_shape_is_that_of_table_4(name):
    width, layers, heads, kv_heads, inner, experts, *_ = TABLE_4[name]
    built = config(name)
    assert (built.hidden_size, built.num_hidden_layers, built.intermediate_size) == (width, layers, inner)
    assert (built.num_attention_heads, built.num_key_value_heads) == (heads, kv_heads)
    assert width // heads == 64
    assert (getattr(built, "num_local_experts", 0), getattr(built, "num_experts_per_tok", 0)) == (
        (experts, 8) if experts else (0, 0)
    )
    assert (built.vocab_size, built.tie_word_embeddings, built.hidden_act) == (VOCABULARY, True, "silu")
    assert built.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert settings(name).data.block_size == 4096


@pytest.mark.parametrize("name", PAPER)
def test_multipliers_are_those_of_table_4(name):
    m, residual = TABLE_4[name][6:8]
    built = config(name)
    assert built.logits_scaling == (9 if name == "powerlm-3b" else m)
    assert (built.embedding_multiplier, built.residual_multiplier) == (12, residual)
    assert (built.attention_multiplier, built.initializer_range) == (1 / 64, 0.1)


def test_powerlm_3b_with_8_and_with_9():
    """2304 / 256 is 9, Table 4 prints 8; both ways, hidden matrices have the rate divided by it."""
    for flags, m in (((), 9), (("--base_width", "288"), 8)):
        built = config("powerlm-3b", *flags)
        assert built.logits_scaling == m
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built)
        rates = {group["name"]: group["lr"] for group in mup_param_groups(model, lr=0.02)}
        assert rates == {"embedding": 0.02, "hidden": pytest.approx(0.02 / m), "vector": 0.02}


@pytest.mark.parametrize("name", PAPER)
def test_parameters_are_counted_by_hand_and_meet_the_paper(name):
    width, layers, *_, experts, _, _, total, active, _, _ = TABLE_4[name]
    attention, mlp, router, embedding = matrices(name)
    norms = (2 * layers + 1) * width
    inner = layers * (attention + (experts or 1) * mlp + router) + norms
    assert counts(name)["parameters"] == inner + embedding
    assert counts(name)["parameters_without_embeddings"] == inner
    assert printed(inner + embedding, 2) == total
    assert printed(inner + 2 * embedding, 2) != total  # untied
    active_inner = inner - layers * (experts - 8) * mlp if experts else inner
    assert counts(name)["active_parameters"] == active_inner + embedding
    if experts:  # the paper's figure has neither the embedding nor, to its last digit, routers and norms
        assert printed(layers * (attention + 8 * mlp), 3 if active == "377M" else 1) == active
        assert printed(active_inner + embedding, 1 if active == "800M" else 3) != active


@pytest.mark.parametrize("name", PAPER)
def test_batch_and_optimizer(name):
    training = settings(name).training
    sequences = training.per_device_train_batch_size * training.gradient_accumulation_steps * DEVICES
    assert sequences == 1024
    assert sequences * settings(name).data.block_size == TOKENS_PER_STEP
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.95, 1e-10)
    assert (training.weight_decay, training.max_grad_norm, training.bf16) == (0.1, 1.0, True)


def schedule(name):
    given = settings(name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=given.training.learning_rate)
    steps = math.ceil(parse_tokens(given.run.tokens, "tokens") / TOKENS_PER_STEP)
    kwargs = given.training.lr_scheduler_kwargs
    return PowerLR(optimizer, given.training.get_warmup_steps(steps), steps, tokens_per_step=TOKENS_PER_STEP, **kwargs)


@pytest.mark.parametrize("name", PAPER)
def test_schedule_is_the_papers(name):
    tokens, tail = TABLE_4[name][-2:]
    law = schedule(name)
    assert settings(name).training.lr_scheduler_type == "power"
    assert tokens <= law.total_tokens < tokens + TOKENS_PER_STEP
    told = law.schedule.to_dict()
    assert (told["a"], told["b"], told["batch_exponent"], told["max_lr"]) == (4.0, -0.51, 1.0, 0.02)
    assert (told["warmup_tokens"], told["decay_shape"]) == (1e9, "exponential")
    assert told["decay_start_tokens"] == law.total_tokens - tail
    # eq. 7 at beta 1024; the last two where this run has them before its decay, else of the law alone
    for n, rate in ((1e9, 0.02), (1e10, 0.02), (1e11, 0.01005), (1e12, 0.00311), (1e13, 9.6e-4)):
        inside = n < told["decay_start_tokens"]
        eta = law.schedule.lr(int(n)) if inside else power_lr(n, tokens_per_step=TOKENS_PER_STEP)
        assert eta == pytest.approx(rate, rel=5e-3)
    assert law.schedule.lr(5 * 10**8) == pytest.approx(0.01)
    assert law.schedule.lr(law.total_tokens) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_plan_of_the_papers_recipe(name, tmp_path):
    Recipe().save(tmp_path / "recipe.json")
    tokens = TABLE_4[name][-2]
    target = str(ROOT / f"scripts/recipes/{name}.yaml")
    plan = make_plan(Recipe(), Target(int(tokens), TOKENS_PER_STEP, config(name)))
    text = plan_run(
        str(tmp_path / "recipe.json"), target=target, tokens=str(int(tokens)), tokens_per_step=str(TOKENS_PER_STEP)
    )
    assert f"{counts(name)['parameters']:,}" in text
    assert "(beta = 1024)" in text
    width, layers, *_ = TABLE_4[name]
    attention, mlp, router, embedding = matrices(name)
    passed = layers * (attention + (8 if router else 1) * mlp + router) + embedding
    steps = math.ceil(tokens / TOKENS_PER_STEP)
    flops = 6 * (passed + layers * width * 4096) * steps * TOKENS_PER_STEP
    assert plan.compute.flops == pytest.approx(flops, rel=1e-12)
    assert f"{flops:.3g} FLOP" in text
    assert plan.cap_ends_tokens == pytest.approx((4 * 1024 / 0.02) ** (1 / 0.51), rel=1e-6)


@pytest.mark.slow
def test_plan_says_memory_and_days(tmp_path):
    """PowerLM-3B, fully sharded over 64 devices: 16 bytes per parameter shared out, and what one device computes with."""
    Recipe(warmup_tokens=10**9).save(tmp_path / "recipe.json")
    target = str(ROOT / "scripts/recipes/powerlm-3b.yaml")
    text = plan_run(
        str(tmp_path / "recipe.json"),
        tokens="1.25T",
        tokens_per_step=str(TOKENS_PER_STEP),
        target=target,
        output_dir=tmp_path,
    )
    rows = {row["devices"]: row for row in json.loads((tmp_path / "plan.json").read_text())["scale"]}
    assert list(rows) == [8, 64, 512]
    assert rows[64]["steps"] == math.ceil(1.25e12 / TOKENS_PER_STEP)
    assert rows[64]["bytes"]["full"] > 16 * 3_510_819_072 / 64
    assert rows[8]["days"] / rows[64]["days"] == pytest.approx(8)
    assert (rows[64]["fits"]["none"], rows[64]["fits"]["full"]) == (False, True)
    assert "84.5!" in text


def small(name, corpus, folder, *flags):
    """A run of the recipe that a core can make: another size and other data, everything else as it stands."""
    given = settings(
        name,
        *("--hidden_size", "32", "--intermediate_size", "16", "--num_hidden_layers", "2", "--num_attention_heads", "2"),
        *("--num_key_value_heads", "1", "--num_local_experts", "8", "--num_experts_per_tok", "2", "--base_width", "16"),
        *("--dataset", str(corpus), "--streaming", "False", "--data_cache_dir", str(corpus.parent / "cache")),
        *("--vocab_size", "400", "--block_size", "32", "--num_proc", "1", "--disable_tqdm", "True", "--bf16", "False"),
        *("--tokens", str(6 * 256), "--max_eval_tokens", "640", "--logging_steps", "1", "--output_dir", str(folder)),
        *("--lr_scheduler_kwargs", '{"a": 8.0}', "--torch_compile", "False", *flags),
    )
    given.data.tokenizer = given.data.dataset_config = None
    extra = {"vocab_size", "head_dim"}  # of the paper's size
    given.model.model_config = {k: v for k, v in given.model.model_config.items() if k not in extra}
    return train.pretrain(given).to_json()


def train_losses(run):
    return [entry["loss"] for entry in run["loss_curve"] if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER[:2])  # the others differ in size only
def test_recipe_trains_when_made_small(name, corpus, tmp_path):
    run = small(name, corpus, tmp_path, "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1")
    assert (run["status"], run["tokens_per_step"], run["tokens_seen"]) == ("finished", 256, 6 * 256)
    assert run["held_out_loss"] < train_losses(run)[0]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == ("granitemoe" if name in MOE else "granite")
    assert saved["mup"]["preset"] == "paper"


def test_balancing_loss_is_in_the_loss():
    """Untrained, routing is balanced: cross-entropy plus 0.001 times about num_experts_per_tok = 8."""
    built = copy.deepcopy(config("powermoe-1b"))
    for name, value in {
        "vocab_size": 64,
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }.items():
        setattr(built, name, value)
    built.num_hidden_layers = 2
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(built).eval()
    ids = torch.randint(0, 64, (4, 128))
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    cross_entropy = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(out.loss - cross_entropy) == pytest.approx(0.008, rel=0.1)


def card(name):
    return (ROOT / f"model_cards/{name}.md").read_text(encoding="utf-8")


def table(text, title):
    """Row -> cells of the first table after a heading."""
    rows = text.split(f"## {title}\n")[1].split("\n| | ")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name: values for name, *values in cells}


@pytest.mark.parametrize("name", PAPER)
def test_card_has_the_shape_and_the_counts(name):
    width, layers, heads, kv_heads, inner, experts, m, residual, total, active, _, _ = TABLE_4[name]
    count, moe = counts(name), name in MOE
    without = count["active_parameters"] - VOCABULARY * width
    expected = {
        "Width": [f"{width}", f"{width}"],
        "Layers": [f"{layers}", f"{layers}"],
        "Attention heads, KV heads": [f"{heads}, {kv_heads}", f"{heads}, {kv_heads}"],
        "Head size": ["64", "64"],
        f"Hidden size of {'an expert' if moe else 'the MLP'} (SwiGLU)": [f"{inner}", f"{inner}"],
        **({"Experts, active ones": [f"{experts}, 8", f"{experts}, 8"]} if moe else {}),
        "Vocabulary": [f"{VOCABULARY}", ""],
        "m, width over base width": [f"{config(name).logits_scaling:g}", f"{m}"],
        "Embedding multiplier": ["12", "12"],
        "Residual multiplier": [f"{residual}", f"{residual}"],
        "Attention multiplier": [f"{1 / 64}", "1 / head size"],
        "Init std at base width": ["0.1", "0.1"],
        "Parameters": [f"{count['parameters']:,}", total],
        "Parameters without embeddings": [f"{count['parameters_without_embeddings']:,}", ""],
        **({"Active parameters": [f"{count['active_parameters']:,}", ""]} if moe else {}),
        **({"Active parameters without embeddings": [f"{without:,}", active]} if moe else {}),
    }
    assert table(card(name), "Shape") == expected


@pytest.mark.parametrize("name", PAPER)
def test_every_large_number_of_a_card_is_counted(name):
    _, layers, *_ = TABLE_4[name]
    attention, mlp, _, embedding = matrices(name)
    known = {*counts(name).values(), TOKENS_PER_STEP, counts(name)["parameters"] + embedding}
    known |= {counts(name)["active_parameters"] - embedding, layers * (attention + 8 * mlp)}
    found = [int(text.replace(",", "")) for text in re.findall(r"\d{1,3}(?:,\d{3})+", card(name))]
    assert set(found) <= known
    flops = flops_per_token(config(name), 4096)
    assert f"takes {flops * TABLE_4[name][-2]:.3g} FLOP, {flops:.3g} per token" in card(name)


@pytest.mark.parametrize("name", PAPER)
def test_card_has_the_schedule(name):
    tokens, tail = TABLE_4[name][-2:]
    here = {row: cells[0] for row, cells in table(card(name), "Schedule and batch").items()}
    law = schedule(name)
    assert here == {
        "Tokens": f"{tokens / 1e12:g}T",
        "Tokens per step": f"{TOKENS_PER_STEP:,}",
        "eta_max": "0.02",
        "a": "4",
        "b": "-0.51",
        "Warmup": "1B",
        "Decay": f"last {tail / 1e9:g}B",
        "eta at 100B tokens": f"{law.schedule.lr(10**11):.3g}",
        "eta where the decay begins": f"{law.schedule.lr(int(tokens - tail)):.3g}",
    }


@pytest.mark.parametrize("name", PAPER)
def test_card_has_the_settings_that_the_paper_does_not_give(name):
    given, rows = settings(name), table(card(name), "What the paper does not say")
    training, extra = given.training, given.model.model_config
    assert rows["Optimizer"][0] == f"AdamW, betas {training.adam_beta1} and {training.adam_beta2}"
    assert rows["Epsilon"][0] == f"{training.adam_epsilon:g}, divided by m"
    assert rows["Weight decay"][0].startswith(f"{training.weight_decay}, ")
    assert rows["Gradient clipping"][0] == f"{training.max_grad_norm}"
    assert rows["Vocabulary, tied embeddings"][0] == f"{extra['vocab_size']}, tied"
    assert rows["RoPE base"][0] == f"{extra['rope_parameters']['rope_theta']:.0f}"
    assert float(rows["RMSNorm epsilon"][0]) == extra["rms_norm_eps"]
    assert (rows["Tokenizer"][0], rows["Data"][0]) == (given.data.tokenizer, given.data.dataset)
    assert ("Balancing loss" in rows) == (name in MOE)
    if name in MOE:
        assert rows["Balancing loss"][0] == f"coefficient {extra['router_aux_loss_coef']}"
        assert extra["output_router_logits"] is True
    flag = re.search(r"--gradient_accumulation_steps (\d+)`", card(name))
    assert training.per_device_train_batch_size * int(flag[1]) * 8 == 1024


# Tables 5 to 7 of the paper.
RESULTS = {
    "powerlm-1b": ["14.5 57.7", "13.9 57.6", "13.8 58.2"],
    "powermoe-1b": ["15.7 55.1", "14.8 55.7", "14.6 55.9"],
    "powerlm-3b": ["60.5 72.0 74.6 43.6 79.9 70.0 66.8", "34.9 9.90 26.8 33.6 49.2"],
    "powermoe-3b": ["58.1 65.0 71.5 41.0 79.1 65.0 63.3", "25.9 9.26 20.1 32.4 42.8"],
}


@pytest.mark.parametrize("name", PAPER)
def test_card_is_honest_about_weights_and_results(name):
    read = ModelCard.load(ROOT / f"model_cards/{name}.md")
    head = read.data.to_dict()
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert {"hf_power", "power-scheduler", "mup", "granitemoe" if name in MOE else "granite"} <= set(head["tags"])
    assert "model-index" not in head
    assert "this project has not trained this model" in " ".join(card(name).split())
    published = card(name).split("## Published results (Shen et al., not ours)\n")[1].split("\n## ")[0]
    rows = [" ".join(re.findall(r"\d+\.\d+", line)) for line in published.splitlines() if line.startswith("|")]
    assert [row for row in rows if row] == RESULTS[name]
    assert f"scripts/pretrain.py scripts/recipes/{name}.yaml --output_dir runs/{name}" in card(name)
