"""TRL's trainer as unsloth replaces it, which asks to be imported before everything else."""

import unsloth  # noqa: F401
from datasets import load_dataset
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl import SFTConfig, SFTTrainer

args = HfArgumentParser(SFTConfig).parse_args_into_dataclasses()[0]
rows = load_dataset("json", data_files="rows.jsonl", split="train")
SFTTrainer(AutoModelForCausalLM.from_pretrained("model"), args, train_dataset=rows).train()
