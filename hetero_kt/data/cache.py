"""Arrays that take minutes to make and are always the same: made once per machine, kept on disk, mapped into memory.

An entry is a folder `<cache>/<key>/` of .npy files and `notes.json`. It appears by a rename when it is complete, so
nobody ever sees half of one. A lock file beside it lets one process build while others wait; the kernel takes the
lock back from a builder that is killed, and the next in line begins anew.
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

Entry = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Arrays by name, and notes that go into JSON."""

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


def cached(name: str, build: Callable[[], Entry], folder: str | Path = "") -> Entry:
    """The entry `name`, read-only and mapped into memory; `build` makes it where it is not there or damaged.

    Any number of processes may ask at once: one builds. On file systems without locks several may build, and the
    first to finish counts.

    Args:
        folder: of the cache; empty takes `default_folder()`.

    Raises:
        ValueError: the cache's folder cannot be written.
    """
    cache = Path(folder) if folder else default_folder()
    place = cache / name
    if (found := _read(place)) is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{name}.lock"):
            if (found := _read(place)) is not None:
                return found
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
    if found is None:
        raise ValueError(f"the cache {cache} loses what is written to it: name another folder with HETERO_KT_CACHE")
    return found


def _write(place: Path, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
    part = place.with_name(f"{place.name}.part{os.getpid()}")
    part.mkdir()
    for name, array in arrays.items():
        np.save(part / f"{name}.npy", array, allow_pickle=False)
    (part / "notes.json").write_text(json.dumps({"arrays": sorted(arrays), "notes": notes}))
    try:
        os.rename(part, place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(part)  # no locks here, and another was faster


def _read(place: Path) -> Entry | None:
    if not place.is_dir():
        return None
    try:
        content = json.loads((place / "notes.json").read_text())
        names = content["arrays"]
        return {name: _mapped(place / f"{name}.npy") for name in names}, content["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(file: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    mode: Any = "r" if file.stat().st_size > 256 else None
    return np.load(file, mmap_mode=mode, allow_pickle=False)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Inside, no other process is. The lock file stays: removing it would let two in."""
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
