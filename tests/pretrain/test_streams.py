"""Streams with lines that cannot be read: what run.json says of them, and what cannot be counted."""

import json

import pytest
import yaml
from sentences import refused

from hf_power.cli import main
from hf_power.pretrain.run import pretrain
from hf_power.records.errors import UserError
from hf_power.settings.settings import Settings


@pytest.fixture
def given(sections, corpus, tmp_path):
    lines = corpus.read_text().splitlines()
    lines[3:3], lines[20:20] = ["{broken"], ['"bare"']
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    made = sections(tmp_path / "run")
    made["data"] |= {
        "dataset": str(tmp_path / "text.jsonl"),
        "streaming": True,
        "eval_fraction": 0.2,
        "skip_bad_lines": 2,
    }
    return made


@pytest.mark.slow
def test_the_record_has_the_lines_that_were_skipped(given, tmp_path):
    run = pretrain(Settings.from_dict(given))
    assert run.data["skipped_documents"] == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["skipped_documents"] == 2
    assert "documents" not in run.data


def test_one_line_too_many_is_one_sentence(given, tmp_path, capsys):
    given["data"]["skip_bad_lines"] = 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    assert main(["pretrain", str(tmp_path / "run.yaml")]) == 2
    assert "text.jsonl:21: broken JSON" in capsys.readouterr().err


def test_workers_cannot_count(given):
    given["training"]["dataloader_num_workers"] = 2
    with refused(UserError, "skip_bad_lines=2 of a stream is counted in one process", "dataloader_num_workers=2"):
        pretrain(Settings.from_dict(given))
