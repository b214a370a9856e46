"""Objectives on features: a teacher's against the student's, or the relations within a batch of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hetero_kt import config
from hetero_kt.methods.objectives.objective import Teachers, Terms
from hetero_kt.nn import losses
from hetero_kt.nn.fused import temperatures
from hetero_kt.nn.stages import Stages

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class RKD:
    """Relations between the pooled features, or the logits, of a micro-batch's rows (Park et al. 2019):
    L = CE + distance * L_D + angle * L_A."""

    name, aside = "", None

    def __init__(self, settings: config.RKD, teachers: Teachers) -> None:
        self.settings, self.teachers = settings, teachers

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        own = student(pictures, features=True)
        terms = {}
        for name, teacher in self.teachers.items():
            ours, theirs = own[self.settings.of], teacher(pictures)[self.settings.of]
            for kind, weight, loss in (
                ("distance", self.settings.distance, losses.rkd_distance),
                ("angle", self.settings.angle, losses.rkd_angle),
            ):
                if weight:  # angles cost the cube of the rows
                    terms[f"{name}_to_student/{kind}_loss"] = weight * loss(ours, theirs)
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
