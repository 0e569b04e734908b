import dataclasses
import hashlib
import json
import math
import os
import platform
import subprocess

import numpy as np
import pytest
import torch
from processes import PATIENCE, torchrun
from sentences import refused
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
)
from warm import python

from hf_power.checkpoints.locate import weights_sha256
from hf_power.data.packing import pack
from hf_power.data.text import DataArguments, load_text
from hf_power.data.tokenizer import load_tokenizer
from hf_power.evaluate.heldout import data_of_run, evaluate_model, evaluation_text, load_metric, scores_text
from hf_power.evaluate.metrics.token_bytes import token_bytes
from hf_power.pretrain import run as train
from hf_power.records.results import Evaluation
from hf_power.settings.settings import Settings


@pytest.fixture(scope="module")
def data(corpus):
    return DataArguments(
        dataset=str(corpus),
        vocab_size=400,
        block_size=32,
        eval_fraction=0.1,
        num_proc=1,
        data_cache_dir=str(corpus.parent / "cache"),
    )


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """An untrained Llama with weights large enough to be sure of something, and its byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("evaluate") / "tiny"
    tokenizer = load_tokenizer(data, load_text(data)[0])
    torch.manual_seed(0)
    llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(vocab_size, kind=LlamaForCausalLM, **more):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.5, **shape, **more))


@pytest.fixture(scope="module")
def held_out(folder, data):
    return np.stack(pack(load_text(data)[1], AutoTokenizer.from_pretrained(folder), block_size=32)[:]["input_ids"])


@pytest.fixture(scope="module")
def expected(folder, held_out):
    return plain(folder, held_out)


def plain(folder, blocks):
    """Each position by itself: float64, softmax written out; bytes by GPT-2's table of printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    nll, correct, text = [], [], b""
    for block in torch.from_numpy(blocks).long():
        logits = model(block[None]).logits[0].detach()
        for position in range(1, len(block)):
            scores, token = logits[position - 1], int(block[position])
            nll.append(float(torch.exp(scores - scores[token]).sum().log()))
            correct.append(bool((scores <= scores[token]).all()))
            if token != tokenizer.eos_token_id:
                text += bytes(byte_of[c] for c in tokenizer.convert_ids_to_tokens(token))
    loss = sum(nll) / len(nll)
    bits = sum(nll) / math.log(2) / len(text)
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": sum(correct) / len(nll), "bits_per_byte": bits}


@pytest.mark.slow
@pytest.mark.parametrize("at_least", [1, 8])
def test_evaluate_model_against_plain_pytorch(folder, data, held_out, expected, tmp_path, at_least):
    # The last batch is not full; each Python's library, and with it the corpus, has another length.
    batch_size = next(size for size in range(at_least, 99) if size == 1 or len(held_out) % size)
    result = evaluate_model(folder, data, batch_size=batch_size, output=tmp_path / "e.json")
    assert result.metrics == pytest.approx(expected, rel=1e-6)
    assert result.metrics["loss"] > math.log(400)  # wrong, and sure of it
    assert result.num_tokens == 31 * len(held_out)
    assert json.loads((tmp_path / "e.json").read_text()) == result.to_json()


