"""Supervised fine-tuning with TRL under Power: the schedule is the only thing that hf_power adds."""

from dataclasses import dataclass

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

import hf_power  # noqa: F401 Registers lr_scheduler_type="power".


@dataclass
class ModelArguments:
    """The text and the model."""

    train_file: str
    model_name_or_path: str


def main() -> None:
    """Train the model on the column "text"."""
    own, args = HfArgumentParser((ModelArguments, SFTConfig)).parse_args_into_dataclasses()
    dataset = load_dataset("json", data_files=own.train_file, split="train").select_columns("text")
    trainer = SFTTrainer(own.model_name_or_path, args=args, train_dataset=dataset)
    trainer.train()
    trainer.save_model()
    trainer.save_state()


if __name__ == "__main__":
    main()
