"""Attention whose scores exist a block at a time.

The column tokens of two factors are many and narrow (960 and 2,048 of width 8 a head): their scores are a thousand
times larger than what goes in and comes out, and writing them to memory, with dropout, costs most of an adapter's time
on a CPU. Here a block of scores is made, normalised, dropped from and used up while it lies in the processor's cache,
and made again in the backward (the scheme of FlashAttention, Dao et al. 2022, arXiv 2205.14135). torch's own fused
attention draws no dropout on a CPU.

Shape suffixes: H heads, T query tokens, S source tokens, D width of a head; t, h the rows and heads of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**16
"""Scores at a time on a CPU: three blocks of them fit into its second cache. A GPU takes all at once."""
KEPT = 2**24
"""Scores, up to which dropout's random bits are kept for the backward, two bytes each; of more they are drawn again."""
LANES = 4
"""Dropout reads 64 random bits as four numbers of 16, each of which decides about one score."""


def attention(q_HTD: Tensor, k_HSD: Tensor, v_HSD: Tensor, dropout: float = 0.0) -> Tensor:
    """dropout(softmax(q k^T / sqrt(D))) v, (H, T, D).

    `dropout`, in [0, 1), is rounded to a multiple of 2^-16; the rest is scaled by the rate as rounded. It draws from
    torch's global generator, also where nothing needs a gradient.

    Where torch.compile traces it, it is torch's own attention, of the rate as given: one kernel on a GPU, where blocks
    would be written out one by one, and random words break the graph.
    """
    if torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q_HTD[None], k_HSD[None], v_HSD[None], dropout_p=dropout)[0]
    return _Attention.apply(q_HTD, k_HSD, v_HSD, dropout)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_HTD: Tensor, k_HSD: Tensor, v_HSD: Tensor, dropout: float) -> Tensor:
        # The long side of every product last: with the narrow one there, BLAS takes five times as long.
        q_HTD = q_HTD / math.sqrt(q_HTD.shape[-1])
        k_HDS, v_HDS = k_HSD.mT.contiguous(), v_HSD.mT.contiguous()
        out_HDT = torch.empty_like(q_HTD.mT, memory_format=torch.contiguous_format)
        cut = _Cut(q_HTD, k_HSD)
        drop = _Dropout(dropout, cut)
        pieces = zip(cut.rows(q_HTD), cut.heads(k_HDS), cut.heads(v_HDS), cut.rows(out_HDT, 2), strict=True)
        turns = zip(pieces, cut.buffers(2), drop.draw(), strict=True)
        for (q_htD, k_hDS, v_hDS, out_hDt), (p_htS, kept_htS), words in turns:
            _probabilities(q_htD, k_hDS, p_htS)
            if words is not None:
                p_htS.mul_(_kept(words, drop.threshold, kept_htS))
            torch.bmm(v_hDS, p_htS.mT, out=out_hDt)
        out_HTD = out_HDT.mT * drop.scale
        ctx.drop = drop
        ctx.save_for_backward(q_HTD, k_HDS, v_HDS, out_HTD)
        return out_HTD

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g_HTD: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_HDS, v_HDS, out_HTD = ctx.saved_tensors
        drop: _Dropout = ctx.drop
        # sum_s p (dL/dp), the part of the softmax's gradient that is equal in a row; dropout is in both factors.
        mean_HT1 = (g_HTD * out_HTD).sum(-1, keepdim=True)
        g_HTD = g_HTD * drop.scale
        dq_HDT = torch.empty_like(q_HTD.mT, memory_format=torch.contiguous_format)
        dk_HDS, dv_HDS = torch.zeros_like(k_HDS), torch.zeros_like(v_HDS)
        cut = drop.cut
        of_rows = zip(cut.rows(q_HTD), cut.rows(g_HTD), cut.rows(mean_HT1), cut.rows(dq_HDT, 2), strict=True)
        of_heads = zip(*(cut.heads(x) for x in (k_HDS, v_HDS, dk_HDS, dv_HDS)), strict=True)
        turns = zip(of_rows, of_heads, cut.buffers(3), drop.again(), strict=True)
        for (q_htD, g_htD, mean_ht1, dq_hDt), (k_hDS, v_hDS, dk_hDS, dv_hDS), (p_htS, used_htS, d_htS), words in turns:
            _probabilities(q_htD, k_hDS, p_htS)
            torch.bmm(g_htD, v_hDS, out=d_htS)
            used_htS = p_htS if words is None else _kept(words, drop.threshold, used_htS).mul_(p_htS)
            dv_hDS.baddbmm_(g_htD.mT, used_htS)
            d_htS.mul_(used_htS).addcmul_(p_htS, mean_ht1, value=-1)  # of the loss at the scores
            torch.bmm(k_hDS, d_htS.mT, out=dq_hDt)
            dk_hDS.baddbmm_(q_htD.mT, d_htS)
        return dq_HDT.mT / math.sqrt(q_HTD.shape[-1]), dk_HDS.mT, dv_HDS.mT, None


