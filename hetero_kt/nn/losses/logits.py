"""Losses on class probabilities: a student's against a teacher's, or against what it knows itself.

Shape suffixes: B rows of a batch, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
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


def ofa(student_BK: Tensor, teacher_BK: Tensor, labels: Tensor, *, gamma: float, public: bool = True) -> Tensor:
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
        public: False is the paper's formula.
    """
    student = F.log_softmax(wide(student_BK), dim=-1)
    teacher = F.log_softmax(wide(teacher_BK), dim=-1)
    right = _right(labels)
    if not public:
        weight = teacher.exp()
        weight = weight.scatter(-1, right, (gamma * weight.gather(-1, right).log1p()).exp())
        return -(weight * student).sum(-1).mean()
    # p^gamma by way of the logarithm: its gradient stays finite where p vanishes, for a teacher that is not detached.
    weight = (gamma * teacher).exp()
    weight = weight.scatter(-1, right, (gamma * teacher.gather(-1, right).exp().log1p()).expm1())
    return -(weight * student).sum(-1).mean()


def dkd(
    student_BK: Tensor, teacher_BK: Tensor, labels: Tensor, *, alpha: float, beta: float, temperature: float
) -> Tensor:
    """Decoupled distillation (Zhao et al. 2022, arXiv 2203.08679), mean over the batch, in nats:

        T^2 (alpha KL(b^t || b^s) + beta KL(q^t || q^s))

    b = (p_y, 1 - p_y) tells the right class from all others, q are the others' probabilities among themselves. With
    alpha = 1, and for beta the teacher's 1 - p_y row by row, this is `kd`. The public code pushes the right class out
    of q by lowering its logit by 1000; here it is left out, which is the same up to rounding.

    Args:
        labels: classes (B,), or mixed and smoothed ones (B, K), of which the largest counts.
        alpha, beta: 1 and 8 in the paper's CIFAR-100 runs, whose whole term is warmed up over 20 epochs of 240.
    """
    right = _right(labels)
    own_student, others_student = _apart(wide(student_BK) / temperature, right)
    own_teacher, others_teacher = _apart(wide(teacher_BK) / temperature, right)
    target = F.kl_div(own_student, own_teacher, reduction="batchmean", log_target=True)
    others = F.kl_div(others_student, others_teacher, reduction="batchmean", log_target=True)
    return temperature**2 * (alpha * target + beta * others)


def nkd(student_BK: Tensor, teacher_BK: Tensor, labels: Tensor, *, gamma: float, temperature: float) -> Tensor:
    """Normalised distillation (Yang et al. 2023, arXiv 2303.13005), mean over the batch, in nats:

        - p_y^t log p_y^s - gamma T^2 sum_{c != y} q_c^t log q_c^s

    p at temperature 1; q are the other classes' probabilities among themselves, at temperature T. The cross-entropy to
    the label is the caller's, with weight 1.

    Args:
        labels: classes (B,), or mixed and smoothed ones (B, K), of which the largest counts.
        gamma, temperature: 1.5 and 1 on ImageNet; 3.5 and 3 in the public code's runs on CIFAR-100.
    """
    student, teacher, right = wide(student_BK), wide(teacher_BK), _right(labels)
    own_student = F.log_softmax(student, dim=-1).gather(-1, right)
    own_teacher = F.softmax(teacher, dim=-1).gather(-1, right)
    target = -(own_teacher * own_student).mean()
    _, others_student = _apart(student / temperature, right)
    _, others_teacher = _apart(teacher / temperature, right)
    others = -(others_teacher.exp() * others_student).sum(-1).mean()
    return target + gamma * temperature**2 * others


