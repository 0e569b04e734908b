"""Settings to begin with: the YAML of a sweep and of its target, for a family or for the config of a model."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template

from hf_power.checkpoints.locate import download
from hf_power.compat import PreTrainedConfig
from hf_power.models import PLAIN_FAMILIES
from hf_power.mup.scale import scale_width
from hf_power.records.errors import UserError
from hf_power.records.files import parse_json
from hf_power.settings.any_model import config_file, config_of_file

TARGET_FILE = "target.yaml"
MADE = ("sweep.yaml", TARGET_FILE)
# A trial that two CPU cores finish in minutes, and numbers to begin with for a model that somebody wants.
_TRIAL = {
    "base_width": "32",
    "preset": "\n  preset: power_of_two",
    "tokenizer": "  vocab_size: 512              # of a tokenizer that is trained on the text",
    "block_size": "64",
    "batches": "[256, 512, 1024]",
    "horizons": "[128k, 256k, 512k]",
    "warmup": "8k",
    # The trial's optima lie among these four; a rate that the sweep has to add beyond an edge waits for all before it.
    "rates": "[0.004, 0.008, 0.016, 0.032]",
    "budget": "60M",
    "max_eval_tokens": "32k",
    "tokens": "1M",
    "verify_tokens": "500k",
    "batch_size": "32",
}
_REAL = _TRIAL | {
    "preset": "",
    "block_size": "1024",
    "batches": "[16384, 32768, 65536]",
    "horizons": "[16M, 32M, 64M]",
    "warmup": "1M",
    "rates": "[0.004, 0.008, 0.016]",
    "budget": "4B",
    "max_eval_tokens": "64k",
    "tokens": "2B",
    "verify_tokens": "64M",
    "batch_size": "128",
}
_SIZES = """\
  model_type: {family}
  hidden_size: {width}
  intermediate_size: {mlp}
  num_hidden_layers: 2
  num_attention_heads: {heads}"""
# Narrower proxies than this are mostly embedding.
NARROWEST = 128


def new_run(folder: Path, source: str) -> list[Path]:
    """Write sweep.yaml and target.yaml into a new or empty folder, and beside them config.json where a model has one.

    Args:
        folder: is made if it is not there.
        source: llama or mixtral, for a trial of minutes; else the config.json of a model, its folder, or the id of a
            repository of the Hub, whose config.json and tokenizer are taken.

    Returns:
        The files, to be read and edited.

    Raises:
        UserError: a folder that is not empty, a source that is none, or sizes of which no smaller width is whole.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder.")
    values = {"folder": str(folder), "source": source, "output_dir": json.dumps(f"{folder}/target")}
    config_json = None
    if source in PLAIN_FAMILIES:
        values |= _TRIAL
        proxy, target = (_SIZES.format(family=source, width=w, mlp=w * 5 // 2, heads=w // 16) for w in (32, 128))
    else:
        config_json = config_file(source)
        if config_json is None:
            config_json = download(source, ["config.json"]) / "config.json"
        values |= _REAL | _tokenizer(source, config_json)
        values["base_width"] = str(_proxy_width(config_of_file(config_json), source))
        proxy = target = f"  model_type: any\n  model_config: {json.dumps(f'{folder}/config.json')}"
    folder.mkdir(parents=True, exist_ok=True)
    if config_json is not None:
        _copy_config(config_json, folder / "config.json", has_tokenizer="vocab_size" not in values["tokenizer"])
    for name, model in zip(MADE, (proxy, target), strict=True):
        text = files("hf_power.settings").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
        (folder / name).write_text(Template(text).substitute(values, model=model), encoding="utf-8")
    return sorted(folder.iterdir())


def _copy_config(config_json: Path, copy: Path, has_tokenizer: bool) -> None:
    """The config as it is; for a tokenizer that is trained on the text without the size of its own vocabulary.

    The embedding then has a row for every token that there is. With the 150,000 of a published model it would be most of the
    proxies' work, for tokens that never come.
    """
    if has_tokenizer:
        shutil.copyfile(config_json, copy)
        return
    content = parse_json(config_json.read_bytes(), str(config_json), "pass the config.json of a model")
    for part in (content, *content.values()) if isinstance(content, dict) else ():
        if isinstance(part, dict):
            part.pop("vocab_size", None)
    copy.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tokenizer(source: str, config_json: Path) -> dict[str, str]:
    """The line of the section data that says which tokenizer: the model's own, where it has one."""
    if not Path(source).exists():
        own = source
    elif (config_json.parent / "tokenizer.json").is_file():
        own = str(config_json.parent)
    else:
        return {"tokenizer": "  vocab_size: 4096             # of a tokenizer that is trained on the text"}
    return {"tokenizer": f"  tokenizer: {json.dumps(own)}"}


def _proxy_width(config: PreTrainedConfig, source: str) -> int:
    """The smallest of a sixteenth to half of the width that is not too narrow and keeps every size whole."""
    width = int(config.hidden_size)
    for share in (16, 8, 4, 2):
        if width % share == 0 and width // share >= min(NARROWEST, width // 4):
            try:
                scale_width(config, width // share)
            except UserError:
                continue
            return width // share
    raise UserError(
        f"neither a quarter nor half of hidden_size {width} of {source} keeps its other sizes whole: write a sweep.yaml with "
        "a base_width of your own, as docs/operating.md tells."
    )
