"""A kill at every place that can be armed, and some by the clock: campaign.py in small, started from a fork server."""

import multiprocessing
import os
import subprocess
import sys

import campaign
import inject
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")]
STEPS, SAVE_STEPS = 120, 10
IMPORTED = ["hf_power.pretrain.run", "inject", "datasets", "matplotlib.pyplot"]
IMPORTED += ["transformers.models.granite.modeling_granite"]
BY_CLOCK = [
    {"place": campaign.START, "delay": 2.0, "target": "process"},
    {"place": campaign.TRAIN, "delay": 0.3, "target": "process group"},
]


class Forked:
    """hf-power without its start-up: what campaign asks of a Popen, from a server that has imported everything."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)

    def __init__(self, verb, fault, out):
        self.process = self.server.Process(target=run_forked, args=(verb, fault, out))
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
    ("launch", "faults", "limit"),
    [(Forked, EARLY + SAVES, 3), (Forked, SEALS + LATE, 1), (campaign.start_one, BY_CLOCK, 3)],
    ids=["data and saves", "seals and the end", "by the clock"],
)
def test_killed_again_and_again_it_ends_the_same(base, request, launch, faults, limit):
    out = base / request.node.callspec.id.replace(" ", "_")
    rows = killed(launch, campaign.pretrain(out, limit), faults, out)
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
    campaign.whole_run(campaign.start_two, campaign.pretrain(base / "two", 3), base / "two")
    out = base / "two_killed"
    fault = {"place": campaign.TRAIN, "delay": 0.5, "target": "rank 0"}
    rows = killed(campaign.start_two, campaign.pretrain(out, 3), [fault], out)
    holds(rows, campaign.differences(out, base / "two", 3, campaign.TOLERANCE))
