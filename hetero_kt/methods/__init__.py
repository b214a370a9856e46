"""Ways to transfer knowledge, one file each, and what the trainer knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from hetero_kt.distributed.learner import Learner


class Method(Protocol):
    """One way to transfer knowledge between models."""

    learners: dict[str, Learner]
    """Everything that trains, by name: what is saved."""

    models: tuple[str, ...]
    """Those of the learners that are evaluated and exported."""

    def step(self, step: int, batches: Mapping[str, Any]) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def measured(self) -> dict[str, Any]:
        """What belongs into `result.json`."""
        ...


class Diverged(RuntimeError):
    """A method has given up; the trainer saves before it passes this on."""
