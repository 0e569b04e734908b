"""Pretrain or continue a causal language model with the stock Trainer, Power, and muP if a base width is given.

This is an ordinary script; the lines with hf_power are marked. See README.md in this folder for how it is called.
"""

from dataclasses import dataclass
from itertools import chain

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import hf_power  # Registers lr_scheduler_type="power".


@dataclass
class ModelArguments:
    """The text, and the model: a config (trained from scratch) or a checkpoint (trained further)."""

    train_file: str
    tokenizer_name: str
    config_name: str | None = None
    model_name_or_path: str | None = None
    base_width: int | None = None
    block_size: int = 1024


def main() -> None:
    """Cut the text into blocks, make the model, and train it."""
    own, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(own.tokenizer_name)
    text = load_dataset("json", data_files=own.train_file, split="train")

    def blocks(rows):
        ids = list(chain(*tokenizer(rows["text"], return_attention_mask=False)["input_ids"]))
        cut = [ids[i : i + own.block_size] for i in range(0, len(ids) - own.block_size + 1, own.block_size)]
        return {"input_ids": cut, "labels": cut}

    dataset = text.map(blocks, batched=True, remove_columns=text.column_names)
    factory = {}
    if own.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(own.model_name_or_path)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(own.config_name))
        if own.base_width:
            hf_power.mup_init_(model, base_width=own.base_width)  # muP's initialization.
    if own.base_width:
        factory["optimizer_cls_and_kwargs"] = hf_power.MupAdamW.for_trainer(args)  # muP's learning rates.
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        **factory,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
