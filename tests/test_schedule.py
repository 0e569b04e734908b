"""The Power schedule against the paper's numbers (arXiv:2408.13359), a slow twin of eq. 7 and 8, and real loops."""

import doctest
import itertools
import json
import math
import random
import warnings
from dataclasses import replace
from decimal import Decimal

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState, PartialState
from sentences import refused

import hf_power.schedule.law
import hf_power.schedule.shape
from hf_power.records.errors import UserError
from hf_power.schedule import DECAY_SHAPES, LAW_NAMES, PAPER_LAW, PAPER_OPTIMA, Law, Schedule, power_lr
from hf_power.schedule.lengths import Progress, plan_schedule
from hf_power.scheduler import get_power_schedule

CAP_WARNING = pytest.mark.filterwarnings("ignore:the cap learning_rate")
TOKENS = 4096 * 128  # beta = 128
A = 0.2  # with beta = 128 and a cap of 0.02 the law takes over after 3 steps, so short runs see cap and law


def reference_eta(n, *, tokens_per_step, max_lr, a=4.0, b=-0.51, c=1.0):
    """eq. 7, by logarithms."""
    if n == 0:
        return max_lr
    beta = tokens_per_step / 4096
    return min(max_lr, math.exp(math.log(a) + c * math.log(beta) + b * math.log(n)))


def reference_lr(n, *, warmup=0, warmup_to="law", start=None, length=0, shape="exponential", floor=0.0, **law):
    """eq. 8, one phase after the other; start is None without a tail."""
    if n < warmup:  # first line
        return n * (law["max_lr"] if warmup_to == "max" else reference_eta(warmup, **law)) / warmup
    if start is None or n < start:  # second line
        return reference_eta(n, **law)
    top, left = reference_eta(start, **law), max(0.0, 1 - (n - start) / length)  # third line
    shapes = {
        "exponential": math.expm1(left) / math.expm1(1),
        "linear": left,
        "1-sqrt": 1 - math.sqrt(1 - left),
        "cosine": math.sin(math.pi * left / 2) ** 2,
    }
    return top * floor + top * (1 - floor) * shapes[shape]


