"""Where pictures lie that texts speak of, and which of them a run uses.

A picture has a key: its path below a folder, or its number in a Parquet file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hetero_kt import files
from hetero_kt.data import cache, counter, parquet
from hetero_kt.data.pictures import MOST_BYTES, Damaged, decoded
from hetero_kt.data.shards import INDEX, Index, Shards
from hetero_kt.messages import first_line

NAMED = 5  # examples that a notice gives
_FORMAT = 1  # of the cache
_VALIDATION, _FRACTION = (counter.key(7, part) for part in (0, 1))


class Gallery(Protocol):
    """Pictures by key, readable from any process."""

    def __contains__(self, key: str) -> bool: ...

    def picture(self, key: str) -> Image.Image:
        """One picture in RGB. Raises Damaged."""

    def place(self, key: str) -> str:
        """What holds the picture, as messages name it."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells these pictures from others."""

    def notices(self) -> list[str]:
        """What was left out when they were opened."""


class Folders:
    """Pictures in files below a folder. Where a folder in their paths is one of shards, they are read from those."""

    def __init__(self, root: Path, keys: Iterable[str], corrupt: Literal["skip", "stop"] = "skip") -> None:
        """`keys` are paths below `root`; the folders in them are listed once.

        Raises:
            ValueError: a key that is no path below `root`, or shards that cannot be used.
        """
        self._root = root
        self._names: dict[str, frozenset[str]] = {}
        self._shards: dict[str, tuple[Shards, dict[str, int]]] = {}
        for key in keys:
            folder = _folder(key)
            if folder in self._names:
                continue
            path = PurePosixPath(key)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{key} is no picture below {root}: name pictures by their paths below it")
            place = root / folder
            if (place / INDEX).is_file():
                index = Index(place)
                names = index.names()
                shards = Shards(index, lambda labels, classes: np.arange(len(labels)), corrupt)
                samples = {names[row]: sample for sample, row in enumerate(shards.rows.tolist())}
                self._shards[folder] = shards, samples
                self._names[folder] = frozenset(samples)
            else:
                self._names[folder] = frozenset(os.listdir(place)) if place.is_dir() else frozenset()

    def __contains__(self, key: str) -> bool:
        return key.rpartition("/")[2] in self._names.get(_folder(key), ())

    def picture(self, key: str) -> Image.Image:
        """One picture in RGB. Raises Damaged."""
        folder, name = _folder(key), key.rpartition("/")[2]
        if folder in self._shards:
            shards, samples = self._shards[folder]
            return shards.picture(samples[name])
        try:
            content = files.read_regular(self._root / key, MOST_BYTES)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error
        return decoded(content, name)

    def place(self, key: str) -> str:
        """The shard or folder that holds the picture."""
        folder = _folder(key)
        if folder in self._shards:
            shards, samples = self._shards[folder]
            return shards.place(samples[key.rpartition("/")[2]])
        return str(self._root / folder)

    def fingerprint(self) -> dict[str, Any]:
        """Checksums of the shards' indexes. Files are known by their names alone, which the texts' checksum has."""
        return {folder: shards.fingerprint() for folder, (shards, _) in self._shards.items()}

    def notices(self) -> list[str]:
        """Shards that were left out."""
        return [notice for shards, _ in self._shards.values() for notice in shards.notices()]


def _folder(key: str) -> str:
    return key.rpartition("/")[0]


