"""One rule for a tokenizer and a model: the largest id is below vocab_size, at the start, at a resume, in an anneal."""

import json

import pytest
from sentences import refused
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_power.checkpoints.seal import examine, seal
from hf_power.data.tokenizer import num_token_ids
from hf_power.pretrain import run as train
from hf_power.pretrain import start
from hf_power.pretrain.anneal import anneal
from hf_power.settings.settings import Settings


@pytest.fixture(scope="module")
def gap(tmp_path_factory):
    """The folder of a byte-level tokenizer whose ids are 0 to 256 and 300, as with a reserved range."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{letter: i for i, letter in enumerate(alphabet, start=1)}, "<note>": 300}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = tmp_path_factory.mktemp("gap")
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>").save_pretrained(folder)
    return folder


def test_an_embedding_has_a_row_for_the_largest_id(gap, sections, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gap)
    assert (len(tokenizer), num_token_ids(tokenizer)) == (258, 301)
    settings = Settings.from_dict(sections(tmp_path))
    assert settings.model_config_for(tokenizer).vocab_size == 301
    assert settings.changed(model={"model_config": {"vocab_size": 512}}).model_config_for(tokenizer).vocab_size == 512


@pytest.mark.parametrize("vocab_size", [300, 258, 1])
def test_ids_without_an_embedding_are_refused_before_the_text_is_read(gap, sections, tmp_path, monkeypatch, vocab_size):
    monkeypatch.setattr(start, "load_text", None)  # To call it would be a TypeError.
    given = sections(tmp_path / "run")
    given["data"]["tokenizer"] = str(gap)
    given["model"]["model_config"] = {"vocab_size": vocab_size}
    with refused(
        ValueError, "token ids up to 300, but the model has a vocab_size of", "raise vocab_size to 301 or more"
    ):
        train.pretrain(Settings.from_dict(given))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_padded_vocabulary_is_annealed_and_the_doctor_says_so(sections, tmp_path):
    """That it goes on is in test_stopping.py."""
    given = sections(tmp_path / "trunk", lr_scheduler_kwargs={"a": 8.0, "decay_ratio": 0.0}, save_steps=6)
    given["model"]["model_config"] = {"vocab_size": 448}
    train.pretrain(Settings.from_dict(given))
    checkpoint = tmp_path / "trunk" / "checkpoint-6"
    assert examine(tmp_path / "trunk").resume == "checkpoint-12"
    tail = anneal(checkpoint, "40%", str(tmp_path / "tail"))
    assert (tail.status, tail.tokens_seen) == ("finished", 1280)
    # A checkpoint of another's hands, whose model has fewer rows than its tokenizer ids, goes on nowhere.
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": 390}))
    seal(checkpoint)
    with refused(ValueError, "token ids up to 399, but the model of", "has a vocab_size of 390"):
        anneal(checkpoint, "40%", str(tmp_path / "other"))
    found = {row.name: row.problems for row in examine(tmp_path / "trunk").checkpoints}["checkpoint-6"]
    assert len(found) == 1
    assert "token ids up to 399, but its model has a vocab_size of 390" in found[0]
