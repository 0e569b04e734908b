"""Whether a run is on its recipe's forecast: the line at each log, run.json and the picture."""

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_power.fit.forecast import fit_forecast
from hf_power.fit.result import Cell
from hf_power.plots.runs import plot_lr_and_loss
from hf_power.pretrain.course import TRUNK_ABOVE, OnCourse
from hf_power.pretrain.record import RunRecord
from hf_power.records.run import Run

SCHEDULE = {"decay_start_tokens": 8_000_000, "decay_tokens": 2_000_000}


def cell(tokens, batch):
    octaves = np.arange(-2, 3) / 2
    loss = 2.0 + 3.0 * (tokens / 1e6) ** -0.3 + 20 * (tokens / batch) ** -1.0
    losses = tuple((loss + 0.01 * octaves**2).tolist())
    return Cell("linear", 64, batch, tokens, tuple((2.0 ** (octaves - 9)).tolist()), losses, (1,) * 5, used=True)


@pytest.fixture(scope="module")
def forecast():
    return fit_forecast([cell(t, b) for t in (1_000_000, 3_000_000, 9_000_000) for b in (1000, 4000, 16_000)])


def said(capsys, course, tokens, loss, tmp_path):
    """The line after a log of a run at so many tokens."""
    record = course.record
    logs = {"loss": loss, "learning_rate": 0.01}
    args, state, control = TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl()
    record.update(Run(tokens_seen=tokens, tokens_per_step=4000, schedule=SCHEDULE, loss_curve=record.run.loss_curve))
    # The record counts the tokens of a run by itself; this log is of a run that is over.
    record._over = True
    record.on_log(args, state, control, logs)
    course.on_log(args, state, control, logs)
    return capsys.readouterr().out


def test_a_line_says_on_course_or_by_how_much_and_since_when(tmp_path, capsys, forecast):
    record = RunRecord(Run(tokens_per_step=4000), tmp_path, 4000)
    course = OnCourse(record, forecast, 64)
    assert said(capsys, course, 100_000, 9.0, tmp_path) == ""
    middle, low, high = forecast.at(2_000_000, 4000, 64)
    line = said(capsys, course, 2_000_000, middle, tmp_path)
    assert f"reaches {middle:.3f} ({low:.3f} to {high:.3f}): on course, the tail has yet to take some of it off" in line
    assert record.run.loss_curve[-1]["forecast_loss"] == middle
    assert "on course" in said(capsys, course, 2_000_000, high * (1 + 0.9 * TRUNK_ABOVE), tmp_path)
    worst = high * (1 + TRUNK_ABOVE) + 0.1
    assert "OFF COURSE by 0.100 above what it should be, since 2,000,000 tokens" in said(
        capsys, course, 2_000_000, worst, tmp_path
    )
    assert "since 2,000,000 tokens" in said(capsys, course, 4_000_000, worst, tmp_path)
    _, low, high = forecast.at(10_000_000, 4000, 64)
    assert "on course, the tail is over" in said(capsys, course, 10_000_000, (low + high) / 2, tmp_path)
    assert "OFF COURSE by 0.050 below" in said(capsys, course, 10_000_000, low - 0.05, tmp_path)
    assert "since 10,000,000 tokens" in said(capsys, course, 10_000_000, high + 0.01, tmp_path)
    labels = [line.get_label() for line in plot_lr_and_loss(record.run).axes[0].get_lines()]
    assert "forecast of a run that ends here" in labels
