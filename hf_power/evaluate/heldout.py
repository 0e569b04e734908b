"""Held-out evaluation of any causal language model: `evaluate_model`; and where all results go, `add_to_file`."""

import dataclasses
import glob
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import tqdm

from hf_power.checkpoints.locate import find_model, weights_sha256
from hf_power.compat import PreTrainedConfig
from hf_power.data.order import collate_blocks, spread_blocks
from hf_power.data.packing import pack
from hf_power.data.text import PYTHON_STDLIB, DataArguments, load_text
from hf_power.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from hf_power.evaluate.metrics.token_bytes import token_bytes
from hf_power.records.errors import MissingPackageError, NotFoundError, UserError, refused_by
from hf_power.records.files import LOCK, only_one, read_record, write_json
from hf_power.records.machine import hardware, refuse_alone, versions
from hf_power.records.results import EVAL_FILE, Evaluation
from hf_power.records.run import RUN_FILE, SCHEMA, Data, Model, Run
from hf_power.records.schema import Json

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    Blocks: TypeAlias = datasets.Dataset | list[dict[str, np.ndarray]]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_options(at_least: Mapping[str, tuple[int | None, int]], dtype: str | None) -> None:
    """Raise a UserError for an option (name -> value or None, smallest) that is too small, or a dtype that is none."""
    for name, (value, smallest) in at_least.items():
        if value is not None and value < smallest:
            raise UserError(f"{name} must be at least {smallest}, got {value}: raise it.")
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")


def output_path(folder: Path, about: Model, output: str | os.PathLike[str] | None) -> Path:
    """Where the results go: `output`, or eval.json in a folder that is not the Hub's cache; checked before the work."""
    # A file in the Hub's cache would be lost with it, and nobody would look for it there.
    if output is None and "revision" in about:
        raise UserError(f"output is missing: name the JSON file for the results of {about['name']}, e.g. eval.json.")
    path = folder / EVAL_FILE if output is None else Path(output)
    if not path.parent.is_dir() or path.is_dir():
        raise NotFoundError(f"output must be a file in a folder that exists, got {path}: make the folder first.")
    _before(path)  # A file that cannot be added to is an error now, and not after an hour of work.
    return path


def written_to(model: str, output: str | os.PathLike[str] | None) -> Path:
    """The file that the results of a model are in."""
    return Path(model) / EVAL_FILE if output is None else Path(output)


def alone_at(path: Path, is_first: bool) -> AbstractContextManager[None]:
    """Keep other evaluations from the file while the first process of this one is at work on it, see `only_one`."""
    return only_one(path.parent, f"{LOCK}-{path.name}") if is_first else nullcontext()


def add_to_file(path: Path, result: Evaluation) -> None:
    """Write results; those of another kind that are in the file stay, if they are of the same weights."""
    before = _before(path)
    write_json(path, (result if before is None else result.added_to(before)).to_json())


def _before(path: Path) -> Evaluation | None:
    if not path.is_file():
        return None
    try:
        return read_record(path, Evaluation)
    except UserError as error:
        raise UserError(f"{path} is no {EVAL_FILE} of schema {SCHEMA}: delete it, or name another output.") from error


UNITS = {
    "loss": "nats per token",
    "perplexity": "",
    "accuracy": "share of next tokens",
    "bits_per_byte": "bits per byte of text",
}


def evaluation_text(made: Evaluation) -> str:
    """Metrics with their units, and what they were measured on."""
    about, data = made.model, made.data or {}
    parts = [str(data[key]) for key in ("dataset", "config_name", "split") if data.get(key)]
    of_part = f", {data['eval_fraction']:g} of it held out" if data.get("eval_fraction") else ""
    lines = [f"{about['name']} on {' '.join(parts)}{of_part}: {made.num_tokens or 0:,} tokens"]
    for name, value in (made.metrics or {}).items():
        lines.append(f"  {name:<16} {value:<12.6g} {UNITS.get(name, '')}".rstrip())
    return "\n".join(lines)


def scores_text(scores: Mapping[str, float | Mapping[str, float]]) -> str:
    """Metrics, or tasks with their metrics, for a person: a line each."""
    lines = []
    for name, value in scores.items():
        parts = value if isinstance(value, Mapping) else {"": value}
        lines += [f"  {f'{name} {what}':<40} {number:.6g}" for what, number in parts.items()]
    return "\n".join(lines)


METRIC = Path(__file__).parent / "metrics" / "language_modeling.py"


class Metric(Protocol):
    """The method of an `evaluate.Metric` that is used here."""

    def compute(self, **columns: Sequence[float]) -> dict[str, float]:
        """The metrics of one entry per sequence in each column."""


class Text(NamedTuple):
    """What is scored: blocks of token ids, the model's own tokenizer, and what the record says of them."""

    blocks: "Blocks"
    tokenizer: "PreTrainedTokenizerBase"
    about: Data


