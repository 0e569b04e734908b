"""A Trainer as anyone writes it."""

from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

args = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()[0]
rows = [{"input_ids": ids, "labels": ids} for ids in (list(range(k, k + 32)) for k in range(60))]
Trainer(AutoModelForCausalLM.from_pretrained("model"), args, train_dataset=rows).train()
