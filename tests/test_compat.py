import dataclasses
import json

import pytest
import torch
from sentences import refused
from transformers import AutoModelForCausalLM, MixtralConfig, TrainingArguments

from hf_power import compat, mup_config
from hf_power.cli import parse_settings
from hf_power.settings.read import load_yaml
from hf_power.settings.settings import Settings

OLD, NEW = "gradient_checkpointing", "activation_checkpointing"
BOTH = pytest.mark.parametrize("written", [OLD, NEW])
KWARGS = {"use_reentrant": False, "every_n_layers": 2}


def checkpointing(settings):
    """What the Trainer of this version will do."""
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    name = NEW if NEW in fields else OLD
    return getattr(settings.training, name), getattr(settings.training, f"{name}_kwargs")


def yaml(tmp_path, *lines):
    path = tmp_path / "run.yaml"
    path.write_text("\n  ".join(["training:", *lines]) + "\n")
    return str(path)


@BOTH
def test_either_name_in_a_yaml_reaches_the_trainer(tmp_path, written):
    path = yaml(tmp_path, f"{written}: true", f"{written}_kwargs: {json.dumps(KWARGS)}")
    for settings in (parse_settings([path]), Settings.from_dict({"training": {written: True}})):
        assert checkpointing(settings)[0] is True
    assert checkpointing(parse_settings([path])) == (True, KWARGS)
    assert checkpointing(parse_settings([yaml(tmp_path, f"{written}: false")]))[0] is False


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize(
    ("flags", "on"), [(["--{}"], True), (["--{}", "True"], True), (["--{}=True"], True), (["--{}", "false"], False)]
)
@pytest.mark.parametrize("dashed", [False, True])
def test_either_name_on_the_command_line_wins_over_the_file(tmp_path, written, flags, on, dashed):
    name = written.replace("_", "-") if dashed else written
    for in_file in (OLD, NEW):
        path = yaml(tmp_path, f"{in_file}: {str(not on).lower()}")
        settings = parse_settings([path, *(flag.format(name) for flag in flags), "--seed", "3"])
        assert (checkpointing(settings)[0], settings.training.seed) == (on, 3)
        assert settings.to_dict()["training"] == {NEW: on, "seed": 3}
    kwargs = json.dumps(KWARGS)
    for given in ([f"--{name}_kwargs", kwargs], [f"--{name}_kwargs={kwargs}"]):
        assert checkpointing(parse_settings([*given, *(flag.format(name) for flag in flags)])) == (on, KWARGS)


@BOTH
def test_run_json_has_the_new_name_and_either_is_read(written):
    given = {written: True, f"{written}_kwargs": KWARGS}
    record = json.loads(json.dumps(Settings.from_dict({"training": given}).to_dict()))
    assert record["training"] == {NEW: True, f"{NEW}_kwargs": KWARGS}
    for sections in (record, {"training": given}):
        assert checkpointing(Settings.from_dict(sections)) == (True, KWARGS)
    assert Settings.from_dict(record).to_dict() == record


def test_both_names_agree_or_are_refused(tmp_path):
    same = yaml(tmp_path, f"{OLD}: true", f"{NEW}: true")
    assert checkpointing(parse_settings([same]))[0] is True
    assert checkpointing(parse_settings([f"--{OLD}", "True", f"--{NEW}"]))[0] is True
    two = [f"{OLD}: false", f"{NEW}: true"]
    with refused(ValueError, f"training: {OLD} is the old name of {NEW}", "got False and True", "give one of them"):
        load_yaml(yaml(tmp_path, *two))
    with refused(ValueError, f"{OLD}_kwargs is the old name of {NEW}_kwargs", "give one of them"):
        Settings.from_dict({"training": {f"{OLD}_kwargs": {}, f"{NEW}_kwargs": KWARGS}})
    with refused(ValueError, f"command line: {OLD} is the old name of {NEW}", "got 'true' and 'false'", "give one"):
        parse_settings([f"--{OLD}", f"--{NEW}=false"])


@BOTH
def test_the_reentrant_kind_is_refused_under_either_name(written):
    model = {"model_type": "mixtral", "model_config": {"output_router_logits": True}}
    training = {"output_dir": "runs/a", f"{written}_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant"):
        Settings.from_dict({"model": model, "run": {"tokens": "1M"}, "training": training}).check()


@BOTH
def test_a_change_may_be_allowed_under_either_name(written):
    assert Settings.from_dict({"run": {"allow_changed": written}}).allowed_changes() == {compat.CHECKPOINTING}


def test_a_router_s_output_is_put_in_order():
    logits, weights, experts = torch.randn(5, 4), torch.rand(5, 2), torch.randint(4, (5, 2))
    for order in ((logits, weights, experts), (experts, weights, logits)):
        assert all(map(lambda a, b: a is b, compat.logits_first(order), (logits, weights, experts)))


def mixture(**numbers):
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    return mup_config(MixtralConfig(**shape, **numbers), base_width=16)


def test_a_granite_moe_gives_its_router_s_logits_and_trains_with_their_loss():
    losses = []
    for coefficient in (0.0, 1.0):
        torch.manual_seed(0)
        config = mixture(output_router_logits=True, router_aux_loss_coef=coefficient)
        model = AutoModelForCausalLM.from_config(config)
        tokens = torch.arange(32).view(2, 16)
        output = model(input_ids=tokens, labels=tokens)
        assert [logits.shape for logits in output.router_logits] == [(32, 4)] * 2
        assert all(logits.is_floating_point() for logits in output.router_logits)
        losses.append((output.loss.item(), output.aux_loss.item()))
    assert losses[1][0] - losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)
    assert losses[0][1] >= 1.9  # the number of experts a token takes, if the load is even
