"""FCFD's bridges: from a stage of one model to the place of the same stage in another (Liu et al. 2023, ICLR).

A feature that has crossed a bridge goes on through the later stages of the other model, which shows what it is good for
there and not only what it looks like.

Shape suffixes: B rows, C channels, H x W grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from hetero_kt.nn.stages import Layout, Stages, from_map, resized, to_map

Way = Literal["to_teacher", "to_student"]


class Crossing(NamedTuple):
    """Where a path changes from one model to the other: stages 1 to `stage` are of the model that it comes from."""

    way: Way
    stage: int


CROSSINGS = tuple(Crossing(way, stage) for way in ("to_student", "to_teacher") for stage in (1, 2, 3))
"""The six mixed paths between two models of four stages."""


class Bridge(nn.Module):
    """A 3x3 convolution and a BatchNorm, as the public code has them; LeakyReLU of slope 0.1 where the stage in whose
    place the feature is put ends in a ReLU.

    The convolution has stride 2 where the grid halves, and is a transposed 4x4 one where it doubles. Any other change
    of the grid, which the public code does not know, is done before it by averaging or interpolating. Tokens count as
    the map that they are patches of.
    """

    def __init__(self, into: Layout, out: Layout, rectified: bool) -> None:
        super().__init__()
        self.into, self.out = into, out
        (rows, columns), channels = into.grid, (into.channels, out.channels)
        self.resizes = False
        if out.grid == into.grid:
            self.cross: nn.Module = nn.Conv2d(*channels, 3, padding=1, bias=False)
        elif out.grid == (-(-rows // 2), -(-columns // 2)):
            self.cross = nn.Conv2d(*channels, 3, stride=2, padding=1)
        elif out.grid == (2 * rows, 2 * columns):
            self.cross = nn.ConvTranspose2d(*channels, 4, stride=2, padding=1)
        else:
            self.resizes = True
            self.cross = nn.Conv2d(*channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out.channels)
        self.rectify: nn.Module = nn.LeakyReLU(0.1) if rectified else nn.Identity()
        if isinstance(self.cross, nn.Conv2d):  # the public code leaves transposed ones as torch does
            nn.init.kaiming_normal_(self.cross.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, feature: Tensor) -> Tensor:
        """A feature in layout `into` -> one in layout `out` without class tokens."""
        map_BCHW = to_map(feature, self.into).to(self.norm.weight.dtype)
        if self.resizes:
            map_BCHW = resized(map_BCHW, self.out.grid)
        return from_map(self.rectify(self.norm(self.cross(map_BCHW))), self.out)

    def untouched(self) -> Tensor:
        """0, with gradients of 0 for all parameters."""
        parameter = self.norm.weight
        zeros = parameter.new_zeros(2, self.into.channels, 2, 2)  # a BatchNorm wants more than one number a channel
        return 0 * self.norm(self.cross(zeros)).sum()


class Bridges(nn.Module):
    """All bridges between a student and one or several teachers, which are trained and dropped afterwards: to a teacher
    behind each stage, since what crosses is compared there too, and to the student behind all but the last."""

    def __init__(self, student: Stages, teachers: Mapping[str, Stages]) -> None:
        super().__init__()
        self.to_teacher, self.to_student = nn.ModuleDict(), nn.ModuleDict()
        for name, teacher in teachers.items():
            ours, theirs = student.layouts, teacher.layouts
            self.to_teacher[name] = nn.ModuleList(
                Bridge(ours[k], theirs[k], teacher.rectified[k]) for k in (0, 1, 2, 3)
            )
            self.to_student[name] = nn.ModuleList(Bridge(theirs[k], ours[k], student.rectified[k]) for k in (0, 1, 2))

    def forward(
        self,
        features: Mapping[Crossing, Tensor] | None = None,
        teacher: str = "",
        terms: Mapping[str, Tensor] | None = None,
        unused: Mapping[str, list[Crossing]] | None = None,
    ) -> Any:
        """Features in front of bridges -> a list of them behind, between the student and `teacher`. Or `terms` as they
        are, where the bridges that are `unused` get gradients of 0: ZeRO-3 takes the last step's for those that have
        none."""
        if features is not None:
            return [self._bridge(teacher, at)(feature) for at, feature in features.items()]
        assert terms is not None
        rest = [self._bridge(name, at).untouched() for name, ats in (unused or {}).items() for at in ats]
        first, *others = terms
        return {
            first: terms[first] + torch.stack(rest).sum() if rest else terms[first],
            **{n: terms[n] for n in others},
        }

    def _bridge(self, teacher: str, at: Crossing) -> Bridge:
        bridge = getattr(self, at.way)[teacher][at.stage - 1]
        assert isinstance(bridge, Bridge)
        return bridge
