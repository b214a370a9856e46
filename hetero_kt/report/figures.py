"""Pictures of a report as PNG: what runs did over their steps, and differences with their intervals."""

from __future__ import annotations

import io
import textwrap
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hetero_kt import extras
from hetero_kt.files import write_named
from hetero_kt.messages import printable
from hetero_kt.report import text
from hetero_kt.report.comparison import BASELINE, Cell, Experiment, Line, Sheet
from hetero_kt.report.history import band, first_of, history
from hetero_kt.report.metrics import heading, leading
from hetero_kt.report.runs import Run

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# --- curves ---

COLOURS = {
    "none": "#4d4d4d",
    "transfer": "#0b62b8",
    "noise": "#d17a22",
    "shuffled": "#b03a6a",
    "frozen": "#3c8d5a",
    "standardise": "#8468b8",
    "sharing": "#2a9aa8",
}
SPARE_COLOURS = ("#0b62b8", "#d17a22", "#3c8d5a", "#b03a6a", "#8468b8", "#4d4d4d", "#2a9aa8", "#a08a1c")
INK, GRID = "#333333", "#e4e4e4"


MODELS = 12
"""So many are drawn, a column each."""
PANELS = 100
"""So many comparisons are drawn, one below the other."""
PIXELS = 30_000
"""Longest side of a picture."""


def curves(experiments: Sequence[Experiment], png: str | Path) -> None:
    """Draw every model's leading metric and training loss over the steps, a line per arm, seeds as a band.

    Raises:
        ValueError: no finished run to draw.
        OSError: the file cannot be written.
    """
    write_named(png, curves_png(experiments))


def curves_png(experiments: Sequence[Experiment]) -> bytes:
    """What `curves` writes.

    Raises:
        ValueError: no finished run to draw.
    """
    if not experiments:
        raise ValueError("No run that counts has finished: there are no curves to draw yet.")
    with _plainly():
        return _png(_curves(experiments))


@contextmanager
def _plainly() -> Iterator[None]:
    """Inside, a name with dollars is no formula, and letters that no font has are no news."""
    matplotlib = extras.load("matplotlib", "report", "a figure")
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    dpi = min(160, PIXELS / max(figure.get_size_inches()))
    figure.savefig(stream, format="png", dpi=dpi, facecolor="white")
    return stream.getvalue()


def _curves(experiments: Sequence[Experiment]) -> Figure:
    from matplotlib.figure import Figure

    several = len(experiments) > 1
    groups: dict[str, tuple[str, list[Run]]] = {}
    for experiment in experiments:
        for arm in experiment.arms:
            label = f"{experiment.title}: {arm.label}" if several else arm.label
            groups[label] = arm.label, list(arm.runs.values())
    runs = [run for _, group in groups.values() for run in group]
    logs = {run.folder: history(run.folder) for run in runs}
    everyone = list(dict.fromkeys(model for run in runs for model in run.metrics))
    models = everyone[:MODELS]
    figure = Figure(figsize=(max(4.6 * len(models), 5.2), 6.2), layout="constrained")
    axes = figure.subplots(2, len(models), squeeze=False, sharex="col")
    handles: dict[str, Any] = {}
    for column, model in enumerate(models):
        metric = next((leading(run.metrics[model]) for run in runs if model in run.metrics), "")
        panels = (
            (axes[0][column], (f"{model}/test_{metric}", f"{model}/{metric}"), heading(metric)),
            (axes[1][column], (f"{model}/loss",), "training loss"),
        )
        for ax, keys, label in panels:
            _frame(ax, label if column == 0 or ax is axes[0][column] else "")
            for position, (name, (kind, group)) in enumerate(groups.items()):
                spare = SPARE_COLOURS[position % len(SPARE_COLOURS)]
                colour = spare if several else COLOURS.get(kind, spare)
                line = _draw(ax, [first_of(logs[run.folder], keys) for run in group], colour, kind == BASELINE)
                if line is not None:
                    label = f"{name} ({len(group)})" if len(group) > 1 else name
                    handles.setdefault(printable(label), line)
        axes[0][column].set_title(model, loc="left", fontsize=11, fontweight="bold", color=INK)
        axes[1][column].set_xlabel("step", color=INK, fontsize=9)
    figure.align_ylabels()
    if handles:
        titles = list(dict.fromkeys(printable(experiment.title) for experiment in experiments))
        names = ", ".join(titles[:5]) + (f" and {len(titles) - 5} more" if len(titles) > 5 else "")
        if len(everyone) > MODELS:
            names += f", the first {MODELS} of {len(everyone)} models"
        banded = any(len(group) > 1 for _, group in groups.values())
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper left",
            ncols=2 if several else 6,
            frameon=False,
            fontsize=9,
            labelcolor=INK,
            title=f"{names}: mean over seeds, the band is ± one standard deviation" if banded else names,
            title_fontsize=8,
            alignment="left",
        )
        legend.get_title().set_color(INK)
    return figure


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

    ax.set_ylabel(printable(label), color=INK, fontsize=9)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=8, length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#999999")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.margins(x=0.02)


