"""Held-out evaluation of any causal language model, and n-gram baselines from the same tokens."""

import dataclasses
import glob
import hashlib
import os
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import tqdm

from hf_power.checkpoints.locate import find_model, weights_sha256
from hf_power.checkpoints.seal import RUN_FILE
from hf_power.data.blocks import collate_blocks, load_tokenizer, pack, spread_blocks, tokenizer_fingerprint
from hf_power.data.text import PYTHON_STDLIB, DataArguments, load_text
from hf_power.evaluate.metrics.token_bytes import token_bytes
from hf_power.records.errors import MissingPackageError, NotFoundError, UserError, refused_by
from hf_power.records.files import write_json
from hf_power.records.machine import hardware, versions
from hf_power.records.schema import EVALUATION, read_object, read_run

SCHEMA = 1
EVAL_FILE = "eval.json"
DTYPES = ("float32", "bfloat16", "float16", "float64")
METRIC = Path(__file__).parent / "metrics" / "language_modeling.py"


def load_metric() -> Any:
    """The metric hf_power/metrics/language_modeling.py, as `evaluate.load` gives it; needs no network.

    ``load_metric().compute(nll=..., num_tokens=..., num_correct=..., num_bytes=...)``, one entry per sequence, returns
    loss, perplexity, accuracy and bits_per_byte.

    Raises:
        ImportError: if evaluate is missing; the sentence names the extra.
    """
    try:
        import evaluate  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingPackageError('evaluate is needed and not installed: run pip install "hf_power[train]".') from error
    return evaluate.load(str(METRIC), keep_in_memory=True)


