import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from hf_power import power_lr
from hf_power.pretrain import run as train
from hf_power.schedule import Law
from hf_power.settings.settings import Settings
from hf_power.sweep.ensemble import Ensemble, Member
from hf_power.sweep.grid import SCHEDULES, Grid
from hf_power.sweep.jobs import branch_tokens, groups_of, rate_factors, row_settings
from hf_power.sweep.trunks import prepare

BATCH = 128  # 4 blocks of 32 tokens
HORIZON = 12 * BATCH
LAW = Law(2.0, -0.5, 1.0)
FAMILIES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "GQA": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3": {
        "model_type": "any",
        "model_config": {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    },
}


@pytest.fixture(scope="module")
def make_grid(sections):
    def build(model=None, **changes):
        made = sections("unused")
        is_any = (model or {}).get("model_type") == "any"
        made["model"] = model if is_any else made["model"] | {"hidden_size": 32} | (model or {})
        made["training"] = {"weight_decay": 0.1}
        made["run"] = {"max_eval_tokens": 640}
        grid = Grid(
            sections=made,
            widths=(32,),
            tokens_per_step=(BATCH,),
            tokens=(HORIZON,),
            schedules=dict.fromkeys(SCHEDULES, (0.01, 0.04)),
            warmup_tokens=2 * BATCH,
            decay_ratio=0.25,
            max_lr=0.03,
        )
        return replace(grid, **changes)

    return build


@pytest.fixture(scope="module")
def bench(make_grid, tmp_path_factory):
    """The data; the model does not matter."""
    return prepare(make_grid(), tmp_path_factory.mktemp("bench"))


class Run:
    """One row of a grid: its settings, and the table of its learning rates."""

    def __init__(self, grid, schedule="warmup_stable_decay", value=0.01, seed=0, tokens=HORIZON):
        group = groups_of(grid, schedule, LAW if schedule == "power" else None)[0]
        self.settings = row_settings(grid, group, value, seed, tokens)
        self.factors = rate_factors(grid, group, value, tokens)


def ensemble_of(bench, runs, batched):
    settings = [Settings.from_dict(run.settings) for run in runs]
    members = [Member(each.training.learning_rate, each.training.seed) for each in settings]
    return Ensemble(settings[0], members, bench.data, device=bench.device, batched=batched)


def tables(runs):
    return np.array([run.factors for run in runs])


def run(ensemble, factors, stop=None):
    """Losses of every step, shape (steps, members)."""
    losses = []
    for step in range(ensemble.position, stop or factors.shape[1]):
        ensemble.step(factors[:, step])
        losses.append(ensemble.last_losses[-1].tolist())
    return np.array(losses)


def weights(ensemble, index):
    return {name: p.detach().clone() for name, p in ensemble.models[index].named_parameters()}


