import json
import math
import re

import pytest
import yaml
from scipy.stats import t as student
from sentences import refused
from warm import fork_workers

from hf_power import Recipe
from hf_power.cli import parse_settings, run_verb
from hf_power.coordinates import coord_check
from hf_power.records.rows import Row
from hf_power.schedule import Law
from hf_power.settings.settings import Settings
from hf_power.sweep.jobs import Group
from hf_power.verify import check
from hf_power.verify import page as pages
from hf_power.verify.check import verify

GROUP = Group("power", 32, 128, (1280,), (0, 1), (4.0, 8.0, 16.0), Law(8.0, -0.5))
RECIPE = Recipe(a=8.0, b=-0.5)


def rows(losses):
    """Rows at factors 1/2, 1, 2, 4 ... of RECIPE: a list of losses by seed for each."""
    cell = {"tokens_per_step": 128, "tokens": 1280, "schedule": "power", "learning_rate": 0.01}
    return [
        Row(**cell, law={"a": 4.0 * 2**i}, seed=seed, loss=loss)
        for i, each in enumerate(losses)
        for seed, loss in enumerate(each)
    ]


def judge(losses, tolerance=0.02):
    return pages.judge(rows(losses), GROUP, RECIPE, tolerance)


def test_regret_of_a_parabola_by_hand():
    """L = 3 + .04 (log2 f - .5)**2: L(1) is .01 above the lowest point, at f = sqrt 2."""
    page = judge([[3 + 0.04 * (x - 0.5) ** 2] * 2 for x in (-1, 0, 1)])
    assert page.regret == pytest.approx(0.01)
    assert page.parabola.optimum_factor == pytest.approx(math.sqrt(2))
    assert page.parabola.min_loss == pytest.approx(3.0)
    assert page.parabola.curvature == pytest.approx(0.04)
    assert page.verdict == "passed"
    assert judge([[3 + 0.04 * (x - 0.5) ** 2] * 2 for x in (-1, 0, 1)], tolerance=0.009).verdict == "FAILED"


def test_a_better_factor_fails_and_says_which():
    page = judge([[3.3, 3.3], [3.1, 3.1], [3.0, 3.0], [3.1, 3.1]])
    assert page.verdict == "FAILED"
    assert page.regret == pytest.approx(0.1)
    assert page.parabola.optimum_factor == 2.0
    assert page.reasons == ("2 times the recipe's learning rate is better by 0.1000 nats per token, more than 0.02",)


def test_an_optimum_that_is_not_found_fails_however_flat_the_curve():
    page = judge([[3.003, 3.003], [3.002, 3.002], [3.001, 3.001], [3.0, 3.0]])
    assert page.verdict == "FAILED"
    assert page.reasons == ("the best learning rate lies beyond 4 times the recipe's",)


def test_divergence_above_is_no_reason_to_fail_but_at_the_recipe_s_rate_it_is():
    assert judge([[3.1, 3.1], [3.0, 3.0], [None, 3.2]]).verdict == "passed"
    page = judge([[3.1, 3.1], [3.0, None], [3.2, 3.2]])
    assert page.verdict == "FAILED"
    assert page.reasons == ("a run at the recipe's own learning rate diverged",)


def test_interval_is_student_s_over_factors_and_seeds():
    """The seeds differ by .10 or .12: without the means of factor and seed +-.005 is left, with t(.975, 3) = 3.1824."""
    page = judge([[3.4, 3.5], [3.10, 3.22], [3.0, 3.1], [3.10, 3.22]])
    assert page.regret == pytest.approx(0.11)
    half = 3.1824 * math.sqrt(8 * 0.005**2 / 3)
    assert page.regret_interval == pytest.approx([0.11 - half, 0.11 + half], rel=1e-3)
    assert judge([[3.4], [3.1], [3.0]]).regret_interval is None


