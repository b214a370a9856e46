"""A look at the headers of tars that were written for webdataset: where each picture lies, and its label beside it.

Labels are in KEY.cls, KEY.txt or a field of KEY.json. What makes a tar unfit shows here, before a run starts, and what
was found is kept in the cache. Nothing is fetched, executed or unpickled: a tar is a regular file of this machine, and
of its entries only labels are read.
"""

from __future__ import annotations

import io
import math
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from hetero_kt.data import cache
from hetero_kt.data.pictures import MOST_BYTES
from hetero_kt.data.shards import local
from hetero_kt.documents import parse_json
from hetero_kt.files import open_regular
from hetero_kt.messages import printable, shown

FORMAT = 1
PICTURES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512
"""tar's unit, in bytes."""
TOLD = 8
"""Faults that one message names."""
ROWS = np.dtype(
    [("tar", "<u4"), ("entry", "<u8"), ("offset", "<u8"), ("bytes", "<u8"), ("value", "<u4"), ("key", "<u4")]
)
"""A row per picture, in the order in which they lie in the tars: the tar's number, where the picture's header and its
bytes begin in it, how many they are, its label's number among all different ones, and the checksum of its name."""

_META = re.compile(r"__[^/]*__($|/)")  # what webdataset passes over
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)[.}]")
_MOST_TARS = 1_000_000
_LABEL_BYTES = 2**20
_LABEL_LENGTH = 1_000  # characters of a class's name
_FEW = 16  # tars that are looked at without further processes
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


def listed(pattern: str, folder: str, option: str) -> list[Path]:
    """The tars that a pattern as webdataset writes it stands for (`{0000..1023}`, `{a,b}`, lists by `::`), below
    `folder` where they are no absolute paths.

    Raises:
        ValueError: an address or a command, braces that cannot be read, or a tar that is named twice.
    """
    from webdataset.shardlists import expand_urls

    for part in pattern.split("::"):
        local(part, option)
        if math.prod(1 + abs(int(last) - int(first)) for first, last in _RANGE.findall(part)) > _MOST_TARS:
            raise ValueError(f"{option} {pattern} names more than {_MOST_TARS:,} tars: write a smaller range.")
    try:
        names = expand_urls(pattern)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"{option} {pattern} cannot be read ({error or 'braces'}): write it like train-{{0000..1023}}.tar."
        ) from error
    paths = [Path(folder).absolute() / local(name, option) for name in names]
    twice = [path for path, times in Counter(paths).items() if times > 1]
    if twice:
        raise ValueError(f"{option} {pattern} names {twice[0]} more than once: leave out the others.")
    return paths


class _Identity(NamedTuple):
    """What tells a tar from another one without reading it."""

    path: str
    bytes: int
    changed: int


@dataclass(frozen=True)
class Census:
    """What a list of tars holds: `entry` names it in the cache."""

    entry: str
    paths: list[str]
    sizes: list[int]
    values: list[str]
    """All different labels, as they are written."""
    torn: dict[int, str]
    """Tars that are not whole, by number, and why."""

    def table(self) -> np.ndarray:
        """Of type ROWS; it stays in its file until it is read.

        Raises:
            ValueError: it has gone from the cache since it was made.
        """

        def gone() -> cache.Entry:
            raise ValueError(f"{self.entry} has gone from the cache {cache.default_folder()}: start again.")

        return cache.cached(self.entry, gone)[0]["rows"]


def counted(pattern: str, label: str, folder: str, option: str) -> Census:
    """Look at the headers of the tars of `pattern`, or at what the cache knows of them.

    Raises:
        ValueError: tars that are missing or none, or pictures without labels: one sentence that names all of them.
    """
    paths = listed(pattern, folder, option)
    identities, faults = [], []
    for path in paths:
        try:
            with open_regular(path) as stream:
                stat = os.fstat(stream.fileno())
            identities.append(_Identity(str(path), stat.st_size, stat.st_mtime_ns))
        except OSError as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be used ({error.strerror})"
            if path.is_dir():
                reason = "is a folder: name the tars in it"
            faults.append(f"{path} {reason}")
    _refuse(faults, len(faults), len(paths), option)
    kind = label or _kind(paths[0])
    name = f"tars-{cache.key(FORMAT, kind, identities)}"
    _, notes = cache.cached(name, lambda: _look(identities, kind, option))
    torn = {int(number): reason for number, reason in notes["torn"].items()}
    return Census(name, [i.path for i in identities], [i.bytes for i in identities], notes["values"], torn)


def _refuse(faults: Sequence[str], of: int, tars: int, option: str) -> None:
    if faults:
        more = f"; and {len(faults) - TOLD:,} more" if len(faults) > TOLD else ""
        raise ValueError(f"{option}: {of:,} of {tars:,} tars do not fit: {'; '.join(faults[:TOLD])}{more}.")


