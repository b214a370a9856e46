"""A question about a picture."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one picture."""

    id: str
    image: str
    """Key of the picture."""
    text: str
    answers: tuple[str, ...]
    """One for each annotator, empty where none was given."""
    kind: str
    """`yes/no`, `number` or `other`."""
