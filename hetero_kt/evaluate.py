"""What evaluations of whole sets share: eval mode for the while, sums and pieces over ranks, averaged buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def averaged_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, floating-point buffers are their mean over ranks; afterwards each rank has its own to the bit.

    For evaluation and export of models whose BatchNorm statistics differ between ranks: training's state does
    not change. Other buffers (counts, masks) stay as they are. Collective.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.numel()]
    if not buffers or world() == 1:
        yield
        return
    own = [buffer.clone() for buffer in buffers]
    mean = torch.cat([buffer.flatten().double() for buffer in buffers])
    sum_over_ranks(mean)
    mean /= world()
    try:
        for buffer, values in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
        yield
    finally:
        for buffer, values in zip(buffers, own, strict=True):
            buffer.copy_(values)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Inside, nothing of the model (or engine) drops out and no graph is kept; each module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor, in place, summed over ranks. Collective."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(tensor: Tensor) -> Tensor:
    """The tensors of all ranks (R, ...), equal in shape, one behind the other: (world * R, ...). Collective."""
    if world() == 1:
        return tensor
    gathered = tensor.new_empty(world() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered
