"""Do other people's front ends and hf_power fit into one environment, and do they train there at the right rates?

    python tests/front_ends.py [--uv PATH] [--only NAME ...] [--run FOLDER [--keep]]

Each front end's newest release is resolved by its own pins, alone and beside this checkout, by uv (`pip install uv`) in seconds
to minutes each. Those that are on no package index are resolved by the pins that they publish. With --run each is installed into
an environment of its own below FOLDER, which is removed afterwards, and trains the ten steps of trials.py on the CPU.

Rows go to benchmarks/results/front_ends.jsonl, and docs/interop.md has the table of them all. By hand, and once a week. uv's own
variables say where packages come from: UV_FIND_LINKS=FOLDER takes a CPU build of torch from a folder, UV_TORCH_BACKEND=cpu from
torch's index.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from trials import TRIALS, Failed, greatest_difference, trained

ROOT = Path(__file__).parent.parent
ROWS, PAGE = ROOT / "benchmarks" / "results" / "front_ends.jsonl", ROOT / "docs" / "interop.md"
BEGIN, END = "<!-- front ends: written by tests/front_ends.py -->\n", "<!-- end of the front ends -->\n"
SHOWN = ("torch", "transformers", "accelerate", "datasets", "huggingface-hub")
HEAD = (
    "| front end | Python | resolves beside hf_power | newest allowed | trained with | ten steps at the closed form's rates | "
    "command | in its environment otherwise |\n|---|---|---|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class FrontEnd:
    """A distribution, the Python that its newest release asks for, and its published pins if it is on no index.

    `torch` is what it is run with, a version that its pins allow.
    """

    name: str
    python: str = "3.11"
    pins: list[str] = field(default_factory=list)
    torch: str = "torch==2.13.0"


FRONT_ENDS = [
    FrontEnd("trl"),
    # torchaudio's newest release is 2.11, and loads beside no other torch.
    FrontEnd("llamafactory", torch="torch==2.11.0"),
    *(FrontEnd(name) for name in ("ms-swift", "axolotl", "lighteval", "verl", "unsloth")),
    FrontEnd("nemo-automodel"),
    FrontEnd("megatron-bridge", "3.12"),
    FrontEnd("h2o-llmstudio", "3.10", ["transformers==4.56.1", "huggingface-hub<1"], "torch==2.6.0"),
    FrontEnd(
        "open-r1",
        "3.11",
        [
            *("accelerate==1.4.0", "datasets>=3.2.0", "huggingface-hub>=0.30.2,<1.0", "torch==2.6.0", "trl==0.18.0"),
            *("transformers==4.52.3", "deepspeed==0.16.8"),
        ],
        "torch==2.6.0",
    ),
]


@dataclass(frozen=True)
class Row:
    """What came out for one front end; `ran` holds versions, `result` the greatest relative difference or why there is none."""

    name: str
    version: str
    python: str
    resolves: str
    newest: dict[str, str] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    ran: dict[str, str] = field(default_factory=dict)
    result: float | str = "not run"
    command: str = ""
    otherwise: str = ""

    def line(self) -> str:
        """Its line of the table."""
        moved = f" ({', '.join(self.moved)} moved by hf_power)" if self.moved else ""
        right = f"yes, to {self.result:.0e}" if isinstance(self.result, float) else self.result.replace("|", "\\|")
        cells = (
            *(f"{self.name} {self.version}".strip(), self.python, self.resolves + moved, versions(self.newest)),
            *(
                versions(self.ran),
                right,
                f"`{self.command}`" if self.command else "",
                self.otherwise or "nothing" * bool(self.ran),
            ),
        )
        return f"| {' | '.join(cells)} |\n"


def versions(chosen: dict[str, str]) -> str:
    return ", ".join(f"{name} {chosen[name]}" for name in SHOWN if name in chosen)


def built(folder: Path) -> str:
    """The requirement of this checkout, as a wheel: uv holds a lock on the build of a folder while it downloads all else."""
    # In a copy, because setuptools leaves files of earlier builds in a checkout and takes them into the next one.
    shutil.copytree(ROOT / "hf_power", folder / "hf_power", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder], check=True)
    return f"hf_power @ {next(folder.glob('*.whl')).as_uri()}"


def resolved(uv: str, python: str, requirements: list[str]) -> dict[str, str] | str:
    """The version of each distribution that is chosen, or why there is no choice."""
    command = [uv, "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-version", python]
    command += ["--python-platform", "x86_64-manylinux_2_28", "-"]
    done = subprocess.run(command, input="\n".join(requirements), capture_output=True, text=True)
    if done.returncode:
        return " ".join(done.stderr.split())
    return dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))


def resolution(uv: str, ours: str, front_end: FrontEnd) -> Row:
    """Whether hf_power keeps the newest release out."""
    alone = resolved(uv, front_end.python, front_end.pins or [front_end.name])
    if isinstance(alone, str):
        return Row(front_end.name, "", front_end.python, f"does not resolve alone: {alone[:300]}")
    version = "" if front_end.pins else alone[front_end.name]
    # The release is held, because a resolver would rather take an older one than say no.
    wanted = front_end.pins or [f"{front_end.name}=={version}"]
    both = resolved(uv, front_end.python, [*wanted, ours])
    if isinstance(both, str):
        return Row(front_end.name, version, front_end.python, f"no: {both[:300]}")
    resolves = "yes, by its pins alone: it is on no index" if front_end.pins else "yes"
    moved = [name for name in SHOWN if name in alone and alone[name] != both[name]]
    return Row(front_end.name, version, front_end.python, resolves, {n: both[n] for n in SHOWN if n in both}, moved)


def environment(uv: str, ours: str, front_end: FrontEnd, version: str, folder: Path) -> Path | str:
    """The Python of a new environment with the front end by its pins and this checkout beside it, or why there is none."""
    trial = TRIALS[front_end.name]
    (folder / "constraints.txt").write_text(front_end.torch)
    # A marker that is never true is how uv leaves a dependency out.
    (folder / "overrides.txt").write_text("".join(f"{name} ; python_version < '3'\n" for name in trial.left_out))
    python = folder / "env" / "bin" / "python"
    wanted = [*(front_end.pins or [f"{front_end.name}=={version}"]), *trial.added, ours]
    install = [uv, "pip", "install", "-q", "--python", python, "-c", folder / "constraints.txt"]
    install += ["--overrides", folder / "overrides.txt", *wanted]
    for command in ([uv, "venv", "-q", "--python", front_end.python, folder / "env"], install):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return " ".join(done.stderr.split())
    return python


def run(uv: str, ours: str, front_end: FrontEnd, row: Row, folder: Path) -> Row:
    """The row with what came out of ten steps in an environment of the front end's own."""
    trial = TRIALS[front_end.name]
    python = environment(uv, ours, front_end, row.version, folder)
    row = replace(row, command=f"python -m hf_power.run {trial.shown}", otherwise=trial.otherwise)
    if isinstance(python, str):
        return replace(row, result=f"not installed: {python[:300]}")
    freeze = subprocess.run([uv, "pip", "freeze", "--python", python], capture_output=True, text=True, check=True)
    installed = dict(re.findall(r"^([\w.-]+)==(\S+)", freeze.stdout, re.MULTILINE))
    rates = trained(python, front_end.name, folder / "run")
    if isinstance(rates, str):
        result = error_in(rates) if isinstance(rates, Failed) else "evaluates"
    else:
        result = greatest_difference(rates)
    return replace(row, ran={name: installed[name] for name in SHOWN if name in installed}, result=result)


