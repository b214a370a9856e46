"""Writing webdataset shards from a tree of class folders, from Parquet files, or from a plain folder of pictures.

The shards are a function of the input and the shard size alone: their pictures' order is drawn once, so that every
shard holds all classes, and each is written by itself. So several processes write at once, and a run that was killed
goes on: shards whose checksum is on record are kept, all others written again, and the result is the same to the bit.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hetero_kt.data import counter
from hetero_kt.data.shards import FORMAT, INDEX, NAMES, ROWS, TABLE, Index, local
from hetero_kt.data.workers import context
from hetero_kt.messages import first_line

_KEY = counter.key(3, 0)
_UNFINISHED = ".unfinished"  # a folder for what only an unfinished run needs
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_PLAIN = "pictures"  # what shards without labels are called, whatever their folder is: names of shards are restricted
_BLOCK = 512  # tar's unit
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "fine_label")


@dataclass(frozen=True)
class Written:
    """One part of a data set, as it lies in its folder now."""

    folder: Path
    pictures: int
    classes: int
    shards: int
    kept: int
    """Shards that an earlier run had written."""
    bytes: int


def write(
    source: str,
    out: str,
    *,
    shard_size: str = "256MB",
    workers: int = 1,
    validation: Sequence[str] = (),
    quiet: bool = False,
) -> list[Written]:
    """Shards of `source` in `out`/train, and of its validation part in `out`/validation.

    `source` is a folder of class folders, or one with such folders `train` and `val` (or `validation`) in it; or a
    Parquet file with a column of encoded pictures (`image` or `img`, a struct with `bytes`) and one of labels
    (`label` or `fine_label`), or a folder of such files (`train*.parquet`, and `val*.parquet`). `validation` names
    the validation part where it lies elsewhere. `shard_size` is a number of samples or of bytes (`256MB`).

    Raises:
        ValueError: input that is missing, damaged or not as described, an output folder of other shards, or a disk
            that cannot be written.
    """
    parts = _parts(local(source, "input"), [local(name, "--validation") for name in validation])
    folder, limit = local(out, "output"), _limit(shard_size)
    with _running(out, workers, quiet) as run:
        classes = parts["train"].classes()
        return [_write_part(folder / name, name, part, classes, limit, run) for name, part in parts.items()]


def write_plain(source: str, out: str, *, shard_size: str = "256MB", workers: int = 1, quiet: bool = False) -> Written:
    """Shards in `out` of the pictures that lie in the folder `source` itself, without labels: they keep their names,
    by which questions and captions speak of them.

    Raises:
        ValueError: as for `write`.
    """
    folder, limit = local(out, "output"), _limit(shard_size)
    part = _PlainFolder(local(source, "input"))
    with _running(out, workers, quiet) as run:
        return _write_part(folder, _PLAIN, part, part.classes(), limit, run)


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


@contextmanager
def _running(out: str, workers: int, quiet: bool) -> Iterator[_Run]:
    if workers < 1:
        raise ValueError(f"--workers {workers} is no number of processes: use 1 or more.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, disable=quiet) as progress:
            yield _Run(min(workers, 1 if multiprocessing.current_process().daemon else workers), progress)
    except OSError as error:
        raise ValueError(
            f"{error.filename or out} cannot be used ({error.strerror}): mend that and run the same command again."
        ) from error


@dataclass(frozen=True)
class _Run:
    workers: int
    progress: Progress


@dataclass(frozen=True)
class _Samples:
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


class _ClassFolders:
    """A folder of class folders, with pictures at any depth; other files are not looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        self._files = {name: sorted(_pictures(str(folder / name))) for name in names}
        if not any(self._files.values()):
            raise ValueError(f"{folder} holds no JPEG, PNG or WebP files in class folders: name another input.")

    def classes(self) -> list[str]:
        return list(self._files)

    def samples(self, classes: Sequence[str], scratch: Path, run: _Run) -> _Samples:
        numbers = {name: number for number, name in enumerate(classes)}
        for name in self._files:
            if name not in numbers:
                raise ValueError(f"{self.folder / name} is no class of the training set: move it away or rename it.")
        files = [file for found in self._files.values() for file, _ in found]
        lengths = np.array([size for found in self._files.values() for _, size in found], np.int64)
        labels = np.repeat([numbers[name] for name in self._files], [len(found) for found in self._files.values()])
        return _Samples(files, files, np.arange(len(files)), np.zeros(len(files), np.int64), lengths, labels)

    def identity(self) -> Iterator[str]:
        for found in self._files.values():
            yield from (f"{os.path.relpath(file, self.folder)} {size}" for file, size in found)


