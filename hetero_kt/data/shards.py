"""Pictures in webdataset shards (tar files), read in any order through an index.

<folder>/
    train-000000.tar ...    entries KEY.cls (the label in decimal) and KEY.jpg, .png or .webp
    index.npy               where each picture lies: `TABLE`
    names.json              of unlabelled pictures (then without .cls entries): the file that each row was made of
    index.json              classes, shards with sizes and checksums; written last, it marks a complete folder

webdataset itself reads such shards from front to back; with the index a picture is one read at an offset, so that
the order can be drawn anew every epoch over all of them and the position in it is a number. Shards come from a
folder on this machine alone: nothing is fetched, and no command is run. From a shard, only the pictures that the
index names are decoded, as JPEG, PNG or WebP; labels are in the index, and any other entry is never looked at.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hetero_kt import files
from hetero_kt.data.pictures import MOST_BYTES, Damaged, decoded
from hetero_kt.messages import first_line

FORMAT = 1
INDEX, ROWS, NAMES = "index.json", "index.npy", "names.json"
TABLE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("label", "<u4"), ("crc32", "<u4")])
"""A row per sample, in the order in which they lie in the shards: the shard's number, where the picture's bytes begin
in it, how many they are, the class, and their checksum."""

_OPEN_FILES = 64
_MOST_INDEX, _MOST_NAMES = 2**28, 2**31  # bytes
_Kind = TypeVar("_Kind")
_WORDS = {str: "text", int: "whole number", list: "list", dict: "mapping"}
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")


def local(place: str | Path, option: str) -> Path:
    """A path on this machine.

    Raises:
        ValueError: a `pipe:` command, or an address.
    """
    if _REMOTE.match(str(place)):
        raise ValueError(f"{option} {place}: shards are read from and written to folders of this machine: name one.")
    return Path(place)


class Index:
    """What a folder of shards holds, without opening one."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ValueError: there is no index, it is damaged, or it names other files than shards beside it.
        """
        self.folder = folder
        try:
            content = files.read_regular(folder / INDEX, _MOST_INDEX)
        except OSError as error:
            raise ValueError(
                f"{folder} holds no {INDEX} ({first_line(error)}): let hetero-kt shards write (or finish) it, or name "
                "another folder with --data-dir and --data.NAME.folder."
            ) from error
        try:
            index = json.loads(content)
            if index["format"] != FORMAT:
                raise ValueError(f"it is of format {index['format']!r:.40}")
            self.checksum = zlib.crc32(content)
            self.classes: list[str] = [_typed(name, str) for name in _typed(index["classes"], list)]
            self.shards: list[dict[str, Any]] = [_typed(shard, dict) for shard in _typed(index["shards"], list)]
            self.origin: str = _typed(index["origin"], str)
            self._names: int | None = index.get("names")
            for shard in self.shards:
                name, size = _typed(shard["name"], str), _typed(shard["bytes"], int)
                if _SHARD_NAME.fullmatch(name) is None:
                    raise ValueError(f"it names {name!r:.60}, which is no shard beside it")
                if not 0 <= size < 2**63 or not 0 <= _typed(shard.get("samples", 0), int) < 2**32:
                    raise ValueError(f"{name} cannot be as large as it says")
            if len({shard["name"] for shard in self.shards}) < len(self.shards):
                raise ValueError("it names a shard twice")
            self._check_table(_typed(index["rows"], dict))
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
            raise ValueError(
                f"{folder / INDEX} cannot be used ({reason}): let hetero-kt shards write it again."
            ) from error

    def table(self) -> np.ndarray:
        """Of type TABLE; it stays in its file until it is read."""
        files.open_regular(self.folder / ROWS).close()
        return np.load(self.folder / ROWS, mmap_mode="r", allow_pickle=False)

    def names(self) -> list[str]:
        """Of shards of unlabelled pictures, the file that each row was made of, by its path in their folder.

        Raises:
            ValueError: these are shards of classes, or the list of names is missing or damaged.
        """
        if self._names is None:
            raise ValueError(f"{self.folder} holds labelled pictures without names: write shards of one plain folder")
        try:
            content = files.read_regular(self.folder / NAMES, _MOST_NAMES)
            if zlib.crc32(content) != self._names:
                raise ValueError("it is another one")
            names = [_typed(name, str) for name in _typed(json.loads(content), list)]
            if len(names) != len(self.table()):
                raise ValueError("it has more names or fewer than there are rows")
            return names
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{self.folder / NAMES} cannot be used ({first_line(error)}): let hetero-kt shards write it again."
            ) from error

    def _check_table(self, stated: dict[str, Any]) -> None:
        table, sizes = self.table(), np.array([shard["bytes"] for shard in self.shards], np.uint64)
        if table.dtype != TABLE or table.ndim != 1 or len(table) != stated["count"]:
            raise ValueError(f"{ROWS} beside it is another one")
        if zlib.crc32(table.data) != stated["crc32"]:
            raise ValueError(f"{ROWS} beside it is another one")
        if not len(table):
            return
        if table["shard"].max() >= len(sizes) or table["label"].max() >= len(self.classes):
            raise ValueError(f"{ROWS} beside it has numbers of shards or classes that do not exist")
        if table["length"].max() > MOST_BYTES:
            raise ValueError(f"{ROWS} beside it has a picture of more than {MOST_BYTES:,} bytes")
        room, lengths = sizes[table["shard"]], table["length"].astype(np.uint64)
        if (lengths > room).any() or (table["offset"] > room - lengths).any():  # a sum might pass 2**64
            raise ValueError(f"{ROWS} beside it points behind a shard's end")


def _typed(value: Any, kind: type[_Kind]) -> _Kind:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.40} is no {_WORDS[kind]}")
    return value


def write_stand_in(folder: Path, classes: int, samples: int) -> None:
    """An index of shards that are not there, for whoever asks about their numbers alone."""
    folder.mkdir(parents=True)
    table = np.zeros(samples, TABLE)
    np.save(folder / ROWS, table, allow_pickle=False)
    index = {
        "format": FORMAT,
        "origin": "",
        "classes": [str(number) for number in range(classes)],
        "rows": {"count": samples, "crc32": zlib.crc32(table.data)},
        "shards": [{"name": "train-000000.tar", "samples": samples, "bytes": 0}],
    }
    (folder / INDEX).write_text(json.dumps(index))


class Shards:
    """The pictures of a folder of shards as a `pictures.Source`.

    Which samples there are is decided at opening by the files alone (the index, and which shards are there in full),
    so that all ranks that see the same files agree.
    """

    def __init__(
        self,
        index: Index,
        choose: Callable[[np.ndarray, int], np.ndarray],
        corrupt: Literal["skip", "stop"] = "skip",
    ) -> None:
        """`choose(labels, classes)` gives the rows of the index to use, out of all: what a subset or a held-out part
        is does not change when a shard is missing.

        Raises:
            ValueError: a missing or torn shard, where those are to end the run, or no shard left.
        """
        table = index.table()
        self.name, self.classes = str(index.folder), len(index.classes)
        self.mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
        self.std: tuple[float, ...] = IMAGENET_DEFAULT_STD
        self._index, self._notices = index, list[str]()
        rows = choose(table["label"].astype(np.int64), self.classes)
        torn = {number: reason for number in range(len(index.shards)) if (reason := self._torn(number))}
        for number, reason in torn.items():
            lost = int((table["shard"][rows] == number).sum())
            if corrupt == "stop":
                raise ValueError(
                    f"{self._path(number)} {reason}: let hetero-kt shards write it again, or go on without its "
                    f"{lost} samples with corrupt skip."
                )
            self._notices.append(f"{self._path(number)} {reason}: its {lost} samples are left out.")
        self.rows = rows[~np.isin(table["shard"][rows], list(torn))]
        """Of the index, by sample."""
        if not len(self.rows):
            raise ValueError(f"{self.name} has no sample left ({len(torn)} of {len(index.shards)} shards are damaged).")
        self._begin()

    def picture(self, sample: int) -> Image.Image:
        """One picture in RGB. Raises Damaged."""
        return decoded(self.content(sample), self._at(sample))

    def content(self, sample: int) -> bytes:
        """One picture as it was encoded. Raises Damaged."""
        where = self._table[self.rows[sample]]
        try:
            content = os.pread(self._file(int(where["shard"])).fileno(), int(where["length"]), int(where["offset"]))
        except OSError as error:
            raise Damaged(f"{self._at(sample)} cannot be read ({error.strerror})") from error
        if zlib.crc32(content) != where["crc32"]:
            raise Damaged(f"{self._at(sample)} does not match its checksum")
        return content

    def place(self, sample: int) -> str:
        """The shard that holds the sample."""
        return str(self._path(int(self._table[self.rows[sample]]["shard"])))

    def fingerprint(self) -> dict[str, Any]:
        """How many samples, and checksums of the index (which has those of every picture) and of the rows in use."""
        return {
            "samples": len(self.rows),
            "index": self._index.checksum,
            "rows": zlib.crc32(self.rows.tobytes()),
        }

    def notices(self) -> list[str]:
        """Shards that were left out at opening."""
        return list(self._notices)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: it opens files of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_table", "_file", "labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def _begin(self) -> None:
        self._table = self._index.table()
        self._file = lru_cache(_OPEN_FILES)(self._open)
        self.labels = self._table["label"][self.rows].astype(np.int64)

    def _open(self, number: int) -> BinaryIO:
        return files.open_regular(self._path(number))

    def _path(self, number: int) -> Path:
        return self._index.folder / str(self._index.shards[number]["name"])

    def _torn(self, number: int) -> str:
        """Why a shard is not there in full; empty if it is. Cheap: contents are checked picture by picture."""
        try:
            found = self._path(number).stat()
        except OSError as error:
            return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        if not stat.S_ISREG(found.st_mode):
            return "is no regular file"
        size = found.st_size
        stated = int(self._index.shards[number]["bytes"])
        return "" if size == stated else f"has {size:,} bytes instead of {stated:,}"

    def _at(self, sample: int) -> str:
        return f"the picture at byte {self._table[self.rows[sample]]['offset']}"
