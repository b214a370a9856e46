"""What shards are written from: class folders, a plain folder of pictures, Parquet files."""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import Progress

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
    named: bool = False
    """Files are known by their names and have no labels."""


class ClassFolders:
    """A folder of class folders, with pictures at any depth; other files are not looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        self._files = {name: sorted(_pictures(str(folder / name))) for name in names}
        if not any(self._files.values()):
            raise ValueError(f"{folder} holds no JPEG, PNG or WebP files in class folders: name another input.")

    def classes(self) -> list[str]:
        return list(self._files)

    def samples(self, classes: Sequence[str], scratch: Path, run: Run) -> Samples:
        numbers = {name: number for number, name in enumerate(classes)}
        for name in self._files:
            if name not in numbers:
                raise ValueError(f"{self.folder / name} is no class of the training set: move it away or rename it.")
        files = [file for found in self._files.values() for file, _ in found]
        lengths = np.array([size for found in self._files.values() for _, size in found], np.int64)
        labels = np.repeat([numbers[name] for name in self._files], [len(found) for found in self._files.values()])
        return Samples(files, files, np.arange(len(files)), np.zeros(len(files), np.int64), lengths, labels)

    def identity(self) -> Iterator[str]:
        for found in self._files.values():
            yield from (f"{os.path.relpath(file, self.folder)} {size}" for file, size in found)


class PlainFolder:
    """A folder with pictures in it; other files, and folders, are not looked at."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist: name a folder of pictures.")
        self._files = sorted(entry.path for entry in os.scandir(folder) if _is_picture(entry.name))
        if not self._files:
            raise ValueError(f"{folder} holds no JPEG, PNG or WebP files: name another input.")
        self._lengths = np.array([os.path.getsize(file) for file in self._files], np.int64)

    def classes(self) -> list[str]:
        return [""]

    def samples(self, classes: Sequence[str], scratch: Path, run: Run) -> Samples:
        zeros = np.zeros(len(self._files), np.int64)
        return Samples(self._files, self._files, np.arange(len(zeros)), zeros, self._lengths, zeros, named=True)

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
            if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
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
        """A row group is read whole, and rows are wanted in another order: they are copied out once, group by group."""
        jobs, labels = list[_Group](), list[np.ndarray]()
        for file in self.files:
            labels.append(_labels(file))
            if len(labels[-1]) and not 0 <= labels[-1].min() <= labels[-1].max() < len(classes):
                raise ValueError(f"{file}: labels are not 0 to {len(classes) - 1}, the training set's: mend them.")
            for group in range(_parquet(file).num_row_groups):
                jobs.append(_Group(str(file), group, str(scratch / f"rows-{len(jobs):06d}")))
        lengths = run.over("copying row groups", _copy_out, jobs)
        if not sum(map(len, lengths)):
            raise ValueError(f"{self.files[0]} has no rows: name another input.")
        starts = [np.cumsum(each) - each for each in lengths]
        which = np.repeat(np.arange(len(jobs)), [len(each) for each in lengths])
        files = [f"{job.copy}.bin" for job in jobs]
        names = [f"{job.file} (row group {job.group})" for job in jobs]
        return Samples(files, names, which, np.concatenate(starts), np.concatenate(lengths), np.concatenate(labels))

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
    elif files := sorted(source.glob("*.parquet")):
        held = [file for file in files if file.name.startswith("val")]
        named = [file for file in files if file.name.startswith("train")]
        train = ParquetFiles(named or [file for file in files if file not in held])
    else:
        folders = {entry.name: Path(entry.path) for entry in os.scandir(source) if entry.is_dir()}
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
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []
    stray = next((entry.name for entry in entries if _is_picture(entry.name)), None)
    if stray is None:
        return False
    for entry in entries:
        if entry.is_dir() and entry.name[0] != "." and any(True for _ in _pictures(entry.path)):
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
    """Path of the copy, without its suffixes."""


def _copy_out(job: _Group) -> np.ndarray:
    """Lengths of a row group's pictures, whose bytes are then one after the other in a file. Runs in any process."""
    lengths_file = Path(f"{job.copy}.npy")
    if lengths_file.exists():
        return np.load(lengths_file, allow_pickle=False)
    parquet = _parquet(Path(job.file))
    column = _column(Path(job.file), parquet.schema_arrow.names, _IMAGE_COLUMNS)
    lengths = list[int]()
    with open(f"{job.copy}.bin", "wb") as stream:
        try:
            for batch in parquet.iter_batches(256, row_groups=[job.group], columns=[column]):
                contents = batch.column(0).field("bytes")
                if contents.null_count:
                    raise ValueError(f"{job.file}: a row of column {column} has no bytes: put the pictures into it.")
                lengths += [stream.write(content.as_buffer()) for content in contents]
        except pa.ArrowException as error:
            raise _damaged(job.file, error) from error
    found = np.array(lengths, np.int64)
    partial = Path(f"{job.copy}.part.npy")
    np.save(partial, found)
    os.replace(partial, lengths_file)  # last: from here on the copy is kept
    return found


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _labels(file: Path) -> np.ndarray:
    parquet = _parquet(file)
    try:
        column = parquet.read(columns=[_column(file, parquet.schema_arrow.names, _LABEL_COLUMNS)]).column(0)
    except (pa.ArrowException, OSError) as error:
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


def _pictures(folder: str) -> Iterator[tuple[str, int]]:
    """Files with a picture's suffix below `folder`, and their sizes."""
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if _is_picture(name):
                file = os.path.join(place, name)
                yield file, os.path.getsize(file)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and name[0] != "."
