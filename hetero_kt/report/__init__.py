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

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hetero_kt.files import write_whole
from hetero_kt.messages import first_line, printable
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
        console.print(Text(printable(note)), style="dim", soft_wrap=True)


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
    counted = (run for experiment in experiments for run in experiment.runs())
    notes += filter(None, (history.too_large(run.folder) for run in counted))
    return Report(tuple(experiments), tuple(sheets), tuple(dict.fromkeys(notes)))


def finish(folder: str | Path, console: Console | None = None) -> None:
    """What a launcher ends with: the comparison, printed and in `report.md`, `report.html` and `curves.png`.

    The run has finished before: whatever goes wrong with its report is said in one sentence and raised to nobody, or
    the launcher's status would cancel the jobs that wait for it.
    """
    folder = Path(folder)
    console = console or Console()
    problems = _finish(folder, console)
    with _whoever_reads():
        for problem in problems:
            console.print(Text(printable(problem)), soft_wrap=True)


@contextlib.contextmanager
def _whoever_reads() -> Iterator[None]:
    """Inside, it matters to nobody whether a terminal has gone or knows no such letters."""
    with contextlib.suppress(OSError, UnicodeError, SystemExit):  # rich leaves the program where a pipe has closed
        yield


def _finish(folder: Path, console: Console) -> list[str]:
    """Sentences on what went wrong."""
    from hetero_kt.report import figures, page

    later = f"the runs have finished, and `hetero-kt report {folder}` shows them"
    try:
        report = gather([folder], tables=())
        with _whoever_reads():
            report.show(console)
        if not report.experiments:
            return []
        forms: dict[str, Callable[[], str | bytes]] = {
            "report.md": report.markdown,
            "report.html": lambda: page.html(report),
            "curves.png": lambda: figures.curves_png(report.experiments),
        }
    except Exception as error:
        return [f"{folder} cannot be reported ({_reason(error)}): {later}."]
    problems, written = [], []
    for name, form in forms.items():
        file = folder / name
        try:
            # Jobs of one recipe may end at once, and each writes the report of all.
            write_whole(file, form(), folder / f".{name}.{os.getpid()}.part")
            written.append(str(file))
        except Exception as error:
            problems.append(f"{file} cannot be written ({_reason(error)}): {later}.")
    if written:
        with _whoever_reads():
            console.print(Text(printable(f"Written: {', '.join(written)}")), soft_wrap=True)
    return problems


def _reason(error: Exception) -> str:
    known = isinstance(error, OSError | ValueError)
    said = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    return said if known else f"{type(error).__name__}: {said}"
