"""make demo: pretrain a small muP Llama on real text under the Power schedule, anneal it, and show what came out."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_power.checkpoints.seal import checkpoints
from hf_power.cli import parse_settings, run_verb
from hf_power.data import blocks as data
from hf_power.data.text import load_text
from hf_power.evaluate.heldout import ngram_losses
from hf_power.pretrain import run as train
from hf_power.settings.settings import parse_tokens

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
PROMPT = "def __init__(self, "


def main(argv: list[str]) -> int:
    """Pretrain, anneal, compare, sample; arguments override the recipe."""
    settings = parse_settings([str(RECIPE), *argv])
    folder = free_folder(Path(settings.training.output_dir or ""))
    settings.training.output_dir = str(folder)
    trunk = train.pretrain(settings)
    steps, per_step = trunk["steps"], trunk["tokens_per_step"]
    checkpoint = checkpoints(folder)[1]  # the last but one: its tail ends at the tokens where the trunk ended
    tail = (steps - int(checkpoint.name.split("-")[1])) * per_step
    annealed = train.anneal(checkpoint, str(tail))
    annealed_folder = folder.with_name(annealed["name"])

    tokenizer = AutoTokenizer.from_pretrained(annealed_folder)
    train_text, held_out_text = load_text(settings.data)
    block = settings.data.block_size
    blocks = data.pack(train_text, tokenizer, block_size=block, num_proc=settings.data.num_proc)
    held_out = data.pack(held_out_text, tokenizer, block_size=block, num_proc=settings.data.num_proc)
    seen = data.BlockStream(blocks, seed=settings.training.seed, start=0, stop=trunk["tokens_seen"] // block)
    num_scored = parse_tokens(settings.run.max_eval_tokens, "max_eval_tokens") // block
    scored = data.spread_blocks(held_out, num_scored)[:]["input_ids"]
    baselines = ngram_losses(
        np.stack([row["input_ids"] for row in seen.__getitems__(list(range(len(seen))))]), scored, len(tokenizer)
    )

    rows = [
        ("unigram of the same tokens", baselines["unigram"]),
        ("bigram of the same tokens", baselines["bigram"]),
        ("trunk: Power schedule, no decay", trunk["held_out_loss"]),
        (f"annealed from {checkpoint.name}", annealed["held_out_loss"]),
    ]
    print(f"\nHeld-out files of the standard library, each after {trunk['tokens_seen']:,} training tokens:")
    print(f"  {'':<34} {'nats/token':>10} {'perplexity':>11}")
    for name, loss in rows:
        print(f"  {name:<34} {loss:>10.4f} {math.exp(loss):>11.1f}")
    print(f"\nWhat the annealed model writes after {PROMPT!r}:\n{sample(annealed_folder, tokenizer)}\n")
    print(f"trunk     {folder}/ ({len(checkpoints(folder))} checkpoints, run.json, lr_and_loss.png)")
    print(f"finished  {annealed_folder}/ (loads with AutoModelForCausalLM.from_pretrained, no hf_power needed)")
    print(
        "\nNext:  is muP right for the shape?  .venv/bin/hf-power coord-check scripts/recipes/demo.yaml\n"
        f"       another tail from any trunk checkpoint:  .venv/bin/hf-power anneal --from {checkpoint} --tokens 5%\n"
        f"       a plain Llama with the same logits:  .venv/bin/hf-power export {annealed_folder} --to llama\n"
        "       your own text:  .venv/bin/hf-power pretrain scripts/recipes/demo.yaml --dataset my.jsonl --output_dir runs/mine"
    )
    return 0


def free_folder(folder: Path) -> Path:
    """The folder, or with -2, -3 ... where an earlier demo lies."""
    names = [folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())


def sample(folder: Path, tokenizer: object) -> str:
    """100 tokens after the prompt, drawn at temperature 0.7."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)  # type: ignore[operator]
    output = model.generate(
        **prompt, max_new_tokens=100, do_sample=True, temperature=0.7, pad_token_id=tokenizer.eos_token_id
    )  # type: ignore[attr-defined]
    return str(tokenizer.decode(output[0]))  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(run_verb("demo", function=main))
