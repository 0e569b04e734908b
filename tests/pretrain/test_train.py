import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from processes import SHARED_BATCHES
from safetensors.torch import load_file
from sentences import refused
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from warm import python

from hf_power import Recipe, power_lr
from hf_power.checkpoints.seal import seal
from hf_power.data.packing import pack
from hf_power.data.text import load_text
from hf_power.data.tokenizer import tokenizer_fingerprint
from hf_power.pretrain import run as train
from hf_power.pretrain.anneal import anneal
from hf_power.pretrain.start import tokens_per_step
from hf_power.pretrain.trainer import REPLACED, PowerTrainer
from hf_power.settings.settings import Settings

PER_STEP = 128  # 4 blocks of 32 tokens


def losses(run, first=0):
    return {p["step"]: p["loss"] for p in run["loss_curve"] if "loss" in p and p["step"] > first}


def rates(run, first=0):
    return {p["step"]: p["learning_rate"] for p in run["loss_curve"] if "loss" in p and p["step"] > first}


@pytest.fixture(scope="module")
def trunk(sections, tmp_path_factory):
    """An open-ended trunk of 12 steps with checkpoints at 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("runs") / "trunk"
    kwargs = {"a": 8.0, "decay_ratio": 0.0}
    return folder, train.pretrain(Settings.from_dict(sections(folder, lr_scheduler_kwargs=kwargs))).to_json()


@pytest.mark.slow
def test_run_json_is_what_was_trained(trunk):
    folder, run = trunk
    assert json.loads((folder / "run.json").read_text()) == run
    assert (run["status"], run["tokens_seen"], run["tokens_per_step"], run["steps"]) == ("finished", 1536, PER_STEP, 12)
    assert run["parameters"] == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert [g["base_lr"] for g in run["groups"]] == [0.01, 0.005, 0.01]
    assert losses(run)[12] < losses(run)[1] - 0.05


def test_run_json_gives_every_learning_rate(trunk):
    """The record alone, through the pure function, gives what was logged; the rate of step k is eta((k - 1) * batch)."""
    _, run = trunk
    assert len(rates(run)) == 12
    for step, rate in rates(run).items():
        assert rate == pytest.approx(power_lr((step - 1) * PER_STEP, **run["schedule"]), rel=1e-12)
        law = min(0.01, 8 * (PER_STEP / 4096) * ((step - 1) * PER_STEP) ** -0.51) if step > 3 else None
        assert law is None or rate == pytest.approx(law, rel=1e-12)


def test_held_out_loss_is_that_of_the_saved_model(trunk, sections):
    """A plain PyTorch loop over the same blocks."""
    folder, run = trunk
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    data = Settings.from_dict(sections(folder)).data
    blocks = pack(load_text(data)[1], tokenizer, block_size=32)
    rows = [i * len(blocks) // 20 for i in range(20)]  # 640 tokens at even distances
    blocks = torch.tensor(np.array([blocks[i]["input_ids"] for i in rows])).long()
    with torch.no_grad():
        logits = model(blocks).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    assert run["held_out_loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_balancing_loss_is_no_larger_with_accumulation_and_not_in_the_held_out_loss(sections, tmp_path):
    """A mixture of experts: the first loss of batch 4 x 1 and of 1 x 4 is that of the same weights and blocks."""
    first = []
    for batch, accumulation in ((4, 1), (1, 4)):
        folder = tmp_path / str(batch)
        sec = sections(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        sec["model"] |= {"model_type": "mixtral", "intermediate_size": 16, "num_local_experts": 4}
        sec["model"]["model_config"] = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
        run = train.pretrain(Settings.from_dict(sec)).to_json()
        first.append(losses(run)[1])
    assert first[0] == pytest.approx(first[1], abs=1e-3)  # balance is counted within each micro-batch

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert model.config.output_router_logits
    blocks = pack(load_text(Settings.from_dict(sec).data)[1], tokenizer, block_size=32)
    rows = [i * len(blocks) // 20 for i in range(20)]
    blocks = torch.tensor(np.array(blocks[rows]["input_ids"])).long()
    with torch.no_grad():
        out = model(blocks, labels=blocks)
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
    assert run["held_out_loss"] == pytest.approx(float(loss), rel=1e-5)
    last = next(point for point in reversed(run["loss_curve"]) if "loss" in point)
    assert last["aux_loss"] == pytest.approx(2, rel=0.1)
    assert 1 <= last["load_max"] <= 2  # of 4 experts, of which each token takes 2
    assert float(out.loss - loss) == pytest.approx(0.1 * 2, rel=0.1)  # nearly balanced: num_experts_per_tok


@pytest.mark.slow
def test_model_loads_without_hf_power(trunk, tmp_path):
    folder, _ = trunk
    code = f"""
