"""The picture of a run, and what holds for every picture: its letters, its file, and matplotlib."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pictures import verticals

from hf_power.plots.figures import save
from hf_power.plots.runs import plot_lr_and_loss
from hf_power.records.errors import MissingPackageError, UserError
from hf_power.records.run import Run

matplotlib = pytest.importorskip("matplotlib")

CURVE = [{"tokens": 500_000_000 * i, "loss": 2.0 + 1.0 / i, "learning_rate": 0.01 / i} for i in range(1, 6)]
CURVE[2]["eval_loss"] = 2.5
RUN = Run(name="a small run", loss_curve=CURVE)


def test_lr_and_loss_share_the_tokens():
    figure = plot_lr_and_loss(RUN)
    losses, rates = figure.axes
    assert figure.get_suptitle() == "a small run: 2.5B tokens, training loss 2.200"
    assert losses.get_ylabel() == "loss (nats per token)"
    assert (rates.get_ylabel(), rates.get_xlabel()) == ("learning rate", "tokens seen")
    assert losses.get_xlim() == rates.get_xlim()
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["training", "evaluation"]
    assert [list(values) for values in losses.lines[1].get_data()] == [[1_500_000_000], [2.5]]
    assert list(rates.lines[0].get_ydata()) == [0.01 / i for i in range(1, 6)]
    text = rates.xaxis.get_major_formatter()
    written = [text(tokens, 0) for tokens in (0, 500, 2_000, 250_000_000, 1_500_000_000, 10e12)]
    assert written == ["0", "500", "2,000", "250M", "1.5B", "10T"]


def test_lr_and_loss_without_evaluation_name_or_a_loss():
    curve = [
        {"tokens": 1000, "loss": None, "learning_rate": 0.01},
        {"tokens": 2000, "loss": 3.0, "learning_rate": 0.01},
    ]
    figure = plot_lr_and_loss(Run(loss_curve=curve))
    assert figure.axes[0].get_legend() is None
    assert figure.get_suptitle() == "2,000 tokens, training loss 3.000"


def test_trunk_and_tail_are_one_picture_and_told_apart_without_colour():
    """Two steps of 500M tokens are the tail of a run of 2.5B."""
    tail = Run(kind="anneal", loss_curve=CURVE, tokens_seen=2_500_000_000, steps=2, tokens_per_step=500_000_000)
    losses, rates = plot_lr_and_loss(replace(tail, held_out_loss=2.125)).axes
    for panel in (losses, rates):
        trunk, fall = panel.lines[:2]
        assert [list(line.get_xdata()) for line in (trunk, fall)] == [
            [5e8, 1e9, 1.5e9],
            [1.5e9, 2e9, 2.5e9],
        ]
        assert (trunk.get_linestyle(), fall.get_linestyle()) == ("-", "--")
        assert verticals(panel) == [1.5e9]
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["training, trunk", "training, tail", "evaluation"]
    assert losses.get_figure().get_suptitle() == "2.5B tokens, held-out loss 2.125 nats per token"


def test_a_run_without_a_curve_is_refused():
    with pytest.raises(UserError) as caught:
        plot_lr_and_loss(Run())
    assert str(caught.value) == "the run has no loss_curve to draw: pass a run with at least one point."


def test_a_saved_picture_is_a_whole_file(tmp_path):
    path = save(plot_lr_and_loss(RUN), tmp_path / "run.png")
    assert path == tmp_path / "run.png"
    assert (matplotlib.image.imread(path)[..., :3].min(axis=-1) < 0.9).mean() > 0.005
    assert [p.name for p in tmp_path.iterdir()] == ["run.png"]


def test_a_failed_write_keeps_the_old_picture_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_figure, path, **_kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "run.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        save(plot_lr_and_loss(RUN), tmp_path / "run.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("run.png", b"old")]


def test_missing_matplotlib_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError) as caught:
        plot_lr_and_loss(RUN)
    assert str(caught.value) == (
        'matplotlib is needed for plots and is not installed: run pip install "hf_power[plots]".'
    )
