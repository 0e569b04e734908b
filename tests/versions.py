"""Runs the tests of hf_power's core beside other versions of transformers: python tests/versions.py 4.57.6 5.6.2 ...

Each version is laid over the environment that this runs in, in a folder of its own below it, with what it needs to be of another
version too; that is quicker than an environment each. `make versions` runs those that docs/interop.md names. A test that
needs hf-power's own training is skipped where transformers is too old for it.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The schedule, both forms of muP, the coordinate check, the recipe, fit, plan and SealCheckpoints.
CORE = [
    "schedule",
    "test_schedule.py",
    "test_register.py",
    "test_follow.py",
    "mup",
    "test_mup.py",
    "test_coord_check.py",
    "test_models.py",
    "test_recipe.py",
    "fit",
    "plan",
    "checkpoints/test_callback.py",
    "checkpoints/test_checkpoint.py",
]
HUB = ["huggingface_hub==1.33.0", "httpx==0.28.1", "httpcore==1.0.9"]
# From which version on, and what that asks for beside itself.
NEEDS = {
    (4, 56): [
        *("huggingface_hub==0.36.0", "tokenizers==0.22.2", "datasets==4.4.2", "dill==0.4.0", "multiprocess==0.70.18"),
        *("fsspec==2025.9.0", "httpx==0.28.1", "httpcore==1.0.9"),
    ],
    (5, 0): [*HUB, "tokenizers==0.22.2"],
    (5, 17): HUB,
    (5, 20): [],
}


def laid_over(version: str) -> Path:
    """The folder with this version, which is made if it is not there."""
    folder = Path(sys.prefix) / "versions" / version
    if not folder.exists():
        numbers = tuple(map(int, version.split(".")[:2]))
        needed = next(packages for since, packages in reversed(NEEDS.items()) if numbers >= since)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, f"transformers=={version}", *needed], check=True)
    return folder


def run(versions: list[str]) -> int:
    """Run the core's tests beside each version; 1 if one of them failed."""
    failed = []
    for version in versions:
        environment = os.environ | {"PYTHONPATH": f"{laid_over(version)}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not elsewhere"]
        done = subprocess.run([*command, *CORE], cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
        lines = (
            [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            if done.returncode
            else []
        )
        print(
            "\n".join([*lines, f"transformers {version}: {(done.stdout or done.stderr).splitlines()[-1]}"]), flush=True
        )
        failed += [version] * bool(done.returncode)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
