import itertools
import json
import math
from dataclasses import replace

import pytest
from sentences import refused
from transformers import LlamaConfig, MixtralConfig

from hf_power import Recipe, power_lr
from hf_power.fit.forecast import fit_forecast
from hf_power.fit.result import Cell
from hf_power.models import flops_per_token
from hf_power.plan.plan import describe_run, make_plan, plan_text
from hf_power.plan.record import duration
from hf_power.plan.target import Machine, Target
from hf_power.recipe import warnings_for
from hf_power.records.errors import UserError
from hf_power.records.run import Run
from hf_power.schedule.lengths import plan_schedule

RUN = Run(
    kind="pretrain",
    name="r",
    tokens_per_step=4096 * 32,
    parameters=3_000_000,
    parameters_without_embeddings=2_000_000,
    flops_per_token=1.25e7,
)
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 300}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def schedule(steps, **kwargs):
    return plan_schedule(num_training_steps=steps, tokens_per_step=RUN.tokens_per_step, **kwargs)


def test_milestones_are_the_paper_s():
    """beta 32: the cap ends at 2.9e7 tokens; 1e9 tokens have 0.00329 (section 3 of arXiv:2408.13359)."""
    steps = 2 * 10**9 // RUN.tokens_per_step
    lines = describe_run(RUN, steps, (5_000_000_000, 8_000_000_000), schedule(steps)).splitlines()
    found = {line.split()[0] + " " + line.split()[1]: line for line in lines}
    assert "29,0" in found["cap ends"] or "28,9" in found["cap ends"], found["cap ends"]
    assert found["cap ends"].endswith("lr 2.000e-02")
    assert found["half 999,948,288"].endswith(f"lr {4 * 32 * 999_948_288**-0.51:.3e}")
    assert any(line.startswith("    decay starts") for line in lines)
    assert lines[-1].startswith("    end")
    assert lines[-1].endswith("lr 0.000e+00")


def test_the_cap_ends_earlier_above_the_critical_batch():
    """A batch of 32 x 4096 tokens with a critical one of 16 x 4096: the paper's 7.5e6 tokens for beta 16."""
    steps = 2 * 10**9 // RUN.tokens_per_step
    text = describe_run(RUN, steps, (1, 2), schedule(steps, critical_batch_tokens=16 * 4096))
    line = next(line for line in text.splitlines() if "cap ends" in line)
    assert abs(int(line.split()[2].replace(",", "")) - 7.5e6) < 0.05e6
    assert "4 * min(beta, 16)^1 * n^-0.51" in text


def test_numbers_of_the_run():
    text = describe_run(RUN, 10, (5_000_000_000, 8_000_000_000), None)
    assert "3,000,000 (2,000,000 without embeddings)" in text
    assert "1,310,720 in 10 steps" in text
    assert "131,072 tokens per step (beta = 32)" in text
    assert "1.64e+13 FLOP (1.25e+07 per token)" in text  # 1.25e7 * 1,310,720
    assert "5.00 GB will be written, 8.0 GB are free" in text
    assert "WARNING" not in text


def test_a_small_disk_is_said():
    assert "the disk is too small: set save_total_limit" in describe_run(RUN, 10, (9, 8), None)


VALIDITY = {"widths": [128, 256, 512], "tokens_per_step": [65_536, 2_097_152], "tokens": [2 * 10**9, 256 * 10**9]}
VALIDITY |= {"extrapolates_to": {"tokens": 2 * 10**12, "tokens_per_step": 3_000_000, "sd_octaves": 0.25}}
PAPER = Recipe(warmup_tokens=10**9)
TRILLION = Target(10**12, 4096 * 1024, parameters=10**9)


def by_name(plan):
    return {point.what: point for point in plan.milestones}


