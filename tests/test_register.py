"""lr_scheduler_type="power" in a stock transformers: registration, command line, pickles, Trainer."""

import copy
import dataclasses
import functools
import json
import math
import os
import pickle
import random
import subprocess
import types
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import warm
from accelerate.state import AcceleratorState, GradientState
from processes import PATIENCE, SHARED_BATCHES
from sentences import refused
from transformers import (
    DataCollatorWithFlattening,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

import hf_power
from hf_power.register import _finding_tokens, find_tokens_per_step, register_power_scheduler

A = 0.02  # keeps runs of a few hundred tokens on the law instead of on the cap
ROOT = str(Path(hf_power.__file__).parents[1])


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def python(code, *args, cwd, launcher=()):
    """Run code where hf_power is not imported yet, under a launcher or without one; its standard output."""
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(cwd) / "script.py"
    script.write_text(code)
    command = [warm.python(stock=True), *launcher, str(script), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


REGISTRATION = """
from transformers import SchedulerType, Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION as functions
before, table, method = list(SchedulerType), dict(functions), Trainer.create_scheduler
try:
    SchedulerType("power")
except ValueError:
    print("unknown before")
import hf_power
print([t.value for t in list(SchedulerType)[: len(before)]] == [t.value for t in before])
print([t.value for t in list(SchedulerType)[len(before) :]], len(functions) - len(table))
print(all(functions[t] is f for t, f in table.items()))
wrapped = Trainer.create_scheduler
hf_power.register_power_scheduler()
print(len(list(SchedulerType)) - len(before), wrapped is Trainer.create_scheduler, wrapped.__wrapped__ is method)
"""


@pytest.mark.slow
def test_import_adds_one_member_and_one_entry(tmp_path):
    lines = python(REGISTRATION, cwd=tmp_path).splitlines()
    assert lines == ["unknown before", "True", "['power'] 1", "True", "1 True True"]


AGAIN = """
import importlib, sys
from transformers import SchedulerType, Trainer, TrainingArguments, LlamaConfig, LlamaForCausalLM
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION as functions
import datasets
stock, count = Trainer.create_scheduler, len(SchedulerType)
import hf_power

def check(what):
    args = TrainingArguments("out", lr_scheduler_type="power", max_steps=2, per_device_train_batch_size=2, use_cpu=True,
                             report_to=[], disable_tqdm=True, save_strategy="no", lr_scheduler_kwargs={"a": 0.02})
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))
    data = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [[1, 2, 3]] * 8})
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    import hf_power
    kind = type(getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler))
    print(what, kind is hf_power.PowerLR, trainer.lr_scheduler.state_dict()["tokens_seen"], len(SchedulerType) - count,
          Trainer.create_scheduler.__wrapped__ is stock, functions["power"] is hf_power.get_power_schedule)

check("imported")
importlib.reload(hf_power)
check("reloaded")
for name in ("hf_power.schedule", "hf_power.scheduler", "hf_power.register", "hf_power"):
    importlib.reload(sys.modules[name])
check("all reloaded")
for name in [name for name in sys.modules if name.startswith("hf_power")]:
    del sys.modules[name]
import hf_power
check("imported anew")
"""


@pytest.mark.slow
def test_importing_again_in_a_living_process(tmp_path):
    lines = [line for line in python(AGAIN, cwd=tmp_path).splitlines() if "True" in line or "False" in line]
    whats = ("imported", "reloaded", "all reloaded", "imported anew")
    assert lines == [f"{what} True 12 1 True True" for what in whats]


def test_a_wrapper_on_top_of_ours_stays(monkeypatch):
    ours = Trainer.create_scheduler

    @functools.wraps(ours)
    def theirs(self, *args):
        return ours(self, *args)

    monkeypatch.setattr(Trainer, "create_scheduler", theirs)
    register_power_scheduler()
    assert Trainer.create_scheduler is theirs
    monkeypatch.undo()
    stock = ours.__wrapped__
    register_power_scheduler()
    assert Trainer.create_scheduler.__wrapped__ is stock


@pytest.mark.parametrize(
    "args", [None, types.SimpleNamespace(), types.SimpleNamespace(lr_scheduler_type="cosine"), "x", {}]
)
def test_foreign_arguments_reach_the_stock_method(args):
    """A Trainer of somebody else's may have arguments that are no TrainingArguments; what it does then is its own affair."""
    called = []
    wrapped = _finding_tokens(lambda self, *given: called.append((self, given)))
    trainer = types.SimpleNamespace(args=args)
    wrapped(trainer, 5, None)
    assert called == [(trainer, (5, None))]


def test_a_subclass_of_the_arguments_finds_its_tokens(tmp_path):
    @dataclasses.dataclass
    class Own(TrainingArguments):
        more: int = 3

    data = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 8, "labels": [[1, 2, 3]] * 8})
    args = Own(
        **{k: v for k, v in vars(arguments(tmp_path)).items() if k in ("output_dir", "lr_scheduler_type", "max_steps")}
    )
    args.lr_scheduler_kwargs, args.per_device_train_batch_size = {"a": A}, 2
    trainer = Trainer(tiny_model(), args, train_dataset=data)
    assert (
        trainer.create_scheduler(
            6, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
        ).schedule.tokens_per_step
        == 6
    )
    assert args.lr_scheduler_kwargs == {"a": A}


