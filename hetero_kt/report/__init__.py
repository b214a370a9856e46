"""Run folders -> what they have shown: tables over arms and seeds, beside published ones, as text, pictures and a page.

    runs.py         run folders, and which of them count together
    history.py      what a run logged over its steps
    comparison.py   experiments: arms of one recipe; sheets: tables with their numbers
    metrics.py      how metrics are written
    text.py         sheets for a terminal, as Markdown and CSV
    figures.py      pictures as PNG
    page.py         one HTML file; charts.py: its pictures

Spread is always the population standard deviation over seeds (divided by n, not n - 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hetero_kt.report import comparison, history, runs, text
from hetero_kt.report.comparison import Experiment, Sheet


@dataclass(frozen=True)
class Report:
    """What the runs below some folders have shown."""

    experiments: tuple[Experiment, ...]
    sheets: tuple[Sheet, ...]
    """A comparison per experiment and model, then the published tables."""
    notes: tuple[str, ...]
    """Runs that do not count, are kept apart or were cut short, each with its reason."""

    def markdown(self) -> str:
        """All tables and remarks."""
        return text.markdown(self.sheets, self.notes)

    def csv(self) -> str:
        """All numbers in full."""
        return text.as_csv(self.sheets)

    def show(self, console: Console) -> None:
        """Print the tables, each with its own remarks, how to read them, then the other remarks."""
        for sheet in self.sheets:
            for table in text.rich_tables(sheet, console.width):
                console.print(table)
            _remark(console, sheet.notes)
        _remark(console, (*text.footnotes(self.sheets), *self.notes))


def _remark(console: Console, notes: Iterable[str]) -> None:
    for note in notes:
        console.print(Text(note), style="dim", soft_wrap=True)


def gather(
    paths: Iterable[str | Path], *, best: bool = False, tables: Sequence[str] | None = None, budget: str = ""
) -> Report:
    """The report of all runs at or below `paths`.

    Args:
        paths: run folders, or folders that hold some.
        best: take each run's best evaluation instead of its last.
        tables: the published tables to show; None takes those in which the runs fill a row and its baseline.
        budget: of those tables; empty takes those that the runs are of.

    Raises:
        ValueError: a path without any run, or a table that does not exist.
    """
    found = runs.find(paths, demand=True)
    if best:
        found = [history.best(run) for run in found]
    experiments, notes = comparison.experiments(found)
    sheets = [sheet for experiment in experiments for sheet in comparison.compare(experiment)]
    if tables is None or tables:
        from hetero_kt.tables import show  # which reads runs by this package

        sheets += show.published(found, tables, budget)
        recipes = [run.recipe for experiment in experiments for run in experiment.runs()]
        more, note = show.beside(recipes, sheets, found)
        sheets += more
        notes += [note] if note else []
    return Report(tuple(experiments), tuple(sheets), tuple(dict.fromkeys(notes)))


def finish(folder: str | Path, console: Console | None = None) -> None:
    """What a launcher ends with: the comparison, printed and in `report.md`, `report.html` and `curves.png`."""
    from hetero_kt.report import figures, page

    console, folder = console or Console(), Path(folder)
    report = gather([folder], tables=())
    report.show(console)
    if not report.experiments:
        return
    (folder / "report.md").write_text(report.markdown(), encoding="utf-8")
    page.write(report, folder / "report.html")
    figures.curves(report.experiments, folder / "curves.png")
    files = ", ".join(str(folder / name) for name in ("report.md", "report.html", "curves.png"))
    console.print(f"Written: {files}", highlight=False, soft_wrap=True)
