"""From a tuned cosine to Power: python benchmarks/from_cosine.py [--workers 2]; goes on where it was stopped.

A GPT-2 in standard parameterization learns Python's standard library under transformers' cosine at several peaks, and
under Power with the numbers that follow from the best of them. The cells of "choose" are those on which the rule of
`hf_power.schedule.cosine` was chosen; the cells of "report" took no part in that, and are what the table is of.
Rows: benchmarks/results/from_cosine.jsonl, one per run; the table: from_cosine.md beside them.
"""

import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

ROWS = Path(__file__).resolve().parent / "results" / "from_cosine.jsonl"
BLOCK, VOCABULARY, MICRO = 128, 512, 32
SIZES = {"0.01M": (16, 1), "0.04M": (32, 2), "2.6M": (192, 6)}


def text_tokens(folder):
    """Training and held-out tokens of the standard library, from a tokenizer that is trained on it."""
    stored = folder / "tokens.npy"
    if not stored.exists():
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        files = [path for path in files if "site-packages" not in path.parts]
        order = np.random.default_rng(0).permutation(len(files))
        texts = [files[i].read_text(errors="ignore") for i in order]
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts[::20], vocab_size=VOCABULARY, show_progress=False)
        ids = [np.array(each.ids, dtype=np.int16) for each in tokenizer.encode_batch(texts)]
        np.save(stored, np.concatenate(ids))
    tokens = np.load(stored).astype(np.int64)
    held = 128 * BLOCK
    blocks = torch.from_numpy(tokens[: len(tokens) // BLOCK * BLOCK]).view(-1, BLOCK)
    return blocks[held // BLOCK :], blocks[: held // BLOCK]


def train(job, folder):
    """One run: its held-out loss, and what it took."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    blocks, held = text_tokens(folder)
    torch.manual_seed(job["seed"])
    width, layers = SIZES[job["size"]]
    sizes = {
        "vocab_size": VOCABULARY,
        "n_positions": BLOCK,
        "n_embd": width,
        "n_layer": layers,
        "n_head": max(1, width // 32),
    }
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ends, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    kwargs = {} if job["schedule"] == "cosine" else {"tokens_per_step": job["tokens_per_step"], **job["kwargs"]}
    schedule = get_scheduler(job["schedule"], optimizer, job["warmup"], job["steps"], scheduler_specific_kwargs=kwargs)
    rows = job["tokens_per_step"] // BLOCK
    order = np.random.default_rng(job["seed"]).permutation(len(blocks))
    for step in range(job["steps"]):
        batch = blocks[order.take(range(step * rows, (step + 1) * rows), mode="wrap")]
        for part in batch.split(MICRO):
            loss = model(part, labels=part).loss * (len(part) / rows)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    with torch.no_grad():
        losses = [model(part, labels=part).loss.item() for part in held.split(MICRO)]
    return {**job, "loss": float(np.mean(losses)), "seconds": round(time.perf_counter() - began, 1)}
