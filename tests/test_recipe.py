import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from samples import FULL, LAW
from sentences import refused

from hf_power import Recipe
from hf_power.records.rows import Row
from hf_power.records.schema import encode
from hf_power.schedule import PAPER_LAW, Law

FIT = {"schema": 1, "schedule": "warmup_stable_decay", "sweep_sha256": "f00d", "num_rows": 90, "num_diverged": 2}
FIT |= {"num_failed": 1, "law": LAW}
FIT |= {
    "intervals": {"a": [0.01, 0.017], "b": [-0.35, -0.25], "batch_exponent": [0.6, 0.8], "critical_batch_tokens": None}
}
FIT |= {"samples": [[0.013, -0.3, 0.7, None, 0.0, 0.0]] * 600, "validity": FULL.validity}
FIT |= {"power": {"a": 0.0104, "interval": [0.0095, 0.0114], "b_drift": None, "batch_drift": None, "cells": []}}
ROW = Row(
    id="a1",
    model_type="mixtral",
    schedule="warmup_stable_decay",
    tokens=1_249_280,  # 305 steps, of which the tail of 10 % takes 30
    tokens_per_step=4096,
    learning_rate=0.01,
    loss=3.0,
    warmup_tokens=65_536,
    decay_tokens=122_880,
    decay_shape="linear",
    weight_decay=0.2,
    max_lr=0.01,
    trained_tokens=1_249_280,
    flops_per_token=2.5e6,
    settings={"mup": {"base_width": 64, "preset": "power_of_two", "residual_multiplier": 0.3, "base_num_layers": 2}},
    data={"dataset": "python-stdlib", "fingerprint": "d00d", "tokenizer": "beef", "held_out_tokens": 1000},
    versions={"torch": "2"},
    hardware={"device": "cpu"},
)


def test_defaults_are_the_paper_s():
    recipe = Recipe()
    assert (recipe.a, recipe.b, recipe.batch_exponent, recipe.max_lr) == (4.0, -0.51, 1.0, 0.02)
    assert (recipe.base_width, recipe.embedding_multiplier, recipe.residual_multiplier) == (256, 12.0, 0.22)
    assert (recipe.decay_ratio, recipe.decay_shape, recipe.critical_batch_tokens) == (0.1, "exponential", None)
    assert recipe.schedule_kwargs() == {"a": 4.0, "b": -0.51, "batch_exponent": 1.0}
    assert recipe.lengths() == {"decay_ratio": 0.1, "decay_shape": "exponential"}


