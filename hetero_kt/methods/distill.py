"""Distillation: a student learns from its labels and from frozen teachers.

What a teacher says enters through an *objective* (`hetero_kt.methods.objectives`): terms that are added to the
student's own cross-entropy. Some objectives train something of their own beside the student, which is dropped when
training ends: OFA's branches, FitNet's projections, FCFD's bridges, CRD's embeddings, USKD's head, FBT's connector
(`hetero_kt.methods.fbt`). It has an engine of its own, and one backward of the one summed loss goes through all of
them. Two objectives, TfKD's usual form and USKD, have no teacher at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_kt.distributed.learner import Learner
from hetero_kt.methods.objectives import Evolving, Objective, Terms
from hetero_kt.models.stored import Stored
from hetero_kt.profile import part


class Distillation:
    """A student and its frozen teachers: the method that the trainer runs.

    Args:
        learners: the student first, then what the objective trains beside it.
        label_smoothing, label_weight: of the student's own cross-entropy.
        stored: those of the objective's teachers whose logits come from disk.
    """

    def __init__(
        self,
        learners: dict[str, Learner],
        objective: Objective,
        label_smoothing: float = 0.0,
        label_weight: float = 1.0,
        stored: Sequence[Stored] = (),
    ) -> None:
        self.learners, self.objective = learners, objective
        self.label_smoothing, self.label_weight, self.stored = label_smoothing, label_weight, stored
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
        for teacher in self.stored:
            teacher.begin(step)
        engine = self.student.engine
        rows = engine.train_micro_batch_size_per_gpu()
        pieces = list(zip(*(tensor.split(rows) for tensor in batches[self.name]), strict=True))
        log: dict[str, Tensor] = {}
        for i, (pictures, labels) in enumerate(pieces):
            with part("forward"):
                terms = self.terms(pictures, labels)
            with part("backward"):
                # One for all engines, of one loss, through the student's: it divides by the number of pieces once.
                engine.backward(torch.stack(list(terms.values())).sum())
            for name, value in terms.items():
                log[name] = log.get(name, 0.0) + value.detach() / len(pieces)
            if i + 1 < len(pieces):
                for learner in self.learners.values():
                    learner.engine.step()  # an empty one, which only counts
        with part("optimizer"):
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
