"""The scripts under the real launchers, and a stranger's script that knows nothing of hf_power."""

import json
from pathlib import Path

import pytest
import yaml
from hub import Hub, hub_environment
from processes import said_by, torchrun

from hf_power.data.text import DataArguments, load_text
from hf_power.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent

# Arguments by HfArgumentParser, text by `datasets`, blocks by map, stock Trainer: a causal LM script as people have it.
CLM_SCRIPT = """
from dataclasses import dataclass
from itertools import chain
from datasets import load_dataset
from transformers import (AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments,
    default_data_collator)

@dataclass
class DataArguments:
    train_file: str
    tokenizer_name: str
    block_size: int = 32

def main():
    data_args, args = HfArgumentParser((DataArguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(data_args.tokenizer_name)
    raw = load_dataset("json", data_files=data_args.train_file, split="train", cache_dir=args.output_dir + "/cache")
    tokens = raw.map(lambda rows: tokenizer(rows["text"], return_token_type_ids=False, return_attention_mask=False),
        batched=True, remove_columns=raw.column_names)

    def group(rows):
        ids = list(chain(*rows["input_ids"]))
        size = data_args.block_size
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2))
    trainer = Trainer(model=model, args=args, train_dataset=tokens.map(group, batched=True), processing_class=tokenizer,
        data_collator=default_data_collator)
    trainer.train()
    trainer.save_state()

if __name__ == "__main__":
    main()
"""


ACCELERATE = ["-m", "accelerate.commands.launch"]


@pytest.fixture(scope="module")
def recipe(sections, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    sec = sections(folder / "one")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sec))
    return folder


@pytest.mark.slow
def test_accelerate_launch_pretrain_and_anneal(recipe):
    out = said_by(*ACCELERATE, "scripts/pretrain.py", recipe / "tiny.yaml")
    assert "12 steps" in out
    assert "held-out loss" in out
    said_by(*ACCELERATE, "scripts/anneal.py", "--from", recipe / "one" / "checkpoint-8", "--tokens", "256")
    assert (recipe / "one-anneal-8" / "model.safetensors").exists()


@pytest.mark.slow
def test_accelerate_launch_evaluate_and_the_scripts_around_it(recipe, tmp_path):
    run = tmp_path / "run"
    said_by("scripts/pretrain.py", recipe / "tiny.yaml", "--output_dir", run)
    said_by(*ACCELERATE, "scripts/evaluate_model.py", run, "--batch_size", "3")
    one = json.loads((run / "eval.json").read_text())
    torchrun("scripts/evaluate_model.py", run)
    two = json.loads((run / "eval.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-6)
    assert "llama in float32" in said_by("scripts/export.py", run, "--to", "llama")
    with Hub() as hub:
        flags = ["--repo", "tester/plain", "--license", "mit"]
        environment = hub_environment(hub, tmp_path / "home") | {"PYTHONWARNINGS": "ignore"}
        said_by("scripts/publish.py", tmp_path / "run-llama", *flags, **environment)
        weights = hub.files("tester/plain")["model.safetensors"]
    assert weights == (tmp_path / "run-llama" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_processes_push_once(recipe, tmp_path):
    """The first process pushes; with the Hub down the run is finished all the same, and the launcher fails."""
    flags = ["--per_device_train_batch_size", "2", "--push_to_hub", "True", "--license", "mit"]
    flags += ["--hub_strategy", "all_checkpoints"]
    with Hub() as hub:
        environment = hub_environment(hub, tmp_path / "home") | {"PYTHONWARNINGS": "ignore"}
        command = ["scripts/pretrain.py", recipe / "tiny.yaml", *flags, "--output_dir"]
        out = torchrun(*command, tmp_path / "r", **environment)
        assert out.count("tester/r: complete") == 1
        assert set(hub.repos["tester/r"].branches) == {
            *("main", "trunk-512-tokens", "trunk-1.024k-tokens", "decay-1.536k-tokens")
        }
        hub.down()
        failed = torchrun(*command, tmp_path / "down", fails=True, **environment)
    assert "NOT complete; the model is safe in" in failed
    assert (tmp_path / "down" / "model.safetensors").read_bytes() == (tmp_path / "r" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["one import", "hf_power.run", "accelerate launch -m hf_power.run"])
def test_a_stranger_s_causal_lm_script(corpus, tmp_path, how):
    """Only the command line says power; the learning rate of every step is the closed form."""
    script = tmp_path / "clm.py"
    script.write_text(("import hf_power\n" if how == "one import" else "") + CLM_SCRIPT)
    args = DataArguments(dataset=str(corpus), vocab_size=400, data_cache_dir=str(tmp_path / "cache"))
    tokenizer = tmp_path / "tokenizer"
    load_tokenizer(args, load_text(args)[0]).save_pretrained(tokenizer)
    flags = f"--train_file {corpus} --tokenizer_name {tokenizer} --output_dir {tmp_path / 'out'} --use_cpu True"
    flags += " --lr_scheduler_type power --learning_rate 0.02 --max_steps 10 --logging_steps 1 --disable_tqdm True"
    flags += " --per_device_train_batch_size 2 --gradient_accumulation_steps 3 --save_strategy no --report_to none"
    before = {
        "one import": [],
        "hf_power.run": ["-m", "hf_power.run"],
        "accelerate launch -m hf_power.run": [*ACCELERATE, "-m", "hf_power.run"],
    }[how]
    said_by(*before, script, *flags.split(), stock=True)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "loss" in entry}
    per_step = 2 * 3 * 32
    law = [min(0.02, 4.0 * per_step / 4096 * (k * per_step) ** -0.51) if k else 0.02 for k in range(9)]
    assert [rates[k + 1] for k in range(9)] == pytest.approx(law, rel=1e-12)  # the tenth step is the tail's only one
    assert rates[10] == pytest.approx(4.0 * per_step / 4096 * (9 * per_step) ** -0.51, rel=1e-12)
