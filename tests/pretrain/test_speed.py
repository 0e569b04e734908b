"""The fast path computes what the stock path computes, and waits for the device only when it logs."""

import copy
import json
import traceback
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, TrainingArguments

from hf_power import mup_config, mup_init_
from hf_power.compat import CHECKPOINTING
from hf_power.pretrain import run as train
from hf_power.pretrain import speed
from hf_power.pretrain.trainer import PowerTrainer
from hf_power.settings.settings import Settings

VOCABULARY, BATCH, BLOCK = 512, 4, 48
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.01}
MODELS = {"dense": LlamaConfig(**SHAPE), "moe": MixtralConfig(**SHAPE, **EXPERTS)}


def pair(kind, tmp_path, monkeypatch, chunk_tokens=50, **arguments):
    """A model of the stock path and the same one on the fast path, logits_scaling 64 / 24 (no power of two)."""
    monkeypatch.setattr(speed, "LOGITS_BYTES", 4 * chunk_tokens * VOCABULARY)
    torch.manual_seed(0)
    config = mup_config(MODELS[kind], base_width=24, base_intermediate_size=32)
    stock = mup_init_(AutoModelForCausalLM.from_config(config)).train()
    stock.config.use_cache = False  # as the Trainer sets it
    with torch.no_grad():
        stock.lm_head.weight.mul_(4)  # logits that differ from one another
    args = TrainingArguments(tmp_path / "out", use_cpu=True, per_device_train_batch_size=BATCH, **arguments)
    return stock, speed.speed_up_(copy.deepcopy(stock), args, BLOCK)


def loss_and_gradients(model, autocast, **kwargs):
    blocks = torch.randint(0, VOCABULARY, (BATCH, BLOCK), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=blocks, labels=blocks, **kwargs).loss
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


