"""Pictures: what they say, that they are whole files, and that a failed write leaves nothing."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from hf_power.coord_check import CoordCheck
from hf_power.plots.figures import plot_coord_check, plot_lr_and_loss

matplotlib = pytest.importorskip("matplotlib")

EXPONENTS = {"embedding": 0.0, "layer 0 mlp": 0.1, "logits": -0.5}


def check(exponents: dict[str, float] = EXPONENTS) -> CoordCheck:
    rows = [
        {"module": module, "step": step, "width": width, "change": step * width**exponent}
        for module, exponent in exponents.items()
        for step in (1, 2, 3)
        for width in (64, 128, 256, 512)
    ]
    return CoordCheck(rows)


def run(**changes: Any) -> dict[str, Any]:
    curve: list[dict[str, Any]] = [
        {"tokens": 500_000_000 * i, "loss": 2.0 + 1.0 / i, "learning_rate": 0.01 / i} for i in range(1, 6)
    ]
    curve[2]["eval_loss"] = 2.5
    return {"name": "a small run", "loss_curve": curve, **changes}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures in the order in which they were saved."""
    from matplotlib.figure import Figure

    seen: list[Any] = []
    save = Figure.savefig

    def watched(figure: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", watched)
    return seen


def assert_picture(path: Path) -> None:
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)[..., :3]
    assert (pixels.min(axis=-1) < 0.9).mean() > 0.005
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_coord_check_shows_verdict_axes_and_slopes(tmp_path: Path, figures: list[Any]) -> None:
    path = plot_coord_check(check(), tmp_path / "check.png")
    assert_picture(path)
    (figure,) = figures
    assert figure.get_suptitle() == f"Coordinate check {check().verdict}"
    first, last = figure.axes
    assert (first.get_title(), last.get_title()) == ("step 1", "step 3")
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert (first.get_xlabel(), first.get_ylabel()) == ("width (hidden_size)", "RMS change of the output")
    assert [label.get_text() for label in first.get_xticklabels()] == ["64", "128", "256", "512"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "embedding +0.00",
        "layer 0 mlp +0.10",
        "logits -0.50 (!)",
    ]
    assert list(last.lines[0].get_ydata()) == [3.0] * 4


def test_coord_check_shows_the_steps_that_were_asked_for(tmp_path: Path, figures: list[Any]) -> None:
    plot_coord_check(check(), tmp_path / "check.png", steps=(2,))
    assert [panel.get_title() for panel in figures[0].axes] == ["step 2"]


def test_coord_check_draws_many_modules_in_different_colors_and_dead_ones(tmp_path: Path, figures: list[Any]) -> None:
    many = check({f"layer {i} mlp": 0.0 for i in range(14)})
    for row in many.rows[:4]:
        row["change"] = 0.0
    assert_picture(plot_coord_check(many, tmp_path / "check.png"))
    panel = figures[0].axes[0]
    assert len({line.get_color() for line in panel.lines}) == 14
    assert panel.get_legend().get_texts()[0].get_text() == "layer 0 mlp +nan (!)"


def test_a_step_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        plot_coord_check(check(), tmp_path / "check.png", steps=(1, 7))
    assert str(caught.value) == "steps [7] were not measured: choose from [1, 2, 3]."


def test_lr_and_loss_share_the_tokens(tmp_path: Path, figures: list[Any]) -> None:
    path = plot_lr_and_loss(run(), tmp_path / "run.png")
    assert_picture(path)
    (figure,) = figures
    losses, rates = figure.axes
    assert figure.get_suptitle() == "a small run"
    assert losses.get_ylabel() == "loss (nats per token)"
    assert (rates.get_ylabel(), rates.get_xlabel()) == ("learning rate", "tokens seen")
    assert losses.get_xlim() == rates.get_xlim()
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["training", "evaluation"]
    assert [list(values) for values in losses.lines[1].get_data()] == [[1_500_000_000], [2.5]]
    assert list(rates.lines[0].get_ydata()) == [0.01 / i for i in range(1, 6)]


def test_tokens_are_written_with_their_letter(tmp_path: Path, figures: list[Any]) -> None:
    plot_lr_and_loss(run(), tmp_path / "run.png")
    text = figures[0].axes[1].xaxis.get_major_formatter()
    written = [text(tokens, 0) for tokens in (0, 500, 2_000, 250_000_000, 1_500_000_000, 10e12)]
    assert written == ["0", "500", "2k", "250M", "1.5B", "10T"]


def test_lr_and_loss_without_evaluation_name_or_a_loss(tmp_path: Path, figures: list[Any]) -> None:
    curve = [
        {"tokens": 1000, "loss": None, "learning_rate": 0.01},
        {"tokens": 2000, "loss": 3.0, "learning_rate": 0.01},
    ]
    assert_picture(plot_lr_and_loss({"loss_curve": curve}, tmp_path / "run.png"))
    assert figures[0].axes[0].get_legend() is None
    assert figures[0].get_suptitle() == ""


@pytest.mark.parametrize("empty", [{}, {"loss_curve": []}])
def test_a_run_without_a_curve_is_refused(tmp_path: Path, empty: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        plot_lr_and_loss(empty, tmp_path / "run.png")
    assert str(caught.value) == "the run has no loss_curve to draw: pass a run with at least one point."


def test_a_failed_write_keeps_the_old_picture_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_figure: Any, path: Any, **_kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    (tmp_path / "run.png").write_bytes(b"old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plot_lr_and_loss(run(), tmp_path / "run.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("run.png", b"old")]


def test_missing_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError) as caught:
        plot_lr_and_loss(run(), tmp_path / "run.png")
    assert str(caught.value) == (
        'matplotlib is needed for plots and is not installed: run pip install "hf_power[plots]".'
    )
