"""What shards are written from: class folders, a plain folder of pictures, Parquet files."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

from hetero_kt import files
from hetero_kt.data import parquet
from hetero_kt.data.pictures import MOST_BYTES
from hetero_kt.data.shards import local
from hetero_kt.data.workers import context
from hetero_kt.messages import first_line

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "fine_label")

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Run:
    """Processes that share the work, and the bar that shows how far they are."""

    workers: int
    progress: Progress

    def over(self, doing: str, function: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> list[_Result]:
        """Results of `function` for all jobs, in their order, by the run's processes."""
        if not jobs:
            return []
        task = self.progress.add_task(doing, total=len(jobs))
        results = list[_Result]()
        if self.workers == 1 or len(jobs) == 1:
            for job in jobs:
                results.append(function(job))
                self.progress.advance(task)
            return results
        pool = concurrent.futures.ProcessPoolExecutor(min(self.workers, len(jobs)), mp_context=context)
        try:
            for result in pool.map(function, jobs):
                results.append(result)
                self.progress.advance(task)
        except BrokenProcessPool as error:
            raise ValueError(
                "a process was killed: run the same command again, with fewer --workers if memory ran out."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        return results


@dataclass(frozen=True)
class Samples:
    """Where each of a part's encoded pictures lies: `lengths[i]` bytes from `offsets[i]` of file `files[which[i]]`."""

    files: list[str]
    names: list[str]
    """The files as messages name them."""
    which: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    keys: tuple[str, ...] = ()
    """Of files that are known by their names and have no labels, what webdataset calls each."""


@dataclass(frozen=True)
class Contents:
    """What a part's encoded pictures are, in the order of its `Samples`, to compare an earlier run's shards with."""

    lengths: np.ndarray
    labels: np.ndarray
    crc32: np.ndarray


class ClassFolders:
    """A folder of class folders, with pictures at any depth; other files are not looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = _class_folders(folder)
        if not any(self._files.values()):
            raise ValueError(f"{folder} holds no JPEG, PNG or WebP files in class folders: name another input.")

    def classes(self) -> list[str]:
        return list(self._files)

    def samples(self, classes: Sequence[str], scratch: Path, run: Run) -> Samples:
        paths, lengths, labels = self._listed(classes)
        return Samples(paths, paths, np.arange(len(paths)), np.zeros(len(paths), np.int64), lengths, labels)

    def _listed(self, classes: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
        """Paths, lengths and labels."""
        numbers = {name: number for number, name in enumerate(classes)}
        for name in self._files:
            if name not in numbers:
                raise ValueError(f"{self.folder / name} is no class of the training set: move it away or rename it.")
        paths = [file for found in self._files.values() for file, _ in found]
        lengths = np.array([size for found in self._files.values() for _, size in found], np.int64)
        labels = np.repeat([numbers[name] for name in self._files], [len(found) for found in self._files.values()])
        return paths, lengths, labels

    def contents(self, classes: Sequence[str], run: Run) -> Contents:
        paths, lengths, labels = self._listed(classes)
        return Contents(lengths, labels, _checksums(paths, lengths, run))

    def identity(self) -> Iterator[str]:
        for found in self._files.values():
            yield from (f"{os.path.relpath(file, self.folder)} {size}" for file, size in found)


class PlainFolder:
    """A folder with pictures in it; other files, and folders, are not looked at."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist: name a folder of pictures.")
        self._files = sorted(entry.path for entry in _entries(str(folder)) if _is_picture(entry.name))
        if not self._files:
            raise ValueError(f"{folder} holds no JPEG, PNG or WebP files: name another input.")
        self._lengths = np.array([_size(file) for file in self._files], np.int64)

    def classes(self) -> list[str]:
        return [""]

    def samples(self, classes: Sequence[str], scratch: Path, run: Run) -> Samples:
        zeros, keys = np.zeros(len(self._files), np.int64), tuple(_keys([Path(file).stem for file in self._files]))
        return Samples(self._files, self._files, np.arange(len(zeros)), zeros, self._lengths, zeros, keys)

    def contents(self, classes: Sequence[str], run: Run) -> Contents:
        return Contents(
            self._lengths, np.zeros(len(self._files), np.int64), _checksums(self._files, self._lengths, run)
        )

    def identity(self) -> Iterator[str]:
        yield from (f"{os.path.basename(f)} {size}" for f, size in zip(self._files, self._lengths, strict=True))


