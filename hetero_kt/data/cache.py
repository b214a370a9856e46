"""Arrays that take minutes to make and are always the same: made once per machine, kept on disk, mapped into memory.

An entry is a folder `<cache>/<key>/` of .npy files and `notes.json`, which holds their checksums. It appears by a
rename when it is complete and on the disk, so nobody ever sees half of one. Opening it compares the checksums: what a
disk or a stopped machine has changed is built again. A lock file beside it lets one process build while others wait;
the kernel takes the lock back from a builder that is killed, and the next in line begins anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from hetero_kt import files
from hetero_kt.messages import first_line

Entry = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Arrays by name, and notes that go into JSON."""

_NOTES = 2**28
"""Bytes of the largest notes.json that is read."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def default_folder() -> Path:
    """HETERO_KT_CACHE, or `hetero_kt` in the user's cache folder."""
    named = os.environ.get("HETERO_KT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetero_kt"


def key(*parts: Any) -> str:
    """A name for what is made from `parts`: bytes as they are, everything else as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:32]


def cached(name: str, build: Callable[[], Entry], folder: str | Path = "", *, verified: bool = False) -> Entry:
    """The entry `name`, read-only and mapped into memory; `build` makes it where it is not there or damaged.

    Any number of processes may ask at once: one builds. On file systems without locks several may build, and the
    first to finish counts. That a damaged entry is built again is printed.

    Args:
        folder: of the cache; empty takes `default_folder()`.
        verified: this start has compared the checksums already, in another process perhaps.

    Raises:
        ValueError: the cache's folder cannot be written.
    """
    cache = Path(folder) if folder else default_folder()
    place = cache / name
    found = _read(place, verified)
    if not isinstance(found, str):
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{name}.lock"):
            found = _read(place)
            if not isinstance(found, str):
                return found
            if found:
                print(f"{place} {found}: it is built again.", flush=True)
            for left in (place, *cache.glob(f"{name}.part*")):  # damaged, or of a builder that was killed
                shutil.rmtree(left, ignore_errors=True)
            arrays, notes = build()
            _write(place, arrays, notes)
    except OSError as error:
        raise ValueError(
            f"the cache {cache} cannot be used ({error.strerror or error}): name a folder that can be written"
            f" with HETERO_KT_CACHE"
        ) from error
    found = _read(place)
    if isinstance(found, str):
        raise ValueError(f"the cache {cache} loses what is written to it: name another folder with HETERO_KT_CACHE")
    return found


def _write(place: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    part = place.with_name(f"{place.name}.part{os.getpid()}")
    part.mkdir()
    checksums = {}
    for name, array in arrays.items():
        file = part / f"{name}.npy"
        np.save(file, array, allow_pickle=False)
        checksums[name] = files.checksum(file)
    content = {"key": place.name, "arrays": checksums, "notes": notes}
    (part / "notes.json").write_text(json.dumps({**content, "checksum": _own_checksum(content)}))
    files.sync_folder(part)
    try:
        os.rename(part, place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(part)  # no locks here, and another was faster
    files.sync(place.parent)


def _read(place: Path, verified: bool = False) -> Entry | str:
    """An entry, or what is wrong with it; empty where there is none."""
    if not place.is_dir():
        return ""
    try:
        content = json.loads(files.read_regular(place / "notes.json", _NOTES))
        stated = content.pop("checksum", None)
        if stated is None:
            return "is of an earlier version"
        if stated != _own_checksum(content) or content["key"] != place.name:
            return "is damaged (the checksum of notes.json differs)"
        for name, checksum in content["arrays"].items():
            if not verified and files.checksum(place / f"{name}.npy") != checksum:
                return f"is damaged (the checksum of {name}.npy differs)"
        return {name: _mapped(place / f"{name}.npy") for name in content["arrays"]}, content["notes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"is damaged ({first_line(error)})"


def _own_checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _mapped(file: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    mode: Any = "r" if file.stat().st_size > 256 else None
    return np.load(file, mmap_mode=mode, allow_pickle=False)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Inside, no other process is. The lock file stays: removing it would let two in."""
    # A FIFO in its place would let an open without O_NONBLOCK wait for ever.
    descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)
