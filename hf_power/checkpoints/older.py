"""A saved model under the names that older versions of transformers read, beside those that today's has written.

transformers 5 writes what turns the positions into `rope_parameters`, where 4.57 looks for `rope_theta`, takes its own
default and says nothing: the logits of a Llama with rope_theta 500000 are then others altogether. 5 reads both, as most
models on the Hub were written by 4.
"""

from pathlib import Path

from tokenizers import Tokenizer

from hf_power.records.files import read_object, write_json
from hf_power.records.schema import Json

# Fields of a config that have another name in transformers 4.
_RENAMED = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
# These refuse a rope_scaling of any other keys than type and their own.
_LONG, _SIMPLE = ("short_factor", "long_factor"), ("factor",)
_SCALING_KEYS = {"phi3": _LONG, "phi4_multimodal": _LONG, "olmo": _SIMPLE, "olmo2": _SIMPLE}
# The tokenizers that transformers 4 makes begin each text with a token whatever tokenizer.json says, if not told otherwise.
_BEGINNERS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
_REMEDY = "save the model again"


def add_older_names(folder: Path) -> None:
    """Let transformers from 4.56 on read the config and the tokenizer of a folder as today's does, if they are there.

    The weights need nothing: transformers saves them under the names that they have always had.
    """
    for name, with_names in (("config.json", _config), ("tokenizer_config.json", _tokenizer)):
        if (folder / name).is_file():
            content = read_object(folder / name, schema=None, remedy=_REMEDY)
            changed = with_names(content, folder)
            if changed != content:
                write_json(folder / name, dict(sorted(changed.items())))


def _config(config: dict[str, Json], _folder: Path) -> dict[str, Json]:
    added: dict[str, Json] = {}
    if config.get("dtype") is not None:
        added["torch_dtype"] = config["dtype"]
    return config | added | older_names(config)


def older_names(config: dict[str, Json]) -> dict[str, Json]:
    """The values of a config that transformers 4 reads under other names, under those."""
    added: dict[str, Json] = {}
    if isinstance(rope := config.get("rope_parameters"), dict):
        added |= _rope(rope, str(config["model_type"]))
    for new, old in _RENAMED.get(str(config.get("model_type")), {}).items():
        if new in config | added:
            added[old] = (config | added)[new]
    return added


def _rope(rope: dict[str, Json], model_type: str) -> dict[str, Json]:
    """What transformers 4 reads in place of rope_parameters, which may be those of one kind of layer or of each."""
    added: dict[str, Json] = {}
    local = rope.get("sliding_attention")
    if isinstance(whole := rope.get("full_attention"), dict):
        if isinstance(local, dict) and local["rope_theta"] != whole["rope_theta"]:
            added["rope_local_base_freq"] = local["rope_theta"]
        rope = whole
    added |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kind = rope.get("rope_type", "default")
    scaling = {name: value for name, value in rope.items() if name not in added}
    if kind == "longrope" and "original_max_position_embeddings" in rope:
        added["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if model_type in _SCALING_KEYS:
        scaling = {"type": kind} | {name: rope[name] for name in _SCALING_KEYS[model_type] if name in rope}
    # It is said where there is none, too, because gpt_oss scales if it is told nothing.
    return added | {"rope_scaling": None if kind == "default" else scaling}


def _tokenizer(config: dict[str, Json], folder: Path) -> dict[str, Json]:
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"  # Today's transformers knows the class by both names.
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    if changed.get("tokenizer_class") in _BEGINNERS and (folder / "tokenizer.json").is_file():
        tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").tokens
        for name, token, ends in (
            ("add_bos_token", "bos_token", tokens[:1]),
            ("add_eos_token", "eos_token", tokens[-1:]),
        ):
            changed.setdefault(name, ends == [_text(config.get(token))])
    return changed


def _text(token: Json) -> Json:
    return token["content"] if isinstance(token, dict) else token
