"""A report as one HTML file: no script, nothing from the network; light and dark, on paper and on a narrow screen.

All text from runs (names, folders, commands) reaches the page through a template that escapes it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from hetero_kt.files import write_named
from hetero_kt.messages import printable, shown
from hetero_kt.nn.adapter import UNFOLDINGS
from hetero_kt.report import Report, charts, history, text
from hetero_kt.report.comparison import Arm, Cell, Experiment, Sheet
from hetero_kt.report.figures import compared
from hetero_kt.report.history import band, first_of
from hetero_kt.report.metrics import heading, leading
from hetero_kt.report.runs import LENGTH, Run

STYLES = ("none", "transfer", "noise", "shuffled", "frozen", "standardise", "sharing")
"""Arms with a line style of their own, in the order of the page's; others take them in turn."""
PATH = {
    "gate": ("gate", "0 keeps the target, 1 takes the proposal"),
    "sensitivity": ("source sensitivity", "change of a proposal when its source is swapped for noise"),
    "change": ("proposed change", "relative to the size of the weight"),
}
"""What a transfer logs besides omega: its title and what it is."""


COMMAND, ENTRIES = 5_000, 20
"""Characters of a command that are shown, and entries of a mapping."""
PATHS, LAYERS = 20, 20
"""So many transfers of an experiment are drawn, and layers of an adapter."""


@dataclass(frozen=True)
class Group:
    """Charts below one heading."""

    title: str
    charts: tuple[charts.Chart, ...]


def write(report: Report, file: str | Path) -> None:
    """Write the page to `file`."""
    write_named(file, html(report))


