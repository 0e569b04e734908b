"""The plain form of muP for the families of transformers: python benchmarks/plain_families.py [FAMILY ...].

For each family, tied and untied: the share of its parameters that have a role, and the slopes of the coordinate check over
widths 64 to 512 of the family's default config with small sizes, for each of three seeds, beside those of standard
parameterization. Each row is a line of benchmarks/results/plain_families.jsonl as soon as it is measured, and none is
measured twice. Without names all families below are measured, then plain_types.py says what becomes of every other type, and
benchmarks/results/plain_families.md is written.
"""

import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from statistics import fmean, variance

os.environ.setdefault("OMP_NUM_THREADS", "1")

import plain_types
import torch
import transformers
from plain_types import small
from transformers import AutoModelForCausalLM

from hf_power import coord_check, mup_init_
from hf_power.mup.optimizer import factors_of
from hf_power.records.errors import UserError

RESULTS = Path(__file__).resolve().parent / "results"
ROWS = RESULTS / "plain_families.jsonl"
_NAMES = """
    apertus arcee bloom codegen cohere cohere2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 falcon gemma gemma2 gemma3_text glm4
    gpt2 gpt_neo gpt_neox gpt_oss gptj granite granitemoe helium hunyuan_v1_dense llama llama4_text minimax_m2 mistral
    mixtral mpt nemotron olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm
    starcoder2
"""
FAMILIES = _NAMES.split()
SEEDS, STEPS = (0, 1, 2), 2
CHECK = {"form": "plain", "widths": (64, 128, 256, 512), "steps": STEPS, "lr": 0.003, "initializer_range": 0.06}
STANDARD = CHECK | {"form": None, "control": "standard", "widths": (64, 128, 192, 256), "steps": 1, "seeds": (0,)}
REMARKS = (
    "What fails is Falcon's multi-query attention: its one head of keys and values stays one at every width, and what attention adds "
    "then changes as width**0.3 (+.31 as well at widths 128 to 1024). See the rule of such tensors in hf_power/mup/roles.py.",
    "",
    "An earlier table had one seed, widths to 256 and an init of .02, and 26 of its rows failed. The noise of one seed was most of it. In "
    "OLMo 2 and EXAONE 4, whose blocks normalize what a branch puts out, it was the init: at width 64 a branch then puts out .00004 "
    "to .003, below the square root of the norm's epsilon, .0032, and one step changes it many times over; with .06 it is .008 to .3. "
    "No rule has been changed since.",
)
LIMIT, ROUTER_LIMIT = 0.1, -0.6


def classified(config):
    """The share of parameters with a role; a UserError where a tensor has none."""
    model = mup_init_(AutoModelForCausalLM.from_config(config), base_width=32)
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    return sum(sizes[name] for name in factors_of(model)) / sum(sizes.values())


def measure(family, tied):
    began, row = time.process_time(), {"family": family, "tied": tied}
    try:
        config = small(family, tie_word_embeddings=tied)
        row["classified"] = classified(config)
        slopes = {}
        for seed in SEEDS:
            for each in coord_check(config, seeds=(seed,), **CHECK).slopes:
                slopes.setdefault((each["module"], each["step"]), []).append(each["slope"])
        wrong = coord_check(config, **STANDARD).worst
    except UserError as error:
        return row | {"refused": str(error)}
    row["slopes"] = [{"module": module, "step": step, "by_seed": own} for (module, step), own in slopes.items()]
    row |= {"standard": wrong["slope"], "standard_at": wrong["module"]}
    return row | {"cpu_seconds": round(time.process_time() - began, 1)}


def kind_of(module):
    return "logits" if module == "logits" else "routers" if "router" in module else "hidden"


def deviation(slopes):
    """The standard deviation between seeds, pooled over modules and steps."""
    return math.sqrt(fmean(variance(each["by_seed"]) for each in slopes))


