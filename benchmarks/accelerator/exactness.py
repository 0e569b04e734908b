"""Parts `resume` and `coordinates`: is a killed run the same run on this device, and does muP hold there in bf16?"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import torch
import yaml
from common import DEVICE, tokenizer_of
from engine import CASES, sections
from transformers import LlamaConfig

from hf_power.coordinates import coord_check
from hf_power.settings.settings import Settings

STEPS, SAVE = 60, 20


def command(folder, settings, deterministic):
    """The command line of a run, resumed if there is something to resume."""
    flags = ["--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    flags += ["--full_determinism", "true"] if deterministic else []
    return [sys.executable, "-m", "hf_power.cli", "pretrain", str(settings), *flags]


def fingerprint(folder):
    """Digest of the weights, and the losses of every step."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return weights, [point["loss"] for point in record["loss_curve"] if "loss" in point]


def start(folder, *arguments):
    log = folder.with_suffix(".log").open("ab")
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return subprocess.Popen(command(folder, *arguments), stdout=log, stderr=log, env=environment)


def wait_for(folder, process, seconds=600):
    """Until the first checkpoint of a run is sealed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if list(folder.glob(f"checkpoint-{SAVE}/manifest.json")):
            return
        time.sleep(0.02)
    raise SystemExit(f"{folder} has no checkpoint: {folder.with_suffix('.log').read_text()[-2000:]}")


def resume(rows, options, folder):
    """Two runs of one command and one that is killed and goes on, side by side; with and without determinism."""
    width, layers, vocabulary, block, _ = CASES["1M"]
    made = sections(width, layers, vocabulary, block, 8 * block, options.dataset)
    if options.dry_run:
        made = sections(32, 2, 512, 64, 256, options.dataset)
    made["run"]["tokens"] = STEPS * made["training"]["per_device_train_batch_size"] * made["data"]["block_size"]
    made["training"] |= {"save_strategy": "steps", "save_steps": SAVE, "logging_steps": 1, "max_grad_norm": 1.0}
    tokenizer = tokenizer_of(Settings.from_dict(made | {"training": made["training"] | {"output_dir": "unused"}}))
    tokenizer.save_pretrained(folder / "tokenizer")
    made["data"]["tokenizer"] = str(folder / "tokenizer")
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(made), encoding="utf-8")
    kinds = (True, False) if DEVICE == "cuda" else (True,)
    names = [(kind, name) for kind in kinds for name in ("one", "two", "killed")]
    folders = {key: folder / f"{'deterministic' if key[0] else 'default'}-{key[1]}" for key in names}
    running = {key: start(folders[key], file, key[0]) for key in names}
    for kind in kinds:
        killed = folders[kind, "killed"]
        wait_for(killed, running[kind, "killed"])
        running[kind, "killed"].send_signal(signal.SIGKILL)
        running[kind, "killed"].wait()
        running[kind, "killed"] = start(killed, file, kind)
    for key, process in running.items():
        if process.wait(timeout=600):
            raise SystemExit(f"{key} failed: {folders[key].with_suffix('.log').read_text()[-2000:]}")
    for kind in kinds:
        one, two, killed = (fingerprint(folders[kind, name]) for name in ("one", "two", "killed"))
        distance = max(abs(a - b) for a, b in zip(one[1], killed[1], strict=True))
        between = max(abs(a - b) for a, b in zip(one[1], two[1], strict=True))
        rows.add(
            "resume",
            full_determinism=kind,
            steps=len(one[1]),
            two_runs_equal=one == two,
            killed_run_equal=one == killed,
            largest_loss_difference_killed=distance,
            largest_loss_difference_two_runs=between,
        )


def coordinates(rows, options):
    """Slopes in fp32 on the CPU, and in fp32 and bf16 on the device."""
    config = LlamaConfig(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=1, head_dim=64)
    ways = {"fp32 on the CPU": {}, "fp32": {"device": DEVICE}, "bf16": {"device": DEVICE, "bf16": True}}
    for name, arguments in ways.items():
        torch.manual_seed(0)
        result = coord_check(config, seeds=(0,) if options.dry_run else (0, 1, 2), **arguments)
        worst = result.worst
        rows.add(
            "coordinates",
            way=name,
            passed=result.passed,
            worst_slope=worst["slope"],
            module=worst["module"],
            step=worst["step"],
            slopes=result.slopes,
        )
