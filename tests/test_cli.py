import json

import pytest

from hf_power import cli


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
