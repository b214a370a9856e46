"""Pictures in tars that were written for webdataset, as they are: KEY.jpg (.jpeg, .png, .webp), its label beside it.

`census` says where each picture lies. In training webdataset reads them from front to back (`tarstream`); evaluation
reads one at a time. Only pictures are read, from regular files of this machine, and decoded as JPEG, PNG or WebP.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hetero_kt.config import Data
from hetero_kt.data.census import (
    BLOCK,
    PICTURES,
    TOLD,
    Census,
    checksum,
    counted,
    header_checksum,
    header_name,
    named,
)
from hetero_kt.data.pictures import Damaged, decoded
from hetero_kt.data.shards import local
from hetero_kt.documents import parse_json, read_bytes
from hetero_kt.files import open_regular
from hetero_kt.messages import printable, shown

_FOLDER, _TEST = "--data.NAME.folder", "--data.NAME.test"
_NUMBER = re.compile(r"[0-9]{1,9}")
_MOST_CLASSES = 1_000_000
_MOST_NAMES = 32_768  # different texts as labels; beyond that they are captions
_OPEN_FILES = 64


# --- classes ---


@dataclass(frozen=True)
class Numbering:
    """Which class a label's text stands for."""

    classes: int
    numbers: dict[str, int] | None
    """By text; None where texts are the numbers themselves."""
    origin: str
    """Where that comes from, as messages say it."""

    def of(self, value: str) -> int:
        """The class, or -1 for a text that stands for none."""
        if self.numbers is not None:
            return self.numbers.get(value, -1)
        return int(value) if _NUMBER.fullmatch(value) and int(value) < self.classes else -1


def numbering(classes: str, values: Sequence[str], folder: str) -> Numbering:
    """How labels become classes: by `classes`, a number of them or a file that numbers their names, else by the
    `values` there are in training: numbers up to the largest, or names in their order.

    Raises:
        ValueError: a file that cannot be used, or values that are no classes.
    """
    option = f"--data.NAME.classes {classes}"
    if _NUMBER.fullmatch(classes):
        if not 0 < int(classes) <= _MOST_CLASSES:
            raise ValueError(f"{option} is out of range: use 1 to {_MOST_CLASSES:,}.")
        return Numbering(int(classes), None, option)
    if classes:
        place = Path(classes) if Path(classes).exists() else Path(folder) / local(classes, "--data.NAME.classes")
        try:
            numbers = _numbers(read_bytes(place).decode())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(
                f"{option} cannot be used ({reason}): give the number of classes, or a file with a name a line, or a "
                "JSON list of names or object of numbers by name."
            ) from error
        return Numbering(1 + max(numbers.values()), numbers, option)
    numeric = [int(value) for value in values if _NUMBER.fullmatch(value)]
    if not values or len(numeric) * 2 > len(values):  # else it says of each that it is no number
        return Numbering(min(1 + max(numeric, default=0), _MOST_CLASSES), None, "the training set")
    if len(values) > _MOST_NAMES:
        raise ValueError(
            f"{_FOLDER}: {len(values):,} different texts as labels, {shown(values[0])} for one, are no classes: name "
            "the entry with labels with --data.NAME.label, or number the names with --data.NAME.classes FILE."
        )
    return Numbering(len(values), {name: number for number, name in enumerate(sorted(values))}, "the training set")


def _numbers(text: str) -> dict[str, int]:
    """Raises ValueError for a text that numbers no names."""
    found: Any = parse_json(text) if text.lstrip()[:1] in ("[", "{") else text.strip().splitlines()
    if isinstance(found, list):
        found = {str(name).strip(): number for number, name in enumerate(found)}
    numbers = {str(name): number for name, number in found.items()}
    if not numbers:
        raise ValueError("it is empty")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MOST_CLASSES:
            raise ValueError(f"{printable(name[:40])} has {shown(number)} for a number")
    return numbers


def census_and_classes(config: Data, folder: str, *, train: bool) -> tuple[Census, Numbering]:
    """What the tars of training, or those of evaluation, hold, and how labels are numbered: by training's.

    Raises:
        ValueError: tars or labels that do not fit.
    """
    of_training = counted(config.folder, config.label, folder, _FOLDER)
    numbers = numbering(config.classes, of_training.values, folder)
    if train or config.validation > 0:
        return of_training, numbers
    return counted(config.test, config.label, folder, _TEST), numbers


# --- the set ---