FOREIGN = """
from transformers import SchedulerType
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
def somebody_elses(optimizer, **kwargs): ...
member = str.__new__(SchedulerType, "power")
member._name_, member._value_ = "POWER_LR", "power"
SchedulerType._member_map_["POWER_LR"] = SchedulerType._value2member_map_["power"] = member
SchedulerType._member_names_.append("POWER_LR")
TYPE_TO_SCHEDULER_FUNCTION[member] = somebody_elses
try:
    import hf_power
except RuntimeError as error:
    print(error)
print(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType("power")] is somebody_elses)
"""


@pytest.mark.slow
def test_foreign_power_is_refused(tmp_path):
    message, kept = python(FOREIGN, cwd=tmp_path).splitlines()
    assert message == (
        'lr_scheduler_type="power" is already registered, as __main__.somebody_elses: import either that package or '
        "hf_power, not both."
    )
    assert kept == "True"


def test_a_changed_part_of_transformers_is_named_at_import(monkeypatch):
    monkeypatch.delattr(Trainer, "_get_collator_with_removed_columns")
    with refused(ImportError, "builds on Trainer._get_collator_with_removed_columns", "transformers 4.52.3 or newer"):
        register_power_scheduler()


def test_foreign_function_is_refused_and_left_alone(monkeypatch):
    def theirs(optimizer): ...

    monkeypatch.setitem(TYPE_TO_SCHEDULER_FUNCTION, SchedulerType("power"), theirs)
    with refused(RuntimeError, "already registered", "theirs", "not both"):
        register_power_scheduler()
    assert TYPE_TO_SCHEDULER_FUNCTION[SchedulerType("power")] is theirs


def test_member_behaves_as_those_of_transformers():
    member, stock = SchedulerType("power"), SchedulerType("cosine")
    assert member is SchedulerType.POWER is SchedulerType["POWER"]
    assert member in SchedulerType
    assert list(SchedulerType).count(member) == 1
    assert list(SchedulerType)[-1] is member
    assert (member.name, member.value, member == "power") == ("POWER", "power", True)
    assert isinstance(member, SchedulerType)
    assert type(member) is type(stock)
    assert repr(member) == repr(stock).replace("COSINE", "POWER").replace("cosine", "power")
    assert str(member) == str(stock).replace("COSINE", "POWER").replace("cosine", "power")
    assert f"{member}" == f"{stock}".replace("COSINE", "POWER").replace("cosine", "power")
    assert {member: 1}[SchedulerType("power")] == 1
    assert len({t.value for t in SchedulerType}) == len(SchedulerType) == len(SchedulerType.__members__)
    assert json.dumps({"type": member}) == '{"type": "power"}'
    with pytest.raises(ValueError, match=r"please select one of .*'power'"):
        SchedulerType("powre")


def arguments(tmp_path, **kwargs):
    settings = {"output_dir": str(tmp_path / "run"), "lr_scheduler_type": "power", "learning_rate": 0.02}
    settings |= {"per_device_train_batch_size": 2, "max_steps": 6, "use_cpu": True, "save_strategy": "no"}
    settings |= {"report_to": [], "disable_tqdm": True, "lr_scheduler_kwargs": {"a": A}}
    return TrainingArguments(**settings | kwargs)


def from_command_line(tmp_path):
    line = ["--output_dir", str(tmp_path), "--lr_scheduler_type", "power", "--lr_scheduler_kwargs", '{"a": 4.6}']
    return HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(line)[0]


