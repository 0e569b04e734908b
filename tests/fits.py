"""Fits that pictures are drawn of, with numbers that can be worked out by hand."""

import math
from dataclasses import replace

from hf_power.fit.result import Cell, Center, Fit, Intervals, PaperInside, Reach, RegretMap, TriedForm, Validity
from hf_power.schedule import Law

BEST = 2.0**-7
RATES = (2.0**-9, 2.0**-8, 2.0**-7, 2.0**-6, 2.0**-5)
LAW = Law(0.02, -0.3, 0.7)
# losses = 3 + 0.02 * (log2 lr + 7)**2
CELL = Cell(
    schedule="warmup_stable_decay",
    width=64,
    tokens_per_step=8192,
    tokens=8_000_000,
    learning_rates=RATES,
    losses=(3.08, 3.02, 3.0, 3.02, 3.08),
    num_seeds=(2,) * 5,
    loss_sd=0.01,
    optimum_lr=BEST,
    optimum_interval=(BEST / 1.5, BEST * 1.5),
    optimum_sd_octaves=0.3,
    curvature=0.02,
    min_loss=3.0,
    used=True,
    law_lr=BEST * 1.2,
    residual_octaves=-math.log2(1.2),
    regret=0.001,
)
UNUSED = replace(
    CELL,
    used=False,
    reason="the loss is lowest at the highest learning rate, 0.0312: run higher ones",
    losses=(3.4, 3.3, 3.2, 3.15, 3.12),
    min_loss=3.12,
    optimum_lr=None,
    optimum_interval=None,
    optimum_sd_octaves=None,
    curvature=None,
    residual_octaves=None,
    regret=None,
)
FIT = Fit(
    schedule="warmup_stable_decay",
    sweep_sha256="0" * 64,
    num_rows=10,
    num_diverged=0,
    num_failed=0,
    num_blown_up=0,
    law=LAW,
    intervals=Intervals((0.01, 0.04), (-0.35, -0.25), (0.6, 0.8), None),
    center=Center(8e6, 8192.0, 0.01, (0.009, 0.011)),
    r2=0.98,
    residual_sd_octaves=0.1,
    scatter_octaves=0.12,
    degrees_of_freedom=6,
    paper=PaperInside(False, False, False, False),
    cells=(CELL,),
    samples=((0.02, -0.3, 0.7, None, 0.0, 0.0),) * 3,
    forms=(TriedForm("simple", 3, 0.1, True),),
    by_size=(),
    map=RegretMap((), (), ()),
    validity=Validity((64,), (8192, 8192), (8_000_000, 8_000_000), Reach(8_000_000, 8192, 0.1)),
    width_exponent=None,
    power=None,
    warnings=(),
)


def cell(**changes):
    """A used cell."""
    return replace(CELL, **changes)


def unused(**changes):
    """A cell without an optimum."""
    return replace(UNUSED, **changes)


def fit(*cells, **changes):
    """A fit of these cells."""
    return replace(FIT, cells=cells, **changes)