class _PlainFolder:
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

    def samples(self, classes: Sequence[str], scratch: Path, run: _Run) -> _Samples:
        zeros = np.zeros(len(self._files), np.int64)
        return _Samples(self._files, self._files, np.arange(len(zeros)), zeros, self._lengths, zeros, named=True)

    def identity(self) -> Iterator[str]:
        yield from (f"{os.path.basename(f)} {size}" for f, size in zip(self._files, self._lengths, strict=True))


class _Parquet:
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

    def samples(self, classes: Sequence[str], scratch: Path, run: _Run) -> _Samples:
        """A row group is read whole, and rows are wanted in another order: they are copied out once, group by group."""
        jobs, labels = list[_Group](), list[np.ndarray]()
        for file in self.files:
            labels.append(_labels(file))
            if len(labels[-1]) and not 0 <= labels[-1].min() <= labels[-1].max() < len(classes):
                raise ValueError(f"{file}: labels are not 0 to {len(classes) - 1}, the training set's: mend them.")
            for group in range(_parquet(file).num_row_groups):
                jobs.append(_Group(str(file), group, str(scratch / f"rows-{len(jobs):06d}")))
        lengths = _over(run, "copying row groups", _copy_out, jobs)
        if not sum(map(len, lengths)):
            raise ValueError(f"{self.files[0]} has no rows: name another input.")
        starts = [np.cumsum(each) - each for each in lengths]
        which = np.repeat(np.arange(len(jobs)), [len(each) for each in lengths])
        files = [f"{job.copy}.bin" for job in jobs]
        names = [f"{job.file} (row group {job.group})" for job in jobs]
        return _Samples(files, names, which, np.concatenate(starts), np.concatenate(lengths), np.concatenate(labels))

    def identity(self) -> Iterator[str]:
        for file in self.files:
            metadata = _parquet(file).metadata
            groups = [metadata.row_group(k).total_byte_size for k in range(metadata.num_row_groups)]
            yield f"{file.name} {file.stat().st_size} {metadata.num_rows} {groups}"


_Input = _ClassFolders | _PlainFolder | _Parquet


def _parts(source: Path, validation: Sequence[Path]) -> dict[str, _Input]:
    """Where the training part lies, and the validation part if there is one."""
    for path in (source, *validation):
        if not path.exists():
            raise ValueError(f"{path} does not exist: name a folder of class folders, or Parquet files.")
    held: Sequence[Path] = ()
    if source.is_file():
        train: _Input = _Parquet([source])
    elif files := sorted(source.glob("*.parquet")):
        held = [file for file in files if file.name.startswith("val")]
        named = [file for file in files if file.name.startswith("train")]
        train = _Parquet(named or [file for file in files if file not in held])
    else:
        folders = {entry.name: Path(entry.path) for entry in os.scandir(source) if entry.is_dir()}
        train = _ClassFolders(folders.get("train", source))
        if "train" in folders:
            held = [folders[name] for name in ("val", "validation") if name in folders][:1]
    held = validation or held
    if not held:
        return {"train": train}
    return {"train": train, "validation": _ClassFolders(held[0]) if held[0].is_dir() else _Parquet(held)}


