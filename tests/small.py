"""Small models and batches that the tests of sharding share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt.config import AdapterConfig
from hetero_kt.nn.reencode import factorise

CLASSES = 10
PLAIN = AdapterConfig(heads=2, dropout=0.0, ff_dropout=0.0)


class Convolutions(nn.Module):
    """A convolution with BatchNorm (GroupNorm for bf16 parameters) and a classifier."""

    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7) if batch_norm else nn.GroupNorm(1, 7)
        self.fc = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Perceptron(nn.Module):
    """Two linear layers with LayerNorm between."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * 8 * 8, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.inner(x.flatten(1)))))


SITES = {
    "to_perceptron": (("conv", "fc.weight", 4), ("perceptron", "inner.weight", 5)),
    "to_conv": (("perceptron", "head.weight", 4), ("conv", "conv.weight", 3)),
}
"""Mutual transfer: transfer -> (source, target), each (model, weight, rank)."""


def build_pair(factor: bool = True, batch_norm: bool = True) -> dict[str, nn.Module]:
    """The two models, always with the same start; with the sites factorised by default."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {"conv": Convolutions(batch_norm), "perceptron": Perceptron()}
    if factor:
        for sites in SITES.values():
            for model, weight, rank in sites:
                factorise(models[model], weight, rank)
    return models


def batch(step: int, rank: int = 0, world: int = 1, rows: int = 8) -> tuple[Tensor, Tensor]:
    """This rank's rows of the global batch of `step`."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 3, 8, 8, generator=generator)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    return x[rank::world], y[rank::world]


def loss(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, in fp32 at least, whatever the model computes in."""
    logits = model(rows[0].to(next(model.parameters()).dtype))
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), rows[1])


def zero(stage: int) -> dict[str, int]:
    """A `zero_optimization` block that really partitions small weights."""
    return {"stage": stage, "stage3_param_persistence_threshold": 0}