def test_round_trip_by_file_and_folder(tmp_path):
    for recipe in (Recipe(a=3.1, b=-0.46, weight_decay=0.05), FULL):
        recipe.save(tmp_path / "recipe.json")
        assert Recipe.load(tmp_path / "recipe.json") == Recipe.load(str(tmp_path)) == recipe
        assert json.loads((tmp_path / "recipe.json").read_text()) == {"schema": 1, **encode(recipe)}
        assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"schema": 2}, ["is not a recipe of schema 1, got 2"]),
        ({"extra": 1}, ["has unknown keys ['extra'] or lacks []"]),
        ({"a": None}, ["a must be a finite number, got None"]),
        ({"a": True}, ["a must be a finite number, got True"]),
        ({"a": 10**400}, ["a must be a finite number, got 1000"]),
        ({"b": math.nan}, ["b must be a finite number, got nan"]),
        ({"b": 0.5}, ["a, max_lr and base_width must be positive and b negative, got a=0.012, b=0.5"]),
        ({"preset": 3}, ["preset must be one of paper, ibm, power_of_two, got 3"]),
        ({"preset": "papr"}, ["preset must be one of paper, ibm, power_of_two, got 'papr'"]),
        ({"model_type": "gpt22"}, ["model_type must be a model type of transformers, e.g. llama or null, got 'gpt22'"]),
        (
            {"model_type": ["llama"]},
            ["model_type must be a model type of transformers, e.g. llama or null, got ['llama']"],
        ),
        ({"form": "both"}, ["form must be"]),
        ({"tokenizer": 12}, ["tokenizer must be a text or null, got 12"]),
        ({"critical_batch_tokens": 0}, ["critical_batch_tokens must be a finite number or null above 0, got 0"]),
        ({"critical_batch_tokens": math.inf}, ["critical_batch_tokens must be a finite number or null above 0"]),
        ({"base_width": 64.5}, ["base_width must be a whole number, got 64.5"]),
        ({"warmup_tokens": "1M"}, ["warmup_tokens must be a whole number or null, got '1M'"]),
        ({"warmup_tokens": -1}, ["warmup_tokens and weight_decay must not be negative, got 0.2, -1 and 0.05"]),
        ({"decay_ratio": 10}, ["decay_ratio must lie between 0 and 1", "got 10, 65536"]),
        ({"decay_shape": "sqrt"}, ["decay_shape must be one of exponential, linear, 1-sqrt, cosine, got 'sqrt'"]),
        ({"laws": []}, ["laws must be an object, got []"]),
        ({"laws": {"power": LAW}}, ["laws must be an object with keys out of warmup_stable_decay, cosine"]),
        ({"laws": {"cosine": {"a": 1}}}, ["lacks laws.cosine.b"]),
        ({"laws": {"cosine": LAW | {"a": 0}}}, ["laws.cosine.a must be positive, got 0"]),
        ({"laws": {"cosine": LAW | {"b": "x"}}}, ["laws.cosine.b must be a number, got 'x'"]),
        ({"intervals": {"c": [0, 1]}}, ["intervals must be an object with keys out of a, b, batch_exponent"]),
        ({"intervals": {"a": [2, 1]}}, ["intervals.a must be a list [low, high], got [2, 1]"]),
        ({"intervals": {"b": None}}, ["intervals.b must be a list [low, high], got None"]),
        ({"intervals": {"a": [1, math.nan]}}, ["intervals.a[1] must be a finite number, got nan"]),
        ({"samples": {}}, ["samples must be a list of at most 500 draws, got {}"]),
        ({"samples": [[1, -1, 1, None, 0.0, 0.0]] * 501}, ["samples must be a list of at most 500 draws"]),
        ({"samples": [[1, -1]]}, ["samples[0] must be a list [a > 0, b, batch_exponent, critical batch, its growth"]),
        (
            {"samples": [[-1, -1, 1, None, 0.0, 0.0]]},
            ["samples[0] must be a list [a > 0, b, batch_exponent", "got [-1, -1, 1, "],
        ),
        ({"validity": {"width": 3}}, ["validity must be an object with keys out of widths"]),
        ({"validity": {"widths": 3}}, ["validity.widths must be a list, got 3"]),
        ({"validity": {"widths": ["64"]}}, ["validity.widths[0] must be a finite number, got '64'"]),
        ({"validity": {"tokens": [1]}}, ["validity.tokens must be a list [low, high], got [1]"]),
        ({"validity": {"extrapolates_to": 3}}, ["validity.extrapolates_to must be an object, got 3"]),
        ({"validity": {"extrapolates_to": {"tokens": None}}}, ["extrapolates_to.tokens must be a finite number, got"]),
    ],
)
def test_bad_recipes(change, parts):
    with refused(ValueError, *parts):
        Recipe.from_json(json.dumps({"schema": 1, **encode(FULL)} | change))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"a": 0}, ["a, max_lr and base_width must be positive"]),
        ({"b": math.inf}, ["recipe: b must be a finite number, got inf."]),
        ({"laws": {"cosine": Law(0.02, math.nan)}}, ["laws.cosine.b must be a finite number, got nan"]),
        ({"preset": None}, ["recipe: preset must be one of paper, ibm, power_of_two, got None."]),
    ],
)
def test_a_recipe_that_is_built_by_hand_is_checked_too(change, parts):
    with refused(ValueError, *parts):
        Recipe(**change)


