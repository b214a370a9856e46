"""The handwritten digits that scikit-learn brings along (1,797 pictures of 8x8 pixels), in RGB."""

from __future__ import annotations

from functools import cache

import torch

from hetero_kt import extras
from hetero_kt.data import counter
from hetero_kt.data.images import ImageSet, channel_statistics, class_counts, draw_per_class

_TEST_FRACTION = 0.2
_KEY = counter.key(1, 0)


@cache
def digits(train: bool) -> ImageSet:
    """One side of a fixed, stratified split: 80 % to train on, 20 % to test on."""
    bundled = extras.load("sklearn.datasets", "demo", "--data.NAME.name digits").load_digits()
    grey = torch.from_numpy(bundled.images) * (255 / 16)  # pixels are counts from 0 to 16
    images = grey.round().to(torch.uint8).unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()
    everything = ImageSet(images, torch.from_numpy(bundled.target).long(), 10, (), (), "digits")
    counts = (class_counts(everything.labels, 10) * _TEST_FRACTION).round().long()
    test = draw_per_class(everything.labels, counts, _KEY)
    mean, std = channel_statistics(images[~test])
    part = everything.take(~test if train else test)
    return ImageSet(part.images, part.labels, 10, mean, std, "digits")
