"""Ten steps under "power" in an environment of each front end's own pins; tests/front_ends.py runs them.

Every command is the one that the front end's own users type, behind `python -m hf_power.run`. The rates are those that the
optimizer itself steps with, and are compared with the closed form written out here.
"""

import math
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

FILES = Path(__file__).parent / "front_end_files"
CAP, BLOCK, BATCH, ACCUMULATION, STEPS, WARMUP, TAIL = 0.02, 32, 2, 3, 10, 2, 4
PATIENCE = 1800  # seconds; most of it goes into imports that no one has compiled before


@dataclass(frozen=True)
class Trial:
    """What a user types and the arguments that it goes on with; front_end_files/ has the files that it reads.

    `added` are distributions that it needs and that nobody's pins give it, `left_out` some of its pins that need a compiler or
    a GPU, `note` says what else is not its own, and an evaluator does not train.
    """

    shown: str
    arguments: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    note: str = ""
    trains: bool = True

    @property
    def otherwise(self) -> str:
        """What is not as its pins or its own entry point have it."""
        added = f"with {', '.join(self.added)}" if self.added else ""
        left_out = f"without {', '.join(self.left_out)}" if self.left_out else ""
        return "; ".join(filter(None, [added, left_out, self.note]))


COMMON = {
    "lr_scheduler_type": "power",
    "learning_rate": CAP,
    "max_steps": STEPS,
    "warmup_steps": WARMUP,
    "lr_scheduler_kwargs": '{"decay_ratio": 0.4}',
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": ACCUMULATION,
    "save_strategy": "no",
    "report_to": "none",
    "output_dir": "out",
}


def flags(**more: object) -> str:
    """The arguments that a Trainer's command has in common, and more of them."""
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in (COMMON | more).items())


SFT = flags(model_name_or_path="model", dataset_name="text", max_length=BLOCK, bf16=False) + " --packing --use_cpu"
SWIFT = flags(model="model", dataset="text/train.jsonl", max_length=BLOCK, model_type="llama", template="default")

TRIALS = {
    "trl": Trial("trl sft", f"{SFT} --packing_strategy wrapped"),
    "llamafactory": Trial("llamafactory-cli train train.yaml"),
    "ms-swift": Trial(
        "swift pt",
        f"{SWIFT} --use_hf true --tuner_type full --truncation_strategy left --split_dataset_ratio 0 --torch_dtype float32",
    ),
    "axolotl": Trial("axolotl train train.yaml", environment={"AXOLOTL_DO_NOT_TRACK": "1"}),
    "lighteval": Trial(
        "lighteval accelerate",
        "model_name=model,batch_size=2 tiny --custom-tasks tiny_task.py --max-samples 4",
        note="a model in the plain form of muP",
        trains=False,
    ),
    "verl": Trial(
        "train.py",
        environment={"VERL_USE_EXTERNAL_MODULES": "power_engine"},
        added=["uvicorn", "fastapi"],
        note="its optimizer, registry and config, but not its loop, which asks for NCCL",
    ),
    "unsloth": Trial(
        "train.py", flags(use_cpu=True), note="the model is loaded by transformers, not by its FastLanguageModel"
    ),
    "nemo-automodel": Trial(
        "torchrun --standalone --nproc_per_node 1 -m nemo_automodel.cli.app train.yaml",
        # The newest triton, which nothing holds back beside a CPU build of torch, fails in its import.
        added=["triton==3.7.1"],
    ),
    "h2o-llmstudio": Trial("train.py", flags(use_cpu=True), note="a plain Trainer, since its source is on no index"),
    "open-r1": Trial(
        "trl sft",
        SFT,
        note="TRL's script, which its own is like, since its source is on no index",
    ),
}


def closed_form() -> list[float]:
    """Ten rates: a linear warmup of two steps, min(cap, 4 beta n**-.51) at n tokens, IBM's tail of four steps."""
    per_step = BLOCK * BATCH * ACCUMULATION

    def law(step: float) -> float:
        return min(CAP, 4 * per_step / 4096 * (step * per_step) ** -0.51)

    warm = [step / WARMUP * law(WARMUP) for step in range(WARMUP)]
    end = STEPS - TAIL
    tail = [law(end) * (math.e * math.exp(-k / TAIL) - 1) / (math.e - 1) for k in range(TAIL)]
    return [*warm, *(law(step) for step in range(WARMUP, end)), *tail]


def greatest_difference(rates: list[float]) -> float:
    """The largest relative difference from the closed form; where that is zero, as at the first step, the difference."""
    assert len(rates) == STEPS, f"{len(rates)} steps were made: {rates}"
    return max(abs(got - wanted) / (wanted or 1) for got, wanted in zip(rates, closed_form(), strict=True))


def trained(python: Path, name: str, folder: Path) -> list[float] | str:
    """The rates of the optimizer steps of a front end's trial, or what it printed if it failed or trains nothing."""
    trial = TRIALS[name]
    folder.mkdir(parents=True)
    for file in [*FILES.glob("*.py"), *(FILES / name).glob("*")]:
        shutil.copy(file, folder)
    rates = folder / "rates.txt"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "RATES": str(rates)}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    # As in an environment that is activated: some front ends look for their launchers in the PATH.
    env["PATH"] = os.pathsep.join([str(python.parent), env["PATH"]])
    for script in ("make.py", "prepare.py"):
        if (folder / script).exists() and isinstance(made := printed([python, script], folder, env), Failed):
            return made
    command = [python, "-m", "hf_power.run", *shlex.split(f"{trial.shown} {trial.arguments}")]
    done = printed(command, folder, env | trial.environment | {"PYTHONPATH": str(folder)})
    if isinstance(done, Failed) or not trial.trains:
        return done
    if not rates.exists():
        return Failed(f"{done}\nno optimizer step was made, and the command did not say so by its exit code")
    return [float(line) for line in rates.read_text().split()]


class Failed(str):
    """What a command printed that failed."""


def printed(command: list[object], folder: Path, env: dict[str, str]) -> str:
    """What a command printed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=PATIENCE,
    )
    return Failed(done.stdout) if done.returncode else done.stdout