def _look(identities: Sequence[_Identity], kind: str, option: str) -> cache.Entry:
    import multiprocessing

    from rich.progress import Progress

    from hetero_kt.data.inputs import Run

    jobs = [(tar.path, kind) for tar in identities]
    alone = len(jobs) < _FEW or multiprocessing.current_process().daemon
    cores = len(os.sched_getaffinity(0))
    if not alone:
        print(f"{option}: looking at the headers of {len(jobs):,} tars, once, with {cores} processes", flush=True)
    seen = Run(1 if alone else cores, Progress(disable=True)).over("", _scan, jobs)
    faulty = [one.faults for one in seen if one.faults]
    _refuse([fault for faults in faulty for fault in faults], len(faulty), len(jobs), option)
    values: dict[str, int] = {}
    for number, one in enumerate(seen):
        one.rows["tar"] = number
        numbers = np.array([values.setdefault(value, len(values)) for value in one.values], np.uint32)
        one.rows["value"] = numbers[one.rows["value"]]
    torn = {number: one.torn for number, one in enumerate(seen) if one.torn}
    return {"rows": np.concatenate([one.rows for one in seen])}, {"values": list(values), "torn": torn}


# --- one tar ---


@dataclass
class _Seen:
    """What a look at one tar has found."""

    rows: np.ndarray
    values: list[str]
    faults: list[str]
    torn: str


class _Entry(NamedTuple):
    header: int
    offset: int
    bytes: int


@dataclass
class _Groups:
    """Entries of one tar, gathered by key as webdataset does: those of a key lie next to each other."""

    path: str
    kind: str
    descriptor: int
    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    values: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    """By what is wrong, sentences: the first one is told, the others are counted."""
    key: str = ""
    now: dict[str, _Entry] = field(default_factory=dict)

    def add(self, key: str, suffix: str, entry: _Entry) -> None:
        if key != self.key:
            self.close()
            self.key = key
        if suffix in self.now:
            self._complain("twice", f"{key}.{suffix} is there twice: leave one of them")
        self.now[suffix] = entry

    def close(self) -> None:
        """What was gathered is a sample, or wrong, or neither of a picture nor of a label."""
        now, self.now = self.now, {}
        pictures = [suffix for suffix in now if suffix in PICTURES]
        suffix, _, wanted = self.kind.partition(":")
        if not pictures and suffix not in now:
            return
        if not pictures:
            self._complain(
                "alone", f"{self.key}.{suffix} has no picture beside it: the entries of a key must lie together"
            )
        elif len(pictures) > 1:
            self._complain("two", f"{self.key} has two pictures, .{pictures[0]} and .{pictures[1]}: leave one of them")
        elif suffix not in now:
            others = ", ".join(sorted(f".{one}" for one in now if one not in PICTURES))
            beside = f"only {others}" if others else "nothing"
            self._complain(
                "unlabelled",
                f"{self.key}.{pictures[0]} has no label (.{suffix}), and {beside} beside it: say where labels are with "
                "--data.NAME.label cls, txt or json:FIELD",
            )
        elif now[pictures[0]].bytes > MOST_BYTES:
            too_many = f"{now[pictures[0]].bytes:,} bytes, more than {MOST_BYTES:,}"
            self._complain("large", f"{self.key}.{pictures[0]} has {too_many}: leave it out")
        else:
            try:
                value = self._label(now[suffix], wanted)
            except ValueError as error:
                self._complain("label", f"{self.key}.{suffix} {error}")
                return
            header, offset, size = now[pictures[0]]
            key = checksum(self.key, pictures[0])
            self.rows.append((0, header, offset, size, self.values.setdefault(value, len(self.values)), key))

    def _label(self, entry: _Entry, wanted: str) -> str:
        """Raises ValueError for a label that is none, worded to follow its name."""
        if entry.bytes > _LABEL_BYTES:
            raise ValueError(f"has {entry.bytes:,} bytes, no label: name another entry with --data.NAME.label")
        content = os.pread(self.descriptor, entry.bytes, entry.offset)
        if wanted:
            try:
                fields = parse_json(content)
            except ValueError as error:
                raise ValueError(f"cannot be read ({error}): write the tar again") from error
            if not isinstance(fields, dict) or wanted not in fields:
                has = f"but {', '.join(list(fields)[:5])}" if isinstance(fields, dict) and fields else "nor others"
                raise ValueError(f"has no field {wanted}, {has}: name it with --data.NAME.label json:FIELD")
            value = fields[wanted]
        else:
            try:
                value = content.decode()
            except UnicodeDecodeError as error:
                raise ValueError("cannot be read (it is not UTF-8): write the tar again") from error
        if isinstance(value, bool) or not isinstance(value, int | str) or not (said := str(value).strip()):
            raise ValueError(f"says {shown(value)}, which is neither a number nor a name: write the tar again")
        if len(said) > _LABEL_LENGTH:
            raise ValueError(f"says {shown(said)}, a text of {len(said):,} characters: name the label's entry instead")
        return said

    def _complain(self, kind: str, sentence: str) -> None:
        self.wrong.setdefault(kind, []).append(sentence)

    def faults(self) -> list[str]:
        """A sentence for each kind of fault."""
        return [
            f"{self.path}: {printable(told)}" + (f" (and {len(others):,} alike)" if others else "")
            for told, *others in self.wrong.values()
        ]


