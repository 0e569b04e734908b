"""The picture of a planned run."""

import math
from dataclasses import replace

import numpy as np
import pytest
from pictures import legend, lines, verticals, xy

from hf_power.plan.plan import make_plan
from hf_power.plan.record import CappedLaw, Compute, Plan, PlannedTarget, Point
from hf_power.plan.target import Target
from hf_power.plots.runs import plot_plan
from hf_power.recipe import Recipe

matplotlib = pytest.importorskip("matplotlib")


def point(n, what=None):
    tail = min(1.0, (10**9 - n) / 10**8)
    lr = min(0.01, 100 / math.sqrt(min(n, 9e8))) * min(1.0, n / 1e7) * tail
    return Point(what, n, lr, 0.8 * lr, 1.25 * lr)


# 1e9 tokens under min(0.01, 100 / sqrt(n)): the cap ends at 1e8; warmup to 1e7; a linear tail from 9e8 on.
TOKENS = sorted({*np.geomspace(10**6, 10**9, 60).astype(int).tolist(), 9 * 10**8, 10**9})
PLAN = Plan(
    target=PlannedTarget(None, None, 10**6, None, None, tokens=10**9, steps=1000, block_size=4096),
    tokens_per_step=10**6,
    beta=244.0,
    law=CappedLaw(100.0, -0.5, 0.0, None, max_lr=0.01),
    intervals={},
    warmup_tokens=10**7,
    decay_start_tokens=9 * 10**8,
    decay_shape="linear",
    cap_ends_tokens=10**8,
    milestones=(
        *(point(n, what) for what, n in (("10%", 10**8), ("50%", 5 * 10**8), ("end", 10**9))),
        point(9 * 10**8, "decay starts"),
    ),
    peak_lrs={},
    weight_decay=0.1,
    timescales=(),
    compute=Compute(6e6, 6e15, 8, 989e12, 0.4, 0.0),
    proxies=None,
    curve=tuple(point(n) for n in TOKENS),
    warnings=(),
)


def test_a_plan_is_its_curve_with_band_corners_and_milestones():
    figure = plot_plan(PLAN)
    law, run = figure.axes
    assert [(x.get_xscale(), x.get_yscale()) for x in (law, run)] == [("log", "log"), ("linear", "linear")]
    assert (law.get_ylabel(), run.get_xlabel()) == ("learning rate", "tokens seen")
    assert figure.get_suptitle() == (
        "1B tokens in steps of 1M: Power peaks at 0.01, and has 0.0033 where the decay starts"
    )
    assert legend(figure) == ["learning rate", "milestones", "95 % interval"]
    for panel in (law, run):
        curve = panel.lines[0]
        assert list(curve.get_xdata()) == [p.tokens for p in PLAN.curve]
        assert list(curve.get_ydata()) == [p.lr for p in PLAN.curve]
        assert panel.collections[0].get_paths()[0].vertices[:, 1].max() == pytest.approx(0.0125)
        assert verticals(panel) == [10**7, 10**8, 9 * 10**8]
        assert [xy(line)[0][0] for line in lines(panel, "o")] == [10**8, 5 * 10**8, 10**9, 9 * 10**8]
    texts = [text.get_text().strip() for text in law.texts]
    assert texts == ["warmup ends, 10M", "cap ends, 100M", "decay starts, 900M"]
    assert [text.get_text() for text in run.texts] == ["10%\n0.01", "50%\n0.0045", "end\n0"]
    # The tail goes to 0 and the scale does not follow it.
    assert law.get_ylim()[0] == pytest.approx(0.2 * 100 / math.sqrt(9e8))
    assert law.xaxis.get_major_formatter()(10**8, 0) == "100M"


def test_a_plan_without_warmup_cap_or_tail_has_no_corners():
    bare = replace(PLAN, curve=PLAN.curve[:40], warmup_tokens=0, cap_ends_tokens=None, decay_start_tokens=None)
    law, run = plot_plan(bare).axes
    assert verticals(law) == verticals(run) == []
    assert list(law.texts) == []
    assert law.get_xlim()[0] == 10**6


def test_what_is_planned_can_be_drawn():
    target = Target(10**12, 2**22, parameters=10**9)
    law, _ = plot_plan(make_plan(Recipe(warmup_tokens=10**9), target)).axes
    # (a * beta / cap)**(1 / 0.51) = (4 * 1024 / 0.02)**1.96 = 2.6e10; the tail is the last tenth.
    assert verticals(law) == pytest.approx([1e9, 2.6e10, 9e11], rel=0.01)
