"""Exported models against their sources: logits, names, bits, text, training."""

import functools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentences import refused
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
)
from warm import python

import hf_power.export.export
import hf_power.export.fold
from hf_power.checkpoints.seal import seal
from hf_power.export.export import export_model, export_text
from hf_power.models import MULTIPLIERS
from hf_power.mup.config import mup_config
from hf_power.mup.optimizer import mup_param_groups

SIZES = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 4, "max_position_embeddings": 64}
DENSE = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "gqa": {"num_key_value_heads": 2},
    "wide_heads": {"head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True},
    "long_context": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
}
MOE = {
    "moe": {"num_local_experts": 4, "num_key_value_heads": 2},
    "moe_tied": {"num_local_experts": 3, "num_experts_per_tok": 1, "tie_word_embeddings": True},
}


def family(kind):
    return "mixtral" if kind in MOE else "llama"


def plain_config(kind, **kwargs):
    if kind in MOE:
        return MixtralConfig(**SIZES | MOE[kind] | kwargs)
    return LlamaConfig(**SIZES | DENSE[kind] | kwargs)


def randomize(model):
    """Norms and biases too: ones and zeros would hide a factor."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model


def saved(folder, config, dtype=torch.float32, **kwargs):
    randomize(AutoModelForCausalLM.from_config(config)).to(dtype).save_pretrained(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def built():
    """The folders of models that were made already; a test gets a copy."""
    return {}


@pytest.fixture
def source(built, tmp_path, tmp_path_factory):
    """The folder of a muP model with random weights."""

    def build(kind="untied", preset="paper", dtype=torch.float32, save=None, name="run", **kwargs):
        key = repr((kind, preset, dtype, save, kwargs))
        if key not in built:
            config = mup_config(plain_config(kind, **kwargs), base_width=6, preset=preset)
            built[key] = saved(tmp_path_factory.mktemp("built"), config, dtype, **save or {})
        return Path(shutil.copytree(built[key], tmp_path / name))

    return build


# Numbers of tokens and norms that are not the default of any family; 0.05 becomes the preset's 0.1.
UNUSUAL = {"pad_token_id": 3, "bos_token_id": 4, "eos_token_id": [5, 6], "rms_norm_eps": 1e-4}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(kind)`: a float32 model, its export, and the record of that; each is made once and only read."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp(kind)
        config = mup_config(plain_config(kind, initializer_range=0.05, **UNUSUAL), base_width=6)
        saved(folder / "run", config)
        return folder / "run", folder / "plain", export_model(folder / "run", folder / "plain", family(kind))

    return make


def logits(folder, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    tokens = torch.arange(2 * 30).view(2, 30) * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(input_ids=tokens).logits


def difference(first, second, dtype):
    x, y = logits(first, dtype), logits(second, dtype)
    return float((x - y).abs().max() / x.abs().max())


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DENSE)
def test_float64_logits_are_equal_to_1e12(kind, source, tmp_path):
    folder = source(kind, dtype=torch.float64)
    content = export_model(folder, tmp_path / "plain", "llama")
    assert content.dtype == "float64"
    assert content.proof.max_relative_difference <= content.proof.tolerance == 1e-12
    assert difference(folder, tmp_path / "plain", torch.float64) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_float32_logits_are_equal_to_1e6(kind, exported):
    folder, plain, content = exported(kind)
    assert content.proof.max_relative_difference <= content.proof.tolerance == 1e-6
    assert difference(folder, plain, torch.float32) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", DENSE)
def test_bfloat16_logits_are_bit_equal_when_factors_are_powers_of_two(kind, source, tmp_path):
    sizes = {"hidden_size": 32} | ({"head_dim": 16} if kind == "wide_heads" else {})
    folder = source(kind, preset="power_of_two", dtype=torch.bfloat16, intermediate_size=48, **sizes)
    config = json.loads((folder / "config.json").read_text())
    config["logits_scaling"] = 4.0  # 32 / 6 is no power of two
    (folder / "config.json").write_text(json.dumps(config))
    content = export_model(folder, tmp_path / "plain", "llama")
    assert content.power_of_two
    assert content.proof.max_relative_difference == content.proof.tolerance == 0
    assert torch.equal(logits(folder, torch.bfloat16), logits(tmp_path / "plain", torch.bfloat16))


@pytest.mark.parametrize("kind", ["untied", "moe"])
def test_other_multipliers_warn_in_bfloat16_and_stay_near(kind, source, tmp_path):
    folder = source(kind)
    with pytest.warns(UserWarning, match="not all powers of two"):
        content = export_model(folder, tmp_path / "plain", family(kind), dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors(tmp_path / "plain").values()} == {torch.bfloat16}
    assert 1e-4 < content.proof.max_relative_difference < content.proof.tolerance == 2e-2
    assert "WARNING" in export_text(content)


@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_names_shapes_and_config_are_those_of_a_stock_model(kind, exported, tmp_path):
    _, plain, _ = exported(kind)
    stock = saved(tmp_path / "stock", plain_config(kind, initializer_range=0.1, **UNUSUAL))
    shapes = [{name: tensor.shape for name, tensor in tensors(path).items()} for path in (stock, plain)]
    assert shapes[0] == shapes[1]
    configs = [json.loads((path / "config.json").read_text()) for path in (stock, plain)]
    if configs[0]["head_dim"] is None:  # Mixtral's way to say hidden_size / heads
        configs[0]["head_dim"] = 6
    # And the names that older versions of transformers read, of which tests/checkpoints/test_older.py is.
    rope = configs[0]["rope_parameters"]
    scaling = {"rope_type": "linear", "factor": 2.0} if kind == "long_context" else None
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "torch_dtype": "float32"}
    assert configs[0] | older == configs[1]
    _, loading = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
    assert not any(loading.values())


def test_every_factor_is_where_it_belongs(exported):
    folder, plain, content = exported("biased")
    assert content.multipliers == dict(zip(MULTIPLIERS, (12.0, 1 / 6, 0.22, 4.0), strict=True))
    found = tensors(plain)
    for name, tensor in tensors(folder).items():
        factor = 12 if "embed" in name else 6**-0.5 if "q_proj" in name else 0.25 if name == "model.norm.weight" else 1
        factor = 0.22 if re.search("o_proj|down_proj", name) else factor
        assert torch.equal(found[name], (tensor.double() * factor).float()), name


def test_export_json_and_copied_files(source, tmp_path):
    folder = source()
    files = {"tokenizer.json": "{}", "recipe.json": '{"schema": 1}', "run.json": '{"tokens_seen": 1234567}'}
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "training_args.bin").write_bytes(b"no part of a model")
    content = export_model(folder, tmp_path / "new" / "plain", "llama")
    out = tmp_path / "new" / "plain"
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "export.json", "generation_config.json", "model.safetensors"),
        *files,
    }
    assert [path.name for path in out.parent.iterdir()] == ["plain"]
    assert json.loads((out / "export.json").read_text()) == content.to_json()
    assert content.source == {"name": "run", "tokens_seen": 1234567}
    assert content.source_config == json.loads((folder / "config.json").read_text())
    assert content.proof.tokens == 128
    assert str(tmp_path) not in (out / "export.json").read_text()
    assert all(part in export_text(content) for part in ("granite -> llama", "1,234,567", "logits_scaling 4", "proof"))


def test_tied_head_that_was_saved_twice_is_left_out(source, tmp_path):
    folder = source("tied")
    change_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(folder)
    export_model(folder, tmp_path / "plain", "llama")
    assert "lm_head.weight" not in tensors(tmp_path / "plain")
    assert difference(folder, tmp_path / "plain", torch.float32) < 1e-6


def test_checkpoint_is_named_after_its_run(source, tmp_path):
    source(name="run/checkpoint-12")
    seal(tmp_path / "run" / "checkpoint-12")
    content = export_model(tmp_path / "run" / "checkpoint-12", tmp_path / "plain", "llama")
    assert content.source == {"name": "run/checkpoint-12"}
    assert not (tmp_path / "plain" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_shards_stay_shards(kind, source, tmp_path, monkeypatch):
    folder = source(kind, save={"max_shard_size": "20KB"})
    count = len(list(folder.glob("*.safetensors")))
    assert count > 2
    export_model(folder, tmp_path / "plain", family(kind))
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) == count
    ours = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
    stock = saved(tmp_path / "stock", plain_config(kind), max_shard_size="20KB") / "model.safetensors.index.json"
    assert ours["metadata"] == json.loads(stock.read_text())["metadata"]
    assert sorted(ours["weight_map"]) == sorted(json.loads(stock.read_text())["weight_map"])
    assert difference(folder, tmp_path / "plain", torch.float32) < 1e-6

    monkeypatch.setattr(hf_power.export.fold, "MAX_SHARD_BYTES", 10_000)
    export_model(folder, tmp_path / "cut", family(kind))
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > count
    assert all(
        torch.equal(tensor, tensors(tmp_path / "cut")[name]) for name, tensor in tensors(tmp_path / "plain").items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DENSE, *MOE])
def test_there_and_back_is_bit_equal_with_powers_of_two(kind, source, tmp_path):
    folder = source(kind, preset="power_of_two", head_dim=8 if kind == "wide_heads" else 4, hidden_size=24)
    config = json.loads((folder / "config.json").read_text())
    plain = family(kind)
    assert export_model(folder, tmp_path / "plain", plain).power_of_two
    export_model(tmp_path / "plain", tmp_path / "back", config["model_type"])
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    # The names of older versions come on top.
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: back[name] for name in config} == config


def test_stacked_experts_are_gathered_from_several_shards(source, tmp_path, monkeypatch):
    folder = source("moe", preset="power_of_two", head_dim=4)
    monkeypatch.setattr(hf_power.export.fold, "MAX_SHARD_BYTES", 10_000)
    export_model(folder, tmp_path / "plain", "mixtral")
    export_model(tmp_path / "plain", tmp_path / "back", "granitemoe")
    after = tensors(tmp_path / "back")
    assert all(torch.equal(tensor, after[name]) for name, tensor in tensors(folder).items())


@pytest.mark.parametrize("as_file", [True, False])
def test_multipliers_of_another_model(as_file, source, tmp_path):
    stock = saved(tmp_path / "stock", plain_config("gqa"))
    like = source("gqa", preset="power_of_two")
    export_model(stock, tmp_path / "back", "granite", like=like / "config.json" if as_file else like)
    config = AutoConfig.from_pretrained(tmp_path / "back")
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_scaling) == (8, 0.25, 4)
    assert config.mup["preset"] == "power_of_two"
    assert difference(stock, tmp_path / "back", torch.float32) < 1e-6


@pytest.mark.parametrize("kind", ["embedding", "query", "MLP output", "final norm"])
def test_wrong_factor_leaves_nothing_behind(kind, source, tmp_path, monkeypatch):
    right = hf_power.export.export.fold_factors
    monkeypatch.setattr(hf_power.export.export, "fold_factors", lambda *a: (f := right(*a)) | {kind: f[kind] * 1.001})
    folder = source()
    with refused(ValueError, "the export of run differs by", "tolerance of 1e-06 in float32", "not kept"):
        export_model(folder, tmp_path / "plain", "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_are_not_finite_prove_nothing(source, tmp_path):
    folder = source()
    change_weights(lambda w: w["model.norm.weight"].fill_(math.nan))(folder)
    with refused(ValueError, "differs by nan"):
        export_model(folder, tmp_path / "plain", "llama")


def test_experts_chosen_by_rounding_are_no_difference(source, tmp_path):
    """Two experts with the same router scores: which of them is taken is a matter of the last bit."""
    folder = source("moe")
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "router" in name:
            tensor[1:] = tensor[:1] * (1 + 1e-6 * torch.randn(3, 1))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    proof = export_model(folder, tmp_path / "plain", "mixtral").proof
    assert proof.max_relative_difference < 1e-6
    assert proof.rerouted > 0
    assert difference(folder, tmp_path / "plain", torch.float64) > 1e-3


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"to": "gpt2"}, ValueError, ("to must be one of", "'gpt2'")),
        ({"to": "mixtral"}, ValueError, ("a granite model", "exports to llama, not to mixtral")),
        ({"dtype": "int8"}, ValueError, ("dtype must be one of", "'int8'")),
        ({"like": "run"}, ValueError, ("like='run'", "leave it out")),
        ({"source": "nobody/has-this"}, FileNotFoundError, ("no folder nobody/has-this", "Hub cannot be reached")),
        ({"source": "/no/such/folder"}, FileNotFoundError, ("there is no model at /no/such/folder",)),
    ],
)
def test_bad_arguments(arguments, error, parts, source, tmp_path):
    folder = source()
    with refused(error, *parts):
        export_model(**{"source": folder, "output_dir": tmp_path / "plain", "to": "llama"} | arguments)
    assert not (tmp_path / "plain").exists()


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def change_weights(function):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        function(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def break_seal(folder):
    seal(folder)
    (folder / "generation_config.json").write_text("{}")


def shorten(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")


LAYER = "model.layers.1."
DAMAGES = {
    "no_config": (lambda f: (f / "config.json").unlink(), ("is no model", "config.json")),
    "no_json": (lambda f: (f / "config.json").write_text("model"), ("config.json is no config of a model",)),
    "no_weights": (lambda f: (f / "model.safetensors").unlink(), ("is no model", "weights are missing")),
    "no_shards": (empty_index, ("there is no ", "model.safetensors", "saved as safetensors")),
    "half_saved": (shorten, ("model.safetensors cannot be read as safetensors",)),
    "seal": (break_seal, ("cannot be used", "generation_config.json has", "instead of")),
    "family": (change_config(model_type="gpt2"), ("type 'gpt2'", "cannot be exported")),
    "window": (change_config(sliding_window=32), ("sliding_window=32", "no counterpart in llama")),
    "jitter": (change_config(router_jitter_noise=0.1), ("router_jitter_noise=0.1", "no counterpart")),
    "multiplier": (change_config(residual_multiplier=0.0), ("residual_multiplier", "positive", "0.0")),
    "adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ("holds an adapter", "merge it")),
    "heads": (change_config(num_attention_heads=5), ("hidden_size 24", "not a multiple", "5")),
    "unknown_tensor": (
        change_weights(lambda w: w.update({LAYER + "self_attn.q_norm.weight": torch.ones(6)})),
        ("no rule for the tensor model.layers.1.self_attn.q_norm.weight",),
    ),
    "unknown_bias": (
        change_weights(lambda w: w.update({LAYER + "mlp.down_proj.bias": torch.ones(24)})),
        ("unexpected tensors, model.layers.1.mlp.down_proj.bias the first of 1",),
    ),
    "missing_tensor": (
        change_weights(lambda w: w.pop(LAYER + "mlp.up_proj.weight")),
        ("missing tensors, model.layers.1.mlp.up_proj.weight the first of 1",),
    ),
    "other_shape": (
        change_weights(lambda w: w.update({"model.norm.weight": torch.ones(25)})),
        ("mismatched tensors", "model.norm.weight"),
    ),
    "integers": (
        change_weights(lambda w: w.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)})),
        ("tensors of type I8", "before it is quantized"),
    ),
    "mixed": (
        change_weights(lambda w: w.update({"model.norm.weight": torch.ones(24, dtype=torch.bfloat16)})),
        ("tensors of the types BF16, F32", "pass the dtype"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_models_that_cannot_be_exported(damage, source, tmp_path):
    change, parts = DAMAGES[damage]
    folder = source()
    change(folder)
    with refused(ValueError, *parts):
        export_model(folder, tmp_path / "plain", "llama")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_full_output_folder_is_left_alone_and_an_empty_one_taken(source, tmp_path):
    folder = source()
    (tmp_path / "plain").mkdir()
    export_model(folder, tmp_path / "plain", "llama")
    before = (tmp_path / "plain" / "export.json").read_bytes()
    with refused(ValueError, "exists and is not empty"):
        export_model(folder, tmp_path / "plain", "llama")
    assert (tmp_path / "plain" / "export.json").read_bytes() == before


def test_biased_attention_of_a_mixture_has_no_counterpart(tmp_path):
    config = GraniteMoeConfig(**SIZES, num_local_experts=4, attention_bias=True)
    with refused(ValueError, "attention_bias=True", "no counterpart in mixtral"):
        export_model(saved(tmp_path / "run", config), tmp_path / "plain", "mixtral")


def test_way_back_needs_multipliers_of_the_same_shape(source, tmp_path):
    stock = saved(tmp_path / "stock", plain_config("untied"))
    cases = {
        None: (ValueError, ("has no export.json", "pass like")),
        tmp_path / "nothing.json": (FileNotFoundError, ("there is no", "nothing.json")),
        stock: (ValueError, ("multipliers of model type 'llama', not 'granite'",)),
        source(name="other", num_hidden_layers=3): (ValueError, ("num_hidden_layers is 2 in", "and 3 in")),
        source(name="heads", head_dim=10): (ValueError, ("head_dim is 6 in", "and 10 in")),
    }
    for like, (error, parts) in cases.items():
        with refused(error, *parts):
            export_model(stock, tmp_path / "back", "granite", like=like)


def test_missing_expert_on_the_way_back(source, tmp_path):
    export_model(source("moe"), tmp_path / "plain", "mixtral")
    change_weights(lambda w: w.pop(LAYER + "block_sparse_moe.experts.2.w3.weight"))(tmp_path / "plain")
    with refused(ValueError, "experts.2.w3.weight is missing"):
        export_model(tmp_path / "plain", tmp_path / "back", "granitemoe")


LR, WEIGHT_DECAY, EPS = 0.01, 0.5, 1e-3  # large enough to be seen, each of them


def factor_of(name, config):
    """f of W' = f W, for the parameters in memory."""
    e, s = config.embedding_multiplier, config.logits_scaling
    if name == "model.embed_tokens.weight":
        return e
    if "q_proj" in name:
        return config.attention_multiplier * (config.hidden_size / config.num_attention_heads) ** 0.5
    if "o_proj" in name or "down_proj" in name:
        return config.residual_multiplier
    if name == "model.norm.weight":
        return 1 / (e * s) if config.tie_word_embeddings else 1 / s
    return 1.0


