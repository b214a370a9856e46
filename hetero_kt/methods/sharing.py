"""Direct parameter sharing, the baseline of MergeNet's Fig. 1 (arXiv 2404.13322): two weights with one leading block.

The figure follows network augmentation (Cai et al. 2021, arXiv 2110.08890): the smaller model is a part of the larger
one, and what they share learns from both. How two different architectures share is not said. Here the leading block
that two weights have room for, the first rows and columns of both as matrices, is one block: it starts as the source's,
and in each step moves by the sum of what the two models' optimizers do to it, which for SGD is what one optimizer does
with the sum of both gradients and of both weight decays.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_kt.distributed import params
from hetero_kt.methods.sites import Side, Transfer, named


class Sharing:
    """What stands in for an `Exchange` in the control `sharing`: nothing is transferred, and the leading blocks of each
    transfer's two weights are one. A transfer's cycle and adapter have no part in it.

    Args:
        transfers: pairs of weights; no weight in two of them.

    Raises:
        ValueError: a site that does not exist or cannot take part, a weight that is shared twice, mode `svd`.

    Every call is collective.
    """

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        self.traffic = params.Traffic()
        self.step = 0
        self.pairs = [_Pair(transfer) for transfer in named(transfers)]
        seen: dict[int, str] = {}
        for pair in self.pairs:
            for side in (pair.source, pair.target):
                if (other := seen.setdefault(id(side.weight.parameter), pair.name)) != pair.name:
                    raise ValueError(
                        f"{pair.name} shares a weight that {other} shares already: under the control sharing, give "
                        "each transfer weights of its own."
                    )
        self._active: list[_Pair] = []

    def propose(self) -> None:
        """Before the forward: in the first step the target's block becomes the source's."""
        self._active = [pair for pair in self.pairs if not 0 < pair.transfer.until <= self.step]
        self.step += 1
        fresh = [pair for pair in self._active if pair.block is None]
        if fresh:
            whole = self._read(fresh)
            for pair in fresh:
                pair.block = pair.of(pair.source, whole).clone()
                pair.put(whole)
            _write(fresh, whole)

    def observe(self) -> None:
        """Between backward and step: nothing."""

    def learn(self) -> dict[str, Tensor]:
        """After the steps: both models' moves, in both, unless one is not finite. Returns how far they agree,
        `<transfer>/agreement`: the cosine between the two moves; and `<transfer>/skipped`."""
        if not self._active:
            return {}
        started = time.perf_counter()
        whole = self._read(self._active)
        log = {}
        for pair in self._active:
            assert pair.block is not None
            ours, theirs = (pair.of(side, whole) - pair.block for side in (pair.source, pair.target))
            log[f"{pair.name}/agreement"] = F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
            moved = pair.block + ours + theirs
            # What one model loses is not the other's too: both go back to the block as it was.
            finite = torch.isfinite(moved).all()
            pair.block = torch.where(finite, moved, pair.block)
            log[f"{pair.name}/skipped"] = 1.0 - finite.float()
            pair.put(whole)
        _write(self._active, whole)
        log["transfer_seconds"] = torch.tensor(time.perf_counter() - started)
        return log

    def adapters(self) -> dict[str, Any]:
        """None."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The step and the blocks."""
        blocks = {pair.name: pair.block for pair in self.pairs}
        return {"step": self.step, "bytes_gathered": self.traffic.bytes, "blocks": blocks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.traffic.bytes = state["bytes_gathered"]
        for pair in self.pairs:
            block = state["blocks"][pair.name]
            pair.block = None if block is None else block.to(pair.device)

    def _read(self, pairs: Sequence[_Pair]) -> dict[int, Tensor]:
        """The whole weights of `pairs`, by their parameters."""
        weights = {id(side.weight.parameter): side.weight for pair in pairs for side in (pair.source, pair.target)}
        return dict(zip(weights, params.read(list(weights.values()), self.traffic), strict=True))


class _Pair:
    """Two weights and the block that they share."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer, self.name = transfer, transfer.name
        self.source, self.target = Side(transfer.source), Side(transfer.target)
        for side, site in ((self.source, transfer.source), (self.target, transfer.target)):
            if side.mode == "svd":
                raise ValueError(f"{self.name}: factors of a fresh SVD cannot be shared: use mode full.")
            params.check_writable(side.weight, site.weight)
        rows, columns = (min(sizes) for sizes in zip(self.source.shape, self.target.shape, strict=True))
        self.shape = (rows, columns)
        self.block: Tensor | None = None
        """As it is in both models between two steps; equal on all ranks."""

    def of(self, side: Side, whole: Mapping[int, Tensor]) -> Tensor:
        """The block as it is in one of the two weights."""
        rows, columns = self.shape
        return side.view(whole[id(side.weight.parameter)]).matrix[:rows, :columns].to(self.device)

    @property
    def device(self) -> torch.device:
        return self.target.weight.parameter.device

    def put(self, whole: dict[int, Tensor]) -> None:
        """The block, into both whole weights."""
        assert self.block is not None
        rows, columns = self.shape
        for side in (self.source, self.target):
            key = id(side.weight.parameter)
            view = side.view(whole[key])
            matrix = view.matrix.clone()
            matrix[:rows, :columns] = self.block.to(matrix.device)
            whole[key] = view.put(matrix, whole[key])


def _write(pairs: Sequence[_Pair], whole: Mapping[int, Tensor]) -> None:
    weights = {id(side.weight.parameter): side.weight for pair in pairs for side in (pair.source, pair.target)}
    params.write(list(weights.values()), [whole[key] for key in weights])
