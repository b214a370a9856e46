"""Slurm's lists of hosts, expanded: `n[01-03,07],gpu5` is n01, n02, n03, n07 and gpu5.

Slurm's own `scontrol show hostnames` does the same, and is missing in most containers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

DEEPEST = 8
"""Brackets within brackets; Slurm writes one level."""


def expand(hosts: str) -> Iterator[str]:
    """The names of a list, in its order, one after the other: a range may be long.

    Raises:
        ValueError: no list of hosts, said after the name of what holds it.
    """
    wrong = ValueError(f"{hosts!r} is no list of hosts")
    depths = list(accumulate((letter == "[") - (letter == "]") for letter in hosts))
    if not hosts or re.search(r"\s", hosts) or min(depths) < 0 or max(depths) > DEEPEST or depths[-1]:
        raise wrong
    for one in _split(hosts):
        for host in _names(one):
            if not host:
                raise wrong
            yield host


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _names(text: str) -> Iterator[str]:
    """`a[1-2]b[x,y]`: the last brackets change fastest."""
    before, bracket, rest = text.partition("[")
    if not bracket:
        yield before
        return
    end = next(i for i in range(len(rest)) if rest[i] == "]" and rest[:i].count("[") == rest[:i].count("]"))
    for middle in _inside(rest[:end]):
        for after in _names(rest[end + 1 :]):
            yield before + middle + after


def _inside(text: str) -> Iterator[str]:
    """What stands in brackets: names, numbers, ranges of numbers as wide as the first."""
    for one in _split(text):
        numbers = re.fullmatch("([0-9]{1,18})-([0-9]{1,18})", one)
        if numbers is None:
            yield from _names(one)
            continue
        first, last = numbers.groups()
        if int(first) > int(last):
            raise ValueError(f"holds {one}, a range that ends before it begins")
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}d}"
