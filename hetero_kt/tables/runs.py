"""What has been run of a table: the seeds of each row, read from run folders.

A run counts where its `recipe.yaml` equals what the row's command trains, the seed aside. What does not count is named
with its reason, and nothing stands in for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetero_kt.config import Recipe, differences, from_yaml
from hetero_kt.statistics import Difference, Spread, paired, spread
from hetero_kt.tables import Budget, Row, Table, resolved


@dataclass(frozen=True)
class Found:
    """One run folder, as far as it can be read."""

    folder: Path
    recipe: Recipe | None
    steps: int
    metrics: Mapping[str, Mapping[str, float]]
    """model -> metric -> value, percentages in 0..100."""
    data: Any
    """What its data.json says of the samples; None where there is none."""
    problem: str = ""
    """Why it cannot count, whatever it is compared with."""


def find(paths: Iterable[str | Path]) -> list[Found]:
    """All run folders at or below `paths`; those that do not exist hold none."""
    folders = {folder.resolve(): folder for path in map(Path, paths) for folder in _folders(path)}
    return [_read(folder) for folder in folders.values()]


def _folders(path: Path) -> list[Path]:
    return sorted({mark.parent for name in ("result.json", "recipe.yaml") for mark in path.rglob(name)})


def _read(folder: Path) -> Found:
    nothing = Found(folder, None, 0, {}, None)
    try:
        recipe = from_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return replace(nothing, problem="has no recipe.yaml that says what it is of")
    except ValueError as error:
        return replace(nothing, problem=f"has a recipe.yaml that cannot be read ({error})")
    if not (folder / "result.json").is_file():
        return replace(nothing, recipe=recipe, problem="is not finished")
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        metrics = {
            str(model): {str(name): float(value) for name, value in values.items()}
            for model, values in result["metrics"].items()
        }
        steps, seed = int(result["steps"]), int(result["seed"])
        told = (str(result["recipe"]), str(result["control"]), seed)
        data_file = folder / "data.json"
        data = json.loads(data_file.read_text(encoding="utf-8")).get("data") if data_file.is_file() else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return replace(nothing, recipe=recipe, problem=f"has a result that cannot be read ({type(error).__name__})")
    problem = ""
    if told != (recipe.name, recipe.method.arm, recipe.seed):
        problem = "has a result.json of another run than its recipe.yaml"
    elif steps < recipe.steps:
        problem = f"was cut short, at {steps} of {recipe.steps} steps"
    return Found(folder, recipe, steps, metrics, data, problem)


@dataclass(frozen=True)
class Cell:
    """One metric of one row."""

    ours: Spread | None
    """None where nothing counts."""
    difference: Difference | None
    """To the row's baseline; None for a baseline, and where they share no seed."""


