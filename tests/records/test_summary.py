"""Results as a sentence, as HTML and as frames."""

import pydoc
import re
from dataclasses import dataclass

import pytest
from fits import CELL, FIT, unused
from samples import record
from sentences import refused

import hf_power
from hf_power import Recipe
from hf_power.plan import Target, make_plan
from hf_power.records.errors import MissingPackageError
from hf_power.records.rows import append_rows
from hf_power.records.summary import Summarized, Summary, frame_of
from hf_power.records.sweep import Sweep


@dataclass(frozen=True, repr=False)
class Two(Summarized):
    wall: tuple[int, ...] = (0,) * 1000

    def summary(self):
        return Summary("1 < 2", [("how & why", "<b>"), ("what", "7")])


def test_a_result_is_its_sentence_and_in_a_notebook_a_table_without_markup_of_its_own():
    assert repr(Two()) == "<Two: 1 < 2>"
    html = Two()._repr_html_()
    assert "<strong>Two</strong>: 1 &lt; 2" in html
    assert re.findall(r">([^<>]+)</t[hd]>", html) == ["how &amp; why", "&lt;b&gt;", "what", "7"]
    assert "http" not in html


def test_results_say_in_a_line_what_they_are():
    plan = make_plan(Recipe(), Target(10**10, 2**20, parameters=10**8))
    assert repr(Recipe()) == "<Recipe: min(0.02, 4 * beta^1 * n^-0.51), which no sweep of yours has measured>"
    assert repr(FIT).startswith("<Fit: at 8,000,000 tokens and 8,192 per step use a peak of 0.00028")
    assert repr(plan).startswith("<Plan: 10,000,269,312 tokens are 9,537 steps of 1,048,576")
    for shown in (Recipe(), FIT, plan):
        assert "\n" not in repr(shown)
        assert "<table>" in shown._repr_html_()


def test_a_sweep_is_its_rows_a_frame_and_a_sentence(tmp_path):
    pytest.importorskip("pandas")
    rows = [record(id="a", trained_tokens=700), record(id="b", seed=1, status="diverged", reason="it did", loss=None)]
    append_rows(tmp_path / "sweep.jsonl", rows)
    sweep = Sweep.load(tmp_path)
    assert (list(sweep), sweep[1], len(sweep[:1])) == (rows, rows[1], 1)
    assert "1 finished, 1 diverged and 0 failed" in repr(sweep)
    frame = sweep.to_frame()
    assert list(frame["id"]) == ["a", "b"]
    assert list(frame["loss"].isna()) == [False, True]
    assert "settings" not in frame


def test_an_interval_has_two_columns_and_what_is_unknown_none():
    pytest.importorskip("pandas")
    frame = frame_of([CELL, unused()])
    assert frame["optimum_interval_low"][0] == CELL.optimum_interval[0]
    assert frame["optimum_interval_high"].isna().tolist() == [False, True]
    assert not {"learning_rates", "parameters"} & set(frame)
    assert list(FIT.to_frame()["optimum_lr"]) == [CELL.optimum_lr]


def test_a_plan_is_a_frame_of_its_curve_with_the_milestones_named():
    pytest.importorskip("pandas")
    plan = make_plan(Recipe(), Target(10**10, 2**20, parameters=10**8))
    frame = plan.to_frame()
    assert frame["tokens"].is_monotonic_increasing
    assert frame["tokens"].is_unique
    assert set(frame["what"].dropna()) <= {point.what for point in plan.milestones}
    assert {"end", "50%"} <= set(frame["what"].dropna())


def test_without_pandas_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with refused(MissingPackageError, 'pip install "hf_power[train]"'):
        frame_of([CELL])


def test_help_is_a_screen_that_names_what_there_is():
    help_text = pydoc.plain(pydoc.render_doc(hf_power)).splitlines()
    assert len(help_text) <= 60
    screen = help_text[:25]
    words = " ".join(screen)
    for name in {*dir(hf_power)} - {"__doc__", "__version__", "plots"}:
        assert name in words, name
    for name in ("sweep.run_sweep", "fit.fit_law", "plan.make_plan", "verify.verify", "evaluate.evaluate_model"):
        assert f"hf_power.{name}" in words
    assert max(map(len, screen)) <= 120


def test_the_packages_names_are_there_after_one_import():
    for package in ("evaluate", "export", "fit", "plan", "plots", "sweep", "verify"):
        module = getattr(hf_power, package)
        for name in module.__all__:
            assert getattr(module, name).__module__.startswith("hf_power."), name
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing
