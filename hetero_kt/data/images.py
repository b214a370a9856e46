"""A labelled set of pictures in memory, and subsets of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_kt.data import counter

_VALIDATION, _SUBSET = (counter.key(0, part) for part in (0, 1))


@dataclass(frozen=True)
class ImageSet:
    """Labelled pictures, all of one size."""

    images: Tensor
    """(S, H, W, 3), uint8."""
    labels: Tensor
    """(S,), int64, each in [0, classes)."""
    classes: int
    mean: tuple[float, ...]
    """Of each channel over the training set, of pixels in [0, 1]."""
    std: tuple[float, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> ImageSet:
        """The samples at `rows`: where (S,), bool, is true, or by number."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def resized(self, size: int) -> ImageSet:
        """The same pictures at size x size pixels (bilinear, antialiased where they shrink)."""
        if self.images.shape[1:3] == (size, size):
            return self
        chunks = []
        for images in self.images.split(1024):
            pixels = images.permute(0, 3, 1, 2).float()
            pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
            chunks.append(pixels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous())
        return replace(self, images=torch.cat(chunks))


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of `images` (S, H, W, 3), uint8, as pixels in [0, 1]."""
    pixels = images.double().reshape(-1, images.shape[-1]) / 255
    return tuple(pixels.mean(0).tolist()), tuple(pixels.std(0, correction=0).tolist())


def chosen(labels: Tensor, classes: int, name: str, *, validation: float, per_class: int, train: bool) -> Tensor:
    """Rows (S,), int64, that `validation` and `per_class` leave of the set `name`, in their order.

    `validation` is the fraction of every class that is held out of training to be evaluated on; `per_class` samples are
    drawn from what is left, for training alone. The same ones in every run.

    Raises:
        ValueError: nothing is left, or a class has too few samples.
    """
    rows = torch.arange(len(labels))
    if validation > 0:
        counts = (class_counts(labels, classes) * validation).round().long()
        if not 0 < int(counts.sum()) < len(labels):
            raise ValueError(
                f"--data.NAME.validation {validation} leaves nothing of {name} to train or to evaluate on: use 0.1, for"
                " example."
            )
        held_out = draw_per_class(labels, counts, _VALIDATION)
        rows = rows[~held_out if train else held_out]
    if train and per_class:
        fewest = int(class_counts(labels[rows], classes).min())
        if per_class > fewest:
            raise ValueError(
                f"--data.NAME.per-class {per_class}: a class of {name} has only {fewest} samples: use at most {fewest},"
                " or 0 for all."
            )
        rows = rows[draw_per_class(labels[rows], torch.full((classes,), per_class), _SUBSET)]
    return rows


def draw_per_class(labels: Tensor, counts: Tensor, key: int) -> Tensor:
    """Rows (S,), bool, of counts[c] samples of each class c, drawn by `key`.

    The first k drawn are the same for every count of at least k, so smaller subsets lie in larger ones.
    """
    drawn = torch.from_numpy(counter.permutation(key, len(labels)))
    classes = labels[drawn]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for c, count in enumerate(counts.tolist()):
        chosen[drawn[classes == c][:count]] = True
    return chosen


def class_counts(labels: Tensor, classes: int) -> Tensor:
    """Samples of each class, (classes,)."""
    return torch.from_numpy(np.bincount(labels.numpy(), minlength=classes))