def sgd(lr=0.02, group_lrs=(None,)):
    """One tiny parameter per group; no gradient, so a step costs nothing."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} | ({} if x is None else {"lr": x}) for x in group_lrs]
    return torch.optim.SGD(groups, lr=lr)


def schedule(*args, lr=0.02, tokens_per_step=TOKENS, a=A, **kwargs):
    return get_power_schedule(sgd(lr), *args, tokens_per_step=tokens_per_step, a=a, **kwargs)


def lrs_used(scheduler, num_steps, group=0):
    """The learning rate of each of the next steps."""
    used = []
    for _ in range(num_steps):
        used.append(scheduler.optimizer.param_groups[group]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return used


def close(got, expected, peak=0.02):
    """1e-12 relative; near the end of a tail, relative to its peak."""
    assert len(got) == len(expected)
    for step, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-14 * peak), f"step {step}: {x!r}, expected {y!r}"


def to_printed_digits(value, printed):
    return abs(value - float(printed)) <= 0.5001 * 10.0 ** Decimal(printed).as_tuple().exponent


TABLE = {  # beta: eta at 1e9 .. 1e13 tokens; a = 4, b = -0.51, cap 0.02
    16: ("0.00165", "5.1e-4", "1.6e-4", "4.9e-5", "1.5e-5"),
    32: ("0.00329", "0.00102", "3.1e-4", "9.7e-5", "3.0e-5"),
    128: ("0.0132", "0.00407", "0.00126", "3.9e-4", "1.2e-4"),
    512: ("0.02", "0.0163", "0.00503", "0.00155", "4.8e-4"),
    1024: ("0.02", "0.02", "0.01005", "0.00311", "9.6e-4"),
}


@pytest.mark.parametrize(
    ("beta", "n", "printed"), [(beta, 10**k, x) for beta, row in TABLE.items() for k, x in enumerate(row, 9)]
)
def test_table_of_learning_rates(beta, n, printed):
    assert to_printed_digits(power_lr(n, tokens_per_step=4096 * beta), printed)
    assert to_printed_digits(schedule(tokens_per_step=4096 * beta, a=4.0).schedule.lr(n), printed)


@pytest.mark.parametrize(
    ("beta", "printed"), [(1024, "2.6e10"), (512, "6.7e9"), (128, "4.4e8"), (32, "2.9e7"), (16, "7.5e6")]
)
def test_cap_stops_binding_at_n_star(beta, printed):
    n_star = (4 * beta / 0.02) ** (1 / 0.51)
    assert to_printed_digits(n_star, printed)
    assert power_lr(n_star * 0.999, tokens_per_step=4096 * beta) == 0.02
    assert power_lr(n_star * 1.001, tokens_per_step=4096 * beta) < 0.02


def test_example_of_the_paper_and_sequence_free_form():
    lr = PAPER_OPTIMA.lr(10e12, tokens_per_step=4_194_304)
    assert to_printed_digits(lr, "0.0011")
    assert math.isclose(lr, 4.6 / 4096 * 4_194_304 * 10e12**-0.51, rel_tol=1e-14)


@pytest.mark.parametrize("times", [0.25, 1, 4, 64])
def test_a_batch_above_the_critical_one_has_its_rate(times):
    """0.013 * 32**0.7 * n**-0.3 at a critical batch of 32 x 4096 tokens, for every larger batch; below it nothing changes."""
    law = {"a": 0.013, "b": -0.3, "batch_exponent": 0.7}
    per_step = int(4096 * 32 * times)
    capped = law | {"critical_batch_tokens": 4096.0 * 32}
    scheduler = schedule(0, 10_000, tokens_per_step=per_step, **capped)
    assert scheduler.schedule.to_dict()["critical_batch_tokens"] == 4096 * 32
    for n in (10**6, 10**8, 2 * 10**8):
        expected = 0.013 * min(32, 32 * times) ** 0.7 * n**-0.3
        assert math.isclose(Law(**capped).lr(n, per_step), expected, rel_tol=1e-12)
        assert math.isclose(scheduler.schedule.lr(n), expected, rel_tol=1e-12)
        assert power_lr(n, tokens_per_step=per_step, **capped) == scheduler.schedule.lr(n)
    alone = Law(**law).lr(1e8, per_step)
    assert (Law(**capped).lr(1e8, per_step) == alone) == (times <= 1)


@pytest.mark.parametrize(
    ("x", "printed"), [(0, "1.000"), (0.25, "0.650"), (0.5, "0.378"), (0.75, "0.165"), (1, "0.000")]
)
def test_exponential_decay_of_ibm(x, printed):
    assert to_printed_digits(DECAY_SHAPES["exponential"](x), printed)


@pytest.mark.parametrize("shape", sorted(DECAY_SHAPES))
def test_decay_shapes_fall_from_one_to_zero(shape):
    values = [DECAY_SHAPES[shape](k / 100) for k in range(101)]
    assert values[0] == 1
    assert abs(values[-1]) < 1e-15
    assert all(x > y for x, y in itertools.pairwise(values))


def test_docstrings_examples():
    found = [doctest.testmod(module) for module in (hf_power.schedule.law, hf_power.schedule.shape)]
    assert sum(each.attempted for each in found) >= 4
    assert not any(each.failed for each in found)


def random_setting(rng):
    """Arguments of get_power_schedule, and the same setting in tokens for the twin."""
    tokens, num_steps = rng.choice((1, 512, 65_537, 4096 * 16, rng.randint(2, 10**7))), rng.randint(1, 40)
    law = {"max_lr": 10 ** rng.uniform(-5, 0), "a": rng.uniform(0.1, 9), "b": -rng.uniform(0.1, 1)}
    law |= {"c": rng.choice((1.0, 0.5, rng.uniform(0, 1.5)))}
    tail = rng.choice(("default", "ratio", "tokens", "from", "from_for", "none"))
    seen = 0 if tail in ("default", "ratio") else rng.choice((0, rng.randint(1, 10**9)))
    total = seen + tokens * num_steps
    given, start, length = {}, None, 0
    if tail == "default":
        length = round(total * 0.1)
    elif tail == "ratio":
        given["decay_ratio"] = rng.uniform(0, 1)
        length = round(total * given["decay_ratio"])
    elif tail == "tokens":
        given["decay_tokens"] = length = rng.randint(0, total)
    elif tail == "from":
        given["decay_start_tokens"] = start = rng.randint(0, total - 1)
        length = total - start
    elif tail == "from_for":
        given["decay_start_tokens"] = start = rng.randint(0, total - 1)
        given["decay_tokens"] = length = rng.randint(1, total - start)
    else:
        given["decay_ratio"] = 0
    if length == 0:
        start = None
    elif start is None:
        start = total - length
    room = total if start is None else start
    warmup_kind, warmup_steps, warmup = rng.choice(("none", "steps", "tokens")), 0, 0
    if warmup_kind == "steps":
        warmup_steps = rng.randint(0, room // tokens if room // tokens < num_steps else num_steps)
        warmup = warmup_steps * tokens
    elif warmup_kind == "tokens":
        given["warmup_tokens"] = warmup = rng.randint(0, room)
    style = {"warmup_to": rng.choice(("law", "max"))}
    shape, floor = rng.choice(sorted(DECAY_SHAPES)), rng.choice((0.0, 0.1, rng.random(), 1.0))
    given |= style | {"decay_shape": shape, "min_lr_ratio": floor, "tokens_seen": seen, "tokens_per_step": tokens}
    given |= {"a": law["a"], "b": law["b"], "batch_exponent": law["c"]}
    twin = law | style | {"shape": shape, "floor": floor, "start": start, "length": length, "warmup": warmup}
    return law["max_lr"], warmup_steps, num_steps, given, seen, twin | {"tokens_per_step": tokens}


@pytest.mark.slow
@CAP_WARNING
def test_equals_the_slow_twin_on_random_settings():
    rng = random.Random(2408)
    for _ in range(1000):
        max_lr, warmup_steps, num_steps, given, n, twin = random_setting(rng)
        scheduler = get_power_schedule(sgd(max_lr), warmup_steps, num_steps, **given)
        expected = []
        for _ in range(num_steps + 3):  # three steps past the end
            expected.append(reference_lr(n, **twin))
            n += twin["tokens_per_step"]
        try:
            close(lrs_used(scheduler, num_steps + 3), expected, peak=max_lr)
        except AssertionError as error:
            raise AssertionError(f"{error} under lr={max_lr}, {warmup_steps=}, {num_steps=}, {given}") from error


def test_a_law_is_its_four_numbers():
    law = Law(0.013, -0.3, 0.7, 131_072.0)
    assert tuple(law.to_dict()) == LAW_NAMES[:-1]
    assert tuple(replace(law, critical_batch_growth=0.5).to_dict()) == LAW_NAMES
    assert Law.from_dict(law.to_dict() | {"r2": 0.9}) == law
    assert Law.from_dict({"a": 4.0, "b": -0.51, "batch_exponent": 1.0}) == PAPER_LAW  # as older records have it
    Law(1.0, 0.2)  # a fit may find it, and no schedule can follow it
    with pytest.raises(UserError, match="b, the exponent"):
        Schedule(law=Law(1.0, 0.2), tokens_per_step=1)


def test_a_planned_schedule_is_that_of_the_scheduler_at_the_beginning_and_after_a_resume():
    given = {"tokens_per_step": TOKENS, "a": A, "decay_ratio": 0.25, "decay_shape": "cosine", "warmup_to": "max"}
    scheduler = get_power_schedule(sgd(), 5, 100, **given)
    planned = {"max_lr": 0.02, "num_warmup_steps": 5, "num_training_steps": 100, **given}
    assert plan_schedule(**planned) == scheduler.schedule
    for n in (0, 3 * TOKENS, 50 * TOKENS, 90 * TOKENS):
        assert scheduler.schedule.lr(n) == power_lr(n, **scheduler.schedule.to_dict())
    scheduler.load_state_dict({"tokens_seen": 10**9, "last_epoch": 40})
    assert plan_schedule(Progress(10**9, 40), **planned) == scheduler.schedule != plan_schedule(**planned)


def test_where_the_cap_ends():
    """beta 128 leaves the cap at (4 * 128 / .02)**(1 / .51) tokens."""
    n_star = int((4 * 128 / 0.02) ** (1 / 0.51))
    trunk = Schedule(tokens_per_step=TOKENS)
    assert (trunk.cap_ends, trunk.end_of_law) == (pytest.approx(n_star, rel=1e-9), math.inf)
    assert Schedule(tokens_per_step=TOKENS, total_tokens=n_star - 1).cap_ends is None
    assert Schedule(tokens_per_step=TOKENS, warmup_tokens=n_star + 1).cap_ends is None
    tail = Schedule(tokens_per_step=TOKENS, decay_start_tokens=10**8, total_tokens=10**9)
    assert (tail.cap_ends, tail.end_of_law) == (None, 10**8)


def test_value_at_no_tokens():
    assert lrs_used(schedule(0, 1000), 1) == [0.02]  # the law is infinite there: the cap
    assert lrs_used(schedule(10, 1000), 1) == [0.0]
    assert lrs_used(schedule(warmup_tokens=1), 1) == [0.0]
    assert PAPER_LAW.lr(0, tokens_per_step=1) == math.inf


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", sorted(DECAY_SHAPES))
def test_value_past_the_end_stays_at_the_floor(shape, floor):
    scheduler = schedule(0, 5000, decay_shape=shape, min_lr_ratio=floor)
    top = A * 128 * (4500 * TOKENS) ** -0.51
    for steps in (5000, 5001, 10_000, 10**9):
        assert math.isclose(scheduler.schedule.lr(steps * TOKENS), floor * top, rel_tol=1e-12)


def test_power_lr_with_an_empty_tail_drops_to_the_floor():
    tail = {"tokens_per_step": TOKENS, "decay_start_tokens": 10**10, "decay_tokens": 0, "min_lr_ratio": 0.25}
    before = power_lr(10**10 - 1, **tail)
    assert math.isclose(power_lr(10**10, **tail), before / 4, rel_tol=1e-9)


def test_trunk_without_an_end_never_decays():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and does not warn: nobody knows where it will stop
        scheduler = schedule(3)
    assert scheduler.total_tokens is None
    law = {"tokens_per_step": TOKENS, "max_lr": 0.02, "a": A}
    close(lrs_used(scheduler, 300), [reference_lr(k * TOKENS, warmup=3 * TOKENS, **law) for k in range(300)])
    assert math.isclose(scheduler.schedule.lr(1e13), A * 128 * 1e13**-0.51, rel_tol=1e-12)


def test_tokens_of_a_trillion_token_run_are_exact():
    scheduler = schedule(0, 10**7, tokens_per_step=4_194_303, tokens_seen=10**13 + 1)
    lrs_used(scheduler, 7)
    assert scheduler.tokens_seen == 10**13 + 1 + 7 * 4_194_303
    assert scheduler.total_tokens == 10**13 + 1 + 10**7 * 4_194_303


def test_ratios_of_groups_are_kept():
    base = (0.02, 0.02 / 4, 0.02 * 8, 0.02 / 3)
    optimizer = sgd(0.02, base)
    scheduler = get_power_schedule(optimizer, 2, 200, tokens_per_step=TOKENS, a=A)
    for step in range(201):
        first, quarter, eightfold, third = (group["lr"] for group in optimizer.param_groups)
        assert (quarter * 4, eightfold / 8) == (first, first)  # exact: powers of two
        assert math.isclose(third * 3, first, rel_tol=4e-16), step
        optimizer.step(), scheduler.step()
    assert first == 0.0


def test_cap_is_the_optimizers_lr_not_that_of_a_group():
    scheduler = get_power_schedule(sgd(0.02, (0.002, 0.5)), 0, 10**5, tokens_per_step=TOKENS)
    expected = 4 * 128 * (20_000 * TOKENS) ** -0.51 / 0.02
    scheduler.load_state_dict({"tokens_seen": 20_000 * TOKENS, "last_epoch": 20_000})
    close([g["lr"] for g in scheduler.optimizer.param_groups], [0.002 * expected, 0.5 * expected])


@pytest.mark.parametrize("kind", [{"foreach": False}, {"fused": True}])
def test_learning_rate_as_tensor(kind):
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    lrs = torch.tensor(0.02), torch.tensor(0.005)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, lrs, strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=0.02, **kind)
    scheduler = get_power_schedule(optimizer, 2, 50, tokens_per_step=TOKENS, a=A)
    twin = {"tokens_per_step": TOKENS, "max_lr": 0.02, "a": A, "warmup": 2 * TOKENS}
    twin |= {"start": 45 * TOKENS, "length": 5 * TOKENS}
    for step in range(50):
        lr = reference_lr(step * TOKENS, **twin)
        assert optimizer.param_groups[0]["lr"] is lrs[0]  # a compiled or captured step reads this very tensor
        assert math.isclose(float(lrs[0]), lr, rel_tol=1e-6)
        assert math.isclose(float(lrs[1]), lr / 4, rel_tol=1e-6)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step(), scheduler.step()
    scheduler.load_state_dict({"tokens_seen": 20 * TOKENS, "last_epoch": 20})
    assert optimizer.param_groups[0]["lr"] is lrs[0]
    assert math.isclose(float(lrs[0]), reference_lr(20 * TOKENS, **twin), rel_tol=1e-6)
    assert optimizer.param_groups[0]["initial_lr"] == torch.tensor(0.02)


def test_last_lr_is_not_an_alias_of_a_tensor_lr():
    """PyTorch promises copies (LRScheduler.get_last_lr), after a resume as well."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=torch.tensor(0.02))
    scheduler = get_power_schedule(optimizer, 0, 100, tokens_per_step=TOKENS)
    scheduler.load_state_dict({"tokens_seen": TOKENS, "last_epoch": 1})
    assert scheduler.get_last_lr()[0] is not optimizer.param_groups[0]["lr"]


