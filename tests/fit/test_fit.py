"""The fit against synthetic sweeps, whose law is known."""

import json
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from sentences import refused

from hf_power.fit.cells import draw_errors, fit_cells
from hf_power.fit.fit import fit_law, fit_laws
from hf_power.fit.result import WINDOW_OCTAVES, Fit
from hf_power.fit.text import fit_text
from hf_power.records.rows import Row

LAW = (4.6, -0.51, 1.0)
BATCHES = (32_768, 65_536, 131_072)
HORIZONS = (8_000_000, 32_000_000, 128_000_000)
FIVE = (-2, -1, 0, 1, 2)


def optimum(batch, tokens, law=LAW, critical=math.inf):
    a, b, c = law
    return a * (min(batch, critical) / 4096) ** c * tokens**b


def sweep(
    *,
    law=LAW,
    batches=BATCHES,
    horizons=HORIZONS,
    widths=(64,),
    num_seeds=2,
    steps=FIVE,
    spacing=1.0,
    curvature=0.028,
    cubic=0.0,
    trunk_sd=0.010,
    branch_sd=0.0066,
    seed_sd=0.0,
    critical=math.inf,
    diverges=math.inf,
    width_exponent=0.0,
    schedule="warmup_stable_decay",
    shift=None,
    seed=0,
):
    """Rows with loss = floor(T) + curvature * d**2 + cubic * d**3 + noise, d octaves above the optimum.

    The learning rates are `steps` * `spacing` octaves around the grid's rate next to the optimum; the grid lies `shift`
    octaves off, at random if None. A trunk (width, batch, learning rate, seed) shares its noise between horizons.
    """
    generator = np.random.default_rng(seed)
    shift = generator.uniform(-0.5, 0.5) if shift is None else shift
    trunks, rows = {}, []
    luck = generator.normal(0, seed_sd, num_seeds)
    for width in widths:
        for batch in batches:
            for tokens in horizons:
                best = math.log2(optimum(batch, tokens, law, critical) * (width / 64) ** width_exponent)
                middle = round((best - shift) / spacing) * spacing + shift
                for k in steps(generator) if callable(steps) else steps:
                    x = middle + k * spacing
                    for s in range(num_seeds):
                        trunk = f"{width}/{batch}/{x:.6f}/{s}"
                        noise = trunks.setdefault(trunk, generator.normal(0, trunk_sd)) + luck[s]
                        d = x - best
                        loss = 3 + 4 * (tokens / 1e6) ** -0.3 + curvature * d**2 + cubic * d**3
                        loss += noise + generator.normal(0, branch_sd)
                        finished = d < diverges
                        rows.append(
                            Row(
                                schedule=schedule,
                                width=width,
                                tokens_per_step=batch,
                                tokens=tokens,
                                learning_rate=2**x,
                                seed=s,
                                status="finished" if finished else "diverged",
                                loss=loss if finished else None,
                                trunk=trunk,
                            )
                        )
    return rows


EXACT = {"trunk_sd": 0.0, "branch_sd": 0.0}


def one_cell(**arguments):
    (cell,) = fit_cells(sweep(batches=BATCHES[:1], horizons=HORIZONS[:1], **arguments))
    return cell


def test_a_cell_without_noise_is_recovered_exactly():
    cell = one_cell(**EXACT, shift=0.3, num_seeds=1)
    best = optimum(BATCHES[0], HORIZONS[0])
    assert cell.used
    assert cell.reason is None
    assert cell.optimum_lr == pytest.approx(best, rel=1e-9)
    assert cell.curvature == pytest.approx(0.028)
    assert cell.min_loss == pytest.approx(3 + 4 * 8**-0.3)
    assert cell.regret_at(2 * best) == pytest.approx(0.028)
    assert cell.regret_at(best / 4) == pytest.approx(4 * 0.028)
    assert cell.num_seeds == (1,) * 5
    assert cell.loss_sd is None


