"""A kill at every place that can be armed, and some by the clock: campaign.py in small, started from a fork server."""

import multiprocessing
import os
import signal
import subprocess
import sys

import campaign
import inject
import pytest
from processes import free_port
from warm import fork_workers

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")]
STEPS, SAVE_STEPS = 60, 5
BY_CLOCK = [
    {"place": campaign.START, "delay": 0.3, "target": "process"},
    {"place": campaign.TRAIN, "delay": 0.1, "target": "process group"},
]


class Forked:
    """hf-power without its start-up: what campaign asks of a Popen, from a server that has imported everything."""

    server = multiprocessing.get_context("forkserver")

    def __init__(self, verb, fault, out, target=None):
        fork_workers()
        self.process = self.server.Process(target=target or run_forked, args=(verb, fault, out))
        self.process.start()
        self.pid, self.args = self.process.pid, verb

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, seconds):
        self.process.join(seconds)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, seconds)


def run_forked(verb, fault, out):
    os.setsid()
    run(verb, fault, out)


def run(verb, fault, out):
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = f"{out}-cache"
    if "count" in fault:
        inject.arm(fault["place"], fault["count"])
    from hf_power.cli import run_verb

    sys.exit(run_verb(verb[0], verb[1:]))


def two_forked(verb, fault, out):
    """A launcher and its two ranks: when one has ended with an error, it ends the other."""
    return Forked([*verb, "--per_device_train_batch_size", "2"], fault, out, run_two)


def run_two(verb, fault, out):
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    os.environ["MASTER_PORT"] = str(free_port())
    ranks = []
    for rank in ("0", "1"):
        if not (pid := os.fork()):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
            run(verb, fault, out)
        ranks.append(pid)
    failed = False
    while ranks:
        ended, status = os.wait()
        ranks.remove(ended)
        if status and not failed:
            failed = True
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    sys.exit(failed)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the settings and the run that nobody has killed."""
    folder = tmp_path_factory.mktemp("kills")
    campaign.prepare(folder, STEPS, SAVE_STEPS)
    campaign.whole_run(Forked, campaign.pretrain(folder / "whole", 3), folder / "whole")
    return folder


def killed(launch, verb, faults, out):
    rows = campaign.interrupted(launch, verb, faults, out, print)
    assert [row["hit"] for row in rows] == [True] * len(faults) + [False], rows[-1]
    return rows


def holds(rows, differences):
    assert [row["wrong"] for row in campaign.judged(rows, differences) if not campaign.holds([row])] == []


def armed(**counts):
    return [{"place": place, "count": count} for place, count in counts.items()]


EARLY = armed(cached=1, tokenizer=1, tokenize=1, cache=1)
SAVES = armed(mark=1, weights=2, between=6, state=8, trainer_state=2, record=3, rename=5, forward=30)
SEALS = armed(optimizer=25, hash=12, seal=2, load=2, sealed=2, rotate=1)
LATE = armed(model=1, evaluate=1, picture=1)


def test_every_place_is_tried():
    tried = {fault["place"] for fault in [*EARLY, *SAVES, *SEALS, *LATE]}
    assert tried == set(inject.PLACES) - {"row"} == {*campaign.EARLY, *campaign.TRAINING, *campaign.LATE}
    assert set(campaign.SWEEP) < set(inject.PLACES)


@pytest.mark.parametrize(
    ("faults", "limit"),
    [(EARLY + SAVES, 3), (SEALS + LATE, 1), (BY_CLOCK, 3)],
    ids=["data and saves", "seals and the end", "by the clock"],
)
def test_killed_again_and_again_it_ends_the_same(base, request, faults, limit):
    out = base / request.node.callspec.id.replace(" ", "_")
    rows = killed(Forked, campaign.pretrain(out, limit), faults, out)
    holds(rows, campaign.differences(out, base / "whole", limit))


def test_an_anneal_goes_on_too(base):
    source = str(campaign.checkpoints(base / "whole")[-1])
    verb = ["anneal", "--from", source, "--tokens", "4096", "--resume_from_checkpoint", "true", "--output_dir"]
    campaign.whole_run(Forked, [*verb, str(base / "annealed")], base / "annealed")
    out = base / "tail"
    rows = killed(Forked, [*verb, str(out)], armed(weights=1, seal=2, state=4, model=1), out)
    holds(rows, campaign.differences(out, base / "annealed", 3))


def test_a_sweep_killed_while_it_writes(base):
    verb = campaign.sweep(base / "sweep", 1)
    campaign.whole_run(Forked, verb, base / "sweep")
    out = base / "swept"
    rows = killed(Forked, campaign.sweep(out, 1), armed(row=1, state=1, rename=2), out)
    holds(rows, campaign.other_rows(out, base / "sweep"))


def test_two_processes_lose_one(base):
    campaign.whole_run(two_forked, campaign.pretrain(base / "two", 3), base / "two")
    out = base / "two_killed"
    fault = {"place": campaign.TRAIN, "delay": 0.1, "target": "rank 0"}
    rows = killed(two_forked, campaign.pretrain(out, 3), [fault], out)
    holds(rows, campaign.differences(out, base / "two", 3, campaign.TOLERANCE))
