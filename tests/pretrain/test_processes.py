"""Several processes on gloo: the same global batch gives the same losses, however the run is split, stopped or sharded."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from hub import Hub, hub_environment
from processes import free_port, said_by, torchrun
from safetensors.torch import load_file
from sentences import refused
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import ROOT

from hf_power.checkpoints.seal import problems
from hf_power.data.order import collate_blocks
from hf_power.data.packing import pack_both
from hf_power.data.text import load_text
from hf_power.pretrain import run as train
from hf_power.pretrain.anneal import anneal
from hf_power.settings.settings import Settings

CONFIGS = ROOT / "scripts" / "accelerate"
STEPS = 24
HALF = f"checkpoint-{STEPS // 2}"

# scripts/pretrain.py where accelerate shards on a CPU too. Of itself it drops the FSDP plugin there without a word
# (AcceleratorState.__init__ keeps it for the types MULTI_GPU, MULTI_NPU ... only); everything else is as it is on GPUs.
SHARDED_SCRIPT = """
import sys
import accelerate.state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

init = accelerate.state.AcceleratorState.__init__

def sharding_init(self, *args, fsdp_plugin=None, **kwargs):
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

class Shards(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        parameters = list(model.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in parameters}
        mine, whole = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
        assert mine * args.world_size == whole
        if state.global_step == state.max_steps:
            print("sharded to the end", flush=True)

accelerate.state.AcceleratorState.__init__ = sharding_init
trainer_init = Trainer.__init__

def watched_init(self, *args, callbacks=(), **kwargs):
    trainer_init(self, *args, callbacks=[Shards(), *callbacks], **kwargs)

Trainer.__init__ = watched_init

import os
from hf_power.pretrain import speed
from hf_power.cli import run_verb

speed.LOGITS_BYTES = int(os.environ.get("LOGITS_BYTES", speed.LOGITS_BYTES))
sys.exit(run_verb("pretrain"))
"""

# The real script, with a second process that is slow to write its part of a checkpoint.
SLOW_SCRIPT = """
import sys
import time
from transformers import Trainer

save = Trainer._save_rng_state

def slow_save(self, folder):
    time.sleep(1.0 if self.args.process_index else 0.0)
    save(self, folder)

Trainer._save_rng_state = slow_save

from hf_power.cli import run_verb

sys.exit(run_verb("pretrain"))
"""


def accelerate(config, *command, **env):
    """Output of a command; ACCELERATE_USE_CPU because `use_cpu` of a config file does not reach several processes."""
    where = ["--config_file", CONFIGS / config, "--main_process_port", free_port()]
    return said_by("-m", "accelerate.commands.launch", *where, *command, ACCELERATE_USE_CPU="true", **env)


def sharded(base, *flags, processes=2, state="FULL_STATE_DICT", **env):
    """The run under scripts/accelerate/fsdp2.yaml, for so many processes without a GPU."""
    (base / "sharded.py").write_text(SHARDED_SCRIPT)
    given = ["--num_processes", processes, "--mixed_precision", "no", "--fsdp_state_dict_type", state]
    split = ["--per_device_train_batch_size", 4 // processes]
    return accelerate(
        "fsdp2.yaml", *given, *flags[:-1], base / "sharded.py", base / "tiny.yaml", *split, *flags[-1], **env
    )


def record(folder):
    return json.loads((folder / "run.json").read_text())


def losses(folder):
    return [point["loss"] for point in record(folder)["loss_curve"] if "loss" in point]


def without_size(group):
    """DeepSpeed's optimizer holds flat pieces of parameters, so that their number is not known there."""
    return {key: value for key, value in group.items() if key != "parameters"}


def same(folder, other, tolerance=1e-5, steps=STEPS):
    """The same run: losses, learning rates, groups and the held-out loss."""
    run, twin = record(folder), record(other)
    rates = [[point.get("learning_rate") for point in r["loss_curve"]] for r in (run, twin)]
    assert rates[0] == rates[1]
    assert len(losses(folder)) == steps
    assert losses(folder) == pytest.approx(losses(other), abs=tolerance)
    assert [without_size(group) for group in run["groups"]] == [without_size(group) for group in twin["groups"]]
    assert run["tokens_per_step"] == twin["tokens_per_step"] == 128
    assert run["held_out_loss"] == pytest.approx(twin["held_out_loss"], abs=tolerance)


def stopped(folder, copy):
    """A copy of a run that was killed after its first checkpoint."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / f"checkpoint-{STEPS}")
    return copy


@pytest.fixture(scope="module")
def base(sections, tmp_path_factory):
    """A folder with the settings, and in `one` the run of a single process that every other is compared with."""
    folder = tmp_path_factory.mktemp("processes")
    settings = sections(folder / "one", STEPS * 128, save_steps=STEPS // 2, report_to="none", use_cpu=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    train.pretrain(Settings.from_dict(settings))
    return folder


@pytest.fixture(scope="module")
def two(base):
    """The same run on two processes, by cpu.yaml."""
    split = ["--per_device_train_batch_size", "2"]
    accelerate("cpu.yaml", "scripts/pretrain.py", base / "tiny.yaml", *split, "--output_dir", base / "two")
    return base / "two"


@pytest.fixture(scope="module")
def two_shards(base):
    """The same run on two processes under FSDP2."""
    assert "sharded to the end" in sharded(base, ["--output_dir", base / "shards"])
    return base / "shards"


def settings_of(base, **training):
    sections = yaml.safe_load((base / "tiny.yaml").read_text())
    sections["training"] |= training
    return Settings.from_dict(sections)


@pytest.mark.slow
def test_two_processes_are_one(base, two):
    same(two, base / "one")
    assert record(two)["groups"] == record(base / "one")["groups"]
    assert record(two)["hardware"]["processes"] == 2
    logs = json.loads((two / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in logs if "lr/hidden" in entry]
    assert len(logs) == STEPS
    for entry in logs:  # the model is twice as wide as base_width
        assert entry["lr/hidden"] == pytest.approx(entry["learning_rate"] / 2, rel=1e-12)
        assert [entry["lr/vector"], entry["lr/embedding"]] == pytest.approx([entry["learning_rate"]] * 2, rel=1e-12)


@pytest.mark.slow
def test_held_out_loss_counts_each_block_once(base, two):
    """20 blocks do not fill batches of 8 on two processes; the stock loop is wrong by 0.007 nats there."""
    data = settings_of(base).data
    tokenizer = AutoTokenizer.from_pretrained(two)
    held_out = pack_both(data, tokenizer, load_text(data), 640).held_out
    assert len(held_out) == 20
    model = AutoModelForCausalLM.from_pretrained(two)
    blocks = [collate_blocks([held_out[i]]) for i in range(len(held_out))]
    with torch.no_grad():
        mean = sum(model(**block).loss.item() for block in blocks) / len(blocks)
    assert record(two)["held_out_loss"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.slow
def test_the_clipped_norm_of_folded_multipliers_is_the_same_in_shards(base):
    """A head with 1/4 folded in, every step clipped: FSDP2 has other tensors in a pass than those that the optimizer was made of."""
    folder = base / "folded"
    folder.mkdir()
    made = settings_of(base, output_dir=str(folder / "one"), max_grad_norm=0.05, save_strategy="no").to_dict()
    shape = {
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_size": 32,
    }
    shape |= {"intermediate_size": 80, "num_hidden_layers": 2, "tie_word_embeddings": False}
    made["model"], made["mup"] = {"model_type": "any", "model_config": shape}, {"base_width": 8}
    made["run"]["tokens"], made["training"]["output_dir"] = 6 * 128, str(folder / "one")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(made))
    train.pretrain(Settings.from_dict(made))
    split = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1"]
    assert "sharded to the end" in sharded(folder, [*split, "--output_dir", folder / "shards"])
    curves = [
        [(p["loss"], p["grad_norm"]) for p in record(folder / name)["loss_curve"] if "loss" in p]
        for name in ("one", "shards")
    ]
    assert len(curves[0]) == 6
    for one, other in zip(*curves, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_accumulation_and_activation_checkpointing_under_torchrun(base):
    flags = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    flags += ["--activation_checkpointing", "True", "--output_dir", base / "accumulated"]
    torchrun("scripts/pretrain.py", base / "tiny.yaml", *flags)
    same(base / "accumulated", base / "one")


@pytest.mark.slow
def test_resume_from_two_processes_to_one_and_back(base, two):
    folder = stopped(two, base / "two-one")
    train.pretrain(settings_of(base, output_dir=str(folder), resume_from_checkpoint="true"))
    same(folder, base / "one", 2e-5)
    folder = stopped(base / "one", base / "one-two")
    flags = ["--per_device_train_batch_size", "2", "--resume_from_checkpoint", "true", "--output_dir", folder]
    accelerate("cpu.yaml", "scripts/pretrain.py", base / "tiny.yaml", *flags)
    same(folder, base / "one", 2e-5)
    assert record(folder)["hardware"]["processes"] == 2


@pytest.mark.slow
def test_anneal_on_two_processes(base, two):
    """The trunk's checkpoint is of one process or of two, the tail of two or of one."""
    tail = ["--tokens", "512", "--output_dir", base / "tail-two"]
    # the settings of a checkpoint are those of its run: 2 blocks on each of two processes
    accelerate("cpu.yaml", "scripts/anneal.py", "--from", two / HALF, *tail)
    anneal(base / "one" / HALF, "512", str(base / "tail-one"))
    same(base / "tail-two", base / "tail-one", 2e-5, steps=STEPS // 2 + 4)


@pytest.mark.slow
def test_a_checkpoint_is_sealed_when_every_process_has_written_its_part(base):
    (base / "slow.py").write_text(SLOW_SCRIPT)
    flags = ["--tokens", "1024", "--save_steps", "4", "--per_device_train_batch_size", "2"]
    flags += ["--output_dir", base / "slow"]
    accelerate("cpu.yaml", base / "slow.py", base / "tiny.yaml", *flags)
    for step in (4, 8):
        checkpoint = base / "slow" / f"checkpoint-{step}"
        sealed = set(json.loads((checkpoint / "manifest.json").read_text())["files"])
        assert sealed == {p.name for p in checkpoint.iterdir()} - {"manifest.json"}
        assert {"rng_state_0.pth", "rng_state_1.pth"} < sealed
        assert problems(checkpoint) == []


@pytest.mark.slow
def test_shards_are_one_model(base, two_shards):
    """FSDP2: parameters and optimizer are DTensors of half the size (the script asserts it at every step)."""
    same(two_shards, base / "one")
    assert record(two_shards)["groups"] == record(base / "one")["groups"]
    for folder in (two_shards, two_shards / f"checkpoint-{STEPS}"):
        weights, whole = load_file(folder / "model.safetensors"), load_file(base / "one" / "model.safetensors")
        assert weights.keys() == whole.keys()
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, whole[name], atol=1e-4, rtol=0)
        assert not (folder / "manifest.json").exists() or problems(folder) == []


@pytest.mark.slow
def test_losses_in_chunks_reach_a_sharded_head(base, two_shards):
    """The head is sharded with the embedding; 64 tokens of a process in four chunks, computed again in the backward pass."""
    vocabulary = json.loads((two_shards / "config.json").read_text())["vocab_size"]
    assert "to the end" in sharded(base, ["--output_dir", base / "chunked"], LOGITS_BYTES=str(4 * 16 * vocabulary))
    same(base / "chunked", two_shards)


def experts_run(base, name, coefficient, **training):
    """The run with experts in place of its MLP and this coefficient of their balancing loss, on one process in `one`."""
    folder = base / name
    folder.mkdir()
    sections = yaml.safe_load((base / "tiny.yaml").read_text())
    sections["model"] |= {"model_type": "mixtral", "intermediate_size": 16, "num_local_experts": 4}
    sections["model"]["model_config"] = {"output_router_logits": True, "router_aux_loss_coef": coefficient}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections))
    train.pretrain(settings_of(folder, output_dir=str(folder / "one"), **training))
    return folder