def same_weights(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def pretrained(row, folder):
    """The Trainer's losses of every step and its run.json, from the row's settings as they are."""
    training = row["training"] | {"output_dir": str(folder), "logging_steps": 1, "save_strategy": "no"}
    record = train.pretrain(Settings.from_dict(row | {"training": training | {"disable_tqdm": True}})).to_json()
    return [point["loss"] for point in record["loss_curve"] if "loss" in point], record


@pytest.mark.parametrize(
    ("family", "schedule"),
    [
        ("tied", "warmup_stable_decay"),
        ("tied", "power"),
        ("mixtral", "warmup_stable_decay"),
        ("untied", "warmup_stable_decay"),
        ("GQA", "warmup_stable_decay"),
        ("qwen3", "warmup_stable_decay"),
    ],
)
@pytest.mark.slow
def test_every_step_is_that_of_pretraining(bench, make_grid, tmp_path, monkeypatch, family, schedule):
    """Two members that differ in rate and seed: the losses of every step, the weights and the held-out loss."""
    monkeypatch.setattr("hf_power.plots.figures.save", lambda figure, path: None)  # half of a small run's time
    grid = make_grid(FAMILIES[family])
    rows = [Run(grid, schedule, 0.01, 0), Run(grid, schedule, 0.04, 1)]
    ways = (False, True) if family != "mixtral" else (False,)
    single, *_ = ensembles = [ensemble_of(bench, rows, way) for way in ways]
    losses, *besides = (run(ensemble, tables(rows)) for ensemble in ensembles)
    for i, row in enumerate(rows):
        folder = tmp_path / f"run{i}"
        expected, record = pretrained(row.settings, folder)
        assert len(expected) == HORIZON // BATCH
        assert losses[:, i].tolist() == expected
        saved = AutoModelForCausalLM.from_pretrained(folder)
        assert same_weights(weights(single, i), dict(saved.named_parameters()))
        for beside in besides:
            assert beside[:, i] == pytest.approx(expected, abs=2e-5)
        for ensemble in ensembles:
            assert ensemble.held_out_losses()[i] == pytest.approx(record["held_out_loss"], abs=4e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_factors_are_closed_forms(make_grid, schedule):
    grid, steps, warmup, tail = make_grid(), HORIZON // BATCH, 2, 3  # decay_ratio 0.25 of 12 steps

    def expected(step):
        if step < warmup and schedule not in ("power", "inverse_sqrt"):
            return step / warmup
        left = min(1.0, (steps - step) / tail)
        past = (step - warmup) / (steps - warmup)
        if schedule == "warmup_stable_decay":
            return left
        if schedule == "cosine":
            return (1 + math.cos(math.pi * past)) / 2
        if schedule == "linear":
            return 1 - past
        tokens = min(max(step, warmup), steps - tail)  # the law stands still in the warmup and in the tail
        if schedule == "inverse_sqrt":
            law = math.sqrt(warmup / tokens)
        else:
            law = min(1.0, 0.5 * (BATCH / 4096) * (tokens * BATCH) ** -0.5 / 0.03)
        return law * left * min(1.0, step / warmup)

    row = Run(grid, schedule, 0.5 if schedule == "power" else 0.01)
    assert tables([row])[0] == pytest.approx([expected(step) for step in range(steps)], rel=1e-12)


def test_inverse_sqrt_is_that_of_transformers_before_its_tail(make_grid):
    row, value = Run(make_grid(), "inverse_sqrt", 0.01), 0.01
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=value)
    theirs = get_scheduler("inverse_sqrt", optimizer, num_warmup_steps=2)
    factors = []
    for _ in range(9):
        factors.append(optimizer.param_groups[0]["lr"] / value)
        optimizer.step()
        theirs.step()
    assert tables([row])[0][:9] == pytest.approx(factors, rel=1e-12)


def test_power_factors_are_those_of_the_pure_function(make_grid):
    row = Run(make_grid(), "power", 2.0)
    numbers = {**LAW.to_dict(), "warmup_tokens": 2 * BATCH, "decay_start_tokens": 9 * BATCH, "decay_tokens": 3 * BATCH}
    expected = [
        power_lr(step * BATCH, tokens_per_step=BATCH, max_lr=0.03, decay_shape="linear", **numbers) / 0.03
        for step in range(12)
    ]
    assert tables([row])[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 100, 3 * BATCH])
