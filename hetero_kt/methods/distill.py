"""Distillation: a student learns from its labels and from frozen teachers.

What a teacher says enters through an *objective*: terms that are added to the student's own cross-entropy. Some
objectives train something of their own beside the student, which is dropped when training ends: OFA's branches,
FitNet's projections, CRD's embeddings, USKD's head, FBT's connector (`hetero_kt.methods.fbt`). It has an engine of its
own, and one backward of the one summed loss goes through all of them. Two objectives, TfKD's usual form and USKD, have
no teacher at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import config
from hetero_kt.data.order import Order
from hetero_kt.distributed.learner import Learner
from hetero_kt.models.teacher import Frozen
from hetero_kt.nn import losses
from hetero_kt.nn.branches import Branches
from hetero_kt.nn.fused import temperatures
from hetero_kt.nn.losses.memory import Memory, Negatives, Sides
from hetero_kt.nn.losses.precision import Projection
from hetero_kt.nn.stages import Layout, Stages, to_map

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


class Evolving:
    """An objective that is not the same at every step."""

    def begin(self, step: int) -> None:
        """Before the forwards of optimizer step `step`."""

    def finish(self) -> None:
        """After that step. Collective."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot know, equal on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


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


class RKD:
    """Relations between the pooled features of a micro-batch's rows (Park et al. 2019):
    L = CE + distance * L_D + angle * L_A."""

    name, aside = "", None

    def __init__(self, settings: config.RKD, teachers: Teachers) -> None:
        self.settings, self.teachers = settings, teachers

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        own = student(pictures, features=True)
        terms = {}
        for name, teacher in self.teachers.items():
            ours, theirs = own["pooled"], teacher(pictures)["pooled"]
            for kind, weight, loss in (
                ("distance", self.settings.distance, losses.rkd_distance),
                ("angle", self.settings.angle, losses.rkd_angle),
            ):
                if weight:  # angles cost the cube of the rows
                    terms[f"{name}_to_student/{kind}_loss"] = weight * loss(ours, theirs)
        return own["logits"], terms


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
        self.risen = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0

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
    """Normalised probabilities (Yang et al. 2023): L = CE + L_NKD. (MergeNet's authors left the CE out.)"""

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


class Drawn(NamedTuple):
    """Which training samples a run draws."""

    order: Order
    labels: Tensor
    """(S,): the class of every one."""
    seed: int


class CRD(Evolving):
    """Contrast with a memory of every sample (Tian et al. 2020): L = CE + weight * (L_student + L_teacher), where each
    side's embedding has to find its sample's of the other side among negatives of other classes.

    A mixed or replaced picture counts as the sample that was drawn.

    Args:
        drawn: None only where nothing will be trained.
    """

    name = "embeddings"

    def __init__(
        self,
        settings: config.CRD,
        student: Stages,
        teachers: Teachers,
        drawn: Drawn | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.teachers, self.drawn, self.device = settings, teachers, drawn, device
        self.aside = _Embeddings(student.width, {n: t.stages.width for n, t in teachers.items()}, settings.width)
        self.memories: dict[str, Memory] = {}
        if drawn is not None:
            size = len(drawn.labels)
            self.negatives = Negatives(drawn.labels, device)
            for i, name in enumerate(teachers):
                self.memories[name] = Memory(size, settings.width, settings.momentum, drawn.seed + i, device)

    def begin(self, step: int) -> None:
        assert self.drawn is not None
        order = self.drawn.order
        self.rows = torch.from_numpy(order.rows(step)[1]).to(self.device)
        self.used = 0
        self.seen: dict[str, list[Tensor]] = {name: [] for name in self.teachers}
        seed = (self.drawn.seed * 1_000_003 + step) * order.world + order.rank
        self.generator = torch.Generator(self.device).manual_seed(seed % 2**63)

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        s = self.settings
        own = student(pictures, features=True)
        embedded = aside(own["pooled"], {name: teacher(pictures)["pooled"] for name, teacher in self.teachers.items()})
        rows = self.rows[self.used : self.used + len(pictures)]
        self.used += len(pictures)
        candidates = torch.cat([rows.unsqueeze(-1), self.negatives.draw(rows, s.negatives, self.generator)], dim=1)
        terms = {}
        for name, memory in self.memories.items():
            self.seen[name].append(embedded[name].detach())
            scores = memory.scores(Sides(*embedded[name]), candidates, s.temperature)
            samples = len(memory.sides.student)
            if s.public:
                memory.scale(scores, samples)
            sides = [losses.crd(one, samples, log_z) for one, log_z in zip(scores, memory.log_z, strict=True)]
            terms[f"{name}_to_student/crd_loss"] = s.weight * torch.stack(sides).sum()
        return own["logits"], terms

    def finish(self) -> None:
        for name, memory in self.memories.items():
            memory.write(self.rows, Sides(*torch.cat(self.seen[name], dim=1)))

    def state_dict(self) -> dict[str, Any]:
        return {name: memory.state_dict() for name, memory in self.memories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, memory in self.memories.items():
            memory.load_state_dict(state[name])


class _Embeddings(nn.Module):
    """Linear maps of both sides' pooled features to one width, one pair for each teacher."""

    def __init__(self, student: int, teachers: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.student = nn.ModuleDict({name: Projection(student, width) for name in teachers})
        self.teacher = nn.ModuleDict({name: Projection(theirs, width) for name, theirs in teachers.items()})

    def forward(self, own: Tensor, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By teacher: the student's embeddings and the teacher's, of unit length (2, B, width)."""
        found = {}
        for name, theirs in known.items():
            both = torch.stack([self.student[name](own), self.teacher[name](theirs)])
            found[name] = F.normalize(both, dim=-1, eps=1e-6)
        return found


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
        label_smoothing, label_weight: of the student's own cross-entropy.
    """

    def __init__(
        self,
        learners: dict[str, Learner],
        objective: Objective,
        label_smoothing: float = 0.0,
        label_weight: float = 1.0,
    ) -> None:
        self.learners, self.objective = learners, objective
        self.label_smoothing, self.label_weight = label_smoothing, label_weight
        self.evolving = objective if isinstance(objective, Evolving) else Evolving()
        self.name, *asides = learners
        self.student = learners[self.name]
        self.aside = learners[asides[0]] if asides else None
        self.models: tuple[str, ...] = (self.name,)

    def step(self, step: int, batches: Mapping[str, Any]) -> dict[str, Tensor]:
        """One optimizer step of the student and of what is trained beside it; `{name: scalar}` on the device."""
        for learner in self.learners.values():
            learner.begin(step)
        self.evolving.begin(step)
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
        self.evolving.finish()
        log["total_loss"] = torch.stack(list(log.values())).sum()
        return log

    def terms(self, pictures: Tensor, labels: Tensor) -> Terms:
        """Every term of the loss of one micro-batch."""
        aside = None if self.aside is None else self.aside.engine
        dtype = next(self.student.engine.module.parameters()).dtype
        logits, terms = self.objective(self.student.engine, aside, pictures.to(dtype), labels)
        own = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        return {f"{self.name}/loss": self.label_weight * own, **terms}

    def state_dict(self) -> dict[str, Any]:
        """The objective's: learners are saved with their engines, and teachers never change."""
        return self.evolving.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.evolving.load_state_dict(state)

    def measured(self) -> dict[str, Any]:
        return {}
