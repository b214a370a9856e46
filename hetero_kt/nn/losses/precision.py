"""Losses in float32 at least: they take small differences of large numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Projection(nn.Linear):
    """A linear map of the last dimension, in float32 at least: also with bf16 weights, also under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            x = wide(input)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, self.weight.to(x.dtype), bias)
