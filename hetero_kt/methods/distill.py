"""Distillation: a student learns from its labels and from frozen teachers.

What a teacher says enters through an *objective*: terms that are added to the student's own cross-entropy. Some
objectives train something of their own beside the student, which is dropped when training ends: OFA's branches,
FitNet's projections, FBT's connector (`hetero_kt.methods.fbt`). It has an engine of its own, and one backward of the
one summed loss goes through all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import config
from hetero_kt.distributed.learner import Learner
from hetero_kt.models.teacher import Frozen
from hetero_kt.nn import losses
from hetero_kt.nn.branches import Branches
from hetero_kt.nn.fused import temperatures
from hetero_kt.nn.stages import Stages

Teachers = Mapping[str, Frozen]
Terms = dict[str, Tensor]
"""Scalars by the name that they are logged under, each with its weight."""


class Objective(Protocol):
    """What the student learns from its teachers."""

    name: str
    """Of what is trained beside the student."""

    @property
    def aside(self) -> nn.Module | None:
        """That itself: plain, before it is in an engine."""

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        """The student's logits (B, K) and the terms besides its own cross-entropy, for one micro-batch.

        Calls `student` once and the engine `aside` (None where there is nothing aside) at most once as engines:
        DeepSpeed opens an engine's backward at the outputs of every such call.
        """
        ...


class Alone:
    """No teacher: the student and its labels."""

    name, aside = "", None

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        return student(pictures), {}


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


class OFA:
    """One for all (Hao et al. 2023): the final logits and those of a branch behind each of the student's stages learn
    from the teacher's logits: L = CE + L_OFA(final) + weight * sum over the branches of L_OFA."""

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
                losses.ofa(logits, known, labels, gamma=self.settings.gamma) for logits in (own["logits"], *branches)
            )
            terms[f"{name}_to_student/ofa_loss"] = final
            terms[f"{name}_to_branches/ofa_loss"] = self.settings.weight * torch.stack(early).sum()
        return own["logits"], terms


class FitNet:
    """Features (Romero et al. 2015), in the forms of FBT's appendix, Table 4: L = CE + weight * L_feature."""

    name = "projections"

    def __init__(self, settings: config.FitNet, student: Stages, teachers: Teachers) -> None:
        self.settings, self.teachers = settings, teachers
        self.aside = _ByTeacher(
            {
                name: losses.FitNet(
                    settings.form, student.layouts, teacher.stages.layouts, student.width, teacher.stages.width
                )
                for name, teacher in teachers.items()
            }
        )

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        own = student(pictures, features=True)
        compared = aside(own, {name: teacher(pictures) for name, teacher in self.teachers.items()})
        terms = {f"{name}_to_student/fitnet_loss": self.settings.weight * loss for name, loss in compared.items()}
        return own["logits"], terms


class _ByTeacher(nn.ModuleDict):
    """One comparison of features for each teacher."""

    def no_weight_decay(self) -> set[str]:
        """timm's optimizers ask: a temperature is no weight."""
        return temperatures(self)

    def forward(self, own: dict[str, Any], known: Mapping[str, dict[str, Any]]) -> dict[str, Tensor]:
        return {name: compare(own, known[name]) for name, compare in self.items()}


class Distillation:
    """A student and its frozen teachers: the method that the trainer runs.

    Args:
        learners: the student first, then what the objective trains beside it.
        label_smoothing: of the student's own cross-entropy.
    """

    def __init__(self, learners: dict[str, Learner], objective: Objective, label_smoothing: float = 0.0) -> None:
        self.learners, self.objective, self.label_smoothing = learners, objective, label_smoothing
        self.name, *asides = learners
        self.student = learners[self.name]
        self.aside = learners[asides[0]] if asides else None
        self.models: tuple[str, ...] = (self.name,)

    def step(self, step: int, batches: Mapping[str, Any]) -> dict[str, Tensor]:
        """One optimizer step of the student and of what is trained beside it; `{name: scalar}` on the device."""
        for learner in self.learners.values():
            learner.begin(step)
        engine = self.student.engine
        rows = engine.train_micro_batch_size_per_gpu()
        pieces = list(zip(*(tensor.split(rows) for tensor in batches[self.name]), strict=True))
        log: dict[str, Tensor] = {}
        for i, (pictures, labels) in enumerate(pieces):
            terms = self.terms(pictures, labels)
            # One backward for all engines, of one loss, through the student's: it divides by the number of pieces once.
            engine.backward(torch.stack(list(terms.values())).sum())
            for name, value in terms.items():
                log[name] = log.get(name, 0.0) + value.detach() / len(pieces)
            if i + 1 < len(pieces):
                for learner in self.learners.values():
                    learner.engine.step()  # an empty one, which only counts
        for learner in self.learners.values():
            learner.step()
        log["total_loss"] = torch.stack(list(log.values())).sum()
        return log

    def terms(self, pictures: Tensor, labels: Tensor) -> Terms:
        """Every term of the loss of one micro-batch."""
        aside = None if self.aside is None else self.aside.engine
        dtype = next(self.student.engine.module.parameters()).dtype
        logits, terms = self.objective(self.student.engine, aside, pictures.to(dtype), labels)
        own = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return {f"{self.name}/loss": own, **terms}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing of its own: learners are saved with their engines, and teachers never change."""

    def measured(self) -> dict[str, Any]:
        return {}