def test_the_parabola_is_numpy_s():
    rows = sweep(batches=BATCHES[:1], horizons=HORIZONS[:1], seed=3)
    x, y = (np.array([f(r) for r in rows]) for f in (lambda r: math.log2(r.learning_rate), lambda r: r.loss))
    near = abs(x - x[np.isclose(x, x.mean())][0]) <= 2.01
    p2, p1, p0 = np.polyfit(x[near], y[near], 2)
    (cell,) = fit_cells(rows)
    assert math.log2(cell.optimum_lr) == pytest.approx(-p1 / (2 * p2))
    assert cell.curvature == pytest.approx(p2)
    assert cell.min_loss == pytest.approx(p0 - p1**2 / (4 * p2))
    pairs = y.reshape(5, 2)
    assert cell.losses == pytest.approx(pairs.mean(axis=1))
    assert cell.loss_sd == pytest.approx(math.sqrt((np.diff(pairs, axis=1) ** 2).mean() / 2))


def test_optima_scatter_as_their_sd_says_and_intervals_cover():
    """400 cells: the reported sd is the scatter of the optima around the truth, and 95 % intervals hold about 95 %."""
    found, sds, hits = [], [], []
    for seed in range(400):
        for cell in fit_cells(sweep(batches=BATCHES[:1], horizons=HORIZONS[:1], num_seeds=3, seed=seed)):
            best = optimum(cell.tokens_per_step, cell.tokens)
            found.append(math.log2(cell.optimum_lr / best))
            sds.append(cell.optimum_sd_octaves)
            hits.append(cell.optimum_interval[0] <= best <= cell.optimum_interval[1])
    assert np.mean(found) == pytest.approx(0, abs=0.02)
    assert np.sqrt(np.mean(np.square(sds))) == pytest.approx(np.std(found), rel=0.15)
    assert 0.92 <= np.mean(hits) <= 0.98


@pytest.mark.slow
def test_a_cell_of_three_runs_has_the_errors_that_the_others_noise_gives_it():
    """Its parabola leaves no residual; the draws scatter as the optima of such cells do, of other noise each time."""
    noise = {"trunk_sd": 0.0, "branch_sd": 0.003, "horizons": HORIZONS[:1], "shift": 0.3}
    found, drawn = [], []
    for seed in range(60):
        rows = sweep(batches=BATCHES[:2], num_seeds=3, seed=seed, **noise)
        rows += sweep(batches=BATCHES[2:], num_seeds=1, steps=(-1, 0, 1), seed=seed, **noise)
        cells = fit_cells(rows)
        assert [len(cell.points) for cell in cells] == [15, 15, 3]
        found.append([math.log2(cell.optimum_lr) for cell in cells])
        drawn.append(draw_errors(cells, 200, np.random.default_rng(seed)).std(axis=0))
    assert np.sqrt(np.mean(np.square(drawn), axis=0)) == pytest.approx(np.std(found, axis=0), rel=0.25)


def test_what_a_seed_shifts_at_all_learning_rates_does_not_count_as_noise():
    rows = sweep(batches=BATCHES[:1], horizons=HORIZONS[:1], seed=1, shift=0.2)
    (calm,) = fit_cells(rows)
    (moved,) = fit_cells([replace(r, loss=r.loss + 0.5 * r.seed) for r in rows])
    assert moved.optimum_lr == pytest.approx(calm.optimum_lr)
    assert moved.optimum_sd_octaves == pytest.approx(calm.optimum_sd_octaves)
    assert moved.min_loss == pytest.approx(calm.min_loss + 0.25)
    assert moved.loss_sd > 0.3


