"""The evidence page: everything that hf_power has written below a folder, on one page that a reviewer can sign.

The page is one HTML file with its pictures inside it. It needs no network, and it is a pure function of the files.
"""

import base64
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_power.fit.result import FIT_FILE, Fit
from hf_power.plan.record import PLAN_FILE, Plan, duration
from hf_power.plots.figures import si
from hf_power.publish.card import EVIDENCE_FILE
from hf_power.publish.sources import figure, known_facts
from hf_power.records.errors import NotFoundError
from hf_power.records.files import read_json, replaced
from hf_power.records.results import EVAL_FILE, Evaluation
from hf_power.records.rows import ROWS_FILE, Row, load_rows
from hf_power.records.run import RUN_FILE, Run
from hf_power.verify.page import SECONDS_PER_DAY, VERIFY_FILE, Page

TEMPLATE = Path(__file__).parent / "templates" / "evidence.html"

# What each picture shows, and what a good and a bad one look like.
READINGS = {
    "cells": "Each panel is one batch and one horizon, and each point is a learning rate. A cell that can be trusted has "
    "points on both sides of its lowest loss; one without is grey and takes no part in the law.",
    "law": "The upper panel has the best learning rate of each cell over the tokens, with the law through them; the lower "
    "one has what is left over. A good fit scatters around 0. A bend over the tokens, or a batch that lies apart from "
    "the others, says that the law has the wrong form for these runs.",
    "map": "The surface shows what another pair (a, b) would cost on the same cells. A narrow valley says that the "
    "exponents are well known; a flat one says that they are not, which matters beyond the range of the proxies.",
    "compare": "What the fitted law and published ones would have cost on these cells. Laws of others were found on other text, "
    "models and optimizers: one that costs much here is not wrong there.",
    "plan": "The learning rate of the planned run, with the band in which the best one lies. A wide band at the end of the "
    "run says that the horizon is far from what the proxies have seen.",
    "verify": "The loss at the recipe's own learning rate and at others around it. The recipe passes if its own point lies "
    "within the green band, and if the lowest point has a higher one on either side.",
    "coord_check": "How much the outputs of each module change in a training step, over the width. Flat lines say that "
    "muP holds; a line that rises or falls says that its module would need another learning rate at another width.",
    "lr_and_loss": "Training loss and learning rate over the tokens seen. After the warmup there should be no spikes.",
}


@dataclass(frozen=True)
class Picture:
    """A picture as base64 of its PNG, and how it is read."""

    name: str
    data: str
    reading: str


@dataclass(frozen=True)
class Section:
    """What one record says.

    Attributes:
        kind: what the record is of, for example "Law".
        place: its folder below that of the page.
        conclusion: its result in a sentence.
        verdict: "passed", "failed" or "inconclusive", of a check; "" for what is none.
        numbers: (what, value) for its table.
        notes: sentences on what to beware of.
    """

    kind: str
    place: str
    conclusion: str
    verdict: str = ""
    numbers: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()


@dataclass
class _Costs:
    """Tokens, FLOPs and seconds of what was trained, by what it was."""

    rows: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def add(self, what: str, tokens: float, flops: float, seconds: float) -> None:
        before = self.rows.get(what, (0.0, 0.0, 0.0))
        self.rows[what] = (before[0] + tokens, before[1] + flops, before[2] + seconds)

    def table(self) -> list[tuple[str, str, str, str]]:
        return [
            (what, si(tokens), f"{flops:.3g}", duration(seconds / SECONDS_PER_DAY))
            for what, (tokens, flops, seconds) in self.rows.items()
        ]