def from_dict(tmp_path):
    given = {"output_dir": str(tmp_path), "lr_scheduler_type": "power", "lr_scheduler_kwargs": {"a": 4.6}}
    return HfArgumentParser(TrainingArguments).parse_dict(given)[0]


def from_yaml(tmp_path):
    path = tmp_path / "arguments.yaml"
    path.write_text(f"output_dir: {tmp_path}\nlr_scheduler_type: power\nlr_scheduler_kwargs:\n  a: 4.6\n")
    return HfArgumentParser(TrainingArguments).parse_yaml_file(str(path))[0]


def from_constructor(tmp_path):
    return TrainingArguments(str(tmp_path), lr_scheduler_type=SchedulerType.POWER, lr_scheduler_kwargs={"a": 4.6})


def from_pickle(tmp_path):
    return pickle.loads(pickle.dumps(from_constructor(tmp_path)))


def from_copy(tmp_path):
    return copy.copy(from_constructor(tmp_path))


def from_deepcopy(tmp_path):
    return copy.deepcopy(from_constructor(tmp_path))


def from_own_json(tmp_path):
    given = json.loads(from_constructor(tmp_path).to_json_string())
    known = {f for f in TrainingArguments.__dataclass_fields__ if TrainingArguments.__dataclass_fields__[f].init}
    return TrainingArguments(**{k: v for k, v in given.items() if k in known})


@pytest.mark.filterwarnings("ignore:.*push_to_hub_token.*:FutureWarning")  # transformers 4, of its own JSON
@pytest.mark.parametrize(
    "make",
    [from_constructor, from_command_line, from_dict, from_yaml, from_pickle, from_copy, from_deepcopy, from_own_json],
)
def test_arguments_by_every_way_in_and_out(make, tmp_path):
    args = make(tmp_path)
    assert args.lr_scheduler_type == "power" == SchedulerType(args.lr_scheduler_type).value
    assert args.to_dict()["lr_scheduler_type"] == "power" == json.loads(args.to_json_string())["lr_scheduler_type"]
    assert type(args.to_dict()["lr_scheduler_type"]) is str
    assert args.to_dict()["lr_scheduler_kwargs"] == {"a": 4.6}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    kwargs = args.lr_scheduler_kwargs | {"tokens_per_step": 4_194_304}
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, 0, 10**7, kwargs)
    assert round(scheduler.schedule.lr(10e12), 4) == 0.0011  # the paper's own example


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_member_is_pickled_as_its_string(protocol):
    saved = pickle.dumps(SchedulerType("power"), protocol)
    assert type(pickle.loads(saved)) is str
    assert pickle.loads(saved) == "power"
    assert b"hf_power" not in saved
    assert b"SchedulerType" not in saved
    assert pickle.loads(pickle.dumps(SchedulerType("cosine"), protocol)) is SchedulerType("cosine")


WITHOUT_HF_POWER = """
import json, sys
sys.modules["hf_power"] = None  # "not installed", however it is installed here
import torch
from transformers import SchedulerType
try:
    import hf_power
except ImportError:
    assert "power" not in [t.value for t in SchedulerType]
    args = torch.load(sys.argv[1], weights_only=False)
    print(json.dumps([args.lr_scheduler_type, args.to_dict()["lr_scheduler_type"], args.lr_scheduler_kwargs]))
    json.loads(args.to_json_string())
"""


@pytest.mark.slow
def test_training_args_bin_loads_where_hf_power_is_not_installed(tmp_path):
    torch.save(from_constructor(tmp_path), tmp_path / "training_args.bin")
    out = python(WITHOUT_HF_POWER, tmp_path / "training_args.bin", cwd=tmp_path)
    assert json.loads(out) == ["power", "power", {"a": 4.6}]


def test_get_scheduler_without_tokens_says_what_to_pass():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    with refused(ValueError, "needs tokens_per_step", "no Trainer", 'scheduler_specific_kwargs={"tokens_per_step"'):
        get_scheduler("power", optimizer, 0, 10)


LENGTH = 16


def tiny_model(**kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes | kwargs))


def block(i, length=LENGTH):
    ids = torch.arange(i, i + length) % 32
    return {"input_ids": ids, "labels": ids}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (block(i) for i in range(200))


class SizedStream(Stream):
    """IterableDataset inherits a __getitem__ that only raises; with a length, it still is no map-style dataset."""

    def __len__(self):
        return 200


