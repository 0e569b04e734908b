from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from hf_power.data import tokenizer as tokenizer_module
from hf_power.data.text import DataArguments
from hf_power.data.tokenizer import END_OF_TEXT, load_tokenizer
from hf_power.records.errors import UserError


def test_trained_tokenizer_round_trip(tokenizer, texts):
    for text in texts:
        if END_OF_TEXT not in text:
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 600
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.unk_token == END_OF_TEXT
    assert tokenizer.pad_token is None


def test_trained_tokenizer_is_deterministic_and_cached(texts, tokenizer, tmp_path, monkeypatch):
    train = Dataset.from_dict({"text": texts})
    args = DataArguments(vocab_size=600, data_cache_dir=str(tmp_path))
    first = load_tokenizer(args, train)
    assert first.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()  # trained apart
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_module, "train_bpe", None)
        assert load_tokenizer(args, train).get_vocab() == first.get_vocab()
    (folder,) = (tmp_path / "hf_power_tokenizers").iterdir()
    args.vocab_size = 500
    assert len(load_tokenizer(args, train)) == 500
    load_tokenizer(args, train.select(range(30)))
    assert len(list(folder.parent.iterdir())) == 3


def test_tokenizer_is_trained_on_a_bounded_sample(texts, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "TOKENIZER_CHARACTERS", 1000)
    train = Dataset.from_dict({"text": [None, *texts]})
    for dataset in (train, train.to_iterable_dataset()):
        assert sum(len(text) for text in tokenizer_module._sample_text(dataset)) == 1000


def test_tokenizer_is_written_whole_or_not_at_all(texts, tokenizer, tmp_path, monkeypatch):
    train = Dataset.from_dict({"text": texts})
    args = DataArguments(vocab_size=600, data_cache_dir=str(tmp_path))
    folder = tmp_path / "hf_power_tokenizers"

    def interrupted(path):
        Path(path).mkdir()
        Path(path, "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda *_: SimpleNamespace(save_pretrained=interrupted))
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(args, train)
    assert not list(folder.iterdir())

    def overtaken(path):
        tokenizer.save_pretrained(path)
        tokenizer.save_pretrained(final)

    monkeypatch.setattr(
        tokenizer_module, "train_bpe", lambda *_: SimpleNamespace(save_pretrained=tokenizer.save_pretrained)
    )
    final = tokenizer_module._trained_tokenizer(args, train)
    for file in Path(final).iterdir():
        file.unlink()
    Path(final).rmdir()
    monkeypatch.setattr(tokenizer_module, "train_bpe", lambda *_: SimpleNamespace(save_pretrained=overtaken))
    assert load_tokenizer(args, train).get_vocab() == tokenizer.get_vocab()
    assert [str(path) for path in folder.iterdir()] == [final]


def test_tokenizer_from_a_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(DataArguments(tokenizer=str(tmp_path)), None)
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_tokenizer_errors(tokenizer, tmp_path, cache):
    ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(ValueError, match=r"slow' must be a fast one \(tokenizer.json\), got ByT5Tokenizer: convert"):
        load_tokenizer(DataArguments(tokenizer=str(tmp_path / "slow")), None)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(ValueError, match="no_eos' must have an eos token to end documents with, got none: set"):
        load_tokenizer(DataArguments(tokenizer=str(tmp_path / "no_eos")), None)
    train = Dataset.from_dict({"text": ["ab ab ab"]})
    with pytest.raises(
        UserError, match=r"^vocab_size must lie in 257 \(bytes and eos\) to 2,147,483,647, got 256: correct it\.$"
    ):
        DataArguments(vocab_size=256)
    with pytest.warns(UserWarning, match=r"gives 25\d tokens, fewer than vocab_size=4096: size the model"):
        load_tokenizer(DataArguments(data_cache_dir=cache), train)
