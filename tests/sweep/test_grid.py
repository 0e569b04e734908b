import copy
import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sentences import refused

from hf_power.records.rows import Row
from hf_power.schedule import Law
from hf_power.settings.settings import Settings
from hf_power.sweep.grid import SCHEDULES, Grid, few_digits, load_grid
from hf_power.sweep.jobs import (
    Group,
    belongs,
    edges,
    groups_of,
    horizon_tokens,
    job_tokens,
    next_job,
    row_id,
    row_law,
    row_rate,
    row_settings,
    row_value,
)

LAW = Law(2.0, -0.5, 1.0)
NUMBERS = {"a": 2.0, "b": -0.5, "batch_exponent": 1.0}
CONTENT = {"model": {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}}
CONTENT |= {"mup": {"base_width": 16}, "data": {"block_size": 32}, "training": {"weight_decay": 0.1}}
CONTENT |= {
    "sweep": {
        "widths": [16, 32],
        "tokens_per_step": [128, 256],
        "tokens": ["2.56k", 5120],
        "seeds": [0, 1],
        "warmup_tokens": 256,
        "schedules": {"warmup_stable_decay": [0.01, 0.02], "power": [0.5, 1.0]},
    }
}


def write(tmp_path, **sweep):
    """A YAML like CONTENT; None leaves a key of the section out."""
    content = copy.deepcopy(CONTENT)
    content["sweep"] = {k: v for k, v in (content["sweep"] | sweep).items() if v is not None}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def test_yaml_becomes_a_grid(tmp_path):
    grid = load_grid(write(tmp_path, max_tokens="3M", law=NUMBERS, factor=1.5, decay_shape="1-sqrt", max_lr="2e-2"))
    assert (grid.widths, grid.tokens_per_step, grid.tokens, grid.seeds) == ((16, 32), (128, 256), (2560, 5120), (0, 1))
    assert grid.schedules == {"warmup_stable_decay": (0.01, 0.02), "power": (0.5, 1.0)}
    assert (grid.max_tokens, grid.law, grid.factor, grid.decay_shape) == (3_000_000, LAW, 1.5, "1-sqrt")
    assert (grid.warmup_tokens, grid.decay_ratio, grid.max_lr) == (256, 0.1, 0.02)
    assert grid.sections == {k: v for k, v in CONTENT.items() if k != "sweep"}


def test_horizons_are_rounded_to_whole_steps_of_every_batch_and_said(tmp_path, capsys):
    """19,600 is 76.6 steps of 256; the nearest horizon in whole steps of 128 and 256 is 77 * 256."""
    assert load_grid(write(tmp_path, tokens=[5120, 19_600])).tokens == (5120, 19_712)
    assert capsys.readouterr().out == "horizons in whole steps of 128 and 256: 19,712 for 19,600\n"
    load_grid(write(tmp_path))
    assert not capsys.readouterr().out


def test_single_values_need_no_list(tmp_path):
    grid = load_grid(write(tmp_path, widths=16, tokens_per_step=128, seeds=[3], schedules={"linear": 0.01}))
    assert (grid.widths, grid.tokens_per_step, grid.seeds, grid.schedules) == ((16,), (128,), (3,), {"linear": (0.01,)})


