"""Classification: one of several classes for each row.

Shape suffixes: B rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_kt.evaluate import evaluating, sum_over_ranks

_ROWS = 256  # per rank and forward
COUNTS = 4
"""Length of `count`'s result."""


def logits(model: nn.Module | Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """The model's answers (B, K) in float32; inputs are cast to the type of the model's parameters."""
    if isinstance(model, nn.Module):
        parameter = next(model.parameters(), None)
        if parameter is not None:
            inputs = inputs.to(parameter.dtype)
    return model(inputs).float()


def loss(
    model: nn.Module | Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy over the rows of `batch`, a scalar in nats: inputs (B, ...), and labels (B,) or mixed ones
    (B, K)."""
    inputs, labels = batch
    return F.cross_entropy(logits(model, inputs), labels, label_smoothing=label_smoothing)


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor], loader: Any, device: torch.device | str, rows: int = _ROWS
) -> dict[str, float]:
    """`loss` (nats), `top1` and `top5` (percent) of a model, an engine or any function from pictures to logits over the
    loader's set, each sample counted once. Collective.

    Every rank runs the same number of forwards, of at most `rows` rows, and gets the same result. BatchNorm uses the
    rank's own statistics: see `hetero_kt.evaluate.averaged_buffers`.
    """
    counts = torch.zeros(COUNTS, dtype=torch.float64, device=device)
    with evaluating(model):
        for inputs, labels, weight in loader.eval_batches(rows):
            counts += count(logits(model, inputs), labels, weight)
    return metrics(sum_over_ranks(counts))


def count(logits_BK: Tensor, labels_B: Tensor, weight_B: Tensor) -> Tensor:
    """Weighted sums over the rows, float64: cross-entropy, hits at rank 1, hits in ranks 1 to 5, weight.

    Sums of several batches and ranks add up. With fewer than five classes, all of them count as ranks 1 to 5.
    """
    weight_B = weight_B.double()
    entropy_B = F.cross_entropy(logits_BK.double(), labels_B, reduction="none")
    best_B5 = logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices
    hit_B5 = best_B5 == labels_B.unsqueeze(1)
    rows = torch.stack([entropy_B, hit_B5[:, 0].double(), hit_B5.any(1).double(), torch.ones_like(weight_B)])
    # A filler row may be anything, NaN times 0 included.
    return torch.where(weight_B > 0, rows * weight_B, 0.0).sum(1)


def metrics(counts: Tensor) -> dict[str, float]:
    """`loss` in nats, `top1` and `top5` in percent, from the sums of `count`."""
    entropy, first, five, weight = counts.tolist()
    return {"loss": entropy / weight, "top1": 100 * first / weight, "top5": 100 * five / weight}
