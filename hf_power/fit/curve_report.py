"""From loss curves to a forecast of other schedules: its text, forecast.csv and its picture."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hf_power.fit.curve import Curve, longer, read_curve, with_tail
from hf_power.fit.curves import CurveLaw, fit_curves, last_loss
from hf_power.plots.curves import plot_curves
from hf_power.plots.figures import require_matplotlib, save
from hf_power.records.errors import UserError
from hf_power.records.files import replaced

CURVES_FILE, PICTURE = "forecast.csv", "forecast.png"


def forecast_curves(
    paths: Sequence[Path],
    *,
    schedules: Sequence[Path] = (),
    times: float | None = None,
    branches: Sequence[int] = (),
    tail_steps: int | None = None,
    tail_shape: str = "1-sqrt",
    output_dir: str | os.PathLike[str] | None = None,
) -> str:
    """What another schedule would reach, by the multi-power law of the loss curves of a few runs, as text.

    Args:
        paths: of the curves, see `hf_power.fit.curve.read_curve`: one model, batch and data set.
        schedules: further CSVs with step and lr, whose losses are asked for; a loss in them is compared.
        times: each curve's schedule at so many times its length is asked for too.
        branches: steps of the last curve at which a tail to 0 begins.
        tail_steps: length of these tails; None: a quarter of the branch's step.
        tail_shape: of them, one of `hf_power.schedule.DECAY_SHAPES`.
        output_dir: of forecast.csv (schedule, step, lr, loss) and forecast.png; None writes nothing.

    Raises:
        UserError: curves that cannot be read or tell nothing of a decay, or a number out of range.
    """
    if output_dir is not None:
        require_matplotlib()
    if not paths:
        raise UserError("there are no loss curves: name CSVs with step, lr and loss, or runs.")
    curves = [read_curve(path) for path in paths]
    for curve, path in zip(curves, paths, strict=True):
        if not len(curve.losses):
            raise UserError(f"{path} has no column loss: pass it with --schedules, or add its losses.")
    asked = [read_curve(path, loss=False) for path in schedules]
    if times is not None:
        asked += [longer(curve, times) for curve in curves]
    asked += [
        with_tail(curves[-1], step, tail_steps or max(step // 4, 1), tail_shape)  # The last curve is the trunk.
        for step in branches
    ]
    law = fit_curves(curves)
    lines = [*_law_lines(law, curves), *_asked_lines(law, asked)]
    if output_dir is not None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _write(law, [*curves, *asked], folder / CURVES_FILE)
        save(plot_curves(law, curves, asked), folder / PICTURE)
        lines.append(f"written to {folder}/: {CURVES_FILE}, {PICTURE}")
    return "\n".join(lines)


def _law_lines(law: CurveLaw, curves: Sequence[Curve]) -> list[str]:
    lines = [
        f"multi-power law (arXiv:2503.12811): L = {law.irreducible:.4g} + {law.scale:.3g} * S^-{law.exponent:.3g} - "
        f"{law.drop_scale:.4g} * sum of drops * G,",
        f"  S the sum of peak * (lr / peak)^{law.progress_exponent:.3g}, G = 1 - (1 + {law.drop_speed:.3g} * "
        f"lr^-{law.rate_exponent:.3g} * sum of lr since)^-{law.drop_exponent:.3g}",
        f"  {'curve':<32} {'steps':>9}  {'last loss':>9}  {'law':>7}  mean off  left out",
    ]
    for curve in curves:
        said = law.losses(curve)
        off = float(np.mean(np.abs(said - curve.losses)))
        left = law.left_out.get(curve.name)
        lines.append(
            f"  {curve.name:<32} {curve.steps[-1]:>9,.0f}  {last_loss(curve):>9.4f}  {said[-1]:>7.4f}  {off:>8.4f}"
            + ("" if left is None else f"  {left:+.4f}")
        )
    return lines


def _asked_lines(law: CurveLaw, asked: Sequence[Curve]) -> list[str]:
    if not asked:
        return []
    lines = [f"  {'schedule':<32} {'steps':>9}  {'last loss':>9}  95 % interval"]
    for curve in asked:
        loss, low, high = law.final(curve)
        found = f"; measured {last_loss(curve):.4f}" if len(curve.losses) else ""
        lines.append(f"  {curve.name:<32} {curve.steps[-1]:>9,.0f}  {loss:>9.4f}  {low:.4f} to {high:.4f}{found}")
        if (beyond := float(curve.sums()[-1]) / law.longest) > 2:
            lines.append(f"    WARNING its learning rates add up to {beyond:.3g} times those of the longest curve")
    return lines


def _write(law: CurveLaw, curves: Sequence[Curve], path: Path) -> None:
    with replaced(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("schedule", "step", "lr", "loss"))
        for curve in curves:
            for step, rate, loss in zip(curve.steps, curve.rates, law.losses(curve), strict=True):
                writer.writerow((curve.name, f"{step:g}", f"{rate:.6g}", f"{loss:.5f}"))