class ParquetFiles:
    """Parquet files with a column of encoded pictures and one of labels."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        for file in self.files:
            schema = _parquet(file).schema_arrow
            image, label = _column(file, schema.names, _IMAGE_COLUMNS), _column(file, schema.names, _LABEL_COLUMNS)
            kind = schema.field(image).type
            if not (pa.types.is_struct(kind) and _is_binary(kind)):
                raise ValueError(f"{file}: column {image} holds no encoded pictures (a struct with bytes): convert it.")
            if not pa.types.is_integer(schema.field(label).type):
                raise ValueError(f"{file}: column {label} is no integer: number the classes from 0.")

    def classes(self) -> list[str]:
        metadata = _parquet(self.files[0]).schema_arrow.metadata or {}
        try:
            features = json.loads(metadata[b"huggingface"])["info"]["features"]
            named = next(features[name]["names"] for name in _LABEL_COLUMNS if name in features)
            return [str(name) for name in named]
        except (KeyError, TypeError, ValueError, StopIteration):
            return [str(number) for number in range(max(int(_labels(file).max(initial=-1)) for file in self.files) + 1)]

    def samples(self, classes: Sequence[str], scratch: Path, run: Run) -> Samples:
        """A row group is read whole, and rows are wanted in another order: they are copied out once, group by group.
        Copies of an earlier run are not kept, since the file may be another one by now."""
        jobs, labels = self._groups(classes, scratch)
        lengths = [found[0] for found in run.over("copying row groups", _read_group, jobs)]
        if not sum(map(len, lengths)):
            raise ValueError(f"{self.files[0]} has no rows: name another input.")
        starts = [np.cumsum(each) - each for each in lengths]
        which = np.repeat(np.arange(len(jobs)), [len(each) for each in lengths])
        copies = [job.copy for job in jobs]
        names = [f"{job.file} (row group {job.group})" for job in jobs]
        return Samples(copies, names, which, np.concatenate(starts), np.concatenate(lengths), labels)

    def contents(self, classes: Sequence[str], run: Run) -> Contents:
        jobs, labels = self._groups(classes, None)
        found = run.over("comparing the input", _read_group, jobs)
        lengths, crc32 = (np.concatenate([np.zeros(0, np.int64), *(each[k] for each in found)]) for k in range(2))
        return Contents(lengths, labels, crc32)

    def _groups(self, classes: Sequence[str], scratch: Path | None) -> tuple[list[_Group], np.ndarray]:
        """Every row group, and the labels of all rows."""
        jobs, labels = list[_Group](), [np.zeros(0, np.int64)]
        for file in self.files:
            labels.append(_labels(file))
            if len(labels[-1]) and not 0 <= labels[-1].min() <= labels[-1].max() < len(classes):
                raise ValueError(f"{file}: labels are not 0 to {len(classes) - 1}, the training set's: mend them.")
            for group in range(_parquet(file).num_row_groups):
                jobs.append(_Group(str(file), group, str(scratch / f"rows-{len(jobs):06d}.bin") if scratch else ""))
        return jobs, np.concatenate(labels)

    def identity(self) -> Iterator[str]:
        for file in self.files:
            metadata = _parquet(file).metadata
            groups = [metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)]
            yield f"{file.name} {file.stat().st_size} {metadata.num_rows} {groups}"


Input = ClassFolders | PlainFolder | ParquetFiles


def parts_of(source: Path, validation: Sequence[Path]) -> dict[str, Input]:
    """Where the training part of a data set lies, and its validation part if there is one.

    Raises:
        ValueError: no such input, or it holds no pictures.
    """
    for path in (source, *validation):
        if not path.exists():
            raise ValueError(f"{path} does not exist: name a folder of class folders, or Parquet files.")
    held: Sequence[Path] = ()
    if source.is_file():
        train: Input = ParquetFiles([source])
    elif found := sorted(source.glob("*.parquet")):
        held = [file for file in found if file.name.startswith("val")]
        named = [file for file in found if file.name.startswith("train")]
        train = ParquetFiles(named or [file for file in found if file not in held])
    else:
        folders = {entry.name: Path(entry.path) for entry in _entries(str(source)) if _is_folder(entry)}
        train = ClassFolders(folders.get("train", source))
        if "train" in folders:
            held = [folders[name] for name in ("val", "validation") if name in folders][:1]
    held = validation or held
    if not held:
        return {"train": train}
    return {"train": train, "validation": ClassFolders(held[0]) if held[0].is_dir() else ParquetFiles(held)}


def is_plain(source: str) -> bool:
    """Whether pictures lie in the folder itself and none below, so that `write_plain` is meant and not `write`.

    Raises:
        ValueError: they lie in the folder itself and in folders in it.
    """
    folder = local(source, "input")
    entries = _entries(str(folder)) if folder.is_dir() else []
    stray = next((entry.name for entry in entries if _is_picture(entry.name)), None)
    if stray is None:
        return False
    owners: _Owners = dict.fromkeys(map(_identity, _above(folder)), "")
    for entry in entries:
        if entry.name[0] == "." or not _is_folder(entry) or not _takes(owners, entry.path, ""):
            continue
        if any(True for _ in _pictures(entry.path, owners, "")):
            raise ValueError(
                f"{folder} holds pictures itself ({stray}) and in folders ({entry.name}): move either away, since "
                "shards have labels or none."
            )
    return True


# --- Parquet ---


@dataclass(frozen=True)
class _Group:
    file: str
    group: int
    copy: str
    """Path of the copy; empty makes none."""


def _read_group(job: _Group) -> np.ndarray:
    """Lengths and checksums (2, rows) of a row group's pictures, whose bytes are then one after the other in the copy.
    Runs in any process."""
    file = Path(job.file)
    opened = _parquet(file)
    column = _column(file, opened.schema_arrow.names, _IMAGE_COLUMNS)
    lengths, checksums = list[int](), list[int]()
    with open(job.copy or os.devnull, "wb") as stream:
        try:
            for batch in parquet.iterate(file, opened, job.group, [column]):
                contents = batch.column(0).field("bytes")
                if contents.null_count or batch.column(0).null_count:
                    raise ValueError(f"{job.file}: a row of column {column} has no bytes: put the pictures into it.")
                for content in contents:
                    buffer = content.as_buffer()
                    if buffer.size > MOST_BYTES:
                        raise _too_large(f"{job.file}: a picture of column {column}", buffer.size)
                    lengths.append(buffer.size)
                    checksums.append(zlib.crc32(buffer))
                    if job.copy:
                        stream.write(buffer)
        except OSError as error:
            if error.filename == job.file:
                raise _damaged(job.file, error) from error
            raise
    return np.array([lengths, checksums], np.int64).reshape(2, -1)


def _is_binary(kind: pa.StructType) -> bool:
    number = kind.get_field_index("bytes")
    if number < 0:
        return False
    held = kind.field(number).type
    return pa.types.is_binary(held) or pa.types.is_large_binary(held) or pa.types.is_null(held)


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return parquet.open_parquet(file)
    except OSError as error:
        raise _damaged(file, error) from error


def _labels(file: Path) -> np.ndarray:
    names = _parquet(file).schema_arrow.names
    try:
        column = parquet.read_columns(file, [_column(file, names, _LABEL_COLUMNS)]).column(0)
    except OSError as error:
        raise _damaged(file, error) from error
    if column.null_count:
        raise ValueError(f"{file}: a row has no label: remove it.")
    return column.to_numpy().astype(np.int64)


def _column(file: Path, names: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{file} has no column {' or '.join(wanted)} (it has {', '.join(names)}): name another file.")


def _damaged(file: Path | str, error: Exception) -> ValueError:
    reason = first_line(error)
    return ValueError(f"{file} cannot be read ({reason}): fetch it again, or name another file.")


# --- files ---

_CHUNK = 512  # files whose checksums one job computes
_Owners = dict[tuple[int, int], str]
"""The class that a real folder belongs to, by device and inode; empty for the set's own folder and those above it."""