def html(report: Report) -> str:
    """The page."""
    compared_ones = [sheet for sheet in report.sheets if not sheet.published]
    published = [sheet for sheet in report.sheets if sheet.published]
    runs = [run for experiment in report.experiments for run in experiment.runs()]
    curves = [(experiment, *_curves(experiment)) for experiment in report.experiments]
    page = _template().render(
        sections=[(sheet, _differences(sheet)) for sheet in published],
        comparisons=[(sheet, _differences(sheet)) for sheet in compared_ones],
        curves=[one for one in curves if any(one[1:])],
        origins=[_origin(run) for run in runs],
        commands=_commands(runs),
        notes=report.notes,
        names=_names(report),
        arms=_count(report),
        text=text,
        heading=heading,
        Cell=Cell,
    )
    return "\n".join(map(printable, page.split("\n")))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("hetero_kt.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def _names(report: Report) -> str:
    names = list(dict.fromkeys(run.name for experiment in report.experiments for run in experiment.runs()))
    return ", ".join(names) if 0 < len(names) < 4 else f"{len(names) or 'No'} recipes"


def _count(report: Report) -> str:
    runs = [run for experiment in report.experiments for run in experiment.runs()]
    seeds = len({run.seed for run in runs})
    return f"{len(runs)} finished run{'s' * (len(runs) != 1)}, {seeds} seed{'s' * (seeds != 1)}"


def _differences(sheet: Sheet) -> list[charts.Chart]:
    return [charts.intervals(sheet, metric, rows) for metric, rows in compared(sheet)]


def _curves(experiment: Experiment) -> tuple[list[Group], list[str]]:
    """What the runs did over their steps: the models' metrics and losses, then each transfer's own. And what was left
    out of it."""
    read = {run.folder: history.read(run.folder) for run in experiment.runs()}
    logs = {folder: log for folder, (log, _) in read.items()}
    notes = [note for _, note in read.values() if note]
    styles = _styles(experiment)

    def arms(*keys: str) -> list[charts.Curve]:
        found = []
        for arm in experiment.arms:
            label = f"{arm.label} ({len(arm.runs)})" if len(arm.runs) > 1 else arm.label
            series = [first_of(logs[run.folder], keys) for run in arm.runs.values()]
            found.append(charts.Curve(label, styles[arm.label], *band(series)))
        return found

    groups = []
    for model in experiment.models:
        lead = next(leading(run.metrics[model]) for run in experiment.runs() if model in run.metrics)
        made = [
            charts.lines(f"{model} in evaluation", heading(lead), arms(f"{model}/test_{lead}", f"{model}/{lead}")),
            charts.lines(f"{model} in training", "loss", arms(f"{model}/loss")),
        ]
        groups.append(_group(model, made))
    paths = _paths(logs.values())
    if len(paths) > PATHS:
        notes.append(f"{len(paths):,} transfers were logged: the first {PATHS} are drawn.")
    for path in paths[:PATHS]:
        made = [charts.lines(title, what, arms(f"{path}/{name}")) for name, (title, what) in PATH.items()]
        groups.append(_group(f"Transfer {path}", [*made, *_omega(experiment, logs, path)]))
    return [group for group in groups if group.charts], notes


def _group(title: str, made: Sequence[charts.Chart | None]) -> Group:
    return Group(title, tuple(chart for chart in made if chart is not None))


def _styles(experiment: Experiment) -> dict[str, int]:
    """The arms of MergeNet look alike in all charts; others take what these leave."""
    own = {arm.label: STYLES.index(arm.label) for arm in experiment.arms if arm.label in STYLES}
    order = (*range(len(STYLES), charts.SERIES), *range(len(STYLES)))
    free = itertools.cycle([style for style in order if style not in own.values()] or order)
    return {arm.label: own[arm.label] if arm.label in own else next(free) for arm in experiment.arms}


def _paths(logs: Any) -> list[str]:
    """Names of the transfers that were logged."""
    names = dict.fromkeys(key for log in logs for key in log if key.endswith("/gate"))
    return [name.removesuffix("/gate") for name in names]


def _omega(experiment: Experiment, logs: Mapping[Path, Any], path: str) -> list[charts.Chart | None]:
    """Per layer of the adapter the weights of its unfoldings, of the transfers alone."""
    arms = [arm for arm in experiment.arms if arm.name == "transfer"]
    return [chart for arm in arms for chart in _omega_of(arm, f", {arm.label}" if len(arms) > 1 else "", logs, path)]


def _omega_of(arm: Arm, of_which: str, logs: Mapping[Path, Any], path: str) -> list[charts.Chart | None]:
    own = [logs[run.folder] for run in arm.runs.values()]
    found = [
        re.fullmatch(rf"{re.escape(path)}/omega(\d{{1,3}})\.(\d{{1,3}})", key, re.ASCII) for log in own for key in log
    ]
    layers: dict[int, dict[int, None]] = {}
    for match in filter(None, found):
        layers.setdefault(int(match[1]), {})[int(match[2])] = None
    made = []
    for layer, unfoldings in sorted(layers.items())[:LAYERS]:
        curves = []
        for i in sorted(unfoldings):
            label = " <- ".join(UNFOLDINGS[i]) if i < len(UNFOLDINGS) else str(i)
            series = [log.get(f"{path}/omega{layer}.{i}", {}) for log in own]
            curves.append(charts.Curve(label, i + 1, *band(series)))
        made.append(
            charts.lines(f"omega of layer {layer + 1}{of_which}", "weights of target <- source unfoldings", curves)
        )
    return made


def _origin(run: Run) -> dict[str, str]:
    """Where a run's numbers came from."""
    told = run.result
    ranks = run.ranks or ""
    stages, versions = _mapping(told.get("zero_stage")), _mapping(told.get("versions"))
    zero = ", ".join(dict.fromkeys(f"ZeRO-{_short(stage)}" for stage in stages.values()))
    seconds = told.get("wall_seconds")
    took = f"{float(seconds):,.0f} s" if isinstance(seconds, int | float) and 0 <= seconds < 1e12 else ""
    return {
        "recipe": run.name,
        "arm": run.arm,
        "seed": str(run.seed),
        "steps": str(run.steps),
        "hardware": ", ".join(filter(None, (f"{ranks} x {_short(told.get('device', ''))}", zero))),
        "took": took,
        "commit": _short(told.get("commit", "")),
        "versions": ", ".join(f"{name} {_short(version)}" for name, version in versions.items()),
        "folder": str(run.folder),
    }


def _commands(runs: Sequence[Run]) -> dict[str, str]:
    """Each command that made some of the runs, and which."""
    made: dict[str, dict[str, list[int]]] = {}
    for run in runs:
        command = run.result.get("command")
        if isinstance(command, str) and (command := command[:COMMAND]):
            made.setdefault(command, {}).setdefault(f"{run.name}, {run.arm}", []).append(run.seed)
    return {command: "; ".join(map(_with_seeds, arms, arms.values())) for command, arms in made.items()}


def _with_seeds(arm: str, seeds: Sequence[int]) -> str:
    return f"{arm}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"


def _mapping(value: Any) -> dict[str, Any]:
    """A few of its entries, by short names."""
    entries = value.items() if isinstance(value, dict) else ()
    return {_short(name): entry for name, entry in itertools.islice(entries, ENTRIES)}


def _short(value: Any) -> str:
    return value[:LENGTH] if isinstance(value, str) else shown(value)