class Tars:
    """The pictures of tars as a `pictures.Source`."""

    def __init__(
        self, config: Data, folder: str, choose: Callable[[np.ndarray, int], np.ndarray], *, train: bool
    ) -> None:
        """`folder` is where paths begin that are not absolute; `choose` as for `Shards`.

        Raises:
            ValueError: tars that do not fit, labels that are no classes, or a torn tar where those are to end the run.
        """
        self._census, numbers = census_and_classes(config, folder, train=train)
        self.classes = numbers.classes
        self.mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
        self.std: tuple[float, ...] = IMAGENET_DEFAULT_STD
        of_training = train or config.validation > 0
        pattern, option = (config.folder, _FOLDER) if of_training else (config.test, _TEST)
        self.name = pattern if len(pattern) < 80 else f"{pattern[:60]}..."
        self._begin()
        self._check_labels(numbers, option)
        self._notices = [
            f"{self._census.paths[number]} is not whole ({reason}): what comes before is used."
            for number, reason in self._census.torn.items()
        ]
        if self._notices and config.corrupt == "stop":
            number, reason = next(iter(self._census.torn.items()))
            raise ValueError(
                f"{self._census.paths[number]} is not whole ({reason}): write it again, or go on with what comes "
                "before with corrupt skip."
            )
        by_value = np.array([numbers.of(value) for value in self._census.values], np.int64)
        labels = by_value[self._table["value"]]
        self.rows = choose(labels, self.classes)
        """Of the table, by sample, ascending."""
        self.labels = labels[self.rows]
        self.tar = self._table["tar"][self.rows].astype(np.int64)
        """The number of the tar that holds each sample, (S,), ascending."""

    @property
    def tars(self) -> int:
        """How many tars there are."""
        return len(self._census.paths)

    def picture(self, sample: int) -> Image.Image:
        """One picture in RGB. Raises Damaged."""
        content = self.held.get(sample)
        if content is None:
            content = self.content(sample)
        try:
            return decoded(content, "the picture")
        except Damaged as error:
            raise Damaged(f"{self._member(sample)}: {error}") from error

    def content(self, sample: int) -> bytes:
        """One picture as it was encoded. Raises Damaged."""
        where = self._table[self.rows[sample]]
        start, offset, size = int(where["entry"]), int(where["offset"]), int(where["bytes"])
        at = f"the picture at byte {offset}"
        try:
            content = os.pread(self._file(int(where["tar"])).fileno(), offset - start + size, start)
        except OSError as error:
            raise Damaged(f"{at} cannot be read ({error.strerror})") from error
        if len(content) < offset - start + size or header_checksum(content[: offset - start]) != where["key"]:
            raise Damaged(f"{at} is another one than when the headers were looked at")
        return content[offset - start :]

    def place(self, sample: int) -> str:
        """The tar that holds the sample."""
        return self._census.paths[int(self.tar[sample])]

    def fingerprint(self) -> dict[str, Any]:
        """How many samples, and checksums of the tars' names and sizes, of where the pictures lie in them with their
        names and labels, and of the rows in use."""
        names = [Path(path).name for path in self._census.paths]
        values = zlib.crc32(json.dumps(self._census.values).encode())
        return {
            "samples": len(self.rows),
            "tars": zlib.crc32(json.dumps([names, self._census.sizes]).encode()),
            "members": zlib.crc32(np.ascontiguousarray(self._table).data, values),
            "rows": zlib.crc32(self.rows.tobytes(), zlib.crc32(self.labels.tobytes())),
        }

    def notices(self) -> list[str]:
        """Tars that are not whole."""
        return list(self._notices)

    def entries(self, tar: int, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """Pictures from row `first` of the table to row `last` of one tar, read in one go by webdataset, with their
        rows.

        Raises:
            OSError, TarError, ValueError: the tar cannot be read, or is another one by now.
        """
        from webdataset.tariterators import group_by_keys, tar_file_expander

        ends = int(self._table["offset"][last] + self._table["bytes"][last])
        path = self._census.paths[tar]
        with open_regular(path) as stream:
            piece = _Piece(stream, int(self._table["entry"][first]), -(-ends // BLOCK) * BLOCK)
            files = tar_file_expander(
                [{"url": path, "stream": piece}], select_files=lambda name: named(name)[1] in PICTURES
            )
            for row, sample in zip(range(first, last + 1), group_by_keys(files), strict=False):
                suffix = next(suffix for suffix in PICTURES if suffix in sample)
                if checksum(sample["__key__"], suffix) != self._table["key"][row]:
                    raise ValueError(f"{path} is another one than when its headers were looked at")
                yield row, sample[suffix]

    def __getstate__(self) -> dict[str, Any]:
        """For a worker: it opens files of its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_table", "_file", "held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def _begin(self) -> None:
        self._table = self._census.table()
        self._file = lru_cache(_OPEN_FILES)(lambda number: open_regular(self._census.paths[number]))
        self.held: dict[int, bytes] = {}
        """Encoded pictures that were read already, by sample."""

    def _check_labels(self, numbers: Numbering, option: str) -> None:
        faults = []
        for code, value in enumerate(self._census.values):
            if numbers.of(value) < 0:
                row = int(np.flatnonzero(self._table["value"] == code)[0])
                path, name = self._census.paths[int(self._table["tar"][row])], self._name_at(row)
                faults.append(f"{path}: {name} has the label {shown(value)}")
        if faults:
            wants = f"0 to {numbers.classes - 1}" if numbers.numbers is None else f"one of {numbers.classes} names"
            more = f"; and {len(faults) - TOLD:,} more" if len(faults) > TOLD else ""
            raise ValueError(
                f"{option}: labels must be {wants} (by {numbers.origin}): {'; '.join(faults[:TOLD])}{more}: write "
                "them again, or say what there is with --data.NAME.classes NUMBER_OR_FILE."
            )

    def _member(self, sample: int) -> str:
        return self._name_at(int(self.rows[sample]))

    def _name_at(self, row: int) -> str:
        """The picture's name in its tar, as messages give it."""
        where = self._table[row]
        try:
            header = os.pread(
                self._file(int(where["tar"])).fileno(), int(where["offset"] - where["entry"]), int(where["entry"])
            )
            return printable(header_name(header))
        except (OSError, tarfile.TarError):
            return f"the picture at byte {where['offset']}"


class _Piece:
    """Bytes `start` to `end` of a file, read once from front to back."""

    def __init__(self, stream: BinaryIO, start: int, end: int) -> None:
        stream.seek(start)
        self._stream, self._left = stream, end - start

    def read(self, size: int) -> bytes:
        content = self._stream.read(min(size, self._left))
        self._left -= len(content)
        return content