def packed(count=40):
    return [block(i) for i in range(count)]


def hf_dataset():
    rows = {"input_ids": [block(i)["input_ids"].tolist() for i in range(40)]}
    return datasets.Dataset.from_dict(rows | {"labels": rows["input_ids"], "text": ["removed"] * 40})


def hf_stream():
    return hf_dataset().to_iterable_dataset().remove_columns("text").with_format("torch")


def shuffled_hf_stream():
    return hf_dataset().to_iterable_dataset(num_shards=4).remove_columns("text").shuffle(seed=3, buffer_size=7)


class StepLog(TrainerCallback):
    """Learning rates that each optimizer step uses, per group."""

    def __init__(self):
        self.used = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.used.append([group["lr"] for group in optimizer.param_groups])


def closed_form(num_steps, tokens, *, lr=0.02, a=A, first_step=0, seen=0, warmup=0):
    """eq. 7 and 8 with the default tail: exponential, over the last tenth of all tokens."""
    total = seen + (num_steps - first_step) * tokens
    start, length = total - round(0.1 * total), round(0.1 * total)

    def eta(n):
        return min(lr, a * tokens / 4096 * n**-0.51) if n else lr

    rates = []
    for n in range(seen, total, tokens):
        if n < warmup:
            rates.append(n / warmup * eta(warmup))
        elif n < start:
            rates.append(eta(n))
        else:
            rates.append(eta(start) * math.expm1(1 - (n - start) / length) / math.expm1(1))
    return rates


def train(args, dataset, *, model=None, trainer_class=Trainer, resume=None, **kwargs):
    log = StepLog()
    trainer = trainer_class(model or tiny_model(), args, train_dataset=dataset, callbacks=[log], **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [rates[0] for rates in log.used]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dataset", [packed, Stream, SizedStream, hf_dataset, hf_stream, shuffled_hf_stream])
def test_tokens_of_packed_blocks(dataset, accumulation, tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, warmup_steps=2)
    trainer, used = train(args, dataset())
    tokens = 2 * accumulation * LENGTH
    assert trainer.lr_scheduler.tokens_per_step == tokens
    assert trainer.lr_scheduler.tokens_seen == 6 * tokens
    assert used == pytest.approx(closed_form(6, tokens, warmup=2 * tokens), rel=1e-12)
    assert trainer.lr_scheduler.get_last_lr() == [0.0, 0.0]


def pad(examples):
    width = max(len(e["input_ids"]) for e in examples)
    ids, mask = torch.zeros(len(examples), width, dtype=torch.long), torch.zeros(len(examples), width, dtype=torch.long)
    for row, example in enumerate(examples):
        ids[row, : len(example["input_ids"])] = example["input_ids"]
        mask[row, : len(example["input_ids"])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 30, 64])
def test_tokens_of_padded_examples_are_averaged(count, tmp_path):
    """Lengths 3, 4, ... 11, 3, ...; every example is counted, its padding is not."""
    lengths = [3 + i % 9 for i in range(count)]
    trainer, used = train(arguments(tmp_path), [block(i, n) for i, n in enumerate(lengths)], data_collator=pad)
    tokens = round(2 * sum(lengths) / count)
    assert trainer.lr_scheduler.tokens_per_step == tokens
    assert used == pytest.approx(closed_form(6, tokens), rel=1e-12)


