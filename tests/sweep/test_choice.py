"""Which runs a sweep with an aim chooses: against draws, a full grid, and itself in pieces."""

import math
import random
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from sentences import refused

from hf_power.fit.fit import fit_law
from hf_power.fit.form import Form
from hf_power.records.rows import Row
from hf_power.schedule import Law
from hf_power.sweep.aim import Aim, aim_of
from hf_power.sweep.choice import next_answer
from hf_power.sweep.grid import Grid
from hf_power.sweep.interval import Known, Place, Run, parabola_variance
from hf_power.sweep.jobs import groups_of, horizon_tokens, job_tokens, start_jobs
from hf_power.sweep.run import aim_text, check_aim

LAW = Law(19.0, -0.47, 0.6)
AIM = Aim(2**20, 2048, 0.5)
GRID = Grid(
    sections={},
    widths=(32,),
    tokens_per_step=(128, 256, 512),
    tokens=(2**16, 2**17, 2**18),
    schedules={"warmup_stable_decay": (0.008, 0.016, 0.032)},
    seeds=(0, 1, 2),
    warmup_tokens=8192,
    decay_ratio=0.2,
)


def trained(job, noise=0.002):
    """Rows of a job: parabolas of .04 nats per octave**2 around the law, with noise that depends on the run alone."""
    group = job.group
    for value, horizons in job.horizons.items():
        for horizon, tokens in horizon_tokens(GRID, group, horizons).items():
            for seed in group.seeds:
                luck = random.Random(f"{group.name} {value} {seed} {horizon}").gauss(0, noise)
                off = math.log2(value / LAW.lr(horizon, group.tokens_per_step))
                yield Row(
                    id=f"{group.name}-{value}-{seed}-{horizon}",
                    width=group.width,
                    tokens_per_step=group.tokens_per_step,
                    tokens=horizon,
                    schedule=group.schedule,
                    learning_rate=value,
                    seed=seed,
                    extension=job.extension,
                    trunk=f"{group.name}-{value}-{seed}-{job.extension}",
                    trained_tokens=tokens,
                    loss=3 + 0.04 * off**2 + luck,
                )


def swept(grid, aim):
    """All rows, and the answer of each round."""
    rows, answers, groups = [], [], groups_of(grid, "warmup_stable_decay")
    for number in count():
        answers.append(next_answer(grid, groups, rows, aim, number))
        if not answers[-1].jobs:
            return rows, answers
        rows += [row for job in answers[-1].jobs for row in trained(job)]


@pytest.fixture(scope="module")
def whole():
    return swept(GRID, AIM)


def test_variance_of_an_optimum_is_that_of_draws():
    """Least-squares parabolas with a level for each seed, through many noisy draws; the noise is small beside them."""
    runs = frozenset({Run(2.0**x, 0) for x in (-1, 0, 1)} | {Run(2.0**-1.5, 1), Run(2.0**1.5, 1)})
    z = np.log2([run.rate for run in runs]) - 0.3
    design = np.stack([[run.seed == s for run in runs] for s in (0, 1)] + [list(z), list(z * z)], axis=1).astype(float)
    losses = z[None] ** 2 + np.random.default_rng(0).normal(0, 0.01, (4000, len(z)))
    solution = losses @ np.linalg.pinv(design).T
    drawn = (-solution[:, 2] / (2 * solution[:, 3])).var() / 0.01**2
    assert parabola_variance(runs, 2.0**0.3) == pytest.approx(drawn, rel=0.08)


def test_runs_that_tell_no_optimum_have_no_variance():
    assert parabola_variance(frozenset({Run(0.1, 0), Run(0.2, 0)}), 0.15) == math.inf
    # Each seed has a level of its own, and one run of it tells nothing.
    assert parabola_variance(frozenset({Run(0.1, 0), Run(0.2, 1), Run(0.4, 2)}), 0.2) == math.inf
    one = frozenset({Run(0.1, 0), Run(0.2, 0), Run(0.4, 0)})
    assert parabola_variance(one | {Run(10.0, 0)}, 0.2) == parabola_variance(one, 0.2)  # Five octaves off.


def test_half_width_of_a_line_by_hand():
    """Four cells of one sd at two horizons and two batches; the target is at their centre: three parameters, one left over.

    The law's variance there is s2 / 4, and a new cell's 1.25 s2; Student's quantile of one degree is 12.706.
    """
    places = [Place(2**t, 4096 * 2**b, 32) for t in (20, 22) for b in (0, 2)]
    known = Known(LAW, Form(), (math.inf, 0.0), 0.0, dict.fromkeys(places, 0.01), {})
    assert known.half_width(Place(2**21, 8192, 32)) == pytest.approx(12.706 * 0.1 * math.sqrt(1.25), rel=1e-4)
    assert replace(known, variances={}).half_width(places[0]) == math.inf


