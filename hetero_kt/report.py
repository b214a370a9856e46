"""Run folders -> a comparison of controls over seeds, as tables and as curves.

A finished run has a `result.json`; one without is left out and named. Spread is always the population
standard deviation over seeds (divided by n, not n - 1), and every difference is to the control `none`.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from hetero_kt.config import Control

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE: Control = "none"
ORDER: tuple[str, ...] = (BASELINE, *(c for c in typing.get_args(Control) if c != BASELINE))
METRICS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "exact": "EM (%)",
    "overall": "overall (%)",
    "yes_no": "yes/no (%)",
    "number": "number (%)",
    "other": "other (%)",
    "majority": "majority (%)",
    "tr1": "TR@1",
    "tr5": "TR@5",
    "tr10": "TR@10",
    "ir1": "IR@1",
    "ir5": "IR@5",
    "ir10": "IR@10",
    "r_mean": "mean recall",
    "f1": "F1 (%)",
    "HasAns_f1": "F1 answerable",
    "no_answer": "never answers",
    "error": "error (%)",
    "accuracy": "accuracy (%)",
    "loss": "loss",
}
"""How metrics are written in headings, and their order; another name stands as it is, in front of these."""


@dataclass(frozen=True)
class Run:
    """One finished run."""

    folder: Path
    recipe: str
    control: str
    seed: int
    steps: int
    metrics: Mapping[str, Mapping[str, float]]
    """model -> metric -> value, percentages in 0..100."""


@dataclass(frozen=True)
class Cell:
    """One metric of one control: population mean and spread over `n` seeds."""

    mean: float
    std: float
    n: int
    difference: float | None = None
    """Mean minus the baseline's mean; None where there is no baseline."""
    difference_std: float | None = None
    """Spread of the seed-by-seed differences; None unless both ran the same seeds."""


@dataclass(frozen=True)
class Row:
    """One control of one recipe for one model."""

    recipe: str
    model: str
    control: str
    seeds: tuple[int, ...]
    cells: Mapping[str, Cell]


def find_runs(paths: Iterable[str | Path]) -> tuple[list[Run], list[Path]]:
    """All runs at or below `paths`: the finished ones, and the folders of those that have no result yet.

    Raises:
        ValueError: a path that does not exist, holds no run at all, or holds a result that cannot be read.
    """
    finished: dict[Path, Run] = {}
    unfinished: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist: give run folders, or a folder that holds some (such as runs).")
        root = path if path.is_dir() else path.parent
        folders = sorted({mark.parent for name in _MARKS for mark in root.rglob(name)})
        if not folders:
            raise ValueError(f"{path} holds no run: give a folder with a recipe.yaml in it or below it.")
        for folder in folders:
            if (folder / "result.json").is_file():
                finished[folder.resolve()] = _read_result(folder)
            else:
                unfinished[folder] = None
    return list(finished.values()), list(unfinished)


_MARKS = ("result.json", "recipe.yaml", "metrics.jsonl")


