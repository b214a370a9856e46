"""Pictures of a page as inline SVG: text that can be read and scaled, colours that the page's own style sets.

A line's colour is the class `s0` to `s7`; its dashes tell it apart without colour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from hetero_kt.report.comparison import Line, Sheet
from hetero_kt.report.metrics import heading
from hetero_kt.report.text import difference, interval

WIDTH, HEIGHT = 360, 230
"""Of one chart, in units of its own: as wide as a narrow screen, so that its text keeps a readable size."""
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 34
"""Margins."""
SERIES = 8
"""Styles of lines that the page has."""


@dataclass(frozen=True, eq=False)
class Curve:
    """One line of a chart, with its band."""

    label: str
    style: int
    steps: np.ndarray
    """(S,)"""
    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Chart:
    """A picture with its caption."""

    caption: str
    svg: Markup
    legend: tuple[tuple[str, int], ...] = ()
    """(label, style) of its lines."""


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about as many as wanted: 1, 2, 2.5 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _number(value: float) -> str:
    if abs(value) >= 1000 and value == int(value):
        return f"{value / 1000:g}k" if value % 100 == 0 else f"{value:.0f}"
    return f"{value + 0.0:.2g}" if 0 < abs(value) < 1e-3 else f"{value + 0.0:.4g}"


def lines(caption: str, unit: str, curves: Sequence[Curve]) -> Chart | None:
    """Curves over the steps, each with a band of one standard deviation; None where none has two points."""
    curves = [curve for curve in curves if len(curve.steps)]
    if not any(len(curve.steps) > 1 for curve in curves):
        return None
    steps = np.concatenate([curve.steps for curve in curves])
    low = min(float((curve.mean - curve.std).min()) for curve in curves)
    high = max(float((curve.mean + curve.std).max()) for curve in curves)
    if high - low < 1e-6 * abs(high):  # less than a float's own noise: an axis of such steps would say nothing
        low, high = low - 0.01 * abs(low), high + 0.01 * abs(high)
    room = 0.05 * (high - low) or 1.0
    low, high = low - room, high + room
    first, last = float(steps.min()), float(steps.max())
    first = 0.0 if 0 <= first < 0.1 * last else first

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(low, high):
        parts.append(_grid(LEFT, y(value), WIDTH - RIGHT, y(value)))
        parts.append(_label(LEFT - 5, y(value) + 4, _number(value), "end"))
    for value in ticks(first, last):
        if value == int(value):
            parts.append(_label(x(value), HEIGHT - BOTTOM + 16, _number(value), "middle"))
    parts.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "step", "middle"))
    for curve in curves:
        style = curve.style % SERIES
        band = [(x(s), y(m - d)) for s, m, d in zip(curve.steps, curve.mean, curve.std, strict=True)]
        band += [(x(s), y(m + d)) for s, m, d in zip(curve.steps, curve.mean, curve.std, strict=True)][::-1]
        if len(curve.steps) > 1 and curve.std.any():
            parts.append(Markup('<polygon class="band s{}" points="{}"/>').format(style, _points(band)))
    for curve in curves:
        style = curve.style % SERIES
        middle = [(x(s), y(m)) for s, m in zip(curve.steps, curve.mean, strict=True)]
        parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(style, _points(middle)))
        if len(middle) < 15:
            parts += [_dot(px, py, style) for px, py in middle]
    ends = "; ".join(f"{curve.label} {_number(float(curve.mean[-1]))}" for curve in curves)
    told = f"{caption} ({unit}) over steps {_number(first)} to {_number(last)}. At the end: {ends}."
    legend = tuple((curve.label, curve.style % SERIES) for curve in curves)
    return Chart(f"{caption}, {unit}" if unit else caption, _svg(HEIGHT, told, parts), legend)


def intervals(sheet: Sheet, metric: str, rows: Sequence[Line]) -> Chart:
    """Each row's difference to its baseline: ours as a dot with its interval, the published one as a diamond."""
    ends = [0.0]
    for line in rows:
        cell = line.cells[metric]
        if cell.difference is not None:
            ends += [e for e in (cell.difference.mean, cell.difference.low, cell.difference.high) if e is not None]
        if cell.published_difference is not None:
            ends.append(cell.published_difference)
    low, high = min(ends), max(ends)
    room = max(0.06 * (high - low), 0.01)
    low, high = low - room, high + room
    step, height = 36, 36 * len(rows) + TOP + 24

    def x(value: float) -> float:
        return 20 + (value - low) / (high - low) * (WIDTH - 40)

    parts = []
    for value in ticks(low, high, 4):
        parts.append(_grid(x(value), TOP, x(value), height - 20, "zero" if value == 0 else "grid"))
        parts.append(_label(x(value), height - 5, _number(value), "middle"))
    told = []
    for i, line in enumerate(rows):
        cell, y = line.cells[metric], TOP + step * i + 26
        parts.append(_label(10, y - 11, line.label, "start", "row"))
        if cell.published_difference is not None:
            px = x(cell.published_difference)
            diamond = _points([(px - 5, y), (px, y - 5), (px + 5, y), (px, y + 5)])
            parts.append(Markup('<polygon class="diamond" points="{}"/>').format(diamond))
        if cell.difference is not None:
            if cell.difference.low is not None and cell.difference.high is not None:
                span = _points([(x(cell.difference.low), y), (x(cell.difference.high), y)])
                parts.append(Markup('<polyline class="interval" points="{}"/>').format(span))
            parts.append(_dot(x(cell.difference.mean), y, 1, 4))
        ours = f"ours {difference(cell.difference, metric)} {interval(cell, metric)}" if cell.difference else ""
        theirs = "" if cell.published_difference is None else f"published {cell.published_difference:+.2f}"
        told.append(f"{line.label}: {', '.join(filter(None, (ours.strip(), theirs)))}")
    caption = f"{heading(metric)}: difference to the baseline, with its 95 % interval"
    if any(line.cells[metric].published_difference is not None for line in rows):
        caption += "; diamonds are published"
    return Chart(caption, _svg(height, f"{sheet.title}, {heading(metric)}. " + "; ".join(told), parts))


def _svg(height: float, told: str, parts: Sequence[Markup]) -> Markup:
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, told)
    return start + Markup("").join(parts) + Markup("</svg>")


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)


def _grid(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> Markup:
    text = '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'
    return Markup(text).format(kind, x1, y1, x2, y2)


def _dot(x: float, y: float, style: int, radius: float = 2.5) -> Markup:
    return Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(style, x, y, radius)


def _label(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> Markup:
    shape = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    return Markup(shape).format(kind, x, y, anchor, text)
