"""From rows to files, by the command line: fit.json, recipe.json, pictures, and a plan under that recipe."""

import json
import math

import pytest
from samples import synthetic_rows

from hf_power import Recipe
from hf_power.cli import run_verb
from hf_power.fit.fit import fit_laws
from hf_power.fit.result import Fit
from hf_power.records.rows import load_rows


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep's folder with the law 3 * beta**.7 * T**-.4, and Power's scale 1.5."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows()))
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures take most of the time, and one test looks at them."""
    for name in ("plot_cells", "plot_law", "plot_map"):
        monkeypatch.setattr(f"hf_power.fit.report.{name}", lambda fit: None)
    monkeypatch.setattr("hf_power.fit.report.save", lambda figure, path: None)


def rows_of(sweep):
    return load_rows(sweep / "sweep.jsonl")[0]


@pytest.mark.slow
def test_from_rows_to_recipe_to_plan(sweep, tmp_path, capsys):
    assert run_verb("fit", [str(sweep)]) == 0
    text = capsys.readouterr().out
    fit, recipe = Fit.load(sweep), Recipe.load(sweep)
    assert fit.law.a == pytest.approx(3, rel=0.02)
    assert [recipe.b, recipe.batch_exponent] == pytest.approx([-0.4, 0.7], abs=0.01)
    assert recipe.a == pytest.approx(1.5, rel=0.02)
    assert (recipe.max_lr, recipe.decay_ratio, recipe.decay_shape, recipe.warmup_tokens) == (0.05, 0.2, "1-sqrt", 8192)
    assert (recipe.tokenizer, recipe.model_type, recipe.base_width) == ("t", "llama", 32)
    for name in ("fit.json", "recipe.json", "cells.png", "law.png", "map.png"):
        assert f"{sweep / name}" in text.partition("wrote: ")[2]
    for name in ("cells", "law", "map"):
        assert (sweep / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    argv = ["--tokens", "4M", "--tokens_per_step", "4096", "--parameters", "1M", "--output_dir", str(tmp_path / "plan")]
    assert run_verb("plan", [str(sweep / "recipe.json"), *argv]) == 0
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    assert plan["proxies"]["tokens"] == sum(r.tokens for r in rows_of(sweep))
    assert (tmp_path / "plan/plan.png").read_bytes().startswith(b"\x89PNG")
    assert f"peak         warmup_stable_decay: lr {recipe.peak_lr(4_001_792, 4096):.3e}" in capsys.readouterr().out


def test_a_csv_gives_a_law_and_a_recipe_that_names_what_it_leaves_open(sweep, tmp_path, capsys, no_pictures):
    lines = ["lr,bs,D,val,N"]
    for r in rows_of(sweep):
        if r.schedule != "power":
            lines.append(
                f"{r.learning_rate},{r.tokens_per_step // 64},{r.tokens},{math.nan if r.loss is None else r.loss},{r.width}"
            )
    (tmp_path / "runs.csv").write_text("\n".join(lines) + "\n")
    columns = ["learning_rate=lr", "batch=bs", "tokens=D", "loss=val", "width=N"]
    argv = [
        str(tmp_path / "runs.csv"),
        "--columns",
        *columns,
        "--block_size",
        "64",
        "--schedule",
        "warmup_stable_decay",
        "--base_width",
        "32",
        "--weight_decay",
        "0.2",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    assert run_verb("fit", argv) == 0
    assert Fit.load(tmp_path / "o").law.b == pytest.approx(-0.4, abs=0.01)
    recipe = Recipe.load(tmp_path / "o")
    assert (recipe.base_width, recipe.weight_decay, recipe.parameterization) == (32, 0.2, "mup")
    assert recipe.peak_lr(4_000_000, 4096) == pytest.approx(3 * 4_000_000**-0.4, rel=0.1)
    assert "leaves open: --warmup_tokens, --decay_ratio, --tokenizer, --model_type" in capsys.readouterr().out


def test_exponent_and_critical_batch_from_the_command_line(sweep, tmp_path, no_pictures):
    assert run_verb("fit", [str(sweep), "--batch_exponent", "1", "--output_dir", str(tmp_path / "o")]) == 0
    fit = Fit.load(tmp_path / "o")
    assert fit.law.batch_exponent == 1
    assert fit.intervals.batch_exponent == (1, 1)


@pytest.mark.parametrize("broken", ["hf_power.fit.fit.fit_cells", "hf_power.fit.fit.solve_law"])
def test_a_bug_of_our_own_keeps_its_traceback(broken, sweep, monkeypatch):
    """Neither of these is a sentence for the user, and `fit_laws` leaves no schedule out because of them."""
    for bug in (lambda *_args, **_kwargs: max([]), lambda *_args, **_kwargs: list(zip([1], [], strict=True))):
        monkeypatch.setattr(broken, bug)
        with pytest.raises(ValueError) as caught:
            run_verb("fit", [str(sweep)])
        assert type(caught.value) is ValueError
        with pytest.raises(ValueError):
            fit_laws(rows_of(sweep))
