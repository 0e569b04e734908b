"""Which runs of a grid come next, where the rate at one target is to be known: those that tell most for their tokens."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from hf_power.fit.cells import fit_cells
from hf_power.fit.fit import fit_law
from hf_power.fit.form import Critical, Form
from hf_power.fit.result import Fit
from hf_power.fit.squares import least_squares
from hf_power.records.errors import UserError
from hf_power.records.rows import Row
from hf_power.schedule import Law, beta
from hf_power.sweep.aim import Aim
from hf_power.sweep.grid import Grid, few_digits
from hf_power.sweep.interval import Known, Place, Run, noise_of
from hf_power.sweep.jobs import Group, Job, belongs, edges, horizon_tokens, job_tokens, row_value

# A round takes on runs until it has this share of the tokens before it, and at least one: enough for several workers, and
# so little that hardly anything is run that later results would have spared.
ROUND = 0.1
# New runs lie so near to the law's optimum, in octaves: further out a loss is no parabola any more.
NEAR_OCTAVES = 1.6


@dataclass(frozen=True)
class Answer:
    """What the rows say of the aim, and the jobs that come next; none where it is reached or nothing more can be run.

    The rate and its 95 % interval are None while there are too few cells for a law.
    """

    rate: float | None
    interval: tuple[float, float] | None
    jobs: tuple[Job, ...]

    @property
    def octaves(self) -> float:
        """Half of the interval."""
        return math.log2(self.interval[1] / self.interval[0]) / 2 if self.interval else math.inf


def next_answer(grid: Grid, groups: Sequence[Group], rows: Sequence[Row], aim: Aim, number: int) -> Answer:
    """Round `number`: what the rows of the rounds before it say, and the jobs of this one.

    Round 0 trains the smallest and the largest batch of the smallest width, with one seed, at every horizon. A later round
    first adds learning rates beyond the edges at which a cell's best loss lies. With every cell bracketed, it takes the
    first jobs of the cheapest plan that is expected to reach the aim, see `_most_telling`. A round
    follows from the rows of those before it alone, so that a killed sweep goes on with the round that it was in.
    """
    before = [row for row in rows if row.extension is not None and row.extension < number]
    table = _Table(grid, groups, [row for row in before if row.schedule == groups[0].schedule], number)
    if number == 0:
        return Answer(None, None, tuple(table.first()))
    fit = aimed_fit(table.rows, groups[0].schedule, aim)
    if fit is None:
        return Answer(None, None, tuple(table.beyond_edges() or table.widened()))
    rate, low, high = fit.predict(aim.tokens, aim.tokens_per_step, aim.width)
    answer = Answer(rate, (low, high), ())
    if answer.octaves <= aim.octaves:
        return answer
    jobs = table.beyond_edges() or _most_telling(table, _known(table, fit.law), aim, answer.octaves)
    return replace(answer, jobs=tuple(jobs))


def aimed_fit(rows: Sequence[Row], schedule: str, aim: Aim) -> Fit | None:
    """The fit that an aim is judged by; None while the rows cannot carry a law."""
    try:
        return fit_law(rows, schedule=schedule, size="width" if aim.width else None)
    except UserError:
        return None


def first_groups(groups: Sequence[Group]) -> list[Group]:
    """The smallest and the largest batch of the smallest width."""
    narrow = [group for group in groups if group.width == min(each.width for each in groups)]
    narrow.sort(key=lambda group: group.tokens_per_step)
    return narrow[:1] + narrow[1:][-1:]


class Trunk(NamedTuple):
    """Runs of one model at several horizons: a group's value and seed."""

    group: Group
    value: float
    seed: int


