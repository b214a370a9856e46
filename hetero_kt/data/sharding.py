"""Writing webdataset shards from a tree of class folders, from Parquet files, or from a plain folder of pictures.

The shards are a function of the input and the shard size alone: their pictures' order is drawn once, so that every
shard holds all classes, and each is written by itself. So several processes write at once, and a run that was killed
goes on: shards whose checksum is on record are kept, all others written again, and the result is the same to the bit.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hetero_kt import files
from hetero_kt.data import counter
from hetero_kt.data.inputs import Contents, Input, PlainFolder, Run, Samples, parts_of, read
from hetero_kt.data.shards import FORMAT, INDEX, NAMES, ROWS, TABLE, Index, local

_KEY = counter.key(3, 0)
_UNFINISHED = ".unfinished"  # a folder for what only an unfinished run needs
_PLAIN = "pictures"  # what shards without labels are called, whatever their folder is: names of shards are restricted
_BLOCK = 512  # tar's unit
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


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
    parts = parts_of(local(source, "input"), [local(name, "--validation") for name in validation])
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
    part = PlainFolder(local(source, "input"))
    with _running(out, workers, quiet) as run:
        return _write_part(folder, _PLAIN, part, part.classes(), limit, run)


@contextmanager
def _running(out: str, workers: int, quiet: bool) -> Iterator[Run]:
    if workers < 1:
        raise ValueError(f"--workers {workers} is no number of processes: use 1 or more.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, disable=quiet) as progress:
            yield Run(min(workers, 1 if multiprocessing.current_process().daemon else workers), progress)
    except OSError as error:
        raise ValueError(
            f"{error.filename or out} cannot be used ({error.strerror}): mend that and run the same command again."
        ) from error


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
    part: Input,
    classes: Sequence[str],
    limit: tuple[int, bool],
    run: Run,
) -> Written:
    origin = _origin(part, classes, limit)
    scratch = folder / _UNFINISHED
    known, finished = _known(folder, scratch, origin)
    if known:
        known = _unchanged(folder, name, known, finished, part.contents(classes, run), limit)
    whole = run.over(
        f"{name}: checking", _is_whole, [_Check(str(folder / k), shard) for k, (shard, _) in known.items()]
    )
    known = {k: v for (k, v), good in zip(known.items(), whole, strict=True) if good}
    kept = len(known)
    if not finished or not all(whole):
        scratch.mkdir(parents=True, exist_ok=True)
        files.write_whole(scratch / "origin", origin)
        samples = part.samples(classes, scratch, run)
        jobs = _jobs(folder, scratch, name, samples, limit)
        written = run.over(f"{name}: writing", _write_shard, [job for job in jobs if job.name not in known])
        known |= {shard["name"]: (shard, rows) for shard, rows in written}
        names = [os.path.basename(job.samples.files[k]) for job in jobs for k in job.samples.which]
        _write_index(folder, classes, origin, [known[job.name] for job in jobs], names if samples.keys else None)
    shutil.rmtree(scratch, ignore_errors=True)
    shards = [shard for shard, _ in known.values()]
    pictures, size = sum(shard["samples"] for shard in shards), sum(shard["bytes"] for shard in shards)
    return Written(folder, pictures, len(classes), len(shards), kept, size)


def _origin(part: Input, classes: Sequence[str], limit: tuple[int, bool]) -> str:
    """What the shards are a function of, as a checksum of names and sizes. Contents are compared by `_unchanged`."""
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
    try:
        theirs = files.read_regular(scratch / "origin", 1024).decode("ascii", "replace")
    except FileNotFoundError:
        if any(folder.glob("*.tar")):
            raise ValueError(f"{folder} holds shards of unknown origin: name another folder, or remove them.") from None
        return {}, False
    if re.fullmatch(r"[0-9a-f]{64}", theirs):  # a torn one says nothing: contents tell
        _same(folder, theirs, origin)
    records = (_record(file) for file in sorted(scratch.glob("*.json")))
    return {record[0]["name"]: record for record in records if record is not None}, False


def _record(file: Path) -> _Record | None:
    """A shard's record of an unfinished run; None where it is damaged."""
    try:
        shard = json.loads(files.read_regular(file, 2**20))
        files.open_regular(file.with_suffix(".npy")).close()
        rows = np.load(file.with_suffix(".npy"), allow_pickle=False)
        checksum = shard.pop("rows")
        sound = rows.dtype == TABLE and rows.ndim == 1 and zlib.crc32(rows.data) == checksum
        sound &= shard["name"] == f"{file.stem}.tar" and {type(shard[key]) for key in ("bytes", "samples")} == {int}
        return (shard, rows) if sound and isinstance(shard["sha256"], str) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError):
        return None


