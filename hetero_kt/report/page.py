"""A report as one HTML file: no script, nothing from the network; light and dark, on paper and on a narrow screen.

All text from runs (names, folders, commands) reaches the page through a template that escapes it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hetero_kt.nn.adapter import UNFOLDINGS
from hetero_kt.report import Report, charts, text
from hetero_kt.report.comparison import Arm, Cell, Experiment, Sheet
from hetero_kt.report.figures import compared
from hetero_kt.report.history import band, first_of, history
from hetero_kt.report.metrics import heading, leading
from hetero_kt.report.runs import Run

STYLES = ("none", "transfer", "noise", "shuffled", "frozen", "standardise", "sharing")
"""Arms with a line style of their own, in the order of the page's; others take them in turn."""
PATH = {
    "gate": ("gate", "0 keeps the target, 1 takes the proposal"),
    "sensitivity": ("source sensitivity", "change of a proposal when its source is swapped for noise"),
    "change": ("proposed change", "relative to the size of the weight"),
}
"""What a transfer logs besides omega: its title and what it is."""


@dataclass(frozen=True)
class Group:
    """Charts below one heading."""

    title: str
    charts: tuple[charts.Chart, ...]


def write(report: Report, file: str | Path) -> None:
    """Write the page to `file`."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(html(report), encoding="utf-8")


def html(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("hetero_kt.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared_ones = [sheet for sheet in report.sheets if not sheet.published]
    published = [sheet for sheet in report.sheets if sheet.published]
    runs = [run for experiment in report.experiments for run in experiment.runs()]
    return environment.get_template("page.html").render(
        sections=[(sheet, _differences(sheet)) for sheet in published],
        comparisons=[(sheet, _differences(sheet)) for sheet in compared_ones],
        curves=[(experiment, groups) for experiment in report.experiments if (groups := _curves(experiment))],
        origins=[_origin(run) for run in runs],
        commands=_commands(runs),
        notes=report.notes,
        names=_names(report),
        arms=_count(report),
        text=text,
        heading=heading,
        Cell=Cell,
    )


def _names(report: Report) -> str:
    names = list(dict.fromkeys(run.name for experiment in report.experiments for run in experiment.runs()))
    return ", ".join(names) if 0 < len(names) < 4 else f"{len(names) or 'No'} recipes"


def _count(report: Report) -> str:
    runs = [run for experiment in report.experiments for run in experiment.runs()]
    seeds = len({run.seed for run in runs})
    return f"{len(runs)} finished run{'s' * (len(runs) != 1)}, {seeds} seed{'s' * (seeds != 1)}"


def _differences(sheet: Sheet) -> list[charts.Chart]:
    return [charts.intervals(sheet, metric, rows) for metric, rows in compared(sheet)]


def _curves(experiment: Experiment) -> list[Group]:
    """What the runs did over their steps: the models' metrics and losses, then each transfer's own."""
    logs = {run.folder: history(run.folder) for run in experiment.runs()}
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
    for path in _paths(logs.values()):
        made = [charts.lines(title, what, arms(f"{path}/{name}")) for name, (title, what) in PATH.items()]
        groups.append(_group(f"Transfer {path}", [*made, *_omega(experiment, logs, path)]))
    return [group for group in groups if group.charts]


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
    found = [re.fullmatch(rf"{re.escape(path)}/omega(\d+)\.(\d+)", key) for log in own for key in log]
    layers: dict[int, dict[int, None]] = {}
    for match in filter(None, found):
        layers.setdefault(int(match[1]), {})[int(match[2])] = None
    made = []
    for layer, unfoldings in sorted(layers.items()):
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
    ranks = told.get("world_size", "")
    stages, versions = _mapping(told.get("zero_stage")), _mapping(told.get("versions"))
    zero = ", ".join(dict.fromkeys(f"ZeRO-{stage}" for stage in stages.values()))
    seconds = told.get("wall_seconds")
    took = f"{float(seconds):,.0f} s" if isinstance(seconds, int | float) else ""
    return {
        "recipe": run.name,
        "arm": run.arm,
        "seed": str(run.seed),
        "steps": str(run.steps),
        "hardware": ", ".join(filter(None, (f"{ranks} x {told.get('device', '')}", zero))),
        "took": took,
        "commit": str(told.get("commit", "")),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "folder": str(run.folder),
    }


def _commands(runs: Sequence[Run]) -> dict[str, str]:
    """Each command that made some of the runs, and which."""
    made: dict[str, dict[str, list[int]]] = {}
    for run in runs:
        if command := str(run.result.get("command", "")):
            made.setdefault(command, {}).setdefault(f"{run.name}, {run.arm}", []).append(run.seed)
    return {command: "; ".join(map(_with_seeds, arms, arms.values())) for command, arms in made.items()}


def _with_seeds(arm: str, seeds: Sequence[int]) -> str:
    return f"{arm}, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
