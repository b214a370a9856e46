"""What one step of a model keeps in a GPU's memory besides its states: activations, and ZeRO's buffers.

Activations are not estimated: the forward runs on the meta device, where tensors have shapes and no data, and what
autograd keeps for the backward is counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hetero_kt.distributed.engine import bucket_size

PREFETCHED = 50_000_000
LIVE = 1_000_000_000
"""DeepSpeed's defaults under ZeRO-3: elements that are gathered ahead, and that may stay whole."""


def activation_bytes(module: nn.Module, sample: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]) -> int:
    """Bytes per sample that the backward of `module` needs, in training mode.

    Args:
        module: plain; it is left as it is.
        sample: rows -> (positional, named) arguments of a forward of so many rows.
    """
    two, four = (_kept(module, *sample(rows)) for rows in (2, 4))  # BatchNorm wants more than one row
    return (four - two) // 2


def _kept(module: nn.Module, inputs: tuple[Any, ...], more: Mapping[str, Any]) -> int:
    """On the meta device where the forward never looks at a value, else in earnest."""
    for device in ("meta", "cpu"):
        try:
            twin = copy.deepcopy(module).to(device)
            return _saved(twin.train(), *_moved((inputs, dict(more)), device))
        except (NotImplementedError, RuntimeError):
            if device == "cpu":
                raise
    raise AssertionError


def _saved(module: nn.Module, inputs: tuple[Any, ...], more: dict[str, Any]) -> int:
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage  # kept, or the next one might get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module(*inputs, **more)
    total = sum(storage.nbytes() for storage in found.values())
    del result
    return total


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return {name: _moved(one, device) for name, one in value.items()} if isinstance(value, dict) else value


def buffer_bytes(module: nn.Module, zero: Mapping[str, Any], width: int) -> int:
    """Of ZeRO's buffers: gradients on their way, and under ZeRO-3 the weights that are whole for the while.

    Args:
        width: bytes of an element that the model computes with.
    """
    stage, size = zero.get("stage", 0), bucket_size(module, zero)
    if stage == 0:
        return 0
    total = width * size * (2 if zero.get("overlap_comm", stage == 3) and stage < 3 else 1)
    if stage == 3:
        total += width * whole_elements(module, zero)
    return total


def whole_elements(module: nn.Module, zero: Mapping[str, Any]) -> int:
    """Elements of a ZeRO-3 model that are gathered at once, at most."""
    count = sum(p.numel() for p in module.parameters())
    layer = max((sum(p.numel() for p in part.parameters(recurse=False)) for part in module.modules()), default=0)
    if int(zero.get("stage3_max_reuse_distance", LIVE)) >= count:  # backward reuses what forward has gathered
        return min(count, max(int(zero.get("stage3_max_live_parameters", LIVE)), layer))
    return min(count, layer + int(zero.get("stage3_prefetch_bucket_size", PREFETCHED)))
