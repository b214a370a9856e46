"""Contrastive distillation against a memory of all training samples.

Shape suffixes: B rows of a batch, D width of an embedding, S samples in memory, N negatives of a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hetero_kt.evaluate import gather_rows, sum_over_ranks, world
from hetero_kt.nn.losses.precision import wide


def crd(scores_B1N: Tensor, samples: int, log_z: Tensor | float = 0.0) -> Tensor:
    """One side of contrastive representation distillation (Tian et al. 2020, arXiv 1910.10699), mean over the rows:

        - log h(s_0) - sum_n log (1 - h(s_n)),    h(s) = e^s / Z / (e^s / Z + N / S)

    s are cosines / temperature of a row's embedding with its own sample's in the other model's memory (s_0) and with
    those of N other classes' samples. The paper has no Z, that is `log_z` 0; the public code's Z makes h(s) a guess of
    1 / (1 + N) where nothing is known, and its published weight of 0.8 goes with that.
    """
    odds = wide(scores_B1N) - log_z - math.log((scores_B1N.shape[1] - 1) / samples)
    right, wrong = F.logsigmoid(odds[:, 0]), F.logsigmoid(-odds[:, 1:]).sum(-1)
    return -(right + wrong).mean()


class Negatives:
    """Draws samples of other classes than a row's own, each as likely as any other, with replacement.

    Args:
        labels_S: the class of every training sample.

    Raises:
        ValueError: all samples are of one class.
    """

    def __init__(self, labels_S: Tensor, device: torch.device | str = "cpu") -> None:
        counts = labels_S.bincount()
        if int(counts.max()) == len(labels_S):
            raise ValueError("--control crd contrasts samples of several classes, and the data has one: use another.")
        self.labels_S, self.counts = labels_S.to(device), counts.to(device)
        self.by_class_S = labels_S.argsort(stable=True).to(device)
        self.first = (counts.cumsum(0) - counts).to(device)

    def draw(self, rows_B: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """(B, number) samples of other classes than those of the samples `rows_B`."""
        own = self.labels_S[rows_B].unsqueeze(-1)
        bits = torch.randint(2**48, (len(rows_B), number), generator=generator, device=rows_B.device)
        place = bits % (len(self.labels_S) - self.counts[own])
        return self.by_class_S[place + self.counts[own] * (place >= self.first[own])]


class Sides(NamedTuple):
    """A student's and a teacher's embeddings, each of unit length: of a batch (B, D), or of all samples (S, D)."""

    student: Tensor
    teacher: Tensor


class Memory:
    """The embeddings of every training sample, student's and teacher's, as they were when it was last seen.

    Every rank holds all of it. It is written between steps, with the rows of all ranks, so that neither their number
    nor that of micro-batches changes what is in it.

    Args:
        momentum: of the old embedding, in the mean with the new one (brought back to unit length).
    """

    @staticmethod
    def bytes(samples: int, width: int) -> int:
        """What one takes on every rank."""
        return 2 * 4 * samples * width

    def __init__(self, samples: int, width: int, momentum: float, seed: int, device: torch.device | str = "cpu"):
        self.momentum = momentum
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3 / width)  # as in the public code: about unit length
        first = (bound * (2 * torch.rand(2, samples, width, generator=generator) - 1)).to(device)
        self.sides = Sides(first[0], first[1])
        self.log_z = Sides(*torch.zeros(2, device=device))
        self.scaled = False
        """Whether the public code's Z is known yet."""

    def scores(self, seen: Sides, candidates_B1N: Tensor, temperature: float) -> Sides:
        """Cosines / temperature (B, 1 + N) of a batch's embeddings with the other side's memory of `candidates`."""

        def one(own_BD: Tensor, memory_SD: Tensor) -> Tensor:
            with torch.autocast(own_BD.device.type, enabled=False):
                return (wide(own_BD) @ memory_SD.T).gather(1, candidates_B1N) / temperature

        return Sides(one(seen.student, self.sides.teacher), one(seen.teacher, self.sides.student))

    def scale(self, scores: Sides, samples: int) -> None:
        """Set Z, once, to the mean of e^s over these scores and all ranks, times `samples`. Collective."""
        if self.scaled:
            return
        means = torch.stack([side.detach().exp().mean() for side in scores])
        means = sum_over_ranks(means) / world()
        self.log_z, self.scaled = Sides(*(means * samples).log()), True

    @torch.no_grad()
    def write(self, rows_B: Tensor, seen: Sides) -> None:
        """Take in the embeddings of the samples `rows_B` of this rank, and those of all others. One that is not
        finite leaves its sample as it was. Collective."""
        rows, both = gather_rows(rows_B), gather_rows(torch.stack([wide(side) for side in seen], dim=1))
        for memory_SD, new_BD in zip(self.sides, both.unbind(1), strict=True):
            old_BD = memory_SD[rows]
            mean_BD = self.momentum * old_BD + (1 - self.momentum) * new_BD
            finite_B1 = new_BD.isfinite().all(-1, keepdim=True)  # else a sample would be lost for good
            memory_SD[rows] = torch.where(finite_B1, F.normalize(mean_BD, dim=-1, eps=1e-6), old_BD)

    def state_dict(self) -> dict[str, Tensor]:
        """Equal on all ranks."""
        state = {"student": self.sides.student, "teacher": self.sides.teacher, "log_z": torch.stack(list(self.log_z))}
        return state | {"scaled": torch.tensor(self.scaled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.sides.student.copy_(state["student"])
        self.sides.teacher.copy_(state["teacher"])
        self.log_z = Sides(*state["log_z"].to(self.sides.student.device))
        self.scaled = bool(state["scaled"])
