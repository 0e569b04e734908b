"""From an empty folder to the evidence page, by the installed commands: python benchmarks/newcomer.py PYTHON [--folder FOLDER].

PYTHON is that of an environment into which the wheel was installed (`make package` builds it), e.g.

    python -m venv /tmp/newcomer && /tmp/newcomer/bin/pip install torch==2.13.0 "hf_power[train,plots,fit] @ file://.../hf_power.whl"

new and sweep are typed as README has them, and after that each command is the one that the last has named, up to the end of pretrain.
Results: benchmarks/results/newcomer.json, what each command took; nothing else may run on the machine meanwhile.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "newcomer.json"
VERSIONS = "import hf_power, platform, torch, transformers as t; print(platform.python_version(), torch.__version__, t.__version__)"


def run(command, folder, bin_folder):
    """Run a command as it is typed; its row, and the command that it names as the next."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = inherited | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output = subprocess.run(
        shlex.split(command), env=env, cwd=folder, text=True, check=True, stdout=subprocess.PIPE
    ).stdout
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{output}\n# {command}: {wall:.0f} s, {cpu:.0f} s of CPU", flush=True)
    named = [line.removeprefix("next: ") for line in output.splitlines() if line.startswith("next: ")]
    return {"command": command, "seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}, named[-1] if named else None


def main():
    """Run the chain, and write what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=Path)
    parser.add_argument("--folder", type=Path, help="an empty one; by default a new one")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    bin_folder = given.python.absolute().parent
    versions = subprocess.run(
        [given.python, "-c", VERSIONS], text=True, check=True, stdout=subprocess.PIPE, cwd=folder
    ).stdout
    rows = [run("hf-power new my_run --from llama", folder, bin_folder)[0]]
    command = "hf-power sweep my_run/sweep.yaml --output_dir my_run/sweep"
    while not rows[-1]["command"].startswith("hf-power pretrain"):
        row, command = run(command, folder, bin_folder)
        rows.append(row)
    rows.append(run("hf-power report my_run", folder, bin_folder)[0])
    total = round(sum(row["seconds"] for row in rows), 1)
    cores = len(os.sched_getaffinity(0))
    result = {"python_torch_transformers": versions.split(), "cores": cores, "seconds": total, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{total:.0f} s on {cores} cores")


if __name__ == "__main__":
    main()
