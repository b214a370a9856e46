"""An exponential moving average of a model's weights, each rank its own share of it.

Every rank averages the pieces of the fp32 masters that ZeRO has given it, so that an update costs no communication
and a rank's share of the memory shrinks with the number of ranks. Whole weights are put together only where they are
asked for, in `applied`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from hetero_kt.distributed.pieces import Piece, pieces
from hetero_kt.nn.soundness import infinite

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_TOGETHER = 2**26
"""Elements that are gathered in one go, if one weight alone has not more: 256 MiB."""


class EMA:
    """The average of one engine's weights and buffers.

        average <- d * average + (1 - d) * now,    d = min(decay, 1 - (1 + t)^(-2/3)) after t updates

    which is timm's ModelEmaV3 with warm-up; its first update copies. Weights are averaged in fp32 from their masters,
    whatever the model computes in. Persistent floating-point buffers are averaged too, each rank its own; other
    persistent buffers (counts) are copied, and what a state dict leaves out stays the model's. Frozen weights have
    no average.

    Raises:
        ValueError: a sharding whose masters cannot be reached.
    """

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        _check(engine)
        self.engine, self.decay = engine, decay
        self.updates = 0
        self._pieces = [piece for piece in pieces(engine) if piece.parameter.requires_grad]
        self._averages = [piece.master().detach().clone() for piece in self._pieces]
        kept = engine.module.state_dict().keys()
        self._buffers = {name: buffer for name, buffer in engine.module.named_buffers() if name in kept}
        self._buffer_averages = {
            name: buffer.detach().to(_wide(buffer.dtype), copy=True) for name, buffer in self._buffers.items()
        }
        # A mean of infinities is no number: such a buffer, a mask of attention, is copied.
        self._infinite = infinite(self._buffers)
        self._in_use = False

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights and buffers in; after each optimizer step. No communication, no synchronisation."""
        assert not self._in_use, "no update while the average is applied"
        weight = 1 - min(self.decay, 1 - (1 + self.updates) ** -(2 / 3))
        own = [(average, piece.master()) for average, piece in zip(self._averages, self._pieces, strict=True)]
        _approach([(average, master) for average, master in own if master.numel()], weight)
        buffers = [(self._buffer_averages[name], buffer) for name, buffer in self._buffers.items()]
        moves = [b.is_floating_point() and name not in self._infinite for name, b in self._buffers.items()]
        _approach([(a, b.to(a.dtype)) for (a, b), moving in zip(buffers, moves, strict=True) if moving], weight)
        for (average, buffer), moving in zip(buffers, moves, strict=True):
            if not moving:
                average.copy_(buffer)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model computes with the averages, and weights that are read are the averages.

        Afterwards weights, masters and buffers are as before to the bit, also if the body raises. Costs a copy of
        what forward uses and, at ZeRO 1 and 2, the gathering of the averages. Collective; no training inside.
        """
        assert not self._in_use, "the average is applied already"
        with torch.no_grad():
            self._release()
            buffers = [buffer.clone() for buffer in self._buffers.values()]
            copies = [copy.clone() for copy in self._forward_copies()]
            self._show()
            self._swap_masters()
            self._in_use = True
        try:
            yield
        finally:
            with torch.no_grad():
                self._release()
                self._in_use = False
                self._swap_masters()
                for copy, before in zip(self._forward_copies(), copies, strict=True):
                    copy.copy_(before)
                for buffer, before in zip(self._buffers.values(), buffers, strict=True):
                    buffer.copy_(before)
                self._settle()

    def pieces(self) -> list[tuple[Piece, Tensor]]:
        """This rank's piece of every weight's average, itself and not a copy."""
        assert not self._in_use, "while the average is applied, the model's own weights are in its place"
        return list(zip(self._pieces, self._averages, strict=True))

    def buffers(self) -> dict[str, Tensor]:
        """This rank's averaged buffers by name, themselves and not copies."""
        assert not self._in_use, "while the average is applied, the model's own buffers are not here"
        return dict(self._buffer_averages)

    def _whole(self) -> Iterator[tuple[Piece, Tensor]]:
        """Every weight's whole average in turn, for use before the next one. Collective; bounded memory."""
        if self.engine.zero_optimization_stage() == 0:
            yield from ((piece, own.view(piece.shape)) for piece, own in zip(self._pieces, self._averages, strict=True))
            return
        for members in _bounded([piece.shape.numel() for piece in self._pieces]):
            sizes = [self._pieces[i].shape.numel() for i in members]
            flat = torch.zeros(sum(sizes), device=self.engine.device)
            parts = flat.split(sizes)
            for i, part in zip(members, parts, strict=True):
                piece = self._pieces[i]
                part[piece.start : piece.start + piece.numel].copy_(self._averages[i])
            # Each element comes from one rank and is zero on the others. Added up as integers it keeps its bits, those
            # of -0.0 too.
            dist.all_reduce(flat.view(torch.int32), group=self._pieces[0].group)
            for i, part in zip(members, parts, strict=True):
                yield self._pieces[i], part.view(self._pieces[i].shape)

    def _forward_copies(self) -> list[Tensor]:
        """What forward uses on this rank, where it is not the master itself."""
        stage = self.engine.zero_optimization_stage()
        if stage == 0:
            return []
        return [piece.parameter.ds_tensor.data if stage == 3 else piece.parameter.data for piece in self._pieces]

    def _show(self) -> None:
        """Put the averages where forward reads; at stage 0 that is the masters."""
        for name, buffer in self._buffers.items():
            buffer.copy_(self._buffer_averages[name])
        stage = self.engine.zero_optimization_stage()
        if stage == 3:
            for average, piece in zip(self._averages, self._pieces, strict=True):
                piece.parameter.ds_tensor.data[: piece.numel].copy_(average)
        elif stage:
            for piece, whole in self._whole():
                piece.parameter.data.copy_(whole)
        self._settle()

    def _swap_masters(self) -> None:
        for average, piece in zip(self._averages, self._pieces, strict=True):
            master = piece.master()
            before = master.clone()
            master.copy_(average)
            average.copy_(before)

    def _release(self) -> None:
        """At stage 3, drop what is gathered now: after an evaluation DeepSpeed keeps some weights for a backward."""
        if self.engine.zero_optimization_stage() == 3:
            self.engine.empty_partition_cache()

    def _settle(self) -> None:
        # ZeRO-3 gathers on a stream of its own, which does not wait for this one.
        if self.engine.zero_optimization_stage() == 3 and self.engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()


