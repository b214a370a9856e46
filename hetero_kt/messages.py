"""What sentences to the user are made of."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import unicodedata
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def check_word(option: str, name: object) -> None:
    """Refuse a name that is no plain word. Names become those of files and folders, and a recipe may be a stranger's.

    Args:
        option: what is called so, for the sentence.

    Raises:
        ValueError: anything but 1 to 100 letters, digits, `_`, `.` and `-` of ASCII, the first a letter or a digit.
    """
    if not isinstance(name, str) or _WORD.fullmatch(name) is None:
        raise ValueError(
            f"{option} {shown(name)} is no plain word: use up to 100 letters, digits, _ . and -, no sign first."
        )


def first_line(error: BaseException) -> str:
    """What an error says, for use within a sentence: its first line without the full stop, or else its name."""
    if isinstance(error, OSError) and error.strerror:  # without its number, and the path that the sentence names
        return error.strerror
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0][:500].rstrip(". "))


def printable(text: str) -> str:
    """The text for a terminal, a page or a table: what would move a cursor, turn the writing's direction or be no
    character at all stands as its escape. Line breaks and tabs are such too."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or unicodedata.category(one) == "Zs" else _escape(one) for one in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 80


def shown(value: object) -> str:
    """Anything out of a file, for use within a sentence: as Python writes it, short and on one line."""
    try:
        return printable(_SHORT.repr(value))
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits" if isinstance(value, int) else f"a {type(value).__name__}"


def check_choices(settings: Any, option: str) -> None:
    """Refuse a value that is none of those that its field's `Literal` names, in dataclasses at any depth: Python looks
    at no annotation, and what is compared with one name after the other would take a misspelt one for the last.

    Args:
        option: what the dataclass is called in the sentence.

    Raises:
        ValueError: one sentence with the field and what it may be.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        path, value, kind = f"{option}.{field.name.replace('_', '-')}", getattr(settings, field.name), hints[field.name]
        several = get_origin(kind) is tuple
        if several:
            kind = get_args(kind)[0]
        if get_origin(kind) is Literal:
            for one in value if several else (value,):
                if one not in get_args(kind):
                    raise ValueError(f"{path} {one} is unknown: use one of {', '.join(map(str, get_args(kind)))}.")
        for name, inner in value.items() if isinstance(value, Mapping) else (("", value),):
            if dataclasses.is_dataclass(inner):
                check_choices(inner, f"{path}.{name}" if name else path)
