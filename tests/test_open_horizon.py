"""benchmarks/open_horizon: models trained as one are those of the sweep's engine, and each way to finish is what it says."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_power.sweep.ensemble import Ensemble, Member

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "open_horizon"))
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