def test_bad_files(tmp_path):
    with refused(FileNotFoundError, "there is no recipe at nowhere.json: pass a recipe.json"):
        Recipe.load("nowhere.json")
    whole = json.dumps({"schema": 1, **encode(FULL)}).encode()
    for content, message in (
        (b"{", "is not JSON"),
        (whole[: len(whole) // 2], "is not JSON"),
        (b"\xff" + whole, "is not JSON"),
        (b"", "is not JSON"),
        (b"[]", "got 'list'"),
        (b'{"schema": 1}', "lacks ['a', "),
    ):
        (tmp_path / "recipe.json").write_bytes(content)
        with refused(ValueError, message, str(tmp_path), "pass the recipe.json that hf-power fit wrote"):
            Recipe.load(tmp_path)


def test_peak_of_a_schedule_that_knows_its_horizon():
    """Eq. 6 by hand: 0.013 * 32**0.7 * (1e8)**-0.3 above the critical batch of 32 x 4096 tokens; the cap holds."""
    assert FULL.peak_lr(10**8, 4096 * 64) == pytest.approx(0.013 * 32**0.7 * 1e8**-0.3, rel=1e-12)
    assert FULL.peak_lr(10**8, 4096 * 8) == pytest.approx(0.013 * 8**0.7 * 1e8**-0.3, rel=1e-12)
    assert FULL.peak_lr(10**8, 4096 * 64, "cosine") == pytest.approx(0.02 * 64**0.7 * 1e8**-0.3, rel=1e-12)
    assert FULL.peak_lr(1, 4096 * 64) > FULL.max_lr  # the cap is Power's
    with refused(ValueError, "power needs no horizon", "use lr_scheduler_type='power'"):
        FULL.peak_lr(10**8, 4096, "power")
    with refused(ValueError, "no law for linear, only for warmup_stable_decay, cosine", "sweep that schedule"):
        FULL.peak_lr(10**8, 4096, "linear")
    with refused(ValueError, "no law for warmup_stable_decay, only for power", "give a learning_rate"):
        Recipe().peak_lr(10**8, 4096)


def test_interval_of_a_rate_is_that_of_its_draws():
    """log2 of the draws' a normal around the law with sd 0.1, b tied to it so that they agree at 2**20 tokens."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 500)
    samples = [[0.013 * 2**e, -0.3 - e / 20, 0.7, 4096.0 * 8, 0.0, 0.0] for e in noise]
    recipe = Recipe(a=0.0104, b=-0.3, batch_exponent=0.7, critical_batch_tokens=4096 * 8, samples=samples)
    rate = 0.0104 * 4**0.7 * 2.0 ** (-0.3 * 20)
    assert recipe.lr_interval(2**20, 4096 * 4) == pytest.approx((rate, rate), rel=1e-9)
    for tokens, octaves in ((2**30, 0.05), (2**10, 0.05), (2**40, 0.1)):  # sd |log2 n / 20 - 1| * 0.1
        low, high = recipe.lr_interval(tokens, 4096 * 64)
        rate = 0.0104 * 8**0.7 * tokens**-0.3
        assert low < rate < high
        assert math.log2(high / low) == pytest.approx(2 * 1.96 * octaves, rel=0.1)
        assert recipe.lr_interval(tokens, 4096 * 8) == (low, high)
    rate = PAPER_LAW.lr(10**9, tokens_per_step=4096 * 32)
    assert Recipe().lr_interval(10**9, 4096 * 32) == (rate, rate)
    assert recipe.lr_interval(0, 4096) == (math.inf, math.inf)


def test_recipe_of_a_fit_and_its_sweep():
    power_row = replace(ROW, schedule="power", max_lr=0.03, trained_tokens=720, settings={})
    recipe = Recipe.from_fit(FIT, [ROW, power_row], laws={"cosine": LAW | {"a": 0.02}})
    assert (recipe.a, recipe.intervals["a"]) == (0.0104, (0.0095, 0.0114))
    assert (recipe.b, recipe.batch_exponent, recipe.critical_batch_tokens) == (-0.3, 0.7, 131_072)
    assert (recipe.max_lr, recipe.weight_decay, recipe.model_type, recipe.tokenizer) == (0.03, 0.2, "mixtral", "beef")
    assert (recipe.warmup_tokens, recipe.decay_ratio, recipe.decay_shape) == (65_536, 0.1, "linear")
    assert (recipe.base_width, recipe.preset, recipe.base_num_layers) == (64, "power_of_two", 2)
    assert (recipe.embedding_multiplier, recipe.residual_multiplier, recipe.initializer_range) == (8.0, 0.3, 0.1)
    assert recipe.laws == {"warmup_stable_decay": Law(**LAW), "cosine": Law(**LAW | {"a": 0.02})}
    assert len(recipe.samples) == 500
    assert recipe.validity == FULL.validity
    assert recipe.provenance["scale"] == "measured on the power rows"
    assert recipe.provenance["proxies"] == {"tokens": 1_250_000, "flops": 1_250_000 * 2.5e6}
    for key, value in {"sweep_sha256": "f00d", "num_rows": 90, "data": ROW.data, "versions": ROW.versions}.items():
        assert recipe.provenance[key] == value


def test_scale_without_power_rows_is_the_paper_s_ratio_and_said_to_be_assumed():
    recipe = Recipe.from_fit(FIT | {"power": None}, [ROW])
    assert recipe.a == pytest.approx(0.013 * 4 / 4.6)
    assert recipe.intervals["a"] == pytest.approx((0.01 * 4 / 4.6, 0.017 * 4 / 4.6))
    assert recipe.max_lr == 0.02
    assert recipe.provenance["scale"].startswith("assumed, not measured: 4 / 4.6")


def test_recipe_of_a_sweep_from_elsewhere():
    row = Row(schedule="warmup_stable_decay", tokens=10**9, tokens_per_step=4096, learning_rate=0.01, loss=3.0)
    recipe = Recipe.from_fit(FIT, [row])
    assert (recipe.model_type, recipe.tokenizer, recipe.warmup_tokens, recipe.base_width) == (None, None, None, 256)
    assert recipe.provenance["proxies"] == {"tokens": 0, "flops": 0}


def test_a_fit_that_falls_not_makes_no_recipe():
    rising = copy.deepcopy(FIT)
    rising["law"]["b"] = 0.01
    with refused(ValueError, "b negative", "b=0.01"):
        Recipe.from_fit(rising, [ROW])


@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 305), (0.125, 1000), (0.25, 32), (1 / 3, 99), (0, 50)])
def test_decay_ratio_gives_back_the_tail(ratio, steps):
    row = replace(ROW, tokens=steps * 4096, decay_tokens=round(ratio * steps) * 4096)
    found = Recipe.from_fit(FIT, [row]).decay_ratio
    assert round(found * steps) == round(ratio * steps)
    assert found == pytest.approx(ratio, abs=0.01)


ANY_ROW = replace(
    ROW,
    model_type="qwen3",
    settings={
        "model": {"model_type": "any", "model_config": {"model_type": "qwen3", "initializer_range": 0.04}},
        "mup": {"base_width": 64},
    },
)


def test_a_sweep_of_any_family_makes_a_recipe_of_the_plain_form(tmp_path):
    recipe = Recipe.from_fit(FIT, [ANY_ROW])
    assert (recipe.form, recipe.model_type, recipe.base_width, recipe.initializer_range) == ("plain", "qwen3", 64, 0.04)
    assert (recipe.embedding_multiplier, recipe.residual_multiplier) == (1.0, 1.0)
    expected = {"learning_rate": recipe.max_lr, "weight_decay": 0.2, "base_width": 64, "initializer_range": 0.04}
    assert recipe.settings() == expected | {"embedding_multiplier": 1.0}
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path) == recipe
    base = {"model_type": "qwen3", "hidden_size": 32}
    mup = {"base_config": base, "initializer_range": 0.05, "embedding_multiplier": 10.0}
    of_two = replace(ANY_ROW, settings=ANY_ROW.settings | {"mup": mup})
    assert Recipe.from_fit(FIT, [of_two]).settings() == {"learning_rate": recipe.max_lr, "weight_decay": 0.2, **mup}


def test_a_run_takes_the_numbers_of_the_plain_form_and_no_others(tmp_path):
    from hf_power.settings.settings import Settings

    Recipe.from_fit(FIT, [ANY_ROW]).save(tmp_path / "recipe.json")
    shape = {"model_type": "qwen3", "hidden_size": 128}

    def settings(model, **mup):
        run = {"recipe": str(tmp_path)}
        return Settings.from_dict({"model": model, "mup": mup, "run": run, "training": {"output_dir": "x"}})

    made = settings({"model_type": "any", "model_config": shape})
    made.apply_recipe()
    assert (made.mup.base_width, made.mup.initializer_range) == (64, 0.04)
    assert made.under_mup(made.model.config()).initializer_range == 0.04
    with refused(ValueError, "model_type is llama in the settings but qwen3 in the recipe"):
        settings({}).apply_recipe()
    with refused(ValueError, "initializer_range is 0.02 in the settings but 0.04 in the recipe"):
        settings({"model_type": "any", "model_config": shape | {"initializer_range": 0.02}}).apply_recipe()
    Recipe(model_type="llama").save(tmp_path / "recipe.json")
    with refused(ValueError, "the recipe was tuned with the multiplier form of muP"):
        settings({"model_type": "any", "model_config": shape | {"model_type": "llama"}}).apply_recipe()