class _Table:
    """The rows of the rounds before this one, by group and by cell."""

    def __init__(self, grid: Grid, groups: Sequence[Group], rows: Sequence[Row], number: int) -> None:
        self.grid, self.groups, self.rows, self.number = grid, groups, list(rows), number
        self.of_group = {group: [row for row in rows if belongs(row, group)] for group in groups}
        self.cells = {Place(cell.tokens, cell.tokens_per_step, cell.width): cell for cell in fit_cells(self.rows)}
        self.runs: dict[Place, frozenset[Run]] = {}
        for row in rows:
            if row.loss is not None:
                place = Place(row.tokens, row.tokens_per_step, row.width)
                self.runs[place] = self.runs.get(place, frozenset()) | {Run(row_value(row), row.seed)}
        self.spent = sum(row.trained_tokens for row in rows)

    def first(self) -> list[Job]:
        """The jobs of round 0."""
        return [self.job(group, group.values, group.seeds[0], max(group.tokens)) for group in first_groups(self.groups)]

    def beyond_edges(self) -> list[Job]:
        """A learning rate beyond each edge at which an unused cell's best loss lies, up to its horizon."""
        jobs = []
        for group, rows in self.of_group.items():
            longest: dict[float, int] = {}
            for place, cell in self.cells.items():
                inside = [row for row in rows if row.tokens == place.tokens]
                if (
                    cell.used
                    or not inside
                    or (place.tokens_per_step, place.width) != (group.tokens_per_step, group.width)
                ):
                    continue
                lowest, best, highest = edges(inside)
                for edge, beyond in ((lowest, lowest / self.grid.factor), (highest, highest * self.grid.factor)):
                    if best == edge and (value := few_digits(beyond)) in self.ladder(group):
                        longest[value] = max(place.tokens, longest.get(value, 0))
            for value, tokens in sorted(longest.items()):
                jobs.append(self.job(group, (value,), group.seeds[0], tokens))
        return self.affordable(jobs)

    def widened(self) -> list[Job]:
        """What helps where no law can be fitted: the first group that is not begun, or one more seed of all that are."""
        for group in sorted(self.groups, key=lambda group: (group.width, group.tokens_per_step)):
            if not self.of_group[group]:
                return self.affordable([self.job(group, group.values, group.seeds[0], max(group.tokens))])
        jobs = []
        for group in self.groups:
            if (seed := self.new_seed(group)) is not None:
                values = sorted({row_value(row) for row in self.of_group[group]})
                jobs.append(self.job(group, tuple(values), seed, max(group.tokens)))
        return self.affordable(jobs)

    def job(self, group: Group, values: Sequence[float], seed: int, tokens: int) -> Job:
        """The runs of these values and seed at all horizons up to `tokens` that are missing."""
        have = {(row_value(row), row.tokens) for row in self.of_group[group] if row.seed == seed}
        horizons = {v: tuple(t for t in sorted(group.tokens) if t <= tokens and (v, t) not in have) for v in values}
        return Job(replace(group, seeds=(seed,)), self.number, {v: ts for v, ts in horizons.items() if ts})

    def affordable(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that train something, as far as the grid's budget reaches."""
        taken, more = [], 0
        for job in jobs:
            if job.horizons and self.within_budget([job], more):
                taken.append(job)
                more += job_tokens(self.grid, job)
        return taken

    def within_budget(self, jobs: Sequence[Job], more: int) -> list[Job]:
        """Those that the grid's budget has room for, beside what was spent and `more`."""
        room = (self.grid.max_tokens or math.inf) - self.spent - more
        return [job for job in jobs if job_tokens(self.grid, job) <= room]

    def new_seed(self, group: Group) -> int | None:
        """The first seed without a run in the group."""
        begun = {row.seed for row in self.of_group[group]}
        return next((seed for seed in group.seeds if seed not in begun), None)

    def ladder(self, group: Group) -> list[float]:
        """The values that a group may have: those to begin with, and max_extensions factors beyond them; rising."""
        values = sorted(group.values)
        for _ in range(self.grid.max_extensions):
            values = [few_digits(values[0] / self.grid.factor), *values, few_digits(values[-1] * self.grid.factor)]
        lost = [row_value(row) for row in self.of_group[group] if row.status == "diverged"]
        return [value for value in values if value < min(lost, default=math.inf)]

    def possible(self, known: Known) -> dict[Trunk, tuple[int, ...]]:
        """All that could still be run near the law's optimum: trunk -> its missing horizons, rising."""
        found: dict[Trunk, tuple[int, ...]] = {}
        for group in self.groups:
            optima = [known.optimum(Place(t, group.tokens_per_step, group.width)) for t in group.tokens]
            near = [v for v in self.ladder(group) if min(abs(math.log2(v / o)) for o in optima) <= NEAR_OCTAVES]
            for seed in group.seeds:
                horizons = self.job(group, near, seed, max(group.tokens)).horizons
                found |= {Trunk(group, value, seed): ts for value, ts in horizons.items()}
        return found


def _known(table: _Table, law: Law) -> Known:
    """What the fit knows, as far as the choice needs it."""
    used = {place: cell for place, cell in table.cells.items() if cell.used}
    kind: Critical = "growing" if law.critical_batch_growth else "fixed"
    form, cap = Form("width" if law.size else None), (math.inf, 0.0)
    if law.critical_batch_tokens is not None:
        form = form._replace(critical=kind)
        cap = math.log2(beta(law.critical_batch_tokens)), law.critical_batch_growth
    variances = {place: cell.optimum().sd_octaves ** 2 for place, cell in used.items()}
    known = Known(law, form, cap, 0.0, variances, noise_of(used, table.runs, sorted(table.grid.tokens)))
    lr = np.log2([cell.optimum().lr for cell in used.values()])
    return replace(known, spread=least_squares(known.design(list(used)), lr, np.sqrt(list(variances.values()))).spread)


Horizons = Mapping[Trunk, tuple[int, ...]]


@dataclass(frozen=True)
class _Plan:
    """Runs to come, with what is expected to be known after them."""

    table: _Table
    known: Known
    target: Place
    horizons: Horizons

    @cached_property
    def half_width(self) -> float:
        """Half of the expected interval after these runs, octaves."""
        more: dict[Place, set[Run]] = defaultdict(set)
        for trunk, horizons in self.horizons.items():
            for tokens in horizons:
                place = Place(tokens, trunk.group.tokens_per_step, trunk.group.width)
                more[place].add(Run(trunk.value, trunk.seed))
        before = self.table.runs
        runs = {place: before.get(place, frozenset()) | inside for place, inside in more.items()}
        return self.known.expected(runs, before).half_width(self.target)

    def tokens(self, horizons: Horizons) -> int:
        """Tokens that these runs train."""
        grid = self.table.grid
        return sum(sum(horizon_tokens(grid, trunk.group, ts).values()) for trunk, ts in horizons.items())

    def cheaper(self, most: float) -> "_Plan | None":
        """The plan without the runs that tell least per token, if it still brings a half-width of at most `most`."""
        best: tuple[float, _Plan] | None = None
        for fewer in self._steps():
            left = {trunk: ts for trunk, ts in (dict(self.horizons) | fewer).items() if ts}
            plan = replace(self, horizons=left)
            if plan.half_width <= most:
                saved = self.tokens({trunk: self.horizons[trunk] for trunk in fewer}) - self.tokens(fewer)
                loss = math.log(plan.half_width / self.half_width) / saved
                best = (loss, plan) if best is None or loss < best[0] else best
        return best[1] if best else None

    def _steps(self) -> Iterator[dict[Trunk, tuple[int, ...]]]:
        """What may be left out: all or the longest horizon of a trunk, or of all trunks of a group and seed."""
        kinds: dict[tuple[Group, int], list[Trunk]] = defaultdict(list)
        for trunk, horizons in self.horizons.items():
            kinds[trunk.group, trunk.seed].append(trunk)
            yield {trunk: ()}
            yield {trunk: horizons[:-1]}
        for trunks in kinds.values():
            longest = max(self.horizons[trunk][-1] for trunk in trunks)
            yield {trunk: () for trunk in trunks}
            yield {t: self.horizons[t][:-1] for t in trunks if self.horizons[t][-1] == longest}


def _most_telling(table: _Table, known: Known, aim: Aim, octaves: float) -> list[Job]:
    """The first jobs of the cheapest plan that is expected to reach the aim from today's `octaves`.

    The plan begins as all that could still be run, and loses what tells least per token. What is expected is the ratio of
    two half-widths of `Known`, since the fit's own one holds more than that can foresee.
    """
    target = Place(aim.tokens, aim.tokens_per_step, aim.width or table.groups[0].width)
    plan = _Plan(table, known, target, table.possible(known))
    goal = max(aim.octaves / octaves * known.half_width(target), plan.half_width)
    while less := plan.cheaper(goal):
        plan = less
    jobs: dict[tuple[int, int], dict[float, tuple[int, ...]]] = defaultdict(dict)
    for trunk, horizons in plan.horizons.items():
        jobs[trunk.seed, table.groups.index(trunk.group)][trunk.value] = horizons
    taken: list[Job] = []
    for (seed, number), of_values in sorted(jobs.items()):
        job = Job(replace(table.groups[number], seeds=(seed,)), table.number, of_values)
        if sum(job_tokens(table.grid, each) for each in taken) < ROUND * table.spent:
            taken += table.affordable([job])
    return taken
