"""Runs -> experiments -> sheets: the arms of one recipe beside each other, over seeds.

An experiment is what the runs of several arms share: everything in their recipes but the arm, its own settings and the
seed. Runs of one name that differ in more than that are two experiments, each with a heading of its own, and a remark
says so. A sheet is a table with its numbers, of ours as of a published one (`hetero_kt.tables`); `text`, `figures` and
`page` show it.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from hetero_kt.config import Control, Distill, Recipe, differences, flat
from hetero_kt.report import metrics
from hetero_kt.report.history import chosen
from hetero_kt.report.runs import LENGTH, Run, one_per_seed, tested_apart, trained_on_other_ranks, values
from hetero_kt.statistics import Difference, Spread, paired, spread

BASELINE: Control = "none"
ORDER: tuple[str, ...] = (BASELINE, *(c for c in typing.get_args(Control) if c != BASELINE))


@dataclass(frozen=True)
class Cell:
    """One metric of one row."""

    ours: Spread | None = None
    """None where nothing counts."""
    difference: Difference | None = None
    """To the row's baseline, seed by seed; None for a baseline, and where they share no seed."""
    published: float | None = None
    published_difference: float | None = None
    """Published value minus the baseline's."""
    unverified: bool = False
    """The published number was never seen at its source."""


@dataclass(frozen=True)
class Line:
    """One row of a sheet."""

    label: str
    baseline: str
    """Label of the row that it is compared with; empty for a baseline."""
    seeds: tuple[int, ...]
    """Of its runs that count."""
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Sheet:
    """One table."""

    title: str
    metrics: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    """What its reader has to know."""
    published: bool = False
    """It stands beside published numbers."""
    chosen: str = ""
    """How its numbers were chosen, where that flatters them."""


@dataclass(frozen=True)
class Arm:
    """The runs of one arm that count, by seed."""

    label: str
    name: str
    runs: Mapping[int, Run]


@dataclass(frozen=True)
class Experiment:
    """Arms that differ in nothing else."""

    title: str
    arms: tuple[Arm, ...]

    @property
    def models(self) -> list[str]:
        """Those that its runs measured, in the order that they name them."""
        return list(dict.fromkeys(model for arm in self.arms for run in arm.runs.values() for model in run.metrics))

    def runs(self) -> list[Run]:
        """All that count."""
        return [run for arm in self.arms for run in arm.runs.values()]


def experiments(found: Iterable[Run]) -> tuple[list[Experiment], list[str]]:
    """The experiments in what was found, by name, and a sentence on each run that does not count or stays apart."""
    found = list(found)
    notes = [f"{run.folder} {run.problem}: it does not count." for run in found if run.problem]
    finished = [run for run in found if run.finished]
    notes += [f"{run.folder} has {run.left_out}." for run in finished if run.left_out]
    for reason in dict.fromkeys(run.unknown for run in finished if run.unknown):
        places = _places([run for run in finished if run.unknown == reason])
        notes.append(f"Compared by name and steps alone, each {reason}: {places}.")
    made = []
    for name in sorted({run.name for run in finished}):
        for other, group in _variants([run for run in finished if run.name == name], _shared):
            if other:
                notes.append(f"Of another recipe called {name}, with {other}, and kept apart: {_places(group)}.")
            arms, reasons = _arms(group)
            notes += reasons
            if arms:
                made.append(Experiment(f"{name} ({other})" if other else name, tuple(arms)))
                notes += _cut_short(made[-1])
    return made, notes


def _cut_short(experiment: Experiment) -> list[str]:
    """A sentence on runs that --max-steps has ended early, where all did: else the title tells them from the others."""
    run, *_ = experiment.runs()
    if run.recipe is None or run.steps >= run.recipe.steps or "steps done" in experiment.title:
        return []
    return [f"{experiment.title} was cut short by --max-steps, at {run.steps} of {run.recipe.steps} steps."]


