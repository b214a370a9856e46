"""Batches of an image set as a function of the step: nothing to save for a resume but the step itself.

Shape suffixes: B rows of this rank, S samples of the set, H x W pixels, P = H * W, C channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_kt.data import counter
from hetero_kt.data.device import moved
from hetero_kt.data.images import ImageSet
from hetero_kt.data.mixing import Mixer
from hetero_kt.data.order import Order

_AUGMENT = 1
_PAD = 4  # pixels that `crop` may shift a picture by, each way
_DEGREES = 15
_ANGLES = 301  # steps of 0.1 degrees
AUGMENTATIONS = ("crop", "flip", "rotate")


class Loader:
    """One rank's share of the global batches of a set in memory, in the order of `Order`, augmented as whole batches.

    `crop` shifts by up to 4 pixels, `flip` mirrors half of the pictures, `rotate` turns by up to 15 degrees,
    in that order; what comes in from outside is black, pixels are copied and never blended. What happens to
    a sample is decided by (seed, epoch, sample): ranks and batches do not matter.
    """

    def __init__(
        self,
        images: ImageSet,
        batch: int,
        seed: int,
        augment: Sequence[str],
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        mixer: Mixer | None = None,
        augmentations: int = 0,
    ) -> None:
        """`batch` counts the rows of all ranks together; with a `mixer`, labels are soft. So many different
        `augmentations` of a sample take turns over the epochs; 0 draws another in each epoch.

        Raises ValueError for an empty set, a batch that does not divide over the ranks, and an unknown
        augmentation.
        """
        self.order = Order(images.name, len(images), batch, seed, rank, world)
        unknown = [name for name in augment if name not in AUGMENTATIONS]
        if unknown:
            raise ValueError(f"augment {unknown[0]!r} is unknown: use any of {', '.join(AUGMENTATIONS)}")
        self.images = images
        self.samples, self.classes, self.name = len(images), images.classes, images.name
        self.mean, self.std = images.mean, images.std
        self.labels = images.labels.cpu()
        """The class of every sample, (S,)."""
        self.global_batch, self.steps_per_epoch = batch, self.order.steps_per_epoch
        self.seed, self.augment, self.rank, self.world = seed, tuple(augment), rank, world
        self.device = torch.device(device)
        self.augmentations, self._mixer = augmentations, mixer

        self._height, self._width = images.images.shape[1:3]
        pixels = self._height * self._width
        self._pixels_SPC = images.images.reshape(len(images), pixels, 3).to(self.device)
        self._labels_S = images.labels.to(self.device)
        std = torch.tensor(images.std, dtype=torch.float64)
        mean = torch.tensor(images.mean, dtype=torch.float64)
        # Tiled over a whole picture, so that normalisation is one vectorised operation.
        self._scale = (1 / (255 * std)).float().repeat(pixels).to(self.device)
        self._shift = (-mean / std).float().repeat(pixels).to(self.device)
        if self.augment:
            shifts, turns = _shift_table(self._height, self._width), _turn_table(self._height, self._width)
            self._shifts_table = torch.from_numpy(shifts).to(self.device)
            self._turns_table = torch.from_numpy(turns).to(self.device)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of the global batch of `step`: pictures (B, C, H, W) and labels (B,), or (B, K) where mixed.

        Pictures are float32 and normalised to zero mean and unit deviation over the training set; in memory
        they lie channels last, which convolutions on a CPU compute faster.
        """
        samples_B, augmentations_B = self.drawn(step)
        pictures, labels = self._pictures(samples_B, augmentations_B), self._labels(samples_B)
        return self._mixer(pictures, labels, step) if self._mixer else (pictures, labels)

    def drawn(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample (B,) and its augmentation (B,), int64, of this rank's rows at `step`."""
        epochs_B, samples_B = self.order.rows(step)
        return samples_B, turns(epochs_B, self.augmentations)

    def augmented(self, wanted: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[Tensor]:
        """Pictures (B, C, H, W) of any samples (B,) in any augmentations (B,), batch by batch, not mixed."""
        for samples_B, augmentations_B in wanted:
            yield self._pictures(samples_B, augmentations_B)

    def eval_batches(self, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's share of every sample exactly once, not augmented: pictures, labels and weights (B,).

        Every rank yields equally many batches of equal size, at most `batch` rows each; rows that fill up have
        weight 0, all others 1.
        """
        for samples_B, counts_B in self.order.in_turn(batch):
            weight_B = torch.from_numpy(counts_B).float().to(self.device)
            yield self._pictures(samples_B, None), self._labels(samples_B), weight_B

    def fingerprint(self) -> dict[str, Any]:
        """What tells this set from another: how many samples, checksums of their labels and of about a hundred."""
        return fingerprint(self.images)

    def notices(self) -> list[str]:
        """What was left out since the start: nothing, in memory."""
        return []

    def throughput(self) -> dict[str, float]:
        """Nothing: whole batches are augmented in the step itself."""
        return {}

    def close(self) -> None:
        """Nothing to end."""

    def _labels(self, samples_B: np.ndarray) -> Tensor:
        return self._labels_S[moved(samples_B, self.device)]

    def _pictures(self, samples_B: np.ndarray, augmentations_B: np.ndarray | None) -> Tensor:
        rows_B = moved(samples_B, self.device)
        pixels = self._height * self._width
        if augmentations_B is None or not self.augment:
            chosen_BPC = self._pixels_SPC.index_select(0, rows_B)
        else:
            source_BP = self._sources(samples_B, augmentations_B)
            inside_BP = source_BP < pixels
            flat = (rows_B.unsqueeze(1) * pixels + source_BP.clamp(max=pixels - 1)).flatten()
            chosen_BPC = self._pixels_SPC.view(-1, 3).index_select(0, flat).view(*source_BP.shape, 3)
            chosen_BPC = chosen_BPC * inside_BP.unsqueeze(2)
        normal = torch.addcmul(self._shift, chosen_BPC.flatten(1).float(), self._scale)
        return normal.view(len(samples_B), self._height, self._width, 3).permute(0, 3, 1, 2)

    def _sources(self, samples_B: np.ndarray, augmentations_B: np.ndarray) -> Tensor:
        """Where each pixel of the augmented picture is copied from, P for black: (B, P), int64."""
        drawn, which = np.unique(augmentations_B, return_inverse=True)
        keys = [counter.key(self.seed, _AUGMENT, one) for one in drawn.tolist()]
        random = counter.bits(np.array(keys, np.uint64)[which], samples_B)
        side = 2 * _PAD + 1
        down = counter.below(random, side) if "crop" in self.augment else _PAD
        right = counter.below(random, side, first=16) if "crop" in self.augment else _PAD
        mirrored = counter.below(random, 2, first=32, width=1) if "flip" in self.augment else 0
        shift_B = np.broadcast_to((mirrored * side + down) * side + right, len(samples_B))
        shifted = self._shifts_table.index_select(0, moved(shift_B.copy(), self.device))  # broadcast, it is read-only
        if "rotate" not in self.augment:
            return shifted[:, :-1].long()
        turn_B = counter.below(random, _ANGLES, first=33, width=24)
        turned = self._turns_table.index_select(0, moved(turn_B, self.device))
        return shifted.gather(1, turned.long()).long()


def turns(epochs_B: np.ndarray, augmentations: int) -> np.ndarray:
    """Which augmentation each epoch takes: its own, or one of `augmentations` in turn."""
    return epochs_B % augmentations if augmentations else epochs_B


def fingerprint(images: ImageSet) -> dict[str, Any]:
    """How many samples there are, and checksums of their labels and of about a hundred pictures."""
    thinned = images.images[:: max(1, len(images) // 100)]
    return {
        "samples": len(images),
        "labels": zlib.crc32(images.labels.cpu().numpy().tobytes()),
        "pictures": zlib.crc32(thinned.cpu().contiguous().numpy().tobytes()),
    }


@cache
def _shift_table(height: int, width: int) -> np.ndarray:
    """Source pixels of every crop, without and with the mirror behind it: (2 * 9 * 9, P + 1), int32.

    Entry P of a row (for black) is P, so that tables can follow each other.
    """
    rows, columns = np.arange(height)[:, None], np.arange(width)
    table = []
    for across in (columns, columns[::-1]):
        for down in range(-_PAD, _PAD + 1):
            for right in range(-_PAD, _PAD + 1):
                table.append(_sources(rows + down, across + right, height, width))
    black = np.full((len(table), 1), height * width)
    return np.concatenate([np.stack(table), black], axis=1).astype(np.int32)


@cache
def _turn_table(height: int, width: int) -> np.ndarray:
    """Source pixels of every rotation about the picture's centre, nearest neighbour: (301, P), int32.

    A table of angles, so that the result does not depend on how a machine rounds a batch of sines.
    """
    y = (np.arange(height) - (height - 1) / 2)[:, None]
    x = np.arange(width) - (width - 1) / 2
    table = []
    for angle in np.deg2rad(np.linspace(-_DEGREES, _DEGREES, _ANGLES)):
        rows = np.cos(angle) * y - np.sin(angle) * x + (height - 1) / 2
        columns = np.sin(angle) * y + np.cos(angle) * x + (width - 1) / 2
        table.append(_sources(np.rint(rows).astype(int), np.rint(columns).astype(int), height, width))
    return np.stack(table).astype(np.int32)


def _sources(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> np.ndarray:
    """Flat index of pixel (row, column), or height * width outside of the picture. (P,)"""
    rows, columns = np.broadcast_arrays(rows, columns)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return np.where(inside, rows * width + columns, height * width).ravel()