@pytest.mark.parametrize("spacing", [0.5, 1.0])
def test_a_far_flank_does_not_bend_the_parabola(spacing):
    """Losses that rise faster towards high rates: within two octaves the optimum is near, over all rates it is far."""
    steps = range(round(-4 / spacing), round(4 / spacing) + 1)
    rows = sweep(
        batches=BATCHES[:1], horizons=HORIZONS[:1], steps=steps, spacing=spacing, cubic=0.0025, shift=0.0, **EXACT
    )
    best = math.log2(optimum(BATCHES[0], HORIZONS[0]))
    (cell,) = fit_cells(rows)
    x, y = np.array([math.log2(r.learning_rate) for r in rows]), np.array([r.loss for r in rows])
    p2, p1, _ = np.polyfit(x, y, 2)
    assert abs(math.log2(cell.optimum_lr) - best) < 0.2
    assert abs(-p1 / (2 * p2) - best) > 0.4
    assert max(abs(point.log2_lr - math.log2(cell.optimum_lr)) for point in cell.points) <= WINDOW_OCTAVES + 0.5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"steps": (0, 1, 2)}, "the loss is lowest at the lowest learning rate"),
        ({"steps": (-2, -1, 0)}, "the loss is lowest at the highest learning rate"),
        ({"steps": (-1, 0)}, "only 2 learning rates finished"),
        ({"steps": (-4, -3, 0), "diverges": -1}, "only 2 learning rates finished"),
    ],
)
def test_a_cell_without_a_bracketed_optimum_says_why(arguments, reason):
    cell = one_cell(**EXACT, shift=0.0, **arguments)
    assert not cell.used
    assert cell.reason.startswith(reason)
    assert cell.optimum_lr is cell.optimum_interval is cell.optimum_sd_octaves is None
    with refused(ValueError, "has no optimum to compare with", "8,000,000 tokens", reason):
        cell.regret_at(0.01)


def test_a_diverged_learning_rate_is_a_higher_side():
    open_, closed = (one_cell(**EXACT, shift=0.2, steps=(-2, -1, 0, *more), diverges=0.5) for more in ((), (1,)))
    assert (open_.used, closed.used) == (False, True)
    assert closed.optimum_lr == pytest.approx(optimum(BATCHES[0], HORIZONS[0]), rel=1e-6)
    assert len(closed.learning_rates) == 3


def test_a_rate_at_which_one_seed_diverged_is_not_in_the_parabola():
    rows = sweep(batches=BATCHES[:1], horizons=HORIZONS[:1], shift=0.0, **EXACT)
    rows[-1] = replace(rows[-1], status="diverged", loss=None)
    rows[-2] = replace(rows[-2], loss=0.0)  # lucky
    (cell,) = fit_cells(rows)
    assert len(cell.learning_rates) == 4
    assert cell.optimum_lr == pytest.approx(optimum(BATCHES[0], HORIZONS[0]), rel=1e-6)


def test_losses_that_do_not_curve_upwards():
    rows = sweep(batches=BATCHES[:1], horizons=HORIZONS[:1], num_seeds=1, shift=0.0, **EXACT)
    rows = [replace(row, loss=loss) for row, loss in zip(rows, (3.11, 3.2, 3.1, 3.2, 3.11), strict=True)]
    (cell,) = fit_cells(rows)
    assert cell.reason.startswith("the losses do not curve upwards")


def with_losses(*losses, spacing=1.0):
    """One cell's rows with these losses, at rates 2**-10 * 2**(i * spacing)."""
    (row,) = sweep(batches=BATCHES[:1], horizons=HORIZONS[:1], num_seeds=1, steps=(0,))
    return [replace(row, learning_rate=2 ** (i * spacing - 10), loss=loss) for i, loss in enumerate(losses)]


def test_an_optimum_that_the_parabola_puts_beyond_its_rates():
    (cell,) = fit_cells(with_losses(3.4, 3.3, 3.21, 3.13, 3.06, 2.99, 2.995, spacing=0.5))
    assert not cell.used
    assert cell.reason.startswith("the parabola's optimum lies beyond the learning rates near the lowest loss")


def test_noise_that_moves_the_lowest_loss_on_a_fine_grid_rejects_no_cell():
    """The parabola of numpy has its optimum 1.2 octaves below the lowest loss, which is the last one of all."""
    losses = [3 + 0.03 * (i / 4 - 1.8) ** 2 for i in range(13)]
    losses[-1] = 2.99
    (cell,) = fit_cells(with_losses(*losses, spacing=0.25))
    p2, p1, _ = np.polyfit(np.arange(4, 13) / 4, losses[4:], 2)
    assert cell.used
    assert math.log2(cell.optimum_lr) + 10 == pytest.approx(-p1 / 2 / p2)


