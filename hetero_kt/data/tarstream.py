"""Training batches from tars that webdataset reads from front to back, each by one worker at a time.

An epoch draws the order of the tars. Behind each other they are one row of pictures, which is cut into equal parts: one
for each rank, and in it one for each lane, which is a worker's. So it does not matter how many tars there are and
whether they are of one length: a part may begin within a tar, which is then read from there on. A lane's pictures go
through webdataset's shuffle buffer, whose order is a function of its seed and of how many pictures come; it can be
known without reading. That is how a run goes on: the lane begins at the first tar that holds a picture not seen yet,
and lets nothings take the places of those that were.

Shape suffixes: B rows of this rank, S samples of the set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from hetero_kt.config import Transform
from hetero_kt.data import counter
from hetero_kt.data.order import Order
from hetero_kt.data.pictures import Batch, Decoding, PictureLoader, Task
from hetero_kt.data.tars import Tars
from hetero_kt.data.workers import Stream, preload, usable

_TARS, _BUFFER = 5, 6


class LaneOrder(Order):
    """One rank's share of the global batches: step k of an epoch takes the next rows of lane k % lanes.

    Every sample comes once an epoch, but for the last ones, which fill no batch; the tars' order, and so which samples
    these are, is another one each time.
    """

    def __init__(
        self,
        name: str,
        tar_S: np.ndarray,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        *,
        lanes: int = 1,
        shuffle: int = 0,
    ) -> None:
        """`tar_S` is the tar that holds each sample, ascending; `shuffle` the pictures in a lane's buffer.

        Raises:
            ValueError: an empty set, one smaller than a batch, or a batch that does not divide over the ranks.
        """
        super().__init__(name, len(tar_S), batch, seed, rank, world)
        if batch > len(tar_S):
            raise ValueError(
                f"{name} holds {len(tar_S):,} pictures, fewer than a batch of {batch}: lower --data.NAME.batch."
            )
        self.name, self.lanes, self.shuffle, self._tar_S = name, lanes, shuffle, tar_S
        self.share = batch // world
        self.drawn = lru_cache(2 * lanes)(self._drawn)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.name, self._tar_S, self.batch, self.seed, self.rank, self.world)
        return partial(LaneOrder, lanes=self.lanes, shuffle=self.shuffle), arguments

    def place(self, step: int) -> tuple[int, int, int]:
        """Epoch, lane, and how many batches the lane has given in that epoch before."""
        epoch, within = divmod(step, self.steps_per_epoch)
        before, lane = divmod(within, self.lanes)
        return epoch, lane, before

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, lane, before = self.place(step)
        drawn = self.drawn(epoch, lane)[before * self.share : (before + 1) * self.share]
        return np.full(len(drawn), epoch), drawn

    def read(self, epoch: int, lane: int) -> np.ndarray:
        """Samples of a lane in the order in which they are read."""
        tars, starts, counts = np.unique(self._tar_S, return_index=True, return_counts=True)
        order = counter.permutation(counter.key(self.seed, _TARS, epoch), len(tars))
        behind = np.concatenate([[0], np.cumsum(counts[order])])  # samples before each tar, in the epoch's order
        steps = [len(range(one, self.steps_per_epoch, self.lanes)) for one in range(lane + 1)]
        first = (self.rank * self.steps_per_epoch + sum(steps[:-1])) * self.share
        last = first + steps[-1] * self.share
        pieces = [np.zeros(0, np.int64)]
        for place in range(int(np.searchsorted(behind, first, "right")) - 1, int(np.searchsorted(behind, last))):
            start = starts[order[place]] - behind[place]
            pieces.append(np.arange(start + max(first, behind[place]), start + min(last, behind[place + 1])))
        return np.concatenate(pieces)

    def buffer(self, epoch: int, lane: int) -> Any:
        """webdataset's shuffle buffer of a lane, as a stage of a pipeline."""
        from webdataset.filters import detshuffle

        return detshuffle(self.shuffle, seed=counter.key(self.seed, _BUFFER, epoch, self.rank, lane))

    def _drawn(self, epoch: int, lane: int) -> np.ndarray:
        """Samples of a lane in the order in which the buffer gives them."""
        return np.array(list(self.buffer(epoch, lane).run(iter(self.read(epoch, lane).tolist()))), np.int64)


