"""`hf-power new`: settings to begin with, which the other verbs take as they are."""

import json

import pytest
import yaml
from sentences import refused
from transformers import AutoConfig

from hf_power.cli import main
from hf_power.mup.scale import scale_width
from hf_power.records.errors import UserError
from hf_power.settings.new import new_run
from hf_power.settings.settings import Settings
from hf_power.sweep.grid import SCALED, load_grid

QWEN = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 4, "head_dim": 128}
QWEN |= {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 400}


def read(path):
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_family_gives_a_trial_that_the_other_verbs_take(tmp_path, family, capsys):
    assert main(["new", str(tmp_path / "my run"), "--from", family]) == 0
    said = capsys.readouterr().out
    assert f"wrote: {tmp_path}/my run/sweep.yaml" in said
    assert said.splitlines()[-1].startswith("next: hf-power sweep")
    grid = load_grid(str(tmp_path / "my run/sweep.yaml"))
    target = Settings.from_dict(read(tmp_path / "my run/target.yaml"))
    assert grid.settings.model.model_type == target.model.model_type == family
    # The proxies are the target at another width, on the same text in the same blocks.
    assert grid.widths == (grid.settings.mup.base_width,)
    proxy, scaled = grid.settings.model.config(), scale_width(target.model.config(), grid.widths[0])
    names = (*SCALED, "num_hidden_layers", "model_type")
    assert [getattr(proxy, name) for name in names] == [getattr(scaled, name) for name in names]
    assert grid.settings.data == target.data
    assert (tmp_path / "my run/target.yaml").read_text().count("EDIT") == 3


def test_a_config_is_kept_and_gives_a_width_that_divides(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    for source in (tmp_path / "config.json", tmp_path):
        made = new_run(tmp_path / f"made{source.suffix}", str(source))
        assert [path.name for path in made] == ["config.json", "sweep.yaml", "target.yaml"]
        config, sweep, target = made
        # The text's own tokenizer is not the model's, and says how many rows the embedding has.
        assert json.loads(config.read_text()) == {name: value for name, value in QWEN.items() if name != "vocab_size"}
        # 64 would be a sixteenth, and less than NARROWEST.
        assert read(sweep)["sweep"]["widths"] == [128]
        assert read(sweep)["mup"] == {"base_width": 128}
        assert read(sweep)["model"] == read(target)["model"] == {"model_type": "any", "model_config": str(config)}
        assert read(sweep)["data"] == read(target)["data"]
    scale_width(AutoConfig.from_pretrained(tmp_path), 128)


@pytest.mark.parametrize(
    ("changes", "width", "heads"),
    [
        # SmolLM2-135M: only a third keeps 9 heads and 3 KV heads whole.
        (
            {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "head_dim": 64,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
            },
            192,
            3,
        ),
        # One KV head cannot shrink, and 2 of 32 make no proxy below half of 4096.
        ({"num_key_value_heads": 1}, 128, 2),
        ({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 2}, 256, 2),
        # 3 heads, which an eighth has, do not share 2 KV heads.
        ({"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 2}, 768, 6),
    ],
)
def test_heads_that_no_power_of_two_divides(tmp_path, changes, width, heads):
    (tmp_path / "config.json").write_text(json.dumps(QWEN | changes))
    new_run(tmp_path / "made", str(tmp_path))
    grid = load_grid(str(tmp_path / "made/sweep.yaml"))
    model = grid.settings.model
    proxy = model.at_width(model.config(), width)
    kv_heads = 1 if width == 192 else (QWEN | changes)["num_key_value_heads"]
    assert (grid.widths, proxy.num_attention_heads, proxy.num_key_value_heads) == ((width,), heads, kv_heads)
    assert (tmp_path / "made/base.json").exists() == (width != 192)


def test_a_repository_of_the_hub_gives_its_config_and_its_tokenizer(tmp_path, hub):
    hub.add_repo("some/model", {"config.json": json.dumps(QWEN).encode()})
    made = new_run(tmp_path / "made", "some/model")
    assert json.loads(made[0].read_text()) == QWEN
    assert read(made[1])["data"]["tokenizer"] == "some/model"


def test_what_is_refused(tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps(QWEN | {"intermediate_size": 3001}))
    with refused(UserError, "no part of hidden_size 1024"):
        new_run(tmp_path / "made", str(tmp_path / "odd.json"))
    bert = {"model_type": "bert", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    (tmp_path / "bert.json").write_text(json.dumps(bert))
    with refused(UserError, "in a bert a token sees those that come after it"):
        new_run(tmp_path / "made", str(tmp_path / "bert.json"))
    with refused(UserError, "there is no config at"):
        new_run(tmp_path / "made", str(tmp_path / "none.json"))
    with refused(UserError, "there is no folder no/such"):
        new_run(tmp_path / "made", "no/such")
    with refused(UserError, "exists and is not empty"):
        new_run(tmp_path, "llama")
    assert not (tmp_path / "made").exists()