ABOVE = "the optimizer's lr is {} and a group's is {}"


@pytest.mark.parametrize(
    ("rates", "lr", "cap", "warns"),
    [
        ([0.01, 0.02], {}, 0.02, True),  # AdamW's own 1e-3 is nobody's choice
        ([0.0002, 0.0001], {}, 0.0002, True),
        ([0.01, 0.02], {"lr": 0.02}, 0.02, False),
        ([0.01, 0.04], {"lr": 0.02}, 0.02, True),  # meant or not, it is said
        ([0.001, 0.02], {}, 0.001, True),  # a group has the default
        ([0.001, 0.0005], {}, 0.001, False),
    ],
)
def test_the_cap_of_groups_with_rates_of_their_own(rates, lr, cap, warns, recwarn):
    """Layer-wise rates: each group is its ratio to the cap times the law, whose cap is never one that nobody chose."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.AdamW(groups, **lr)
    scheduler = get_power_schedule(optimizer, 0, 10**6, tokens_per_step=TOKENS, a=0.4, decay_ratio=0)
    assert scheduler.max_lr == cap
    said = [str(x.message) for x in recwarn if str(x.message).startswith("the optimizer's lr")]
    assert [x.startswith(ABOVE.format(f"{lr.get('lr', 0.001):g}", f"{max(rates):g}")) for x in said] == [True] * warns
    for n in (0, 10**4, 10**6):
        eta = cap if n == 0 else min(cap, 0.4 * TOKENS / 4096 * (n * TOKENS) ** -0.51)
        scheduler.load_state_dict({"tokens_seen": n * TOKENS, "last_epoch": n})
        assert scheduler.get_last_lr() == pytest.approx([rate * eta / cap for rate in rates], rel=1e-12)


def test_named_groups_above_the_cap_are_meant(recwarn):
    """As muP's are in a model narrower than the base width."""
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, "name": name}
        for name, lr in [("x", 0.02), ("y", 0.04)]
    ]
    scheduler = get_power_schedule(torch.optim.AdamW(groups, lr=0.02), 0, 10**6, tokens_per_step=TOKENS)
    assert (scheduler.max_lr, scheduler.get_last_lr(), len(recwarn)) == (0.02, [0.02, 0.04], 0)


