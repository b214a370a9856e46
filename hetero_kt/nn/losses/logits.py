"""Losses between the class probabilities of a student and those of a teacher.

Shape suffixes: B rows of a batch, K classes.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from hetero_kt.nn.losses.precision import wide


def kd(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531), mean over the batch, in nats:

        T^2 * sum_c p_c^t (log p_c^t - log p_c^s),  p = softmax(logits / T)

    T^2 keeps the gradient's size whatever the temperature. A teacher that is not detached is trained too.
    """
    student = F.log_softmax(wide(student_BK) / temperature, dim=-1)
    teacher = F.log_softmax(wide(teacher_BK) / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def ofa(student_BK: Tensor, teacher_BK: Tensor, labels: Tensor, *, gamma: float) -> Tensor:
    """One-for-all distillation (Hao et al. 2023, arXiv 2310.19444), as its public code has it, mean over the batch:

        - sum_c [ (p_c^t + 1[c = y])^gamma - 1[c = y] ] log p_c^s,  p = softmax(logits)

    A gamma above 1 stresses the class that is right. At 1 this is the cross-entropy to the teacher's probabilities,
    which knows no label. The paper writes

        - (1 + p_y^t)^gamma log p_y^s - sum_{c != y} p_c^t log p_c^s

    which differs twice: its 1 stays inside (the cross-entropy to the label, which belongs to no teacher and is left
    to the caller here), and its other classes are not raised to gamma.

    Args:
        labels: classes (B,), or mixed and smoothed ones (B, K), of which the largest counts.
        gamma: above 0; the paper takes 1 on CIFAR-100 and 1.5 on ImageNet.
    """
    student = F.log_softmax(wide(student_BK), dim=-1)
    teacher = F.log_softmax(wide(teacher_BK), dim=-1)
    right = (labels.argmax(-1) if labels.dim() == 2 else labels).unsqueeze(-1)
    # p^gamma by way of the logarithm: its gradient stays finite where p vanishes, for a teacher that is not detached.
    weight = (gamma * teacher).exp()
    weight = weight.scatter(-1, right, (gamma * teacher.gather(-1, right).exp().log1p()).expm1())
    return -(weight * student).sum(-1).mean()
