"""What every objective of distillation is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Teachers = Mapping[str, Any]
"""By name: `Frozen`, or `Stored` where only logits are asked for."""
Terms = dict[str, Tensor]
"""Scalars by the name that they are logged under, each with its weight."""


class Objective(Protocol):
    """What the student learns from its teachers."""

    name: str
    """Of what is trained beside the student."""

    @property
    def aside(self) -> nn.Module | None:
        """That itself: plain, before it is in an engine."""

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        """The student's logits (B, K) and the terms besides its own cross-entropy, for one micro-batch.

        Calls `student` once and the engine `aside` (None where there is nothing aside) at most once as engines:
        DeepSpeed opens an engine's backward at the outputs of every such call.
        """
        ...


class Evolving:
    """An objective that is not the same at every step."""

    def begin(self, step: int) -> None:
        """Before the forwards of optimizer step `step`."""

    def finish(self) -> None:
        """After that step. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot know, equal on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def risen(step: int, warmup: float) -> float:
    """Share of a weight that rises over the first `warmup` steps, 0 for none, in step `step`."""
    return min((step + 1) / warmup, 1.0) if warmup else 1.0


class Alone:
    """No teacher: the student and its labels."""

    name, aside = "", None

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        return student(pictures), {}