def test_float64_and_max_tokens(folder, data, held_out, tmp_path):
    keep = [i * len(held_out) // 7 for i in range(7)]
    result = evaluate_model(folder, data, dtype="float64", max_tokens=7 * 32 + 5, output=tmp_path / "e")
    assert result.metrics == pytest.approx(plain(folder, held_out[keep]), rel=1e-12)
    assert (result.dtype, result.num_tokens) == ("float64", 7 * 31)


@pytest.mark.slow
def test_bfloat16_weights_are_the_checkpoint_s_own(folder, data, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    result = evaluate_model(tmp_path, data)
    assert result.dtype == "bfloat16"
    wide = evaluate_model(tmp_path, data, dtype="float32").metrics["loss"]
    assert result.metrics["loss"] == pytest.approx(wide, rel=1e-2)
    assert result.metrics["loss"] != wide


@pytest.mark.slow
def test_a_stream_is_scored_to_its_end(folder, data, corpus, tmp_path):
    small = tmp_path / "small.jsonl"
    small.write_text("".join(corpus.read_text().splitlines(keepends=True)[:5]))
    stored = dataclasses.replace(data, dataset=str(small), eval_split="train")
    whole = dataclasses.replace(stored, streaming=True)
    results = [evaluate_model(folder, d, output=tmp_path / "e") for d in (whole, stored)]
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-12)
    assert results[0].data == results[1].data
    tokens = sum(len(AutoTokenizer.from_pretrained(folder)(row["text"]).input_ids) + 1 for row in load_text(stored)[1])
    assert results[0].num_tokens == tokens // 32 * 31


def test_scores_are_shown_a_line_each():
    text = scores_text({"loss": 1.25, "boolq": {"acc": 0.5, "num_samples": 8}})
    assert [line.split() for line in text.splitlines()] == [
        ["loss", "1.25"],
        ["boolq", "acc", "0.5"],
        ["boolq", "num_samples", "8"],
    ]


def test_an_evaluation_is_shown_with_its_units_and_its_text():
    data = {"dataset": "corpus.jsonl", "split": "train", "eval_fraction": 0.05}
    made = Evaluation(model={"name": "run"}, metrics={"loss": 1.25, "perplexity": 3.49}, num_tokens=12345, data=data)
    lines = evaluation_text(made).splitlines()
    assert lines[0] == "run on corpus.jsonl train, 0.05 of it held out: 12,345 tokens"
    assert lines[1].split() == ["loss", "1.25", "nats", "per", "token"]
    assert lines[2].split() == ["perplexity", "3.49"]


@pytest.mark.slow
def test_a_run_folder_reproduces_its_held_out_loss(sections, tmp_path):
    run = train.pretrain(Settings.from_dict(sections(tmp_path / "run"))).to_json()
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint-12"):
        own, num_tokens = data_of_run(place)
        assert num_tokens == run["data"]["held_out_tokens"]
        data = DataArguments(**own)
        result = evaluate_model(place, data, max_tokens=num_tokens)
        assert result.metrics["loss"] == pytest.approx(run["held_out_loss"], rel=1e-6)
        assert result.data["tokenizer"] == run["data"]["tokenizer"]
        assert (place / "eval.json").exists()
    assert result.model["name"] == "run/checkpoint-12"
    assert data_of_run(tmp_path) == ({}, None)
    (place / "model.safetensors").write_bytes(b"half")
    with refused(ValueError, "checkpoint-12 cannot be used", "model.safetensors has 4 bytes instead of"):
        evaluate_model(place, data)


def test_eval_json_says_what_made_it(folder, data, corpus, tmp_path):
    result = evaluate_model(folder, data)
    text = (folder / "eval.json").read_text()
    assert str(corpus.parent) not in text
    assert str(folder.parent) not in text
    assert platform.node() not in text
    assert result.model == {
        "name": "tiny",
        "model_type": "llama",
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": AutoModelForCausalLM.from_pretrained(folder).num_parameters(),
    }
    assert (result.data["dataset"], result.data["split"]) == ("corpus.jsonl", "train")
    assert set(result.versions) >= {"torch", "transformers", "evaluate", "hf_power"}
    again = evaluate_model(folder, dataclasses.replace(data, eval_fraction=0.2))
    assert again.data["fingerprint"] != result.data["fingerprint"]


@pytest.mark.slow
def test_tasks_stay_with_their_weights(folder, data):
    path = folder / "eval.json"
    evaluate_model(folder, data)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"tasks": {"piqa": {"acc": 0.5}}}))
    evaluate_model(folder, data)
    assert json.loads(path.read_text())["tasks"] == {"piqa": {"acc": 0.5}}
    path.write_text(json.dumps(content | {"tasks": {"piqa": {}}, "model": {"weights_sha256": "of others"}}))
    evaluate_model(folder, data)
    assert "tasks" not in json.loads(path.read_text())
    path.write_text('{"schema": 2}')
    with refused(ValueError, "eval.json is no eval.json of schema 1", "delete it"):
        evaluate_model(folder, data)
    path.unlink()


