"""A model's metrics over all ranks, each sample counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hetero_kt.data.loader import Loader
from hetero_kt.tasks import classification

_ROWS = 256  # per rank and forward


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor], loader: Loader, device: torch.device | str
) -> dict[str, float]:
    """`loss` (nats), `top1` and `top5` (percent) of a model, an engine or any function from pictures to logits over the
    loader's set. Collective.

    Every rank runs the same number of forwards and gets the same result. Each module's training mode is
    restored. BatchNorm uses the rank's own statistics: see `averaged_buffers`.
    """
    counts = torch.zeros(classification.COUNTS, dtype=torch.float64, device=device)
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            for inputs, labels, weight in loader.eval_batches(_ROWS):
                counts += classification.count(classification.logits(model, inputs), labels, weight)
    finally:
        for module, training in modes:
            module.training = training
    _sum_over_ranks(counts)
    return classification.metrics(counts)


@contextmanager
def averaged_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, floating-point buffers are their mean over ranks; afterwards each rank has its own to the bit.

    For evaluation and export of models whose BatchNorm statistics differ between ranks: training's state does
    not change. Other buffers (counts, masks) stay as they are. Collective.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.numel()]
    if not buffers or _world() == 1:
        yield
        return
    own = [buffer.clone() for buffer in buffers]
    mean = torch.cat([buffer.flatten().double() for buffer in buffers])
    _sum_over_ranks(mean)
    mean /= _world()
    try:
        for buffer, values in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
        yield
    finally:
        for buffer, values in zip(buffers, own, strict=True):
            buffer.copy_(values)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_ranks(tensor: Tensor) -> None:
    if _world() > 1:
        dist.all_reduce(tensor)
