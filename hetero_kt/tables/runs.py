"""What has been run of a table: the seeds of each row, read from run folders.

A run counts where its `recipe.yaml` equals what the row's command trains, the seed aside. What does not count is named
with its reason, and nothing stands in for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hetero_kt.config import Recipe, differences
from hetero_kt.report.comparison import Cell, cell
from hetero_kt.report.runs import Run, one_per_seed, tested_apart, trained_on_other_ranks
from hetero_kt.tables import Budget, Row, Table, resolved


@dataclass(frozen=True)
class Line:
    """One row of a table, and what has been run of it."""

    row: Row
    wanted: Recipe | None
    """What its command trains; None where it has none."""
    runs: Mapping[int, Run]
    """Those that count, by seed."""
    cells: Mapping[str, Cell]

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those of `seeds` that have not run."""
        return [seed for seed in seeds if seed not in self.runs]


def fill(
    table: Table, budget: Budget, seeds: Collection[int] | None, found: Sequence[Run], *more: str
) -> tuple[list[Line], list[str]]:
    """The table's rows with what has been run of them, and a sentence on each run that does not count.

    Args:
        table: whose rows.
        budget: which of each row's commands.
        seeds: those that count, runs with others are left alone; None takes all.
        found: the run folders.
        more: options behind each command's own (`--output-dir`).
    """
    notes: dict[str, None] = {}
    counted: dict[str, tuple[Recipe | None, dict[int, Run]]] = {}
    for row in table.rows:
        if budget not in row.commands:
            counted[row.label] = None, {}
            continue
        recipe = resolved(row.commands[budget], *more).recipe
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
        apart = baseline is not None and tested_apart(runs, row.models[budget], theirs, baseline.models[budget])
        if apart:
            notes[f"{row.label}: no difference to {row.baseline}, which was evaluated on other samples"] = None
        else:
            notes |= dict.fromkeys(trained_on_other_ranks(row.label, runs, row.baseline, theirs))
        cells = {}
        for metric in table.metrics:
            other = baseline.models[budget] if baseline is not None else ""
            one, reasons = cell(runs, row.models[budget], {} if apart else theirs, other, metric)
            notes |= dict.fromkeys(reasons)
            cells[metric] = _beside(one, row, baseline, metric)
        lines.append(Line(row, wanted, runs, cells))
    return lines, list(notes)


def _beside(cell: Cell, row: Row, baseline: Row | None, metric: str) -> Cell:
    """With what was published."""
    published = row.published.get(metric)
    base = baseline.published.get(metric) if baseline is not None else None
    apart = published - base if published is not None and base is not None else None
    return replace(cell, published=published, published_difference=apart, unverified=metric in row.unverified)


def counting(wanted: Recipe, seeds: Collection[int] | None, found: Sequence[Run]) -> tuple[dict[int, Run], list[str]]:
    """The runs of `wanted`, by seed, and why others of its name do not count."""
    alike, notes = [], []
    for run in found:
        same_name = (run.name, run.arm) == (wanted.name, wanted.method.arm)
        if not same_name or (run.recipe is not None and seeds is not None and run.seed not in seeds):
            continue
        changed = differences(run.recipe, replace(wanted, seed=run.seed)) if run.recipe is not None else []
        if changed:
            notes.append(f"{run.folder} is of another recipe, which differs in {_shortened(changed)}: it stays apart.")
        elif run.unknown or run.problem:
            notes.append(f"{run.folder} {run.unknown or run.problem}: it does not count.")
        elif run.steps < wanted.steps:
            notes.append(f"{run.folder} was cut short, at {run.steps} of {wanted.steps} steps: it does not count.")
        else:
            alike.append(run)
    runs, reasons = one_per_seed(alike)
    return runs, notes + reasons


def _shortened(paths: Sequence[str]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def evaluated(lines: Sequence[Line], budget: Budget) -> list[str]:
    """A sentence on the samples behind the numbers: a set at hand may be smaller than the published one."""
    texts: dict[str, None] = {}
    for line in lines:
        for run in line.runs.values():
            samples = run.samples(line.row.models[budget])
            if line.wanted is None or samples is None:
                continue
            data = line.wanted.data[line.wanted.models[line.row.models[budget]].data]
            held_out = ", held out of the training set" if data.validation else ""
            texts[f"Ours on {data.folder or data.name}: {samples:,} samples{held_out}."] = None
    return list(texts)