def judged(row, noise_of_logits):
    """What the table says of a row: means over seeds by kind, the error of a mean, and what is beyond its limit."""
    slopes = {
        kind: [s for s in row["slopes"] if kind_of(s["module"]) == kind] for kind in ("hidden", "routers", "logits")
    }
    means = {kind: [fmean(s["by_seed"]) for s in own] for kind, own in slopes.items()}
    error = {kind: deviation(own) / math.sqrt(len(SEEDS)) for kind, own in slopes.items() if own}
    error["logits"] = noise_of_logits[row["tied"]] / math.sqrt(len(SEEDS))
    first, last = means["logits"][0], means["logits"][-1]
    beyond = [
        s["module"]
        for s, mean in zip(slopes["hidden"], means["hidden"], strict=True)
        if abs(mean) > LIMIT + 2 * error["hidden"]
    ]
    if means["routers"] and not ROUTER_LIMIT - 2 * error["routers"] < min(means["routers"]):
        beyond.append("a router, downwards")
    if means["routers"] and max(means["routers"]) > LIMIT + 2 * error["routers"]:
        beyond.append("a router")
    if abs(last) > LIMIT + 2 * error["logits"] and abs(last) > abs(first):
        beyond.append("logits")
    return means, error, list(dict.fromkeys(beyond))


def text(rows):
    measured = [row for row in rows if "refused" not in row]
    noise = {}
    for tied in (True, False):
        logits = [s for row in measured if row["tied"] == tied for s in row["slopes"] if s["module"] == "logits"]
        noise[tied] = deviation(logits) if logits else 0.0
    table, count, strict = [], 0, 0
    for row in measured:
        means, error, beyond = judged(row, noise)
        count, strict = count + (not beyond), strict + (max(map(abs, means["hidden"])) < LIMIT)
        cells = [row["family"], "tied" if row["tied"] else "own", f"{row['classified']:.0%}"]
        cells += [f"{between(means['hidden'])} ± {2 * error['hidden']:.2f}"]
        cells += [f"{between(means['routers'])} ± {2 * error['routers']:.2f}" if means["routers"] else ""]
        cells += [f"{means['logits'][0]:+.2f}, {means['logits'][-1]:+.2f}"]
        cells += ["holds" if not beyond else f"FAILS ({', '.join(beyond)})"]
        table.append(f"| {' | '.join(cells)} | {row['standard']:+.2f} ({row['standard_at']}) |")
    lines = [
        f"`python benchmarks/plain_families.py`, transformers {transformers.__version__}: {count} of {len(measured)} rows hold, and in "
        f"{strict} every hidden slope lies within {LIMIT:g} as it was measured. Standard parameterization fails in all.",
        "",
        f"Widths {', '.join(map(str, CHECK['widths']))}; init {CHECK['initializer_range']:g} and rate {CHECK['lr']:g} at width 64; lowest and "
        f"highest slope over layers and steps 1 to {STEPS}, each the mean over {len(SEEDS)} seeds of the slope of the logarithm; ± is two standard "
        "errors of such a mean, from the differences between the seeds, pooled over the row. A row holds where every hidden slope lies within "
        f"{LIMIT:g} and these two errors, and routers' above {ROUTER_LIMIT:g}, since their initial readout falls as width**-0.5. Logits are "
        "given after the first and the last step: they have to be within the same limit, or flatter after the last step than after the first. "
        f"Two errors of the logits are {2 * noise[False] / math.sqrt(len(SEEDS)):.2f} with a head of its own and "
        f"{2 * noise[True] / math.sqrt(len(SEEDS)):.2f} with a tied one, pooled over the families; for a tied head they are those of its update alone.",
        "",
        *REMARKS,
        "",
        "| family | head | classified | hidden | routers | logits | verdict | standard parameterization |",
        "|---|---|---|---|---|---|---|---|",
        *table,
        "",
    ]
    lines += [
        f"Refused: {row['family']}, {'tied' if row['tied'] else 'own'} head: {row['refused']}"
        for row in rows
        if "refused" in row
    ]
    return "\n".join(lines) + "\n"


def between(slopes):
    return f"{min(slopes):+.2f} .. {max(slopes):+.2f}"


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    done = {(row["family"], row["tied"]) for row in rows}
    for family in sys.argv[1:] or FAMILIES:
        for tied in (True, False):
            if (family, tied) not in done:
                rows.append(measure(family, tied))
                with open(ROWS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(family, tied, rows[-1].get("refused", rows[-1].get("cpu_seconds")), flush=True)
    if not sys.argv[1:]:
        rows.sort(key=lambda row: (row["family"], not row["tied"]))
        (RESULTS / "plain_families.md").write_text(text(rows) + "\n" + plain_types.text(plain_types.survey()))


if __name__ == "__main__":
    main()
