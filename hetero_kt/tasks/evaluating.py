"""What evaluations of whole sets share: eval mode for the while, and sums and pieces over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
    gathered = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)
