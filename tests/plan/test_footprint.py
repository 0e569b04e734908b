"""Bytes and days on paper, against what autograd saves, what is alive at once, accelerate's estimator, files, and hand."""

import contextlib
import functools
import math
import weakref
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes
from safetensors.torch import save_file
from sentences import refused
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from hf_power import mup_config
from hf_power.compat import CHECKPOINTING
from hf_power.models import flops_per_token
from hf_power.plan.footprint import COMPUTES, activation_bytes, footprint
from hf_power.plan.record import scale_table, table_text
from hf_power.plan.target import SHARDINGS, Layout, Machine, Target
from hf_power.records.errors import UserError
from hf_power.settings.settings import Settings

ROOT = Path(__file__).parents[2]
# Width, MLP, layers, vocabulary, batch, block: the layer, the logits and the experts' gradients decide the peak in turn.
SHAPES = [(64, 176, 2, 331, 2, 256), (128, 96, 3, 2000, 1, 128), (96, 512, 4, 500, 3, 200)]
MEASURED = [(SHAPES[0], "autocast"), (SHAPES[1], "bf16")]
MEASURED += [
    pytest.param(shape, compute, marks=pytest.mark.slow)
    for shape in SHAPES
    for compute in COMPUTES
    if (shape, compute) not in MEASURED
]
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True}


def small(moe, shape, tied=True):
    width, inner, layers, vocabulary, *_ = shape
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return mup_config(MixtralConfig(**sizes, **EXPERTS) if moe else LlamaConfig(**sizes), base_width=32)


@functools.cache
def recipe(name):
    sections = yaml.safe_load((ROOT / f"scripts/recipes/{name}.yaml").read_text(encoding="utf-8"))
    given = Settings.from_dict({section: sections[section] for section in ("model", "mup")})
    return mup_config(given.model.config(vocab_size=1), **given.mup.arguments())


class Alive(TorchDispatchMode):
    """Bytes of the storages made under it, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            if storage not in self.known and id(storage) not in given:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, size):
        self.now -= size


def measured(config, batch, block, compute, checkpointing):
    """Bytes that autograd saves between forward and backward, weights not counted, and the peak of the whole step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if compute == "bf16" else torch.float32)
    model.train()
    if checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = weakref.WeakKeyDictionary()  # what a dropped branch of the graph has saved is gone with it

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage] = storage.nbytes()
        return tensor

    ids = torch.randint(0, config.vocab_size, (batch, block))
    cast = torch.autocast("cpu", torch.bfloat16) if compute == "autocast" else contextlib.nullcontext()
    with Alive() as alive:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), cast:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        held = sum(saved.values())
        loss.backward()
    return held, alive.peak


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("moe", [False, True], ids=["granite", "granitemoe"])
@pytest.mark.parametrize(("shape", "compute"), MEASURED, ids=str)
def test_activations_are_those_that_autograd_saves(shape, moe, compute, checkpointing):
    config, (*_, batch, block) = small(moe, shape), shape
    saved, peak = measured(config, batch, block, compute, checkpointing)
    told = activation_bytes(
        config, block_size=block, batch_size=batch, compute=compute, activation_checkpointing=checkpointing
    )
    assert told.saved == pytest.approx(saved, rel=0.012)
    assert told.peak == pytest.approx(peak, rel=0.04)