def _arms(group: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    arms, notes = [], []
    for name in sorted({run.arm for run in group}, key=_rank):
        for other, runs in _variants([run for run in group if run.arm == name], _own):
            if other:
                notes.append(f"Another {name} of {runs[0].name}, with {other}, and kept apart: {_places(runs)}.")
            counted, reasons = one_per_seed(runs)
            notes += reasons
            if counted:
                arms.append(Arm(f"{name} ({other})" if other else name, name, counted))
    return arms, notes


def _rank(arm: str) -> tuple[int, str]:
    return (ORDER.index(arm) if arm in ORDER else len(ORDER), arm)


def _places(runs: Sequence[Run]) -> str:
    more = f" and {len(runs) - 3} more" if len(runs) > 4 else ""
    return ", ".join(str(run.folder) for run in (runs[:3] if more else runs)) + more


def _variants(runs: Sequence[Run], part: Callable[[Recipe], Recipe]) -> list[tuple[str, list[Run]]]:
    """Runs that are alike in `part` of their recipes, and in what each group differs from the largest (empty for that
    one, which comes first)."""
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if not _apart(group[0], run, part)), None)
        if group is None:
            groups.append(group := [])
        group.append(run)
    groups.sort(key=len, reverse=True)
    return [(_apart(groups[0][0], group[0], part), group) for group in groups]


def _apart(a: Run, b: Run, part: Callable[[Recipe], Recipe]) -> str:
    """In what `b` differs from `a`, with its own values; empty where they are alike."""
    if a.recipe is None or b.recipe is None:
        if (a.recipe is None) != (b.recipe is None):
            return "a recipe.yaml" if a.recipe is None else "no recipe.yaml"
        return "" if a.steps == b.steps else f"{b.steps} steps"
    ours, theirs = part(a.recipe), part(b.recipe)
    found = [f"{path} {flat(theirs).get(path)}"[:LENGTH] for path in differences(ours, theirs)]
    if (a.steps == a.recipe.steps) != (b.steps == b.recipe.steps) or (not found and a.steps != b.steps):
        found.append(f"{b.steps} of {b.recipe.steps} steps done")
    if part is _own and a.seen.get("teachers") != b.seen.get("teachers"):
        found.append("other weights of its teacher")
    if (a.seen.get("init") or {}) != (b.seen.get("init") or {}):
        found.append("other first weights")
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _shared(recipe: Recipe) -> Recipe:
    """What runs of all arms have in common. Who teaches a student, and how, is the arm's own matter."""
    method = recipe.method
    method = Distill({}, "none") if isinstance(method, Distill) else method.with_arm(BASELINE)
    return replace(recipe, seed=0, method=method)


def _own(recipe: Recipe) -> Recipe:
    """What runs of one arm have in common: settings of other objectives do nothing."""
    method = recipe.method
    if isinstance(method, Distill):
        parts = ["kd"] if method.arm == "fbt" and method.fbt.pair == "kd" else []  # whose temperature it takes
        own = {part: getattr(method, part) for part in (*parts, method.arm) if hasattr(method, part)}
        method = Distill(method.teachers if method.taught else {}, method.objective, **own)
    return replace(recipe, seed=0, method=method)


# --- numbers ---


def compare(experiment: Experiment) -> list[Sheet]:
    """A sheet per model: mean and spread of every metric over seeds, with the difference to `none`."""
    baseline = next((arm for arm in experiment.arms if arm.name == BASELINE), None)
    sheets = []
    for model in experiment.models:
        lines: list[Line] = []
        notes: dict[str, None] = {}
        for arm in experiment.arms:
            theirs = baseline.runs if baseline is not None and baseline is not arm else {}
            apart = tested_apart(arm.runs, model, theirs, model)
            if apart:
                notes[f"{arm.label}: no difference to {BASELINE}, which was evaluated on other samples."] = None
            else:
                notes |= dict.fromkeys(trained_on_other_ranks(arm.label, arm.runs, BASELINE, theirs))
            names = dict.fromkeys(name for run in arm.runs.values() for name in run.metrics.get(model, {}))
            cells = {}
            for name in names:
                cells[name], reasons = cell(arm.runs, model, {} if apart else theirs, model, name)
                notes |= dict.fromkeys(reasons)
            if any(one.ours for one in cells.values()):
                lines.append(Line(arm.label, BASELINE if theirs else "", tuple(arm.runs), cells))
        columns = metrics.ordered(name for line in lines for name in line.cells)
        title = f"{experiment.title}: {model}"
        way = chosen((run, model) for run in experiment.runs())
        sheets.append(Sheet(title, tuple(columns), tuple(lines), tuple(notes), chosen=way))
    return [sheet for sheet in sheets if sheet.lines]


def cell(
    runs: Mapping[int, Run], model: str, baseline: Mapping[int, Run], other: str, metric: str
) -> tuple[Cell, list[str]]:
    """A metric of `model` in `runs`, beside that of `other` in `baseline`; and what of it is no number."""
    ours, notes = values(runs, model, metric)
    theirs, more = values(baseline, other, metric)
    return Cell(spread(ours.values()) if ours else None, paired(ours, theirs)), notes + more
