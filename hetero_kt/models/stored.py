"""Teachers' logits on disk: computed once, read in every epoch and by every run that sees the same pictures.

A store is a folder `<output>/teacher_logits/<key>/` of safetensors shards and `store.json`, which says what the key
stands for: the teacher's weights, the samples, what is done to a picture, the seed. A row belongs to one augmentation
of one sample, in float32. Shards appear by a rename when they are whole, so a start that was killed is gone on with.

Shape suffixes: B rows, K classes.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hetero_kt import files
from hetero_kt.data.cache import key
from hetero_kt.distributed.launch import Ranks
from hetero_kt.messages import first_line
from hetero_kt.models.teacher import Frozen
from hetero_kt.nn.stages import Stages

ROWS = 4096
"""Of a shard."""
_NOTE = 2**20
"""Bytes of the largest store.json that is read."""
STALE = 3600
"""Seconds after which what is not whole was left by a start that was killed."""


@dataclass(frozen=True, eq=False)
class Store:
    """The logits of `samples` samples in `augmentations` augmentations, each a row of `classes` numbers."""

    root: Path
    """The folder of all stores."""
    about: Mapping[str, Any]
    """What decides the numbers, as JSON can hold it."""
    samples: int
    augmentations: int
    classes: int
    shard: int = ROWS

    @cached_property
    def folder(self) -> Path:
        return self.root / key(self.describe())

    def describe(self) -> dict[str, Any]:
        """What `store.json` holds."""
        shape = {"samples": self.samples, "augmentations": self.augmentations, "classes": self.classes}
        return {**self.about, **shape, "shard": self.shard}

    @property
    def shards(self) -> int:
        return -(-self.samples * self.augmentations // self.shard)

    def file(self, i: int) -> Path:
        """Of shard `i`."""
        return self.folder / f"{i:05d}-of-{self.shards:05d}.safetensors"

    def rows(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample and augmentation of each row of shard `i`, two of int64."""
        last = min((i + 1) * self.shard, self.samples * self.augmentations)
        augmentations, samples = np.divmod(np.arange(i * self.shard, last), self.samples)
        return samples, augmentations

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [i for i in range(self.shards) if not self.file(i).exists()]

    def check(self, rank: int = 0, world: int = 1) -> None:
        """Read what is there of every world-th shard, and look whether it is whole and of this store.

        Raises:
            ValueError: a damaged file, or one of another teacher or data; it is named.
        """
        note = self.folder / "store.json"
        try:
            found = json.loads(files.read_regular(note, _NOTE)) if note.exists() else self._note()
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{note} cannot be read: remove {self.folder}, and it is computed again.") from error
        if found != self._note():
            raise ValueError(
                f"{note} tells of another teacher, data or transform than its folder's name: remove {self.folder}, and "
                "it is computed again."
            )
        for i in range(rank, self.shards, world):
            if self.file(i).exists():
                self._read(i, whole=True)

    def _note(self) -> Any:
        return json.loads(json.dumps(self.describe()))

    def _read(self, i: int, whole: bool = False) -> Tensor:
        """Shard `i`, mapped into memory; with `whole`, every byte is checked."""
        file, rows = self.file(i), len(self.rows(i)[0])
        try:
            files.open_regular(file).close()  # safe_open would wait for a FIFO
            with safe_open(file, "pt") as opened:
                note = opened.metadata() or {}
                logits = opened.get_tensor("logits")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{file} is damaged ({first_line(error)}): remove it, and it is computed again."
            ) from error
        whole_shape = logits.shape == (rows, self.classes) and logits.dtype == torch.float32
        if note.get("store") != self.folder.name or not whole_shape:
            raise ValueError(f"{file} is of another store: remove it, and it is computed again.")
        if whole and note.get("checksum") != _checksum(logits):
            raise ValueError(f"{file} is damaged (its checksum differs): remove it, and it is computed again.")
        if whole and not bool(logits.isfinite().all()):
            raise ValueError(f"{file} holds logits that are not finite: use another teacher, and remove {self.folder}.")
        return logits

    def write(self, i: int, logits: Tensor) -> None:
        """Shard `i`, in one go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        logits = logits.float().cpu().contiguous()
        file = self.file(i)
        about = {"store": self.folder.name, "checksum": _checksum(logits)}
        files.write_whole(file, lambda part: save_file({"logits": logits}, part, about), self._part(file))

    def _part(self, file: Path) -> Path:
        return file.with_name(f"{file.name}.{os.getpid()}.part")  # another job may write the same one

    def sign(self) -> None:
        """Write `store.json`, and clear away what starts that were killed have left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.part"):
            if time.time() - left.stat().st_mtime > STALE:  # a younger one may be another job's, at work on it now
                left.unlink(missing_ok=True)
        note = self.folder / "store.json"
        files.write_whole(note, json.dumps(self.describe(), indent=1) + "\n", self._part(note))

    @cached_property
    def _mapped(self) -> list[Tensor]:
        return [self._read(i) for i in range(self.shards)]

    def logits(self, samples: np.ndarray, augmentations: np.ndarray) -> Tensor:
        """Rows (B, K) on the CPU."""
        shards, places = np.divmod(augmentations * self.samples + samples, self.shard)
        found = torch.empty(len(samples), self.classes)
        for shard in np.unique(shards).tolist():
            here = torch.from_numpy(np.flatnonzero(shards == shard))
            found[here] = self._mapped[shard][torch.from_numpy(places)[here]]
        return found