def test_rates_at_milestones_are_the_paper_s():
    """beta 1024, 1e12 tokens: .02 at 1 %, .01005 at 10 %; the cap ends at 2.6e10 (section 3 of arXiv:2408.13359)."""
    plan = make_plan(PAPER, TRILLION)
    found = by_name(plan)
    assert list(found) == ["end of warmup", "1%", "10%", "25%", "50%", "75%", "decay starts", "end"]
    assert (found["end of warmup"].tokens, found["end of warmup"].lr, found["1%"].lr) == (10**9, 0.02, 0.02)
    assert round(found["10%"].lr, 5) == 0.01005
    for share in (0.25, 0.5, 0.75):
        lr = 4 * 1024 * (share * plan.target.tokens) ** -0.51
        assert found[f"{share:.0%}"].lr == pytest.approx(lr, rel=1e-9)
    assert found["end"].lr == pytest.approx(0, abs=1e-15)
    assert plan.target.steps == math.ceil(10**12 / 4_194_304)
    assert plan.cap_ends_tokens == pytest.approx(2.6e10, rel=0.02)
    assert (plan.beta, plan.warmup_tokens) == (1024, 10**9)
    assert all(p.low == p.lr == p.high for p in plan.milestones)  # no samples, no interval
    content = plan.to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert list(content["target"]) == ["parameters", "tokens", "steps", "block_size"]


def test_curve_is_the_schedule_from_its_first_step_to_its_end():
    plan = make_plan(PAPER, TRILLION)
    tokens = [p.tokens for p in plan.curve]
    assert tokens == sorted(set(tokens))
    assert (tokens[0], tokens[-1]) == (4096 * 1024, plan.target.tokens)
    assert {plan.warmup_tokens, plan.decay_start_tokens, plan.cap_ends_tokens} <= set(tokens)
    assert 200 <= len(tokens) <= 250
    start = plan.decay_start_tokens
    assert sum(n > start for n in tokens) >= 20
    law = {"tokens_per_step": 4096 * 1024, "warmup_tokens": 10**9, "decay_start_tokens": start}
    law["decay_tokens"] = plan.target.tokens - start
    for point in plan.curve:
        assert point.lr == pytest.approx(power_lr(point.tokens, **law), rel=1e-12, abs=1e-15)


def test_intervals_follow_the_schedule():
    """a known to a factor 1.2 either way: the band is that wide along the law, in the tail too, and never above the cap."""
    # Two draws whose standard deviation is the 1.96th part of log2(1.2).
    samples = [[4 * 1.2 ** (e / 1.959964), -0.51, 1.0, None, 0.0, 0.0] for e in (-1, 1)]
    plan = make_plan(Recipe(warmup_tokens=10**9, samples=samples), TRILLION)
    found = by_name(plan)
    for what in ("50%", "75%", "decay starts"):
        point = found[what]
        assert point.low == pytest.approx(point.lr / 1.2, rel=1e-6)
        assert point.high == pytest.approx(point.lr * 1.2, rel=1e-6)
    assert (found["1%"].low, found["1%"].high) == (0.02, 0.02)
    for point in plan.curve:
        assert point.low <= point.lr <= point.high <= 0.02
    last = plan.curve[-2]
    assert last.high / last.lr == pytest.approx(1.2, rel=1e-6)


def test_days_and_timescales_by_hand():
    """6 * 1e9 * 1e12 FLOP on 8 x 1e15 FLOP/s at 50 % are 1.5e6 s; eta(half) = 4 * 1024 * (5e11)**-0.51."""
    machine = Machine(flops_per_device=1e15, utilisation=0.5)
    plan = make_plan(PAPER, TRILLION, machine, proxies={"flops": 4.8e19, "tokens": 1e9})
    total = plan.target.tokens
    assert plan.compute.days == pytest.approx(1.5e6 / 86_400 * total / 1e12, rel=1e-12)
    assert plan.compute.flops == 6e9 * total
    half, start = plan.timescales
    assert half.share_of_run == pytest.approx(1024 * 4096 / (4 * 1024 * (total / 2) ** -0.51 * 0.1 * total), rel=1e-9)
    assert start.tokens == plan.decay_start_tokens
    assert start.share_of_run == pytest.approx(half.share_of_run * 1.8**0.51, rel=1e-6)
    assert plan.proxies.share_of_direct_sweep == pytest.approx(4.8e19 / (8 * 6e9 * total))
    assert make_plan(PAPER, TRILLION).proxies is None
    assert make_plan(Recipe(weight_decay=0.0), TRILLION).timescales == ()


