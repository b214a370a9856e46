"""Ways to transfer knowledge, one file each, and what the trainer knows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Method(Protocol):
    """One way to transfer knowledge between models."""

    engines: dict[str, DeepSpeedEngine]

    @property
    def models(self) -> dict[str, nn.Module]: ...

    def step(self, step: int, batches: Mapping[str, Any]) -> dict[str, Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Diverged(RuntimeError):
    """A method has given up; the trainer saves before it passes this on."""
