"""benchmarks/open_horizon: models trained as one are those of the sweep's engine, and each way to finish is what it says."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from hf_power.sweep.ensemble import Ensemble, Member

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "open_horizon"))
import analyse
import gpu
import run
import train

pytestmark = [
    pytest.mark.slow,
    # torch's own compiler calls what torch deprecates.
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]
BATCH, STEPS, EVAL_TOKENS = 128, 20, 2048


@pytest.fixture(autouse=True)
def eager():
    """A compiler would take longer than the steps."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def data(corpus):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.CORPORA, "python", str(corpus))
        return run.data_of("python", EVAL_TOKENS)


def members():
    power = train.Trunk("power", 2.0, -0.5, 0.6, 0.05, warmup_tokens=3 * BATCH)
    return [power, train.Trunk("constant", 0.02, warmup_tokens=3 * BATCH)], [0, 1]


def test_trunk_and_tail_are_those_of_the_sweeps_engine(data):
    trunks, seeds = members()
    settings = run.settings_of(32, BATCH, eval_tokens=EVAL_TOKENS)
    horizon = STEPS * BATCH
    found = train.train(train.Models(settings, seeds, data), trunks, BATCH, (horizon,), ())
    engine = Ensemble(settings, [Member(1.0, seed) for seed in seeds], data, device=torch.device("cpu"), batched=True)
    rates = np.stack([trunk.rates(BATCH, STEPS) for trunk in trunks])
    for step in range(STEPS):
        if step == 16:
            state = engine.state()
        engine.step(rates[:, step])
    assert found[horizon, "raw"] == pytest.approx(engine.held_out_losses(), abs=2e-5)
    engine.load_state(state)
    for x in (0.0, 0.25, 0.5, 0.75):
        engine.step(rates[:, 16] * (1 - x**0.5))
    assert found[horizon, "tail"] == pytest.approx(engine.held_out_losses(), abs=2e-5)


def test_an_average_is_the_mean_of_the_last_weights(data, monkeypatch):
    monkeypatch.setattr(train, "SAMPLES", STEPS)
    trunks, seeds = members()
    settings = run.settings_of(32, BATCH, eval_tokens=EVAL_TOKENS)
    horizon = STEPS * BATCH
    found = train.train(train.Models(settings, seeds, data), trunks, BATCH, (horizon,), (train.Average(0.2),))
    models = train.Models(settings, seeds, data)
    weights = []
    for step in range(STEPS):
        models.step(np.stack([trunk.rates(BATCH, STEPS) for trunk in trunks])[:, step])
        weights.append([tensor.clone() for tensor in models.weights])
    mean = [torch.stack(each).mean(0) for each in zip(*weights[-4:], strict=True)]
    assert found[horizon, "average 0.2"] == pytest.approx(models.held_out_losses(mean), abs=1e-5)


def test_linear_to_zero_ends_at_zero_and_too_long_a_line_does_not():
    assert run.linear_trunk(65536, 512, 1).rates(512, 128)[[0, 16, 72, -1]] == pytest.approx(
        [
            0,
            run.LINEAR.lr(65536, 512),
            run.LINEAR.lr(65536, 512) * 28672 / 57344,
            run.LINEAR.lr(65536, 512) * 512 / 57344,
        ],
        rel=1e-3,
    )
    stopped = run.linear_trunk(65536, 512, 4).rates(512, 128)
    assert stopped[-1] / run.LINEAR.lr(4 * 65536, 512) == pytest.approx(
        (262144 - 127 * 512) / (262144 - 8192), rel=1e-3
    )


def held_out_rows(losses, tokens):
    """Rows of a cell: (method, finish) -> seed -> loss."""
    cell = {"part": "held out", "corpus": "python", "width": 32, "batch": 512, "tokens": tokens}
    return [
        cell | {"method": method, "finish": finish, "seed": seed, "loss": loss}
        for (method, finish), by_seed in losses.items()
        for seed, loss in by_seed.items()
    ]


def test_a_way_is_paired_by_the_seeds_that_both_have_and_counts_its_own_cells():
    power, known = ("power", "average 0.2"), ("wsd planned 1024k", "tail")
    first = {known: {10: 3.00, 11: 3.10, 12: 9.0}, power: {10: 3.02, 11: 3.16, 13: 1.0}}
    first |= {("linear 4", "raw"): {11: 3.30, 12: 9.1}, ("linear 0.25", "raw"): {10: 3.07}}
    second = {("wsd planned 256k", "tail"): {10: 4.0, 11: 4.1, 12: 4.2}, power: {10: 3.99, 11: 4.12, 12: 4.23}}
    cells = analyse.cells_of(held_out_rows(first, 1024 * 1024) + held_out_rows(second, 256 * 1024), "python")
    found = analyse.differences(cells, analyse.OPEN, analyse.KNOWN)
    assert list(found.values()) == [pytest.approx([-0.01, 0.02, 0.03]), pytest.approx([0.02, 0.06])]

    each = analyse.summary(found, np.random.default_rng(0))
    # By hand: means .0133 and .04; squares .000867 and .0008 about them, with 2 and 1 degrees of freedom.
    deviation = math.sqrt((0.00086667 + 0.0008) / 3)
    half = student.ppf(0.975, 3) * deviation * math.sqrt(1 / 3 + 1 / 2) / 2
    assert (each["cells"], each["pairs"], each["sd"]) == (2, 5, pytest.approx(deviation, rel=1e-4))
    middle = (0.0133333 + 0.04) / 2
    assert each["mean"] == pytest.approx([middle, middle - half, middle + half], rel=0.04)

    text, _ = analyse.markdown("python", cells, np.random.default_rng(0))
    assert "| linear to zero, law's rate, planned 4x long, stopped | 1 | 2 | +0.1500 (" in text
    assert "| linear to zero, law's rate, rate planned 4x short | 1 | 1 | +0.0700 (-inf to +inf)" in text
    assert f"| {analyse.OPEN} | 2 | 5 | +0.0267 (" in text


def test_the_gpu_size_goes_on_where_it_was_cut_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "TOY", replace(gpu.TOY, cells=gpu.TOY.cells[1:], batches=(32,)))
    assert gpu.measure(tmp_path, math.inf, toy=True)
    path = tmp_path / "rows.jsonl"
    whole = path.read_text().splitlines()
    ends = [i for i, line in enumerate(whole) if "job" in json.loads(line)]
    path.write_text("\n".join(whole[: ends[-3] + 1]) + "\n")
    monkeypatch.setitem(gpu.SPEED, 32, 1.0)  # So that the jobs of the cell seem to take hours.
    assert not gpu.measure(tmp_path, 60, toy=True)
    assert "no time is left for held out, width 32, 128 a step: call it again" in capsys.readouterr().out
    monkeypatch.delitem(gpu.SPEED, 32)
    assert gpu.measure(tmp_path, math.inf, toy=True)
    again = path.read_text().splitlines()
    assert [line for line in again if "job" not in line] == [line for line in whole if "job" not in line]
    monkeypatch.setattr(sys, "argv", ["analyse.py", str(tmp_path)])
    analyse.main()
    assert "| Power, average .2 | 1 | 3 |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(gpu, "TOY", replace(gpu.TOY, text_bytes=20_000))
    with pytest.raises(SystemExit, match="has rows of another text than this machine's: pass another --folder"):
        gpu.measure(tmp_path, math.inf, toy=True)