def test_mup_s_groups_in_an_optimizer_without_lr():
    """The rate of the first group is the base rate, and not AdamW's 0.001, which nobody chose."""
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr, "name": name}
        for name, lr in [("x", 0.02), ("y", 0.04)]
    ]
    with pytest.warns(UserWarning, match="the optimizer's lr is 0.001 and a group's is 0.02"):
        scheduler = get_power_schedule(torch.optim.AdamW(groups), 0, 10**6, tokens_per_step=TOKENS)
    assert (scheduler.max_lr, scheduler.get_last_lr()) == (0.02, [0.02, 0.04])


def test_an_argument_that_is_none_is_named():
    with refused(UserError, "no argument 'decay_ration': did you mean decay_ratio?"):
        get_power_schedule(sgd(0.02), 0, 100, tokens_per_step=TOKENS, decay_ration=0.1)


@pytest.fixture
def processes(monkeypatch):
    """Accelerate as one of num_processes processes, without the others; undone afterwards."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    Accelerator(cpu=True)

    def pretend(num_processes):
        monkeypatch.setitem(PartialState._shared_state, "num_processes", num_processes)
        assert AcceleratorState().num_processes == num_processes

    yield pretend
    monkeypatch.undo()  # a reset must be the last word: half a state counts as a whole one
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def prepared(scheduler, **kwargs):
    """What accelerator.prepare makes of a scheduler."""
    optimizer = AcceleratedOptimizer(scheduler.optimizer, device_placement=False)
    return AcceleratedScheduler(scheduler, optimizer, **kwargs)


SPLITS = [
    (b, k, p)
    for b, k, p in itertools.product((1, 2, 3, 4, 6, 8, 12, 24, 48), (1, 2, 4, 8, 48), (1, 2, 3, 4, 8))
    if b * k * p == 48
]


@pytest.mark.parametrize(("per_device", "accumulation", "num_processes"), SPLITS)
def test_same_tokens_same_rate_for_every_split_of_the_batch(per_device, accumulation, num_processes, processes):
    """The loop counts its own tokens, micro-batch by micro-batch and process by process."""
    processes(num_processes)
    length, num_steps, seen = 8192, 60, 0
    tokens_per_step = per_device * accumulation * num_processes * length
    scheduler = schedule(5 * num_processes, num_steps * num_processes, tokens_per_step=tokens_per_step)
    wrapper = prepared(scheduler)
    law = {"tokens_per_step": 48 * length, "max_lr": 0.02, "a": A, "warmup": 5 * 48 * length}
    tail = {"start": 54 * 48 * length, "length": 6 * 48 * length}
    used, expected = [], []
    for micro_step in range(num_steps * accumulation):
        seen += per_device * length * num_processes
        wrapper.gradient_state._set_sync_gradients((micro_step + 1) % accumulation == 0)
        if wrapper.gradient_state.sync_gradients:
            used.append(scheduler.optimizer.param_groups[0]["lr"])
            expected.append(reference_lr(seen - 48 * length, **law, **tail))
            scheduler.optimizer.step()
        wrapper.step()
    close(used, expected)
    assert scheduler.tokens_seen == seen == scheduler.total_tokens
    assert len(set(used)) > 50  # warmup, law and tail, hardly any cap


def test_state_is_the_counters_only():
    scheduler = schedule(3, 100, decay_ratio=0.2)
    lrs_used(scheduler, 7)
    assert scheduler.state_dict() == {"tokens_seen": 7 * TOKENS, "last_epoch": 7}
    assert json.loads(json.dumps(scheduler.state_dict())) == scheduler.state_dict()


TODAY = {  # another argument today: what get_power_schedule gets, what the twin gets
    "same": ({}, {}),
    "a": ({"a": 0.31}, {"a": 0.31}),
    "b": ({"b": -0.55}, {"b": -0.55}),
    "batch_exponent": ({"batch_exponent": 0.5}, {"c": 0.5}),
    "shape": ({"decay_shape": "1-sqrt"}, {"shape": "1-sqrt"}),
    "floor": ({"min_lr_ratio": 0.2}, {"floor": 0.2}),
}


@pytest.mark.slow
@CAP_WARNING
@pytest.mark.parametrize("today", TODAY)
@pytest.mark.parametrize("lr", [0.02, 0.005])
@pytest.mark.parametrize("times", [1, 0.5, 2])
@pytest.mark.parametrize("stop", [3, 40, 95])  # in the warmup, on the law, in the tail
def test_resume_with_another_batch_and_other_arguments(stop, times, lr, today):
    old = get_power_schedule(sgd(0.02, (0.02, 0.01)), 8, 100, tokens_per_step=TOKENS, tokens_seen=10**6, a=A)
    lrs_used(old, stop)
    saved = [json.loads(json.dumps(x)) for x in (old.optimizer.state_dict(), old.state_dict())]

    given, twin = TODAY[today]
    tokens = int(TOKENS * times)
    num_steps = stop + int((100 - stop) / times)  # the same tokens in all, in steps of today
    new = get_power_schedule(sgd(lr, (lr, lr / 2)), 8, num_steps, tokens_per_step=tokens, **{"a": A} | given)
    new.optimizer.load_state_dict(saved[0])  # brings back the old lr and initial_lr
    new.load_state_dict(saved[1])

    first = 10**6 + stop * TOKENS
    total = first + (num_steps - stop) * tokens
    length = round(total * 0.1)
    twin = {"max_lr": lr, "tokens_per_step": tokens, "a": A, "warmup": 8 * tokens} | twin
    twin |= {"start": total - length, "length": length}
    expected = [reference_lr(first + k * tokens, **twin) for k in range(num_steps - stop + 2)]
    assert [g["initial_lr"] for g in new.optimizer.param_groups] == [lr, lr / 2]
    assert new.get_last_lr() == [g["lr"] for g in new.optimizer.param_groups]
    assert new.optimizer.param_groups[1]["lr"] == new.optimizer.param_groups[0]["lr"] / 2
    close(lrs_used(new, num_steps - stop + 2), expected)
    assert new.tokens_seen == total + 2 * tokens
    assert new.total_tokens == total
    assert expected[-1] == expected[-2] < expected[-3]  # the tail ends with the last step, not before


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 1, 7, 8, 50, 89, 90, 91, 99, 100])
@pytest.mark.parametrize("kwargs", [{}, {"decay_tokens": 20 * TOKENS, "decay_shape": "cosine"}, {"tokens_seen": 7**11}])
def test_stop_and_resume_equals_uninterrupted(stop, kwargs):
    whole = lrs_used(schedule(8, 100, **kwargs), 103)
    old, new = schedule(8, 100, **kwargs), schedule(8, 100, **kwargs)
    before = lrs_used(old, stop)
    new.load_state_dict(old.state_dict())
    assert before + lrs_used(new, 103 - stop) == whole  # bit for bit


def test_resume_twice_and_anneal_from_every_checkpoint_while_the_trunk_goes_on():
    trunk = schedule(2, tokens_per_step=TOKENS)
    for _ in range(2):
        lrs_used(trunk, 100)
        stop, state = trunk.last_epoch, trunk.state_dict()
        anneal = schedule(2, stop + 50, decay_start_tokens=trunk.tokens_seen, decay_shape="linear")
        anneal.load_state_dict(state)
        top = A * 128 * (stop * TOKENS) ** -0.51
        close(lrs_used(anneal, 51), [top * (1 - k / 50) for k in range(51)])
    assert trunk.tokens_seen == 200 * TOKENS


@CAP_WARNING
def test_tail_as_a_ratio_of_a_run_that_begins_from_other_weights():
    """tokens_seen are those 'before this run', and decay_ratio is 'a ratio of the run': it may not begin before it."""
    seen = 10**11
    scheduler = schedule(0, 1000, tokens_seen=seen, decay_ratio=1.0, decay_shape="linear")
    top = A * 128 * seen**-0.51
    assert math.isclose(lrs_used(scheduler, 1)[0], top, rel_tol=1e-9)


@pytest.mark.parametrize(
    "state",
    [
        lambda: torch.optim.lr_scheduler.LambdaLR(sgd(), lambda step: 1.0).state_dict(),
        lambda: torch.optim.lr_scheduler.CosineAnnealingLR(sgd(), 10).state_dict(),
        lambda: {"last_epoch": 3},
        lambda: {},
    ],
)
def test_foreign_state_is_refused(state):
    scheduler = schedule(2, 100)
    with refused(ValueError, "not that of a power schedule", f"got {sorted(state())}", "resume with the scheduler"):
        scheduler.load_state_dict(state())
    assert lrs_used(scheduler, 2) == lrs_used(schedule(2, 100), 2)  # nothing was changed


def test_tail_of_an_open_run_needs_a_start_and_a_length():
    scheduler = schedule(decay_start_tokens=10**10, decay_tokens=10**9)
    top = A * 128 * 1e10**-0.51
    assert math.isclose(scheduler.schedule.lr(10**10 + 5 * 10**8), top * math.expm1(0.5) / math.expm1(1), rel_tol=1e-12)
    assert scheduler.schedule.lr(2 * 10**10) == 0.0


ERRORS = (  # arguments; what, got, what to do
    ({"tokens_per_step": None}, "needs tokens_per_step", "found no Trainer", "pass tokens_per_step = sequences"),
    ({"tokens_per_step": 0}, "tokens_per_step must be a positive whole number", "got 0", "pass the tokens of one"),
    ({"tokens_per_step": -4}, "tokens_per_step must be a positive", "got -4", "pass"),
    ({"tokens_per_step": 2.5}, "tokens_per_step must be a positive whole number", "got 2.5", "pass"),
    ({"tokens_per_step": "4096"}, "tokens_per_step must be a finite number", "got '4096'", "without quotes"),
    ({"tokens_per_step": True}, "tokens_per_step must be a finite number", "got True", "write it"),
    ({"a": 0}, "a, the scale of the power law, must be positive", "got 0", "the paper has 4.0"),
    ({"a": -4}, "a, the scale", "got -4", "4.0"),
    ({"a": "4"}, "a must be a finite number", "got '4'", "without quotes"),
    ({"a": math.nan}, "a must be a finite number", "got nan", "e.g. 4.0"),
    ({"b": 0.51}, "b, the exponent of the power law, must be negative", "got 0.51", "the paper has -0.51"),
    ({"b": 0}, "b, the exponent", "got 0", "-0.51"),
    ({"b": -math.inf}, "b must be a finite number", "got -inf", "e.g."),
    ({"batch_exponent": "1"}, "batch_exponent must be a finite number", "got '1'", "write it"),
    ({"critical_batch_tokens": 0}, "critical_batch_tokens must be positive", "got 0", "None for none"),
    ({"critical_batch_tokens": -4096.0}, "critical_batch_tokens must be positive", "got -4096.0", "tokens per step"),
    ({"critical_batch_tokens": "4M"}, "critical_batch_tokens must be a finite number", "got '4M'", "without quotes"),
    ({"min_lr_ratio": 1.5}, "min_lr_ratio must lie between 0 and 1", "got 1.5", "pass 0"),
    ({"min_lr_ratio": -0.1}, "min_lr_ratio must lie between 0 and 1", "got -0.1", "pass 0"),
    ({"warmup_to": "cap"}, "warmup_to must be one of law, max", "got 'cap'"),
    ({"decay_shape": "sqrt"}, "decay_shape must be one of exponential, linear, 1-sqrt, cosine", "got 'sqrt'"),
    ({"decay_ratio": 10}, "decay_ratio must lie between 0 and 1", "got 10", "pass 0.1"),
    ({"decay_ratio": -0.1}, "decay_ratio must lie between 0 and 1", "got -0.1", "pass 0.1"),
    ({"decay_ratio": 0.1, "decay_tokens": 9}, "the decay is given twice", "decay_ratio=0.1 and decay_tokens=9", "one"),
    ({"decay_ratio": 0.1, "decay_start_tokens": 9}, "given twice", "decay_start_tokens=9", "pass one of them"),
    ({"decay_tokens": 100_001}, "a decay of 100,001 tokens", "of 100,000 tokens", "shorten the decay or train longer"),
    ({"decay_tokens": -5}, "decay_tokens must not be negative, got -5", "pass 0 for none"),
    ({"decay_start_tokens": 100_001}, "from token 100,001", "of 100,000 tokens", "shorten"),
    ({"decay_start_tokens": 90_000, "decay_tokens": 10_001}, "a decay of 10,001 tokens from token 90,000", "shorten"),
    ({"num_warmup_steps": 91}, "a warmup of 91,000 tokens", "before token 90,000, where the decay starts", "shorten"),
    ({"warmup_tokens": 90_001}, "a warmup of 90,001 tokens", "where the decay starts", "or train longer"),
    ({"decay_ratio": 0, "warmup_tokens": 100_001}, "before token 100,000", "where the run ends", "or train longer"),
    ({"num_warmup_steps": 2, "warmup_tokens": 9}, "warmup is given twice", "num_warmup_steps=2", "pass one of them"),
    ({"num_training_steps": None, "decay_ratio": 0.1}, "a decay that ends with the run", "pass num_training_steps"),
    ({"num_training_steps": None, "decay_tokens": 9}, "a decay that ends with the run", "pass num_training_steps"),
    ({"num_training_steps": None, "decay_start_tokens": 9}, "needs its length", "pass num_training_steps"),
    # an open run whose tail makes no sense, and lengths that no run can have
    (
        {"num_training_steps": None, "decay_start_tokens": -9, "decay_tokens": 9},
        "decay_start_tokens must not be negative, got -9",
    ),
    ({"num_training_steps": None, "decay_start_tokens": 9, "decay_tokens": -9}, "decay_tokens must not be negative"),
    ({"warmup_tokens": -1}, "warmup", "-1"),
    ({"num_warmup_steps": -1}, "warmup", "-1"),
    ({"tokens_seen": -1}, "tokens_seen", "-1"),
    ({"decay_ratio": "0.1"}, "decay_ratio", "got '0.1'"),
    ({"warmup_tokens": "1000"}, "warmup_tokens", "got '1000'"),
)


@pytest.mark.slow
@CAP_WARNING
@pytest.mark.parametrize(
    ("kwargs", "parts"), [(row[0], row[1:]) for row in ERRORS], ids=[str(row[0]) for row in ERRORS]
)
def test_errors(kwargs, parts):
    kwargs = {"num_warmup_steps": 0, "num_training_steps": 100, "tokens_per_step": 1000} | kwargs
    with refused(ValueError, *parts):
        get_power_schedule(sgd(), **kwargs)


@pytest.mark.parametrize("lr", [0, -1e-3, None, math.nan])
def test_optimizer_without_a_cap_is_refused(lr):
    optimizer = sgd()
    optimizer.defaults["lr"] = lr
    with refused(ValueError, "takes its cap from the optimizer's own lr", f"got {lr}", "build the optimizer with"):
        get_power_schedule(optimizer, tokens_per_step=1)


def test_cap_that_binds_for_the_whole_run_warns():
    """Hugging Face's default learning rate, 1,000 steps of beta 16: the law is at 4 * 16 * 5.9e7**-.51 = 0.0068."""
    with pytest.warns(UserWarning, match="binds for the whole run") as caught:
        schedule(0, 1000, lr=5e-5, tokens_per_step=4096 * 16, a=4.0)
    (message,) = (str(w.message) for w in caught)
    law = 4 * 16 * (900 * 4096 * 16) ** -0.51
    for part in (
        "learning_rate=5e-05 binds for the whole run",
        f"{law:.3g}",
        "58,982,400 tokens",
        "set learning_rate=0.02 ",
    ):
        assert part in message


