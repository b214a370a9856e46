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
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hetero_kt.data.pictures import Damaged, decoded

FORMAT = 1
INDEX, ROWS, NAMES = "index.json", "index.npy", "names.json"
TABLE = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("label", "<u4"), ("crc32", "<u4")])
"""A row per sample, in the order in which they lie in the shards: the shard's number, where the picture's bytes begin
in it, how many they are, the class, and their checksum."""

_OPEN_FILES = 64
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
            content = (folder / INDEX).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{folder} holds no {INDEX} ({error.strerror}): let hetero-kt shards write (or finish) it, or name "
                "another folder with --data-dir and --data.NAME.folder."
            ) from error
        try:
            index = json.loads(content)
            if index["format"] != FORMAT:
                raise ValueError(f"it is of format {index['format']}")
            self.checksum = zlib.crc32(content)
            self.classes: list[str] = [str(name) for name in index["classes"]]
            self.shards: list[dict[str, Any]] = index["shards"]
            self.origin: str = index["origin"]
            self._names: int | None = index.get("names")
            names, sizes = [str(s["name"]) for s in self.shards], [int(s["bytes"]) for s in self.shards]
            if any(_SHARD_NAME.fullmatch(name) is None for name in names):
                odd = next(name for name in names if _SHARD_NAME.fullmatch(name) is None)
                raise ValueError(f"it names {odd!r}, which is no shard beside it")
            self._check_table(index["rows"], sizes)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{folder / INDEX} cannot be used ({reason}): let hetero-kt shards write it again."
            ) from error

    def table(self) -> np.ndarray:
        """Of type TABLE; it stays in its file until it is read."""
        return np.load(self.folder / ROWS, mmap_mode="r", allow_pickle=False)

    def names(self) -> list[str]:
        """Of shards of unlabelled pictures, the file that each row was made of, by its path in their folder.

        Raises:
            ValueError: these are shards of classes, or the list of names is missing or damaged.
        """
        if self._names is None:
            raise ValueError(f"{self.folder} holds labelled pictures without names: write shards of one plain folder")
        try:
            content = (self.folder / NAMES).read_bytes()
        except OSError as error:
            raise ValueError(
                f"{self.folder / NAMES} cannot be read ({error.strerror}): let hetero-kt shards write it again."
            ) from error
        if zlib.crc32(content) != self._names:
            raise ValueError(f"{self.folder / NAMES} is another one: let hetero-kt shards write it again.")
        names: list[str] = json.loads(content)
        return names

    def _check_table(self, stated: dict[str, int], sizes: list[int]) -> None:
        table = self.table()
        if table.dtype != TABLE or zlib.crc32(table.data) != stated["crc32"] or len(table) != stated["count"]:
            raise ValueError(f"{ROWS} beside it is another one")
        if len(table) and (table["shard"].max() >= len(sizes) or table["label"].max() >= len(self.classes)):
            raise ValueError(f"{ROWS} beside it has numbers of shards or classes that do not exist")
        if (table["offset"] + table["length"] > np.array(sizes, np.uint64)[table["shard"]]).any():
            raise ValueError(f"{ROWS} beside it points behind a shard's end")


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
        return self._path(number).open("rb", buffering=0)

    def _path(self, number: int) -> Path:
        return self._index.folder / str(self._index.shards[number]["name"])

    def _torn(self, number: int) -> str:
        """Why a shard is not there in full; empty if it is. Cheap: contents are checked picture by picture."""
        try:
            size = self._path(number).stat().st_size
        except OSError as error:
            return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        stated = int(self._index.shards[number]["bytes"])
        return "" if size == stated else f"has {size:,} bytes instead of {stated:,}"

    def _at(self, sample: int) -> str:
        return f"the picture at byte {self._table[self.rows[sample]]['offset']}"
