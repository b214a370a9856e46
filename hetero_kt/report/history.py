"""What a run logged over its steps: its curves, and its best evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hetero_kt.documents import EXACT, json_lines
from hetero_kt.files import open_regular
from hetero_kt.report import metrics
from hetero_kt.report.runs import LARGEST, Run

POINTS = 100
"""Longest curve drawn: more points than that are averaged in bins, or noise hides the difference."""
LEAST = 1e-100
"""Smaller numbers, 0 aside, are no measurements, and no axis has room for them."""


MOST = 256 * 2**20
"""Bytes of a metrics.jsonl that are read: some seconds of work."""
VALUES = 4_000_000
"""Numbers and lines of it that are read."""
SERIES = 1_000
"""Names of losses and evaluations that are read, and as many others."""


def history(folder: Path) -> dict[str, dict[int, float]]:
    """A run's `metrics.jsonl` as key -> step -> value; the later line wins, a half-written one is skipped, and so is a
    value that is no number: one infinite loss would leave an axis, and with it all arms' curves, without a scale."""
    return read(folder)[0]


def read(folder: Path) -> tuple[dict[str, dict[int, float]], str]:
    """As `history`, and what of the file was left out, since there is too much of it; empty where nothing was."""
    series: dict[str, dict[int, float]] = {}
    if too_large(folder):
        return series, too_large(folder)
    names, left, room = {True: 0, False: 0}, 0, VALUES
    try:
        with open_regular(folder / "metrics.jsonl") as stream:
            for _, record in json_lines(stream):
                room -= 1
                step = record.pop("step", None) if record else None
                if record is None or type(step) is not int or not 0 <= step <= EXACT:
                    continue  # a run that was killed while it wrote this line
                for key, value in record.items():
                    if type(value) not in (int, float) or not (value == 0 or LEAST <= abs(value) <= LARGEST):
                        continue
                    if key not in series:
                        led = key.endswith("/loss") or "/test_" in key
                        if names[led] >= SERIES:
                            left += 1
                            continue
                        names[led] += 1
                        series[key] = {}
                    series[key][step] = float(value)
                    room -= 1
                if room <= 0:
                    return (
                        series,
                        f"{folder} has a metrics.jsonl of more than {VALUES:,} numbers: the rest is left out.",
                    )
    except OSError:  # there is none, or it is none
        return {}, ""
    many = f"{folder} has a metrics.jsonl of more than {SERIES:,} names: the others are left out." if left else ""
    return series, many


def too_large(folder: Path) -> str:
    """A sentence where a metrics.jsonl is too large to be read; empty where it is not."""
    try:
        size = (folder / "metrics.jsonl").stat().st_size
    except OSError:
        return ""
    if size <= MOST:
        return ""
    return f"{folder} has a metrics.jsonl of {size:,} bytes, more than the {MOST:,} that are read: it has no curves."


def first_of(log: Mapping[str, dict[int, float]], keys: Sequence[str]) -> dict[int, float]:
    """The series of the first of `keys` that was logged; empty where none was."""
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


# --- the best evaluation ---


def best(run: Run) -> Run:
    """The run with each model's metrics from that model's best evaluation instead of its last one.

    The best by the model's leading metric, the first of several; all its metrics are that evaluation's.
    """
    if not run.finished:
        return run
    log, chosen, evaluations = history(run.folder), {}, 0
    for model, last in run.metrics.items():
        lead = metrics.leading(last)
        over_time = log.get(f"{model}/test_{lead}", {})
        if not over_time:
            return replace(run, problem="has no evaluations in a metrics.jsonl: which was the best is not known")
        sign = -1 if metrics.falls(lead) else 1
        step = max(sorted(over_time), key=lambda step: sign * over_time[step])
        logged = {name: log.get(f"{model}/test_{name}", {}).get(step) for name in last}
        chosen[model] = {name: value for name, value in logged.items() if value is not None}
        evaluations = max(evaluations, len(over_time))
    return replace(run, metrics=chosen, evaluations=evaluations)


def chosen(runs: Iterable[tuple[Run, str]]) -> str:
    """How the numbers of models in runs were chosen, where that flatters them; empty for the last evaluation's."""
    counts: dict[bool, set[int]] = {}
    for run, model in runs:
        if run.evaluations:
            counts.setdefault(run.held_out(model), set()).add(run.evaluations)
    texts = []
    for held_out, numbers in sorted(counts.items()):
        many = f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else f"{min(numbers)}"
        where = "samples held out of the training set" if held_out else "the test set: optimistic"
        texts.append(f"best of {many} evaluations on {where}")
    return "; ".join(texts)
