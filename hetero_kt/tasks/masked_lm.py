"""Masked language modelling: which tokens stood where some were taken away?

Shape suffixes: B rows, L tokens, K chosen positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hetero_kt.data.masked import IGNORED
from hetero_kt.data.text import TextLoader
from hetero_kt.evaluate import evaluating, sum_over_ranks
from hetero_kt.models import bert

_ROWS = 32  # per rank and forward


def logits(model: Any, ids_BL: Tensor, mask_BL: Tensor, types_BL: Tensor, positions_BK: Tensor) -> Tensor:
    """The model's answers (B, K, V) in float32 at the chosen positions."""
    return bert.outputs(model, ids_BL, mask_BL, types_BL, positions=positions_BK).float()


def loss(model: Any, batch: tuple[Tensor, ...], label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the chosen tokens of `batch`, a scalar in nats: ids, mask, token types (B, L), positions
    and labels (B, K)."""
    *inputs, labels_BK = batch
    answers = logits(model, *inputs).flatten(0, 1)
    return F.cross_entropy(answers, labels_BK.flatten(), ignore_index=IGNORED, label_smoothing=label_smoothing)


def evaluate(model: Any, loader: TextLoader, device: torch.device | str, rows: int = _ROWS) -> dict[str, float]:
    """`loss` (nats a token) and `accuracy` (percent) over the loader's set, each row masked the same way every time.
    Collective."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(model):
        for (*inputs, labels_BK), _, weight_B in loader.eval_batches(rows):
            answers_BKV = logits(model, *inputs)
            entropy_BK = F.cross_entropy(
                answers_BKV.transpose(1, 2), labels_BK, ignore_index=IGNORED, reduction="none"
            ).double()
            counts_BK = (labels_BK != IGNORED) & (weight_B > 0).unsqueeze(1)
            hits_BK = (answers_BKV.argmax(2) == labels_BK) & counts_BK
            sums += torch.stack([torch.where(counts_BK, entropy_BK, 0.0).sum(), hits_BK.sum(), counts_BK.sum()])
    entropy, hits, count = sum_over_ranks(sums).tolist()
    return {"loss": entropy / count, "accuracy": 100 * hits / count}
