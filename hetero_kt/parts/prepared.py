"""A method that is ready to start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hetero_kt.methods import Method
from hetero_kt.models.teacher import Frozen


@dataclass(frozen=True)
class Prepared:
    """A method whose models are built and checked, and whose engines are not yet started."""

    parameters: dict[str, int]
    """Of what the method adds to the models: adapters, connectors, branches."""
    teachers: dict[str, Frozen]
    start: Callable[[], Method]
    """Makes the engines. Collective."""
    fill: Callable[[], None] = lambda: None
    """Computes what has to be on disk before. Collective; raises ValueError on all ranks."""
