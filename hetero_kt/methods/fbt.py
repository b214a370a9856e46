"""FBT (fuse before transfer, arXiv 2410.12342): a fused model stands between teacher and student, and teaches too.

The fused model is the front of one model (stages 1 to 3), the connector L2G, and the end of the other (stage 4 and
classifier). With K = {pooled final feature, logits} of teacher, student and fused model,

    L_FBT = L(K_t, K_s) + L(K_t, K_f) + L(K_f, K_s),    L(K_i, K_j) = L_InfoNCE + L_OFA,    i teaches j

and the student has its labels besides. Only L2G, the temperatures and projections are new: they are the fused engine.
Borrowed stages stay in the engine that owns them and are called through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_kt import config
from hetero_kt.methods.objectives import Teachers, Terms
from hetero_kt.nn import losses
from hetero_kt.nn.fused import L2G, Fused, Route, route
from hetero_kt.nn.losses import InfoNCE
from hetero_kt.nn.stages import Stages
from hetero_kt.profile import part

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Knowledge(NamedTuple):
    """What one model knows of a batch."""

    pooled: Tensor
    """(B, width): the final feature, averaged over its places as the classifier reads it."""
    logits: Tensor
    """(B, K)."""

    def detach(self) -> Knowledge:
        return Knowledge(self.pooled.detach(), self.logits.detach())


class Pair(NamedTuple):
    """One term L(K_i, K_j)."""

    name: str
    """`<i>_to_<j>`, as it is logged."""
    teaching: str
    learning: str


class FBT:
    """The objective of FBT, with any number of teachers, each of which has a fused model of its own.

    Args:
        temperature: of the pair objective `kd`.

    Raises:
        ValueError: a pair of models that this form of the fused model does not exist for.
    """

    name = "fused"

    def __init__(self, settings: config.FBT, student: Stages, teachers: Teachers, temperature: float = 4.0) -> None:
        self.settings, self.teachers, self.temperature = settings, teachers, temperature
        self.routes: dict[str, Route] = {}
        self.fused = {name: "fused" if len(teachers) == 1 else f"fused_{name}" for name in teachers}
        self.pairs: list[Pair] = []
        connectors, contrasts = {}, {}
        for name, teacher in teachers.items():
            way = route(student, teacher.stages)
            front, tail = ({"student": student, "teacher": teacher.stages}[owner] for owner in (way.front, way.tail))
            pairs = _pairs(settings, name, self.fused[name])
            if settings.fused_labels or any(self.fused[name] in pair for pair in pairs):
                self.routes[name] = way
                connectors[name] = connect(front, tail, settings)
                if not _trained(settings):  # as it starts, it stays: not even decay moves it
                    connectors[name].requires_grad_(False)
            if settings.pair.startswith("infonce"):
                widths = {"student": student.width, name: teacher.stages.width, self.fused[name]: tail.width}
                for pair in pairs:
                    learning, teaching = widths[pair.learning], widths[pair.teaching]
                    contrasts[pair.name] = InfoNCE(learning, teaching, tail.width, gather=settings.gather)
            self.pairs += pairs
        self.aside: Fused | None = Fused(connectors, contrasts) if connectors or contrasts else None
        if connectors and not contrasts and not _trained(settings):
            raise ValueError(
                f"--method.fbt.terms {' '.join(settings.terms)} with --method.fbt.pair {settings.pair} trains nothing "
                "of the fused model: add teacher_fused, --method.fbt.fused-labels or --method.fbt.no-detach."
            )

    def __call__(self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, labels: Tensor) -> tuple[Tensor, Terms]:
        knowledge, fronts = {}, {}
        for name, teacher in self.teachers.items():
            known = teacher(pictures)
            knowledge[name] = Knowledge(known["pooled"], known["logits"])
            if name in self.routes and self.routes[name].front == "teacher":
                fronts[name] = known["stages"][2]
            del known  # the other stages' features are large, and the student comes yet
        knowledge |= self._student_and_fused(student, aside, pictures, fronts)

        terms: Terms = {}
        features = {}
        for pair in self.pairs:
            teaching, learning = knowledge[pair.teaching], knowledge[pair.learning]
            if self.settings.detach:
                teaching = teaching.detach()
            features[pair.name] = (learning.pooled, teaching.pooled)
            if self.settings.pair.endswith("ofa"):
                taught = losses.ofa(learning.logits, teaching.logits, labels, gamma=self.settings.gamma)
                terms[f"{pair.name}/ofa_loss"] = taught
            elif self.settings.pair == "kd":
                taught = losses.kd(learning.logits, teaching.logits, temperature=self.temperature)
                terms[f"{pair.name}/kd_loss"] = taught
        if self.settings.fused_labels:
            for name in self.routes:
                fused = self.fused[name]
                terms[f"{fused}/loss"] = F.cross_entropy(knowledge[fused].logits.float(), labels)
        if aside is not None:
            # All terms pass through the engine, whose backward opens where its outputs are: in front of everything.
            terms = aside(terms=terms, pairs=features if self.settings.pair.startswith("infonce") else {})
        return knowledge["student"].logits, terms

    def _student_and_fused(
        self, student: DeepSpeedEngine, aside: Any, pictures: Tensor, fronts: dict[str, Tensor]
    ) -> dict[str, Knowledge]:
        """The student's knowledge and every fused model's.

        Where the teacher is the front, its feature is there before the student runs. So the student's last stage takes
        its own feature and the connectors' within one forward of the student, in which ZeRO-3 holds the student's class
        token together.
        """
        to_teacher = [name for name, way in self.routes.items() if way.tail == "teacher"]
        after = 3 if self.settings.last_stage else 4

        tails = self._connected(aside, fronts)
        own = student(pictures, features=True, tail=list(tails.values()) or None, after=after)
        knowledge = {"student": Knowledge(own["pooled"], own["logits"])}
        if tails:
            for name, pooled, logits in zip(tails, own["tail_pooled"], own["tail_logits"], strict=True):
                knowledge[self.fused[name]] = Knowledge(pooled, logits)

        tails = self._connected(aside, dict.fromkeys(to_teacher, own["stages"][2]))
        for name in to_teacher:
            answer = self.teachers[name].finish(tails[name], after)
            knowledge[self.fused[name]] = Knowledge(answer["tail_pooled"], answer["tail_logits"])
        return knowledge

    def _connected(self, aside: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Through the connectors, each by itself: `terms` are this step's call of the engine, and ZeRO-3, which begins
        its order of gathering at every call of the whole, would never learn one from two calls in a step."""
        if not features:
            return {}
        device = next(iter(features.values())).device.type
        with part("adapter"), torch.autocast(device, torch.bfloat16, enabled=aside.torch_autocast_enabled()):
            return {name: aside.module.connectors[name](feature) for name, feature in features.items()}


def _trained(settings: config.FBT) -> bool:
    """Whether anything teaches the fused model."""
    teaching = "fused_student" in settings.terms and not settings.detach
    return settings.fused_labels or "teacher_fused" in settings.terms or teaching


def _pairs(settings: config.FBT, teacher: str, fused: str) -> list[Pair]:
    roles = {"teacher": teacher, "fused": fused, "student": "student"}
    ends = [[roles[role] for role in term.split("_")] for term in settings.terms]
    return [Pair(f"{teaching}_to_{learning}", teaching, learning) for teaching, learning in ends]


def connect(front: Stages, tail: Stages, settings: config.FBT) -> L2G:
    """The connector between the third stage of one model and the last of another.

    Raises:
        ValueError: without `last_stage`, a receiving model whose classifier reads a class token, which would then have
            met no patch.
    """
    ends_in = tail.layouts[3]
    if not settings.last_stage and ends_in.prefix:
        raise ValueError(
            f"--method.fbt.no-last-stage does not suit {type(tail.model).__name__}, whose classifier reads a class "
            "token: use a model that averages its patches, or keep the last stage."
        )
    width = 0 if settings.last_stage else ends_in.channels
    return L2G(front.layouts[2], tail.layouts[2], settings.block, width)
