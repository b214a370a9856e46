"""Where knowledge moves: weights that take part, and a transfer between two of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hetero_kt.config import Optim, Schedule
from hetero_kt.distributed import is_engine, params
from hetero_kt.messages import check_choices
from hetero_kt.nn import reencode
from hetero_kt.nn.adapter import AdapterConfig


@dataclass(frozen=True, eq=False)
class Site:
    """One weight that takes part: of a DeepSpeed engine or of a plain module.

    A layer that `reencode.factorise` has re-parametrised as W = BA exchanges its factor A, whatever `mode` says;
    any other exchanges the whole matrix (`full`) or the A of a fresh decomposition at every transfer (`svd`).
    """

    model: Any
    """A DeepSpeed engine, or an nn.Module."""
    weight: str
    mode: Literal["full", "svd"] = "full"
    rank: int = 16
    """Of `svd`."""
    optimizer: torch.optim.Optimizer | None = None
    """Of a plain module; only needed for `moments="reset"`."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """Knowledge moves from `source` into `target` every `cycle` steps."""

    source: Site
    target: Site
    cycle: int = 4
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optim: Optim = field(default_factory=lambda: Optim(name="adamw", lr=1e-3, weight_decay=1e-2, clip=50.0))
    schedule: Schedule = field(default_factory=lambda: Schedule(name="constant"))
    update: Literal["lookahead", "exact", "none"] = "lookahead"
    moments: Literal["keep", "reset"] = "keep"
    name: str = ""
    until: int = 0
    """Steps after which nothing is transferred any more; 0: never."""
    reads: Literal["weight", "change"] = "weight"
    """The source's matrix, or its change since the transfer before."""

    def is_due(self, step: int) -> bool:
        """True in front of a step that a transfer comes before."""
        return step % self.cycle == 0 and not 0 < self.until <= step


@dataclass(frozen=True, eq=False)
class View:
    """A whole weight seen as the matrix that is exchanged, and the ways between the two."""

    matrix: Tensor
    """(n, m)."""
    put: Callable[[Tensor, Tensor], Tensor]
    """(new matrix, whole weight) -> the whole weight with the new matrix in it."""
    see: Callable[[Tensor], Tensor]
    """The same weight after a step -> its matrix."""
    pull: Callable[[Tensor], Tensor]
    """Gradient of the loss at the whole weight -> at the matrix."""


def named(transfers: Sequence[Transfer]) -> list[Transfer]:
    """With a name for each, by which it is logged and saved; those without one are called after their weights.

    Raises:
        ValueError: a mode, an update, a kind of adapter or the like that does not exist.
    """
    names: list[str] = []
    for transfer in transfers:
        plain = transfer.name or f"{transfer.source.weight}->{transfer.target.weight}"
        same = sum(name.partition(" #")[0] == plain for name in names)
        names.append(f"{plain} #{same + 1}" if same else plain)
    for transfer, name in zip(transfers, names, strict=True):
        check_choices(transfer, f"transfer {name}")
    return [replace(transfer, name=name) for transfer, name in zip(transfers, names, strict=True)]


class Side:
    """A site resolved: which parameter travels, and how it is seen as a matrix."""

    def __init__(self, site: Site) -> None:
        module = site.model.module if is_engine(site.model) else site.model
        reference = reencode.find_weight(module, site.weight)
        factor = reencode.factor_parameter(module, site.weight)
        self.mode = "factor" if factor is not None else site.mode
        self.part = None if factor is not None else reference.part
        parameter = factor if factor is not None else getattr(reference.module, reference.parameter)
        if not isinstance(parameter, nn.Parameter):  # a product of factors: a write to it would be lost
            raise ValueError(
                f"{site.weight} is factorised under another name: name all its sites by the factorised third, or "
                "leave it unfactorised."
            )
        self.weight = params.Weight(site.model, parameter, site.optimizer)
        self.rank = site.rank
        if self.mode == "factor":
            self.shape = (self.weight.shape[0], self.weight.shape[1])
        elif self.mode == "full":
            self.shape = reference.shape
        else:
            reencode.check_rank(site.weight, reference.shape, site.rank)
            self.shape = (site.rank, reference.shape[1])

    def view(self, whole: Tensor) -> View:
        """`whole` as the matrix that this site exchanges."""
        if self.mode == "factor":
            return View(whole, lambda new, _: new, lambda later: later, lambda gradient: gradient)
        full = reencode.to_matrix(whole, self.part)
        if self.mode == "full":
            return View(
                full,
                put=lambda new, into: reencode.from_matrix(new, into, self.part),
                see=lambda later: reencode.to_matrix(later, self.part),
                pull=lambda gradient: reencode.to_matrix(gradient, self.part),
            )
        b, a, residual = reencode.split_svd(full, self.rank)
        return View(
            a,
            put=lambda new, into: reencode.from_matrix(
                # W + B (A' - A) = B A' + R, and W to the bit where A' = A
                reencode.to_matrix(into, self.part) + b @ (new - a).to(b.dtype),
                into,
                self.part,
            ),
            see=lambda later: torch.linalg.pinv(b) @ (reencode.to_matrix(later, self.part) - residual),
            pull=lambda gradient: b.mT @ reencode.to_matrix(gradient, self.part),  # dL/dA = B^T dL/dW
        )