def test_example_of_the_house_is_a_grid():
    grid = load_grid(str(Path(__file__).parents[2] / "scripts" / "recipes" / "sweep.yaml"))
    starts = [job for name in grid.schedules if name != "power" for job in first_jobs(grid, name)]
    assert sum(job_tokens(grid, job) for job in starts) < grid.max_tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "parts"),
    [
        ({"widths": None}, ("sweep.widths is missing or empty", "name at least one")),
        ({"tokens": []}, ("sweep.tokens is missing or empty",)),
        ({"tokens_per_step": None}, ("sweep.tokens_per_step is missing or empty",)),
        ({"schedules": {}}, ("sweep.schedules is missing or empty",)),
        ({"seeds": []}, ("sweep.seeds is empty", "name at least one")),
        ({"widths": [16, 16]}, ("sweep.widths names a value twice", "[16, 16]")),
        ({"tokens": ["5.12k", 5120]}, ("sweep.tokens names a value twice", "[5120, 5120]")),
        ({"widths": [16, -32]}, ("sweep.widths must be at least 0", "-32")),
        ({"seeds": [-1]}, ("sweep.seeds must be at least 0", "-1")),
        ({"tokens": ["lots"]}, ("sweep.tokens must be a number of tokens", "'lots'")),
        ({"warmup_tokens": "-1k"}, ("sweep.warmup_tokens must be at least 0", "'-1k'")),
        ({"max_tokens": -1}, ("sweep.max_tokens must be at least 0", "-1")),
        ({"max_tokens": "much"}, ("sweep.max_tokens must be a number of tokens", "'much'")),
        ({"colour": 1}, ("sweep.colour is unknown", "use one of")),
        ({"schedules": {"exponential": [0.01]}}, ("sweep.schedules.exponential is unknown",)),
        ({"schedules": ["cosine"]}, ("sweep.schedules must map names to learning rates", "['cosine']")),
        ({"schedules": {"cosine": []}}, ("sweep.schedules.cosine is empty",)),
        ({"schedules": {"power": []}}, ("sweep.schedules.power is empty", "scales of a")),
        ({"schedules": {"cosine": [0.01, 0.01]}}, ("cosine names a learning rate twice", "[0.01, 0.01]")),
        ({"schedules": {"cosine": [0.01, 0.010001]}}, ("cosine names a learning rate twice",)),  # the same four digits
        ({"schedules": {"cosine": [0.0]}}, ("sweep.schedules.cosine must be a number between 1e-12", "got 0.0")),
        ({"schedules": {"cosine": ["fast"]}}, ("sweep.schedules.cosine must be a number", "'fast'")),
        ({"schedules": {"cosine": [True]}}, ("sweep.schedules.cosine must be a number", "True")),
        ({"schedules": {"cosine": [math.nan]}}, ("sweep.schedules.cosine must be a number", "nan")),
        ({"seeds": ["a"]}, ("sweep.seeds must be a whole number such as 0, got 'a'",)),
        ({"schedules": {"wsd": [0.01]}}, ("sweep.schedules.wsd is unknown: did you mean warmup_stable_decay?",)),
        ({"tokens_per_step": [100]}, ("tokens_per_step 100 is no whole number of blocks of 32", "take 96 or 128")),
        ({"tokens_per_step": [8]}, ("tokens_per_step 8 is no whole number of blocks of 32 (block_size): take 32",)),
        (
            {"tokens": [900]},
            ("sweep.tokens: 900 tokens are no whole number of steps of 128 and 256: take 768 or 1,024",),
        ),
        ({"tokens": [5000, 5121]}, ("[5000, 5121] are the same number of steps of 128 and 256: set them apart",)),
        ({"warmup_tokens": 4608, "tokens": [5120]}, ("5,120 tokens leave no room between a warmup of 4,608", "of 512")),
        ({"decay_ratio": 1.0}, ("leave no room",)),
        ({"decay_ratio": 1.5}, ("sweep.decay_ratio must be a number between 0 and 1", "1.5")),
        ({"decay_ratio": "some"}, ("sweep.decay_ratio must be a number", "'some'")),
        ({"decay_shape": "exponential"}, ("sweep.decay_shape must be linear, 1-sqrt or cosine", "'exponential'")),
        ({"max_lr": 0}, ("sweep.max_lr must be a number between 1e-12", "got 0")),
        ({"factor": 1}, ("sweep.factor must be a number between 1.01 and 100", "got 1")),
        ({"max_extensions": -1}, ("sweep.max_extensions must be a number between 0 and 100", "-1")),
        ({"start_exponent": 3}, ("sweep.start_exponent must be a number between -2 and 2", "got 3")),
        ({"law": {"a": 4.0}}, ("sweep.law must have the keys a, b, batch_exponent", "{'a': 4.0}")),
        ({"law": 4.0}, ("sweep.law must have the keys", "got 4.0")),
        ({"law": NUMBERS | {"b": 0.0}}, ("sweep.law.b must be a number between -10 and -1e-06", "got 0.0")),
        ({"law": NUMBERS | {"a": 0}}, ("sweep.law.a must be a number between 1e-12", "got 0")),
        ({"schedules": {"power": [1.0]}}, ("power needs a law", "sweep.law")),
        (
            {"schedules": {"warmup_stable_decay": [0.01], "power": [1.0]}, "tokens_per_step": [128]},
            ("power's law is fitted on two horizons and two batches or more", "and 1"),
        ),
        ({"widths": [17]}, ("17",)),
    ],
)
def test_bad_value_gets_its_sentence(tmp_path, sweep, parts):
    with refused(ValueError, *parts):
        load_grid(write(tmp_path, **sweep))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("- 1\n- 2\n", ("lacks the section sweep", "model, mup, data, run, training")),
        ("model: {}\n", ("lacks the section sweep",)),
        ("sweep: [16]\n", ("lacks the section sweep",)),
        ("", ("lacks the section sweep",)),
        ("sweep: {widths: [16\n", ("is not YAML",)),
    ],
)
def test_bad_file_gets_its_sentence(tmp_path, text, parts):
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with refused(ValueError, str(path), *parts):
        load_grid(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep: {width: 16}", "sweep.width is unknown: did you mean widths?"),
        ("sweep: {widths: 16}\nmodell: {}", "section modell is unknown: did you mean model?"),
        ("sweep: {widths: 16}\nmodel: {hidden: 16}", "model.hidden is unknown: did you mean hidden_size?"),
        (
            "sweep: {widths: 16, tokens: 640, tokens_per_step: 64, schedules: {cosin: 0.01}}",
            "sweep.schedules.cosin is unknown: did you mean cosine?",
        ),
    ],
)
def test_unknown_name_gets_the_nearest_one(tmp_path, text, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_grid(str(path))
    assert str(caught.value) == f"{path}: {message}"


def test_missing_file(tmp_path):
    with refused(FileNotFoundError, "there is no settings file at", "none.yaml"):
        load_grid(str(tmp_path / "none.yaml"))
    with pytest.raises(FileNotFoundError):
        load_grid(str(tmp_path))


@pytest.mark.parametrize(
    ("section", "key", "value", "parts"),
    [
        ("mup", "mup", False, ("a sweep needs muP", "mup: true")),
        ("training", "torch_compile", True, ("a sweep compiles nothing", "remove it")),
        ("training", "optim", "adafactor", ("training.optim is adafactor", "torch's AdamW alone")),
        ("training", "optim", "adamw_bnb_8bit", ("training.optim is adamw_bnb_8bit", "torch's AdamW alone")),
        ("training", "learning_rate", 0.1, ("training.learning_rate is 0.1", "give sweep.schedules")),
        ("training", "seed", 3, ("training.seed is 3", "give sweep.seeds")),
        ("training", "neftune_noise_alpha", 5, ("training.neftune_noise_alpha is 5", "a loop of its own")),
        ("training", "max_steps", 5, ("training.max_steps is 5", "the length of a run is told in tokens")),
        ("run", "recipe", "r.json", ("makes a recipe and takes none, got 'r.json'", "remove run.recipe")),
        ("data", "streaming", True, ("reads its data many times over", "set streaming to false")),
        ("model", "model_type", "gpt2", ("gpt2", "use llama or mixtral")),
        ("model", "model_config", {"hidden_act": "loud"}, ("the model's config cannot be used", "loud")),
    ],
)
def test_sections_that_a_sweep_cannot_have(tmp_path, section, key, value, parts):
    content = copy.deepcopy(CONTENT)
    content.setdefault(section, {})[key] = value
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with refused(ValueError, *parts):
        load_grid(str(path))


def grid_of(**changes):
    grid = Grid(
        sections={k: v for k, v in CONTENT.items() if k != "sweep"},
        widths=(16,),
        tokens_per_step=(128,),
        tokens=(1280, 2560, 5120),
        schedules={"warmup_stable_decay": (0.01, 0.02)},
        warmup_tokens=256,
    )
    return replace(grid, **changes)


def test_width_and_batch_change_what_they_should_and_nothing_else():
    grid = grid_of()
    small, large = grid.sections_at(16, 128), grid.sections_at(64, 512)
    assert large["model"] == small["model"] | {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    batch = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    assert large["training"] == {"weight_decay": 0.1} | batch
    assert {k: large[k] for k in ("mup", "data")} == {k: CONTENT[k] for k in ("mup", "data")}
    assert grid.sections["training"] == {"weight_decay": 0.1}  # a copy was changed


def test_row_settings_by_hand():
    grid = grid_of(decay_ratio=0.2, decay_shape="1-sqrt", max_lr=0.05)
    by_name = {}
    for name in SCHEDULES:
        group = Group(name, 16, 128, grid.tokens, (0,), (0.01,), LAW if name == "power" else None)
        training = row_settings(grid, group, 0.01, 3, 2560)["training"]
        assert (training["seed"], training["warmup_steps"]) == (3, 2)
        by_name[name] = training["lr_scheduler_type"], training["learning_rate"], training["lr_scheduler_kwargs"]
    tail = {"decay_tokens": 512, "decay_shape": "1-sqrt"}  # a fifth of 20 steps of 128
    wsd = {"num_decay_steps": 4, "decay_type": "1-sqrt"}
    root = {"a": 0.01 * 16, "b": -0.5, "batch_exponent": 0.0}  # 0.01 at the end of a warmup of 256 = 16**2 tokens
    assert by_name == {
        "warmup_stable_decay": ("warmup_stable_decay", 0.01, wsd),
        "power": ("power", 0.05, {"a": 0.01, "b": -0.5, "batch_exponent": 1.0, **tail}),
        "cosine": ("cosine", 0.01, {}),
        "linear": ("linear", 0.01, {}),
        "inverse_sqrt": ("power", 0.01, {**root, **tail}),
    }
    settings = row_settings(grid, group, 0.01, 3, 2560)
    assert Settings.from_dict(settings).run.tokens == 2560
    assert json.loads(json.dumps(settings)) == settings


def test_learning_rate_of_a_row():
    power = Group("power", 16, 8192, (10_000,), (0,), (3.0,), LAW)
    assert row_rate(power, 3.0, 10_000) == pytest.approx(3.0 * 2 / 100)  # a * beta * T**-0.5
    assert row_rate(replace(power, schedule="cosine", law=None), 0.03, 10_000) == 0.03


def test_tail_is_whole_steps_and_never_nothing():
    grid = grid_of(decay_ratio=0.1)
    assert [grid.tail_tokens(t, 128) for t in (128 * 3, 128 * 14, 128 * 16, 128 * 100)] == [128, 128, 256, 1280]


def test_id_depends_on_everything_but_the_order_of_keys():
    one = row_id({"a": 1, "b": {"c": 2}}, {"d": 3})
    assert one == row_id({"b": {"c": 2}, "a": 1}, {"d": 3})
    assert len({one, row_id({"a": 1, "b": {"c": 3}}, {"d": 3}), row_id({"a": 1, "b": {"c": 2}}, {"d": 4})}) == 3
    assert len(one) == 16


def test_groups_are_dearest_first_and_start_where_the_batch_suggests():
    grid = grid_of(widths=(16, 32), tokens_per_step=(128, 1024), start_exponent=0.7, factor=2.0)
    groups = groups_of(grid, "warmup_stable_decay")
    assert [(g.width, g.tokens_per_step) for g in groups] == [(32, 1024), (32, 128), (16, 1024), (16, 128)]
    assert groups[1].values == (0.01, 0.02)
    assert groups[0].values == (0.04, 0.08)  # 8**0.7 = 4.29, two factors of 2
    assert groups_of(replace(grid, start_exponent=1.0), "warmup_stable_decay")[0].values == (0.08, 0.16)


def test_groups_start_where_they_are_told_without_extensions():
    grid = grid_of(tokens_per_step=(128, 1024), max_extensions=0)
    assert {g.values for g in groups_of(grid, "warmup_stable_decay")} == {(0.01, 0.02)}


def test_scales_of_power_become_values_of_a():
    grid = grid_of(tokens_per_step=(128, 1024), schedules={"power": (2.0, 0.5)})
    groups = groups_of(grid, "power", replace(LAW, a=3.14159))
    assert {g.values for g in groups} == {(1.571, 6.283)}
    assert groups[0].law == replace(LAW, a=3.14159)


def first_jobs(grid, schedule):
    return [job for group in groups_of(grid, schedule) if (job := next_job(grid, group, []))]


def optimum_at(log2_optimum, curvature=1.0):
    """A loss that is a parabola in log2(rate); the optimum may depend on the horizon."""

    def loss(value, tokens):
        return 2.0 + curvature * (math.log2(value) - log2_optimum(tokens)) ** 2

    return loss


def rows_of(grid, job, loss):
    """The rows that a job would leave behind; a loss above 1e3 counts as diverged."""
    group, rows = job.group, []
    for value, horizons in job.horizons.items():
        trained = horizon_tokens(grid, group, horizons)
        for tokens, seed in itertools.product(horizons, group.seeds):
            row = {"schedule": group.schedule, "width": group.width, "tokens_per_step": group.tokens_per_step}
            row |= {"tokens": tokens, "seed": seed, "extension": job.extension, "trained_tokens": trained[tokens]}
            row |= {
                "learning_rate": row_rate(group, value, tokens),
                "law": (law := group.law_of(value)) and row_law(law),
            }
            nats = loss(value, tokens)
            rows.append(Row(**row, status="diverged") if nats > 1e3 else Row(**row, loss=nats))
    return rows


def simulate(grid, group, loss):
    """All rows and jobs of a group, by asking for the next job until there is none."""
    rows, jobs = [], []
    while (job := next_job(grid, group, rows)) is not None:
        rows += rows_of(grid, job, loss)
        jobs.append(job)
        assert len(jobs) <= grid.max_extensions + 1
    return rows, jobs


def extensions(grid, loss):
    """What each job after the first trains: {value: horizons}."""
    group = groups_of(grid, next(iter(grid.schedules)))[0]
    return [job.horizons for job in simulate(grid, group, loss)[1][1:]]


def test_first_job_is_every_value_at_every_horizon():
    grid = grid_of(tokens=(5120, 1280))
    job = next_job(grid, groups_of(grid, "warmup_stable_decay")[0], [])
    assert (job.extension, job.horizons) == (0, {0.01: (1280, 5120), 0.02: (1280, 5120)})


def test_bracketed_optimum_ends_it():
    grid = grid_of(schedules={"warmup_stable_decay": (0.01, 0.02, 0.04)})
    assert extensions(grid, optimum_at(lambda t: math.log2(0.02))) == []


def test_extension_up_and_down():
    grid = grid_of(tokens=(1280,), schedules={"warmup_stable_decay": (0.01, 0.02, 0.04)})
    assert extensions(grid, optimum_at(lambda t: math.log2(0.15))) == [{rate: (1280,)} for rate in (0.08, 0.16, 0.32)]
    assert extensions(grid, optimum_at(lambda t: math.log2(0.009))) == [{0.005: (1280,)}]
    assert extensions(replace(grid, factor=1.5), optimum_at(lambda t: math.log2(0.05))) == [
        {0.06: (1280,)},
        {0.09: (1280,)},
    ]


def test_lone_value_is_both_edges():
    grid = grid_of(tokens=(1280,), schedules={"warmup_stable_decay": (0.01,)})
    assert extensions(grid, optimum_at(lambda t: math.log2(0.01))) == [{0.005: (1280,), 0.02: (1280,)}]


def test_horizons_ask_for_themselves():
    """The short horizon wants more, the long one less; a value runs up to the longest horizon that asks for it."""
    grid = grid_of(schedules={"warmup_stable_decay": (0.01, 0.02, 0.04)})
    best = {1280: math.log2(0.05), 2560: math.log2(0.02), 5120: math.log2(0.008)}
    assert extensions(grid, optimum_at(best.get)) == [{0.005: (1280, 2560, 5120), 0.08: (1280,)}]
    best = {1280: math.log2(0.05), 2560: math.log2(0.05), 5120: math.log2(0.02)}
    for tokens in ((1280, 2560, 5120), (5120, 2560, 1280)):
        assert extensions(replace(grid, tokens=tokens), optimum_at(best.get)) == [{0.08: (1280, 2560)}]


def test_diverged_run_is_an_upper_edge():
    grid = grid_of(tokens=(1280,), schedules={"warmup_stable_decay": (0.01, 0.02, 0.04)})
    assert extensions(grid, lambda v, t: math.inf if v > 0.03 else -v) == []  # the best is 0.02, below a diverged one
    steps = extensions(grid, lambda v, t: math.inf if v > 0.006 else -v)  # all diverged: down
    assert steps == [{0.005: (1280,)}, {0.0025: (1280,)}]


def test_one_diverged_seed_makes_a_value_bad():
    grid = grid_of(tokens=(1280,), seeds=(0, 1), schedules={"warmup_stable_decay": (0.01, 0.02)})
    group = groups_of(grid, "warmup_stable_decay")[0]
    rows = rows_of(grid, next_job(grid, group, []), optimum_at(lambda t: math.log2(0.02)))
    assert edges(rows) == (0.01, 0.02, 0.02)
    bad = next(i for i, row in enumerate(rows) if row.learning_rate == 0.02)
    rows[bad] = replace(rows[bad], loss=None, status="diverged")
    assert edges(rows) == (0.01, 0.01, 0.02)


def test_max_extensions_is_an_end():
    grid = grid_of(tokens=(1280,))
    for most in (0, 1, 3):
        assert len(extensions(replace(grid, max_extensions=most), optimum_at(lambda t: 20.0, 0.01))) == most


def test_budget_is_never_exceeded():
    """Every budget from the first job's tokens up: what is spent stays below, and one more extension would not fit."""
    grid = grid_of(max_extensions=6)
    group = groups_of(grid, "warmup_stable_decay")[0]
    loss = optimum_at(lambda t: math.log2(0.7))
    costs = [job_tokens(grid, job) for job in simulate(grid, group, loss)[1]]
    assert len(costs) == 7
    for budget in range(costs[0], sum(costs) + 1000, 640):
        rows, jobs = simulate(grid, replace(group, max_tokens=budget), loss)
        spent = sum(row.trained_tokens for row in rows)
        assert spent == sum(costs[: len(jobs)]) <= budget
        assert len(jobs) == len(costs) or spent + costs[len(jobs)] > budget


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tokens_of_a_job_by_hand(schedule):
    """Horizons of 10, 20 and 40 steps, tails of 1, 2 and 4, a warmup of 2, three values, two seeds."""
    law = LAW if schedule == "power" else None
    grid = grid_of(seeds=(0, 1), schedules={schedule: (0.01, 0.02, 0.04)})
    job = next_job(grid, groups_of(grid, schedule, law)[0], [])
    shared = {"cosine": 40 + (20 - 2) + (10 - 2), "linear": 40 + (20 - 2) + (10 - 2)}
    assert job_tokens(grid, job) == 6 * 128 * shared.get(schedule, 40 + 1 + 2)


@hypothesis_settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_job_does_not_depend_on_the_order_of_rows_nor_on_where_a_job_was_stopped(data):
    best = data.draw(st.lists(st.floats(-12, 0), min_size=3, max_size=3), label="optima")
    grid = grid_of(seeds=(0, 1), max_extensions=5)
    loss = optimum_at(dict(zip(grid.tokens, best, strict=True)).get)
    group = groups_of(grid, "warmup_stable_decay")[0]
    rows, jobs = simulate(grid, group, loss)
    stop = data.draw(st.integers(0, len(jobs) - 1), label="job")
    before = [row for row in rows if row.extension < stop]
    of_job = [row for row in rows if row.extension == stop]
    kept = data.draw(st.lists(st.sampled_from(range(len(of_job))), max_size=len(of_job) - 1, unique=True), label="kept")
    foreign = [replace(row, width=99) for row in rows]
    there = before + [of_job[i] for i in kept] + foreign
    random.Random(data.draw(st.integers(0, 99))).shuffle(there)
    assert next_job(grid, group, there) == jobs[stop]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    offsets=st.lists(st.floats(-6, 6), min_size=3, max_size=3),
    starts=st.integers(1, 4),
    factor=st.sampled_from([1.5, 2.0, 4.0]),
    diverges_at=st.floats(0.5, 8),
    schedule=st.sampled_from(["warmup_stable_decay", "power"]),
)
def test_every_horizon_ends_bracketed(offsets, starts, factor, diverges_at, schedule):
    """Wherever the optimum of each horizon lies within 6 octaves of the start, and runs diverge somewhere above it."""
    start = 0.01
    law = LAW if schedule == "power" else None
    grid = grid_of(
        schedules={schedule: tuple(start * factor**i for i in range(starts))}, factor=factor, max_extensions=40
    )
    best = {t: math.log2(start) + o + (1 if law else 0) for t, o in zip(grid.tokens, offsets, strict=True)}

    def loss(value, tokens):
        octaves = math.log2(value) - best[tokens]
        return math.inf if octaves > diverges_at * math.log2(factor) else 2 + octaves**2

    group = groups_of(grid, schedule, law)[0]
    rows, _ = simulate(grid, group, loss)
    keys = [(row_value(row), row.tokens, row.seed) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(belongs(row, group) for row in rows)
    for tokens in grid.tokens:
        values = sorted(value for value, t, _ in keys if t == tokens)
        chosen = min(values, key=lambda value: loss(value, tokens))
        assert values[0] < chosen < values[-1]
        assert all(b / a == pytest.approx(factor, rel=2e-3) for a, b in itertools.pairwise(values))


def test_rows_belong_to_one_group_only():
    grid = grid_of(widths=(16, 32), tokens_per_step=(128, 256), schedules={"linear": (0.01,), "power": (1.0,)})
    laws = LAW, replace(LAW, b=-0.4)
    groups = groups_of(grid, "linear") + [group for law in laws for group in groups_of(grid, "power", law)]
    for group in groups:
        for row in rows_of(grid, next_job(grid, group, []), lambda v, t: 2.0):
            assert [g for g in groups if belongs(row, g)] == [group]


def test_few_digits():
    assert [few_digits(x) for x in (0.0123456, 1 / 3, 12345.0, 0.02)] == [0.01235, 0.3333, 12340.0, 0.02]