def plain_groups(granite, plain, forget=None):
    """One group per tensor. With W' = f W the gradient is g / f, so that Adam's m / (sqrt(v) + eps) is unchanged with
    eps' = eps / f, the step is f times as long with lr' = f lr, and lr' wd' = lr wd with wd' = wd / f.
    """
    names = {id(parameter): name for name, parameter in granite.named_parameters()}
    groups = mup_param_groups(granite, lr=LR, weight_decay=WEIGHT_DECAY, eps=EPS)
    of_name = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    made = []
    for name, parameter in plain.named_parameters():
        name = name.replace(".mlp.gate.", ".block_sparse_moe.router.").replace(
            ".mlp.experts.", ".block_sparse_moe.experts."
        )
        f = factor_of(name, granite.config)
        rescaled = {"lr": f, "eps": 1 / f, "weight_decay": 1 / f}
        numbers = {key: of_name[name][key] * (1 if key == forget else ratio) for key, ratio in rescaled.items()}
        made.append({"params": [parameter], **numbers})
    return groups, made


def train(model, groups, steps=20):
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        start = torch.randint(96, (4, 1), generator=generator)
        tokens = (start + torch.arange(16) * 5) % 96
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def both_forms(folder, plain_folder):
    kwargs = {"dtype": torch.float64, "experts_implementation": "eager"}
    return [AutoModelForCausalLM.from_pretrained(path, **kwargs).train() for path in (folder, plain_folder)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["untied", "tied", "moe"])