def test_a_wide_interval_decides_nothing_and_says_what_would():
    """What is left of a loss is +-.005, so that two seeds know the regret of .01 to +-.03, and nine to +-.009."""
    losses = [[3.1, 3.12], [3.01, 3.01], [3.0, 3.02], [3.1, 3.1]]
    page = judge(losses)
    assert page.verdict == "inconclusive"
    assert not page.passed
    (reason,) = page.reasons
    left = 3.1824 * math.sqrt(8 * 0.005**2 / 3)
    assert f"is known to +-{left:.4f}, so that it may be on either side of 0.02" in reason
    enough = int(re.search(r"--seeds (\d+) would decide it", reason)[1])
    for seeds, decides in ((enough - 1, False), (enough, True)):
        half = float(student.ppf(0.975, 3 * (seeds - 1))) * math.sqrt(8 * 0.005**2 / 3) * math.sqrt(2 / seeds)
        assert (half <= 0.02 - page.regret) == decides
    assert judge(losses, tolerance=0.1).verdict == "passed"
    assert "even 32 seeds would not decide it" in judge(losses, tolerance=page.regret).reasons[0]
    assert "one seed tells no interval" in judge([[3.1], [3.0], [3.1]]).reasons[0]
    assert (
        pages.page_text(page).split("\n")[2].startswith("The recipe's learning rate is neither proved nor refuted at")
    )


def test_bad_arguments_before_anything_is_trained(sections, tmp_path):
    settings = Settings.from_dict(sections(tmp_path / "page"))
    with refused(ValueError, "verify needs a recipe: pass --recipe recipe.json"):
        verify(settings)
    settings.run.recipe = "recipe.json"
    with refused(ValueError, "seeds and tolerance must be positive, got 0"):
        verify(settings, seeds=0)
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def one_coord_check():
    """The coordinate check of these tests' one model is measured once."""
    measured = []

    def once(config, preset):
        measured[:] = measured or [coord_check(config, preset=preset)]
        return measured[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "coord_check", once)
        yield


def arguments(sections, tmp_path, recipe):
    """Command line of a verification that takes seconds."""
    fork_workers()
    made = sections(tmp_path / "page", tokens=40 * 128)
    made["training"] = {"output_dir": str(tmp_path / "page"), "per_device_train_batch_size": 4, "disable_tqdm": True}
    del made["mup"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    recipe.save(tmp_path / "recipe.json")
    return [str(tmp_path / "run.yaml"), "--recipe", str(tmp_path / "recipe.json")]


def recipe_of_scale(a):
    validity = {"widths": [16], "tokens_per_step": [128, 256], "tokens": [1000, 2000]}
    validity["extrapolates_to"] = {"tokens": 4000, "tokens_per_step": 512, "sd_octaves": 0.25}
    return Recipe(
        a=a,
        b=-0.5,
        batch_exponent=0.5,
        max_lr=1.0,
        base_width=16,
        model_type="llama",
        warmup_tokens=256,
        validity=validity,
    )


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_low_fails_with_exit_code_1(one_coord_check, sections, tmp_path, capsys):
    """a = .02: about 5e-5 at the end of 40 steps, where these models want about 1e-2."""
    assert run_verb("verify", arguments(sections, tmp_path, recipe_of_scale(0.02))) == 1
    page = json.loads((tmp_path / "page/verify.json").read_text())
    assert page["verdict"] == "FAILED"
    assert [point["factor"] for point in page["points"]] == [0.5, 1, 2, 4, 8]
    losses = [point["loss"] for point in page["points"]]
    assert losses == sorted(losses, reverse=True)
    assert page["coord_check"]["passed"]
    text = (tmp_path / "page/verify.md").read_text()
    assert "FAILED" in text
    assert "the best learning rate lies beyond 8 times the recipe's" in text
    assert "5,120 tokens are 2.56 times the largest" in text
    for picture in ("verify.png", "coord_check.png"):
        assert (tmp_path / "page" / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in text
    assert "verify.md" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fair_learning_rate_passes_and_runs_nothing_twice(one_coord_check, sections, tmp_path):
    argv = [*arguments(sections, tmp_path, recipe_of_scale(14.0)), "--seeds", "2"]
    assert run_verb("verify", [*argv, "--tolerance", "1.0"]) == 0
    rows = (tmp_path / "page/sweep.jsonl").read_text()
    assert rows.count("\n") == 6
    assert run_verb("verify", [*argv, "--tolerance", "1.0"]) == 0
    assert (tmp_path / "page/sweep.jsonl").read_text() == rows


@pytest.mark.parametrize(("key", "value"), [("label_smoothing_factor", 0.1), ("neftune_noise_alpha", 5.0)])
def test_what_its_runs_would_leave_out_is_refused(sections, tmp_path, key, value):
    settings = parse_settings([*arguments(sections, tmp_path, recipe_of_scale(2.0)), f"--{key}", str(value)])
    with refused(ValueError, f"verify: training.{key} is {value}, but a sweep trains many small models"):
        verify(settings)
