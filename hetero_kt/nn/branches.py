"""OFA's branches: from each stage of a student to logits of its own (Hao et al. 2023, arXiv 2310.19444).

In the space of logits a teacher's knowledge no longer shows what built it, so there a stage can be taught by a teacher
of another architecture. The branches are trained with the student and dropped with the teacher.

The layers are those of OFA's public code. It cuts a plain stack of 12 blocks behind blocks 2, 4, 10 and 12, and the
branches here begin where `Stages` cuts: behind 3, 6, 9 and 12. The parameters are as many either way.

Shape suffixes: B rows, C channels, H x W grid, L tokens, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt.nn.stages import Layout, Stages, to_map

GRID = 7
"""Rows of tokens that patch merging aims at."""
HEADS = 4


class Branches(nn.Module):
    """One branch behind each of a student's stages 1 to 4.

    With a CNN a branch is 4 - k separable convolutions of stride 2 behind stage k (for k = 4 a 1x1 convolution),
    average pooling and a linear classifier; with tokens 2x2 patch merging down to 7x7, max(4 - k, 1) transformer blocks
    and a linear classifier of the class token, or of the tokens' mean where there is none.

    Args:
        stages: of the student.
        width: the teacher's pooled width. A CNN's branches take the larger of it and the student's own; 0 and tokens
            take the student's.
    """

    def __init__(self, stages: Stages, classes: int, width: int = 0) -> None:
        super().__init__()
        branches: list[nn.Module] = []
        for k, layout in enumerate(stages.layouts, start=1):
            if stages.convolutional:
                branches.append(_MapBranch(k, layout, max(width, stages.width), classes))
            else:
                branches.append(_TokenBranch(k, layout, stages.width, classes))
        self.branches = nn.ModuleList(branches)
        self.apply(_initialise)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features of stages 1 to 4, as they come out of the model, to the logits (B, K) of each."""
        return [branch(feature) for branch, feature in zip(self.branches, features, strict=True)]


class _MapBranch(nn.Module):
    """Of a CNN's stage k."""

    def __init__(self, k: int, layout: Layout, width: int, classes: int) -> None:
        super().__init__()
        self.into = layout
        channels = [layout.channels * 2**i for i in range(4 - k)] + [width]
        steps: list[nn.Module] = [_separable(c, d) for c, d in pairwise(channels)]
        self.down = nn.Sequential(*(steps or [nn.Conv2d(layout.channels, width, 1)]))
        self.classifier = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        map_BCHW = to_map(feature, self.into).to(self.classifier.weight.dtype)
        return self.classifier(self.down(map_BCHW).mean((2, 3)))


def _separable(channels: int, width: int) -> nn.Sequential:
    """Two separable convolutions, the first of stride 2, the second to `width` channels."""
    return nn.Sequential(
        *_depthwise_pointwise(channels, channels, stride=2), *_depthwise_pointwise(channels, width, stride=1)
    )


def _depthwise_pointwise(channels: int, width: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


class _TokenBranch(nn.Module):
    """Of stage k of a model of tokens."""

    def __init__(self, k: int, layout: Layout, width: int, classes: int) -> None:
        super().__init__()
        self.into = layout
        channels, rows = layout.channels, min(layout.grid)
        merges: list[nn.Module] = []
        while rows >= 2 * GRID:
            merges.append(_Merge(channels, width))
            channels, rows = width, rows // 2
        if channels != width:
            merges.append(nn.Linear(channels, width))
        self.merge = nn.Sequential(*merges)
        heads = next(heads for heads in range(HEADS, 0, -1) if width % heads == 0)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(max(4 - k, 1))))
        self.classifier = nn.Linear(width, classes)

    def forward(self, feature: Tensor) -> Tensor:
        feature = feature.to(self.classifier.weight.dtype)
        tokens_BLC = self.merge(to_map(feature, self.into).permute(0, 2, 3, 1)).flatten(1, 2)
        if not self.into.prefix:
            return self.classifier(self.blocks(tokens_BLC).mean(1))
        prefix_BLC = feature[:, : self.into.prefix]  # models with class tokens keep one width throughout
        return self.classifier(self.blocks(torch.cat([prefix_BLC, tokens_BLC], 1))[:, 0])


class _Merge(nn.Module):
    """Each 2x2 neighbourhood becomes one token of another width; odd grids are padded."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, width, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        _, rows, columns, _ = x_BHWC.shape
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, columns % 2, 0, rows % 2))
        x = x_BHWC.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)  # (B, H/2, W/2, 2, 2, C)
        return F.gelu(self.reduce(self.norm(x.flatten(3))))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