def distance(one, other):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("autocast", "of_loss", "of_gradients"), [(False, 1e-6, 1e-6), (True, 1e-4, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("total", [None, 500])
def test_losses_and_gradients_are_those_of_the_stock_path(
    kind, tmp_path, monkeypatch, autocast, of_loss, of_gradients, total
):
    """Four chunks of 48 tokens against all logits at once; num_items_in_batch as the stock Trainer passes it."""
    stock, fast = pair(kind, tmp_path, monkeypatch)
    assert speed.loss_chunks(BATCH * BLOCK, VOCABULARY) == 4
    kwargs = {} if total is None else {"num_items_in_batch": torch.tensor(total)}
    want, wanted = loss_and_gradients(stock, autocast, **kwargs)
    got, gotten = loss_and_gradients(fast, autocast, **kwargs)
    assert got == pytest.approx(want, rel=of_loss)
    assert distance(gotten, wanted) < of_gradients


def test_a_wrong_scale_of_the_logits_is_seen(tmp_path, monkeypatch):
    """The comparison above can fail: without logits_scaling the loss is another one."""
    stock, fast = pair("dense", tmp_path, monkeypatch)
    fast.config.logits_scaling = 1.0
    assert loss_and_gradients(fast, False)[0] != pytest.approx(loss_and_gradients(stock, False)[0], rel=1e-3)


def test_ignored_labels_count_neither_in_the_sum_nor_in_the_mean(tmp_path, monkeypatch):
    stock, fast = pair("dense", tmp_path, monkeypatch)
    blocks = torch.randint(0, VOCABULARY, (BATCH, BLOCK))
    labels = blocks.masked_fill(torch.rand(BATCH, BLOCK) < 0.3, -100)
    assert fast(input_ids=blocks, labels=labels).loss.item() == pytest.approx(
        stock(input_ids=blocks, labels=labels).loss.item(), rel=1e-6
    )


def test_only_one_chunk_of_logits_is_alive(tmp_path, monkeypatch):
    """No tensor as large as the logits of two chunks is made; the stock path makes those of the whole batch."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                is_logits = isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,)
                if is_logits and tensor.shape != (SHAPE["hidden_size"], VOCABULARY):  # the head's weight, transposed
                    self.rows = max(self.rows, tensor.numel() // VOCABULARY)
            return out

    found = []
    for model in pair("dense", tmp_path, monkeypatch):
        with Largest() as largest:
            loss_and_gradients(model, False)
        found.append(largest.rows)
    assert found == [BATCH * BLOCK, BATCH * BLOCK // 4]


def test_small_logits_and_evaluation_are_left_to_the_stock_path(tmp_path, monkeypatch):
    stock, fast = pair("dense", tmp_path, monkeypatch, chunk_tokens=BATCH * BLOCK)
    assert loss_and_gradients(fast, False)[0] == loss_and_gradients(stock, False)[0]
    assert "forward" not in vars(fast.lm_head)
    stock, fast = pair("dense", tmp_path, monkeypatch)
    blocks = torch.randint(0, VOCABULARY, (2, BLOCK))
    want, got = (m.eval()(input_ids=blocks, labels=blocks) for m in (stock, fast))
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-6)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-6)


def test_experts_are_multiplied_in_the_type_of_autocast(tmp_path, monkeypatch):
    """torch casts grouped_mm on no device by itself: the stock path multiplies fp32 experts in fp32."""

    class Types(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
            if "grouped_mm" in str(func):
                self.seen |= {args[0].dtype, args[1].dtype}
            return func(*args, **(kwargs or {}))

    stock, fast = pair("moe", tmp_path, monkeypatch)
    for model, autocast, kind in (
        (stock, True, torch.float32),
        (fast, True, torch.bfloat16),
        (fast, False, torch.float32),
    ):
        with Types() as types:
            loss_and_gradients(model, autocast)
        assert types.seen == {kind}


def test_a_saved_config_says_nothing_of_the_fast_path(tmp_path, monkeypatch):
    stock, fast = pair("moe", tmp_path, monkeypatch)
    fast.save_pretrained(tmp_path / "fast")
    stock.save_pretrained(tmp_path / "stock")
    assert (tmp_path / "fast/config.json").read_bytes() == (tmp_path / "stock/config.json").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fast")
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize(
    ("kind", "autocast", "checkpointing", "backend"),
    [
        ("dense", False, False, "inductor"),
        *[(kind, autocast, False, "aot_eager") for kind in MODELS for autocast in (False, True)],
        *[(kind, True, True, "aot_eager") for kind in MODELS],
    ],
)
def test_compiled_layers_compute_the_same(kind, tmp_path, monkeypatch, autocast, checkpointing, backend):
    """The layers share their graphs; the names of the weights stay; the balancing loss is in the loss still.

    The graphs are the same whatever is made of them, and inductor takes ten seconds and more for each, in bf16 the longest.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    stock, fast = pair(kind, tmp_path, monkeypatch, torch_compile=True, torch_compile_backend=backend)
    if checkpointing:
        getattr(fast, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    want, wanted = loss_and_gradients(stock, autocast)
    got, gotten = loss_and_gradients(fast, autocast)
    assert got == pytest.approx(want, rel=2e-4 if autocast else 1e-6)
    assert distance(gotten, wanted) < (3e-2 if autocast else 1e-5)
    assert fast.state_dict().keys() == stock.state_dict().keys()
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == {"dense": 2, "moe": 4}[kind]
    )  # for any number of layers, and one of the loss
    assert not torch._dynamo.utils.counters["graph_break"]


WAITS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "nonzero", "cpu", "numpy")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_no_step_waits_for_the_device_between_logs(kind, sections, tmp_path, monkeypatch):
    """Every call in training that needs a value from the device, with its caller: the logs' and the end's alone.

    The stock attention masks would wait once in each micro-batch.
    """
    model = {"model_type": kind} | ({"num_local_experts": 4} if kind == "mixtral" else {})
    counted = Counter()

    def counting(name, plain):
        def call(self, *args, **kwargs):
            counted["/".join(f.name for f in traceback.extract_stack()[-6:-1])] += 1
            return plain(self, *args, **kwargs)

        return call

    def training(trainer, *args, plain=PowerTrainer.train, **kwargs):
        with monkeypatch.context() as patch:
            for name in WAITS:
                patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
            return plain(trainer, *args, **kwargs)

    monkeypatch.setattr(PowerTrainer, "train", training)

    def run(folder):
        counted.clear()
        given = sections(tmp_path / folder, logging_steps=6, save_strategy="no", gradient_accumulation_steps=2)
        given["training"] |= {"bf16": True, "use_cpu": True}
        given["model"] |= model
        given["run"]["tokens"] *= 2
        train.pretrain(Settings.from_dict(given))
        return Counter(
            {where: n for where, n in counted.items() if "DataLoader" not in where and "_get_iterator" not in where}
        )

    fast = run("fast")
    assert set(
        map(lambda where: next(p for p in ("_maybe_log_save_evaluate", "_finalize_training") if p in where), fast)
    )
    assert (
        sum(n for where, n in fast.items() if "_maybe_log" in where) <= 4 * 2
    )  # loss, norm of the gradient, experts, skipped steps
    monkeypatch.setattr(train, "speed_up_", lambda model, *args: model)
    stock = run("stock")
    masks = sum(n for where, n in stock.items() if "find_packed_sequence_indices" in where)
    assert masks == 24
    assert not any("find_packed" in where for where in fast)


@pytest.mark.slow
def test_flops_of_a_run_are_its_own_count(sections, tmp_path):
    """6 x (matrices + attention) by hand for the model of the fixture, over the tokens of the run."""
    folder = tmp_path / "run"
    run = train.pretrain(Settings.from_dict(sections(folder, save_steps=12))).to_json()
    per_layer = 4 * 32 * 32 + 3 * 32 * 80 + 32 * 32
    assert run["flops_per_token"] == 6 * (2 * per_layer + 400 * 32)
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["total_flos"] == run["flops_per_token"] * run["total_tokens"]