def test_sharded_weights(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert weights_sha256(tmp_path) == hashlib.sha256(b"".join(p.read_bytes() for p in shards)).hexdigest()


@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        ({"batch_size": 0}, ["batch_size must be at least 1, got 0"]),
        ({"block_size": 1}, ["block_size must be at least 2, got 1"]),
        ({"block_size": 65}, ["block_size is 65", "max_position_embeddings are 64"]),
        ({"max_tokens": 0}, ["max_tokens must be at least 1, got 0"]),
        ({"dtype": "fp8"}, ["dtype must be one of float32", "'fp8'"]),
        ({"output": "no/such/folder/e.json"}, ["output must be a file in a folder that exists", "no/such/folder"]),
        ({"model": "no/such/folder"}, ["there is no model at no/such/folder"]),
        ({"model": "nobody/nothing"}, ["there is no folder nobody/nothing", "the Hub cannot be reached"]),
        ({"eval_fraction": 2.0}, ["eval_fraction must lie between 0 and 1"]),
    ],
)
def test_bad_input(folder, data, wrong, parts):
    args = {"model": folder, "batch_size": 8} | wrong
    changed = {name: args.pop(name) for name in list(args) if hasattr(data, name)}
    with refused((ValueError, FileNotFoundError), *parts):
        evaluate_model(args.pop("model"), dataclasses.replace(data, **changed), **args)


def test_a_folder_that_is_no_whole_model(folder, data, tmp_path):
    with refused(ValueError, f"{tmp_path} is no model", "checkpoint-N"):
        evaluate_model(tmp_path, data)
    llama(400, LlamaModel).save_pretrained(tmp_path)
    with refused(ValueError, "has no tokenizer"):
        evaluate_model(tmp_path, data)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with refused(ValueError, "lacks 1 weights", "lm_head.weight"):
        evaluate_model(tmp_path, data)
    llama(300).save_pretrained(tmp_path)
    with refused(ValueError, "token", "300"):
        evaluate_model(tmp_path, data)


@pytest.mark.slow
def test_models_of_the_hub(hub, folder, data, tmp_path):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repo("tester/tiny", files | {"checkpoint-1/model.safetensors": b"not asked for"})
    hub.add_repo("other/gated", files, gated=True)
    hub.add_repo("other/private", files, private=True)
    with refused(ValueError, "output is missing", "tester/tiny"):
        evaluate_model("tester/tiny", data)
    result = evaluate_model("tester/tiny", data, output=tmp_path / "e.json")
    assert result.metrics == evaluate_model(folder, data, output=tmp_path / "f").metrics
    assert result.model["name"] == "tester/tiny"
    assert result.model["revision"] == hub.repos["tester/tiny"].at("main").oid
    assert not hub.seen("checkpoint-1")
    for name, part in {"gated": "is gated", "private": "that you may read", "absent": "that you may read"}.items():
        with refused(FileNotFoundError, f"other/{name}", part):
            evaluate_model(f"other/{name}", data, output=tmp_path / "e.json")


@pytest.mark.slow
def test_two_processes_are_one(folder, data, held_out, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, json\nfrom hf_power.evaluate.heldout import evaluate_model\nfrom hf_power.data.text import DataArguments\n"
        "data = DataArguments(**json.loads(sys.argv[2]))\n"
        "evaluate_model(sys.argv[1], data, batch_size=3, output=sys.argv[3])\n"
    )
    assert len(held_out) % 6  # blocks are repeated to fill the last batches
    arguments = [str(folder), json.dumps(dataclasses.asdict(data))]
    torchrun(script, *arguments, tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())
    one = evaluate_model(folder, data, batch_size=3, output=tmp_path / "one.json").to_json()
    assert two["processes"] == 2
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-12)
    assert [two[k] for k in ("num_tokens", "num_bytes", "data")] == [
        one[k] for k in ("num_tokens", "num_bytes", "data")
    ]


