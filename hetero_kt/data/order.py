"""Which samples a rank sees at which step: a function of the seed and the step, with no state to save.

Shape suffix: B rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from hetero_kt.data import counter

_ORDER = 0


class Order:
    """One rank's share of the global batches over `size` samples.

    An epoch is a permutation of the samples, decided by (seed, epoch); step k takes the k-th `batch` of them,
    and what does not fill a batch at an epoch's end is left out. A set smaller than one batch repeats:
    permutations are joined end to end. Rank r takes rows r, r + world, ... of the global batch.
    """

    def __init__(self, name: str, size: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """`batch` counts the rows of all ranks together; `name` is the set's, for messages.

        Raises:
            ValueError: an empty set, or a batch that does not divide over the ranks.
        """
        if not size:
            raise ValueError(f"{name} has no samples")
        if batch < 1 or batch % world:
            raise ValueError(f"batch {batch} does not divide over {world} ranks: use a multiple of {world}")
        self.size, self.batch, self.seed, self.rank, self.world = size, batch, seed, rank, world
        self.steps_per_epoch = max(1, size // batch)
        """Steps in which every sample is seen (nearly) once; 1 for a set smaller than a batch."""
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epoch (B,) and sample (B,), int64, of this rank's rows at `step`."""
        if self.batch <= self.size:
            epoch, within = divmod(step, self.steps_per_epoch)
            positions = within * self.batch + np.arange(self.rank, self.batch, self.world)
            return np.full(len(positions), epoch), self._permutation(epoch)[positions]
        positions = step * self.batch + np.arange(self.rank, self.batch, self.world)
        epochs, places = np.divmod(positions, self.size)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            samples[here] = self._permutation(epoch)[places[here]]
        return epochs, samples

    def in_turn(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This rank's share of every sample exactly once: sample (B,) and whether the row counts (B,), bool.

        Every rank gets equally many batches of equal size, at most `most` rows each, since under ZeRO-3 ranks
        must run the same forwards; rows that fill up are sample 0 and do not count.
        """
        share = math.ceil(self.size / self.world)
        batches = math.ceil(share / most)
        rows = math.ceil(share / batches)
        for first in range(0, batches * rows, rows):
            positions = np.arange(first, first + rows) * self.world + self.rank
            counts = positions < self.size
            yield np.where(counts, positions, 0), counts

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        return counter.permutation(counter.key(self.seed, _ORDER, epoch), self.size)
