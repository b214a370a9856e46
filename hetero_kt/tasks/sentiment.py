"""Classification of texts: a BERT with a classifier, judged by its error rate.

Shape suffixes: B rows, L tokens, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_kt.data.text import TextLoader
from hetero_kt.evaluate import evaluating, sum_over_ranks
from hetero_kt.models import bert
from hetero_kt.tasks import classification

_ROWS = 64  # per rank and forward


def logits(model: Any, ids_BL: Tensor, mask_BL: Tensor, types_BL: Tensor) -> Tensor:
    """The model's answers (B, K) in float32."""
    return bert.outputs(model, ids_BL, mask_BL, types_BL).logits.float()


def loss(model: Any, batch: tuple[Tensor, ...], label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the rows of `batch`, a scalar in nats: ids, mask, token types (B, L), labels (B,)."""
    *inputs, labels_B = batch
    return F.cross_entropy(logits(model, *inputs), labels_B, label_smoothing=label_smoothing)


def evaluate(model: Any, loader: TextLoader, device: torch.device | str, rows: int = _ROWS) -> dict[str, float]:
    """`error` (percent of wrong answers) and `loss` (nats) over the loader's set. Collective.

    Every rank runs the same number of forwards, of at most `rows` rows, and gets the same result.
    """
    counts = torch.zeros(classification.COUNTS, dtype=torch.float64, device=device)
    with evaluating(model):
        for (*inputs, labels_B), _, weight_B in loader.eval_batches(rows):
            counts += classification.count(logits(model, *inputs), labels_B, weight_B)
    found = classification.metrics(sum_over_ranks(counts))
    return {"error": 100 - found["top1"], "loss": found["loss"]}
