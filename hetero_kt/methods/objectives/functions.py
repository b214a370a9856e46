"""FCFD, function-consistent feature distillation: what features are good for counts, beside what they look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetero_kt import config
from hetero_kt.data import counter
from hetero_kt.methods.objectives.objective import Evolving, Teachers, Terms, risen
from hetero_kt.nn import losses
from hetero_kt.nn.bridges import CROSSINGS, Bridges, Crossing
from hetero_kt.nn.stages import Layout, Stages, to_map

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_PATHS = 0xFCFD


class FCFD(Evolving):
    """Function-consistent feature distillation (Liu et al. 2023, arXiv 2304.11832), as its public code has it:

        L = CE + KL(p_t || p_s) + sum over paths of KL(p_t || p_path)
            + warm-up * weight * (L_F(bridged student) + sum over paths that end in the teacher of L_F(path))

    with KL at one temperature, as in `kd`, and L_F the squared errors to the teacher's features in the teacher's
    places (`losses.fcfd`). A path is the front of one model, a bridge, and the end of the other; each step draws
    `paths` of the six. Those that end in the student train its later stages to read the teacher's features. Labels
    teach the student alone.

    The public code keeps the teacher's BatchNorms in training mode, so that they normalise by the batch; here a teacher
    is in eval mode, as everywhere. It takes a step of no path's bridges for none, here they only decay.

    FBT's appendix compares FCFD on tokens too (its Table 2) and does not say how. With `tokens`, they count as the maps
    that they are patches of, and take the receiving model's class token.

    Args:
        steps: of the whole run, of which the settings' share is the warm-up.

    Raises:
        ValueError: a model whose features are no maps of a CNN, without `tokens`.
    """

    name = "bridges"

    def __init__(
        self, settings: config.FCFD, student: Stages, teachers: Teachers, steps: int = 0, seed: int = 0
    ) -> None:
        self.settings, self.student, self.teachers, self.seed = settings, student, teachers, seed
        check_cnns(settings, student, *(teacher.stages for teacher in teachers.values()))
        self.aside = Bridges(student, {name: teacher.stages for name, teacher in teachers.items()})
        self.warmup = settings.warmup * steps
        self.begin(0)

    def begin(self, step: int) -> None:
        self.risen = risen(step, self.warmup)
        self.drawn: dict[str, list[Crossing]] = {}
        for i, name in enumerate(self.teachers):
            order = counter.permutation(counter.key(_PATHS, self.seed, step, i), len(CROSSINGS))
            self.drawn[name] = [CROSSINGS[j] for j in sorted(order[: self.settings.paths].tolist())]

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        known = {name: teacher(pictures) for name, teacher in self.teachers.items()}
        own, paths = self._student(student, aside, pictures, known)
        weight = self.risen * self.settings.weight
        terms: Terms = {}
        for name, teacher in self.teachers.items():
            layouts: Sequence[Layout] = teacher.stages.layouts
            bridged, ends = self._teacher(aside, name, own["stages"])
            paths[name] += ends["tail_logits"] if ends else []
            targets = _maps(known[name]["stages"], layouts)
            seen = _maps(bridged, [replace(layout, prefix=0) for layout in layouts])
            terms[f"{name}_to_student/kd_loss"] = self._kd(own["logits"], known[name]["logits"])
            terms[f"{name}_to_student/feature_loss"] = weight * losses.fcfd(seen, targets)
            of_paths = [self._kd(logits, known[name]["logits"]) for logits in paths[name]]
            terms[f"{name}_to_paths/kd_loss"] = _sum(of_paths, own["logits"])
            read = []
            for features in ends["tail_stages"] if ends else []:
                later = slice(4 - len(features), None)
                read.append(losses.fcfd(_maps(features, layouts[later]), targets[later]))
            terms[f"{name}_to_paths/feature_loss"] = weight * _sum(read, own["logits"])
        unused = {
            name: [at for at in CROSSINGS if at.way == "to_student" and at not in drawn]
            for name, drawn in self.drawn.items()
        }
        # All terms pass through the engine, whose backward opens where its outputs are: in front of everything.
        return own["logits"], aside(terms=terms, unused=unused)

    def _student(
        self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, known: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, list[Tensor]]]:
        """The student's knowledge, and by teacher the logits of the paths that end in the student, all in one forward:
        in that ZeRO-3 holds a class token together."""
        tails: list[Tensor] = []
        after: list[int] = []
        owners: list[str] = []
        for name in self.teachers:
            crossing = [at for at in self.drawn[name] if at.way == "to_student"]
            features = {at: known[name]["stages"][at.stage - 1] for at in crossing}
            tails += self._cross(aside, name, features)
            after += [at.stage for at in crossing]
            owners += [name] * len(crossing)
        own = student(pictures, features=True, tail=tails or None, after=after)
        paths: dict[str, list[Tensor]] = {name: [] for name in self.teachers}
        for name, logits in zip(owners, own.get("tail_logits", []), strict=True):
            paths[name].append(logits)
        return own, paths

    def _teacher(self, aside: Any, name: str, stages: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
        """The student's features in the teacher's places, and the ends of the paths that go on from them."""
        bridged = self._cross(aside, name, {Crossing("to_teacher", k): x for k, x in enumerate(stages, start=1)})
        entries = [at.stage for at in self.drawn[name] if at.way == "to_teacher"]
        if not entries:
            return bridged, {}
        return bridged, self.teachers[name].finish([bridged[k - 1] for k in entries], entries)

    def _cross(self, aside: Any, teacher: str, features: Mapping[Crossing, Tensor]) -> list[Tensor]:
        """Over the bridges: as a module, since `terms` are this step's call of the engine."""
        if not features:
            return []
        device = next(iter(features.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=aside.torch_autocast_enabled()):
            return aside.module(features=features, teacher=teacher)

    def _kd(self, logits: Tensor, taught: Tensor) -> Tensor:
        return losses.kd(logits, taught, temperature=self.settings.temperature)


def check_cnns(settings: config.FCFD, *models: Stages) -> None:
    """Raise ValueError, in one sentence, where FCFD is not defined between these models."""
    for stages in models:
        if not (stages.convolutional or settings.tokens):
            raise ValueError(
                f"--control fcfd is defined between CNNs, and {type(stages.model).__name__} is none: use another, or "
                "--method.fcfd.tokens for our reading of what FBT's appendix compares with."
            )


def _maps(features: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    return [to_map(feature, layout) for feature, layout in zip(features, layouts, strict=True)]


def _sum(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values).sum() if values else torch.zeros((), device=like.device)