def _read_result(folder: Path) -> Run:
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return Run(
            folder=folder,
            recipe=str(result["recipe"]),
            control=str(result["control"]),
            seed=int(result["seed"]),
            steps=int(result["steps"]),
            metrics={
                str(model): {str(name): float(value) for name, value in values.items()}
                for model, values in result["metrics"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / 'result.json'} cannot be read ({type(error).__name__}: {error}): "
            "remove it and start the run again, which resumes from its last checkpoint."
        ) from error


def compare(runs: Sequence[Run]) -> list[Row]:
    """Mean and spread over seeds of every metric, with the difference to `none`.

    Rows are sorted by recipe, then model (in the order that the runs name them), then control, `none` first.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.recipe, run.control), []).append(run)
    rows = []
    for recipe in sorted({run.recipe for run in runs}):
        controls = sorted((c for r, c in groups if r == recipe), key=_rank)
        of_recipe = [groups[recipe, control] for control in controls]
        for model in dict.fromkeys(model for group in of_recipe for run in group for model in run.metrics):
            baseline = groups.get((recipe, BASELINE), [])
            for control, group in zip(controls, of_recipe, strict=True):
                metrics = dict.fromkeys(name for run in group for name in run.metrics.get(model, {}))
                cells = {name: _cell(group, baseline, model, name) for name in metrics}
                rows.append(Row(recipe, model, control, tuple(sorted(run.seed for run in group)), cells))
    return rows


def _rank(control: str) -> tuple[int, str]:
    return (ORDER.index(control) if control in ORDER else len(ORDER), control)


def _cell(group: Sequence[Run], baseline: Sequence[Run], model: str, metric: str) -> Cell:
    ours, theirs = _by_seed(group, model, metric), _by_seed(baseline, model, metric)
    values = [value for _, value in ours]
    cell = Cell(float(np.mean(values)), float(np.std(values)), len(values))
    if not theirs or (group and group[0].control == BASELINE):
        return cell
    difference = cell.mean - float(np.mean([value for _, value in theirs]))
    paired = [seed for seed, _ in ours] == [seed for seed, _ in theirs]
    spread = float(np.std([a - b for (_, a), (_, b) in zip(ours, theirs, strict=True)])) if paired else None
    return Cell(cell.mean, cell.std, cell.n, difference, spread)


def _by_seed(group: Sequence[Run], model: str, metric: str) -> list[tuple[int, float]]:
    return sorted((run.seed, run.metrics[model][metric]) for run in group if metric in run.metrics.get(model, {}))


def remarks(runs: Sequence[Run], unfinished: Sequence[Path] = ()) -> list[str]:
    """What a reader of the table has to know: runs left out, seeds counted twice, unequal lengths."""
    notes = [f"Left out, not finished: {folder}" for folder in unfinished]
    seen: dict[tuple[str, str, int], Path] = {}
    for run in runs:
        first = seen.setdefault((run.recipe, run.control, run.seed), run.folder)
        if first != run.folder:
            notes.append(f"Counted twice, {run.control} with seed {run.seed}: {first} and {run.folder}")
    for recipe in sorted({run.recipe for run in runs}):
        steps = sorted({run.steps for run in runs if run.recipe == recipe})
        if len(steps) > 1:
            notes.append(f"Runs of {recipe} differ in length: {', '.join(map(str, steps))} steps")
    return notes


# --- tables ---


def table(folder: str | Path | Sequence[str | Path], console: Console | None = None) -> None:
    """Print the comparison of all runs at or below a folder (or several)."""
    folders = [folder] if isinstance(folder, str | Path) else list(folder)
    runs, unfinished = find_runs(folders)
    console = console or Console()
    for one in rich_tables(compare(runs)):
        console.print(one)
    for note in (*([FOOTNOTE] if runs else []), *remarks(runs, unfinished)):
        console.print(note, style="dim", highlight=False, soft_wrap=True)


def finish(folder: str | Path, console: Console | None = None) -> None:
    """What a launcher ends with: the comparison, printed and in `report.md`, and `curves.png`."""
    console = console or Console()
    folder = Path(folder)
    table(folder, console)
    runs, unfinished = find_runs([folder])
    if not runs:
        return
    (folder / "report.md").write_text(markdown(compare(runs), remarks(runs, unfinished)), encoding="utf-8")
    curves([folder], folder / "curves.png")
    console.print(f"Written: {folder / 'report.md'}, {folder / 'curves.png'}", highlight=False, soft_wrap=True)


FOOTNOTE = "Mean ± population standard deviation over seeds; Δ: difference to none, same seeds paired."


DETAILS = (
    *("HasAns_exact", "NoAns_exact", "NoAns_f1", "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
    "majority",
)
"""Metrics that a terminal has no room for; Markdown and result.json have them."""


def rich_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per recipe and model."""
    tables = []
    for recipe, model, group in _sections(rows):
        metrics = [name for name in _metrics(group) if name not in DETAILS]
        shown = Table(title=f"{recipe}: {model}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        shown.add_column("control")
        shown.add_column("seeds", justify="right")
        for name in metrics:
            shown.add_column(METRICS.get(name, name), justify="right", no_wrap=True)
        for row in group:
            # The difference goes below its value: side by side, three metrics are wider than a terminal.
            cells = [f"{mean}\n[dim]Δ {change}[/dim]" if change else mean for mean, change in _pairs(row, metrics)]
            shown.add_row(row.control, str(len(row.seeds)), *cells)
        tables.append(shown)
    return tables


def markdown(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The same tables as Markdown."""
    lines = []
    for recipe, model, group in _sections(rows):
        metrics = _metrics(group)
        headings = ["control", "seeds"]
        headings += [heading for name in metrics for heading in (METRICS.get(name, name), "Δ")]
        lines += [f"**{recipe}: {model}**", "", _markdown_row(headings)]
        lines.append("|---|" + "---:|" * (len(headings) - 1))
        for row in group:
            cells = [text for pair in _pairs(row, metrics) for text in pair]
            lines.append(_markdown_row([row.control, str(len(row.seeds)), *cells]))
        lines.append("")
    lines += [FOOTNOTE, ""] if rows else []
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _sections(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    keys = dict.fromkeys((row.recipe, row.model) for row in rows)
    return [(*key, [row for row in rows if (row.recipe, row.model) == key]) for key in keys]


def _metrics(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.cells)
    return sorted(names, key=lambda name: list(METRICS).index(name) if name in METRICS else -1)


def _pairs(row: Row, metrics: Sequence[str]) -> list[tuple[str, str]]:
    """Per metric its value and its difference to the baseline, as text; empty where there is none."""
    pairs = []
    for name in metrics:
        cell, digits = row.cells.get(name), 3 if name.endswith("loss") else 2
        value = change = ""
        if cell is not None:
            value = _spread(f"{cell.mean:.{digits}f}", cell.std, cell.n, digits)
            if cell.difference is not None:
                change = _spread(
                    f"{round(cell.difference, digits) + 0.0:+.{digits}f}", cell.difference_std, cell.n, digits
                )
        pairs.append((value, change))
    return pairs


def _spread(mean: str, std: float | None, n: int, digits: int) -> str:
    return f"{mean} ± {std:.{digits}f}" if std is not None and n > 1 else mean


# --- curves ---

COLOURS = {
    "none": "#4d4d4d",
    "transfer": "#0b62b8",
    "noise": "#d17a22",
    "shuffled": "#b03a6a",
    "frozen": "#3c8d5a",
    "standardise": "#8468b8",
}
SPARE_COLOURS = ("#0b62b8", "#d17a22", "#3c8d5a", "#b03a6a", "#8468b8", "#4d4d4d", "#2a9aa8", "#a08a1c")
INK, GRID = "#333333", "#e4e4e4"
POINTS = 100
"""Longest curve drawn: more points than that are averaged in bins, or noise hides the difference."""


def curves(run_folders: Sequence[str | Path], png: str | Path) -> list[Path]:
    """Draw every model's first metric and training loss over the steps, a line per control, seeds as a band.

    Returns:
        The folders that were left out because their run has not finished.

    Raises:
        ValueError: no finished run to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    runs, unfinished = find_runs(run_folders)
    if not runs:
        raise ValueError(f"No run in {', '.join(map(str, run_folders))} has finished: there are no curves to draw yet.")
    figure = _figure(runs)
    png = Path(png)
    png.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(png, dpi=160, facecolor="white")
    return unfinished


def _figure(runs: Sequence[Run]) -> Figure:
    from matplotlib.figure import Figure

    logs = {run.folder: read_metrics(run.folder) for run in runs}
    models = list(dict.fromkeys(model for run in runs for model in run.metrics))
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: (run.recipe, _rank(run.control), run.seed)):
        groups.setdefault((run.recipe, run.control), []).append(run)
    several = len({recipe for recipe, _ in groups}) > 1
    figure = Figure(figsize=(max(4.6 * len(models), 5.2), 6.2), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False, sharex="col")
    handles: dict[str, Any] = {}
    for column, model in enumerate(models):
        metric = next((name for run in runs for name in run.metrics.get(model, {}) if not name.endswith("loss")), "")
        panels = (
            (axes[0][column], (f"{model}/test_{metric}", f"{model}/{metric}"), METRICS.get(metric, metric)),
            (axes[1][column], (f"{model}/loss",), "training loss"),
        )
        for ax, keys, label in panels:
            _frame(ax, label if column == 0 or ax is axes[0][column] else "")
            for position, ((recipe, control), group) in enumerate(groups.items()):
                name = f"{recipe}: {control}" if several else control
                spare = SPARE_COLOURS[position % len(SPARE_COLOURS)]
                colour = spare if several else COLOURS.get(control, spare)
                line = _draw(ax, [_series(logs[run.folder], keys) for run in group], colour, control == BASELINE)
                if line is not None:
                    handles.setdefault(f"{name} ({len(group)})" if len(group) > 1 else name, line)
        axes[0][column].set_title(model, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes[1][column].set_xlabel("step", color=INK, fontsize=9)
    figure.align_ylabels()
    if handles:
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper left",
            ncols=2 if several else 6,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            title=_caption(runs, len(groups)),
            title_fontsize=8,
            alignment="left",
        )
        legend.get_title().set_color(INK)
    return figure


def _caption(runs: Sequence[Run], groups: int) -> str:
    recipes = ", ".join(sorted({run.recipe for run in runs}))
    return f"{recipes}: mean over seeds, the band is ± one standard deviation" if len(runs) > groups else recipes


def read_metrics(folder: Path) -> dict[str, dict[int, float]]:
    """A run's `metrics.jsonl` as key -> step -> value; the later line wins, a half-written one is skipped."""
    series: dict[str, dict[int, float]] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # a run that was killed while it wrote this line
        for key, value in record.items():
            if isinstance(value, int | float):
                series.setdefault(key, {})[step] = float(value)
    return series


def _series(log: Mapping[str, dict[int, float]], keys: Sequence[str]) -> dict[int, float]:
    return next((log[key] for key in keys if key in log), {})


def band(series: Sequence[Mapping[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all series have, with mean and population standard deviation over the series, each (S,).

    More than `POINTS` steps are averaged in bins of neighbours, each series by itself, before the spread is
    taken.
    """
    filled = [one for one in series if one]
    steps = np.array(sorted(set.intersection(*map(set, filled))) if filled else [], dtype=float)
    values = np.array([[one[int(step)] for step in steps] for one in filled]).reshape(len(filled), len(steps))
    if len(steps) > POINTS:
        bins = np.array_split(np.arange(len(steps)), POINTS)
        steps = np.array([steps[chosen].mean() for chosen in bins])
        values = np.stack([values[:, chosen].mean(axis=1) for chosen in bins], axis=1)
    if not len(steps):
        return steps, steps, steps
    return steps, values.mean(axis=0), values.std(axis=0)


def _draw(ax: Axes, series: Sequence[Mapping[int, float]], colour: str, dashed: bool) -> Any:
    steps, mean, std = band(series)
    if not len(steps):
        return None
    (line,) = ax.plot(steps, mean, color=colour, linewidth=1.4, zorder=4 if colour == COLOURS["transfer"] else 3)
    if dashed:
        line.set_linestyle((0, (4, 2)))
    if len(steps) < 15:
        line.set_marker("o")
        line.set_markersize(3)
    if len(series) > 1 and len(steps) == 1:  # evaluated at the end only: a band would have no width
        ax.errorbar(steps, mean, std, color=colour, linewidth=1, capsize=3, zorder=3)
    elif len(series) > 1:
        ax.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.13, linewidth=0, zorder=2)
    return line


def _frame(ax: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_ylabel(label, color=INK, fontsize=9)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#999999")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.margins(x=0.02)