import sys
sys.modules["hf_power"] = None  # import hf_power fails from here on
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained({str(folder)!r}), AutoTokenizer.from_pretrained({str(folder)!r})
torch.load({str(folder / "training_args.bin")!r}, weights_only=False).to_dict()
torch.save(model(**tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)).logits, sys.argv[1])
"""
    subprocess.run([python(stock=True), "-c", code, str(tmp_path / "logits.pt")], check=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    here = model(**tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)).logits
    torch.testing.assert_close(here, torch.load(tmp_path / "logits.pt"), rtol=1e-5, atol=1e-6)  # threads may differ


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [4, 8])
def test_stop_and_resume_is_bit_equal(trunk, sections, tmp_path, checkpoint):
    folder, whole = trunk
    kwargs = {"a": 8.0, "decay_ratio": 0.0}
    again = sections(tmp_path / "again", lr_scheduler_kwargs=kwargs)
    again["training"]["resume_from_checkpoint"] = str(folder / f"checkpoint-{checkpoint}")
    resumed = train.pretrain(Settings.from_dict(again)).to_json()
    assert losses(resumed, checkpoint) == losses(whole, checkpoint)
    assert rates(resumed, checkpoint) == rates(whole, checkpoint)
    a, b = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def moe_sections(sections, folder, **training):
    made = sections(folder, **training)
    made["model"] |= {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 16}
    return made


@pytest.mark.slow
def test_the_best_mixture_is_loaded_whole(sections, tmp_path):
    """load_best_model_at_end where the largest loss counts as the best, so that it is not the last checkpoint's."""
    best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "greater_is_better": True}
    run = train.pretrain(Settings.from_dict(moe_sections(sections, tmp_path / "run", **best))).to_json()
    state = json.loads((tmp_path / "run/checkpoint-12/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-4"
    assert run["held_out_loss"] == pytest.approx(state["best_metric"], rel=1e-6)


@pytest.mark.slow
def test_weights_in_several_files_are_resumed(trunk, sections, tmp_path):
    """A checkpoint whose model was saved in shards; it is sealed anew."""
    folder, whole = trunk
    checkpoint = tmp_path / "run" / "checkpoint-8"
    shutil.copytree(folder / "checkpoint-8", checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20kB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    kwargs = {"a": 8.0, "decay_ratio": 0.0}
    again = sections(tmp_path / "run", resume_from_checkpoint="true", lr_scheduler_kwargs=kwargs)
    assert losses(train.pretrain(Settings.from_dict(again)).to_json()) == losses(whole)


@pytest.mark.slow
def test_accumulation_is_a_larger_batch(sections, tmp_path):
    """Batch 1 x accumulation 8 = batch 8 x accumulation 1, but for the order of a sum."""
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        sec = sections(tmp_path / f"b{batch}", per_device_train_batch_size=batch, tokens=8 * 256)
        sec["training"]["gradient_accumulation_steps"] = accumulation
        runs.append(train.pretrain(Settings.from_dict(sec)).to_json())
    assert rates(runs[0]) == rates(runs[1])
    assert list(losses(runs[0]).values()) == pytest.approx(list(losses(runs[1]).values()), abs=2e-5)


@pytest.mark.slow
def test_anneal_finishes_a_model_and_the_trunk_goes_on(trunk, sections, tmp_path):
    folder, whole = trunk
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    done = anneal(folder / "checkpoint-8", "20%", output_dir=str(tmp_path / "done")).to_json()
    assert (done["kind"], done["parent"]) == ("anneal", "trunk/checkpoint-8")
    assert (done["tokens_seen"], done["steps"]) == (1024 + 256, 10)  # 20 % of 1280
    start = min(0.01, 8 * PER_STEP / 4096 * 1024**-0.51)
    tail = [start * (math.exp(1 - x) - 1) / (math.e - 1) for x in (0.0, 0.5)]
    assert list(rates(done, 8).values()) == pytest.approx(tail, rel=1e-12)
    assert losses(done, 8)[9] == losses(whole, 8)[9]  # same weights, same next blocks
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

    linear = anneal(folder / "checkpoint-8", "256", str(tmp_path / "linear"), decay_shape="linear").to_json()
    assert list(rates(linear, 8).values()) == pytest.approx([start, start / 2], rel=1e-12)


@pytest.mark.slow
def test_every_group_is_logged(sections, tmp_path, monkeypatch):
    """A tracker, which is a callback, gets tokens and the learning rate of each group at each log."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            seen.append([g["lr"] for g in optimizer.param_groups])

    make = train._trainer
    monkeypatch.setattr(train, "_trainer", lambda *a: (t := make(*a), t.add_callback(Tracker))[0])
    train.pretrain(Settings.from_dict(sections(tmp_path / "run", tokens=6 * 128)))
    steps = [entry for entry in seen if isinstance(entry, list)]
    logs = [entry for entry in seen if isinstance(entry, dict) and "loss" in entry]
    assert len(steps) == len(logs) == 6
    for i, (used, log) in enumerate(zip(steps, logs, strict=True)):
        assert [log[f"lr/{name}"] for name in ("embedding", "hidden", "vector")] == pytest.approx(used, rel=1e-12)
        assert log["tokens_seen"] == (i + 1) * PER_STEP
        assert log["tokens_per_second"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"model": {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 16}},
        {"data": {"streaming": True}},
        {"mup": {"mup": False}},
        {"training": {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": None}},
    ],
    ids=["moe", "streaming", "without muP", "cosine"],
)
def test_other_kinds_of_runs_learn(change, sections, tmp_path):
    sec = sections(tmp_path / "run", tokens=24 * 128)
    for section, values in change.items():
        sec[section] |= values
    if change.get("data"):
        sec["data"] |= {"num_proc": None, "eval_fraction": 0.2}
    run = train.pretrain(Settings.from_dict(sec)).to_json()
    assert run["tokens_seen"] == 24 * 128
    assert losses(run)[max(losses(run))] < losses(run)[1]


@pytest.mark.slow
def test_plan_is_printed_before_the_first_step(sections, tmp_path, capsys):
    train.pretrain(Settings.from_dict(sections(tmp_path / "run")))
    plan = capsys.readouterr().out
    for words in ("parameters ", "1,536 in 12 steps", "128 tokens per step (beta = 0.03125)", "GB are free"):
        assert words in plan
    assert "first step                    0 tokens   lr 0.000e+00" in plan
    assert "end of warmup               256 tokens   lr 1.000e-02" in plan
    assert "end                       1,536 tokens" in plan


def test_refusals_come_before_anything_is_written(trunk, sections, tmp_path):
    folder, _ = trunk

    def start(match, kind=ValueError, **training):
        with pytest.raises(kind, match=match):
            train.pretrain(Settings.from_dict(sections(tmp_path / "new", **training)))
        assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())

    start("holds a run already: pass --resume_from_checkpoint true", output_dir=str(folder))
    start("holds a run already", output_dir=str(folder.parent / "trunk"), resume_from_checkpoint="other/checkpoint-4")
    start("there is no checkpoint at nowhere: pass", FileNotFoundError, resume_from_checkpoint="nowhere")
    start("has seen 1,536 tokens, the run is to have 1,536", resume_from_checkpoint=str(folder / "checkpoint-12"))
    start("tokens must be positive", tokens=0)
    start("tokens is missing", tokens=None)
    start("a warmup of 12,800 tokens does not fit before token 1,382, where the decay starts", warmup_steps=100)
    start("a, the scale of the power law, must be positive, got -1", lr_scheduler_kwargs={"a": -1})
    with pytest.raises(ValueError, match="must be a percentage between 0% and 100% or a number"):
        anneal(folder / "checkpoint-8", "120%", str(tmp_path / "new"))
    with pytest.raises(ValueError, match="holds a run already"):
        anneal(folder / "checkpoint-8", "10%", str(folder))


@pytest.mark.slow
def test_anneal_refuses_what_is_no_trunk(sections, tmp_path):
    train.pretrain(Settings.from_dict(sections(tmp_path / "done")))
    with pytest.raises(ValueError, match="checkpoint-12 lies in its run's own decay, which began at token 1,382: take"):
        anneal(tmp_path / "done" / "checkpoint-12", "10%", str(tmp_path / "a"))
    weights = tmp_path / "done" / "checkpoint-12" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint-12 cannot be used: model.safetensors has \d+ bytes instead of"):
        anneal(tmp_path / "done" / "checkpoint-12", "10%", str(tmp_path / "a"))
    sec = sections(tmp_path / "cosine", lr_scheduler_type="cosine", lr_scheduler_kwargs=None)
    train.pretrain(Settings.from_dict(sec))
    with pytest.raises(ValueError, match="checkpoint-4 was not trained under the power schedule: anneal takes"):
        anneal(tmp_path / "cosine" / "checkpoint-4", "10%", str(tmp_path / "a"))


@pytest.mark.parametrize(("package", "extra"), [("datasets", "train"), ("matplotlib", "plots")])
def test_a_missing_package_is_named_with_its_extra(package, extra, sections, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'{package} is needed .* run pip install "hf_power\[{extra}\]"'):
        train.pretrain(Settings.from_dict(sections(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def recipe(trunk, tmp_path):
    """A recipe for the trunk's proxies; `change` replaces some of its numbers."""
    tokenizer = trunk[1]["data"]["tokenizer"]
    law = {"a": 0.4, "b": -0.3, "batch_exponent": 0.5, "critical_batch_tokens": 64.0}
    tuned = Recipe(
        a=0.5,
        b=-0.25,
        batch_exponent=0.5,
        critical_batch_tokens=64.0,
        base_width=16,
        model_type="llama",
        tokenizer=tokenizer,
        warmup_tokens=256,
        decay_ratio=0.25,
        decay_shape="linear",
        laws={"warmup_stable_decay": law, "cosine": law},
        validity={"widths": [16], "tokens": [512, 768], "tokens_per_step": [128, 256]},
    )

    def write(**change):
        replace(tuned, **change).save(tmp_path / "recipe.json")
        return str(tmp_path / "recipe.json")

    return write


def with_recipe(sections, folder, recipe, **training):
    sec = sections(folder, **training)
    for name in ("learning_rate", "lr_scheduler_kwargs", "warmup_steps"):
        if name not in training:
            del sec["training"][name]
    sec["run"]["recipe"] = recipe
    return Settings.from_dict(sec)


@pytest.mark.slow
def test_a_run_takes_the_recipe_s_numbers(recipe, sections, tmp_path, capsys):
    """Warmup of 256 tokens, the law above its critical batch of 64 tokens, a linear tail over the last quarter."""
    run = train.pretrain(with_recipe(sections, tmp_path / "run", recipe())).to_json()
    top = [min(0.02, 0.5 * (64 / 4096) ** 0.5 * n**-0.25) if n else 0.02 for n in range(0, 1536, PER_STEP)]
    expected = [0, top[2] / 2, *top[2:9], *(top[9] * (1 - x / 3) for x in range(3))]
    assert list(rates(run).values()) == pytest.approx(expected, rel=1e-12)
    out = capsys.readouterr().out
    assert "  WARNING      1,536 tokens are 2 times the largest, 768, of the sweep." in out
    assert "  WARNING      the width 32 is 2 times the largest, 16, of the sweep" in out
    assert "  WARNING      128 tokens per step are 2 times the critical batch, 64" in out


@pytest.mark.slow
def test_a_schedule_with_a_horizon_takes_its_peak_from_the_recipe(recipe, sections, tmp_path):
    """Peak 0.4 * (64 / 4096)**0.5 * 1536**-0.3, cap 0.02, of a linear warmup, a plateau and a linear tail of 3 steps."""
    peak = 0.4 * (64 / 4096) ** 0.5 * 1536**-0.3
    settings = with_recipe(sections, tmp_path / "run", recipe(), lr_scheduler_type="warmup_stable_decay")
    run = train.pretrain(settings).to_json()
    expected = [0, 0.5, *[1] * 7, 1, 2 / 3, 1 / 3]
    assert list(rates(run).values()) == pytest.approx([peak * x for x in expected], rel=1e-9)
    assert run["settings"]["training"]["learning_rate"] == pytest.approx(peak)

    given = with_recipe(
        sections, tmp_path / "given", recipe(), lr_scheduler_type="cosine", learning_rate=0.003, warmup_steps=3
    )
    assert max(rates(train.pretrain(given).to_json()).values()) == pytest.approx(0.003)

    unknown = with_recipe(sections, tmp_path / "no", recipe(), lr_scheduler_type="linear")
    with refused(ValueError, "no law for linear, only for warmup_stable_decay, cosine"):
        train.pretrain(unknown)


def test_another_tokenizer_than_the_recipe_s_is_refused(recipe, trunk, sections, tmp_path):
    with refused(
        ValueError, f"the tokenizer of the run is {trunk[1]['data']['tokenizer']}, that of the recipe 0123456789abcdef"
    ):
        train.pretrain(with_recipe(sections, tmp_path / "run", recipe(tokenizer="0123456789abcdef")))
    assert not (tmp_path / "run").exists()


def test_fingerprint_of_a_tokenizer(trunk, corpus):
    """The same after saving, padding and truncation; that of the saved file; another one for another vocabulary."""
    folder, run = trunk
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.no_padding()
    raw.no_truncation()
    assert run["data"]["tokenizer"] == hashlib.sha256(raw.to_str().encode()).hexdigest()[:16]
    for path in (folder, folder / "checkpoint-4"):
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
        assert tokenizer_fingerprint(tokenizer) == run["data"]["tokenizer"]
    tokenizer.add_tokens(["another"])
    assert tokenizer_fingerprint(tokenizer) != run["data"]["tokenizer"]


@SHARED_BATCHES
def test_processes_that_share_a_batch_share_its_tokens(sections, tmp_path, monkeypatch, sizes, data_parallel):
    """4 blocks of 32 tokens, 3 times, for each data-parallel group of 8 processes."""
    settings = Settings.from_dict(sections(tmp_path / "run", gradient_accumulation_steps=3))
    settings.training.parallelism_config = ParallelismConfig(**sizes)
    monkeypatch.setattr(TrainingArguments, "world_size", 8)
    assert tokens_per_step(settings) == data_parallel * 3 * PER_STEP


def test_processes_that_do_not_know_of_each_other_are_refused(sections, tmp_path, monkeypatch):
    settings = Settings.from_dict(sections(tmp_path / "run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ValueError, "has started 2 processes, and each takes itself for the only one: set ACCELERATE_USE_CPU"):
        train.pretrain(settings)
    assert not (tmp_path / "run").exists()


def test_every_method_that_power_trainer_replaces_is_checked_at_import():
    own = {name for name, value in vars(PowerTrainer).items() if callable(value) and not name.startswith("__")}
    assert set(REPLACED) == {name for name in own if hasattr(Trainer, name)}
    assert own - set(REPLACED) == {"_stop_if_too_many", "_go_on_with_log", "_since_log", "_save_sharded"}
