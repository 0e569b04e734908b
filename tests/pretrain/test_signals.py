"""SIGTERM and SIGINT: one sealed checkpoint of all processes, a telling exit code, and a run that goes on exactly."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from processes import PATIENCE, free_port, until
from safetensors.torch import load_file
from warm import python

from hf_power.checkpoints.seal import checkpoints, problems
from hf_power.cli import run_verb
from hf_power.pretrain import run as train
from hf_power.settings.settings import Settings

pytestmark = pytest.mark.slow  # a process each

ROOT = Path(__file__).parents[2]
STEPS, HELD = 40, 25
# Each process writes its id, so that a test can find it under a launcher; waits in a step after the first checkpoint until it
# may go on; and notes the signals that it has handled. So nothing here depends on how busy the machine is.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from transformers import Trainer

folder, rank = Path(sys.argv.pop()), os.environ.get("RANK", "0")
(folder / f"pid{rank}").write_text(str(os.getpid()))
install, train = signal.signal, Trainer.training_step

def noting(number, handler):
    def note(*given):
        handler(*given)
        (folder / f"noted{rank}").touch()
    return install(number, note if callable(handler) else handler)

def held(self, *given, **named):
    if self.state.global_step == HELD:
        (folder / f"held{rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
    return train(self, *given, **named)

signal.signal, Trainer.training_step = noting, held
from hf_power.cli import run_verb
sys.exit(run_verb("pretrain"))
""".replace("HELD", str(HELD))


@pytest.fixture(scope="module")
def whole(sections, tmp_path_factory):
    """The folder with the settings and the run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("signals")
    given = sections(folder / "whole", tokens=STEPS * 128, logging_steps=5, save_steps=20, save_total_limit=3)
    (folder / "run.yaml").write_text(yaml.safe_dump(given))
    (folder / "script.py").write_text(SCRIPT)
    train.pretrain(Settings.from_dict(given))
    return folder


def start(folder, out, *launcher, batch=4):
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    env["ACCELERATE_USE_CPU"] = "true"  # without it two processes are two runs of one process each
    flags = [folder / "run.yaml", "--output_dir", out, "--per_device_train_batch_size", batch, out.parent]
    command = [python(), *launcher, folder / "script.py", *flags]
    return subprocess.Popen(
        [str(part) for part in command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=env
    )


def interrupt(process, folder, numbers, rank=0, alone=False):
    """Send signals to the process, or to one rank alone, while the ranks are held in a step; what is said until the end."""
    try:
        until(lambda: (folder / f"held{rank}").exists() or process.poll() is not None)
        assert process.poll() is None, process.stderr.read()
        for number in numbers:
            os.kill(int((folder / f"pid{rank}").read_text()) if alone else process.pid, number)
            until((folder / f"noted{rank}").exists)
            (folder / f"noted{rank}").unlink()
        (folder / "go").touch()
        return process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()


def goes_on(folder, out, *flags):
    """The same command goes on from a sealed checkpoint between two regular ones or at one, to the same weights."""
    newest = checkpoints(out)[0]
    run = json.loads((out / "run.json").read_text())
    assert problems(newest) == []
    assert run["status"] == "stopped"
    assert newest.name == f"checkpoint-{run['steps']}"
    assert run["steps"] < STEPS
    assert not (out / "model.safetensors").exists()
    argv = [folder / "run.yaml", "--output_dir", out, "--resume_from_checkpoint", "true", *flags]
    assert run_verb("pretrain", [str(part) for part in argv]) == 0
    return load_file(out / "model.safetensors"), load_file(folder / "whole/model.safetensors")


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)], ids=str)
def test_a_signal_saves_and_the_run_goes_on_exactly(whole, tmp_path, numbers):
    out = tmp_path / "run"
    process = start(whole, out)
    said = interrupt(process, tmp_path, numbers)
    assert process.returncode == 128 + numbers[0]
    assert f"stopped by {numbers[0].name} after step " in said.splitlines()[-1]
    mine, undisturbed = goes_on(whole, out)
    assert mine.keys() == undisturbed.keys()
    assert all(mine[name].equal(undisturbed[name]) for name in mine)


@pytest.mark.parametrize("target", ["launcher", "one process"])
def test_two_processes_stop_at_the_same_step(whole, tmp_path, target):
    """The launcher passes the signal on and ends with a code of its own; the processes agree on the step."""
    out = tmp_path / "run"
    config = ROOT / "scripts/accelerate/cpu.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", free_port()]
    process = start(whole, out, *launcher, batch=2)
    said = interrupt(process, tmp_path, [signal.SIGTERM], rank=1, alone=target == "one process")
    assert process.returncode not in (0, None)
    assert "stopped by SIGTERM after step " in said, said[-5000:]
    assert len({line.split("after step ")[1].split(":")[0] for line in said.splitlines() if "stopped by" in line}) == 1
    goes_on(whole, out)
    mine, undisturbed = (json.loads((folder / "run.json").read_text()) for folder in (out, whole / "whole"))
    assert mine["status"] == "finished"
    points = [[p["step"] for p in run["loss_curve"] if "loss" in p] for run in (mine, undisturbed)]
    assert points[0] == points[1]
    assert mine["held_out_loss"] == pytest.approx(undisturbed["held_out_loss"], abs=1e-4)


def test_a_signal_in_the_last_step_changes_nothing(sections, tmp_path, monkeypatch):
    class Sender(train.StopOnSignal):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(train, "StopOnSignal", Sender)
    assert train.pretrain(Settings.from_dict(sections(tmp_path / "run"))).status == "finished"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
