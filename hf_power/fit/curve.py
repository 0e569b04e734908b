"""Loss curves: reading them, and schedules that are made of them."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_power.fit.squares import Array
from hf_power.records.errors import NotFoundError, UserError, shown
from hf_power.records.run import Run
from hf_power.schedule import DECAY_SHAPES

_FEWEST_POINTS = 10
_COLUMNS = {"step": ("step", "steps", "global_step"), "lr": ("lr", "learning_rate"), "loss": ("loss", "train_loss")}


@dataclass(frozen=True)
class Curve:
    """The learning rate and, of a run that was made, the loss at rising steps.

    The rate is that of the largest group, linear between the points, and linear from 0 before the first one. `losses` is
    empty for a schedule that is asked about.
    """

    name: str
    steps: Array
    rates: Array
    losses: Array

    def sums(self, values: Array | None = None) -> Array:
        """The sum of the learning rates, or of other values at the points, up to each point."""
        values = self.rates if values is None else values
        before = 0.5 * self.steps[0] * values[0]
        between = np.diff(self.steps) * 0.5 * (values[1:] + values[:-1])
        return np.asarray(before + np.concatenate([[0.0], np.cumsum(between)]))

    def progress(self, exponent: float) -> tuple[Array, Array]:
        """The sum of ``peak * (rate / peak)**exponent``, and its slope with the logarithm of the exponent."""
        peak = float(self.rates.max())
        logs = np.log(np.maximum(self.rates / peak, 1e-12))
        weights = peak * np.exp(exponent * logs)
        return self.sums(weights), self.sums(weights * logs) * exponent


def longer(curve: Curve, times: float) -> Curve:
    """The schedule of a curve at so many times its length, with the same warmup."""
    if not curve.steps[0] < times * curve.steps[-1] <= 100 * curve.steps[-1]:
        raise UserError(
            f"times must be at most 100 and leave more than the warmup of {curve.name}, got {times}: correct it."
        )
    # The warmup stays as it is.
    steps = curve.steps[0] + (curve.steps - curve.steps[0]) * (times * curve.steps[-1] - curve.steps[0]) / max(
        curve.steps[-1] - curve.steps[0], 1.0
    )
    return Curve(f"{curve.name} x {times:g}", steps, curve.rates, np.empty(0))


def with_tail(curve: Curve, start: int, length: int, shape: str) -> Curve:
    """The schedule of a curve up to a step (its last rate goes on beyond its end), and from there a tail to 0."""
    if shape not in DECAY_SHAPES:
        raise UserError(f"the tail's shape must be one of {', '.join(DECAY_SHAPES)}, got {shape}: correct it.")
    if start <= curve.steps[0] or length < 1:
        raise UserError(
            f"a tail must begin after the warmup, at step {curve.steps[0]:,.0f} or later, and have a step or more, got "
            f"{start:,} and {length:,}: correct them."
        )
    kept = curve.steps < start
    rate = float(np.interp(start, curve.steps, curve.rates))
    shares = np.linspace(0, 1, 101)
    tail = rate * np.array([max(DECAY_SHAPES[shape](share), 0.0) for share in shares])
    steps = np.concatenate([curve.steps[kept], start + shares * length])
    name = f"{curve.name}, {shape} from {start:,}"
    return Curve(name, steps, np.concatenate([curve.rates[kept], tail]), np.empty(0))


def read_curve(path: Path, *, loss: bool = True) -> Curve:
    """A loss curve: a CSV with the columns step, lr and loss (loss may be missing), or a run.json or its folder.

    The rise of the rate at the start, a warmup, is left out, and counted as a line from 0.

    Args:
        path: of the file or folder.
        loss: keep rows without a loss out, as a tracker leaves it empty where it logged something else.

    Raises:
        NotFoundError: there is no such file.
        UserError: no such columns, values that are no numbers or out of range, or too few points.
    """
    if not path.exists():
        raise NotFoundError(f"there is no loss curve at {path}: correct the path.")
    if path.is_dir() or path.suffix == ".json":
        return _of_run(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV in UTF-8: write it with the columns step, lr and loss.") from error
    names = {name.strip().lower(): name for name in (rows[0] if rows else {}) if isinstance(name, str)}
    columns = {key: next((names[name] for name in known if name in names), None) for key, known in _COLUMNS.items()}
    if columns["step"] is None or columns["lr"] is None:
        raise UserError(
            f"{path} needs the columns step and lr, and loss for a run that was made, got {shown(', '.join(names)) if names else 'no rows'}: "
            "rename them."
        )
    wanted = [column for column in columns.values() if column is not None]
    if not loss and any(not (row[wanted[-1]] or "").strip() for row in rows):
        wanted = wanted[:2]
    kept = [row for row in rows if all((row[column] or "").strip() for column in wanted)]
    try:
        values = np.array([[float(row[column]) for column in wanted] for row in kept], dtype=np.float64)
    except ValueError as error:
        raise UserError(f"{path} has a value that is no number: {error}.") from error
    return curve_of(str(path.name), values.reshape(-1, len(wanted)), str(path))


def _of_run(path: Path) -> Curve:
    run = Run.load(path)
    points = [
        (p["step"], p["learning_rate"], p["loss"]) for p in run.loss_curve if {"loss", "learning_rate"} <= p.keys()
    ]
    return curve_of(run.name or str(path), np.array(points, dtype=np.float64).reshape(-1, 3), str(path))


def curve_of(name: str, values: Array, source: str) -> Curve:
    """A curve of rows of step, rate and (perhaps) loss, sorted, without its warmup; a UserError names the source."""
    values = values[np.argsort(values[:, 0], kind="stable")]
    values = values[np.concatenate([np.diff(values[:, 0]) > 0, np.ones(min(len(values), 1), dtype=bool)])]
    with_loss = values.shape[1] > 2
    if len(values) < (_FEWEST_POINTS if with_loss else 2):
        raise UserError(
            f"{source} has {len(values)} points of a curve, at least {_FEWEST_POINTS} are needed: log more often."
        )
    wrong = (values[:, 1] < 0) | ~np.isfinite(values).all(axis=1) | (values[:, 0] < 0)
    if with_loss:
        wrong |= values[:, 2] <= 0
    if wrong.any() or values[:, 1].max() <= 0:
        line = values[int(np.argmax(wrong))].tolist()
        raise UserError(f"{source} has a step, rate or loss that is negative, zero or not finite, {line}: correct it.")
    start = int(np.argmax(values[:, 1] >= 0.999 * values[:, 1].max()))
    values = values[start:]
    # What comes right after the warmup is not yet on a power law.
    return Curve(name, values[:, 0], values[:, 1], values[:, 2] if with_loss else np.empty(0))