def _checksum(logits: Tensor) -> str:
    return str(zlib.crc32(logits.contiguous().view(torch.uint8).numpy().tobytes()))


class Stored:
    """A teacher whose logits come from a store: what an objective sees of it that asks for nothing else.

    Args:
        live: the teacher itself.
        loader: of the training pictures.
    """

    def __init__(self, live: Frozen, store: Store, loader: Any) -> None:
        self.live, self.store, self.loader = live, store, loader
        self.stages: Stages = live.stages

    def begin(self, step: int) -> None:
        """Before the forwards of optimizer step `step`: this rank's rows."""
        samples, augmentations = self.loader.drawn(step)
        # Of what is not augmented, every epoch has the one there is.
        found = self.store.logits(samples, augmentations % self.store.augmentations)
        self.answers = found.to(self.live.device, non_blocking=True)
        self.used = 0

    def logits(self, pictures_BCHW: Tensor) -> Tensor:
        """The teacher's answers (B, K) to the step's next pictures."""
        self.used += len(pictures_BCHW)
        return self.answers[self.used - len(pictures_BCHW) : self.used]


def fill(store: Store, teacher: Frozen, loader: Any, ranks: Ranks, rows: int, dtype: torch.dtype) -> int:
    """Compute what the store lacks, a shard a rank at a time. Collective; returns how many shards that were.

    Args:
        rows: pictures in one forward. With as many as in a training step, logits are the live ones to the bit.
        dtype: of the pictures.

    Raises:
        ValueError: the store cannot be written; on all ranks.
    """
    listed: list[Any] = [store.missing() if ranks.first else None]
    dist.broadcast_object_list(listed)  # a shared file system may show others less for a while
    (missing,) = listed
    for start in range(0, len(missing), ranks.world):
        turn = missing[start : start + ranks.world]
        problem = ""
        if ranks.rank < len(turn) or teacher.zero is not None:  # a teacher in pieces needs everybody's forward
            shard = turn[min(ranks.rank, len(turn) - 1)]
            logits = _computed(store, teacher, loader, shard, rows, dtype)
            try:
                if ranks.first and not start:
                    store.sign()
                if not bool(logits.isfinite().all()):  # nothing is kept that would teach every run NaN
                    problem = f"the teacher's logits for shard {shard} of {store.folder} are not finite"
                elif ranks.rank < len(turn):
                    store.write(shard, logits)
            except OSError as error:
                problem = f"{error.filename or store.folder} cannot be written ({error.strerror or error})"
        problems: list[str] = [""] * ranks.world
        dist.all_gather_object(problems, problem)
        if any(problems):
            raise ValueError(f"{next(filter(None, problems))}: mend that, or leave out logits stored.")
    return len(missing)


def _computed(store: Store, teacher: Frozen, loader: Any, shard: int, rows: int, dtype: torch.dtype) -> Tensor:
    """The logits of one shard. Every forward has as many rows; of a teacher in pieces, every shard as many forwards."""
    samples, augmentations = store.rows(shard)
    count = len(samples)
    most = min(store.shard, store.samples * store.augmentations) if teacher.zero is not None else count
    filler = np.zeros(-(-most // rows) * rows - count, dtype=np.int64)
    asked = [np.concatenate([one, filler]).reshape(-1, rows) for one in (samples, augmentations)]
    pictures = loader.augmented(list(zip(*asked, strict=True)))
    return torch.cat([teacher.logits(batch.to(dtype)).float() for batch in pictures])[:count]
