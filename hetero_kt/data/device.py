"""The way of what a batch is made of to the device that computes with it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device; a GPU fetches it by itself, and nothing waits for that."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
