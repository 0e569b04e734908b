"""Settings to begin with: the YAML of a sweep and of its target, for a family or for the config of a model."""

import json
from importlib.resources import files
from pathlib import Path
from string import Template

from hf_power.checkpoints.locate import download
from hf_power.compat import PreTrainedConfig
from hf_power.models import PLAIN_FAMILIES
from hf_power.mup.check import refuse_without_rule
from hf_power.mup.scale import KV_HEADS, scale_width
from hf_power.records.errors import UserError
from hf_power.settings.any_model import config_file, config_of_file, mapping_of, sizes_of

TARGET_FILE = "target.yaml"
MADE = ("sweep.yaml", TARGET_FILE)
# A trial that two CPU cores finish in minutes, and numbers to begin with for a model that somebody wants.
_TRIAL = {
    "proxy_width": "32",
    "mup": "base_width: 32\n  preset: power_of_two",
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
_STAYING = "# {} stays, for which no rule of muP is exact: see docs/your_config.md"
# Narrower proxies than this are mostly embedding, and wider ones are hardly cheaper than what they stand for.
NARROWEST, WIDEST = 128, 1024
# The proxies' parts of the width, in the order in which they are tried: powers of two keep most sizes whole.
SHARES = (16, 8, 4, *(share for share in range(15, 2, -1) if share & (share - 1)), 2)


def new_run(folder: Path, source: str) -> list[Path]:
    """Write sweep.yaml and target.yaml into a new or empty folder, and beside them config.json where a model has one.

    Where the number of KV heads cannot shrink with the width, as in multi-query attention, base.json is the config of the
    proxies, which keep that number.

    Args:
        folder: is made if it is not there.
        source: llama or mixtral, for a trial of minutes; else the config.json of a model, its folder, or the id of a
            repository of the Hub, whose config.json and tokenizer are taken.

    Returns:
        The files, to be read and edited.

    Raises:
        UserError: a folder that is not empty, a source that is none or has no rule of muP, or sizes of which no smaller
            width is whole.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: name a new folder.")
    values = {"folder": str(folder), "source": source, "output_dir": json.dumps(f"{folder}/target")}
    configs: dict[str, dict[str, object]] = {}
    if source in PLAIN_FAMILIES:
        values |= _TRIAL
        proxy, target = (_SIZES.format(family=source, width=w, mlp=w * 5 // 2, heads=w // 16) for w in (32, 128))
    else:
        config_json = config_file(source)
        if config_json is None:
            config_json = download(source, ["config.json"]) / "config.json"
        config = config_of_file(config_json)
        refuse_without_rule(config, base_width=config.hidden_size)
        values |= _REAL | _tokenizer(source, config_json, config)
        width, fixed = _proxy_width(config, source)
        values |= {"proxy_width": str(width), "mup": f"base_width: {width}"}
        configs["config.json"] = content = mapping_of(str(config_json), source)
        if fixed:
            configs["base.json"] = content | sizes_of(config, scale_width(config, width, fixed=fixed))
            values["mup"] = (
                f"base_config: {json.dumps(f'{folder}/base.json')}    {_STAYING.format(' and '.join(fixed))}"
            )
        proxy = target = f"  model_type: any\n  model_config: {json.dumps(f'{folder}/config.json')}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in configs.items():
        if "vocab_size" in values["tokenizer"]:
            # The embedding then has a row for every token of the tokenizer that is trained on the text. With the 150,000 of
            # a published model it would be most of the proxies' work, for tokens that never come.
            content.pop("vocab_size", None)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name, model in zip(MADE, (proxy, target), strict=True):
        text = files("hf_power.settings").joinpath("templates").joinpath(name).read_text(encoding="utf-8")
        (folder / name).write_text(Template(text).substitute(values, model=model), encoding="utf-8")
    return sorted(folder.iterdir())


def _tokenizer(source: str, config_json: Path, config: PreTrainedConfig) -> dict[str, str]:
    """The line of the section data that says which tokenizer: the model's own, where it has one."""
    if not Path(source).exists():
        own = source
    elif (config_json.parent / "tokenizer.json").is_file():
        own = str(config_json.parent)
    else:
        size = min(4096, int(config.vocab_size))
        return {"tokenizer": f"  vocab_size: {size}             # of a tokenizer that is trained on the text"}
    return {"tokenizer": f"  tokenizer: {json.dumps(own)}"}


def _proxy_width(config: PreTrainedConfig, source: str) -> tuple[int, list[str]]:
    """The width of the proxies, and the names of sizes that stay: none, or where that makes no narrow ones the KV heads.

    It is the smallest of a sixteenth to half of the width that is not too narrow and keeps every other size whole.
    """
    width = int(config.hidden_size)
    kv_heads = [name for name in KV_HEADS if getattr(config, name, None) is not None]
    found = _narrowest(config, [])
    if kv_heads and (found is None or found > WIDEST):
        with_fixed = _narrowest(config, kv_heads)
        if with_fixed is not None:
            return with_fixed, kv_heads
    if found is None:
        raise UserError(
            f"no part of hidden_size {width} of {source} from a sixteenth to half keeps its other sizes whole: write a "
            "sweep.yaml with a base_width of your own, or with a base_config, as docs/operating.md tells."
        )
    return found, []


def _narrowest(config: PreTrainedConfig, fixed: list[str]) -> int | None:
    width = int(config.hidden_size)
    for share in SHARES:
        if width % share == 0 and width // share >= min(NARROWEST, width // 4):
            try:
                scale_width(config, width // share, fixed=fixed)
            except UserError:
                continue
            return width // share
    return None