def test_target_of_a_config():
    """PowerMoE-3B: 3.3B parameters, of which 800M are active (Table 4)."""
    shape = {"hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 24}
    shape |= {"num_key_value_heads": 8, "vocab_size": 49_152, "num_local_experts": 40, "num_experts_per_tok": 8}
    config = MixtralConfig(**shape, tie_word_embeddings=True)
    plan = make_plan(PAPER, Target(10**12, 4096 * 1024, config))
    assert plan.target.parameters == pytest.approx(3.3e9, rel=0.01)
    assert plan.target.active_parameters == pytest.approx(8e8, rel=0.11)
    assert plan.compute.flops_per_token == flops_per_token(config, 4096)
    text = plan_text(plan)
    for words in (
        "3,298,788,864 (3,223,291,392 without embeddings; active 882,869,760)",
        "4,194,304 tokens per step (beta = 1024)",
        "8 devices of 9.89e+14 FLOP/s at 25%",
        "decay starts",
        "min(0.02, 4 * beta^1 * n^-0.51)",
        "the cap of 0.02 ends at 25,",
        "AdamW's with weight decay 0.1",
    ):
        assert words in text


def test_peaks_of_schedules_with_a_law():
    law = {"a": 4.6, "b": -0.51, "batch_exponent": 1.0, "critical_batch_tokens": None}
    plan = make_plan(Recipe(laws={"warmup_stable_decay": law}), Target(10**13, 2**22, parameters=10**9))
    assert round(plan.peak_lrs["warmup_stable_decay"], 4) == 0.0011  # the paper's own example
    assert "warmup_stable_decay: lr 1.1" in plan_text(plan)


def sentence(warning):
    assert warning.endswith(".")
    assert "\n" not in warning
    return warning


def test_warnings_of_a_run_outside_the_sweep():
    recipe = Recipe(validity=VALIDITY, critical_batch_tokens=2_000_000.0)
    inside = {"tokens": 10**11, "tokens_per_step": 10**6, "width": 256}
    assert warnings_for(recipe, **inside) == warnings_for(Recipe(), tokens=1, tokens_per_step=10**12, width=9**9) == []
    for change, words in (
        ({"tokens": 10**12}, "1,000,000,000,000 tokens are 3.91 times the largest, 256,000,000,000, of the sweep"),
        ({"tokens": 4 * 10**12}, "15.6 times the largest, 256,000,000,000, of the sweep, beyond the 2,000,000,000,000"),
        ({"tokens": 10**9}, "1,000,000,000 tokens are 2 times below the smallest, 2,000,000,000, of the sweep."),
        ({"tokens_per_step": 32_768}, "32,768 tokens per step are 2 times below the smallest, 65,536, of the sweep."),
        ({"width": 2304}, "the width 2,304 is 4.5 times the largest, 512, of the sweep: muP alone"),
        ({"tokens_per_step": 2_097_152}, "2,097,152 tokens per step are 1.05 times the critical batch, 2,000,000: the"),
        ({"weight_decay": 0.2}, "weight decay is 0.2, the sweep had 0.1: the law only holds"),
    ):
        (warning,) = warnings_for(recipe, **inside | change)
        assert words in sentence(warning)
    assert len(warnings_for(recipe, tokens=10**13, tokens_per_step=10**8, width=64, weight_decay=1.0)) == 5


@pytest.mark.parametrize(
    ("recipe", "target", "words"),
    [
        (Recipe(max_lr=1e-5), {}, "the cap of 1e-05 binds for the whole run: the rate is constant until 900,"),
        (Recipe(warmup_tokens=10 * 4096 * 1024), {}, "warmup of 41,943,040 tokens is 10 steps of this batch"),
        (Recipe(), {"tokens": 499 * 4096 * 1024}, "the run has 499 steps, fewer than 500: take a smaller batch"),
        (Recipe(weight_decay=1e-4), {}, "times the run (half): weight decay hardly acts"),
        (Recipe(validity=VALIDITY), {}, "4,194,304 tokens per step are 2 times the largest, 2,097,152, of"),
    ],
)
def test_warnings_of_a_plan(recipe, target, words):
    plan = make_plan(recipe, replace(TRILLION, **target))
    warnings = [sentence(w) for w in plan.warnings if words in w]
    assert len(warnings) == 1
    assert f"  WARNING      {warnings[0]}" in plan_text(plan).splitlines()


def test_a_good_plan_has_no_warning():
    assert make_plan(PAPER, TRILLION).warnings == ()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"parameters": None}, ["the target needs a config or its number of parameters: pass one"]),
        ({"config": LlamaConfig(**SHAPE)}, ["the target needs a config or its number of parameters"]),
        ({"tokens": 0}, ["tokens must be positive, got 0"]),
        ({"tokens_per_step": -1}, ["tokens_per_step must be positive, got -1"]),
        ({"devices": 0}, ["devices must be positive, got 0"]),
        ({"utilisation": 40}, ["utilisation must be at most 1, got 40: pass 0.4"]),
        ({"flops_per_device": math.nan}, ["flops_per_device must be positive, got nan"]),
        ({"tokens": 10**9}, ["a warmup of 1,000,000,000 tokens does not fit", "shorten the warmup"]),
    ],
)
def test_plans_that_cannot_be(change, parts):
    machine = {name: change.pop(name) for name in ("devices", "utilisation", "flops_per_device") if name in change}
    with refused(UserError, *parts):
        make_plan(PAPER, replace(TRILLION, **change), Machine(**machine))


@pytest.mark.parametrize(
    ("days", "said"),
    [
        (2e-8, "under a second"),
        (1.5 / 86_400, "1.5 seconds"),
        (0.5, "12 hours"),
        (3.0, "3 days"),
        (99.6, "100 days"),
        (1234.5, "1,234 days"),
    ],
)
def test_a_time_has_a_unit_for_people(days, said):
    assert duration(days) == said


def test_the_loss_at_the_end_and_other_batches():
    """The forecast at the target; the days of a batch are those of the tokens that it needs."""
    octaves = (-1.0, -0.5, 0.0, 0.5, 1.0)
    cells = []
    for size, tokens, batch in itertools.product((10**8, 4 * 10**8), (10**9, 4 * 10**9), (2**16, 2**18, 2**20)):
        least = 1.8 + 60 * size**-0.25 + 300 * tokens**-0.3 + 20 * batch / tokens
        rates, losses = tuple(2.0 ** (x - 9) for x in octaves), tuple(least + 0.02 * x * x for x in octaves)
        cells.append(Cell("cosine", 0, batch, tokens, rates, losses, (1,) * 5, None, None, None, None, 0.02, used=True))
        cells[-1] = replace(cells[-1], parameters=size)
    forecast = fit_forecast(cells)
    target = Target(8 * 10**9, 2**18, parameters=8 * 10**8)
    plan = make_plan(Recipe(warmup_tokens=10**8, forecast=forecast), target)
    assert (plan.loss.loss, plan.loss.low, plan.loss.high) == forecast.at(target.total_tokens, 2**18, 8 * 10**8)
    assert plan.loss.twice_off == 0.02
    same = next(row for row in plan.loss.batches if row.tokens_per_step == 2**18)
    assert same.tokens == pytest.approx(target.total_tokens, rel=0.001)
    assert same.days == pytest.approx(plan.compute.days, rel=0.001)
    large = plan.loss.batches[-1]
    assert large.days / same.days == pytest.approx(large.tokens / same.tokens)
    assert large.steps == math.ceil(large.tokens / large.tokens_per_step)
    text = plan_text(plan)
    assert f"loss         {plan.loss.loss:.3f} ({plan.loss.low:.3f} to {plan.loss.high:.3f}) nats per token" in text
    assert "a rate twice or half the best one costs 0.020" in text

    one = make_plan(Recipe(warmup_tokens=10**8, forecast=fit_forecast(cells[:6])), target)
    assert one.loss is None
    assert (
        "there is no forecast of the loss at 800,000,000 parameters, for the sweep has 100,000,000" in one.warnings[-1]
    )