def test_a_finished_run_far_above_its_cell_is_diverged():
    """10.98 is ln 58,700; at rates far too low the loss is high as well, but highest at the lowest of them."""
    rows = with_losses(5.1, 4.2, 3.1, 3.0, 3.1, 10.98) + with_losses(5.1, 4.1, 10.98)
    (cell,) = fit_cells(rows)
    assert cell.diverged == (2**-8, 2**-5)
    assert cell.learning_rates == (2**-10, 2**-9, 2**-7, 2**-6)
    fit = fit_law([replace(row, loss=9.0) if i in (4, 9) else row for i, row in enumerate(sweep(num_seeds=1))])
    assert (fit.num_diverged, fit.num_blown_up) == (2, 2)
    assert "2 diverged (2 of them finished far above their cell's best)" in fit_text(fit)


def test_a_run_that_blew_up_at_the_lowest_rate_is_diverged_and_one_at_a_rate_far_too_low_is_not():
    """The loss does not fall by 5 nats on the octave before the bottom of a U; on the way there it may."""
    (blown,) = fit_cells(with_losses(8.2, 3.1, 3.0, 3.1, 3.4))
    (slow,) = fit_cells(with_losses(8.2, 5.1, 3.5, 3.0, 3.1, 3.4))
    assert (blown.diverged, slow.diverged) == ((2**-10,), ())
    assert math.log2(blown.optimum_lr) == pytest.approx(-8, abs=0.2)


def test_horizons_within_a_percent_are_one():
    rows = [replace(row, tokens=row.tokens + i % 3 * 20_000) for i, row in enumerate(sweep())]
    cells = [(c.tokens_per_step, c.tokens) for c in fit_cells(rows)]
    assert cells == [(b, pytest.approx(t, rel=0.01)) for b in BATCHES for t in HORIZONS]


def test_three_rates_and_one_seed_leave_the_spacing_as_the_only_uncertainty():
    cell = one_cell(num_seeds=1, steps=(-1, 0, 1), shift=0.0)
    low, high = (math.log2(x) for x in cell.optimum_interval)
    assert not cell.noise_known
    assert high - low == pytest.approx(1.0)
    assert cell.optimum_sd_octaves == pytest.approx(1 / math.sqrt(12))


def test_a_sweep_without_noise_gives_the_law_back():
    fit = fit_law(sweep(**EXACT))
    assert astuple(fit.law)[:3] == pytest.approx(LAW, rel=1e-6)
    assert fit.law.critical_batch_tokens is None
    assert fit.r2 == pytest.approx(1)
    assert fit.residual_sd_octaves == pytest.approx(0, abs=1e-6)
    assert fit.degrees_of_freedom == 9 - 3
    assert all(cell.regret == pytest.approx(0, abs=1e-9) for cell in fit.cells)
    assert fit.warnings == ()


def test_with_noise_the_law_is_the_weighted_least_squares_of_the_cells():
    """Solved again by numpy's lstsq, with the weights of the cells' sd (this sweep needs no variance beyond them)."""
    fit = fit_law(sweep(seed=4), num_samples=50)
    y = np.log2([c.optimum_lr for c in fit.cells])
    x = np.log2([(2, c.tokens, c.tokens_per_step / 4096) for c in fit.cells])
    w = 1 / np.array([c.optimum_sd_octaves for c in fit.cells])
    residuals = y - x @ np.linalg.lstsq(x * w[:, None], y * w, rcond=None)[0]
    assert (w**2 * residuals**2).sum() < 6  # less than its degrees of freedom: no variance between cells
    log2_a, b, c = np.linalg.lstsq(x * w[:, None], y * w, rcond=None)[0]
    assert [math.log2(fit.law.a), fit.law.b, fit.law.batch_exponent] == pytest.approx([log2_a, b, c])
    assert [cell.residual_octaves for cell in fit.cells] == pytest.approx(residuals.tolist(), abs=1e-9)
    assert fit.residual_sd_octaves == pytest.approx(math.sqrt(residuals @ residuals / 6))