def _class_folders(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Pictures and their sizes by class, sorted. A real folder counts once, whatever links lead to it.

    Raises:
        ValueError: a folder that belongs to two classes, or an entry that cannot be read.
    """
    owners: _Owners = dict.fromkeys(map(_identity, _above(folder)), "")
    names = []
    for entry in _entries(str(folder)):
        if entry.name[0] != "." and _is_folder(entry) and _takes(owners, entry.path, entry.name):
            names.append(entry.name)
    return {name: sorted(_pictures(str(folder / name), owners, name)) for name in names}


def _above(folder: Path) -> list[str]:
    return [str(place) for place in (folder, *folder.resolve().parents)]


def _takes(owners: _Owners, place: str, name: str) -> bool:
    """Whether a folder is met for the first time; the class `name` owns it then.

    Raises:
        ValueError: it is another class's.
    """
    identity = _identity(place)
    owner = owners.get(identity)
    if owner is None:
        owners[identity] = name
    elif owner not in ("", name):
        raise ValueError(f"{place} leads to a folder of class {owner} too: remove one of the links to it.")
    return owner is None


def _pictures(folder: str, owners: _Owners, name: str) -> Iterator[tuple[str, int]]:
    """Files with a picture's suffix below `folder`, and their sizes."""
    folders, links = [folder], list[str]()
    while (
        folders or links
    ):  # links last: where a link and a folder lead to the same pictures, these keep their own path
        place = folders.pop() if folders else links.pop(0)
        if place != folder and not _takes(owners, place, name):
            continue
        for entry in _entries(place):
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif _is_picture(entry.name):
                yield entry.path, _size(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise _unusable(folder, error) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():
        return entry.is_dir(follow_symlinks=False)
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError as error:
        if entry.name[0] == ".":  # editors leave dead links
            return False
        raise _unusable(entry.path, error) from error


def _identity(place: str) -> tuple[int, int]:
    try:
        found = os.stat(place)
    except OSError as error:
        raise _unusable(place, error) from error
    return found.st_dev, found.st_ino


def _size(file: str) -> int:
    try:
        found = os.stat(file)
    except OSError as error:
        raise _unusable(file, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{file} is no regular file: remove it.")
    if found.st_size > MOST_BYTES:
        raise _too_large(file, found.st_size)
    return found.st_size


def _unusable(place: str, error: OSError) -> ValueError:
    return ValueError(f"{place} cannot be read ({first_line(error)}): mend or remove it.")


def _too_large(what: str, size: int) -> ValueError:
    return ValueError(f"{what} has {size:,} bytes, more than the {MOST_BYTES:,} of a picture: remove it.")


def _keys(stems: Sequence[str]) -> list[str]:
    """A key for each file by its name without the suffix: webdataset takes what is behind the first dot for the kind.
    Names that would become one key get a number behind them."""
    plain = [stem.replace(".", "_") for stem in stems]
    times, used, keys = Counter(plain), set(plain), list[str]()
    for key in plain:
        if times[key] > 1:
            number = next(n for n in itertools.count(1) if f"{key}-{n}" not in used)
            key = f"{key}-{number}"
            used.add(key)
        keys.append(key)
    return keys


def read(file: str, offset: int, length: int) -> bytes:
    """
    Raises:
        ValueError: the file is shorter than it was when it was listed.
        OSError: it cannot be read.
    """
    with files.open_regular(file) as stream:
        stream.seek(offset)
        content = stream.read(length)
    if len(content) != length:
        raise ValueError(f"{file} has changed since it was listed: run the same command again.")
    return content


def _checksums(paths: Sequence[str], lengths: np.ndarray, run: Run) -> np.ndarray:
    jobs = [(paths[k : k + _CHUNK], lengths[k : k + _CHUNK].tolist()) for k in range(0, len(paths), _CHUNK)]
    return np.concatenate([np.zeros(0, np.int64), *run.over("comparing the input", _checksums_of, jobs)])


def _checksums_of(job: tuple[Sequence[str], Sequence[int]]) -> np.ndarray:
    return np.array([zlib.crc32(read(file, 0, length)) for file, length in zip(*job, strict=True)], np.int64)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and name[0] != "."