def make_evidence(folder: str | os.PathLike[str]) -> str:
    """The page of a folder, as HTML.

    Sweeps, laws, plans, checks and runs are looked for in the folder and below it, but not in checkpoints and hidden
    folders. Each has its conclusion, its pictures with how to read them, and its numbers; the page ends with costs,
    versions, the SHA-256 of each file, and lines to sign.

    Raises:
        NotFoundError: there is no such folder, or no record in it.
        UserError: a record that is not what its name says.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise NotFoundError(
            f"there is no folder {folder}: pass the one that the sweep, plan, check or run was written to."
        )
    costs, found = _Costs(), list(_records(folder))
    if not found:
        names = ", ".join(SECTIONS)
        raise NotFoundError(f"{folder} has no record of hf_power: pass a folder with any of {names} in it or below it.")
    sections = [SECTIONS[path.name](path, _place(path.parent, folder), costs) for path in found]
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    html: str = template.render(
        name=folder.resolve().name,
        sections=sections,
        costs=costs.table(),
        versions=_versions(found),
        files=[(_place(path, folder), hashlib.sha256(path.read_bytes()).hexdigest()) for path in found],
    )
    return html


def write_evidence(folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a folder, by default as its evidence.html, and return the path; see `make_evidence`."""
    page = make_evidence(folder)
    path = Path(folder) / EVIDENCE_FILE if path is None else Path(path)
    with replaced(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return path


def _records(folder: Path) -> Iterator[Path]:
    """The records below a folder, in the order in which the work is done."""
    found = []
    for place, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith((".", "checkpoint-")))
        found += [Path(place) / name for name in files if name in SECTIONS]
    # The rows beside verify.json are those of the check, which shows them.
    found = [path for path in found if path.name != ROWS_FILE or not (path.parent / VERIFY_FILE).exists()]
    yield from sorted(found, key=lambda path: (list(SECTIONS).index(path.name), path))