def test_activations_of_the_largest_model_by_hand():
    """PowerLM-3B, one block under autocast with checkpointing: 40 inputs, and the loss over 49152 entries."""
    told = activation_bytes(
        recipe("powerlm-3b"), block_size=4096, batch_size=1, compute="autocast", activation_checkpointing=True
    )
    copies = 2 * (49152 * 2304 + 40 * (4 * 2304**2 + 3 * 2304 * 9216))
    assert told.copies == copies
    last = 4096 * (10 * 2304 + 4)
    assert told.peak == 4096 * 40 * 4 * 2304 + last + copies + 4096 * 10 * 49152


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("moe", [False, True], ids=["granite", "granitemoe"])
def test_states_are_those_of_accelerates_estimator(moe, tied):
    config = small(moe, SHAPES[0], tied)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # transformers 5.0 does not on the meta device.
    total, _ = calculate_maximum_sizes(model)
    total -= sum(buffer.nbytes for buffer in model.buffers())
    usage = estimate_training_usage(total, "float32")
    layout = Layout("fp32", "none")
    told = footprint(config, block_size=32, per_device_batch_size=1, machine=Machine(1), layout=layout).bytes
    assert (told.weights, told.gradients, told.optimizer) == (usage["model"], usage["gradients"], 2 * total)
    assert told.weights + told.gradients + told.optimizer == usage["step"]
    assert told.buffers == 0  # DDP's buckets need a second device


def test_root_and_layers_are_the_units_of_accelerate():
    """Buffers of full sharding: twice (weights, gradients) the root and two of the modules that are not split."""
    for moe in (False, True):
        for tied in (True, False):
            config = small(moe, SHAPES[2], tied)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
            unit, _ = calculate_maximum_sizes(model.model.layers[0])
            whole, _ = calculate_maximum_sizes(model)
            root = whole - 4 * unit - sum(buffer.nbytes for buffer in model.buffers())
            layout = Layout("fp32")
            told = footprint(config, block_size=32, per_device_batch_size=1, machine=Machine(4), layout=layout)
            assert told.bytes.buffers == 2 * (root + 2 * unit)


