"""How the demo's `a` was chosen: python benchmarks/demo_scale.py; rows go to benchmarks/results/demo_scale.json.

Runs of 300k tokens of the demo's model with a tail of 10 %; the figure is the training loss over the last 40 steps.
The held-out files, which the demo reports, take no part.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import yaml

from hf_power.pretrain import run as train
from hf_power.records.files import write_json
from hf_power.records.machine import versions
from hf_power.settings.settings import Settings

ROOT = Path(__file__).resolve().parent.parent


def main():
    rows = []
    for a in (4.0, 8.0, 16.0, 32.0):
        sections = yaml.safe_load((ROOT / "scripts/recipes/demo.yaml").read_text())
        sections["run"]["tokens"] = "300k"
        sections["training"] |= {"save_strategy": "no", "disable_tqdm": True, "lr_scheduler_kwargs": {"a": a}}
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            sections["training"]["output_dir"] = f"{folder}/run"
            run = train.pretrain(Settings.from_dict(sections))
        last = [point["loss"] for point in run.loss_curve if "loss" in point][-4:]
        rows.append({"a": a, "train_loss": sum(last) / 4, "loss_curve": run.loss_curve})
        print(f"a {a:g}  training loss over the last 40 steps {rows[-1]['train_loss']:.3f}", flush=True)
    result = {"command": "python benchmarks/demo_scale.py", "versions": versions(), "rows": rows}
    write_json(ROOT / "benchmarks/results/demo_scale.json", result)


if __name__ == "__main__":
    main()
