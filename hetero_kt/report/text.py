"""Sheets for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from hetero_kt.messages import printable
from hetero_kt.report.comparison import Cell, Line, Sheet
from hetero_kt.report.metrics import DETAILS, digits, heading
from hetero_kt.statistics import CONFIDENCE, Difference

INTERVAL = f"in brackets the interval that holds the true one with {100 * CONFIDENCE:.0f} % confidence (paired t test)"
FOOTNOTE = (
    "Mean ± population standard deviation over seeds. Δ: mean of the seed-by-seed differences to none, "
    f"{INTERVAL}; one seed has none."
)
PUBLISHED_FOOTNOTE = (
    "Ours: mean ± population standard deviation over seeds. Δ: mean of the seed-by-seed differences to the row's "
    f"baseline, {INTERVAL}; one seed has none. Published differences are in parentheses. ?: not seen at its source."
)
_BESIDE = 3
"""Spaces that a column of a terminal's table has beside its text."""
PUBLISHED = ("row", "metric", "published", "ours", "seeds", "Δ to baseline")


def footnotes(sheets: Sequence[Sheet]) -> list[str]:
    """How to read their numbers."""
    texts = [FOOTNOTE] if any(not sheet.published for sheet in sheets) else []
    return texts + ([PUBLISHED_FOOTNOTE] if any(sheet.published for sheet in sheets) else [])


def title(sheet: Sheet) -> str:
    """With how its numbers were chosen, where that flatters them."""
    return f"{sheet.title}, {sheet.chosen}" if sheet.chosen else sheet.title


# --- numbers as text ---


def ours(cell: Cell, metric: str) -> str:
    """Mean and spread; empty where nothing counts."""
    if cell.ours is None:
        return ""
    mean = f"{cell.ours.mean:.{digits(metric)}f}"
    return f"{mean} ± {cell.ours.std:.{digits(metric)}f}" if cell.ours.n > 1 else mean


def difference(found: Difference | None, metric: str) -> str:
    """Its mean; empty where there is none."""
    return "" if found is None else _signed(found.mean, metric)


def interval(cell: Cell, metric: str) -> str:
    """In brackets, and how many seeds it is of, where that is not all of ours; empty where there is none."""
    found = cell.difference
    if found is None:
        return ""
    parts = []
    if found.low is not None and found.high is not None:
        parts.append(f"[{_signed(found.low, metric)}, {_signed(found.high, metric)}]")
    if cell.ours and len(found.seeds) < cell.ours.n:
        parts.append(f"({len(found.seeds)} of {cell.ours.n} seeds)")
    return " ".join(parts)


def published(cell: Cell, metric: str) -> str:
    """The published number, with its difference in parentheses; empty where there is none."""
    if cell.published is None:
        return ""
    text = f"{cell.published:.{digits(metric)}f}" + "?" * cell.unverified
    return text if cell.published_difference is None else f"{text} ({_signed(cell.published_difference, metric)})"


def _signed(value: float, metric: str) -> str:
    return f"{round(value, digits(metric)) + 0.0:+.{digits(metric)}f}"  # what rounds to nothing has no minus


def known(sheet: Sheet, line: Line) -> list[str]:
    """Metrics of a published sheet's row that are published or have run; one without a name where none is."""
    return [m for m in sheet.metrics if line.cells[m].ours or line.cells[m].published is not None] or [""]


def change(cell: Cell, metric: str) -> str:
    """The difference with its interval; empty where there is none."""
    return f"{difference(cell.difference, metric)} {interval(cell, metric)}".strip()


def _published_rows(sheet: Sheet) -> Iterator[tuple[str, ...]]:
    for line in sheet.lines:
        for metric in known(sheet, line):
            cell = line.cells.get(metric, Cell())
            seeds = str(cell.ours.n) if cell.ours else ""
            numbers = published(cell, metric), ours(cell, metric), seeds, change(cell, metric)
            yield line.label, heading(metric), *numbers


# --- forms ---


