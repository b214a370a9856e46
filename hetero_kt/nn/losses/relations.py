"""Losses between the relations that rows of a batch have to each other.

Shape suffixes: B rows of a batch, D width of a feature. The widths of student and teacher may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_kt.nn.losses.precision import wide

EPS = 1e-6
"""The shortest distance that a direction is taken of; it bounds the gradients of rows that coincide."""


def rkd_distance(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Relational distillation of distances (Park et al. 2019, arXiv 1904.05068, Eq. 5 to 7):

        mean over i, j of Huber(d_ij^s, d_ij^t),    d_ij = |f_i - f_j| / their mean over i != j

    The mean is over all B^2 pairs, of which a row with itself adds nothing, as in the public code; its mean distance
    leaves out rows that coincide, as here. Nothing flows to the teacher.
    """
    return F.smooth_l1_loss(_distances(wide(student_BD)), _distances(wide(teacher_BD.detach())))


def rkd_angle(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Relational distillation of angles (Park et al. 2019, arXiv 1904.05068, Eq. 8 and 9):

        mean over i, j, k of Huber(a_ijk^s, a_ijk^t),    a_ijk = cosine of the angle at f_i between f_j and f_k

    The mean is over all B^3 triplets, as in the public code. Nothing flows to the teacher. Memory grows as B^3: 2
    million numbers a side at 128 rows.
    """
    return F.smooth_l1_loss(_cosines(wide(student_BD)), _cosines(wide(teacher_BD.detach())))


def _differences(x_BD: Tensor) -> Tensor:
    """[i, j] = x_j - x_i, (B, B, D); by differences, since Gram matrices lose close rows to rounding."""
    return x_BD.unsqueeze(0) - x_BD.unsqueeze(1)


def _distances(x_BD: Tensor) -> Tensor:
    d_BB = _differences(x_BD).norm(dim=-1)
    return d_BB / (d_BB.sum() / (d_BB > 0).sum().clamp(min=1)).clamp(min=EPS)


def _cosines(x_BD: Tensor) -> Tensor:
    with torch.autocast(x_BD.device.type, enabled=False):
        toward_BBD = F.normalize(_differences(x_BD), dim=-1, eps=EPS)
        return toward_BBD @ toward_BBD.transpose(1, 2)