def evaluate_model(
    model: str | os.PathLike[str],
    data: DataArguments,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: str | None = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Loss, perplexity, accuracy and bits per byte of a causal language model on held-out text, into eval.json.

    The text is packed as in pretraining, with the model's own tokenizer; the first token of each block is context only.
    Under accelerate, on any number of processes, each holds the whole model. Neither their number nor the batch size
    changes the numbers beyond the rounding of the model's own matrix products.

    Args:
        model: folder of a model (run, checkpoint, export), or a Hub repository.
        data: the held-out part of it is scored (``eval_split="train"`` scores all of a file); tokenizer is not used.
        batch_size: blocks per process and step, >= 1.
        max_tokens: blocks spread evenly over the text with so many tokens in all, at least one; None for all.
        dtype: one of DTYPES; None for the one that the weights were saved in.
        output: JSON file to write; by default eval.json in the folder. Results of `hf_power.evaluate.tasks.run_tasks` in it stay
            if they are of the same weights.
        progress: show a bar.

    Returns:
        The content of the file: metrics (loss in nats per token), num_tokens scored, and what made them.

    Raises:
        ValueError, FileNotFoundError: bad input, before the model is loaded.
        ImportError: if evaluate or datasets is missing.
    """
    _check_numbers(batch_size, max_tokens, dtype, data.block_size)
    metric, accelerator = load_metric(), Accelerator()
    with accelerator.main_process_first():
        folder, about = find_model(model)
    about["weights_sha256"] = weights_sha256(folder)
    path = output_path(folder, about, output)
    with refused_by(str(folder / "config.json")):
        config = AutoConfig.from_pretrained(folder).get_text_config()
    _check_block_size(config, data.block_size)
    with accelerator.main_process_first():
        blocks, tokenizer, provenance = _held_out_blocks(folder, data, max_tokens, config.vocab_size)
    network = _load_model(folder, dtype).to(accelerator.device).eval()
    about["parameters"] = network.num_parameters()
    loader = accelerator.prepare(torch.utils.data.DataLoader(blocks, batch_size, collate_fn=collate_blocks))
    start, sizes = time.perf_counter(), token_bytes(tokenizer)
    columns = _score(network, loader, sizes, accelerator, progress)
    num_bytes = {} if sizes is None else {"num_bytes": sum(columns["num_bytes"])}
    result = {
        "schema": SCHEMA,
        "model": about,
        "metrics": metric.compute(**columns),
        "num_tokens": sum(columns["num_tokens"]),
        **num_bytes,
        "data": provenance,
        "dtype": str(network.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "processes": accelerator.num_processes,
        "versions": versions() | {"evaluate": version("evaluate")},
        "hardware": hardware(SimpleNamespace(device=accelerator.device, world_size=accelerator.num_processes)),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if accelerator.is_main_process:
        write_eval(path, result)
    return result


def data_of_run(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], int | None]:
    """The data settings of the run.json in a folder, and how many held-out tokens the run scored; ({}, None) without."""
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        return {}, None
    run = read_run(Path(folder), required=("settings.data", "data.held_out_tokens"))
    return run["settings"]["data"], run["data"]["held_out_tokens"]


def scores_text(scores: dict[str, Any]) -> str:
    """Metrics, or tasks with their metrics, for a person: a line each."""
    lines = []
    for name, value in scores.items():
        parts = value if isinstance(value, dict) else {"": value}
        lines += [f"  {f'{name} {what}':<40} {number:.6g}" for what, number in parts.items()]
    return "\n".join(lines)


def output_path(folder: Path, about: dict[str, Any], output: str | os.PathLike[str] | None) -> Path:
    """Where the results go: `output`, or eval.json in a folder that is not the Hub's cache; checked before the work.

    Raises:
        ValueError: no output for a Hub repository, or a file there that is no eval.json.
        FileNotFoundError: the output's folder does not exist.
    """
    if output is None and "revision" in about:
        raise UserError(f"output is missing: name the JSON file for the results of {about['name']}, e.g. eval.json.")
    path = folder / EVAL_FILE if output is None else Path(output)
    if not path.parent.is_dir() or path.is_dir():
        raise NotFoundError(f"output must be a file in a folder that exists, got {path}: make the folder first.")
    _read_eval(path)
    return path


def write_eval(path: Path, result: dict[str, Any]) -> None:
    """Write results as eval.json; those of another kind that are there stay, if they are of the same weights."""
    before = _read_eval(path)
    same = before.get("model", {}).get("weights_sha256") == result["model"]["weights_sha256"]
    if same:
        for key in {"model", "tasks", "tasks_settings"} & set(before) & set(result):
            result[key] = before[key] | result[key]
        result = before | result
    write_json(path, result)


def _read_eval(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_object(path, EVALUATION)
    except UserError as error:
        raise UserError(f"{path} is no {EVAL_FILE} of schema {SCHEMA}: delete it, or name another output.") from error


def _check_numbers(batch_size: int, max_tokens: int | None, dtype: str | None, block_size: int) -> None:
    for name, value, smallest in (("batch_size", batch_size, 1), ("block_size", block_size, 2)):
        if value < smallest:
            raise UserError(f"{name} must be at least {smallest}, got {value}: raise it.")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}: leave it out to score all tokens.")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def _check_block_size(config: Any, block_size: int) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and block_size > longest:
        raise UserError(
            f"block_size is {block_size}, but the model's max_position_embeddings are {longest}: pass a block_size of at "
            f"most {longest}."
        )


def _held_out_blocks(
    folder: Path, data: DataArguments, max_tokens: int | None, vocab_size: int
) -> tuple[Any, Any, dict[str, Any]]:
    """Blocks to score, the model's tokenizer, and what the record says of them."""
    if not list(folder.glob("tokenizer*")):
        raise UserError(f"{folder} has no tokenizer: save the model's tokenizer into it.")
    tokenizer = load_tokenizer(dataclasses.replace(data, tokenizer=str(folder)), None)
    _, text = load_text(data)
    blocks = pack(text, tokenizer, block_size=data.block_size, num_proc=data.num_proc)
    if max_tokens is not None:
        blocks = spread_blocks(blocks, max(1, max_tokens // data.block_size))
    elif data.streaming:
        blocks = list(blocks)
    digest = hashlib.sha256()  # of the scored tokens themselves, wherever the data lie
    for block in blocks:
        ids = block["input_ids"]
        if ids.max() >= vocab_size:
            raise UserError(f"the text has the token {ids.max()}, but the model has {vocab_size}: mend its tokenizer.")
        digest.update(ids.astype("<i4").tobytes())
    about = {"tokenizer": tokenizer_fingerprint(tokenizer), "block_size": data.block_size}
    return blocks, tokenizer, _data_record(data) | {"fingerprint": digest.hexdigest()[:16]} | about


def _data_record(data: DataArguments) -> dict[str, Any]:
    record: dict[str, Any] = {"dataset": _public_name(data.dataset)}
    if data.dataset_config is not None:
        record["config_name"] = data.dataset_config
    if data.dataset != PYTHON_STDLIB:
        record["split"] = data.eval_split or data.split
    if data.eval_split is None and not data.streaming:
        record["eval_fraction"] = data.eval_fraction
    return record


def _public_name(dataset: str) -> str:
    """A Hub id as it is; of a path the last part only."""
    path = Path(dataset).expanduser()
    if glob.has_magic(dataset):
        return path.name
    return path.resolve().name if path.exists() else dataset


def _load_model(folder: Path, dtype: str | None) -> Any:
    network, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(
            f"{folder} lacks {len(info['missing_keys'])} weights of its causal language model, e.g. "
            f"{sorted(info['missing_keys'])[0]}: they would be random, so pass a whole model."
        )
    network.config.use_cache = False  # whole blocks are scored at once
    return network


def _score(
    network: Any, loader: Any, sizes: np.ndarray | None, accelerator: Accelerator, progress: bool
) -> dict[str, tuple[Any, ...]]:
    """What the metric takes, of all blocks in their order, on every process."""
    rows: list[tuple[float, int, int, int]] = []
    with torch.inference_mode():
        bar = tqdm(loader, desc="Evaluating", unit="batch", disable=not (progress and accelerator.is_main_process))
        for batch in bar:
            sums = _sequence_sums(network, batch["input_ids"], sizes)
            # as objects: float64 on any device, and blocks that were repeated to fill the last batches are dropped
            rows += accelerator.gather_for_metrics(sums, use_gather_object=True)
    return dict(zip(("nll", "num_tokens", "num_correct", "num_bytes"), zip(*rows, strict=True), strict=True))


def _sequence_sums(network: Any, blocks: torch.Tensor, sizes: np.ndarray | None) -> list[tuple[float, int, int, int]]:
    """Per block: nats (summed in float64), tokens scored, correct ones, bytes they stand for (-1 if unknown)."""
    logits, targets = network(input_ids=blocks).logits[:, :-1], blocks[:, 1:]
    sums = []
    for scores, wanted in zip(logits, targets, strict=True):  # one at a time: a float32 copy of all logits is large
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        nll = torch.nn.functional.cross_entropy(scores, wanted, reduction="none")
        correct = (scores.argmax(-1) == wanted).sum()
        size = -1 if sizes is None else int(sizes[wanted.cpu().numpy()].sum())
        sums.append((float(nll.cpu().double().sum()), len(wanted), int(correct), size))
    return sums


def block_losses(model: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each block in nats per token, shape (blocks): of the text alone.

    A mixture of experts' own loss has its balancing loss added.
    """
    logits = model(input_ids=blocks).logits[:, :-1].float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, blocks[:, 1:].flatten(), reduction="none")
    return losses.view(len(blocks), -1).mean(dim=1)


def ngram_losses(train_blocks: Any, held_out_blocks: Any, vocab_size: int) -> dict[str, float]:
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
    weight = np.maximum(distinct[context], seen[context] == 0)  # never seen: all weight on the unigram
    bigram = (count + weight * unigram[target]) / (seen[context] + weight)
    return {"unigram": float(-np.log(unigram[target]).mean()), "bigram": float(-np.log(bigram).mean())}