def rich_tables(sheet: Sheet, width: int) -> list[Table]:
    """For a terminal of `width` columns: more metrics than it has room for go into further tables."""
    if sheet.published:
        return [_published_table(sheet)]
    columns = {metric: _column(sheet, metric) for metric in sheet.metrics if metric not in DETAILS}
    labels = max(len("control"), min(max((len(line.label) for line in sheet.lines), default=0), width // 3))
    room = width - 1 - (labels + _BESIDE) - (len("seeds") + _BESIDE)
    parts: list[list[str]] = [[]]
    left = room
    for metric, cells in columns.items():
        wide = max(line.cell_len for cell in cells for line in cell.split()) + _BESIDE
        if wide > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(metric)
        left -= wide
    return [_table(sheet, {metric: columns[metric] for metric in part}, i > 0) for i, part in enumerate(parts)]


def _empty(title: str) -> Table:
    # Names as Text: what they have in brackets would be markup to rich.
    return Table(title=Text(printable(title)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _published_table(sheet: Sheet) -> Table:
    shown = _empty(title(sheet))
    for name in PUBLISHED:
        words = name in PUBLISHED[:2]
        shown.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    before = ""
    for label, *cells in _published_rows(sheet):
        # What is in brackets goes below its number, or a terminal has no room for names.
        stacked = [cell.replace(" (", "\n(").replace(" [", "\n[") for cell in cells[1:]]
        shown.add_row(Text(printable(label) if label != before else ""), *map(Text, (cells[0], *stacked)))
        before = label
    return shown


def _table(sheet: Sheet, columns: Mapping[str, Sequence[Text]], continued: bool) -> Table:
    shown = _empty(title(sheet) + ", continued" * continued)
    shown.add_column("control", overflow="fold")
    shown.add_column("seeds", justify="right", no_wrap=True)
    for name, *_ in columns.values():
        shown.add_column(name, justify="right", no_wrap=True)
    for i, line in enumerate(sheet.lines):
        shown.add_row(Text(printable(line.label)), str(len(line.seeds)), *(cells[i + 1] for cells in columns.values()))
    return shown


def _column(sheet: Sheet, metric: str) -> list[Text]:
    """Its heading, then a cell per line."""
    cells = (_stacked(line.cells[metric], metric) if metric in line.cells else Text() for line in sheet.lines)
    return [Text(printable(heading(metric))), *cells]


def _stacked(cell: Cell, metric: str) -> Text:
    """The difference below its value: side by side, three metrics are wider than a terminal."""
    lines = [ours(cell, metric)]
    if cell.difference is not None:
        lines += [f"Δ {difference(cell.difference, metric)}", interval(cell, metric)]
    text = Text(lines[0])
    for line in filter(None, lines[1:]):
        text.append(f"\n{line}", style="dim")
    return text


def markdown(sheets: Sequence[Sheet], notes: Sequence[str] = ()) -> str:
    """Tables with all metrics, then what a reader has to know."""
    lines = []
    for sheet in sheets:
        lines += [f"**{_plain(title(sheet))}**", ""]
        if sheet.published:
            lines += [_pipes(PUBLISHED), "|---|---|" + "---:|" * (len(PUBLISHED) - 2)]
            lines += [_pipes(cells) for cells in _published_rows(sheet)]
        else:
            headings = ["control", "seeds", *(text for m in sheet.metrics for text in (heading(m), "Δ"))]
            lines += [_pipes(headings), "|---|" + "---:|" * (len(headings) - 1)]
            for line in sheet.lines:
                cells = [line.label, str(len(line.seeds))]
                for metric in sheet.metrics:
                    cell = line.cells.get(metric, Cell())
                    cells += [ours(cell, metric), change(cell, metric)]
                lines.append(_pipes(cells))
        lines += ["", *(f"- {_plain(note)}" for note in sheet.notes), *([""] if sheet.notes else [])]
    lines += [text for note in footnotes(sheets) for text in (note, "")]
    lines += [f"- {_plain(note)}" for note in notes]
    return "\n".join(lines).rstrip() + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """On one line, and no markup where a name looks like a tag, a link or a picture: no reader may fetch anything."""
    text = printable(" ".join(text.split()))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    text = re.sub(r"\](?=[(\[:])", r"]\\", text)
    return re.sub(r":(?=//)", r":\\", re.sub(r"(?i)(www)(?=\.)", r"\1\\", text))


COLUMNS = (
    *("table", "row", "baseline", "metric", "published", "mean", "std", "seeds"),
    *("difference", "low", "high", "pairs", "evaluation"),
)


def as_csv(sheets: Sequence[Sheet]) -> str:
    """One line per row and metric, numbers in full; empty where nothing has run or was published."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for sheet in sheets:
        for line in sheet.lines:
            for metric in sheet.metrics:
                cell = line.cells.get(metric, Cell())
                found = (cell.ours.mean, cell.ours.std, cell.ours.n) if cell.ours else ("", "", 0)
                gap = cell.difference
                apart = (gap.mean, gap.low, gap.high, len(gap.seeds)) if gap else ("", "", "", "")
                start = map(_cell, (sheet.title, line.label, line.baseline, metric))
                theirs = "" if cell.published is None else cell.published
                writer.writerow((*start, theirs, *found, *apart, sheet.chosen or "last"))
    return file.getvalue()


def _cell(text: str) -> str:
    """A text for a spreadsheet, which would take it for a formula by its first character."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")) else text
