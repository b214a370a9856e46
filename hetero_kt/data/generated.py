"""Generated pictures that can be learned: every class is a smooth colour pattern under noise.

For tests and `--debug`: no files, and as many classes and pixels as CIFAR-100, so that weights have the same
shapes.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from hetero_kt.data import counter
from hetero_kt.data.images import ImageSet, channel_statistics

CLASSES = 100
_TRAIN, _TEST = 16, 2  # samples per class
_SIZE = 32
_PATTERN, _NOISE = (counter.key(2, part) for part in (0, 1))


@cache
def generated(train: bool) -> ImageSet:
    """1,600 pictures to train on or 200 others to test on, always the same ones."""
    mean, std = channel_statistics(_draw(0, _TRAIN)[0])
    images, labels = _draw(0, _TRAIN) if train else _draw(_TRAIN, _TEST)
    return ImageSet(images, labels, CLASSES, mean, std, "generated")


def _draw(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples `first` to `first + count` of every class, the classes in turn."""
    coarse = torch.from_numpy(_uniform(_PATTERN, 0, CLASSES * 3 * 16)).view(CLASSES, 3, 4, 4)
    patterns = F.interpolate(coarse, (_SIZE, _SIZE), mode="bilinear").permute(0, 2, 3, 1).contiguous()
    pixels = CLASSES * _SIZE * _SIZE * 3
    noise = torch.from_numpy(_uniform(_NOISE, first * pixels, count * pixels))
    images = 0.6 * patterns + 0.4 * noise.view(count, *patterns.shape)
    labels = torch.arange(CLASSES).repeat(count)
    return (255 * images).round().to(torch.uint8).flatten(0, 1), labels


def _uniform(key: int, first: int, count: int) -> np.ndarray:
    random = counter.bits(key, np.arange(first, first + count))
    return (random >> np.uint64(11)).astype(np.float64) / 2**53
