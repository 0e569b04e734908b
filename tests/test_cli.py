import contextlib
import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_power import cli
from hf_power.sweep.grid import load_grid


def test_verbs_are_listed(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == 2
    assert cli.main(["pretrian"]) == 2
    out = capsys.readouterr().out
    assert "unknown verb 'pretrian'" in out
    assert all(verb in out for verb in cli.VERBS)


def test_a_mistake_is_one_sentence_on_stderr(capsys):
    assert cli.main(["pretrain", "--hiden_size", "3"]) == 2
    assert capsys.readouterr().err == "hf-power pretrain: --hiden_size is unknown: did you mean hidden_size?\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "pretrain", lambda argv: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["pretrain"])


def test_help_lists_every_key(capsys):
    assert cli.main(["pretrain", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--hidden_size", "--base_width", "--dataset", "--tokens", "--learning_rate"))


def test_pretrain_then_anneal(sections, tmp_path, capsys):
    flags = []
    for values in sections(tmp_path / "run").values():
        for key, value in values.items():
            flags += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    assert cli.main(["pretrain", *flags]) == 0
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"held-out loss {run['held_out_loss']:.4f} nats per token" in capsys.readouterr().out
    assert cli.main(["anneal", "--from", str(tmp_path / "run" / "checkpoint-8"), "--tokens", "25%"]) == 0
    annealed = json.loads((tmp_path / "run-anneal-8" / "run.json").read_text())
    assert (annealed["parent"], annealed["tokens_seen"]) == ("run/checkpoint-8", 1024 + 384)  # ceil of 341 to steps


def test_from_the_run_to_a_model_that_others_can_load(hub, sections, tmp_path, capsys, monkeypatch):
    """pretrain, evaluate, export, card, publish; then a stranger's download of both forms writes the same text."""
    made = sections(tmp_path / "run")
    made["run"]["license"] = "apache-2.0"
    made["mup"] |= {"preset": "power_of_two"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    run, plain = str(tmp_path / "run"), str(tmp_path / "run-llama")
    assert cli.main(["pretrain", str(tmp_path / "run.yaml")]) == 0
    assert cli.main(["evaluate", run]) == 0
    shown = json.loads((tmp_path / "run" / "eval.json").read_text())
    losses = [json.loads((tmp_path / "run" / "run.json").read_text())["held_out_loss"], shown["metrics"]["loss"]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert f"{shown['metrics']['bits_per_byte']:.6g}" in capsys.readouterr().out
    assert cli.main(["export", run, "--to", "llama"]) == 0
    assert "logits of 64 tokens differ by at most" in capsys.readouterr().out
    assert cli.main(["evaluate", plain, "--batch_size", "3"]) == 0
    assert json.loads((tmp_path / "run-llama" / "eval.json").read_text())["metrics"] == pytest.approx(shown["metrics"])
    assert cli.main(["card", plain]) == 0
    for folder, name in ((run, "tester/run"), (plain, "tester/run-llama")):
        assert cli.main(["publish", folder, "--repo", name]) == 0
        assert "complete" in capsys.readouterr().out
    assert cli.main(["evaluate", "tester/run-llama", "--output", str(tmp_path / "again.json"), *_data(made)]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == pytest.approx(shown["metrics"])

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["export", "tester/run", "--to", "llama"]) == 0
    weights = (tmp_path / "here" / "run-llama" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "run-llama" / "model.safetensors").read_bytes()

    texts = []
    for name in ("tester/run", "tester/run-llama"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        inputs = tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)
        texts.append((type(model).__name__, model.generate(**inputs, max_new_tokens=20, do_sample=False).tolist()))
    assert [name for name, _ in texts] == ["GraniteForCausalLM", "LlamaForCausalLM"]
    assert texts[0][1] == texts[1][1]


def _data(made):
    return [part for key, value in made["data"].items() for part in (f"--{key}", str(value))] + ["--max_tokens", "640"]


def test_coord_check(tmp_path, capsys):
    (tmp_path / "m.yaml").write_text(
        "model: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}\n"
    )
    argv = ["coord-check", str(tmp_path / "m.yaml"), "--widths", "16", "32", "64", "128", "--steps", "2"]
    code = cli.main([*argv, "--picture", str(tmp_path / "check.png")])
    out = capsys.readouterr().out
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")
    assert code == (0 if "passed: worst slope" in out else 1)
    assert "| logits" in out


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_says_how_it_is_used(verb, capsys):
    with contextlib.suppress(SystemExit):
        cli.main([verb, "--help"])
    assert "usage:" in capsys.readouterr().out


def test_a_dry_run_says_the_cost_and_trains_nothing(sections, tmp_path, capsys):
    made = sections(tmp_path / "unused")
    made["training"] = {"weight_decay": 0.1}
    made["sweep"] = {"widths": [32], "tokens_per_step": [128], "tokens": [1280, 2560]}
    made["sweep"]["schedules"] = {"warmup_stable_decay": [0.01, 0.02]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(made))
    assert cli.main(["sweep", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "s"), "--dry-run"]) == 0
    # Two trunks of 2,560 tokens, each with a branch at 1,280 * .9 = 1,152 for the shorter horizon: 2 * (2,560 + 128).
    assert "4 runs, 5,376 tokens (shared trunks save 30% of 7,680)" in capsys.readouterr().out
    assert not (tmp_path / "s" / "sweep.jsonl").exists()
    assert cli.main(["sweep", str(tmp_path / "grid.yaml"), "--output_dir", str(tmp_path / "s"), "--workers", "0"]) == 2


def test_the_example_of_a_target_is_one_for_the_example_of_a_sweep():
    recipes = Path(__file__).parent.parent / "scripts" / "recipes"
    grid, target = load_grid(str(recipes / "sweep.yaml")), cli.parse_settings([str(recipes / "target.yaml")])
    assert {k: getattr(target.data, k) for k in grid.sections["data"]} == grid.sections["data"]
    assert target.model.hidden_size // target.model.num_attention_heads == 16  # the proxies' head size
    assert grid.sections["model"]["hidden_size"] // grid.sections["model"]["num_attention_heads"] == 16