class TarLoader(PictureLoader):
    """As `PictureLoader`, but training reads the tars from front to back, in the order of `LaneOrder`."""

    def __init__(
        self,
        source: Tars,
        batch: int,
        seed: int,
        transform: Transform,
        image_size: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        *,
        shuffle: int,
        workers: int = 0,
        **how: Any,
    ) -> None:
        """`shuffle` is how many encoded pictures each worker keeps to draw the next one from; the others as for
        `PictureLoader`.

        Raises:
            ValueError: as `PictureLoader` and `LaneOrder` do.
        """
        preload("webdataset", __name__)
        super().__init__(source, batch, seed, transform, image_size, rank, world, device, workers=workers, **how)
        order = LaneOrder(source.name, source.tar, batch, seed, rank, world, lanes=max(1, workers), shuffle=shuffle)
        self.order: Order = order
        self._lanes, self._reading = order, _Reading(source, self._train, order)
        self.promise = (
            f"{source.tars:,} tars, read by webdataset from front to back: an epoch draws the tars' order anew, and "
            f"each of {order.lanes * world} workers its next picture among {max(1, shuffle):,}; none comes twice in an "
            "epoch. A run goes on with the very next batch, reading again from the tars where it stood; on another "
            "number of ranks or workers, the rest of that epoch repeats some pictures and leaves out as many."
        )

    def _ahead(self, step: int) -> Stream:
        lanes, rows = self._lanes.lanes, self._lanes.share
        most = usable(self._workers, rows * 3 * self._image_size**2 * 4)
        # Tasks go to the processes in turn: with a divisor of the lanes, a lane stays in one of them.
        workers = next((number for number in range(most, 0, -1) if lanes % number == 0), 0)
        pin = self.device.type == "cuda"
        return Stream(self._reading, lambda k: (k, self._task(k)), step, None, workers, pin=pin)


class _Reading(Dataset[Batch]):
    """Batches of lanes, read on from where the one before ended, in whatever process."""

    def __init__(self, source: Tars, decoding: Decoding, order: LaneOrder) -> None:
        self._source, self._decoding, self._order = source, decoding, order
        self._open: dict[int, tuple[int, int, Iterator[tuple[int, bytes | None]]]] = {}
        """By lane: the epoch, batches given in it, and what comes."""

    def __getitem__(self, step_and_task: tuple[int, Task]) -> Batch:
        started = time.perf_counter()
        step, task = step_and_task
        epoch, lane, before = self._order.place(step)
        *at, pictures = self._open.pop(lane, (-1, -1, iter(())))
        if at != [epoch, before]:
            pictures = self._pictures(epoch, lane, before * self._order.share)
        read = list(islice(pictures, self._order.share))
        assert [sample for sample, _ in read] == task.samples_B.tolist()
        self._open[lane] = epoch, before + 1, pictures
        self._source.held = {sample: content for sample, content in read if content is not None}
        reading = time.perf_counter() - started
        try:
            batch = self._decoding[task]
        finally:
            self._source.held = {}
        return batch._replace(seconds=batch.seconds + reading)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # files stay where they are open

    def _pictures(self, epoch: int, lane: int, given: int) -> Iterator[tuple[int, bytes | None]]:
        """A lane's samples behind the first `given` ones, in its buffer's order, each as it was encoded; without that
        where it could not be read on the way."""
        from webdataset import DataPipeline

        seen = set(self._order.drawn(epoch, lane)[:given].tolist())
        tar_S = self._source.tar
        parts = [list(part) for _, part in groupby(self._order.read(epoch, lane).tolist(), lambda s: int(tar_S[s]))]
        buffer = self._order.buffer(epoch, lane)
        return islice(iter(DataPipeline(lambda: iter(parts), partial(self._in_turn, seen=seen), buffer)), given, None)

    def _in_turn(self, parts: Iterator[list[int]], seen: set[int]) -> Iterator[tuple[int, bytes | None]]:
        """Samples of one tar after the other. Those that were seen are not read, and no tar that holds only such."""
        for samples in parts:
            wanted = [sample for sample in samples if sample not in seen]
            entries = self._entries(wanted)
            for sample in samples:
                yield sample, None if sample in seen else next(entries, None)

    def _entries(self, samples: list[int]) -> Iterator[bytes | None]:
        """The pictures of samples of one tar, as far as it can be read."""
        if not samples:
            return
        source = self._source
        rows = source.rows[samples].tolist()
        entries = source.entries(int(source.tar[samples[0]]), rows[0], rows[-1])
        wanted = iter(rows)
        row = next(wanted)
        try:
            for at, content in entries:
                if at == row:
                    yield content
                    row = next(wanted, -1)
        except Exception:  # a tar that has been damaged can raise anything; each picture of it is then asked for alone
            return
