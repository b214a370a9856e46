"""Mixup and CutMix of a batch with itself, as timm does them.

Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018); Yun et al., "CutMix" (ICCV 2019).
"""

from __future__ import annotations

import numpy as np
from timm.data import Mixup
from torch import Tensor

from hetero_kt.config import Mix
from hetero_kt.data import counter

_MIX = 2


class Mixer:
    """Mixes this rank's rows of a step, each with the row that lies opposite; drawn by (seed, step, rank)."""

    def __init__(self, mix: Mix, classes: int, rows: int, seed: int, rank: int) -> None:
        """`rows` is this rank's share of the global batch.

        Raises:
            ValueError: an odd number of rows, or a setting out of range.
        """
        for name, value in (("mixup", mix.mixup), ("cutmix", mix.cutmix)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"--data.NAME.mix.{name} {value}: use a positive alpha, or 0 to leave it out")
        if not 0 <= mix.probability <= 1:
            raise ValueError(f"--data.NAME.mix.probability {mix.probability}: use a number from 0 to 1")
        if rows % 2:
            raise ValueError(
                f"--data.NAME.mix pairs a rank's rows, which are {rows} here: use a batch that is even on every rank"
            )
        self.seed, self.rank = seed, rank
        self._mixup = Mixup(mix.mixup, mix.cutmix, prob=mix.probability, label_smoothing=0.0, num_classes=classes)

    def __call__(self, pictures: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The mixed pictures (B, C, H, W), in the place of `pictures`, and soft labels (B, K) that sum to 1.

        timm draws from numpy's global generator, whose state is put back.
        """
        before = np.random.get_state()
        np.random.seed(counter.key(self.seed, _MIX, step, self.rank) & 0xFFFFFFFF)
        try:
            mixed: tuple[Tensor, Tensor] = self._mixup(pictures, labels)
        finally:
            np.random.set_state(before)
        return mixed
