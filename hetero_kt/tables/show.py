"""A table beside its published numbers, as a sheet; and the tables that runs belong to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hetero_kt.config import MergeNet, Recipe
from hetero_kt.report.comparison import Line as Shown
from hetero_kt.report.comparison import Sheet
from hetero_kt.report.history import chosen
from hetero_kt.report.runs import Run
from hetero_kt.tables import BUDGETS, Budget, Table, names, read, runs_called
from hetero_kt.tables.runs import Line, evaluated, fill

POSITIVE_CONTROL = "positive-control"
"""The table of it."""


def sheet(table: Table, budget: Budget, lines: Sequence[Line], notes: Sequence[str] = ()) -> Sheet:
    """The table with its own remarks, then `notes`."""
    shown = [Shown(line.row.label, line.row.baseline, tuple(line.runs), line.cells) for line in lines]
    counted = [(run, line.row.models[budget]) for line in lines for run in line.runs.values()]
    way = chosen(counted)
    ours = [f"Ours is the {way}." if way else "Ours is each run's last evaluation."] if counted else []
    return Sheet(
        f"{table.title} ({budget})",
        table.metrics,
        tuple(shown),
        tuple(dict.fromkeys((*table.notes, *ours, *evaluated(lines, budget), *without(table, budget), *notes))),
        published=True,
        chosen=way,
    )


def without(table: Table, budget: Budget) -> list[str]:
    """Why rows have no command, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in table.rows:
        if budget in row.missing and row.published:
            reasons.setdefault(row.missing[budget], []).append(row.label)
    return [f"No command for {budget}, {why}: {'; '.join(labels)}." for why, labels in reasons.items()]


def published(found: Sequence[Run], wanted: Sequence[str] | None = None, budget: str = "") -> list[Sheet]:
    """Tables with these runs in them.

    Args:
        found: the runs; all of their seeds count.
        wanted: names of tables; None takes those in which the runs fill a row and its baseline.
        budget: of the tables; empty takes those that the runs are of, for a table by name `cpu` where they are of none.

    Raises:
        ValueError: a name that no table has.
    """
    if wanted is None and not any(run.recipe for run in found):
        return []
    budgets = [one for one in BUDGETS if budget in ("", one)]
    sheets = []
    for name in names() if wanted is None else wanted:
        table = read(name)
        of_table = [(one, made) for one in budgets if (made := _filled(table, one, found))]
        for one, (lines, notes) in of_table:
            compared = any(cell.difference for line in lines for cell in line.cells.values())
            if wanted is not None or compared:
                sheets.append(sheet(table, one, lines, notes))
        if wanted is not None and not of_table:
            empty = budgets[0]
            sheets.append(sheet(table, empty, *fill(table, empty, None, [])))
    return sheets


def beside(recipes: Iterable[Recipe | None], sheets: Sequence[Sheet], found: Sequence[Run]) -> tuple[list[Sheet], str]:
    """What stands beside any report on MergeNet: the positive control, or how to run it.

    A method whose transfers change nothing looks like one that has nothing to transfer; the control tells them apart.

    Args:
        recipes: those reported.
        sheets: of the report so far.
        found: all runs at hand.
    """
    table = read(POSITIVE_CONTROL)
    shown = any(sheet.title.startswith(table.title) for sheet in sheets)
    if shown or not any(recipe is not None and isinstance(recipe.method, MergeNet) for recipe in recipes):
        return [], ""
    filled = _filled(table, "cpu", found)
    if filled is None:
        return [], f"The positive control has not run: hetero-kt table {POSITIVE_CONTROL} --budget cpu --run."
    return [sheet(table, "cpu", *filled)], ""


def _filled(table: Table, budget: Budget, found: Iterable[Run]) -> tuple[list[Line], list[str]] | None:
    """The table's rows, if runs are called as any of them; to resolve all commands of all tables would take long."""
    called = {name for row in table.rows if budget in row.commands for name in [runs_called(row.commands[budget])]}
    ours = [run for run in found if run.name in called]
    if not ours:
        return None
    # A teacher's run, which says what model that is, lies beside the others: <output_dir>/<recipe>/<arm>/seed<k>.
    above = ours[0].folder.absolute().parents
    beside = above[min(2, len(above) - 1)]
    return fill(table, budget, None, ours, "--output-dir", str(beside))