@dataclass(frozen=True)
class Line:
    """One row of a table, and what has been run of it."""

    row: Row
    wanted: Recipe | None
    """What its command trains; None where it has none."""
    runs: Mapping[int, Found]
    """Those that count, by seed."""
    cells: Mapping[str, Cell]

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those of `seeds` that have not run."""
        return [seed for seed in seeds if seed not in self.runs]


def fill(
    table: Table,
    budget: Budget,
    seeds: Sequence[int],
    found: Sequence[Found],
    *more: str,
    launchers: str | Path = "",
) -> tuple[list[Line], list[str]]:
    """The table's rows with what has been run of them, and a sentence on each run that does not count.

    Args:
        table: whose rows.
        budget: which of each row's commands.
        seeds: those that count; runs with others are left alone.
        found: the run folders.
        more: options behind each command's own (`--output-dir`).
        launchers: the folder with the launchers.
    """
    notes: dict[str, None] = {}
    counted: dict[str, tuple[Recipe | None, dict[int, Found]]] = {}
    for row in table.rows:
        if budget not in row.commands:
            counted[row.label] = None, {}
            continue
        recipe = resolved(row.commands[budget], *more, folder=launchers).recipe
        runs, reasons = ({}, []) if table.plans else counting(recipe, seeds, found)
        notes |= dict.fromkeys(reasons)
        counted[row.label] = recipe, runs
    lines = []
    for row in table.rows:
        if not row.published and budget not in row.commands:
            continue  # a control of what this budget cannot run
        wanted, runs = counted[row.label]
        theirs = counted[row.baseline][1] if row.baseline else {}
        baseline = table.row(row.baseline) if row.baseline else None
        apart = baseline and _other_evaluation(runs, row.models[budget], theirs, baseline.models[budget])
        if apart:
            notes[f"{row.label}: no difference to {row.baseline}, {apart}"] = None
        cells = {}
        for metric in table.metrics:
            ours, reasons = _values(runs, row.models[budget], metric)
            notes |= dict.fromkeys(reasons)
            other = _values(theirs, baseline.models[budget], metric)[0] if baseline and not apart else {}
            cells[metric] = Cell(spread(ours.values()) if ours else None, paired(ours, other))
        lines.append(Line(row, wanted, runs, cells))
    return lines, list(notes)


def counting(wanted: Recipe, seeds: Sequence[int], found: Sequence[Found]) -> tuple[dict[int, Found], list[str]]:
    """The runs of `wanted`, by seed, and why others of its name do not count.

    Two runs with one seed: neither counts, since nothing says which is meant. Runs that saw other samples than the run
    of the lowest seed do not count either.
    """
    by_seed: dict[int, list[Found]] = {}
    notes = []
    for one in found:
        if one.recipe is None:
            if _named(one.folder, wanted):
                notes.append(f"{one.folder} {one.problem}: it does not count.")
            continue
        same_name = (one.recipe.name, one.recipe.method.arm) == (wanted.name, wanted.method.arm)
        if not same_name or one.recipe.seed not in seeds:
            continue
        changed = differences(one.recipe, replace(wanted, seed=one.recipe.seed))
        if changed:
            notes.append(f"{one.folder} is of another recipe, which differs in {_shortened(changed)}: it stays apart.")
        elif one.problem:
            notes.append(f"{one.folder} {one.problem}: it does not count.")
        else:
            by_seed.setdefault(one.recipe.seed, []).append(one)
    runs = {}
    for seed, ones in sorted(by_seed.items()):
        if len(ones) == 1:
            runs[seed] = ones[0]
        else:
            places = " and ".join(str(one.folder) for one in ones)
            notes.append(f"{places} both have seed {seed}: neither counts, move one of them away.")
    first = next(iter(runs.values()), None)
    for seed, one in list(runs.items()):
        if first is not None and one.data != first.data:
            notes.append(f"{one.folder} saw other samples than {first.folder}: it stays apart.")
            del runs[seed]
    return runs, notes


def _named(folder: Path, recipe: Recipe) -> bool:
    return folder.parts[-3:-1] == (recipe.name, recipe.method.arm)


def _shortened(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _values(runs: Mapping[int, Found], model: str, metric: str) -> tuple[dict[int, float], list[str]]:
    values, notes = {}, []
    for seed, one in runs.items():
        value = one.metrics.get(model, {}).get(metric)
        if value is None:
            continue
        if math.isfinite(value):
            values[seed] = value
        else:
            notes.append(f"{one.folder} has {value} as {metric} of {model}: that does not count.")
    return values, notes


def _other_evaluation(ours: Mapping[int, Found], model: str, theirs: Mapping[int, Found], other: str) -> str:
    """Why two rows cannot be compared; empty where they can be, or have not run."""
    if not ours or not theirs:
        return ""
    tested = [_tested(next(iter(runs.values())), name) for runs, name in ((ours, model), (theirs, other))]
    if None in tested or tested[0] == tested[1]:
        return ""
    return "which was evaluated on other samples"


def evaluated(lines: Sequence[Line], budget: Budget) -> list[str]:
    """A sentence on the samples behind the numbers: a set at hand may be smaller than the published one."""
    texts: dict[str, None] = {}
    for line in lines:
        for run in line.runs.values():
            tested = _tested(run, line.row.models[budget])
            if line.wanted is None or not isinstance(tested, dict) or "samples" not in tested:
                continue
            data = line.wanted.data[line.wanted.models[line.row.models[budget]].data]
            held_out = ", held out of the training set" if data.validation else ""
            texts[f"Ours on {data.folder or data.name}: {tested['samples']:,} samples{held_out}."] = None
    return list(texts)


def _tested(run: Found, model: str) -> Any:
    """The samples that a run evaluated `model` on; None where that is not known."""
    assert run.recipe is not None
    if run.data is None or model not in run.recipe.models:
        return None
    return run.data[run.recipe.models[model].data][1]
