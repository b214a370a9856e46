"""CRD: pooled features against a memory of all samples'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetero_kt import config
from hetero_kt.data.device import moved
from hetero_kt.data.order import Order
from hetero_kt.methods.objectives.objective import Evolving, Teachers, Terms
from hetero_kt.nn import losses
from hetero_kt.nn.losses.memory import Memory, Negatives, Sides
from hetero_kt.nn.losses.precision import Projection
from hetero_kt.nn.stages import Stages

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


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
        self.rows = moved(order.rows(step)[1], torch.device(self.device))
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