def _check(engine: DeepSpeedEngine) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 0 and any(p.requires_grad and p.dtype.itemsize < 4 for p in engine.module.parameters()):
        raise ValueError(
            "ema: ZeRO stage 0 with bf16 parameters has no fp32 masters to average: use ZeRO stage 1, or autocast."
        )
    for offload in (engine.zero_offload_param(), engine.zero_offload_optimizer()):
        if stage == 3 and offload is not None and offload.device == "nvme":
            raise ValueError("ema: weights and optimizer states on NVMe cannot be averaged, offload them to cpu.")
    if stage == 3 and engine.zero_hpz_partition_size() > 1:
        raise ValueError(
            "ema: zero_hpz_partition_size keeps another copy of every weight that the average would not reach, "
            "leave it at 1."
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _approach(pairs: Sequence[tuple[Tensor, Tensor]], weight: float) -> None:
    """Move each first tensor by `weight` of its way to the second, all in one launch."""
    if pairs:
        averages, values = zip(*pairs, strict=True)
        torch._foreach_lerp_(averages, values, weight=weight)


def _bounded(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Indices in runs of at most `_TOGETHER` elements, or of one."""
    members: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        if members and total + size > _TOGETHER:
            yield members
            members, total = [], 0
        members.append(i)
        total += size
    if members:
        yield members