class Sums(NamedTuple):
    """Of one block: nats, summed in float64; tokens scored; correct ones; bytes they stand for, -1 if unknown."""

    nll: float
    num_tokens: int
    num_correct: int
    num_bytes: int


def load_metric() -> Metric:
    """The metric in metrics/language_modeling.py, as `evaluate.load` gives it; needs no network.

    ``load_metric().compute(nll=..., num_tokens=..., num_correct=..., num_bytes=...)``, one entry per sequence, returns
    loss, perplexity, accuracy and bits_per_byte. Without evaluate it is a MissingPackageError.
    """
    try:
        import evaluate
    except ImportError as error:
        raise MissingPackageError('evaluate is needed and not installed: run pip install "hf_power[train]".') from error
    metric: Metric = evaluate.load(str(METRIC), keep_in_memory=True)
    return metric


def evaluate_model(
    model: str | os.PathLike[str],
    data: DataArguments,
    *,
    batch_size: int = 8,
    max_tokens: int | None = None,
    dtype: str | None = None,
    output: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Loss, perplexity, accuracy and bits per byte of a causal language model on held-out text, into eval.json.

    The text is packed as in pretraining, with the model's own tokenizer; the first token of each block is context only.
    Under accelerate each process holds the whole model; neither their number nor the batch size changes more than rounding.

    Args:
        model: folder of a model (run, checkpoint, export), or a Hub repository.
        data: the held-out part of it is scored (``eval_split="train"`` scores all of a file); tokenizer is not used.
        batch_size: blocks per process and step, >= 1.
        max_tokens: blocks spread evenly over the text with so many tokens in all, at least one; None for all.
        dtype: one of `hf_power.evaluate.results.DTYPES`; None for the one that the weights were saved in.
        output: JSON file to write, by default eval.json in the folder; it keeps results of tasks of the same weights.

    Returns:
        What was measured: metrics (loss in nats per token), num_tokens scored, and what made them.

    Raises:
        UserError: bad input, before the model is loaded; or evaluate or datasets is missing.
    """
    _check(batch_size, max_tokens, dtype, data.block_size)
    metric, accelerator = load_metric(), Accelerator()
    refuse_alone(accelerator.num_processes)
    with accelerator.main_process_first():
        folder, about = find_model(model)
    about["weights_sha256"] = weights_sha256(folder)
    path = output_path(folder, about, output)
    vocab_size = _vocab_size(folder, data.block_size)
    with alone_at(path, accelerator.is_main_process):
        with accelerator.main_process_first():
            text = _held_out_text(folder, data, max_tokens, vocab_size)
        network = _load_model(folder, dtype).to(accelerator.device).eval()
        about["parameters"] = network.num_parameters()
        start, sizes = time.perf_counter(), token_bytes(text.tokenizer)
        columns = _score(network, text.blocks, batch_size, sizes, accelerator)
        result = Evaluation(
            model=about,
            metrics=metric.compute(**columns),
            num_tokens=sum(columns["num_tokens"]),
            num_bytes=None if sizes is None else sum(columns["num_bytes"]),
            data=text.about,
            dtype=str(network.dtype).removeprefix("torch."),
            batch_size=batch_size,
            processes=accelerator.num_processes,
            versions=versions() | {"evaluate": version("evaluate")},
            hardware=hardware(accelerator.device, accelerator.num_processes),
            seconds=round(time.perf_counter() - start, 3),
        )
        if accelerator.is_main_process:
            add_to_file(path, result)
    return result


def data_of_run(folder: str | os.PathLike[str]) -> tuple[dict[str, Json], int | None]:
    """The data settings of the run.json in a folder, and how many held-out tokens the run scored; ({}, None) without."""
    if not (Path(folder) / RUN_FILE).is_file():
        return {}, None
    run = Run.load(Path(folder), required=("settings.data", "data.held_out_tokens"))
    return run.settings["data"], (run.data or {}).get("held_out_tokens")


def _check(batch_size: int, max_tokens: int | None, dtype: str | None, block_size: int) -> None:
    check_options({"batch_size": (batch_size, 1), "block_size": (block_size, 2)}, dtype)
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}: leave it out to score all tokens.")


def _vocab_size(folder: Path, block_size: int) -> int:
    """How many tokens the model knows, if it also has positions for the blocks."""
    with refused_by(str(folder / "config.json")):
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and block_size > longest:
        raise UserError(
            f"block_size is {block_size}, but the model's max_position_embeddings are {longest}: pass a block_size of at "
            f"most {longest}."
        )
    return int(config.vocab_size)


def _held_out_text(folder: Path, data: DataArguments, max_tokens: int | None, vocab_size: int) -> Text:
    """The blocks to score, cut by the model's own tokenizer."""
    import datasets  # Only here, because load_text says in a sentence what to install if it is missing.

    if not list(folder.glob("tokenizer*")):
        raise UserError(f"{folder} has no tokenizer: save the model's tokenizer into it.")
    tokenizer = load_tokenizer(dataclasses.replace(data, tokenizer=str(folder)), None)
    texts = load_text(data)
    packed = pack(texts.held_out, tokenizer, block_size=data.block_size, num_proc=data.num_proc)
    if max_tokens is not None:
        blocks = spread_blocks(packed, max(1, max_tokens // data.block_size))
    else:
        # A stream would be read twice, for its fingerprint and for its score, and a DataLoader asks for its length.
        blocks = list(packed) if isinstance(packed, datasets.IterableDataset) else packed
    # Of the scored tokens themselves, so that the fingerprint is the same wherever the data lie.
    digest = hashlib.sha256()
    for block in blocks:
        ids = block["input_ids"]
        # An embedding that is asked for a row that it has not got ends in an error of CUDA that names nothing.
        if ids.max() >= vocab_size:
            raise UserError(f"the text has the token {ids.max()}, but the model has {vocab_size}: mend its tokenizer.")
        digest.update(ids.astype("<i4").tobytes())
    made: Data = {"fingerprint": digest.hexdigest()[:16], "tokenizer": tokenizer_fingerprint(tokenizer)}
    if texts.counts.skipped and data.skip_bad_lines:
        made["skipped_documents"] = texts.counts.skipped
    return Text(blocks, tokenizer, cast(Data, {**_data_record(data), **made, "block_size": data.block_size}))


def _data_record(data: DataArguments) -> Data:
    """What eval.json says of the data; what made no difference to the scored text is left out."""
    record: Data = {"dataset": _public_name(data.dataset)}
    if data.dataset_config is not None:
        record["config_name"] = data.dataset_config
    if data.dataset != PYTHON_STDLIB:  # It has no splits by name.
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


def _load_model(folder: Path, dtype: str | None) -> PreTrainedModel:
    with refused_by(f"the model in {folder}"):
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False
        )
    # transformers' types know the model alone, and not what comes with it under output_loading_info.
    model, info = cast("tuple[PreTrainedModel, dict[str, list[str]]]", loaded)
    if info["missing_keys"]:
        raise UserError(
            f"{folder} lacks {len(info['missing_keys'])} weights of its causal language model, e.g. "
            f"{sorted(info['missing_keys'])[0]}: they would be random, so pass a whole model."
        )
    model.config.use_cache = False  # Whole blocks are scored at once, and a cache would only take memory.
    return model


def _score(
    network: PreTrainedModel, blocks: "Blocks", batch_size: int, sizes: np.ndarray | None, accelerator: Accelerator
) -> dict[str, tuple[int, ...]]:
    """What the metric takes, of all blocks in their order, on every process."""
    # datasets' Dataset and a list have what a DataLoader asks for, but not its type.
    loader = DataLoader(
        cast("torch.utils.data.Dataset[dict[str, np.ndarray]]", blocks), batch_size, collate_fn=collate_blocks
    )
    if accelerator.is_main_process:
        tokens = len(blocks) * (len(blocks[0]["input_ids"]) - 1)
        print(f"scoring {tokens:,} tokens with {network.num_parameters():,} parameters", flush=True)
    rows: list[Sums] = []
    with torch.inference_mode():
        # This tqdm is silent where the progress bars of transformers are switched off.
        for batch in tqdm(
            accelerator.prepare(loader), desc="Evaluating", unit="batch", disable=not accelerator.is_main_process
        ):
            sums = _sequence_sums(network, batch["input_ids"], sizes)
            # Gathered as objects, so that nats stay float64 on any device. accelerate repeats blocks to fill the last
            # batches, and this call drops them again.
            rows += accelerator.gather_for_metrics(sums, use_gather_object=True)
    return dict(zip(Sums._fields, zip(*rows, strict=True), strict=True))


def _sequence_sums(network: PreTrainedModel, blocks: torch.Tensor, sizes: np.ndarray | None) -> list[Sums]:
    """The sums of each block; `sizes` are the bytes of each token, None if they are not known."""
    logits, targets = network(input_ids=blocks).logits[:, :-1], blocks[:, 1:]
    sums = []
    # One block at a time, because a float32 copy of the logits of all would be large.
    for scores, wanted in zip(logits, targets, strict=True):
        # In bfloat16 a loss of several nats would have two digits.
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        nll = torch.nn.functional.cross_entropy(scores, wanted, reduction="none")
        correct = (scores.argmax(-1) == wanted).sum()
        size = -1 if sizes is None else int(sizes[wanted.cpu().numpy()].sum())
        sums.append(Sums(float(nll.cpu().double().sum()), len(wanted), int(correct), size))
    return sums