def _scan(job: tuple[str, str]) -> _Seen:
    """Look at one tar. Runs in any process."""
    path, kind = job
    with open_regular(path) as stream:
        groups, torn, first = _Groups(path, kind, stream.fileno()), "", ""
        size = os.fstat(stream.fileno()).st_size
        if not size:
            return _Seen(np.zeros(0, ROWS), [], [f"{path} is empty: write it again, or leave it out"], "")
        magic = os.pread(stream.fileno(), 8, 0)
        try:
            for name, entry in _entries(stream, size):
                first = first or name
                key, suffix = named(name)
                if key:
                    groups.add(key, suffix, entry)
        except tarfile.TarError as error:
            torn = str(error)
            groups.now = {}  # the last sample may be half of one
        groups.close()
    faults = groups.faults()
    if not groups.rows and not faults:
        if magic.startswith(_COMPRESSED):
            faults = [f"{path} is compressed: unpack it to a plain tar"]
        elif torn:
            faults = [f"{path} is no tar, or damaged ({torn}): write it again"]
        else:
            entries = f"its first entry is {printable(first)}" if first else "it has no entries"
            faults = [f"{path} holds no picture ({entries}): they are called KEY.{', KEY.'.join(PICTURES)}"]
    return _Seen(np.array(groups.rows, ROWS), list(groups.values), faults, torn)


def _entries(stream: BinaryIO, size: int) -> Iterator[tuple[str, _Entry]]:
    """Regular entries of a tar by their headers. Raises TarError, worded to stand in brackets, if it is not whole."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        last, name = -1, ""
        while True:
            try:
                entry = tar.next()
            except tarfile.TarError as error:
                raise tarfile.ReadError(
                    f"it ends, or is damaged, behind {printable(name)}" if name else str(error)
                ) from error
            if entry is None:
                break
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if entry.size < 0 or entry.offset <= last:
                raise tarfile.ReadError(f"damaged at byte {entry.offset:,}")
            last, name = entry.offset, entry.name
            if entry.offset_data + entry.size > size:
                raise tarfile.ReadError(f"it ends within {printable(name)}")
            if entry.isreg() and not entry.issparse() and not _META.match(name):
                yield name, _Entry(entry.offset, entry.offset_data, entry.size)
        end = os.pread(stream.fileno(), BLOCK, tar.offset)
        if len(end) < BLOCK:
            raise tarfile.ReadError("it ends without the closing mark of a tar")
        if any(end):
            raise tarfile.ReadError(f"damaged at byte {tar.offset:,}")


def named(name: str) -> tuple[str, str]:
    """Key and suffix as webdataset takes them from an entry's name; empty where it has none."""
    from webdataset.tariterators import base_plus_ext

    key, suffix = base_plus_ext(name)
    return (key, suffix.lower()) if key else ("", "")


def checksum(key: str, suffix: str) -> int:
    return zlib.crc32(f"{key}.{suffix}".encode(errors="surrogateescape"))


def _kind(path: Path) -> str:
    """Where the first picture of a tar has its label."""
    found: dict[str, set[str]] = {}
    try:
        with open_regular(path) as stream:
            for name, _ in _entries(stream, os.fstat(stream.fileno()).st_size):
                key, suffix = named(name)
                if key not in found and any(set(PICTURES) & suffixes for suffixes in found.values()):
                    break
                found.setdefault(key, set()).add(suffix)
    except (OSError, tarfile.TarError):
        pass  # the look at all of them says so
    suffixes = next((suffixes for suffixes in found.values() if set(PICTURES) & suffixes), set())
    return next((kind for kind in ("cls", "json:label", "txt") if kind.partition(":")[0] in suffixes), "cls")


def header_name(header: bytes) -> str:
    with tarfile.open(fileobj=io.BytesIO(header), mode="r:") as tar:
        entry = tar.next()
    if entry is None:
        raise tarfile.ReadError("it is no header")
    return entry.name


def header_checksum(header: bytes) -> int:
    try:
        return checksum(*named(header_name(header)))
    except tarfile.TarError:
        return -1
