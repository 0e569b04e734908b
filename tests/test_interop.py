"""Other people's code, as it is: every optimizer step has the closed form's learning rate.

The rates are those that the optimizer itself steps with, not those that a front end writes into its log.
"""

import json
import math
import os
import subprocess

import pytest
from processes import PATIENCE, free_port
from transformers import LlamaConfig, LlamaForCausalLM
from warm import ROOT, python

from hf_power.data.text import DataArguments, load_text
from hf_power.data.tokenizer import load_tokenizer

pytestmark = [pytest.mark.elsewhere, pytest.mark.slow]

RUN = ["-m", "hf_power.run"]
ACCELERATE = ["-m", "accelerate.commands.launch"]
LAUNCHERS = pytest.mark.parametrize("launcher", [[], ACCELERATE], ids=["python", "accelerate"])
CPUS = ROOT / "scripts" / "accelerate" / "cpu.yaml"
CAP, BLOCK, BATCH, ACCUMULATION, STEPS = 0.02, 32, 2, 3, 10
TOKENS = BLOCK * BATCH * ACCUMULATION  # of one optimizer step

# Python imports it at the start of every process: the launched command stays the one that a user types.
RECORDER = """
import os
from torch.optim.optimizer import register_optimizer_step_pre_hook

def record(optimizer, args, kwargs):
    with open(os.environ["RATES"] + os.environ.get("RANK", ""), "a") as file:
        file.write(f"{float(optimizer.param_groups[0]['lr'])!r}\\n")

register_optimizer_step_pre_hook(record)
"""


def law(n, tokens_per_step=TOKENS, a=4.0, b=-0.51):
    return min(CAP, a * tokens_per_step / 4096 * n**b) if n else CAP


def closed_form(warmup=0, tail=1, before=0, tokens=TOKENS):
    """Rates of STEPS steps: linear warmup to the law, the law, IBM's exponential tail; lengths in steps."""
    rates = []
    for step in range(STEPS):
        n, end = before + step * tokens, before + (STEPS - tail) * tokens
        if step < warmup:
            rates.append(step / warmup * law(warmup * tokens, tokens))
        elif n < end:
            rates.append(law(n, tokens))
        else:
            x = (n - end) / (tail * tokens)
            rates.append(law(end, tokens) * (math.e * math.exp(-x) - 1) / (math.e - 1))
    return pytest.approx(rates, rel=1e-9, abs=1e-12)


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    """A tiny Llama with its tokenizer, as it would lie on a disk."""
    folder = tmp_path_factory.mktemp("interop")
    args = DataArguments(dataset=str(corpus), vocab_size=400, data_cache_dir=str(folder / "cache"))
    tokenizer = load_tokenizer(args, load_text(args)[0])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def rates(tmp_path):
    """Run a command in an empty folder; the learning rates of its optimizer steps come back."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORDER)

    def launch(*command, processes=1, **environment):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "RATES": str(tmp_path / "rates.txt")}
        env |= {"PYTHONPATH": str(tmp_path / "site"), "HF_HOME": str(tmp_path / "home"), **environment}
        arguments = [python(stock=True), *(str(part) for part in command)]
        out = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=PATIENCE)
        assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
        files = sorted(tmp_path.glob("rates.txt*"))
        assert len(files) == processes
        ranks = [[float(line) for line in file.read_text().split()] for file in files]
        assert all(rank == ranks[0] for rank in ranks)
        return ranks[0]

    return launch


RAW_LOOP = """
import sys
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, get_scheduler

accelerator = Accelerator(gradient_accumulation_steps=3)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
data = torch.utils.data.DataLoader(torch.randint(0, 400, (60 * accelerator.num_processes, 32)), batch_size=2)
scheduler = get_scheduler("power", optimizer, num_warmup_steps=2 * accelerator.num_processes,
    num_training_steps=10 * accelerator.num_processes,
    scheduler_specific_kwargs={"tokens_per_step": 3 * 2 * 32, "decay_ratio": 0.4, "min_lr_ratio": 0.0})
model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
for batch in data:
    with accelerator.accumulate(model):
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
"""


@LAUNCHERS
def test_a_raw_accelerate_loop(checkpoint, rates, tmp_path, launcher):
    """prepare(), accumulation, a warmup of 2 steps, and a tail of 40 % of the run."""
    (tmp_path / "loop.py").write_text(RAW_LOOP)
    assert rates(*launcher, *RUN, "loop.py", checkpoint) == closed_form(warmup=2, tail=4)


def test_a_raw_accelerate_loop_on_two_processes(checkpoint, rates, tmp_path):
    """The lengths are multiplied, for the prepared scheduler is stepped once for each process."""
    (tmp_path / "loop.py").write_text(RAW_LOOP)
    launcher = [*ACCELERATE, "--config_file", CPUS, "--main_process_port", free_port()]
    assert rates(*launcher, *RUN, "loop.py", checkpoint, processes=2) == closed_form(warmup=2, tail=4)


CONTINUE = """
from dataclasses import dataclass
import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

@dataclass
class ModelArguments:
    model_name_or_path: str

given, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
blocks = torch.randint(0, 400, (60, 32))
data = [{"input_ids": block, "labels": block} for block in blocks]
Trainer(AutoModelForCausalLM.from_pretrained(given.model_name_or_path), args, train_dataset=data).train()
"""


def trainer_flags(**more):
    flags = {
        "output_dir": "out",
        "lr_scheduler_type": "power",
        "learning_rate": CAP,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "save_strategy": "no",
        "report_to": "none",
        **more,
    }
    return [part for name, value in flags.items() for part in (f"--{name}", value)]


def test_continual_pretraining(checkpoint, rates, tmp_path):
    """A checkpoint that has seen a billion tokens goes on at eta(1e9), not at the cap."""
    (tmp_path / "clm.py").write_text(CONTINUE)
    flags = trainer_flags(model_name_or_path=checkpoint, lr_scheduler_kwargs='{"tokens_seen": 1000000000}')
    got = rates(*RUN, "clm.py", *flags)
    assert got[0] == pytest.approx(4.0 * TOKENS / 4096 * 1e9**-0.51, rel=1e-9)
    assert got == closed_form(before=1_000_000_000)


def test_a_trainer_script_on_two_processes(checkpoint, rates, tmp_path):
    """Each process has its own batch: a step has twice the tokens, and both processes have the same rates."""
    (tmp_path / "clm.py").write_text(CONTINUE)
    launcher = [*ACCELERATE, "--config_file", CPUS, "--main_process_port", free_port()]
    flags = trainer_flags(model_name_or_path=checkpoint, lr_scheduler_kwargs='{"tokens_seen": 1000000}')
    got = rates(*launcher, *RUN, "clm.py", *flags, processes=2)
    assert got == closed_form(before=1_000_000, tokens=2 * TOKENS)


@LAUNCHERS
def test_trl_sft(corpus, checkpoint, rates, tmp_path, launcher):
    """TRL's own script, packed; tokens_per_step is found."""
    pytest.importorskip("trl")
    data = tmp_path / "text"
    data.mkdir()
    (data / "train.jsonl").symlink_to(corpus)
    flags = trainer_flags(model_name_or_path=checkpoint, dataset_name=data, max_length=BLOCK)
    flags += ["--packing", "--packing_strategy", "wrapped", "--use_cpu", "--bf16", "False"]
    assert rates(*launcher, *RUN, "-m", "trl.scripts.sft", *flags) == closed_form()


def test_ms_swift(corpus, checkpoint, rates):
    """ms-swift's pretraining command; tokens_per_step is found through its own dataset and collator."""
    pytest.importorskip("swift")
    flags = trainer_flags(model=checkpoint, dataset=corpus, max_length=BLOCK)
    flags += ["--model_type", "llama", "--template", "default", "--use_hf", "true", "--tuner_type", "full"]
    flags += ["--truncation_strategy", "left", "--split_dataset_ratio", "0", "--torch_dtype", "float32"]
    assert rates(*RUN, "-m", "swift.cli.pt", *flags) == closed_form()


AXOLOTL = """
base_model: {model}
datasets: [{{path: {rows}, ds_type: json, type: }}]
dataset_prepared_path: prepared
output_dir: out
sequence_len: 32
micro_batch_size: 2
gradient_accumulation_steps: 3
max_steps: 10
optimizer: adamw_torch
lr_scheduler: power
learning_rate: 0.02
save_strategy: "no"
bf16: false
tf32: false
"""


def test_axolotl(checkpoint, rates, tmp_path):
    """axolotl's yaml with lr_scheduler: power, on tokenized blocks; tokens_per_step is found."""
    pytest.importorskip("axolotl")
    ids = list(range(BLOCK))
    row = json.dumps({"input_ids": ids, "labels": ids, "attention_mask": [1] * BLOCK})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 60)
    (tmp_path / "axolotl.yaml").write_text(AXOLOTL.format(model=checkpoint, rows=tmp_path / "rows.jsonl"))
    got = rates(*RUN, "-m", "axolotl.cli.train", "axolotl.yaml", AXOLOTL_DO_NOT_TRACK="1")
    assert got == closed_form()


LIGHTNING = """
import sys
import lightning
import torch
from transformers import AutoModelForCausalLM, get_scheduler

class Language(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(sys.argv[1])

    def training_step(self, batch):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        scheduler = get_scheduler("power", optimizer, num_warmup_steps=2, num_training_steps=10,
            scheduler_specific_kwargs={"tokens_per_step": 3 * 2 * 32})
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

data = torch.utils.data.DataLoader(torch.randint(0, 400, (60, 32)), batch_size=2)
lightning.Trainer(accelerator="cpu", max_steps=10, accumulate_grad_batches=3, logger=False,
    enable_checkpointing=False).fit(Language(), data)
"""


def test_lightning(checkpoint, rates, tmp_path):
    """Lightning's loop with the scheduler of transformers, stepped every optimizer step."""
    pytest.importorskip("lightning")
    (tmp_path / "fit.py").write_text(LIGHTNING)
    assert rates(*RUN, "fit.py", checkpoint) == closed_form(warmup=2)


SENTENCES = """
import sys
from datasets import Dataset
from sentence_transformers import (SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments,
    losses, models)

words = models.Transformer(sys.argv[1], max_seq_length=32)
model = SentenceTransformer(modules=[words, models.Pooling(words.get_word_embedding_dimension())], device="cpu")
data = Dataset.from_dict({"anchor": ["return self"] * 60, "positive": ["import os"] * 60})
args = SentenceTransformerTrainingArguments("out", lr_scheduler_type="power", learning_rate=0.02, max_steps=10,
    per_device_train_batch_size=2, gradient_accumulation_steps=3, save_strategy="no", report_to="none", use_cpu=True,
    lr_scheduler_kwargs={"tokens_per_step": 3 * 2 * 32})
SentenceTransformerTrainer(model, args, data, loss=losses.MultipleNegativesRankingLoss(model)).train()
"""


def test_sentence_transformers(checkpoint, rates, tmp_path):
    """Pairs of texts have no one length: tokens_per_step is given."""
    pytest.importorskip("sentence_transformers")
    (tmp_path / "embed.py").write_text(SENTENCES)
    assert rates(*RUN, "embed.py", checkpoint) == closed_form()
