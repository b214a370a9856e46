"""Losses between the features of a student and those of a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt.nn.losses.contrast import InfoNCE
from hetero_kt.nn.losses.precision import Projection, wide
from hetero_kt.nn.stages import Layout, resized, to_map


class FitNet(nn.Module):
    """Feature distillation (Romero et al. 2015, arXiv 1412.6550) in the four forms of FBT's appendix, Table 4:

        stages    sum over the four stages of the mean squared error between feature maps
        final     mean squared error between the maps of the last stage
        pooled    mean squared error between the last features, pooled
        infonce   `InfoNCE` between them

    A student's map goes through a 1x1 convolution (its pooled feature through a linear map) to the teacher's width,
    always, and takes the teacher's grid: average pooling to a coarser one, bilinear interpolation to a finer one.
    Tokens count as the map that they are patches of; class tokens do not take part.

    Args:
        student_layouts: how the features of the student's stages 1 to 4 lie in memory.
        student_width: of the student's pooled feature.
    """

    def __init__(
        self,
        form: Literal["stages", "final", "pooled", "infonce"],
        student_layouts: Sequence[Layout],
        teacher_layouts: Sequence[Layout],
        student_width: int,
        teacher_width: int,
    ) -> None:
        super().__init__()
        self.form = form
        first = {"stages": 0, "final": 3}.get(form, 4)
        self.layouts = list(zip(student_layouts, teacher_layouts, strict=True))[first:]
        self.maps = nn.ModuleList(Projection(student.channels, teacher.channels) for student, teacher in self.layouts)
        if form == "pooled":
            self.pooled = Projection(student_width, teacher_width)
        elif form == "infonce":
            self.contrast = InfoNCE(student_width, teacher_width)

    def forward(self, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Tensor:
        """The loss, a scalar.

        Args:
            student: with "stages", the list of the four stages' features, and "pooled" (B, width); a form reads only
                what it compares.
            teacher: the same.
        """
        if self.form == "infonce":
            return self.contrast(student["pooled"], teacher["pooled"])
        if self.form == "pooled":
            return F.mse_loss(self.pooled(student["pooled"]), wide(teacher["pooled"]))
        count = len(self.layouts)
        losses = []
        for (ours, theirs), projection, student_map, teacher_map in zip(
            self.layouts, self.maps, student["stages"][-count:], teacher["stages"][-count:], strict=True
        ):
            adapted = self._adapted(to_map(student_map, ours), theirs, projection)
            losses.append(F.mse_loss(adapted, wide(to_map(teacher_map, theirs))))
        return torch.stack(losses).sum()

    def _adapted(self, map_BCHW: Tensor, teacher: Layout, projection: nn.Module) -> Tensor:
        """The student's map in the teacher's channels and grid."""
        x = wide(map_BCHW)
        finer = x.shape[-2] * x.shape[-1] > teacher.grid[0] * teacher.grid[1]
        if finer:  # projecting and resizing commute: the projection works on the smaller of the two grids
            x = resized(x, teacher.grid)
        return resized(projection(x.movedim(1, -1)).movedim(-1, 1), teacher.grid)


def fcfd(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """FCFD's squared errors (Liu et al. 2023, arXiv 2304.11832), as its public code has them, a scalar:

        sum_k mean (f_k - g_k)^2  +  mean (pool(relu f_4) - pool(relu g_4))^2

    over the stages k up to the last, 4, which counts a second time as the classifier reads it.

    Args:
        student: f, the maps (B, C, H, W) of some of the last stages, in the teacher's places, the last one's last.
        teacher: g, of the same stages; no gradient flows to it.
    """
    ours, theirs = [wide(x) for x in student], [wide(x).detach() for x in teacher]
    found = [F.mse_loss(f, g) for f, g in zip(ours, theirs, strict=True)]
    pooled, known = (F.relu(x).mean((2, 3)) for x in (ours[-1], theirs[-1]))
    return torch.stack([*found, F.mse_loss(pooled, known)]).sum()