def test_sample_of_a_sorted_dataset_is_spread_over_it(tmp_path):
    """1,000 examples sorted by length, mean 10.5: the front alone would give 2."""
    dataset = [block(0, 2 + i * 18 // 1000) for i in range(1000)]
    mean = sum(2 + i * 18 // 1000 for i in range(1000)) / 1000
    trainer = Trainer(tiny_model(), arguments(tmp_path), train_dataset=dataset, data_collator=pad)
    assert find_tokens_per_step(trainer) == pytest.approx(2 * mean, rel=0.05)


@pytest.mark.slow
def test_tokens_of_a_padding_free_collator(tmp_path):
    rows = [{"input_ids": block(i, 3 + i % 9)["input_ids"].tolist()} for i in range(36)]
    trainer, used = train(arguments(tmp_path), rows, data_collator=DataCollatorWithFlattening())
    assert trainer.lr_scheduler.tokens_per_step == 14  # two sequences of 7 on average
    assert used == pytest.approx(closed_form(6, 14), rel=1e-12)


@pytest.mark.slow
def test_explicit_tokens_win(tmp_path):
    args = arguments(tmp_path, lr_scheduler_kwargs={"tokens_per_step": 1000, "a": A})
    trainer, used = train(args, packed())
    assert trainer.lr_scheduler.tokens_per_step == 1000
    assert used == pytest.approx(closed_form(6, 1000), rel=1e-12)


@pytest.mark.slow
def test_other_schedulers_are_left_alone(tmp_path):
    """No counting, so a dataset that cannot be counted is no error."""
    _, used = train(arguments(tmp_path, lr_scheduler_type="linear", lr_scheduler_kwargs=None), OnePass())
    assert used == pytest.approx([0.02 * (1 - k / 6) for k in range(6)], rel=1e-12)


class OnePass(torch.utils.data.IterableDataset):
    """The iterator itself: what is counted is lost for training."""

    def __init__(self):
        self.examples = iter(packed())

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.examples)


class SharedIterator(OnePass):
    """One-pass as well: every iter() hands out the same iterator."""

    def __iter__(self):
        return self.examples


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [OnePass, SharedIterator])
def test_one_pass_dataset_is_refused_before_it_loses_examples(dataset, tmp_path):
    stream = dataset()
    with refused(ValueError, "could not count the tokens", "one-pass iterator", 'lr_scheduler_kwargs={"tokens_'):
        train(arguments(tmp_path), stream)
    assert len(list(stream.examples)) == 40
    args = arguments(tmp_path, lr_scheduler_kwargs={"a": A, "tokens_per_step": 32})  # the remedy
    assert train(args, dataset())[1] == pytest.approx(closed_form(6, 32), rel=1e-12)


@pytest.mark.parametrize(("dataset", "reason"), [([], "Error"), ([{"pixels": torch.zeros(3)}], "Error")])
def test_uncountable_data_is_refused_with_the_remedy(dataset, reason, tmp_path):
    trainer = Trainer(tiny_model(), arguments(tmp_path), train_dataset=dataset)
    with refused(ValueError, "could not count the tokens of a training sequence", reason, "pass lr_scheduler_kwargs"):
        find_tokens_per_step(trainer)


class DrawingDataset(torch.utils.data.Dataset):
    """Augments at random, from all three global generators."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        shift = random.randrange(32) + np.random.randint(32) + int(torch.randint(32, ()))
        return block(i + shift)


class LossLog(Trainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the cap learning_rate")
@pytest.mark.parametrize("dataset", [DrawingDataset, hf_dataset])
def test_counting_does_not_change_the_training(dataset, tmp_path):
    """Under a cap that binds and without a tail "power" is "constant", loss for loss; dropout and shuffling are on."""
    runs = {}
    for kind, kwargs in (("constant", None), ("power", {"decay_ratio": 0, "a": 1e9})):
        args = arguments(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, max_steps=12)
        model = tiny_model(attention_dropout=0.3)
        trainer, _ = train(args, dataset(), model=model, trainer_class=LossLog)
        runs[kind] = trainer.losses, [p.detach().clone() for p in model.parameters()]
    assert len(set(runs["constant"][0])) == 12
    assert runs["power"][0] == runs["constant"][0]
    assert all(torch.equal(x, y) for x, y in zip(runs["power"][1], runs["constant"][1], strict=True))


def resumed_hf_stream():
    stream = hf_stream()
    state = [stream.state_dict() for _ in zip(range(5), stream, strict=False)][-1]
    resumed = hf_stream()
    resumed.load_state_dict(state)
    return resumed


@pytest.mark.slow
@pytest.mark.parametrize(("dataset", "first"), [(Stream, 0), (hf_stream, 0), (resumed_hf_stream, 5)])
def test_stream_still_yields_its_first_examples_to_the_training(dataset, first, tmp_path):
    seen = []

    def collate(examples):
        seen.append([int(e["input_ids"][0]) for e in examples])
        return {k: torch.stack([e[k] for e in examples]) for k in ("input_ids", "labels")}

    train(arguments(tmp_path), dataset(), data_collator=collate)
    assert seen[0][:2] == [first, first + 1]  # the sample
    assert seen[1:4] == [[first + 2 * k, first + 2 * k + 1] for k in range(3)]


class SmallMemory(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.slow
def test_tokens_follow_the_batch_that_auto_find_batch_size_settles_on(tmp_path):
    args = arguments(tmp_path, per_device_train_batch_size=4, auto_find_batch_size=True)
    trainer, used = train(args, packed(), trainer_class=SmallMemory)
    batch = trainer.state.train_batch_size
    assert batch < 4
    assert trainer.lr_scheduler.tokens_per_step == batch * LENGTH
    assert used[-6:] == pytest.approx(closed_form(6, batch * LENGTH), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("today", "tokens", "lr", "a"),
    [
        ({}, 32, 0.02, A),
        ({"learning_rate": 2e-4}, 32, 2e-4, A),
        ({"per_device_train_batch_size": 4}, 64, 0.02, A),
        ({"gradient_accumulation_steps": 3, "learning_rate": 0.005}, 96, 0.005, A),
        ({"lr_scheduler_kwargs": {"a": 0.03}}, 32, 0.02, 0.03),
        ({"max_steps": 12}, 32, 0.02, A),
    ],
)
def test_resume_uses_the_values_of_today_from_the_first_step(today, tokens, lr, a, tmp_path):
    first = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    _, before = train(first, packed())
    assert before == pytest.approx(closed_form(8, 32), rel=1e-12)
    args = arguments(tmp_path, **{"max_steps": 8, "ignore_data_skip": True} | today)
    trainer, used = train(args, packed(), resume=str(tmp_path / "run" / "checkpoint-4"))
    num_steps = today.get("max_steps", 8)
    assert used == pytest.approx(closed_form(num_steps, tokens, lr=lr, a=a, first_step=4, seen=4 * 32), rel=1e-12)
    assert trainer.lr_scheduler.tokens_seen == 4 * 32 + (num_steps - 4) * tokens


class Callers(Trainer):
    """A subclass that overrides create_scheduler, as Hugging Face's documentation suggests."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.called = True
        return super().create_scheduler(num_training_steps=num_training_steps, optimizer=optimizer)


class Replacing(Trainer):
    """A subclass that does without super() brings its own tokens."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        kwargs = {"tokens_per_step": find_tokens_per_step(self), "a": A}
        self.lr_scheduler = get_scheduler("power", self.optimizer, 0, num_training_steps, kwargs)
        return self.lr_scheduler


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [Callers, Replacing])
def test_trainer_subclasses(trainer_class, tmp_path):
    _, used = train(arguments(tmp_path), packed(), trainer_class=trainer_class)
    assert used == pytest.approx(closed_form(6, 32), rel=1e-12)


def test_tokens_found_for_one_trainer_do_not_leak(tmp_path):
    train(arguments(tmp_path), packed())
    with pytest.raises(ValueError, match="could not count"):
        Trainer(tiny_model(), arguments(tmp_path), train_dataset=OnePass()).create_optimizer_and_scheduler(6)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.02)
    with pytest.raises(ValueError, match="found no Trainer"):
        get_scheduler("power", optimizer, 0, 10)


def test_scheduler_that_the_user_passes_is_kept(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    trainer, used = train(arguments(tmp_path), OnePass(), model=model, optimizers=(optimizer, constant))
    assert trainer.lr_scheduler is constant
    assert used == [0.01] * 6


def test_split_batches_divide_the_batch_over_the_processes(tmp_path, monkeypatch):
    """Then per_device_train_batch_size is that of all processes together, however many there are."""
    args = arguments(tmp_path, accelerator_config={"split_batches": True}, gradient_accumulation_steps=3)
    trainer = Trainer(tiny_model(), args, train_dataset=packed())
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert find_tokens_per_step(trainer) == 2 * 3 * LENGTH


@SHARED_BATCHES
def test_processes_that_share_a_batch_share_its_tokens(tmp_path, monkeypatch, sizes, data_parallel):
    """A step of 8 processes has 2 sequences for each data-parallel group, whatever splits a sequence or a matrix."""
    parallel = pytest.importorskip("accelerate.parallelism_config").ParallelismConfig(
        **sizes
    )  # from accelerate 1.10 on
    trainer = Trainer(tiny_model(), arguments(tmp_path), train_dataset=packed())
    monkeypatch.setattr(TrainingArguments, "world_size", 8)
    # what Accelerator.parallelism_config reads; Trainer's own get_tp_size, get_cp_size and get_sp_size are the stock ones
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", parallel)
    assert find_tokens_per_step(trainer) == data_parallel * 2 * LENGTH