@pytest.fixture(scope="module")
def halves(base):
    """Experts that are balanced within each half of a batch: `one` accumulates two, `two` has them on two processes."""
    folder = experts_run(base, "halves", 0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert "sharded to the end" in sharded(folder, ["--output_dir", folder / "two"])
    return folder


@pytest.mark.slow
def test_shards_of_experts_are_one_model(base):
    """Without the balancing loss; with it they are not, for it is of each process's share (next test)."""
    folder = experts_run(base, "experts", 0.0)
    assert "sharded to the end" in sharded(folder, ["--output_dir", folder / "two"])
    same(folder / "two", folder / "one")
    weights, whole = load_file(folder / "two" / "model.safetensors"), load_file(folder / "one" / "model.safetensors")
    assert weights.keys() == whole.keys()
    assert {tensor.shape[0] for tensor in weights.values() if tensor.ndim == 3} == {4}
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_balancing_loss_is_of_each_share_of_the_batch(halves):
    """So two processes are one that accumulates as many shares; one that takes the batch whole is 3e-3 nats off."""
    one, two = halves / "one", halves / "two"
    same(two, one)
    names = [group["name"] for group in record(two)["groups"]]
    assert sorted(names) == ["embedding", "hidden", "router", "vector"]
    logs = json.loads((two / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in logs if "lr/router" in entry]
    assert len(logs) == STEPS
    for entry, alone in zip(logs, (p for p in record(one)["loss_curve"] if "aux_loss" in p), strict=True):
        rates = [entry["lr/embedding"], 2 * entry["lr/hidden"], 2 * entry["lr/router"], entry["lr/vector"]]
        assert rates == pytest.approx([entry["learning_rate"]] * 4, rel=1e-12)
        for measure in ("aux_loss", "router_entropy_nats"):  # the first process measures its share, the first half
            assert entry[measure] == pytest.approx(alone[measure], abs=1e-4)


@pytest.mark.slow
def test_shards_of_experts_resume(halves):
    folder = stopped(halves / "two", halves / "resumed")
    sharded(halves, ["--resume_from_checkpoint", "true", "--output_dir", folder])
    same(folder, halves / "one", 2e-5)


@pytest.mark.slow
def test_shards_resume_with_activation_checkpointing_and_on_one_process(base, two_shards):
    folder = stopped(two_shards, base / "shards-recomputed")
    recompute = ["--fsdp_activation_checkpointing", "true"]
    sharded(base, *recompute, ["--resume_from_checkpoint", "true", "--output_dir", folder])
    same(folder, base / "one", 2e-5)
    folder = stopped(two_shards, base / "shards-one")
    sharded(base, ["--resume_from_checkpoint", "true", "--output_dir", folder], processes=1)
    same(folder, base / "one", 2e-5)


@pytest.mark.slow
def test_sharded_checkpoints_end_in_a_whole_model(base):
    sharded(base, ["--output_dir", base / "sharded"], state="SHARDED_STATE_DICT")
    same(base / "sharded", base / "one")
    assert not (base / "sharded" / HALF / "model.safetensors").exists()
    folder = stopped(base / "sharded", base / "sharded-one")
    resume = ["--resume_from_checkpoint", "true", "--output_dir", folder]
    sharded(base, resume, processes=1, state="SHARDED_STATE_DICT")
    same(folder, base / "one", 2e-5)
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_a_checkpoint_of_fsdp_is_refused_without_it_and_the_other_way(base, two_shards):
    folder = stopped(two_shards, base / "shards-plain")
    with refused(ValueError, "was saved under FSDP and this run is without it", "accelerate config"):
        train.pretrain(settings_of(base, output_dir=str(folder), resume_from_checkpoint="true"))
    folder = stopped(base / "one", base / "plain-shards")
    out = sharded(base, ["--resume_from_checkpoint", "true", "--output_dir", folder], fails=True)
    assert "was saved without FSDP and this run is under it" in out


@pytest.mark.slow
def test_a_push_of_shards_is_refused(base, tmp_path):
    with Hub() as hub:
        flags = ["--push_to_hub", "True", "--license", "mit", "--output_dir", tmp_path / "run"]
        environment = hub_environment(hub, tmp_path / "home") | {"PYTHONWARNINGS": "ignore"}
        out = sharded(base, flags, state="SHARDED_STATE_DICT", fails=True, **environment)
    assert "FSDP is set to save SHARDED_STATE_DICT" in out
    assert not (tmp_path / "run" / HALF).exists()


@pytest.mark.slow
def test_deepspeed_zero_3_is_the_same_run(base):
    """On one process: without a GPU, accelerate counts one process whatever DeepSpeed was started with."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    config = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto", "zero_optimization": zero}
    (base / "zero.json").write_text(json.dumps(config))
    sections = yaml.safe_load((base / "tiny.yaml").read_text())
    del sections["training"]["use_cpu"]  # with it, or ACCELERATE_USE_CPU, accelerate leaves DeepSpeed out
    (base / "zero.yaml").write_text(yaml.safe_dump(sections))

    def train_under_zero():
        flags = ["--deepspeed", base / "zero.json", "--output_dir", base / "zero", "--resume_from_checkpoint", "true"]
        env = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}
        torchrun("scripts/pretrain.py", base / "zero.yaml", *flags, processes=1, **env)

    train_under_zero()
    assert list((base / "zero" / f"checkpoint-{STEPS}").glob("global_step*/zero_pp_rank_0*"))
    same(base / "zero", base / "one")
    shutil.rmtree(base / "zero" / f"checkpoint-{STEPS}")  # as if it had been killed after the one before
    (base / "zero/run.json").unlink()
    train_under_zero()
    same(base / "zero", base / "one")


@pytest.mark.parametrize("part", ["optimizer", "scheduler"])
def test_deepspeed_with_its_own_optimizer_or_scheduler_is_refused(sections, tmp_path, part):
    settings = Settings.from_dict(sections(tmp_path / "run"))
    config = {"zero_optimization": {"stage": 3}, part: {"type": "AdamW", "params": {}}}
    settings.training.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)  # as TrainingArguments would make it
    with refused(ValueError, f"brings its own {part}", "groups" if part == "optimizer" else "schedule", "take the"):
        train.pretrain(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("cpu.yaml", DistributedType.MULTI_GPU, 2),
        ("ddp.yaml", DistributedType.MULTI_GPU, 8),
        ("fsdp2.yaml", DistributedType.FSDP, 8),
        ("deepspeed_zero3.yaml", DistributedType.DEEPSPEED, 8),
    ],
)
def test_accelerate_reads_the_configs(name, kind, processes):
    """accelerate refuses a key that it does not know."""
    config = load_config_from_file(str(CONFIGS / name))
    assert (config.distributed_type, config.num_processes) == (kind, processes)
    assert {p.name for p in CONFIGS.iterdir()} == {"cpu.yaml", "ddp.yaml", "fsdp2.yaml", "deepspeed_zero3.yaml"}
    if kind == DistributedType.FSDP:
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