def test_fit_is_the_same_again_and_comes_back_from_its_file(tmp_path):
    rows = sweep(seed=2) + sweep(seed=3, schedule="power", law=(4.0, -0.51, 1.0))
    one, two = (json.dumps(fit_law(rows).to_json(), allow_nan=False) for _ in range(2))
    assert one == two
    content = json.loads(one)
    assert content["schema"] == 1
    fit_law(rows).save(tmp_path)
    assert Fit.load(tmp_path) == fit_law(rows)
    assert content["num_rows"] == 90
    assert len(content["samples"]) == 500
    assert len(content["sweep_sha256"]) == 64
    assert fit_law(rows[::-1]).sweep_sha256 == content["sweep_sha256"]
    assert set(content["cells"][0]) == {
        *("schedule", "width", "tokens_per_step", "tokens", "learning_rates", "losses", "num_seeds", "loss_sd"),
        *("optimum_lr", "optimum_interval", "optimum_sd_octaves", "curvature", "min_loss", "used", "reason"),
        *("law_lr", "residual_octaves", "regret", "parameters", "diverged", "skew"),
    }


def test_samples_agree_with_the_intervals():
    fit = fit_law(sweep(seed=5))
    a, b, c = np.array([draw[:3] for draw in fit.samples]).T
    for draws, (low, high) in zip((np.log2(a), b, c), astuple(fit.intervals)[:3], strict=True):
        low, high = (math.log2(low), math.log2(high)) if draws is not b and draws is not c else (low, high)
        assert draws.std() * 1.96 * 2 == pytest.approx(high - low, rel=0.01)
    rates = a * 16**c * (32e6) ** b  # the centre's rate is known far better than a
    assert np.log2(rates).std() < np.log2(a).std() / 3


def test_a_held_batch_exponent():
    fit = fit_law(sweep(law=(4.6, -0.51, 0.7), seed=1), batch_exponent=0.7)
    assert fit.law.batch_exponent == 0.7
    assert fit.intervals.batch_exponent == (0.7, 0.7)
    assert fit.degrees_of_freedom == 7
    assert fit.paper.batch_exponent is fit.paper.jointly is False
    assert fit.intervals.b[0] < -0.51 < fit.intervals.b[1]
    assert "held" in fit_text(fit)
    assert fit_law(sweep(seed=1), batch_exponent=1.0).paper.jointly


def test_one_batch_is_enough_for_a_held_exponent():
    fit = fit_law(sweep(batches=BATCHES[:1], seed=1), batch_exponent=1.0)
    assert fit.law.b == pytest.approx(-0.51, abs=0.1)


def test_map_and_regret_agree():
    fit = fit_law(sweep(seed=6))
    a, b = fit.map.a, fit.map.b
    for i, j in ((0, 0), (7, 30), (20, 20)):
        law = replace(fit.law, a=a[j], b=b[i])
        nats = [c.regret_at(law.lr(c.tokens, c.tokens_per_step)) for c in fit.cells]
        assert fit.map.regret[i][j] == pytest.approx(np.mean(nats))
    for value, axis in zip((4.6, fit.law.a, -0.51, fit.law.b), (a, a, b, b), strict=True):
        assert axis[0] < value < axis[-1]


def test_the_paper_s_constants_are_judged():
    same = fit_law(sweep(seed=7))
    other = fit_law(sweep(law=(0.46, -0.3, 0.5), seed=7))
    assert all(astuple(same.paper))
    assert not any(astuple(other.paper))
    assert "lies inside the joint" in fit_text(same)
    assert "lies OUTSIDE the joint" in fit_text(other)
    # Each number alone may fit where the pair does not: twice the rate everywhere.
    twice = fit_law(sweep(law=(9.2, -0.51, 1.0), num_seeds=2, seed=7))
    assert twice.paper.b
    assert not twice.paper.jointly


def test_widths_enter_together_and_are_checked():
    flat = fit_law(sweep(widths=(64, 128, 256), seed=8))
    steep = fit_law(sweep(widths=(64, 128, 256), width_exponent=-1.0, seed=8))
    assert flat.degrees_of_freedom == 27 - 3
    assert flat.width_exponent[1] < 0 < flat.width_exponent[2]
    assert steep.width_exponent[1] < -1 < steep.width_exponent[2] < -0.8
    assert fit_law(sweep(seed=8)).width_exponent is None
    assert "0 under muP" in fit_text(flat)