def test_checkpoint_is_as_large_as_its_files(tmp_path):
    config = small(True, SHAPES[0])
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_file({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "weights")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    weights, moments = ((tmp_path / name).stat().st_size for name in ("weights", "optimizer"))
    told = footprint(config, block_size=32, per_device_batch_size=1)
    assert told.checkpoint_bytes_without_optimizer == pytest.approx(weights, rel=0.02)
    assert told.checkpoint_bytes == pytest.approx(weights + moments, rel=0.02)


def test_sharding_divides_what_it_shards():
    config = recipe("powerlm-1b")
    parameters = 40 * (4 * 1536**2 + 3 * 1536 * 4096) + 81 * 1536 + 49152 * 1536
    plans = {
        name: footprint(
            config, block_size=4096, per_device_batch_size=2, machine=Machine(64), layout=Layout(sharding=name)
        ).bytes
        for name in SHARDINGS
    }
    states = {name: astuple(plan)[:3] for name, plan in plans.items()}
    assert states["none"] == (4 * parameters, 4 * parameters, 8 * parameters)
    assert states["optimizer"] == (4 * parameters, 4 * parameters, parameters // 8)
    assert states["full"] == (parameters // 16, parameters // 16, parameters // 8)
    assert plans["none"].buffers == 4 * parameters
    for plan in plans.values():
        assert plan.total == sum(astuple(plan))
    assert plans["full"].activations < plans["none"].activations  # bf16 weights need no copies


@pytest.mark.slow
def test_what_fits_is_what_the_device_holds():
    config = recipe("powerlm-3b")

    def plan(sharding="full", **more):
        layout = Layout(sharding=sharding)
        return footprint(config, block_size=4096, per_device_batch_size=2, machine=Machine(64, **more), layout=layout)

    assert plan().fits
    assert not plan("none").fits
    total = plan().bytes.total
    assert plan(device_memory=total).fits
    assert not plan(device_memory=total - 1).fits
    assert plan().logits_bytes == 2 * 4096 * 49152 * 4


def test_table_by_hand():
    config = recipe("powermoe-1b")
    rows = scale_table(config, Target(int(1.1e12), 1024 * 4096, config), per_device_batch_size=4)
    assert [row.devices for row in rows] == [8, 64, 512]
    assert [(row.per_device_batch_size, row.gradient_accumulation_steps) for row in rows] == [(4, 32), (4, 4), (2, 1)]
    steps = math.ceil(1.1e12 / 4_194_304)
    for row in rows:
        seconds = flops_per_token(config, 4096) * steps * 4_194_304 / (row.devices * 0.25 * 989e12)
        assert (row.steps, row.days) == (steps, pytest.approx(seconds / 86_400))
        machine = Machine(row.devices)
        plan = footprint(config, block_size=4096, per_device_batch_size=row.per_device_batch_size, machine=machine)
        assert (row.bytes["full"], row.fits["full"]) == (plan.bytes.total, True)
        assert row.checkpoint_bytes == 12 * plan.parameters
    assert rows[0].days == pytest.approx(64 * rows[2].days)


def test_batch_of_a_row_divides_its_share():
    config = small(False, SHAPES[0])
    target = Target(10**6, 15 * 32, config, block_size=32)
    (row,) = scale_table(config, target, per_device_batch_size=4, devices=(1,))
    assert (row.per_device_batch_size, row.gradient_accumulation_steps) == (3, 5)


def test_text_marks_what_does_not_fit():
    config = small(False, SHAPES[0])
    target = Target(10**6, 64 * 32, config, block_size=32)
    small_device = scale_table(
        config, target, per_device_batch_size=4, devices=(2, 64), machine=Machine(device_memory=10)
    )
    text = table_text(small_device)
    assert text.count("!") == 6
    assert "!" not in table_text(scale_table(config, target, per_device_batch_size=4, devices=(2, 64)))
    header, *lines = text.splitlines()
    assert {len(header), *map(len, lines)} == {len(header)}


BAD = [
    ({"devices": 0}, "devices must be positive, got 0: correct it."),
    ({"block_size": 0}, "block_size must be positive, got 0: correct it."),
    ({"per_device_batch_size": -1}, "per_device_batch_size must be positive, got -1: correct it."),
    ({"device_memory": math.inf}, "device_memory must be positive, got inf: correct it."),
    ({"precision": "fp8"}, "precision must be one of bf16, fp32, got 'fp8': correct it."),
    ({"sharding": "half"}, "sharding must be one of none, optimizer, full, got 'half': correct it."),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: str(value)[:30])
def test_bad_input_of_a_footprint(change, sentence):
    given = {"block_size": 32, "per_device_batch_size": 1} | change
    machine = {name: given.pop(name) for name in ("devices", "device_memory") if name in given}
    layout = {name: given.pop(name) for name in ("precision", "sharding") if name in given}
    with refused(UserError, sentence):
        footprint(small(False, SHAPES[0]), **given, machine=Machine(**machine), layout=Layout(**layout))


BAD_ROWS = [
    ({"utilisation": 1.5}, "utilisation must be at most 1, got 1.5: pass 0.4 for 40 %."),
    ({"tokens": 0}, "tokens must be positive, got 0: correct it."),
    ({"devices": (0,)}, "devices must be positive, got 0: correct it."),
    ({"devices": (8, 3)}, "3 devices do not divide the 64 sequences of a step: choose a divisor of it."),
    ({"block_size": 31}, "2048 tokens per step are no whole number of blocks of 31: correct one."),
]


@pytest.mark.parametrize(("change", "sentence"), BAD_ROWS, ids=lambda value: str(value)[:30])
def test_bad_input_of_a_table(change, sentence):
    config = small(False, SHAPES[0])
    given = {"tokens": 10**6, "tokens_per_step": 2048, "block_size": 32, "devices": (8,), "utilisation": 0.4} | change

    def make():
        devices, machine = given.pop("devices"), Machine(utilisation=given.pop("utilisation"))
        scale_table(config, Target(**given, config=config), per_device_batch_size=4, devices=devices, machine=machine)

    with refused(UserError, sentence):
        make()


def test_unknown_compute():
    with refused(UserError, "compute must be one of autocast, bf16, fp32, got 'fp16': correct it."):
        activation_bytes(
            small(False, SHAPES[0]), block_size=32, batch_size=1, compute="fp16", activation_checkpointing=True
        )