def test_both_forms_train_alike_with_rescaled_groups(kind, source, tmp_path):
    """In float64, 20 steps; the loss falls, and without rescaling lr, eps or decay the two differ."""
    folder = source(kind, dtype=torch.float64)
    export_model(folder, tmp_path / "plain", family(kind))
    granite, plain = both_forms(folder, tmp_path / "plain")
    groups, made = plain_groups(granite, plain)
    expected = train(granite, groups)
    assert expected[-1] < expected[0] - 0.5
    assert torch.allclose(train(plain, made), expected, rtol=0, atol=1e-5)
    for forget in ("lr", "eps", "weight_decay") if kind == "untied" else ():
        granite, plain = both_forms(folder, tmp_path / "plain")
        assert (train(plain, plain_groups(granite, plain, forget)[1]) - expected).abs().max() > 1e-4, forget


ALONE = """
import sys
sys.modules["hf_power"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save((type(model).__name__, model(input_ids=torch.arange(60).view(2, 30) * 7 % 96).logits), sys.argv[2])
"""

MEMORY = r"""
import re, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from hf_power.export.fold import Conversion, write_weights
from hf_power.export.source import find_source, tensor_files
from hf_power.models import FAMILIES
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
source = find_source(folder, FAMILIES[sys.argv[3]])
factors = {"embedding": 12.0, "query": 0.3, "MLP output": 0.22, "final norm": 0.25}
conversion = Conversion(tensor_files(source), source.config, source.to, factors, torch.float32)
before = peak()
write_weights(conversion, out)
after = peak()
whole = [load_file(path) for path in out.glob("*.safetensors")]
checksum = sum(float(t.sum()) for tensors in whole for t in tensors.values())
print(after - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tied", "moe"])
def test_loads_where_hf_power_is_not_installed(kind, exported, tmp_path):
    folder, plain, _ = exported(kind)
    subprocess.run([python(stock=True), "-c", ALONE, plain, tmp_path / "logits.pt"], check=True)
    name, found = torch.load(tmp_path / "logits.pt")
    assert name == {"tied": "LlamaForCausalLM", "moe": "MixtralForCausalLM"}[kind]
    expected = logits(folder, torch.float32)
    assert (expected - found).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc; getrusage inherits the parent's")
@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_folding_holds_one_shard_at_a_time(kind, tmp_path):
    """200 MB in shards of 10 MB; the control loads them all."""
    sizes = {"vocab_size": 512, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    if kind == "dense":
        config, to = GraniteConfig(**sizes, intermediate_size=1024, num_hidden_layers=20), "llama"
    else:
        moe = {"intermediate_size": 256, "num_local_experts": 6, "num_hidden_layers": 15}
        config, to = GraniteMoeConfig(**sizes, **moe), "mixtral"
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "run", max_shard_size="10MB")
    total = 4 * model.num_parameters()
    assert total > 200e6
    (tmp_path / "plain").mkdir()
    command = [python(), "-c", MEMORY, tmp_path / "run", tmp_path / "plain", to]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    folded, loaded = map(int, out.split())
    print(f"folding {folded / 1e6:.0f} MB, loading {loaded / 1e6:.0f} MB of {total / 1e6:.0f} MB")
    assert folded < 60e6, f"{folded / 1e6:.0f} MB"
    assert loaded > 0.9 * total
    shutil.rmtree(tmp_path / "run")
