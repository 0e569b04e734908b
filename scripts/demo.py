"""make demo: pretrain a small muP Llama on real text under the Power schedule, anneal it, and show what came out."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_power.checkpoints.seal import checkpoints
from hf_power.cli import parse_settings
from hf_power.cli.dispatch import with_exit_code
from hf_power.data.order import BlockStream, spread_blocks
from hf_power.data.packing import pack
from hf_power.data.text import load_text
from hf_power.pretrain import run as train
from hf_power.pretrain.anneal import anneal
from hf_power.pretrain.start import tokens_per_step
from hf_power.records.errors import UserError
from hf_power.settings.sections import parse_tokens
from hf_power.settings.settings import Settings

RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"
PROMPT = "def __init__(self, "


def main(argv: list[str]) -> int:
    """Pretrain, anneal, compare, sample; arguments override the recipe."""
    settings = parse_settings([str(RECIPE), *argv])
    settings.check()
    check_num_checkpoints(settings)
    folder = free_folder(Path(settings.training.output_dir or ""))
    settings.training.output_dir = str(folder)
    trunk = train.pretrain(settings)
    steps, per_step = trunk.steps, trunk.tokens_per_step
    checkpoint = checkpoints(folder)[1]  # the last but one: its tail ends at the tokens where the trunk ended
    tail = (steps - int(checkpoint.name.split("-")[1])) * per_step
    annealed = anneal(checkpoint, str(tail))
    annealed_folder = folder.with_name(annealed.name)

    tokenizer = AutoTokenizer.from_pretrained(annealed_folder)
    texts = load_text(settings.data)
    block = settings.data.block_size
    blocks = pack(texts.train, tokenizer, block_size=block, num_proc=settings.data.num_proc)
    held_out = pack(texts.held_out, tokenizer, block_size=block, num_proc=settings.data.num_proc)
    seen = BlockStream(blocks, seed=settings.training.seed, start=0, stop=trunk.tokens_seen // block)
    num_scored = parse_tokens(settings.run.max_eval_tokens, "max_eval_tokens") // block
    scored = spread_blocks(held_out, num_scored)[:]["input_ids"]
    baselines = ngram_losses(
        np.stack([row["input_ids"] for row in seen.__getitems__(list(range(len(seen))))]), scored, len(tokenizer)
    )

    rows = [
        ("unigram of the same tokens", baselines["unigram"]),
        ("bigram of the same tokens", baselines["bigram"]),
        ("trunk: Power schedule, no decay", trunk.held_out_loss),
        (f"annealed from {checkpoint.name}", annealed.held_out_loss),
    ]
    print(f"\nHeld-out files of the standard library, each after {trunk.tokens_seen:,} training tokens:")
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


def check_num_checkpoints(settings: Settings) -> None:
    """Refuse a trunk with fewer than two checkpoints, because the tail begins at the last but one."""
    args, tokens = settings.training, settings.run.tokens or 0
    steps = math.ceil(tokens / tokens_per_step(settings))
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    if args.save_strategy != "steps":
        raise UserError(
            f"the demo anneals from a checkpoint of its trunk, got save_strategy={args.save_strategy.value}: leave it out."
        )
    if steps <= every:
        raise UserError(
            f"the demo anneals from the last but one checkpoint of its trunk, and {tokens:,} tokens are {steps:,} steps with one "
            f"checkpoint (save_steps={args.save_steps:g}): raise tokens, or lower save_steps."
        )


def ngram_losses(train_blocks: object, held_out_blocks: object, vocab_size: int) -> dict[str, float]:
    """Loss of a unigram and a bigram model on the positions that a causal model is scored on.

    Unigram: ``P1(w) = (N(w) + 1) / (N + V)`` (add-one). Bigram: Witten-Bell,
    ``P2(w | v) = (N(v, w) + T(v) * P1(w)) / (N(v) + T(v))`` with T(v) the number of distinct successors of v; after a
    token that was never seen, P1.

    Args:
        train_blocks: token ids the counts come from, shape (blocks, block_size).
        held_out_blocks: token ids to be scored, shape (blocks, block_size); the first of each block is context only.
        vocab_size: V.

    Returns:
        {"unigram": nats per token, "bigram": nats per token}.

    >>> losses = ngram_losses([[0, 1, 0, 1]], [[0, 1]], vocab_size=2)
    >>> round(float(np.exp(-losses["unigram"])), 4), round(float(np.exp(-losses["bigram"])), 4)  # 3/6, (2 + .5)/(2 + 1)
    (0.5, 0.8333)
    """
    train, held_out = np.asarray(train_blocks, dtype=np.int64), np.asarray(held_out_blocks, dtype=np.int64)
    counts = np.bincount(train.ravel(), minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    pairs, pair_counts = np.unique(train[:, :-1].ravel() * vocab_size + train[:, 1:].ravel(), return_counts=True)
    contexts = pairs // vocab_size
    seen = np.bincount(contexts, weights=pair_counts, minlength=vocab_size)
    distinct = np.bincount(contexts, minlength=vocab_size)

    context, target = held_out[:, :-1].ravel(), held_out[:, 1:].ravel()
    wanted = context * vocab_size + target
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, pair_counts[place], 0)
    # After a token that was never seen, all weight is on the unigram.
    weight = np.maximum(distinct[context], seen[context] == 0)
    bigram = (count + weight * unigram[target]) / (seen[context] + weight)
    return {"unigram": float(-np.log(unigram[target]).mean()), "bigram": float(-np.log(bigram).mean())}


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
    sys.exit(with_exit_code("demo", lambda: main(sys.argv[1:])))
