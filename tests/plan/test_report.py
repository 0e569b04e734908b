import json
from types import SimpleNamespace

import pytest
from sentences import says

from hf_power import Recipe
from hf_power.cli import run_verb
from hf_power.records.rows import append_rows


def row(batch, tokens, lr, seed, schedule="warmup_stable_decay", law=None):
    """A row whose loss is a parabola around 3 * beta**.7 * tokens**-.4 (for power half of that)."""
    from math import log2

    best = 3 * (batch / 4096) ** 0.7 * tokens**-0.4 * (0.5 if law else 1)
    loss = 3 + 0.03 * log2(lr / best) ** 2 + 0.002 * (-1) ** seed
    trunk = f"{schedule}-{batch}-{law['a'] if law else lr}-{seed}"
    settings = {"model": {"hidden_size": 32}, "mup": {"base_width": 32, "preset": "power_of_two"}}
    return {
        "schema": 1,
        "id": f"{trunk}-{tokens}",
        "status": "finished",
        "reason": None,
        "model_type": "llama",
        "width": 32,
        "parameters": 40_000,
        "parameters_without_embeddings": 24_000,
        "tokens_per_step": batch,
        "tokens": tokens,
        "schedule": schedule,
        "learning_rate": lr,
        "law": law,
        "max_lr": 0.05 if law else lr,
        "warmup_tokens": 8192,
        "decay_tokens": round(0.2 * tokens / batch) * batch,
        "decay_shape": "1-sqrt",
        "weight_decay": 0.1,
        "seed": seed,
        "loss": loss,
        "train_loss": loss,
        "trunk": trunk,
        "trained_tokens": tokens,
        "flops_per_token": 3e5,
        "seconds": 1.0,
        "block_size": 64,
        "settings": settings,
        "data": {"dataset": "d", "fingerprint": "f", "tokenizer": "t", "held_out_tokens": 1000},
        "versions": {},
        "hardware": {},
    }


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep's folder with the law 3 * beta**.7 * T**-.4, and Power's scale 1.5."""
    rows = []
    for batch in (256, 512, 1024):
        for tokens in (131_072, 262_144, 524_288):
            best = 3 * (batch / 4096) ** 0.7 * tokens**-0.4
            for seed in (0, 1):
                rows += [row(batch, tokens, best * 2.0**k, seed) for k in (-1.6, -0.6, 0.4, 1.4)]
                for k in (-1.6, -0.6, 0.4, 1.4):
                    law = {"a": 1.5 * 2.0**k, "b": -0.4, "batch_exponent": 0.7}
                    rows.append(row(batch, tokens, best / 2 * 2.0**k, seed, "power", law))
    folder = tmp_path_factory.mktemp("sweep")
    append_rows(folder / "sweep.jsonl", rows)
    return folder


def rows_of(sweep):
    return [json.loads(line) for line in (sweep / "sweep.jsonl").read_text().splitlines()]


def test_from_rows_to_recipe_to_plan(sweep, tmp_path, capsys):
    assert run_verb("fit", [str(sweep)]) == 0
    text = capsys.readouterr().out
    fit, recipe = json.loads((sweep / "fit.json").read_text()), Recipe.load(sweep)
    assert fit["law"]["a"] == pytest.approx(3, rel=0.02)
    assert [recipe.b, recipe.batch_exponent] == pytest.approx([-0.4, 0.7], abs=0.01)
    assert recipe.a == pytest.approx(1.5, rel=0.02)
    assert (recipe.max_lr, recipe.decay_ratio, recipe.decay_shape, recipe.warmup_tokens) == (0.05, 0.2, "1-sqrt", 8192)
    assert (recipe.tokenizer, recipe.model_type, recipe.base_width) == ("t", "llama", 32)
    assert "fit.json, recipe.json, cells.png, law.png, map.png" in text
    for name in ("cells", "law", "map"):
        assert (sweep / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    argv = ["--tokens", "4M", "--tokens_per_step", "4096", "--parameters", "1M", "--output_dir", str(tmp_path / "plan")]
    assert run_verb("plan", [str(sweep / "recipe.json"), *argv]) == 0
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    assert plan["proxies"]["tokens"] == sum(r["tokens"] for r in rows_of(sweep))
    assert (tmp_path / "plan/plan.png").read_bytes().startswith(b"\x89PNG")
    assert f"peak         warmup_stable_decay: lr {recipe.peak_lr(4_001_792, 4096):.3e}" in capsys.readouterr().out


def test_a_csv_gives_a_law_but_no_recipe(sweep, tmp_path, capsys):
    lines = ["lr,bs,D,val,N"]
    for r in rows_of(sweep):
        if r["schedule"] != "power":
            lines.append(f"{r['learning_rate']},{r['tokens_per_step'] // 64},{r['tokens']},{r['loss']},{r['width']}")
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    columns = ["learning_rate=lr", "batch=bs", "tokens=D", "loss=val", "width=N"]
    argv = [
        str(tmp_path / "runs.csv"),
        "--columns",
        *columns,
        "--block_size",
        "64",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert run_verb("fit", argv) == 0
    assert json.loads((tmp_path / "o/fit.json").read_text())["law"]["b"] == pytest.approx(-0.4, abs=0.01)
    assert not (tmp_path / "o/recipe.json").exists()
    assert "no recipe: a CSV does not say" in capsys.readouterr().out


def test_exponent_and_critical_batch_from_the_command_line(sweep, tmp_path):
    assert run_verb("fit", [str(sweep), "--batch_exponent", "1", "--output_dir", str(tmp_path / "o")]) == 0
    fit = json.loads((tmp_path / "o/fit.json").read_text())
    assert fit["law"]["batch_exponent"] == 1
    assert fit["intervals"]["batch_exponent"] == [1, 1]


@pytest.mark.parametrize(
    ("verb", "argv", "parts"),
    [
        ("fit", ["nowhere"], ["nowhere"]),
        ("fit", ["SWEEP", "--batch_exponent", "one"], ["--batch_exponent must be free or a number, got 'one'"]),
        ("fit", ["SWEEP", "--columns", "loss"], ["--columns takes pairs such as learning_rate=lr, got 'loss'"]),
        ("fit", ["SWEEP", "--columns", "loss=l"], ["--columns and --block_size are for a CSV"]),
        ("fit", ["SWEEP", "--schedule", "cosine"], ["no rows of schedule cosine"]),
        ("plan", ["SWEEP", "--tokens", "1M", "--tokens_per_step", "1k"], ["either --target or --parameters"]),
        (
            "plan",
            ["SWEEP", "--tokens", "many", "--tokens_per_step", "1k", "--parameters", "1M"],
            ["--tokens must be a number of tokens"],
        ),
        ("plan", ["nowhere.json", "--tokens", "1M", "--tokens_per_step", "1k", "--parameters", "1M"], ["no recipe at"]),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(verb, argv, parts, sweep, capsys):
    Recipe().save(sweep / "recipe.json")
    assert run_verb(verb, [str(sweep) if a == "SWEEP" else a for a in argv]) == 2
    error = SimpleNamespace(value=capsys.readouterr().err.strip().split(": ", 1)[1])
    says(error, *parts)
