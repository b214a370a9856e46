"""Exported weights: safetensors files that carry a checksum of themselves, which every reader compares.

The checksum is XXH3 of the tensors' entries in the header and of all bytes behind it. It stands in the metadata, which
it does not cover. Files without one, of other programs, are taken as they are.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import xxhash

from hetero_kt import files

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "hetero_kt.xxh3_128"
_EMPTY = "0" * 32  # as long as a checksum
_HEADER = 100_000_000
"""Bytes of the largest header, by the format's definition."""
_BLOCK = 2**20


def save_tensors(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with its checksum.

    Raises:
        OSError or SafetensorError: it cannot be written.
    """
    from safetensors.torch import save_file  # it brings torch, which those who read file names do not need

    save_file(dict(state), file, {**(metadata or {}), _KEY: _EMPTY})
    with file.open("r+b") as stream:
        head, _, found = _sum(stream)
        place = head.index(f'"{_KEY}":"{_EMPTY}"'.encode()) + len(f'"{_KEY}":"')
        stream.seek(8 + place)
        stream.write(found.encode())


def check(file: str | Path) -> None:
    """Refuse a safetensors file whose checksum differs. What else may be wrong with it, its reader says.

    Raises:
        OSError: it has changed since it was written, or is no regular file.
    """
    path = os.path.realpath(file)
    with files.open_regular(path) as stream:
        about = os.fstat(stream.fileno())
        _check(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _check(path: str, size: int, changed_ns: int) -> None:
    """Once for each state of a file."""
    with files.open_regular(path) as stream:
        try:
            _, stated, found = _sum(stream)
        except (ValueError, TypeError, AttributeError, RecursionError):
            return
    if stated is not None and stated != found:
        raise OSError(errno.EIO, "its checksum differs: it has changed since it was exported", path)


def _sum(stream: BinaryIO) -> tuple[bytes, str | None, str]:
    """The header, the checksum that stands there, and the one that the content has.

    Raises:
        ValueError, TypeError, AttributeError or RecursionError: this is no safetensors file.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > _HEADER:
        raise ValueError("no header")
    head = stream.read(length)
    entries = json.loads(head)
    stated = entries.pop("__metadata__", {}).get(_KEY)
    state = xxhash.xxh3_128(json.dumps(entries, sort_keys=True).encode())
    while block := stream.read(_BLOCK):
        state.update(block)
    return head, stated, state.hexdigest()
