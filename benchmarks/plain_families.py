"""The plain form of muP for the families of transformers: python benchmarks/plain_families.py [FAMILY ...].

For each family, tied and untied: the share of its parameters that have a role, and the slopes of the coordinate check over
widths 64 to 256 of the family's default config with small sizes, beside those of standard parameterization. Without names
all families below are measured, and benchmarks/results/plain_families.json and .md are written.
"""

import sys
import time
import warnings
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from hf_power import coord_check, mup_init_
from hf_power.coordinates import MAX_SLOPE, CoordCheck
from hf_power.mup.optimizer import factors_of
from hf_power.mup.shrink import shrink
from hf_power.records.errors import UserError
from hf_power.records.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"
_NAMES = """
    apertus arcee bloom codegen cohere cohere2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 falcon gemma gemma2 gemma3_text glm4
    gpt2 gpt_neo gpt_neox gpt_oss gptj granite granitemoe helium hunyuan_v1_dense llama llama4_text minimax_m2 mistral
    mixtral mpt nemotron olmo olmo2 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe smollm3 stablelm
    starcoder2 mamba jamba falcon_h1 recurrent_gemma rwkv xlstm qwen3_next kimi_linear minicpm3
"""
FAMILIES = _NAMES.split()
# Default configs of these lack a number that their models need.
CHANGES = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "zamba2": {"use_mem_rope": False},
}
STEPS, LR, WIDTHS = 2, 0.001, (64, 128, 192, 256)


def small(family: str, tied: bool):
    changes = {"tie_word_embeddings": tied, "vocab_size": 64, "pad_token_id": None}
    return shrink(CONFIG_MAPPING[family](), **changes | CHANGES.get(family, {}))


def classified(config) -> float:
    """The share of parameters with a role; a UserError where a tensor has none."""
    model = mup_init_(AutoModelForCausalLM.from_config(config), base_width=32)
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    return sum(sizes[name] for name in factors_of(model)) / sum(sizes.values())


def extremes(check: CoordCheck, *, logits: bool) -> tuple[float, float]:
    slopes = [s["slope"] for s in check.slopes if (s["module"] == "logits") == logits and "router" not in s["module"]]
    return min(slopes), max(slopes)


def holds(check: CoordCheck) -> bool:
    """Whether every slope is inside of the limit, but for those of routers that fall more slowly than width**-0.6.

    What the initial router makes of its changed input falls as width**-0.5; a rate that is wrong by m would show as -1 or +1.
    """
    inside = [abs(s["slope"]) < MAX_SLOPE for s in check.slopes if "router" not in s["module"]]
    return all(inside) and all(-0.6 < s["slope"] < MAX_SLOPE for s in check.slopes if "router" in s["module"])


def measure(family: str, tied: bool) -> dict[str, object]:
    began, row = time.perf_counter(), {"family": family, "tied": tied}
    try:
        config = small(family, tied)
        row["classified"] = classified(config)
        right = coord_check(config, form="plain", widths=WIDTHS, steps=STEPS, seeds=(0,), lr=LR)
        wrong = coord_check(config, control="standard", widths=WIDTHS, steps=1, seeds=(0,), lr=LR)
    except UserError as error:
        return row | {"refused": str(error)}
    row |= {"hidden": extremes(right, logits=False), "logits": extremes(right, logits=True)}
    row["logits_by_step"] = [s["slope"] for s in right.slopes if s["module"] == "logits"]
    routers = [s["slope"] for s in right.slopes if "router" in s["module"]]
    row |= {"routers": (min(routers), max(routers)) if routers else None, "passed": holds(right)}
    worst = wrong.worst
    row |= {"standard": worst["slope"], "standard_at": worst["module"], "standard_passed": wrong.passed}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def text(rows: list[dict[str, object]]) -> str:
    lines = [
        f"`python benchmarks/plain_families.py`, transformers {transformers.__version__}, widths 64, 128, 192, 256,"
    ]
    lines += [
        f"lowest and highest slope over layers and steps 1 to {STEPS}, one seed; the logits at step 1 and at the last.",
        "A verdict holds where every slope lies within .25, and routers' above -.6, whose initial readout falls as width**-0.5.",
        "One seed over a factor of 4 in width leaves a noise of about .2 in a slope: a row that fails was not repeated with more.",
        "For a tied head the logits are those of its update alone.",
        "",
    ]
    lines += ["| family | head | classified | hidden | routers | logits | verdict | standard parameterization |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if "refused" not in row):
        cells = [row["family"], "tied" if row["tied"] else "own", f"{row['classified']:.0%}"]
        cells += [between(row["hidden"]), between(row["routers"]) if row["routers"] else ""]
        cells += [f"{row['logits_by_step'][0]:+.2f}, {row['logits_by_step'][-1]:+.2f}"]
        cells += ["holds" if row["passed"] else "FAILS", f"{row['standard']:+.2f} ({row['standard_at']})"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Refused:", ""]
    refused = [row for row in rows if "refused" in row]
    return "\n".join(
        [*lines, *(f"* {row['family']}, {'tied' if row['tied'] else 'own'} head: {row['refused']}" for row in refused)]
    )


def between(slopes: tuple[float, float]) -> str:
    return f"{slopes[0]:+.2f} .. {slopes[1]:+.2f}"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    chosen = sys.argv[1:] or FAMILIES
    rows = []
    for family in chosen:
        for tied in (True, False):
            rows.append(measure(family, tied))
            print(rows[-1], flush=True)
    print(text(rows))
    if chosen is FAMILIES:
        write_json(RESULTS / "plain_families.json", {"transformers": transformers.__version__, "rows": rows})
        (RESULTS / "plain_families.md").write_text(text(rows) + "\n")


if __name__ == "__main__":
    main()
