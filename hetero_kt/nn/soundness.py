"""Whether tensors are finite, asked of many at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

ODD = (TypeError, LookupError, AttributeError, OverflowError, RuntimeError)
"""What reading a file of weights with flipped bits may raise, besides a reader's own errors."""


@torch.no_grad()
def look_finite(tensors: Sequence[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """False where some floating-point tensor holds NaN or an infinity: a boolean on `device`, which the host has not
    read. Where values are so large that their norm overflows it is False too, and `first_not_finite` has the last word.

    One fused reduction for all tensors of a device and type.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    verdicts = [
        torch.stack(list(torch._foreach_norm(members))).isfinite().all().to(device) for members in groups.values()
    ]
    return torch.stack(verdicts).all() if verdicts else torch.ones((), dtype=torch.bool, device=device)


@torch.no_grad()
def first_not_finite(tensors: Sequence[Tensor]) -> int | None:
    """The place of the first tensor that holds NaN or an infinity; None where there is none. Waits for the device."""
    if bool(look_finite(tensors)):
        return None
    return next((i for i, tensor in enumerate(tensors) if not bool(tensor.isfinite().all())), None)


def infinite(buffers: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of buffers that are not finite by their nature: a mask of attention may hold minus infinity."""
    return frozenset(name for name, buffer in buffers.items() if first_not_finite([buffer]) is not None)


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse weights that hold NaN or an infinity: what starts from them, or is taught by them, never recovers.

    Args:
        source: where they are from, for the sentence.

    Raises:
        ValueError: one sentence with the first such tensor's name.
    """
    bad = first_not_finite(list(tensors.values()))
    if bad is not None:
        raise ValueError(f"{source}, whose {list(tensors)[bad]} is not finite: use weights of a sound one")