@pytest.mark.parametrize(("num_steps", "warns"), [(840, True), (980, False)])
def test_cap_warning_looks_at_the_start_of_the_tail(num_steps, warns):
    """beta 128 leaves the cap at 4.4e8 tokens, step 848: the tail of 840 steps begins at 756, of 980 steps at 882."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule(0, num_steps, a=4.0)
    assert bool(caught) == warns


def test_last_epoch_goes_on_as_in_every_pytorch_scheduler():
    old = schedule(4, 100)
    lrs_used(old, 50)
    new = get_power_schedule(old.optimizer, 4, 100, tokens_per_step=TOKENS, a=A, last_epoch=old.last_epoch - 1)
    assert (new.last_epoch, new.tokens_seen) == (50, 50 * TOKENS)
    assert lrs_used(new, 51) == lrs_used(schedule(4, 100), 101)[50:]


def prepared_lrs(wrapper, num_steps):
    optimizer, used = wrapper.scheduler.optimizer, []
    for _ in range(num_steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        wrapper.step()
    return used


@pytest.mark.parametrize("increment", [1, 2, 32])
def test_a_loop_that_steps_by_an_increment_is_refused_before_the_rate_stands_still(increment):
    scheduler = schedule(4, 100)
    scheduler.optimizer.step()
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(increment)
    with refused(UserError, f"step({increment}) names no step ahead", f"at step {increment}", "call step() without it"):
        scheduler.step(increment)
    assert scheduler.tokens_seen == increment * TOKENS
    with refused(UserError, "step(0.53)", "metric"):
        scheduler.step(0.53)


@pytest.mark.filterwarnings("ignore:.*epoch parameter")
def test_a_step_ahead_is_gone_on_to_as_in_every_pytorch_scheduler():
    rates = lrs_used(schedule(4, 100), 101)
    by_number, in_sequence = schedule(4, 100), schedule(4, 100)
    for epoch in (1, 2, 50, 0, 1):
        by_number.optimizer.step(), by_number.step(epoch)
        assert (by_number.optimizer.param_groups[0]["lr"], by_number.tokens_seen) == (rates[epoch], epoch * TOKENS)
    before = torch.optim.lr_scheduler.ConstantLR(in_sequence.optimizer, 0.5, 9)
    both = torch.optim.lr_scheduler.SequentialLR(in_sequence.optimizer, [before, in_sequence], [3])
    assert lrs_used(both, 13)[3:] == rates[:10]


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [TOKENS, 1001])  # 1001 does not divide by the number of calls
@CAP_WARNING
def test_prepared_scheduler_of_several_processes(num_processes, tokens, processes):
    processes(num_processes)
    scheduler = schedule(5 * num_processes, 60 * num_processes, tokens_per_step=tokens)
    expected = lrs_used(schedule(5, 60, tokens_per_step=tokens), 62)
    assert prepared_lrs(prepared(scheduler), 62) == expected
    assert scheduler.tokens_seen == 62 * tokens


@pytest.mark.parametrize("kwargs", [{"split_batches": True}, {"step_with_optimizer": False}])
def test_prepared_scheduler_that_is_called_once_per_step(kwargs, processes):
    processes(2)
    assert prepared_lrs(prepared(schedule(5, 60), **kwargs), 62) == lrs_used(schedule(5, 60), 62)


def test_prepared_scheduler_holds_while_the_optimizer_is_skipped(processes):
    processes(2)
    wrapper = prepared(schedule(10, 120))
    whole = lrs_used(schedule(5, 60), 8)
    assert prepared_lrs(wrapper, 8) == whole
    wrapper.optimizers[0]._is_overflow = True
    wrapper.step()
    assert wrapper.scheduler.tokens_seen == 8 * TOKENS


@pytest.mark.parametrize("num_steps", [20, 1000])
def test_prepared_scheduler_whose_lengths_were_not_multiplied_is_refused(num_steps, processes):
    processes(2)
    wrapper = prepared(schedule(0, num_steps))
    with refused(RuntimeError, f"schedule of {num_steps} steps is over", "steps it 2 times", "multiply num_training"):
        prepared_lrs(wrapper, num_steps)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 3, 30, 57, 59])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (4, 4), (2, 1), (1, 2), (4, 2)])
def test_prepared_scheduler_resumes(stop, before, after, processes):
    """Also on another number of processes with the same tokens per step: accumulation makes up for it."""
    whole = lrs_used(schedule(5, 60), 61)
    processes(before)
    old = prepared(schedule(5 * before, 60 * before))
    assert prepared_lrs(old, stop) == whole[:stop]
    state = old.state_dict()
    processes(after)
    new = prepared(schedule(5 * after, 60 * after))
    new.load_state_dict(state)
    close(prepared_lrs(new, 61 - stop), whole[stop:])
