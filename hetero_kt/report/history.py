"""What a run logged over its steps: its curves, and its best evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hetero_kt.report import metrics
from hetero_kt.report.runs import Run

POINTS = 100
"""Longest curve drawn: more points than that are averaged in bins, or noise hides the difference."""


def history(folder: Path) -> dict[str, dict[int, float]]:
    """A run's `metrics.jsonl` as key -> step -> value; the later line wins, a half-written one is skipped, and so is a
    value that is no number: one infinite loss would leave an axis, and with it all arms' curves, without a scale."""
    series: dict[str, dict[int, float]] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
            step = int(record.pop("step"))
            values = {k: float(v) for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue  # a run that was killed while it wrote this line
        for key, value in values.items():
            series.setdefault(key, {})[step] = value
    return {key: {step: value for step, value in one.items() if math.isfinite(value)} for key, one in series.items()}


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
