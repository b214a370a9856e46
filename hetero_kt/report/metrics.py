"""Metrics as they are written: their headings, their order, their digits, and which way is better."""

from __future__ import annotations

from collections.abc import Iterable

HEADINGS = {
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

DETAILS = (
    *("HasAns_exact", "NoAns_exact", "NoAns_f1", "best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
    "majority",
)
"""Metrics that a terminal has no room for; all other forms of a report have them."""


def heading(metric: str) -> str:
    """What stands above its numbers."""
    return HEADINGS.get(metric, metric)


def ordered(metrics: Iterable[str]) -> list[str]:
    """Each once: those that `HEADINGS` does not have, then its own in its order, then `DETAILS`."""
    order = [name for name in HEADINGS if name not in DETAILS] + list(DETAILS)
    return sorted(dict.fromkeys(metrics), key=lambda name: order.index(name) if name in order else -1)


def digits(metric: str) -> int:
    """Behind the decimal point."""
    return 3 if metric.endswith("loss") else 2


def falls(metric: str) -> bool:
    """Whether less of it is better."""
    return metric == "error" or metric.endswith("loss")


def leading(metrics: Iterable[str]) -> str:
    """The one that speaks for a model: the first that is no loss, as its task gives them; empty where there is none."""
    metrics = list(metrics)
    return next((name for name in metrics if not name.endswith("loss")), metrics[0] if metrics else "")
