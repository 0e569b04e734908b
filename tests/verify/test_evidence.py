"""The evidence page: what it finds, what it says of each record, and that it stands alone."""

import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from fits import FIT
from samples import FULL, record
from sentences import refused

from hf_power.cli import main
from hf_power.plan.report import plan_run
from hf_power.plots.figures import save
from hf_power.plots.runs import plot_lr_and_loss
from hf_power.publish.card import make_card
from hf_power.records.errors import NotFoundError, UserError
from hf_power.records.rows import append_rows
from hf_power.records.run import Run
from hf_power.verify.evidence import READINGS, make_evidence, write_evidence
from hf_power.verify.page import Cell, Page, Point, Tried

CHECK = Page(
    verdict="FAILED",
    reasons=("the best learning rate lies beyond 2 times the recipe's",),
    tolerance=0.01,
    regret=0.25,
    regret_interval=(0.2, 0.3),
    points=(Point(0.5, math.inf, None), Point(1.0, 3.25, 0.01), Point(2.0, 3.0, 0.01)),
    losses={"0.5": [math.inf, 3.5], "1": [3.25, 3.25], "2": [3.0, 3.0]},
    parabola=None,
    cell=Cell(64, 8192, 2_000_000),
    recipe=Tried(4.0, -0.5, 1.0, 0.02),
    seeds=(0, 1),
    warnings=("the depth is another <one>",),
    versions={"torch": "3"},
)
RUN = Run(
    kind="pretrain",
    name="big",
    status="finished",
    tokens_seen=4_000_000,
    tokens_per_step=8192,
    train_seconds=90.0,
    flops_per_token=1e6,
    parameters=1_234_567,
    held_out_loss=3.25,
    versions={"torch": "2"},
    loss_curve=[{"step": 1, "tokens": 8192, "loss": 4.0, "learning_rate": 0.1}],
)


class Html(HTMLParser):
    """The words of a page, and every address that it would load."""

    def __init__(self, html):
        super().__init__()
        self.words, self.loads = [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("sweep", "plan", "check", "big/checkpoint-4", "old"):
        (folder / name).mkdir(parents=True)
    rows = [record(id="a", seconds=57.5), record(id="b", seed=1, status="diverged", reason="it did", loss=None)]
    append_rows(folder / "sweep/sweep.jsonl", rows)
    append_rows(folder / "check/sweep.jsonl", [record(id="c", trained_tokens=500_000)])
    FIT.save(folder / "sweep")
    FULL.save(folder / "recipe.json")
    options = {"tokens": "10M", "tokens_per_step": "8192", "parameters": "1M"}
    plan_run(str(folder / "recipe.json"), **options, output_dir=folder / "plan")
    CHECK.save(folder / "check")
    RUN.save(folder / "big")
    replace(RUN, name="of-a-checkpoint").save(folder / "big/checkpoint-4")
    save(plot_lr_and_loss(RUN), folder / "big/lr_and_loss.png")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Html(make_evidence(folder))


def test_each_record_says_its_result(page):
    assert "2 runs took 2M tokens: 1 finished, 1 diverged and 0 failed." in page.text
    # 0.02 * 2**0.7 * 8e6**-0.3 and the interval of the scatter, 2**(1.96 * 0.12) to either side.
    assert "At 8,000,000 tokens and 8,192 per step use a peak of 0.00028 (0.00023 to 0.00032) with warmup" in page.text
    assert "10,002,432 tokens are 1,221 steps of 8,192, under a second on 8 devices; Power peaks at" in page.text
    where = "at width 64, 2,000,000 tokens and 8,192 per step"
    assert f"rate fails {where}: the best learning rate lies beyond 2 times the recipe's." in page.text
    assert "big has finished after 4M tokens, held-out loss 3.2500 nats per token." in page.text
    assert "loss at 0.5 times the recipe's learning rate diverged" in page.text
    assert "of-a-checkpoint" not in page.text


def test_costs_are_summed_by_what_was_trained(page):
    costs = page.text.partition("What it cost")[2].partition("Where it comes from")[0]
    # Both proxies have 1M tokens at 4e5 FLOPs, the check has half of one, and the run has 4M at 1e6.
    assert re.search(r"proxies 2M 8e\+11 1 minute", costs)
    assert re.search(r"check 500,000 2e\+11 2\.5 seconds", costs)
    assert re.search(r"runs 4M 4e\+12 1\.5 minutes", costs)


def test_it_loads_nothing_and_shows_the_pictures_with_how_to_read_them(page, folder):
    assert all(address.startswith(("data:image/png;base64,", "#section-")) for address in page.loads)
    assert sum(address.startswith("data:") for address in page.loads) == 2
    assert READINGS["lr_and_loss"] in page.text
    assert READINGS["plan"] in page.text


def test_files_are_named_with_their_hash_and_the_versions_of_all_are_there(page, folder):
    for name in ("sweep/sweep.jsonl", "sweep/fit.json", "plan/plan.json", "check/verify.json", "big/run.json"):
        assert f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}" in page.text
    assert "torch 2, 3" in page.text


def test_what_a_record_says_is_no_markup(folder):
    html = make_evidence(folder)
    assert "another &lt;one&gt;" in html
    assert str(folder) not in html


def test_the_verb_writes_it(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out == f"wrote: {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text() == make_evidence(folder)


def test_the_card_of_the_folder_links_it(folder):
    assert "evidence.html" not in str(make_card(folder / "big", license="mit"))
    write_evidence(folder / "big")
    assert "[evidence.html](evidence.html)" in str(make_card(folder / "big", license="mit"))


def test_folders_without_records_and_broken_records_are_named(tmp_path):
    with refused(NotFoundError, "no folder"):
        make_evidence(tmp_path / "gone")
    with refused(NotFoundError, "no record of hf_power", "fit.json"):
        make_evidence(tmp_path)
    (tmp_path / "fit.json").write_text("{")
    with refused(UserError, "fit.json is not JSON"):
        make_evidence(tmp_path)