def test_a_critical_batch_is_found_where_there_is_one():
    batches = tuple(16_384 * 2**k for k in range(5))
    fit = fit_law(sweep(batches=batches, critical=65_536, seed=9), critical_batch="fixed")
    low, high = fit.intervals.critical_batch_tokens
    assert low <= 65_536 <= high
    assert 2**-0.3 < fit.law.critical_batch_tokens / 65_536 < 2**0.3
    assert fit.intervals.batch_exponent[0] <= 1 <= fit.intervals.batch_exponent[1]
    assert fit.degrees_of_freedom == 15 - 4
    assert "critical_batch_tokens" in fit_text(fit)
    assert fit.law.lr(1e9, 2**30) == fit.law.lr(1e9, 2**20)
    plain = fit_law(sweep(batches=batches, critical=65_536, seed=9), critical_batch="none")
    assert plain.law.batch_exponent < 0.7  # the cap is mistaken for a smaller exponent


@pytest.mark.slow
def test_a_critical_batch_is_not_reported_without_support():
    batches = tuple(16_384 * 2**k for k in range(5))
    reported = [
        fit_law(sweep(batches=batches, seed=seed), critical_batch="fixed", num_samples=20).law.critical_batch_tokens
        for seed in range(40)
    ]
    assert sum(x is not None for x in reported) <= 6  # 5 % of 40, and luck
    fit = fit_law(sweep(batches=batches, **EXACT), critical_batch="fixed")
    assert fit.law.critical_batch_tokens is fit.intervals.critical_batch_tokens is None
    assert [form.chosen for form in fit.forms] == [True, False]
    low = fit_law(sweep(batches=batches, critical=20_000, seed=1), critical_batch="fixed")
    assert low.law.critical_batch_tokens is None
    assert "the second-smallest batch, 32,768 tokens per step" in low.warnings[0]


def test_power_s_own_scale_and_drift():
    rows = sweep(seed=10) + sweep(seed=11, schedule="power", law=(3.2, -0.51, 1.0))
    fit = fit_law(rows)
    # The scale moves with b and c, which are held at the fit's; at the centre it is the rate that counts.
    rate = replace(fit.law, a=fit.power.a).lr(32e6, 65_536)
    assert rate == pytest.approx(optimum(65_536, 32e6, (3.2, -0.51, 1.0)), rel=0.05)
    assert fit.power.interval[0] < fit.power.a < fit.power.interval[1]
    for drift, truth in (("b_drift", -0.51 - fit.law.b), ("batch_drift", 1 - fit.law.batch_exponent)):
        value, low, high = getattr(fit.power, drift)
        assert low <= truth <= high
        assert low < value < high
    assert len(fit.power.cells) == 9
    assert "power: a = " in fit_text(fit)


def test_power_that_drifts_is_noticed():
    rows = sweep(seed=10) + sweep(seed=11, schedule="power", law=(0.5, -0.40, 1.0))
    drift = fit_law(rows).power.b_drift
    assert 0.05 < drift[1] < 0.11 < drift[2]


def test_power_with_few_cells():
    assert fit_law(sweep(seed=1)).power is None
    one = fit_law(sweep(seed=1) + sweep(schedule="power", batches=BATCHES[:1], horizons=HORIZONS[:1]))
    assert one.power is None
    assert any("only 1 of 1 cells of schedule power" in w for w in one.warnings)
    two = fit_law(sweep(seed=1) + sweep(schedule="power", batches=BATCHES[:1], horizons=HORIZONS[:2], seed=2))
    assert two.power.b_drift is two.power.batch_drift is None


def test_fit_laws_skips_power_and_what_is_refused():
    rows = sweep(**EXACT) + sweep(schedule="cosine", law=(6.0, -0.4, 0.8), **EXACT)
    rows += sweep(schedule="power", **EXACT) + sweep(schedule="linear", horizons=HORIZONS[:1], **EXACT)
    laws = fit_laws(rows)
    assert set(laws) == {"cosine", "warmup_stable_decay"}
    assert astuple(laws["cosine"])[:3] == pytest.approx((6.0, -0.4, 0.8), rel=1e-6)


def test_validity():
    fit = fit_law(sweep(seed=12, widths=(64, 128)))
    assert fit.validity.widths == (64, 128)
    assert fit.validity.tokens == (HORIZONS[0], HORIZONS[-1])
    assert fit.validity.tokens_per_step == (BATCHES[0], BATCHES[-1])
    beyond = fit.validity.extrapolates_to
    assert beyond.tokens == 16 * HORIZONS[-1]  # a precise sweep ends at the limit
    samples = np.array([draw[:3] for draw in fit.samples])
    a, b, c = samples.T
    sds = [
        np.log2(a * (batch / 4096) ** c * tokens**b).std()
        for tokens, batch in ((beyond.tokens, BATCHES[-1]), (HORIZONS[-1], beyond.tokens_per_step))
    ]
    assert max(sds) == pytest.approx(beyond.sd_octaves, rel=1e-3)
    assert max(sds) <= 0.25
    poor = fit_law(sweep(seed=12, num_seeds=1, horizons=HORIZONS[:2], trunk_sd=0.02))
    assert poor.validity.extrapolates_to.tokens < 16 * HORIZONS[1]


def test_the_table_says_everything():
    rows = sweep(seed=13, diverges=1.6)
    rows += sweep(seed=13, batches=(262_144,), horizons=HORIZONS[:1], steps=(0, 1, 2), shift=0.0, **EXACT)
    rows.append(replace(rows[0], status="failed", loss=None))
    fit = fit_law(rows)
    text = fit_text(fit)
    assert fit.num_diverged == sum(r.status == "diverged" for r in rows) > 0
    assert f"{len(rows)} runs, {fit.num_diverged} diverged, 1 failed" in text
    assert "not used: the loss is lowest at the lowest learning rate" in text
    assert f"{fit.law.a:.4g}" in text
    assert f"R2 {fit.r2:.3f}" in text
    assert len([line for line in text.splitlines() if "131,072" in line]) >= 3


@pytest.mark.parametrize(
    ("rows", "arguments", "parts"),
    [
        ([], {}, ["no rows of schedule warmup_stable_decay, it has no rows"]),
        (sweep(schedule="cosine"), {}, ["no rows of schedule warmup_stable_decay, it has cosine: name one"]),
        (
            sweep(batches=BATCHES[:1], horizons=HORIZONS[:2], **EXACT),
            {"batch_exponent": 1.0},
            ["2 of 2 cells have a bracketed optimum", "too few for 2 parameters: run at least 3 cells"],
        ),
        (
            sweep(steps=(0, 1, 2), shift=0.0, **EXACT),
            {},
            ["0 of 9 cells", "(of warmup_stable_decay, width 64, 32,768 tokens per step, 8,000,000 tokens: the loss"],
        ),
        (sweep(horizons=HORIZONS[:1], **EXACT), {"batch_exponent": 1.0}, ["span less than a factor 2: run horizons"]),
        (sweep(horizons=(8_000_000, 10_000_000, 12_000_000), **EXACT), {}, ["12,000,000 tokens, span less than a"]),
        (
            sweep(batches=BATCHES[:1], horizons=(1_000_000, 4_000_000, 20_000_000, 100_000_000), **EXACT),
            {},
            ["too few to fit the batch exponent"],
        ),
    ],
)
def test_too_little_is_refused(rows, arguments, parts):
    with refused(ValueError, *parts):
        fit_law(rows, **arguments)


def test_horizons_that_rise_with_the_batch_are_refused():
    batches = tuple(16_384 * 2**k for k in range(4))
    rows = [r for b in batches for r in sweep(batches=(b,), horizons=(1000 * b,), **EXACT)]
    with refused(ValueError, "horizon and batch change together", "run each batch at two horizons"):
        fit_law(rows)
    assert fit_law(rows, batch_exponent=1.0).law.b == pytest.approx(-0.51)
    nearly = [r for b in batches for r in sweep(batches=(b,), horizons=(1000 * b, 1700 * b), **EXACT)]
    assert any("nearly change together" in w for w in fit_law(nearly).warnings)