def _limit(shard_size: str) -> tuple[int, bool]:
    """A shard's size, and whether it counts bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMG]i?B)?", shard_size.strip(), re.IGNORECASE)
    if not match or not int(match[1]):
        raise ValueError(f"--shard-size {shard_size} is neither samples (10000) nor bytes (256MB): use one of them.")
    return int(match[1]) * (_UNITS[match[2].upper()] if match[2] else 1), bool(match[2])


# --- one part ---


def _write_part(
    folder: Path,
    name: str,
    part: _Input,
    classes: Sequence[str],
    limit: tuple[int, bool],
    run: _Run,
) -> Written:
    origin = _origin(part, classes, limit)
    scratch = folder / _UNFINISHED
    known, finished = _known(folder, scratch, origin)
    whole = _over(
        run, f"{name}: checking", _is_whole, [_Check(str(folder / k), shard) for k, (shard, _) in known.items()]
    )
    known = {k: v for (k, v), good in zip(known.items(), whole, strict=True) if good}
    kept = len(known)
    if not finished or not all(whole):
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "origin").write_text(origin)
        samples = part.samples(classes, scratch, run)
        jobs = _jobs(folder, scratch, name, samples, limit)
        written = _over(run, f"{name}: writing", _write_shard, [job for job in jobs if job.name not in known])
        known |= {shard["name"]: (shard, rows) for shard, rows in written}
        names = [os.path.basename(job.samples.files[k]) for job in jobs for k in job.samples.which]
        _write_index(folder, classes, origin, [known[job.name] for job in jobs], names if samples.named else None)
    shutil.rmtree(scratch, ignore_errors=True)
    shards = [shard for shard, _ in known.values()]
    pictures, size = sum(shard["samples"] for shard in shards), sum(shard["bytes"] for shard in shards)
    return Written(folder, pictures, len(classes), len(shards), kept, size)


def _origin(part: _Input, classes: Sequence[str], limit: tuple[int, bool]) -> str:
    """What the shards are a function of, as a checksum: names and sizes of the input, not its contents."""
    digest = hashlib.sha256(f"{FORMAT} {limit} {classes}\n".encode())
    for line in part.identity():
        digest.update(f"{line}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


_Record = tuple[dict[str, Any], np.ndarray]
"""A shard's line in the index, and its rows, of type TABLE, with any shard number."""


def _known(folder: Path, scratch: Path, origin: str) -> tuple[dict[str, _Record], bool]:
    """Shards on record, by name, and whether the record is a finished run's."""
    if (folder / INDEX).exists():
        try:
            index = Index(folder)
        except ValueError:  # damaged: nothing is known, and all is written again
            return {}, False
        _same(folder, index.origin, origin)
        table = np.array(index.table())
        rows = np.split(table, np.searchsorted(table["shard"], np.arange(1, len(index.shards))))
        return {shard["name"]: (shard, own) for shard, own in zip(index.shards, rows, strict=True)}, True
    if (scratch / "origin").exists():
        _same(folder, (scratch / "origin").read_text(), origin)
    elif any(folder.glob("*.tar")):
        raise ValueError(f"{folder} holds shards of unknown origin: name another folder, or remove them.")
    known: dict[str, _Record] = {}
    for file in sorted(scratch.glob("*.json")):
        known[f"{file.stem}.tar"] = (
            json.loads(file.read_text()),
            np.load(file.with_suffix(".npy"), allow_pickle=False),
        )
    return known, False


def _same(folder: Path, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise ValueError(
            f"{folder} holds shards of another input or of another --shard-size: name another folder, or remove it."
        )


@dataclass(frozen=True)
class _Check:
    path: str
    shard: dict[str, Any]


def _is_whole(check: _Check) -> bool:
    try:
        return os.path.getsize(check.path) == check.shard["bytes"] and _sha256(check.path) == check.shard["sha256"]
    except OSError:
        return False


@dataclass(frozen=True)
class _Shard:
    """A shard to write."""

    folder: str
    scratch: str
    name: str
    first: int
    """Number of its first sample in the part's order, which gives the keys."""
    samples: _Samples


def _jobs(folder: Path, scratch: Path, name: str, samples: _Samples, limit: tuple[int, bool]) -> list[_Shard]:
    order = counter.permutation(_KEY, len(samples.labels))
    most, in_bytes = limit
    if in_bytes:
        entries = 3 * _BLOCK + -(-samples.lengths[order] // _BLOCK) * _BLOCK  # two headers and the label's block
        starts, filled = [0], 0
        for position, entry in enumerate(entries.tolist()):
            if filled and filled + entry > most:
                starts.append(position)
                filled = 0
            filled += entry
    else:
        starts = list(range(0, len(order), most))
    jobs = []
    for number, (first, rows) in enumerate(zip(starts, np.split(order, starts[1:]), strict=True)):
        files, which = np.unique(samples.which[rows], return_inverse=True)
        own = _Samples(
            [samples.files[file] for file in files],
            [samples.names[file] for file in files],
            which,
            samples.offsets[rows],
            samples.lengths[rows],
            samples.labels[rows],
            samples.named,
        )
        jobs.append(_Shard(str(folder), str(scratch), f"{name}-{number:06d}.tar", first, own))
    return jobs


def _write_shard(job: _Shard) -> _Record:
    """Write a shard and put it on record. Runs in any process."""
    from webdataset.writer import TarWriter  # importing webdataset costs a second

    unfinished, samples = Path(job.scratch, job.name), job.samples
    rows = np.zeros(len(samples.labels), TABLE)
    rows["label"], rows["length"] = samples.labels, samples.lengths
    with unfinished.open("wb") as stream:
        writer = TarWriter(stream, encoder=False, mtime=0)  # a fixed time: the same bytes whenever they are written
        for row, content in enumerate(_contents(samples)):
            rows["crc32"][row] = zlib.crc32(content)
            place = samples.names[samples.which[row]]
            entry: dict[str, Any] = {"__key__": f"{job.first + row:08d}", _extension(content, place): content}
            if samples.named:  # webdataset takes what is behind the first dot for the kind
                entry["__key__"] = Path(place).stem.replace(".", "_")
            else:
                entry["cls"] = str(samples.labels[row]).encode()
            writer.write(entry)
        writer.close()
        stream.flush()
        os.fsync(stream.fileno())
    with tarfile.open(unfinished, "r:") as shard:
        rows["offset"] = [entry.offset_data for entry in shard if not entry.name.endswith(".cls")]
    record = {
        "name": job.name,
        "samples": len(rows),
        "bytes": unfinished.stat().st_size,
        "sha256": _sha256(str(unfinished)),
    }
    os.replace(unfinished, Path(job.folder, job.name))
    np.save(unfinished.with_suffix(".npy"), rows)
    _write_whole(unfinished.with_suffix(".json"), json.dumps(record))  # last: from here on the shard is kept
    return record, rows


def _contents(samples: _Samples) -> Iterator[bytes]:
    for which, offset, length in zip(samples.which, samples.offsets.tolist(), samples.lengths.tolist(), strict=True):
        file = samples.files[which]
        with open(file, "rb") as stream:
            stream.seek(offset)
            content = stream.read(length)
        if len(content) != length:
            raise ValueError(f"{file} has changed since it was listed: run the same command again.")
        yield content


def _extension(content: bytes, place: str) -> str:
    """By its first bytes; names lie (ImageNet has a PNG named .JPEG)."""
    if content[:3] == b"\xff\xd8\xff":
        return "jpg"
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    raise ValueError(f"{place} holds a picture that is no JPEG, PNG or WebP: convert or remove it.")


def _write_index(
    folder: Path, classes: Sequence[str], origin: str, records: Sequence[_Record], names: list[str] | None
) -> None:
    table = np.concatenate([rows for _, rows in records])
    table["shard"] = np.repeat(np.arange(len(records)), [len(rows) for _, rows in records])
    unfinished = folder / _UNFINISHED / ROWS
    np.save(unfinished, table)
    os.replace(unfinished, folder / ROWS)
    index = {
        "format": FORMAT,
        "origin": origin,
        "classes": list(classes),
        "rows": {"count": len(table), "crc32": zlib.crc32(table.data)},
        "shards": [shard for shard, _ in records],
    }
    if names is not None:
        _write_whole(folder / NAMES, json.dumps(names))
        index["names"] = zlib.crc32((folder / NAMES).read_bytes())
    _write_whole(folder / INDEX, json.dumps(index, indent=1) + "\n")


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


# --- helpers of all ---


_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def _over(run: _Run, doing: str, function: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> list[_Result]:
    """Results of `function` for all jobs, in their order, by the run's processes."""
    if not jobs:
        return []
    task = run.progress.add_task(doing, total=len(jobs))
    results = list[_Result]()
    if run.workers == 1 or len(jobs) == 1:
        for job in jobs:
            results.append(function(job))
            run.progress.advance(task)
        return results
    pool = concurrent.futures.ProcessPoolExecutor(min(run.workers, len(jobs)), mp_context=context)
    try:
        for result in pool.map(function, jobs):
            results.append(result)
            run.progress.advance(task)
    except BrokenProcessPool as error:
        raise ValueError(
            "a process was killed: run the same command again, with fewer --workers if memory ran out."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _pictures(folder: str) -> Iterator[tuple[str, int]]:
    """Files with a picture's suffix below `folder`, and their sizes."""
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if _is_picture(name):
                file = os.path.join(place, name)
                yield file, os.path.getsize(file)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES) and name[0] != "."


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
