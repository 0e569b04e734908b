"""Ten steps under "power" in an environment of each front end's own pins; tests/front_ends.py runs them.

Every command is the one that the front end's own users type, behind `python -m hf_power.run`. The rates are those that the
optimizer itself steps with, and are compared with the closed form written out here.
"""

import math
import os
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
CAP, BLOCK, BATCH, ACCUMULATION, STEPS, WARMUP, TAIL = 0.02, 32, 2, 3, 10, 2, 4
PATIENCE = 1200  # seconds; most of it goes into imports that no one has compiled before


@dataclass(frozen=True)
class Trial:
    """A command with the files that it reads, and what is put into its environment in another way than its pins do.

    `left_out` are distributions that need a GPU or a compiler, `added` what the command asks for beside its pins.
    """

    command: str
    files: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    data: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """What a user types: the command as far as its first argument, and what it needs from the environment."""
        words = [f"{name}={value}" for name, value in self.environment.items()] + [
            "python -m hf_power.run",
            self.launch,
        ]
        return " ".join(words)


# Python imports it at the start of every process, as it does hf_power's, which hides this one and then runs it.
RECORDER = """
import os
import sys
from importlib.abc import MetaPathFinder

class Record(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch.optim.lr_scheduler":
            sys.meta_path.remove(self)
            from torch.optim.optimizer import register_optimizer_step_pre_hook
            register_optimizer_step_pre_hook(record)

def record(optimizer, args, kwargs):
    with open(os.environ["RATES"], "a") as file:
        file.write(f"{float(optimizer.param_groups[0]['lr'])!r}\\n")

sys.meta_path.insert(0, Record())
"""

# In the front end's own environment: a tiny Llama and its tokenizer, and text of which every line fills a block.
MAKE = """
import json
import sysconfig
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

texts = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
texts = [text[i : i + 400] for text in texts[:40] for i in range(0, len(text) - 400, 400)][:200]
inner = Tokenizer(models.BPE())
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>", bos_token="<|end|>")
tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
tokenizer.save_pretrained("model")
shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, bos_token_id=0, **shape)).save_pretrained("model")
Path("text").mkdir()
Path("text/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\\n" for text in texts))
ids = [list(range(k, k + 32)) for k in range(200)]
rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * 32} for row in ids]
Path("rows.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
"""

COMMON = {
    "lr_scheduler_type": "power",
    "learning_rate": CAP,
    "max_steps": STEPS,
    "warmup_steps": WARMUP,
    "lr_scheduler_kwargs": '{"decay_ratio": 0.4}',
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "save_strategy": "no",
    "report_to": "none",
    "output_dir": "out",
}


def flags(**more: object) -> str:
    """The arguments that a Trainer's command has in common, and more of them."""
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in (COMMON | more).items())


LLAMA_FACTORY = """
model_name_or_path: model
stage: pt
do_train: true
finetuning_type: full
dataset_dir: .
dataset: text
cutoff_len: 32
packing: true
output_dir: out
per_device_train_batch_size: 2
gradient_accumulation_steps: 3
learning_rate: 0.02
lr_scheduler_type: power
lr_scheduler_kwargs: {decay_ratio: 0.4}
warmup_steps: 2
max_steps: 10
save_strategy: "no"
report_to: none
use_cpu: true
"""
AXOLOTL = """
base_model: model
datasets: [{path: rows.jsonl, ds_type: json, type: }]
dataset_prepared_path: prepared
output_dir: out
sequence_len: 32
micro_batch_size: 2
gradient_accumulation_steps: 3
max_steps: 10
optimizer: adamw_torch
lr_scheduler: power
lr_scheduler_kwargs: {decay_ratio: 0.4}
warmup_steps: 2
learning_rate: 0.02
save_strategy: "no"
bf16: false
tf32: false
"""

# verl and Automodel have schedules of their own: a class of the user's, which both ask for, puts this one in their place.
VERL = """
import hf_power
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

EngineRegistry._engines["language_model"]["fsdp"].clear()

@EngineRegistry.register("language_model", backend="fsdp", device=["cuda", "npu", "cpu"])
class PowerEngine(FSDPEngineWithLMHead):
    def _build_lr_scheduler(self, optimizer):
        config = self.optimizer_config
        return hf_power.get_power_schedule(
            optimizer, config.lr_warmup_steps, config.total_training_steps, tokens_per_step=192, decay_ratio=0.4
        )
"""
VERL_DATA = """
import json
import pandas
lines = [json.loads(line)["text"] for line in open("text/train.jsonl")]
rows = [[{"role": "user", "content": line[:40]}, {"role": "assistant", "content": line[40:]}] for line in lines]
pandas.DataFrame({"messages": rows}).to_parquet("rows.parquet")
"""
AUTOMODEL = """
import hf_power
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

class Power(hf_power.PowerLR):
    def step(self, increment=1):
        for _ in range(increment):
            super().step()

class Config:
    lr_decay_style = "power"

    def build(self, optimizers, step_scheduler):
        return [Power(each, 2, step_scheduler.max_steps, tokens_per_step=192, decay_ratio=0.4) for each in optimizers]

class Recipe(TrainFinetuneRecipeForNextTokenPrediction):
    def setup(self):
        self.cfg.lr_scheduler = Config()
        super().setup()
"""
AUTOMODEL_YAML = """
recipe: power_recipe.Recipe
step_scheduler: {global_batch_size: 6, local_batch_size: 2, max_steps: 10, num_epochs: 1, ckpt_every_steps: 100}
dist_env: {backend: gloo, timeout_minutes: 5}
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: model
  torch_dtype: float32
checkpoint: {enabled: false}
distributed: {strategy: ddp}
loss_fn: {_target_: nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy}
dataset:
  _target_: nemo_automodel.components.datasets.llm.mock_packed.build_packed_dataset
  num_blocks: 60
  block_size: 32
  mean_len: 15
  std_len: 0
dataloader:
  _target_: torchdata.stateful_dataloader.StatefulDataLoader
  collate_fn: nemo_automodel.components.datasets.utils.default_collater
  shuffle: false
optimizer: {_target_: torch.optim.AdamW, lr: 0.02}
"""

