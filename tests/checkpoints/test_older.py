"""Models saved today are read by older versions of transformers, with the same logits and the same token ids."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizer, PreTrainedTokenizerFast
from versions import ROOT

from hf_power.checkpoints.older import add_older_names

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
THETA = {"rope_type": "default", "rope_theta": 500000.0}
FAR = {"rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "query_pre_attn_scalar": 16}
LAYERS = {"full_attention": THETA | {"rope_type": "linear", "factor": 8.0}}
LAYERS |= {"sliding_attention": THETA | {"rope_theta": 30000.0}}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LONG = {"rope_type": "longrope", "rope_theta": 500000.0, "original_max_position_embeddings": 32} | FACTORS
# A family, and what it has beside the sizes; the positions turn as no default has it.
MODELS = {
    "llama": ("llama", {"rope_parameters": THETA}),
    "llama tied": ("llama", {"rope_parameters": THETA, "tie_word_embeddings": True, "head_dim": 32}),
    "llama of 3.1": (
        "llama",
        {"rope_parameters": FAR | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "llama linear": ("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "llama yarn": ("llama", {"rope_parameters": FAR | {"rope_type": "yarn"}}),
    "llama longrope": ("llama", {"rope_parameters": FAR | {"rope_type": "longrope"} | FACTORS}),
    "mixtral": ("mixtral", {"rope_parameters": THETA, "num_local_experts": 4}),
    "granite": ("granite", {"rope_parameters": THETA}),
    "qwen3": ("qwen3", {"rope_parameters": THETA, "head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {"rope_parameters": THETA, "head_dim": 32} | EXPERTS),
    "gemma2": ("gemma2", {"rope_parameters": THETA, "head_dim": 16} | BOTH),
    "gemma3": ("gemma3_text", {"rope_parameters": LAYERS, "head_dim": 16} | BOTH),
    "olmo2": ("olmo2", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": THETA, "num_local_experts": 4, "head_dim": 16}),
    "phi3": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
    "gpt2": ("gpt2", {}),
}
CHEAP = ["llama of 3.1", "qwen3_moe", "gemma3", "gpt_neox", "phi3"]
TEXT = "The quick brown fox  jumps over <|end|> the lazy dog. <|user|>"
# Runs in the other version; eager, because 4.57 lets Gemma 2 use an attention that leaves its caps of the scores out.
READ = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in map(Path, sys.argv[2:]):
    tokenizer = AutoTokenizer.from_pretrained(folder)(Path(sys.argv[1]).read_text())["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(96).reshape(2, 48), use_cache=False).logits
    wanted = torch.load(folder / "logits.pt")
    found[folder.name] = float((logits - wanted).abs().max() / wanted.abs().max()), tokenizer
print(json.dumps(found))
"""


def saved(folder, name, tokenizer):
    family, settings = MODELS[name]
    sizes = SIZES if family != "gpt2" else {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = AutoConfig.for_model(family, **sizes | settings, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.12 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
        logits = model(input_ids=torch.arange(96).reshape(2, 48), use_cache=False).logits
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(logits, folder / "logits.pt")
    add_older_names(folder)


def tokenizers():
    words = {word: i for i, word in enumerate([*"abcdefghijklmnopqrstuvwxyz", "<s>", "<|end|>", "?"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.add_special_tokens([AddedToken("<s>"), AddedToken("<|end|>")])
    ends = {"bos_token": "<s>", "eos_token": "<|end|>", "unk_token": "?"}
    yield PreTrainedTokenizerFast(tokenizer_object=raw, **ends, additional_special_tokens=["<|user|>"])
    raw.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 27)])
    yield PreTrainedTokenizerFast(tokenizer_object=raw, **ends)
    yield LlamaTokenizer(vocab=words, merges=[], **ends)


def test_the_names_are_those_of_4_57_and_change_nothing_today(tmp_path):
    for name in CHEAP:
        family, settings = MODELS[name]
        before = AutoConfig.for_model(family, **SIZES | settings)
        before.save_pretrained(tmp_path)
        add_older_names(tmp_path)
        after = AutoConfig.from_pretrained(tmp_path)
        assert after.rope_parameters | before.rope_parameters == after.rope_parameters
        written = json.loads((tmp_path / "config.json").read_text())
        theta = "rotary_emb_base" if family == "gpt_neox" else "rope_theta"
        assert written[theta] == 500000.0
        scaling = written["rope_scaling"]
        expected = {
            "llama of 3.1": {key: value for key, value in settings["rope_parameters"].items() if key != "rope_theta"},
            "gemma3": {"rope_type": "linear", "factor": 8.0},
            "phi3": {"type": "longrope"} | FACTORS,
        }
        assert scaling == expected.get(name)
        if name == "qwen3_moe":
            assert written["num_experts"] == written["num_local_experts"] == 4
        if name == "gpt_neox":
            assert written["rotary_pct"] == 0.5
        if name == "gemma3":
            assert written["rope_local_base_freq"] == 30000.0


def test_a_tokenizer_has_a_class_that_4_57_knows(tmp_path):
    for tokenizer in tokenizers():
        tokenizer.save_pretrained(tmp_path)
        add_older_names(tmp_path)
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        today = type(tokenizer).from_pretrained(tmp_path)
        assert written["tokenizer_class"] in ("PreTrainedTokenizerFast", "LlamaTokenizer")
        assert "extra_special_tokens" not in written
        assert today(TEXT).input_ids == tokenizer(TEXT).input_ids
        assert today.all_special_tokens == tokenizer.all_special_tokens
    assert written["add_bos_token"] is False


@pytest.mark.slow
@pytest.mark.elsewhere
def test_an_older_transformers_gives_the_same_logits_and_ids(tmp_path):
    overlay = Path(sys.prefix) / "versions" / "4.57.6"
    if not overlay.is_dir():
        pytest.skip(f"there is no {overlay}: make versions")
    made = list(tokenizers())
    (tmp_path / "text").write_text(TEXT)
    for i, name in enumerate(MODELS):
        saved(tmp_path / name, name, made[i % len(made)])
    environment = {"PYTHONPATH": f"{overlay}:{ROOT}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, tmp_path / "text", *(tmp_path / name for name in MODELS)]
    read = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(read.stdout.splitlines()[-1])
    assert {name: difference for name, (difference, _) in found.items() if difference > 1e-5} == {}
    for i, name in enumerate(MODELS):
        assert found[name][1] == made[i % len(made)](TEXT)["input_ids"], name