def _probabilities(q_htD: Tensor, k_hDS: Tensor, into_htS: Tensor) -> None:
    torch.bmm(q_htD, k_hDS, out=into_htS)
    torch.softmax(into_htS, -1, out=into_htS)


class _Cut:
    """The blocks of the scores: some rows of one head, or all rows of some heads."""

    def __init__(self, q_HTD: Tensor, k_HSD: Tensor) -> None:
        (self.H, self.T, _), self.S = q_HTD.shape, k_HSD.shape[1]
        self.like = q_HTD
        size = BLOCK if q_HTD.device.type == "cpu" else self.H * self.T * self.S
        self.t = min(self.T, max(1, size // self.S))
        self.h = min(self.H, max(1, size // (self.T * self.S)))
        self.shapes = [(h, t, self.S) for h in _sizes(self.H, self.h) for t in _sizes(self.T, self.t)]

    def rows(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """The part of x for each block, where x has a place for every query token along `dim`."""
        return [piece for heads in x.split(self.h) for piece in heads.split(self.t, dim)]

    def heads(self, x: Tensor) -> list[Tensor]:
        """The part of x for each block, where x knows heads alone."""
        return [heads for heads in x.split(self.h) for _ in range(-(-self.T // self.t))]

    def buffers(self, count: int) -> list[list[Tensor]]:
        """For each block, `count` tensors of its shape; all blocks share their memory."""
        memory = [self.like.new_empty(self.h * self.t * self.S) for _ in range(count)]
        views = {shape: [one[: math.prod(shape)].view(shape) for one in memory] for shape in set(self.shapes)}
        return [views[shape] for shape in self.shapes]


def _sizes(whole: int, part: int) -> list[int]:
    return [min(part, whole - start) for start in range(0, whole, part)]


class _Dropout:
    """Which scores are dropped, decided block by block."""

    def __init__(self, rate: float, cut: _Cut) -> None:
        self.threshold = min(round(rate * 2**16), 2**16 - 1)
        self.scale = 1 / (1 - self.threshold / 2**16)
        self.cut, self.device = cut, cut.like.device
        self.keeps = cut.H * cut.T * cut.S <= KEPT
        self.kept: list[Tensor] = []
        self.state: Tensor | None = None

    def draw(self) -> Iterator[Tensor | None]:
        """The random words of each block; None where nothing is dropped."""
        generator = _global(self.device)
        self.state = generator.get_state() if self.threshold and not self.keeps else None
        for words in self._words(generator):
            if words is not None and self.keeps:
                self.kept.append(words)
            yield words

    def again(self) -> Iterator[Tensor | None]:
        """What `draw` gave."""
        if self.state is None:
            return iter(self.kept) if self.threshold else self._words(None)
        return self._words(torch.Generator(self.device).set_state(self.state))

    def _words(self, generator: torch.Generator | None) -> Iterator[Tensor | None]:
        for shape in self.cut.shapes:
            count = -(-math.prod(shape) // LANES) if self.threshold else 0
            words = torch.empty(count, dtype=torch.int64, device=self.device) if count else None
            yield words if words is None else words.random_(-(2**63), None, generator=generator)  # the whole range


def _global(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _kept(words: Tensor, threshold: int, into_htS: Tensor) -> Tensor:
    numbers_htS = words.view(torch.int16)[: into_htS.numel()].view_as(into_htS)
    if into_htS.element_size() < 4:  # which cannot tell 16 bits apart
        return into_htS.copy_(numbers_htS >= threshold - 2**15)
    return into_htS.copy_(numbers_htS).ge_(threshold - 2**15)
