"""JSON and YAML of files that others may have written, read within bounds.

A run, a data set or a checkpoint may be a stranger's, and a disk may have lost half of it. Python's own readers answer
such a file with a dozen kinds of errors, or never. Here, a file gives what stands in it, or a ValueError whose text
says what is wrong with it, in words that stand in a sentence: "it is not JSON (...)". The caller names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from hetero_kt.files import read_regular
from hetero_kt.messages import first_line, printable, shown

MOST = 64 * 2**20
"""Bytes of a JSON document, where the caller names no other bound."""
MOST_YAML = 128 * 2**10
"""Bytes of a YAML document, which take about two seconds; recipes have a tenth of that."""
LINE = 2**20
"""Bytes of one line of JSON lines."""
DEPTH = 50
"""Of lists and mappings in each other."""
EXACT = 2**53
"""Whole numbers beyond it are not exact in other readers of JSON, nor as floats."""


def read_json(path: str | Path, most: int = MOST) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is larger than `most` bytes, or holds no JSON.
    """
    return parse_json(read_bytes(path, most))


def read_bytes(path: str | Path, most: int = MOST) -> bytes:
    """The content of a file, which has to be a regular one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is larger than `most` bytes.
    """
    try:
        return read_regular(path, most)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # a file lies where its folder should be
        raise FileNotFoundError(*error.args) from error
    except OSError as error:
        raise ValueError(error.strerror or first_line(error)) from error


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text, in UTF-8 where it is bytes.

    Raises:
        ValueError: it is no JSON, or lists and mappings are nested deeper than `DEPTH`.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        content = json.loads(text)
    except UnicodeError as error:
        raise ValueError("it is not UTF-8") from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except ValueError as error:
        raise ValueError(f"it is not JSON ({first_line(error)})") from error
    if text.count("[") + text.count("{") > DEPTH:
        _check_depth(content)
    return content


_TOO_DEEP = f"it is nested deeper than {DEPTH} levels"


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEPTH):
        level = [
            entry
            for container in level
            if isinstance(container, dict | list)
            for entry in (container.values() if isinstance(container, dict) else container)
            if isinstance(entry, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def json_lines(stream: BinaryIO) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file of JSON objects, as it stands there and as its object; None where it holds none.

    A line of more than `LINE` bytes comes in pieces, without objects. The file is never in memory as a whole.
    """
    whole = True
    while line := stream.readline(LINE):
        ended = line.endswith(b"\n")
        content = None
        if whole and (ended or len(line) < LINE):
            try:
                content = parse_json(line)
            except ValueError:
                content = None
        whole = ended
        yield line, content if isinstance(content, dict) else None


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file; see `parse_yaml`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, is larger than `MOST_YAML` bytes, or is no plain YAML.
    """
    content = read_bytes(path, MOST_YAML)
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeError as error:
        raise ValueError("it is not UTF-8") from error


def parse_yaml(text: str) -> Any:
    """The content of a YAML text: mappings, lists and scalars, without tags, anchors and aliases.

    Raises:
        ValueError: it is no such YAML, longer than `MOST_YAML`, or nested deeper than `DEPTH`.
    """
    if len(text) > MOST_YAML:
        raise ValueError(f"it has {len(text):,} characters, more than the {MOST_YAML:,} that are read")
    try:
        return yaml.load(text, Loader=_Plain)  # a SafeLoader that takes less
    except _NotPlain as error:
        raise ValueError(str(error)) from error
    except yaml.MarkedYAMLError as error:
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ValueError(f"it is not YAML ({printable(str(error.problem))[:200]}{where})") from error
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # PyYAML builds some scalars without looking: a date of month 99, a number that consists of its sign.
        raise ValueError(f"it is not YAML ({printable(first_line(error))[:200]})") from error


class _NotPlain(Exception):
    """What stands in no recipe that we write."""


class _Plain(yaml.SafeLoader):
    """Without what can grow (aliases), nest without an end, or name a type."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _NotPlain("it has anchors or aliases (& and *), which are not read")
        if event.tag is not None:
            raise _NotPlain(f"it has the tag {shown(event.tag)}, and tags are not read")
        self.depth += 1
        if self.depth > DEPTH:
            raise _NotPlain(_TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


# --- what stands in them ---


def whole(value: Any, what: str, least: int = 0, most: int = EXACT) -> int:
    """`value`, which has to be a whole number within its bounds.

    Args:
        what: it is called so in the sentence.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, no whole number from {least} to {most}")
    return value


def text(value: Any, what: str) -> str:
    """`value`, which has to be a text.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, no text")
    return value


def mapping(value: Any, what: str) -> dict[str, Any]:
    """`value`, which has to be a mapping.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, no mapping")
    return value
