"""Which of transformers' causal LMs have a muP rule in the plain form: python benchmarks/plain_types.py.

Each type of MODEL_FOR_CAUSAL_LM_MAPPING_NAMES is built from its default config with small sizes, first without memory. It is
then one of: classified; refused, with the sentence that a user gets; of several models, whose text model counts; or not built,
where its default config with small sizes makes no model that runs, for which this script's sizes are as likely at fault.
benchmarks/results/plain_types.json is written, of which plain_families.py makes a part of its page.
"""

import collections
import json
import traceback
import warnings
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_power import mup_init_
from hf_power.mup.optimizer import factors_of
from hf_power.mup.shrink import shrink
from hf_power.records.errors import UserError
from hf_power.records.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
# Default configs of these lack a number that their models need.
CHANGES = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "zamba2": {"use_mem_rope": False},
}
LARGEST = 50_000_000  # Parameters of a model that is not small although its config was made small.


def small(family, **changes):
    """The default config of a family with small sizes."""
    changes = {"vocab_size": 64, "pad_token_id": None} | changes
    return shrink(CONFIG_MAPPING[family](), **changes | CHANGES.get(family, {}))


def outcome(family):
    """("classified", "") or ("refused", why) or ("not built", why)."""
    try:
        config = CONFIG_MAPPING[family]()
        if getattr(config, "get_text_config", None) and config.get_text_config() is not config:
            return "of several models", f"its text model is {config.get_text_config().model_type}"
        config = small(family, pad_token_id=2)  # Encoders cannot do without one.
        with torch.device("meta"):
            size = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            return "not built", f"{size:,} parameters with small sizes"
        model = AutoModelForCausalLM.from_config(config)
        model(input_ids=torch.tensor([[1, 0]]), use_cache=False)
    except UserError as error:
        return "refused", str(error)
    except Exception as error:  # Whatever another package's code raises at its own defaults.
        return "not built", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    try:
        mup_init_(model, base_width=32)
        assert len(factors_of(model)) == sum(tensor.requires_grad for tensor in model.parameters())
    except UserError as error:
        return "refused", str(error)
    except Exception as error:  # A fault of ours, which is shown as what it is.
        return "FAULT", "".join(traceback.format_exception_only(error)).strip()
    return "classified", ""


def text(found):
    count = collections.Counter(kind for kind, _ in found.values())
    lines = [
        f"`python benchmarks/plain_types.py`, transformers {transformers.__version__}: of {len(found)} causal-LM types"
    ]
    lines += [", ".join(f"{number} {kind}" for kind, number in count.most_common()) + ".", ""]
    lines += ["Classified: " + ", ".join(family for family, (kind, _) in found.items() if kind == "classified") + "."]
    for kind in (kind for kind in count if kind != "classified"):
        lines += ["", f"{kind.capitalize()}:", ""]
        lines += [f"* {family}: {why}" for family, (each, why) in found.items() if each == kind]
    return "\n".join(lines) + "\n"


def survey():
    """What becomes of all types: type -> (outcome, why); kept in plain_types.json, and made anew with another transformers."""
    path, version = RESULTS / "plain_types.json", transformers.__version__
    if path.exists() and json.loads(path.read_text())["transformers"] == version:
        return json.loads(path.read_text())["types"]
    found = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[family] = outcome(family)
        print(family, *found[family], flush=True)
    write_json(path, {"transformers": version, "types": found})
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(text(survey()))
