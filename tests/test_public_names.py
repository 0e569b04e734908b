"""What users import and type: the names of hf_power, the verbs of the command line, and their flags."""

import re

import pytest

import hf_power
from hf_power.cli import main

NAMES = [
    "AverageWeights",
    "MupAdamW",
    "PowerLR",
    "Recipe",
    "SealCheckpoints",
    "__version__",
    "coord_check",
    "from_cosine",
    "get_power_schedule",
    "mup_adamw",
    "mup_config",
    "mup_init_",
    "mup_param_groups",
    "plot_schedule",
    "power_lr",
    "register_power_scheduler",
]
# Of each verb, without --help.
FLAGS = {
    "new": "from",
    "pretrain": """
        model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
        tie_word_embeddings num_local_experts num_experts_per_tok model_config mup base_width
        base_intermediate_size base_attention_width base_config base_head_dim base_num_layers preset embedding_multiplier residual_multiplier
        attention_multiplier initializer_range dataset dataset_config split eval_split eval_fraction streaming
        text_column skip_bad_lines tokenizer vocab_size block_size num_proc data_cache_dir tokens recipe max_eval_tokens
        max_skipped_steps average_window allow_changed license learning_rate lr_scheduler_type weight_decay adam_beta2
        max_grad_norm logging_steps logging_nan_inf_filter prediction_loss_only save_steps
        train_sampling_strategy
    """,
    "anneal": "from tokens output_dir decay_shape repo dataset resume_from_checkpoint",
    "average": "kind last output_dir decay_shape dataset",
    "evaluate": """
        dataset dataset_config split eval_split eval_fraction streaming text_column skip_bad_lines tokenizer vocab_size
        block_size num_proc data_cache_dir max_tokens batch_size dtype output tasks tasks_dir num_fewshot limit
    """,
    "export": "to output_dir dtype like",
    "card": "license repo",
    "report": "output",
    "publish": "repo license checkpoints private overwrite",
    "coord-check": "widths picture base_width steps device bf16 form fixed control controls",
    "sweep": "until tokens tokens_per_step width target output_dir dry_run workers",
    "fit": "output_dir schedule batch_exponent critical_batch size compare columns block_size base_width weight_decay warmup_tokens"
    " decay_ratio decay_shape model_type tokenizer",
    "plan": """
        target parameters tokens tokens_per_step block_size devices flops_per_device utilisation output_dir
    """,
    "forecast": "curves schedules times branches tail_steps tail_shape output_dir",
    "verify": "seeds tolerance",
    "schedule": "tokens_per_step steps tokens lr peak_lr warmup_steps law a b batch_exponent decay_ratio decay_shape versus"
    " picture",
    "doctor": "json",
}


def test_names_are_exactly_these():
    packages = {"evaluate", "export", "fit", "plan", "plots", "sweep", "verify"}
    assert [name for name in dir(hf_power) if name not in {*packages, "__doc__"}] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_imported(name):
    there = {}
    exec(f"from hf_power import {name}", there)
    assert there[name] is getattr(hf_power, name)


def test_verbs_are_exactly_these(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "usage: hf-power VERB ..."
    assert re.findall(r"^  ([a-z-]+)  ", said, re.MULTILINE) == list(FLAGS)
    assert main(["no-such-verb"]) == 2


@pytest.mark.parametrize("verb", FLAGS)
def test_flags_are_exactly_these(verb, capsys, monkeypatch):
    """Those of transformers.TrainingArguments, which are the library's, aside."""
    monkeypatch.setenv("COLUMNS", "1000")  # no flag is broken at the end of a line
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    flags = FLAGS[verb] + (FLAGS["pretrain"] if verb == "verify" else "")  # which takes the same settings
    assert sorted(re.findall(r"^  --([\w-]+)", said, re.MULTILINE)) == sorted(flags.split())