def test_metric_by_hand():
    sums = {"nll": [2.0, 4.0, 0.0], "num_tokens": [3, 1, 0], "num_correct": [2, 0, 0], "num_bytes": [10, 2, 0]}
    expected = {"loss": 1.5, "perplexity": math.exp(1.5), "accuracy": 0.5, "bits_per_byte": 6 / math.log(2) / 12}
    metric = load_metric()
    assert metric.compute(**sums) == pytest.approx(expected, rel=1e-15)
    for start in range(3):  # in batches, as a loop would
        metric.add_batch(**{name: values[start : start + 1] for name, values in sums.items()})
    assert metric.compute() == pytest.approx(expected, rel=1e-15)
    del expected["bits_per_byte"]
    assert metric.compute(**sums | {"num_bytes": [10, -1, 0]}) == pytest.approx(expected, rel=1e-15)
    with refused(ValueError, "num_tokens must sum to at least 1, got 0"):
        metric.compute(nll=[0.0], num_tokens=[0], num_correct=[0], num_bytes=[0])


def test_metric_does_not_depend_on_order():
    rng = np.random.default_rng(0)
    nll, metric = rng.lognormal(0, 4, 1000), load_metric()
    others = {"num_tokens": [31] * 1000, "num_correct": [1] * 1000, "num_bytes": [90] * 1000}
    assert metric.compute(nll=nll, **others) == metric.compute(nll=nll[::-1], **others)


@pytest.mark.slow
def test_metric_loads_with_an_empty_cache_and_no_network(tmp_path):
    code = """
import socket, warnings
warnings.simplefilter("error", DeprecationWarning)
warnings.simplefilter("error", FutureWarning)
def refuse(*_): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from hf_power.evaluate.heldout import load_metric
print(load_metric().compute(nll=[2.0], num_tokens=[1], num_correct=[1], num_bytes=[4])["loss"])
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([python(stock=True), "-c", code], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert out.stdout.strip() == "2.0", out.stderr[-2000:]


TEXTS = ["def f(x):\n\treturn x  # naïve — 数学 😀\n", "", " leading", "\u2581", "<|endoftext|> <eos> plain"]


def fast(model, eos, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.add_special_tokens([eos])
    tokenizer.encode_special_tokens = True
    return tokenizer, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


def sentencepiece(*normalizer):
    """Of SentencePiece's kind: words with a mark for the space, other characters as bytes."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"\u2581defrtunx", "\u2581x", "re", "\u2581p"]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [("\u2581", "x"), ("r", "e")]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    replace = normalizers.Sequence([*normalizer, normalizers.Replace(" ", "\u2581")])
    return fast(model, "<eos>", normalizer=replace, decoder=decoders.ByteFallback())


def test_bytes_of_tokens_are_bytes_of_the_text(folder):
    byte_level = AutoTokenizer.from_pretrained(folder)
    raw = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    raw.encode_special_tokens = True
    for encoder, tokenizer in ((raw, byte_level), sentencepiece()):
        table = token_bytes(tokenizer)
        assert table[tokenizer.eos_token_id] == 0
        for text in TEXTS:
            if text == "\u2581" and encoder is not raw:
                continue  # which SentencePiece cannot tell from a space
            assert table[encoder.encode(text).ids].sum() == len(text.encode()), text
    encoder, tokenizer = sentencepiece(normalizers.Prepend("\u2581"))
    assert token_bytes(tokenizer)[encoder.encode("x x").ids].sum() == 1 + 3  # it writes a space before the text


def test_bytes_of_added_tokens_and_of_other_tokenizers(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["für"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    table = token_bytes(tokenizer)
    assert table[tokenizer.convert_tokens_to_ids("für")] == 4
    assert table[tokenizer.convert_tokens_to_ids("<|user|>")] == 0
    _, words = fast(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "[SEP]")
    assert token_bytes(words) is None


def test_without_bytes_there_are_no_bits_per_byte(folder, data, tmp_path):
    words = {word: i for i, word in enumerate(["[UNK]", "def", "class", "self", "(", ")", ":", "."])}
    parts = {"pre_tokenizer": pre_tokenizers.Whitespace()}
    fast(models.WordLevel(words, unk_token="[UNK]"), "[EOS]", **parts)[1].save_pretrained(tmp_path)
    llama(400).save_pretrained(tmp_path)
    result = evaluate_model(tmp_path, data)
    assert set(result.metrics) == {"loss", "perplexity", "accuracy"}
    assert "num_bytes" not in result.to_json()