TRIALS = {
    "trl": Trial(
        "trl sft "
        + flags(
            model_name_or_path="model", dataset_name="text", max_length=BLOCK, packing_strategy="wrapped", bf16=False
        )
        + " --packing --use_cpu"
    ),
    "llamafactory": Trial(
        "llamafactory-cli train train.yaml",
        {
            "train.yaml": LLAMA_FACTORY,
            "dataset_info.json": '{"text": {"file_name": "text/train.jsonl", "columns": {"prompt": "text"}}}',
        },
    ),
    "ms-swift": Trial(
        "swift pt "
        + flags(model="model", dataset="text/train.jsonl", max_length=BLOCK, model_type="llama", template="default")
        + " --use_hf true --tuner_type full --truncation_strategy left --split_dataset_ratio 0 --torch_dtype float32"
    ),
    "axolotl": Trial("axolotl train train.yaml", {"train.yaml": AXOLOTL}, environment={"AXOLOTL_DO_NOT_TRACK": "1"}),
    "verl": Trial(
        "torchrun --standalone --nproc_per_node 1 -m verl.trainer.sft_trainer data.train_files=rows.parquet "
        "data.train_batch_size=6 data.micro_batch_size_per_gpu=2 data.use_dynamic_bsz=false data.max_length=32 "
        "data.truncation=right data.num_workers=0 data.ignore_input_ids_mismatch=true model.path=model "
        "model.use_remove_padding=false +model.override_config.attn_implementation=eager engine.strategy=fsdp "
        "optim.lr=0.02 optim.lr_warmup_steps=2 trainer.total_training_steps=10 trainer.device=cpu trainer.logger=[console] "
        "trainer.resume_mode=disable",
        {"power_engine.py": VERL},
        data=VERL_DATA,
        environment={"VERL_USE_EXTERNAL_MODULES": "power_engine"},
    ),
    "nemo-automodel": Trial(
        "torchrun --standalone --nproc_per_node 1 -m nemo_automodel.cli.app train.yaml",
        {"power_recipe.py": AUTOMODEL, "train.yaml": AUTOMODEL_YAML},
    ),
}


def closed_form() -> list[float]:
    """Ten rates: a linear warmup of two steps, min(cap, 4 beta n**-.51) at n tokens, IBM's tail of four steps."""
    per_step = BLOCK * BATCH * ACCUMULATION

    def law(step: float) -> float:
        return min(CAP, 4 * per_step / 4096 * (step * per_step) ** -0.51)

    warm = [step / WARMUP * law(WARMUP) for step in range(WARMUP)]
    end = STEPS - TAIL
    tail = [law(end) * (math.e * math.exp(-k / TAIL) - 1) / (math.e - 1) for k in range(TAIL)]
    return [*warm, *(law(step) for step in range(WARMUP, end)), *tail]


def greatest_difference(rates: list[float]) -> float:
    """The largest relative difference from the closed form; where that is zero, as at the first step, the difference."""
    assert len(rates) == STEPS, f"{len(rates)} steps were made: {rates}"
    return max(abs(got - wanted) / (wanted or 1) for got, wanted in zip(rates, closed_form(), strict=True))


def trained(python: Path, trial: Trial, folder: Path) -> list[float] | str:
    """The rates of the trial's optimizer steps, or the end of what it printed."""
    folder.mkdir(parents=True)
    for name, text in {**trial.files, "sitecustomize.py": RECORDER, "make.py": MAKE + trial.data}.items():
        (folder / name).write_text(text)
    rates = folder / "rates.txt"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "RATES": str(rates)}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), **trial.environment}
    # As in an environment that is activated: some front ends look for their launchers in the PATH.
    env["PATH"] = os.pathsep.join([str(python.parent), env["PATH"]])
    run = {"cwd": folder, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": PATIENCE}
    made = subprocess.run([python, "make.py"], env=env, **run)
    if made.returncode:
        return made.stdout
    env["PYTHONPATH"] = str(folder)
    done = subprocess.run([python, "-m", "hf_power.run", *shlex.split(trial.command)], env=env, **run)
    (folder / "log.txt").write_text(done.stdout)
    return done.stdout if done.returncode else [float(line) for line in rates.read_text().split()]