class Tables:
    """Pictures in the column `image` of Parquet files.

    Their bytes are laid out one after the other in the cache, once per machine, and mapped from there: whatever ranks
    and workers there are, they are in memory once.
    """

    def __init__(self, of_rows: Sequence[Path], keys: Sequence[str]) -> None:
        """`keys` of the rows of all files, in order.

        Raises:
            ValueError: a file that cannot be read or holds no pictures, or a key that stands twice.
        """
        self._files, self._rows = list(of_rows), {key: row for row, key in enumerate(keys)}
        if len(self._rows) < len(keys):
            twice = next(key for row, key in enumerate(keys) if self._rows[key] != row)
            raise ValueError(f"{self._files[0].parent}: picture {twice} stands in two rows: remove one of them")
        try:
            self._counts = [parquet.open_parquet(file).metadata.num_rows for file in self._files]
        except OSError as error:
            raise _unreadable(Path(error.filename), error) from error
        self._name = cache.key("pictures", _FORMAT, *(_sha256(file) for file in self._files))
        self._open(verified=False)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def picture(self, key: str) -> Image.Image:
        """One picture in RGB. Raises Damaged."""
        row = self._rows[key]
        return decoded(self._bytes[self._bounds[row] : self._bounds[row + 1]].tobytes(), f"picture {key}")

    def place(self, key: str) -> str:
        """The file that holds the picture."""
        return str(self._files[int(np.searchsorted(np.cumsum(self._counts), self._rows[key], side="right"))])

    def fingerprint(self) -> dict[str, Any]:
        """A checksum of the files."""
        return {"files": self._name}

    def notices(self) -> list[str]:
        """Nothing is left out."""
        return []

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: it maps the bytes itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_bytes", "_bounds")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open(verified=True)

    def _open(self, *, verified: bool) -> None:
        arrays, _ = cache.cached(self._name, self._lay_out, verified=verified)
        self._bytes, self._bounds = arrays["bytes"], arrays["bounds"]

    def _lay_out(self) -> cache.Entry:
        pieces = [np.zeros(0, np.uint8)]
        for file in self._files:
            _demand(file, ["image"])
            with laid_out(file, "pictures with texts"):
                try:
                    opened = parquet.open_parquet(file)
                    for group in range(opened.metadata.num_row_groups):
                        for batch in parquet.iterate(file, opened, group, ["image"]):
                            contents = batch.column(0).field("bytes")
                            pieces += [np.frombuffer(content.as_py() or b"", np.uint8) for content in contents]
                except OSError as error:  # or it would be taken for the cache's
                    raise _unreadable(file, error) from error
        bounds = np.cumsum([len(piece) for piece in pieces])
        return {"bytes": np.concatenate(pieces), "bounds": bounds}, {}


# --- annotations ---

Stamped = tuple[Path, int, int]
"""A file, its size and when it was written: what is read of it is good until it changes."""


def stamped(file: Path) -> Stamped:
    """Raises ValueError where there is no such file."""
    try:
        found = file.stat()
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): put it beside the others of its set") from error
    return file, found.st_size, found.st_mtime_ns


def tables(folder: Path, *, train: bool) -> list[Path]:
    """The Parquet files of a set's training part, or of its test part, or where there is none, of its validation."""
    for part in ("train",) if train else ("test", "val"):
        if files := sorted(folder.glob(f"{part}*.parquet")):
            return files
    return []


def schema(file: Path) -> list[str]:
    """Names of a Parquet file's columns. Raises ValueError where it cannot be read."""
    try:
        return list(parquet.open_parquet(file).schema_arrow.names)
    except OSError as error:
        raise _unreadable(file, error) from error


def columns(file: Path, names: Sequence[str]) -> pa.Table:
    """These columns of a Parquet file.

    Raises:
        ValueError: it cannot be read, or has other columns.
    """
    _demand(file, names)
    try:
        return parquet.read_columns(file, list(names))
    except OSError as error:
        raise _unreadable(file, error) from error


def _demand(file: Path, names: Sequence[str]) -> None:
    there = schema(file)
    for name in names:
        if name not in there:
            raise ValueError(
                f"{file} has no column {name} (it has {', '.join(there)}): name another folder with --data.NAME.folder"
            )