def tf_kd(
    student_BK: Tensor, labels: Tensor, *, temperature: float, correct: float = 0.99, public: bool = False
) -> Tensor:
    """Regularised teacher-free distillation (Yuan et al. 2020, arXiv 1909.11723): a made-up teacher that is right.

    It gives `correct` to the right class and spreads the rest evenly: u. Mean over the batch, in nats,

        T^2 KL(softmax(u / T) || softmax(logits / T))

    with both sides at T, as in the paper, and T^2 as in `kd`. softmax(u / T) takes probabilities for logits: at the
    published temperatures of 20 and 40 it is all but uniform. The public code has the student at temperature 1 and no
    T^2, and takes the mean over the classes as well as over the batch:

        KL(softmax(u / T) || softmax(logits)) / K

    Args:
        labels: classes (B,), or mixed and smoothed ones (B, K), whose teachers are mixed as they are.
        public: the public code's form.
    """
    classes = student_BK.shape[-1]
    student = wide(student_BK)
    given = labels.to(student.dtype) if labels.dim() == 2 else F.one_hot(labels, classes).to(student.dtype)
    rest = (1 - correct) / (classes - 1)
    teacher = F.log_softmax((rest + (correct - rest) * given) / temperature, dim=-1)
    if public:
        divergence = F.kl_div(F.log_softmax(student, dim=-1), teacher, reduction="batchmean", log_target=True)
        return divergence / classes
    student = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class USKDTerms(NamedTuple):
    """The three losses of `uskd`, scalars in nats, without their weights."""

    target: Tensor
    others: Tensor
    weak: Tensor


def uskd(student_BK: Tensor, weak_BK: Tensor, labels: Tensor, *, public: bool = False) -> USKDTerms:
    """Universal self-distillation (Yang et al. 2023, arXiv 2303.13005), in which nobody teaches; means over the batch:

        target  - (p_y^2 + 1 - mean over the batch of p_y^2) log p_y, the factor detached
        others  - sum_{c != y} z_c log q_c: z is Zipf's law, 1 / rank, normalised; q as in `nkd`, at temperature 1
        weak    cross-entropy of `weak_BK` to labels smoothed by 0.1

    Classes rank by q of the student and q of the weak logits, added up, without gradients. The public code, by an
    overwritten name, adds log p_c / (1 - log p_y) in place of the student's q_c, and ranks the right class among the
    others, which leaves its rank empty.

    Args:
        weak_BK: logits of a linear layer on an earlier, pooled feature.
        labels: classes (B,), or mixed and smoothed ones (B, K), of which the largest is y; the weak logits learn them
            whole. (The public code treats the two largest as right.)
        public: the public code's ranks.
    """
    student, weak, right = wide(student_BK), wide(weak_BK), _right(labels)
    log_p = F.log_softmax(student, dim=-1)
    own = log_p.gather(-1, right).squeeze(-1)
    square = (2 * own.detach()).exp()
    target = -((square + 1 - square.mean()) * own).mean()

    _, log_q = _apart(student, right)
    with torch.no_grad():
        if public:
            weak_p = weak.softmax(-1)
            score = weak_p / (1 - weak_p.gather(-1, right) + 1e-6) + log_p / (1 - own.unsqueeze(-1) + 1e-6)
        else:
            score = log_q.exp() + _apart(weak, right)[1].exp()
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1) + 1
        rank = _others(rank, right) if public else rank
        zipf = 1 / rank.to(student.dtype)
        zipf = zipf / zipf.sum(-1, keepdim=True)
    others = -(zipf * log_q).sum(-1).mean()
    return USKDTerms(
        target,
        others,
        F.cross_entropy(weak, labels.to(weak.dtype) if labels.dim() == 2 else labels, label_smoothing=0.1),
    )


def _right(labels: Tensor) -> Tensor:
    """Each row's class, the largest of soft ones: (B, 1)."""
    return (labels.argmax(-1) if labels.dim() == 2 else labels).unsqueeze(-1)


def _others(x_BK: Tensor, right_B1: Tensor) -> Tensor:
    """`x` of all classes but the right one: (B, K - 1)."""
    place = torch.arange(x_BK.shape[-1] - 1, device=x_BK.device)
    return x_BK.gather(-1, place + (place >= right_B1))


def _apart(logits_BK: Tensor, right_B1: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the right class and of all others together (B, 2), and of those among themselves
    (B, K - 1)."""
    others = _others(logits_BK, right_B1)
    together = torch.cat([logits_BK.gather(-1, right_B1), others.logsumexp(-1, keepdim=True)], dim=-1)
    return F.log_softmax(together, dim=-1), F.log_softmax(others, dim=-1)
