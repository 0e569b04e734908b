"""Models from elsewhere: what is cut, missing or only a pointer is one sentence with the file, whatever the verb."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GraniteConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_power.checkpoints.locate import check_weights, find_model
from hf_power.cli import main
from hf_power.records.errors import NotFoundError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A Llama of three shards with a byte-level tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("locate")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(60)))
    alphabet = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>").save_pretrained(folder / "model")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), max_position_embeddings=64, **shape))
    model.save_pretrained(folder / "model", max_shard_size="20KB")
    GraniteConfig(**model.config.to_dict() | {"model_type": "granite"}).save_pretrained(folder / "granite")
    return folder


def edited(name, **values):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        content = {key: value for key, value in (content | values).items() if value is not None}
        (folder / name).write_text(json.dumps(content))

    return edit


def cut(name):
    def edit(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return edit


def pointer(name):
    return lambda folder: (folder / name).write_text(POINTER)


def torch_file(damage):
    def edit(folder):
        for file in folder.glob("model*"):
            file.unlink()
        torch.save({"a": torch.zeros(10_000)}, folder / "pytorch_model.bin")
        damage(folder)

    return edit


SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
# damage, the verbs that meet it, and the words of their sentence
DAMAGES = {
    "a pointer for a shard": (
        pointer(SHARD),
        "evaluate export publish",
        (SHARD, "is a pointer of Git LFS", "git lfs pull"),
    ),
    "a cut shard": (cut(SHARD), "evaluate export publish", (SHARD, "cannot be read as safetensors", "saved whole")),
    "an empty shard": (lambda f: (f / SHARD).write_bytes(b""), "evaluate export publish", (SHARD, "as safetensors")),
    "a missing shard": (lambda f: (f / SHARD).unlink(), "evaluate export publish", (SHARD, INDEX, "is not there")),
    "a cut index": (cut(INDEX), "evaluate export publish", (INDEX, "is not JSON")),
    "an index that leads away": (
        edited(INDEX, weight_map={"a": "../../x.safetensors"}),
        "evaluate export publish",
        (INDEX, "no file beside it"),
    ),
    "a pointer for torch's file": (
        torch_file(pointer("pytorch_model.bin")),
        "evaluate",
        ("pytorch_model.bin", "Git LFS"),
    ),
    "torch's file, cut": (torch_file(cut("pytorch_model.bin")), "evaluate", ("the model in", "cannot be used")),
    "a pointer for the tokenizer": (
        pointer("tokenizer.json"),
        "evaluate",
        ("tokenizer.json", "Git LFS", "git lfs pull"),
    ),
    "a cut tokenizer": (cut("tokenizer.json"), "evaluate", ("the tokenizer of", "cannot be used")),
    "a strange tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "evaluate",
        ("tokenizer", "cannot be used"),
    ),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("token*")], "evaluate", ("has no tokenizer",)),
    "no eos": (
        edited("tokenizer_config.json", eos_token=None),
        "evaluate",
        ("must have an eos token", "eos_token in its"),
    ),
    "a pointer for the config": (pointer("config.json"), "evaluate export", ("config.json", "Git LFS")),
    "a cut config": (cut("config.json"), "evaluate export", ("config.json", "is no config of a model")),
    "an unknown type": (edited("config.json", model_type="foonet"), "evaluate export", ("foonet",)),
    "a type of no text": (edited("config.json", model_type="vit"), "evaluate export", ("vit",)),
    "code of its own": (
        edited(
            "config.json", model_type="foonet", auto_map={"AutoConfig": "x.Config", "AutoModelForCausalLM": "x.Model"}
        ),
        "evaluate export",
        ("config.json", "custom code"),
    ),
    "other shapes": (edited("config.json", hidden_size=32), "evaluate export", ()),
    "no layer": (edited("config.json", num_hidden_layers=2), "evaluate export", ("model", "lacks")),
}


def commands(whole, folder):
    data = ["--dataset", str(whole / "text.jsonl"), "--block_size", "16", "--num_proc", "1"]
    data += ["--data_cache_dir", str(whole / "cache"), "--output", str(folder.parent / "eval.json")]
    like = ["--to", "granite", "--like", str(whole / "granite"), "--output_dir", str(folder.parent / "out")]
    return {
        "evaluate": ["evaluate", str(folder), *data],
        "export": ["export", str(folder), *like],
        "publish": ["publish", str(folder), "--repo", "user/name", "--license", "mit"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence_with_the_file(damage, whole, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(whole / "model", folder)
    edit, verbs, words = DAMAGES[damage]
    edit(folder)
    for verb in verbs.split():
        if verb == "publish":  # What is published has a record of its training beside it.
            (folder / "run.json").write_text('{"schema": 1, "lineage": "0"}')
        with pytest.raises(SystemExit) as ended:
            raise SystemExit(main(commands(whole, folder)[verb]))
        said = capsys.readouterr().err
        (sentence,) = [line for line in said.splitlines() if line.startswith("hf-power ")]
        assert ended.value.code == 2, said
        assert "Traceback" not in said
        for word in words if verb != "export" else words[:1]:
            assert word in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_whole_model_passes(whole, tmp_path):
    shutil.copytree(whole / "model", tmp_path / "model")
    assert find_model(tmp_path / "model")[1]["model_type"] == "llama"
    assert (
        main(commands(whole, tmp_path / "model")["evaluate"])
        == main(commands(whole, tmp_path / "model")["export"])
        == 0
    )


def test_a_stale_index_beside_whole_weights_is_not_read(whole, tmp_path):
    shutil.copytree(whole / "model", tmp_path / "model")
    LlamaForCausalLM.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    check_weights(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-1.safetensors")
    with pytest.raises(
        NotFoundError, match=r"gone\.safetensors, which model\.safetensors\.index\.json names, is not there"
    ):
        check_weights(tmp_path / "model")


@pytest.mark.parametrize("verb", ["anneal", "pretrain"])
def test_a_model_from_elsewhere_is_no_checkpoint(verb, whole, tmp_path, capsys):
    settings = [
        "--output_dir",
        str(tmp_path / "run"),
        "--tokens",
        "1k",
        "--resume_from_checkpoint",
        str(whole / "model"),
    ]
    given = ["anneal", "--from", str(whole / "model")] if verb == "anneal" else ["pretrain", *settings]
    assert main(given) == 2
    assert "cannot be used: " in capsys.readouterr().err
