"""A contrastive loss between the pooled features of a student and of a teacher.

Shape suffixes: B rows of a batch, D width of a pooled feature.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt.evaluate import gather_rows, world
from hetero_kt.nn.losses.precision import Projection, wide

LARGEST_SCALE = 100.0
"""Of the similarities, that is 1 / temperature; CLIP's bound (Radford et al. 2021)."""


class InfoNCE(nn.Module):
    """Each picture's student feature has to find the same picture's teacher feature among those of a batch:

        - mean_i log ( exp(s cos(f_i^s, f_i^t)) / sum_j exp(s cos(f_i^s, f_j^t)) )

    van den Oord et al. 2018 (arXiv 1807.03748); FBT (arXiv 2410.12342), which learns the temperature 1 / s. s is kept
    as its logarithm, starts at 1 / 0.07 and is at most 100. One-sided: the student's features are the anchors, the
    teacher's the candidates; a candidate that is not detached is trained too.

    Where the two widths differ, a linear map without bias takes *each* side to `width`; where they are equal, neither
    is mapped. The projections and the temperature are parameters of this module, so an optimizer has to hold them,
    and they are used inside `forward` only.

    Args:
        width: the common width; None takes the teacher's. FBT's is that of the attention or MLP model of the two.
        gather: the candidates are those of all ranks, which have the same number of rows each. The mean over ranks
            of the losses is then that of one process with all rows, and so are the parameters' gradients, once they
            have been averaged over ranks. Collective, in the forward, and in the backward of a teacher that learns.
    """

    def __init__(self, student_width: int, teacher_width: int, width: int | None = None, *, gather: bool = False):
        super().__init__()
        common = teacher_width if width is None else width
        mapped = student_width != teacher_width
        self.student: nn.Module = Projection(student_width, common, bias=False) if mapped else nn.Identity()
        self.teacher: nn.Module = Projection(teacher_width, common, bias=False) if mapped else nn.Identity()
        # Of one element, not of none: DeepSpeed cannot broadcast a scalar.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.gather = gather

    def forward(self, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        """The loss of this rank's rows, a scalar in nats."""
        with torch.autocast(student_BD.device.type, enabled=False):
            anchors = _normalised(wide(self.student(student_BD)))
            candidates = _normalised(wide(self.teacher(teacher_BD)))
            own = torch.arange(len(anchors), device=anchors.device)
            if self.gather and world() > 1:
                candidates, own = gathered(candidates), own + dist.get_rank() * len(anchors)
            scale = _Capped.apply(wide(self.log_scale), math.log(LARGEST_SCALE)).exp()
            return F.cross_entropy(scale * (anchors @ candidates.T), own)


def _normalised(x_BD: Tensor) -> Tensor:
    # A row of zeros (ReLU features can be) divides by this eps: it bounds the row's gradient too.
    return F.normalize(x_BD, dim=-1, eps=1e-6)


def gathered(x: Tensor) -> Tensor:
    """The rows of all ranks, in their order, (world * B, ...); `x` itself where there is one rank.

    Ranks have the same number of rows. The gradient of a rank's rows is the sum over ranks. Collective, in the forward
    and in the backward.
    """
    return x if world() == 1 else _AllGather.apply(x)


class _AllGather(torch.autograd.Function):
    """Rows of all ranks, in their order.

    A rank's rows are candidates in every rank's loss, so their gradient is the sum over ranks. It is a sum and no mean
    although the loss is a mean over ranks: the division comes with the averaging of the parameters' gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather_rows(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        own = gradient.new_empty(len(gradient) // dist.get_world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own


class _Capped(torch.autograd.Function):
    """The smaller of x and a limit; above the limit only gradients that lead back pass.

    With a plain clamp x would stay for ever once it is above.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x > limit)
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        (above,) = ctx.saved_tensors
        return torch.where(above, gradient.clamp(min=0), gradient), None
