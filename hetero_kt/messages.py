"""What sentences to the user are made of."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """What an error says, for use within a sentence: its first line without the full stop, or else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
