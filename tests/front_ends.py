"""Do other people's front ends and hf_power fit into one environment? python tests/front_ends.py [--uv PATH] > table.md

Each front end's newest release is resolved by its own pins, alone and beside this checkout, without installing anything;
uv (`pip install uv`) does it in seconds to minutes each. Those that are on no package index are resolved by the pins that they
publish. By hand, and once a week: docs/interop.md has the table.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN = ("torch", "transformers", "accelerate", "datasets", "huggingface-hub")


@dataclass(frozen=True)
class FrontEnd:
    """A distribution, the Python that its newest release asks for, and its published pins if it is on no index."""

    name: str
    python: str = "3.11"
    pins: list[str] = field(default_factory=list)


FRONT_ENDS = [
    *(FrontEnd(name) for name in ("trl", "llamafactory", "ms-swift", "axolotl", "lighteval", "verl", "unsloth")),
    *(FrontEnd(name, "3.12") for name in ("nemo-automodel", "megatron-bridge")),
    FrontEnd("h2o-llmstudio", "3.10", ["transformers==4.56.1", "huggingface-hub<1"]),
    FrontEnd(
        "open-r1",
        "3.11",
        [
            *("accelerate==1.4.0", "datasets>=3.2.0", "huggingface-hub>=0.30.2,<1.0", "torch==2.6.0", "trl==0.18.0"),
            *("transformers==4.52.3", "deepspeed==0.16.8"),
        ],
    ),
]


def resolved(uv: str, python: str, requirements: list[str]) -> dict[str, str] | str:
    """The version of each distribution that is chosen, or why there is no choice."""
    command = [uv, "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--python-platform", "x86_64-manylinux_2_28", "-"]
    done = subprocess.run(command, input="\n".join(requirements), capture_output=True, text=True)
    if done.returncode:
        return " ".join(done.stderr.split())
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


def row(uv: str, front_end: FrontEnd) -> tuple[str, bool]:
    """A line of the table, and whether hf_power keeps nobody out."""
    alone = resolved(uv, front_end.python, front_end.pins or [front_end.name])
    if isinstance(alone, str):
        return f"| {front_end.name} | {front_end.python} | does not resolve alone: {alone[:300]} | |", True
    version = "" if front_end.pins else alone[front_end.name]
    # The release is held, because a resolver would rather take an older one than say no.
    wanted = front_end.pins or [f"{front_end.name}=={version}"]
    both = resolved(uv, front_end.python, [*wanted, f"hf_power @ {ROOT.as_uri()}"])
    if isinstance(both, str):
        return f"| {front_end.name} {version} | {front_end.python} | no: {both[:300]} | |", False
    moved = [name for name in SHOWN if name in alone and alone[name] != both[name]]
    versions = ", ".join(f"{name} {both[name]}" for name in SHOWN if name in both)
    return (
        f"| {front_end.name} {version} | {front_end.python} | yes | {versions} | {', '.join(moved) or 'none'} |",
        True,
    )


def main() -> int:
    """Print the table; 1 if hf_power's own pins keep a front end out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uv", default="uv", help="the executable of uv")
    arguments = parser.parse_args()
    print("| front end | Python | resolves beside hf_power | with | moved by hf_power |\n|---|---|---|---|---|")
    fits = []
    for front_end in FRONT_ENDS:
        line, fit = row(arguments.uv, front_end)
        print(line, flush=True)
        fits.append(fit)
    return int(not all(fits))


if __name__ == "__main__":
    sys.exit(main())