def test_rows_of_two_sources_are_refused():
    rows = [replace(r, weight_decay=0.1 * (r.tokens > 1e7)) for r in sweep()]
    with refused(ValueError, "the rows differ in weight decay, 0.0 and 0.1"):
        fit_law(rows)


def test_poor_grids_are_flagged():
    coarse = fit_law(sweep(spacing=3.0, steps=(-1, 0, 1), shift=0.0, **EXACT))
    assert any("of 9 cells are more than a factor 4 apart" in w or "9 cells are more" in w for w in coarse.warnings)
    blind = fit_law(sweep(num_seeds=1, steps=(-1, 0, 1), **EXACT))
    assert any("run a second seed" in w for w in blind.warnings)
    edges = sweep(**EXACT, horizons=HORIZONS[:2]) + sweep(
        **EXACT, batches=tuple(2**k for k in range(18, 26)), horizons=HORIZONS[:1], steps=(0, 1, 2), shift=0.0
    )
    assert any("only 6 of 14 cells have a bracketed optimum" in w for w in fit_law(edges).warnings)
    rising = fit_law(sweep(law=(1e-6, 0.2, 1.0), **EXACT))
    assert any(w.startswith("b is 0.2, not negative") for w in rising.warnings)


def three_to_five(generator):
    return [(-1, 0, 1), (-2, -1, 0, 1), (-1, 0, 1, 2), FIVE][generator.integers(4)]


def coverage(num_draws, law=LAW, **arguments):
    """Share of draws whose 95 % intervals hold the true a, b, c, each and jointly; and how wide they are.

    The width is the median interval of b over that of a perfect judge, 3.92 times the scatter of the fitted b.
    """
    hits, fitted, widths = [], [], []
    for seed in range(num_draws):
        try:
            fit = fit_law(sweep(seed=seed, law=law, **arguments), num_samples=100, seed=seed)
        except ValueError:
            continue
        ends = astuple(fit.intervals)[:3]
        hits.append([low <= x <= high for x, (low, high) in zip(law, ends, strict=True)] + [fit.paper.jointly])
        fitted.append(fit.law.b)
        widths.append(ends[1][1] - ends[1][0])
    assert len(hits) >= 0.95 * num_draws
    return np.mean(hits, axis=0), np.median(widths) / (3.92 * np.std(fitted))


SMALL = {"curvature": 0.028, "steps": three_to_five}  # 3 batches x 3 horizons x 2 seeds, 3 to 5 rates a factor 2 apart


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        SMALL,
        SMALL | {"trunk_sd": 0.012, "branch_sd": 0.001},  # the branches of a trunk are all but one
        SMALL | {"trunk_sd": 0.001, "branch_sd": 0.012},
        SMALL | {"seed_sd": 0.05},
        {"steps": (-1, 0, 1)},
        {},
        {"num_seeds": 1},
        {"num_seeds": 3},
        {"batches": tuple(16_384 * 2**k for k in range(5)), "horizons": tuple(4_000_000 * 4**k for k in range(4))},
        {"widths": (64, 128)},
        {"cubic": 0.006},
    ],
    ids=[
        "small",
        "trunks",
        "branches",
        "seeds",
        "three rates",
        "five rates",
        "one seed",
        "three seeds",
        "large",
        "widths",
        "skew",
    ],
)
def test_intervals_cover_the_truth(arguments):
    """95 % intervals of a, b and c hold the truth in at least 90 % of 60 sweeps.

    That is over all three; of each alone a share of 60 is known to +-.03 only. benchmarks/coverage.py takes 200.
    """
    covered, width = coverage(60, **arguments)
    print(f"covered {covered}, width {width:.2f}")
    assert np.mean(covered[:3]) >= 0.9
    assert (covered[:3] >= 0.85).all()
    assert width < 2.5
    assert covered[3] >= 0.88