def read_json(file: Path) -> Any:
    """What a JSON file holds. Raises ValueError where it cannot be read."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _unreadable(file, error) from error


@contextmanager
def laid_out(file: Path, what: str) -> Iterator[None]:
    """What goes wrong inside for want of a field is a ValueError that names the file."""
    try:
        yield
    except _Unreadable:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(
            f"{file} is not laid out as {what} ({reason}): fetch it again, or name another folder with"
            f" --data.NAME.folder"
        ) from error


def stripped(value: Any) -> str:
    """A text without spaces around it. Raises TypeError for what is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value.strip()


class _Unreadable(ValueError):
    """A file that is no JSON or Parquet at all."""


def _unreadable(file: Path, error: Exception) -> ValueError:
    return _Unreadable(
        f"{file} cannot be read ({first_line(error)}): fetch it again, or name another folder with --data.NAME.folder"
    )


# --- which pictures ---


def kept(keys: Iterable[str], validation: float, fraction: float, *, train: bool) -> set[str]:
    """The training pictures that a run trains on, or (not `train`) those held out of them to evaluate on.

    `validation` is the fraction held out, `fraction` the share kept of the rest. Pictures are drawn by their keys,
    the same ones in every run, and a larger share holds every smaller one.

    Raises:
        ValueError: nothing is left.
    """
    everything = sorted(set(keys))
    order = counter.permutation(_VALIDATION, len(everything)).tolist()
    held = round(validation * len(everything))
    if not train:
        chosen = order[:held]
    else:
        rest = sorted(order[held:])
        chosen = [rest[k] for k in counter.permutation(_FRACTION, len(rest))[: round(fraction * len(rest))].tolist()]
    if not chosen:
        raise ValueError(
            f"validation {validation} and fraction {fraction} of {len(everything)} pictures leave none to"
            f" {'train' if train else 'evaluate'} on: use others"
        )
    return {everything[number] for number in chosen}


def without_missing(
    keys: Sequence[str], gallery: Gallery, place: Path | str, corrupt: Literal["skip", "stop"]
) -> tuple[set[str], list[str]]:
    """Those of the keys that have a picture, and a sentence about the others, if there are any.

    Raises:
        ValueError: pictures are missing, and that is to end the run; or there are none.
    """
    there = {key for key in keys if key in gallery}
    missing = [key for key in dict.fromkeys(keys) if key not in there]
    if not missing:
        return there, []
    found = f"{place} lacks {counted(len(missing), 'picture')} that its annotations name ({examples(missing)})"
    if corrupt == "stop" or not there:
        raise ValueError(f"{found}: fetch them, or go on without some of them with corrupt skip")
    return there, [f"{found}: they are left out."]


def counted(number: int, what: str) -> str:
    """`1 picture`, `2 pictures`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def examples(names: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


class Shown:
    """Samples that each show a picture of a gallery, as a `pictures.Source`; their labels are their numbers."""

    mean: tuple[float, ...] = OPENAI_CLIP_MEAN
    std: tuple[float, ...] = OPENAI_CLIP_STD

    def __init__(self, name: str, gallery: Gallery, keys: Sequence[str], classes: int = 0, black: int = 0) -> None:
        """`keys` of the samples' pictures. With `black`, all of these are black squares of so many pixels a side, and
        the gallery's are not read, so that none is found damaged."""
        self.name, self.classes = name, classes
        self.labels = np.arange(len(keys))
        self._gallery, self._keys, self._black = gallery, list(keys), black

    def picture(self, sample: int) -> Image.Image:
        """One picture in RGB. Raises Damaged."""
        if self._black:
            return Image.new("RGB", (self._black, self._black))
        return self._gallery.picture(self._keys[sample])

    def place(self, sample: int) -> str:
        return self._gallery.place(self._keys[sample])

    def fingerprint(self) -> dict[str, Any]:
        """Of the pictures, and which of them the samples show."""
        found = {**self._gallery.fingerprint(), "keys": cache.key("\n".join(self._keys))}
        return found | {"black": True} if self._black else found

    def notices(self) -> list[str]:
        return self._gallery.notices()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
