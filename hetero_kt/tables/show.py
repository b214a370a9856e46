"""A table beside its published numbers: for a terminal, as Markdown and as CSV; and the commands that it lacks."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table as Shown
from rich.text import Text

from hetero_kt.report import METRICS
from hetero_kt.statistics import CONFIDENCE
from hetero_kt.tables import Budget, Command, Table, launchers, resolved
from hetero_kt.tables.runs import Line, counting, find

HEADINGS = ("row", "metric", "published", "ours", "seeds", "Δ to baseline")
FOOTNOTE = (
    "Ours: mean ± population standard deviation over seeds. Δ: mean of the seed-by-seed differences to the row's "
    f"baseline, in brackets the interval that holds the true one with {CONFIDENCE:.0%} confidence (paired t test; two "
    "seeds or more). Published differences are in parentheses. ?: not seen at its source."
)


def entries(table: Table, lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """The cells of each line, as text: a row has one line per metric that is published or has run."""
    for line in lines:
        row = line.row
        metrics = [metric for metric in table.metrics if metric in row.published or line.cells[metric].ours]
        for metric in metrics or [""]:
            if not metric:
                yield row.label, "", "", "", "", ""
                continue
            digits = 3 if metric.endswith("loss") else 2
            published = ""
            if metric in row.published:
                published = f"{row.published[metric]:.{digits}f}" + "?" * (metric in row.unverified)
                base = table.row(row.baseline).published if row.baseline else {}
                if metric in base:
                    published += f" ({row.published[metric] - base[metric]:+.{digits}f})"
            cell, ours, change = line.cells[metric], "", ""
            if cell.ours:
                ours = f"{cell.ours.mean:.{digits}f}"
                ours += f" ± {cell.ours.std:.{digits}f}" if cell.ours.n > 1 else ""
            if cell.difference:
                change = f"{cell.difference.mean:+.{digits}f}"
                if cell.difference.low is not None:
                    change += f" [{cell.difference.low:+.{digits}f}, {cell.difference.high:+.{digits}f}]"
                if cell.ours and len(cell.difference.seeds) < cell.ours.n:
                    change += f" ({len(cell.difference.seeds)} seeds)"
            heading = METRICS.get(metric, metric)
            yield row.label, heading, published, ours, str(cell.ours.n) if cell.ours else "", change


def without(table: Table, budget: Budget) -> list[str]:
    """Why rows have no command, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in table.rows:
        if budget in row.missing and row.published:
            reasons.setdefault(row.missing[budget], []).append(row.label)
    return [f"No command for {budget}, {why}: {'; '.join(labels)}." for why, labels in reasons.items()]


def rich_table(table: Table, budget: Budget, lines: Sequence[Line]) -> Shown:
    """For a terminal."""
    shown = Shown(title=f"{table.title} ({budget})", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right", overflow="fold")
    before = ""
    for label, *cells in entries(table, lines):
        # As Text: an interval would lose its brackets to rich's markup.
        shown.add_row(Text(label if label != before else ""), *map(Text, cells))
        before = label
    return shown


def markdown(table: Table, budget: Budget, lines: Sequence[Line], notes: Sequence[str]) -> str:
    """The table, then what a reader has to know."""
    text = [f"**{table.title}** ({budget})", "", _pipes(HEADINGS), "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    text += [_pipes(cells) for cells in entries(table, lines)]
    return "\n".join([*text, "", FOOTNOTE, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_csv(table: Table, lines: Sequence[Line]) -> str:
    """One line per row and metric, numbers in full; empty where nothing has run or was published."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ("row", "baseline", "metric", "published", "mean", "std", "seeds", "difference", "low", "high", "pairs")
    writer.writerow(names)
    for line in lines:
        for metric in table.metrics:
            ours, change = line.cells[metric].ours, line.cells[metric].difference
            published = line.row.published.get(metric, "")
            found = (ours.mean, ours.std, ours.n) if ours else ("", "", 0)
            apart = (change.mean, change.low, change.high, len(change.seeds)) if change else ("", "", "", "")
            writer.writerow((line.row.label, line.row.baseline, metric, published, *found, *apart))
    return file.getvalue()


# --- what is missing ---


@dataclass(frozen=True)
class Start:
    """One process that has to run."""

    command: Command
    seeds: tuple[int, ...]
    """Empty: the recipe's own."""
    needs: tuple[str, ...]
    """Commands that have to succeed before."""

    def words(self, output_dir: str, ranks: int, folder: Path) -> list[str]:
        """As an argument list."""
        launcher = str(folder / f"{self.command.launcher}.py")
        starter = ["deepspeed", "--num_accelerators", str(ranks)] if ranks > 1 else [sys.executable]
        seeds = ["--seeds", *map(str, self.seeds)] if self.seeds else []
        return [*starter, launcher, *self.command.options, "--output-dir", output_dir, *seeds]


def starts(table: Table, budget: Budget, lines: Sequence[Line], seeds: Sequence[int], output_dir: str) -> list[Start]:
    """What has to run for `seeds` of every row, teachers before their students; rows that share a run ask for it
    once."""
    found = find([output_dir])
    wanted: dict[str, Start] = {}
    claimed: set[Path] = set()
    for line in lines:
        command = line.row.commands.get(budget)
        if command is None:
            continue
        if table.plans:
            wanted.setdefault(str(command), Start(command, (), ()))
            continue
        one = resolved(command, "--output-dir", output_dir)
        missing = tuple(seed for seed in line.missing(seeds) if one.folder(seed) not in claimed)
        claimed |= {one.folder(seed) for seed in missing}
        if not missing:
            continue
        needed = table.needed(command)
        for earlier in needed:
            recipe = resolved(earlier, "--output-dir", output_dir).recipe
            if not counting(recipe, [recipe.seed], found)[0]:
                needs = tuple(str(other) for other in table.needed(earlier))
                wanted.setdefault(str(earlier), Start(earlier, (), needs))
        wanted[f"{command} {missing}"] = Start(command, missing, tuple(str(other) for other in needed))
    return list(wanted.values())


def run(todo: Sequence[Start], output_dir: str, ranks: int) -> list[str]:
    """Start one process after another; returns a sentence on each that failed or had to be left out."""
    failed: dict[str, str] = {}
    for i, start in enumerate(todo):
        lost = [need for need in start.needs if need in failed]
        if lost:
            failed[str(start.command)] = f"Left out: {start.command}, since this failed: {lost[0]}"
            continue
        print(
            f"{i + 1} of {len(todo)}: {start.command}, seeds {' '.join(map(str, start.seeds)) or 'as it is'}",
            flush=True,
        )
        status = subprocess.run(start.words(output_dir, ranks, launchers()), check=False).returncode
        if status:
            failed[str(start.command)] = f"Failed with status {status}: {start.command}"
    return list(failed.values())
