"""What the ranks send each other, counted below DeepSpeed, at c10d's operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(TorchDispatchMode):
    """Inside, what every collective of this rank moves."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        """Bytes of whole tensors, by operator."""
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") and name != "c10d::barrier":
            self.payload[name.removeprefix("c10d::").rstrip("_")] += max(_sizes(args), default=0)
            self.calls[name.removeprefix("c10d::").rstrip("_")] += 1
        return func(*args, **(kwargs or {}))

    def sent(self, world: int) -> int:
        """Bytes that one rank sends for that."""
        twice = sum(size for name, size in self.payload.items() if name.startswith("allreduce"))
        return (sum(self.payload.values()) + twice) * (world - 1) // world


def _sizes(value: Any) -> list[int]:
    """Bytes of each argument: a tensor, or a list of the ranks' parts."""
    if isinstance(value, Tensor):
        return [value.numel() * value.element_size()]
    if isinstance(value, list | tuple):
        inner = [_sizes(one) for one in value]
        return [sum(map(sum, inner))] if isinstance(value, list) else [size for sizes in inner for size in sizes]
    return []