@pytest.mark.parametrize("shape", ["linear", "1-sqrt"])
def test_horizons_share_their_rates_up_to_the_branch(make_grid, schedule, warmup, shape):
    """The tables agree up to where a trunk is left, and differ after the one step that begins a decay at its peak."""
    horizons = [steps * BATCH for steps in (8, 13, 20, 40)]
    grid = make_grid(tokens=tuple(horizons), warmup_tokens=warmup, decay_shape=shape, decay_ratio=0.2)
    group = groups_of(grid, schedule, LAW if schedule == "power" else None)[0]
    rates = {t: tables([Run(grid, schedule, v, tokens=t) for v in (0.01, 0.04)]) for t in horizons}
    for short, long in itertools.combinations(horizons, 2):
        same = (rates[short] == rates[long][:, : short // BATCH]).all(axis=0)
        branch = branch_tokens(grid, group, short) // BATCH
        assert same[:branch].all()
        assert not same[branch + 1]


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
@pytest.mark.parametrize("branch", [0, 6])
def test_branch_is_a_run_from_scratch(bench, make_grid, branch, batched):
    """A trunk goes past the branch, comes back to it, and the branch and the trunk end bit for bit as alone."""
    grid = make_grid()
    short, long = ([Run(grid, value=v, tokens=t) for v in (0.01, 0.04)] for t in (8 * BATCH, HORIZON))
    whole = {}
    for name, rows in (("short", short), ("long", long)):
        alone = ensemble_of(bench, rows, batched)
        whole[name] = run(alone, tables(rows)), alone.held_out_losses(), [weights(alone, i) for i in (0, 1)]

    ensemble = ensemble_of(bench, long, batched)
    trunk = run(ensemble, tables(long), branch) if branch else np.empty((0, 2))
    state = ensemble.state()
    tail = run(ensemble, tables(short))
    assert np.array_equal(np.vstack([trunk, tail]), whole["short"][0])
    assert ensemble.held_out_losses() == whole["short"][1]
    assert all(same_weights(weights(ensemble, i), whole["short"][2][i]) for i in (0, 1))

    other = ensemble_of(bench, long, batched)  # as a new process would
    other.load_state(state)
    for goes_on in (ensemble, other):
        goes_on.load_state(state)
        assert np.array_equal(np.vstack([trunk, run(goes_on, tables(long))]), whole["long"][0])
        assert goes_on.held_out_losses() == whole["long"][1]
        assert all(same_weights(weights(goes_on, i), whole["long"][2][i]) for i in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True], ids=["one by one", "batched"])
def test_member_that_diverges_leaves_the_others_alone(bench, make_grid, batched):
    grid = make_grid({"num_hidden_layers": 1}, warmup_tokens=0)
    good = [Run(grid, value=v, seed=s, tokens=48 * BATCH) for v, s in ((0.01, 0), (0.02, 1))]
    bad = Run(grid, value=1e38, tokens=48 * BATCH)
    without = ensemble_of(bench, good, batched)
    losses = run(without, tables(good))
    ensemble = ensemble_of(bench, [good[0], bad, good[1]], batched)
    beside = run(ensemble, tables([good[0], bad, good[1]]))
    assert np.array_equal(beside[:, [0, 2]], losses)
    assert not np.isfinite(beside[-1, 1])
    assert ensemble.alive == [True, False, True]
    held_out = ensemble.held_out_losses()
    assert math.isnan(held_out[1])
    assert [held_out[0], held_out[2]] == without.held_out_losses()
    assert all(same_weights(weights(ensemble, 2 * i), weights(without, i)) for i in (0, 1))
    assert math.isnan(ensemble.train_losses()[1])


def test_state_remembers_who_has_diverged(bench, make_grid):
    ensemble = ensemble_of(bench, [Run(make_grid(), value=v) for v in (0.01, 0.02)], False)
    run(ensemble, tables([Run(make_grid())] * 2), 3)
    ensemble.alive = [True, False]
    state = ensemble.state()
    other = ensemble_of(bench, [Run(make_grid(), value=v) for v in (0.01, 0.02)], False)
    other.load_state(state)
    assert (other.alive, other.position) == ([True, False], 3)
    assert math.isnan(other.held_out_losses()[1])


def test_seeds_have_their_own_data_and_weights(bench, make_grid):
    """The data of a seed are the permutation of numpy's generator; one seed is one model whatever the rate."""
    rows = [Run(make_grid(), value=v, seed=s) for v, s in ((0.01, 0), (0.02, 0), (0.01, 7))]
    ensemble = ensemble_of(bench, rows, True)
    assert same_weights(weights(ensemble, 0), weights(ensemble, 1))
    assert not torch.equal(
        weights(ensemble, 0)["model.embed_tokens.weight"], weights(ensemble, 2)["model.embed_tokens.weight"]
    )
    batch = ensemble._blocks.at(0)
    for i, seed in ((0, 0), (1, 0), (2, 7)):
        order = np.random.default_rng([seed, 0]).permutation(len(bench.data.blocks))[:4]
        assert batch[i].tolist() == [bench.data.blocks[int(k)]["input_ids"].tolist() for k in order]
    assert not torch.equal(batch[0], batch[2])


def test_train_loss_is_the_mean_of_the_last_steps(bench, make_grid):
    rows = [Run(make_grid(), value=v, tokens=24 * BATCH) for v in (0.01, 0.02)]
    ensemble = ensemble_of(bench, rows, True)
    losses = run(ensemble, tables(rows))
    assert ensemble.train_losses() == pytest.approx(losses[-20:].mean(axis=0), rel=1e-6)


def test_faster_way_is_chosen_by_the_batch(bench, make_grid, monkeypatch):
    rows = [Run(make_grid(), value=v) for v in (0.01, 0.02)]
    assert ensemble_of(bench, rows, None).batched
    assert not ensemble_of(bench, rows[:1], True).batched  # one member has nothing to share a call with
    monkeypatch.setattr("hf_power.sweep.ensemble.BATCHED_CPU_TOKENS", BATCH - 1)
    assert not ensemble_of(bench, rows, None).batched


def test_experts_cannot_be_batched(bench, make_grid):
    rows = [Run(make_grid(FAMILIES["mixtral"]), value=v) for v in (0.01, 0.02)]
    assert not ensemble_of(bench, rows, None).batched
    with pytest.raises(ValueError, match="GraniteMoeForCausalLM cannot be stacked .* leave batched"):
        ensemble_of(bench, rows, True)


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, 2, 3])
def test_stacks_of_some_members_at_once(bench, make_grid, monkeypatch, together):
    """On an accelerator only as many members are computed at once as its memory holds."""
    rows = [Run(make_grid(), value=v, seed=s) for v, s in ((0.01, 0), (0.02, 1), (0.04, 0))]
    alone = ensemble_of(bench, rows, False)
    losses = run(alone, tables(rows))
    monkeypatch.setattr("hf_power.sweep.ensemble.members_together", lambda *args: together)
    ensemble = ensemble_of(bench, rows, True)
    assert ensemble.batched == (together > 1)
    assert run(ensemble, tables(rows)) == pytest.approx(losses, abs=1e-5)
    assert ensemble.held_out_losses() == pytest.approx(alone.held_out_losses(), abs=1e-5)
