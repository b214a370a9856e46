"""Objectives on class probabilities: a teacher's, of the student's branches too, or the student's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetero_kt import config
from hetero_kt.methods.objectives.objective import Evolving, Teachers, Terms, risen
from hetero_kt.nn import losses
from hetero_kt.nn.branches import Branches
from hetero_kt.nn.losses.precision import Projection
from hetero_kt.nn.stages import Layout, Stages, to_map

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class KD:
    """Softened probabilities (Hinton et al. 2015): L = CE + weight * T^2 KL(p_t || p_s)."""

    name, aside = "", None

    def __init__(self, settings: config.KD, teachers: Teachers) -> None:
        self.settings, self.teachers = settings, teachers

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        logits = student(pictures)
        terms = {}
        for name, teacher in self.teachers.items():
            taught = losses.kd(logits, teacher.logits(pictures), temperature=self.settings.temperature)
            terms[f"{name}_to_student/kd_loss"] = self.settings.weight * taught
        return logits, terms


class DKD(Evolving):
    """Decoupled probabilities (Zhao et al. 2022): L = CE + warm-up * L_DKD.

    Args:
        steps: of the whole run, of which the settings' share is the warm-up.
    """

    name, aside = "", None

    def __init__(self, settings: config.DKD, teachers: Teachers, steps: int) -> None:
        self.settings, self.teachers = settings, teachers
        self.warmup = settings.warmup * steps
        self.risen = 1.0

    def begin(self, step: int) -> None:
        self.risen = risen(step, self.warmup)

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        logits = student(pictures)
        s = self.settings
        terms = {}
        for name, teacher in self.teachers.items():
            known = teacher.logits(pictures)
            taught = losses.dkd(logits, known, labels, alpha=s.alpha, beta=s.beta, temperature=s.temperature)
            terms[f"{name}_to_student/dkd_loss"] = self.risen * taught
        return logits, terms


class NKD:
    """Normalised probabilities (Yang et al. 2023): L = labels * CE + L_NKD."""

    name, aside = "", None

    def __init__(self, settings: config.NKD, teachers: Teachers) -> None:
        self.settings, self.teachers = settings, teachers

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        logits = student(pictures)
        terms = {}
        for name, teacher in self.teachers.items():
            known = teacher.logits(pictures)
            taught = losses.nkd(logits, known, labels, gamma=self.settings.gamma, temperature=self.settings.temperature)
            terms[f"{name}_to_student/nkd_loss"] = taught
        return logits, terms


class TfKD:
    """Teacher-free (Yuan et al. 2020): L = (1 - weight) CE + weight * multiplier * divergence, from a made-up teacher
    or from the student as an earlier run has left it."""

    name, aside = "", None

    def __init__(self, settings: config.TfKD, teachers: Teachers) -> None:
        self.settings, self.teachers = settings, teachers

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        s = self.settings
        weight = s.weight * s.multiplier
        logits = student(pictures)
        if s.form == "regularised":
            taught = losses.tf_kd(logits, labels, temperature=s.temperature, correct=s.correct, public=s.public)
            return logits, {"student/tf_loss": weight * taught}
        terms = {}
        for name, teacher in self.teachers.items():
            taught = losses.kd(logits, teacher.logits(pictures), temperature=s.temperature)
            terms[f"{name}_to_student/kd_loss"] = weight * (taught / logits.shape[-1] if s.public else taught)
        return logits, terms


class USKD:
    """Self-distillation without a teacher (Yang et al. 2023): L = CE + alpha L_target + beta L_others + mu L_weak, with
    the weak logits from a linear head behind the third stage."""

    name = "head"

    def __init__(self, settings: config.USKD, student: Stages, classes: int) -> None:
        self.settings = settings
        self.aside = _Head(student.layouts[2], classes)

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        s = self.settings
        own = student(pictures, features=True)
        found = losses.uskd(own["logits"], aside(own["stages"][2]), labels, public=s.public)
        terms = {
            "student/target_loss": s.alpha * found.target,
            "student/others_loss": s.beta * found.others,
            "head/weak_loss": s.mu * found.weak,
        }
        return own["logits"], terms


class _Head(nn.Module):
    """Logits from a feature map, averaged over its places."""

    def __init__(self, layout: Layout, classes: int) -> None:
        super().__init__()
        self.layout, self.classifier = layout, Projection(layout.channels, classes)

    def forward(self, feature: Tensor) -> Tensor:
        return self.classifier(to_map(feature, self.layout).mean((2, 3)))


class OFA:
    """One for all (Hao et al. 2023): the final logits and those of a branch behind each of the student's stages learn
    from the teacher's logits: L = CE + L_OFA(final) + weight * sum over the branches of L_OFA. In the paper's form the
    terms hold a CE each, and none is beside them."""

    name = "branches"

    def __init__(self, settings: config.OFA, student: Stages, teachers: Teachers, classes: int) -> None:
        self.settings, self.teachers = settings, teachers
        self.aside = Branches(student, classes, width=max(teacher.stages.width for teacher in teachers.values()))

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        own = student(pictures, features=True)
        branches = aside(own["stages"])
        terms = {}
        for name, teacher in self.teachers.items():
            known = teacher.logits(pictures)
            final, *early = (
                losses.ofa(logits, known, labels, gamma=self.settings.gamma, public=self.settings.public)
                for logits in (own["logits"], *branches)
            )
            terms[f"{name}_to_student/ofa_loss"] = final
            terms[f"{name}_to_branches/ofa_loss"] = self.settings.weight * torch.stack(early).sum()
        return own["logits"], terms