def error_in(output: str) -> str:
    """The line of what a command printed in which it said why it gave up: its last error, or its last words."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    # torchrun says last that a process has failed, which has said why before.
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) and "ChildFailedError" not in line]
    return f"no: {(errors or lines)[-1][:300]}"


def write(rows: list[Row]) -> None:
    """Replace the rows of these front ends in the file, and the table in the page by that of all rows."""
    known = [Row(**json.loads(line)) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    by_name = {row.name: row for row in [*known, *rows]}
    ordered = [by_name[front_end.name] for front_end in FRONT_ENDS if front_end.name in by_name]
    ROWS.write_text("".join(json.dumps(asdict(row)) + "\n" for row in ordered))
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + table(ordered) + END + rest.split(END)[1])


def table(rows: list[Row]) -> str:
    return HEAD + "".join(row.line() for row in rows)


def main() -> int:
    """Print and write the rows; 1 if hf_power's own pins keep a front end out or a rate is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uv", default="uv", help="the executable of uv")
    parser.add_argument("--only", nargs="+", choices=[each.name for each in FRONT_ENDS], help="these front ends")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="install and train too, in environments below it")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    given = parser.parse_args()
    wrong, wheels = 0, tempfile.TemporaryDirectory()
    ours = built(Path(wheels.name))
    for front_end in (each for each in FRONT_ENDS if not given.only or each.name in given.only):
        row = resolution(given.uv, ours, front_end)
        if given.run and front_end.name in TRIALS and row.newest:
            given.run.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f"{front_end.name}-", dir=given.run.resolve()))
            row = run(given.uv, ours, front_end, row, folder)
            if not given.keep:
                shutil.rmtree(folder)
        print(row.line(), end="", flush=True)
        write([row])
        wrong += row.resolves.startswith("no") or (isinstance(row.result, float) and row.result > 1e-9)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
