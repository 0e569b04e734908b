"""Slopes of right and wrong models: python benchmarks/coord_check.py; table and rows go to benchmarks/results/.

The models and the controls are those of tests/test_coord_check.py. "natural" is the dense and the MoE model at init
0.1, learning rate 0.01, 256 tokens in the vocabulary and 4 x 64 in the batch: correct, and yet at or outside the limit.
"""

import sys
from pathlib import Path

from hf_power import coord_check
from hf_power.records.files import write_json

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import test_coord_check as models  # noqa: E402


def main():
    standard = models.StandardParametrization
    plain = {"init": standard.init, "param_groups": standard.groups, **standard.multipliers}
    natural = {"initializer_range": 0.1, "lr": 0.01, "vocab_size": 256, "batch_size": 4, "seq_len": 64}
    cases = {
        "dense": (models.llama(), {}),
        "GQA, 4 heads per KV head": (models.llama(num_key_value_heads=1), {}),
        "tied": (models.llama(tie_word_embeddings=True), {}),
        "MoE, 8 experts, 2 active": (models.mixtral(), {}),
        "control: standard parameterization": (models.llama(), plain),
        "control: experts left out": (models.mixtral(), {"param_groups": models.groups_without_experts}),
        "control: head counted twice": (models.llama(), {"param_groups": models.groups_with_head_twice}),
        "natural, dense": (models.llama(), natural),
        "natural, MoE": (models.mixtral(), natural),
    }
    rows = {}
    lines = ["`python benchmarks/coord_check.py`: lowest and highest slope over steps 1 to 4 and layers", ""]
    lines += ["| model | attention | MLP or MoE | router | logits | verdict |", "|---|---|---|---|---|---|"]
    for name, (config, options) in cases.items():
        check = coord_check(config, **options)
        rows[name] = {"passed": check.passed, "slopes": check.slopes, "rows": check.rows}
        cells = []
        for kinds in (("attention",), ("mlp", "moe"), ("router",), ("logits",)):
            slopes = [s["slope"] for s in check.slopes if s["module"].split()[-1] in kinds]
            cells.append(f"{min(slopes):+.2f} .. {max(slopes):+.2f}" if slopes else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {'passed' if check.passed else 'FAILED'} |")
        print(lines[-1], flush=True)
    write_json(ROOT / "benchmarks/results/coord_check.json", rows)
    (ROOT / "benchmarks/results/coord_check.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