# --- differences ---


def intervals(sheets: Sequence[Sheet], png: str | Path) -> None:
    """Draw each row's difference to its baseline: ours as a dot with its interval, the published one as a diamond.

    Raises:
        ValueError: nothing is compared with anything.
    """
    panels = [(sheet, metric, rows) for sheet in sheets for metric, rows in compared(sheet)]
    if not panels:
        raise ValueError("No row differs from a baseline yet, ours or a published one: there is nothing to draw.")
    with _plainly():
        content = _png(_intervals(panels[:PANELS]))
    write_named(png, content)


def compared(sheet: Sheet) -> list[tuple[str, list[Line]]]:
    """Metrics with differences, of ours or published ones, and the rows that have them: of a published table all
    metrics, of a comparison, which has many, the leading one. A model that is the same in every arm is left out."""
    found = []
    for metric in sheet.metrics if sheet.published else [leading(sheet.metrics)]:
        rows = [line for line in sheet.lines if metric in line.cells and _told(line.cells[metric])]
        if any(_told(line.cells[metric], apart=True) for line in rows):
            found.append((metric, rows))
    return found


def _told(cell: Cell, *, apart: bool = False) -> bool:
    own = cell.difference is not None and (cell.difference.apart or not apart)
    return own or cell.published_difference is not None


def _intervals(panels: Sequence[tuple[Sheet, str, list[Line]]]) -> Figure:
    from matplotlib.figure import Figure

    heights = [len(rows) + 2.6 + len(text.title(sheet)) // 64 for sheet, _, rows in panels]
    figure = Figure(figsize=(8.6, 0.29 * sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (sheet, metric, rows) in zip(axes, panels, strict=True):
        _frame(ax, "")
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color=GRID, linewidth=0.8)
        ax.axvline(0, color="#999999", linewidth=1)
        for y, line in enumerate(rows):
            cell = line.cells[metric]
            if cell.published_difference is not None:
                ax.plot(
                    cell.published_difference,
                    y,
                    marker="D",
                    markersize=6,
                    markerfacecolor="white",
                    markeredgecolor=COLOURS["noise"],
                    markeredgewidth=1.4,
                    zorder=3,
                )
            if cell.difference is not None:
                ends = [cell.difference.low, cell.difference.high]
                if None not in ends:
                    ax.plot(ends, [y, y], color=COLOURS["transfer"], linewidth=2, solid_capstyle="butt", zorder=4)
                ax.plot(cell.difference.mean, y, marker="o", markersize=6, color=COLOURS["transfer"], zorder=5)
        ax.set_yticks(range(len(rows)), [printable(line.label) for line in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        _about_zero(ax)
        ax.set_title(
            "\n".join(textwrap.wrap(printable(text.title(sheet)), 64)),
            loc="left",
            fontsize=9,
            fontweight="bold",
            color=INK,
        )
        ax.set_xlabel(f"{printable(heading(metric))}: difference to the baseline", color=INK, fontsize=8)
    _explain(figure, any(sheet.published for sheet, _, _ in panels))
    return figure


def _about_zero(ax: Axes) -> None:
    """Zero is in the picture, and nothing touches its edge."""
    low, high = ax.get_xlim()
    low, high = min(low, 0.0), max(high, 0.0)
    room = max(0.04 * (high - low), 0.02)
    ax.set_xlim(low - room, high + room)


def _explain(figure: Figure, published: bool) -> None:
    from matplotlib.lines import Line2D

    ours, theirs = COLOURS["transfer"], COLOURS["noise"]
    marks = [Line2D([], [], color=ours, marker="o", linewidth=2, label="ours, 95 % interval of the paired difference")]
    if published:
        diamond = Line2D([], [], color=theirs, marker="D", markerfacecolor="white", linestyle="", label="published")
        marks.append(diamond)
    figure.legend(handles=marks, loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
