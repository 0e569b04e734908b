"""The multi-power law, against a slow twin and synthetic curves."""

import json
import math

import numpy as np
import pytest
from sentences import refused

from hf_power.cli import main
from hf_power.fit.curve import Curve, longer, read_curve, with_tail
from hf_power.fit.curves import CurveLaw, fit_curves, last_loss
from hf_power.records.errors import UserError

LAW = CurveLaw(2.8, 0.6, 330.0, 0.6, 0.45, 5.0, 0.3, 0.57, np.zeros((8, 8)), 0.0, {}, 1.0)
STEPS = np.arange(2000.0, 20001.0, 100.0)


def rates(kind, steps=STEPS):
    share = (steps - steps[0]) / (steps[-1] - steps[0])
    if kind == "cosine":
        return 3e-4 * (0.1 + 0.9 * 0.5 * (1 + np.cos(math.pi * share)))
    if kind == "wsd":
        return 3e-4 * np.where(share < 0.8, 1.0, 1.0 - 0.9 * (share - 0.8) / 0.2)
    return np.full_like(steps, 3e-4)


def made(kind, steps=STEPS, noise=0.0, seed=0):
    curve = Curve(kind, steps, rates(kind, steps), np.empty(0))
    losses = LAW.losses(curve) + noise * np.random.default_rng(seed).standard_normal(len(steps))
    return Curve(kind, curve.steps, curve.rates, losses)


def test_the_law_is_its_formula():
    """Term by term, with loops, at three points of a cosine."""
    curve = Curve("cosine", STEPS, rates("cosine"), np.empty(0))
    said = LAW.losses(curve)

    def summed(values, upto):
        total = 0.5 * STEPS[0] * values[0]
        for i in range(1, upto + 1):
            total += (STEPS[i] - STEPS[i - 1]) * 0.5 * (values[i] + values[i - 1])
        return total

    slowed = [3e-4 * (rate / 3e-4) ** 0.57 for rate in curve.rates]
    for t in (0, 90, len(STEPS) - 1):
        fallen = 0.0
        for k in range(1, t + 1):
            since = summed(curve.rates, t) - summed(curve.rates, k - 1)
            fallen += (curve.rates[k - 1] - curve.rates[k]) * (1 - (1 + 0.6 * since * curve.rates[k] ** -0.3) ** -5.0)
        assert said[t] == pytest.approx(2.8 + 0.6 * summed(slowed, t) ** -0.45 - 330.0 * fallen, abs=1e-9)


def test_an_unseen_schedule_and_length_are_foreseen():
    """Of curves with noise: a decay, and twice the length of a cosine, within .005 and in the interval."""
    law = fit_curves([made("constant", noise=0.001), made("cosine", noise=0.001, seed=1)])
    for asked in (made("wsd"), made("cosine", np.arange(2000.0, 40001.0, 100.0))):
        loss, low, high = law.final(asked)
        assert loss == pytest.approx(asked.losses[-1], abs=0.005)
        assert low < asked.losses[-1] < high
        assert float(np.abs(law.losses(asked) - asked.losses).mean()) < 0.0045


def test_a_left_out_curve_widens_the_interval():
    curves = [made("constant"), made("cosine"), made("wsd")]
    law = fit_curves(curves)
    assert set(law.left_out) == {"constant", "cosine", "wsd"}
    shifted = Curve("wsd", curves[2].steps, curves[2].rates, curves[2].losses - 0.05)
    wide = fit_curves([*curves[:2], shifted])
    assert abs(wide.left_out["wsd"]) > 0.03
    ends = [found.final(curves[1]) for found in (law, wide)]
    assert ends[1][2] - ends[1][1] > 3 * (ends[0][2] - ends[0][1])


def test_schedules_that_are_made_of_a_curve():
    curve = made("constant")
    twice = longer(curve, 2)
    assert (twice.steps[0], twice.steps[-1]) == (2000, 40000)
    tail = with_tail(curve, 12_000, 4_000, "linear")
    assert np.interp([11_000, 12_000, 14_000, 16_000], tail.steps, tail.rates) == pytest.approx([3e-4, 3e-4, 1.5e-4, 0])
    beyond = with_tail(curve, 30_000, 4_000, "1-sqrt")
    assert beyond.steps[-1] == 34_000


def written(path, curve, header="step,lr,loss"):
    rows = [
        f"{s:g},{r!r},{x!r}" for s, r, x in zip(curve.steps, curve.rates.tolist(), curve.losses.tolist(), strict=True)
    ]
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_from_files_to_text_and_files(tmp_path, capsys):
    """Curves of CSVs, one as a tracker writes it, warmup and gaps included; schedules, a longer run, a branch."""
    plain = written(tmp_path / "constant.csv", made("constant"))
    text = written(tmp_path / "cosine.csv", made("cosine"), "Step,learning_rate,train_loss").read_text().splitlines()
    (tmp_path / "cosine.csv").write_text("\n".join([text[0], "1000,0.00015,5.0", *text[1:], "20050,0.00003,"]) + "\n")
    asked = written(tmp_path / "asked.csv", made("wsd"))
    assert read_curve(tmp_path / "cosine.csv").steps[[0, -1]].tolist() == [2000, 20000]
    argv = ["forecast", "--curves", str(plain), str(tmp_path / "cosine.csv"), "--schedules", str(asked), "--times", "2"]
    assert main([*argv, "--branches", "10000", "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"measured {last_loss(made('wsd')):.4f}" in said
    assert "cosine.csv, 1-sqrt from 10,000" in said
    assert "cosine.csv x 2" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"forecast.csv", "forecast.png"}


def test_a_run_of_ours_is_a_curve(tmp_path):
    curve = made("cosine")
    points = [
        {"step": s, "tokens": 128 * s, "loss": x, "learning_rate": r}
        for s, r, x in zip(curve.steps.astype(int).tolist(), curve.rates.tolist(), curve.losses.tolist(), strict=True)
    ]
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "name": "first", "loss_curve": points}))
    found = read_curve(tmp_path)
    assert found.name == "first"
    assert found.losses == pytest.approx(curve.losses)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step,loss\n1,2\n", "needs the columns step and lr"),
        ("step,lr,loss\n1,0.1,3\n2,0.1,x\n", "has a value that is no number"),
        ("step,lr,loss\n1,0.1,3\n", "has 1 points of a curve, at least 10 are needed"),
        ("step,lr,loss\n" + "".join(f"{i},0.1,-3\n" for i in range(1, 20)), "negative, zero or not finite"),
        ("step,lr,loss\n" + "".join(f"{i},0.1,3\n" for i in range(1, 20)), "no curve has a rate that falls"),
    ],
)
def test_a_curve_that_cannot_be_used_is_one_sentence(tmp_path, capsys, text, sentence):
    (tmp_path / "curve.csv").write_text(text)
    assert main(["forecast", "--curves", str(tmp_path / "curve.csv")]) == 2
    assert sentence in capsys.readouterr().err


def test_numbers_out_of_range_are_refused():
    curve = made("constant")
    for call in (lambda: longer(curve, 0.05), lambda: longer(curve, 1e3)):
        with refused(UserError, "times must be at most 100"):
            call()
    with refused(UserError, "a tail must begin after the warmup"):
        with_tail(curve, 100, 10, "linear")
    with refused(UserError, "the tail's shape must be one of"):
        with_tail(curve, 5000, 10, "steps")