def _place(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _pictures(folder: Path, *patterns: str) -> list[Picture]:
    paths = [path for pattern in patterns for path in sorted(folder.glob(f"{pattern}.png"))]
    return [
        Picture(path.stem, base64.b64encode(path.read_bytes()).decode(), READINGS[path.stem.partition("-")[0]])
        for path in paths
    ]


def _sweep(path: Path, place: str, costs: _Costs) -> Section:
    rows, problems = load_rows(path)
    _add_rows(costs, "proxies", rows)
    status = {name: sum(row.status == name for row in rows) for name in ("finished", "diverged", "failed")}
    tokens = sum(row.trained_tokens for row in rows)
    return Section(
        "Proxies",
        place,
        f"{len(rows)} runs took {si(tokens)} tokens: {status['finished']} finished, {status['diverged']} diverged and "
        f"{status['failed']} failed.",
        numbers=[
            ("widths", _listed(row.width for row in rows)),
            ("tokens per step", _listed(row.tokens_per_step for row in rows)),
            ("horizons, tokens", _listed(row.tokens for row in rows)),
            ("seeds", _listed(row.seed for row in rows)),
            ("schedules", ", ".join(sorted({row.schedule for row in rows}))),
        ],
        # The sentences name the file by its path on this machine.
        notes=[problem.replace(str(path), path.name) for problem in problems],
    )


def _add_rows(costs: _Costs, what: str, rows: Sequence[Row]) -> None:
    flops = sum(row.trained_tokens * row.flops_per_token for row in rows)
    costs.add(what, sum(row.trained_tokens for row in rows), flops, sum(row.seconds for row in rows))


def _law(path: Path, place: str, _costs: _Costs) -> Section:
    fit = Fit.load(path.parent)
    law, seen = fit.law, fit.validity
    names = ("a", "b", "batch_exponent", "critical_batch_tokens", "critical_batch_growth", "size_exponent")
    numbers = []
    for name in names:
        value, ends = getattr(law, name), getattr(fit.intervals, name)
        if value is not None and ends is not None:
            numbers.append((name, f"{value:.4g} (95 %: {ends[0]:.4g} to {ends[1]:.4g})"))
    used = sum(cell.used for cell in fit.cells)
    numbers += [
        ("cells used", f"{used} of {len(fit.cells)}"),
        ("scatter of the cells around the law, octaves", figure(fit.residual_sd_octaves)),
        ("tokens seen", f"{si(seen.tokens[0])} to {si(seen.tokens[1])}"),
        ("tokens per step seen", f"{seen.tokens_per_step[0]:,} to {seen.tokens_per_step[1]:,}"),
        ("trusted up to, tokens", si(seen.extrapolates_to.tokens)),
        ("trusted up to, tokens per step", f"{seen.extrapolates_to.tokens_per_step:,}"),
    ]
    pictures = _pictures(path.parent, "law", "map", "compare", "cells", "cells-*")
    return Section("Law", place, _sentence(fit.headline), numbers=numbers, notes=fit.warnings, pictures=pictures)


def _plan(path: Path, place: str, _costs: _Costs) -> Section:
    plan = Plan.load(path.parent)
    compute, law, loss = plan.compute, plan.law, ""
    if plan.loss is not None:
        loss = f"{plan.loss.loss:.3f} (95 %: {plan.loss.low:.3f} to {plan.loss.high:.3f})"
    return Section(
        "Plan",
        place,
        # The third part counts the warnings, which the page shows by themselves.
        _sentence("; ".join(plan.headline.split("; ")[:2])),
        numbers=[
            ("tokens per step", f"{plan.tokens_per_step:,}"),
            ("steps", f"{plan.target.steps:,}"),
            ("law", law.formula),
            *([("loss at the end, nats per token", loss)] if loss else []),
            ("FLOPs", f"{compute.flops:.3g}"),
            ("assumed share of the devices' peak", f"{compute.utilisation:.0%}"),
            *((f"learning rate, {point.what}", f"{point.lr:.3g}") for point in plan.milestones),
        ],
        notes=plan.warnings,
        pictures=_pictures(path.parent, "plan"),
    )


def _check(path: Path, place: str, costs: _Costs) -> Section:
    page = Page.load(path.parent)
    rows_path = path.parent / ROWS_FILE
    if rows_path.exists():
        _add_rows(costs, "check", load_rows(rows_path)[0])
    cell, interval = page.cell, page.regret_interval
    numbers = [
        ("width", figure(cell.width)),
        ("tokens per step", figure(cell.tokens_per_step)),
        ("tokens", figure(cell.tokens)),
        ("tolerance, nats per token", figure(page.tolerance)),
        ("regret", figure(page.regret)),
        *([("95 % of the regret", " to ".join(map(figure, interval)))] if interval else []),
        *((f"loss at {point.factor:g} times the recipe's learning rate", _loss(point.loss)) for point in page.points),
    ]
    return Section(
        "Check before the run",
        place,
        page.conclusion,
        verdict=page.verdict.lower(),
        numbers=numbers,
        notes=page.warnings,
        pictures=_pictures(path.parent, "verify", "coord_check"),
    )


def _loss(loss: float) -> str:
    return figure(loss) if math.isfinite(loss) else "diverged"


def _run(path: Path, place: str, costs: _Costs) -> Section:
    run = Run.load(path.parent)
    # The tokens of a tail's trunk are those of the trunk's own run.
    own = run.steps * run.tokens_per_step if run.kind == "anneal" else run.tokens_seen
    costs.add("runs", own, (run.flops_per_token or 0) * own, run.train_seconds)
    scored = Evaluation.load_if_there(path.parent) if (path.parent / EVAL_FILE).exists() else None
    loss = f", held-out loss {run.held_out_loss:.4f} nats per token" if run.held_out_loss is not None else ""
    numbers = [
        ("parameters", "not known" if run.parameters is None else figure(run.parameters)),
        ("tokens seen", f"{run.tokens_seen:,}"),
        ("tokens per step", f"{run.tokens_per_step:,}"),
        ("training time", duration(run.train_seconds / SECONDS_PER_DAY)),
        *((f"evaluated: {name}", figure(value)) for name, value in ((scored and scored.metrics) or {}).items()),
    ]
    notes = [f"{len(run.skipped_steps)} steps without a finite gradient were skipped."] if run.skipped_steps else []
    notes += [f"{len(run.loss_spikes)} logged losses jumped far above those before them."] if run.loss_spikes else []
    return Section(
        "Model" if run.kind == "anneal" else "Run",
        place,
        f"{run.name} has {run.status} after {si(run.tokens_seen)} tokens{loss}.",
        numbers=numbers,
        notes=notes,
        pictures=_pictures(path.parent, "lr_and_loss"),
    )


SECTIONS: dict[str, Callable[[Path, str, _Costs], Section]] = {
    ROWS_FILE: _sweep,
    FIT_FILE: _law,
    PLAN_FILE: _plan,
    VERIFY_FILE: _check,
    RUN_FILE: _run,
}


def _versions(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Package -> the versions that the records name."""
    named: dict[str, set[str]] = {}
    for path in paths:
        if path.name == ROWS_FILE:
            found: list[Mapping[str, object]] = [row.versions for row in load_rows(path)[0]]
        else:
            found = [known_facts(read_json(path) or {}).part("versions")]
        for package, version in (pair for versions in found for pair in versions.items()):
            named.setdefault(package, set()).add(str(version))
    return [(package, ", ".join(sorted(versions))) for package, versions in sorted(named.items())]


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _listed(values: "Iterator[int]") -> str:
    return ", ".join(f"{value:,}" for value in sorted(set(values)))