def _unchanged(
    folder: Path, name: str, known: dict[str, _Record], finished: bool, contents: Contents, limit: tuple[int, bool]
) -> dict[str, _Record]:
    """Those of the shards that hold what the input holds now, picture by picture.

    Raises:
        ValueError: a finished run's do not.
    """
    order = counter.permutation(_KEY, len(contents.labels))
    starts = _starts(contents.lengths[order], limit)
    expected = {_shard_name(name, number): own for number, own in enumerate(np.split(order, starts[1:]))}
    if finished and set(known) != set(expected):
        raise ValueError(f"{folder} holds other shards than the input gives now: name another folder, or remove it.")
    same = {}
    for shard, (about, rows) in known.items():
        own = expected.get(shard, order[:0])
        now = (contents.labels[own], contents.lengths[own], contents.crc32[own])
        if all(np.array_equal(rows[field], new) for field, new in zip(("label", "length", "crc32"), now, strict=True)):
            same[shard] = about, rows
        elif finished:
            raise ValueError(
                f"{folder / shard} holds other pictures or labels than the input does now: name another folder, or "
                "remove it."
            )
    return same


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
    samples: Samples


def _jobs(folder: Path, scratch: Path, name: str, samples: Samples, limit: tuple[int, bool]) -> list[_Shard]:
    order = counter.permutation(_KEY, len(samples.labels))
    starts = _starts(samples.lengths[order], limit)
    jobs = []
    for number, (first, rows) in enumerate(zip(starts, np.split(order, starts[1:]), strict=True)):
        used, which = np.unique(samples.which[rows], return_inverse=True)
        own = Samples(
            [samples.files[file] for file in used],
            [samples.names[file] for file in used],
            which,
            samples.offsets[rows],
            samples.lengths[rows],
            samples.labels[rows],
            tuple(samples.keys[file] for file in used) if samples.keys else (),
        )
        jobs.append(_Shard(str(folder), str(scratch), _shard_name(name, number), first, own))
    return jobs


def _starts(lengths: np.ndarray, limit: tuple[int, bool]) -> list[int]:
    """The position in the order at which each shard begins, given the lengths in it."""
    most, in_bytes = limit
    if not in_bytes:
        return list(range(0, len(lengths), most))
    entries = 3 * _BLOCK + -(-lengths // _BLOCK) * _BLOCK  # two headers and the label's block
    starts, filled = [0], 0
    for position, entry in enumerate(entries.tolist()):
        if filled and filled + entry > most:
            starts.append(position)
            filled = 0
        filled += entry
    return starts


def _shard_name(part: str, number: int) -> str:
    return f"{part}-{number:06d}.tar"


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
            if samples.keys:
                entry["__key__"] = samples.keys[samples.which[row]]
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
    files.sync(Path(job.folder))
    files.write_whole(unfinished.with_suffix(".npy"), _npy(rows))
    about = json.dumps({**record, "rows": zlib.crc32(rows.data)})
    files.write_whole(unfinished.with_suffix(".json"), about)  # last: from here on the shard is kept
    return record, rows


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _contents(samples: Samples) -> Iterator[bytes]:
    for which, offset, length in zip(samples.which, samples.offsets.tolist(), samples.lengths.tolist(), strict=True):
        yield read(samples.files[which], offset, length)


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
    files.write_whole(folder / ROWS, _npy(table))
    index = {
        "format": FORMAT,
        "origin": origin,
        "classes": list(classes),
        "rows": {"count": len(table), "crc32": zlib.crc32(table.data)},
        "shards": [shard for shard, _ in records],
    }
    if names is not None:
        listed = json.dumps(names).encode()
        files.write_whole(folder / NAMES, listed)
        index["names"] = zlib.crc32(listed)
    files.write_whole(folder / INDEX, json.dumps(index, indent=1) + "\n")


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
