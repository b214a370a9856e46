"""What models are trained for: batch -> loss, predictions -> metrics."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor

_TASKS = {
    "squad": "question_answering",
    "imdb": "sentiment",
    "pretraining": "masked_lm",
    "vqa": "vqa",
    "captions": "retrieval",
}


class Task(Protocol):
    """What a run needs to know of a task; each module of this package is one."""

    def loss(self, model: Any, batch: tuple[Tensor, ...], label_smoothing: float = 0.0) -> Tensor:
        """Mean over the rows of `batch`, a scalar in nats."""
        ...

    def evaluate(self, model: Any, loader: Any, device: Any, **options: Any) -> dict[str, float]:
        """The task's metrics over the loader's set. Collective. `options` are the task's own."""
        ...


def task_of(data: str) -> Task:
    """The task that goes with a data set: classification of pictures, or what a set of texts or pairs is for."""
    # Imported where it is needed: transformers takes seconds to import.
    return cast(Task, import_module(f"{__name__}.{_TASKS.get(data, 'classification')}"))