def test_it_stops_when_the_rate_is_known_and_takes_less_than_the_grid(whole):
    rows, answers = whole
    rate, (low, high) = answers[-1].rate, answers[-1].interval
    assert answers[-1].octaves <= AIM.octaves < answers[-2].octaves
    assert low < LAW.lr(AIM.tokens, AIM.tokens_per_step) < high
    assert (rate, low, high) == fit_law(rows).predict(AIM.tokens, AIM.tokens_per_step)
    grid = sum(job_tokens(GRID, job) for job in start_jobs(groups_of(GRID, "warmup_stable_decay")))
    assert sum(row.trained_tokens for row in rows) < grid / 2
    said = aim_text(GRID, rows, AIM)
    assert said.startswith(f"at 1,048,576 tokens and 2,048 per step the rate is {rate:.3g}")
    assert f"{len(rows)} runs" in said
    assert "saved" in said
    assert len({row.id for row in rows}) == len(rows)


def test_a_round_depends_on_the_rows_before_it_alone(whole):
    """Whatever their order, and however many of its own rows or of later ones are there."""
    rows, answers = whole
    groups = groups_of(GRID, "warmup_stable_decay")
    shuffled = random.Random(0).sample(rows, len(rows))
    for number in (0, 1, len(answers) // 2, len(answers) - 2):
        before = [row for row in rows if row.extension < number]
        own = [row for row in rows if row.extension == number]
        assert next_answer(GRID, groups, shuffled, AIM, number) == answers[number]
        assert next_answer(GRID, groups, before + own[: len(own) // 2], AIM, number) == answers[number]


def test_a_budget_holds():
    budget = 3_000_000
    rows, answers = swept(replace(GRID, max_tokens=budget), replace(AIM, octaves=0.01))
    assert answers[-1].octaves > 0.01
    assert 0.5 * budget < sum(row.trained_tokens for row in rows) <= budget
    assert "not to 0.01: the grid has no more runs that tell" in aim_text(GRID, rows, replace(AIM, octaves=0.01))


def test_what_cannot_be_run_is_not_asked_for_again():
    """Every run of the middle batch fails, and the sweep ends with those of the others."""
    rows, groups = [], groups_of(GRID, "warmup_stable_decay")
    for number in range(60):
        answer = next_answer(GRID, groups, rows, replace(AIM, octaves=0.2), number)
        if not answer.jobs:
            break
        for row in (row for job in answer.jobs for row in trained(job)):
            failed = {"status": "failed", "loss": None, "trained_tokens": 0} if row.tokens_per_step == 256 else {}
            assert row.id not in {each.id for each in rows}
            rows.append(replace(row, **failed))
    assert not answer.jobs


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"octaves": 0.0}, "--until must be above 0 and at most 4 octaves, got 0.0"),
        ({"octaves": math.nan}, "--until must be above 0"),
        ({"tokens": "100"}, "the target's 100 tokens are less than one step of 2,048"),
        ({"tokens": "-5M"}, "--tokens must be at least 0, got '-5M'"),
        ({"tokens": None}, "give its --tokens and --tokens_per_step, or its settings as --target"),
        ({"width": 0}, "--width must be at least 1, got 0"),
    ],
)
def test_an_aim_that_is_none(given, part):
    values = {"octaves": 0.3, "tokens": "1M", "tokens_per_step": "2048", "width": None} | given
    with refused(ValueError, part):
        aim_of(values.pop("octaves"), **values)


def test_a_target_says_what_the_options_leave_out(tmp_path):
    path = tmp_path / "target.yaml"
    path.write_text(
        "model: {hidden_size: 128, num_attention_heads: 4}\ndata: {block_size: 64}\nrun: {tokens: 2m}\n"
        "training: {output_dir: x, per_device_train_batch_size: 8, gradient_accumulation_steps: 2}\n"
    )
    assert aim_of(0.3, target=str(path)) == Aim(2_000_000, 1024, 0.3, 128)
    assert aim_of(0.3, target=str(path), tokens_per_step="2k", width=64) == Aim(2_000_000, 2000, 0.3, 64)


@pytest.mark.parametrize(
    ("change", "processes", "part"),
    [
        ({"tokens": (2**16,)}, 1, "needs two horizons and two batches or more to choose from, got 1 and 3"),
        ({"schedules": {"power": (1.0,)}}, 1, "needs runs of warmup_stable_decay"),
        ({}, 2, "has one process, got 2"),
    ],
)
def test_a_grid_that_cannot_tell_is_refused(change, processes, part):
    with refused(ValueError, part):
        check_aim(replace(GRID, **change), processes)
