"""FBT's fused model (arXiv 2410.12342): the front of one model, a small connector, the end of the other.

The fused model consists of borrowed stages, which stay where they are, and of `L2G`, the only new part of it: it leads
the local features of a CNN's third stage to the global ones that the last stage of an MSA/MLP model takes in.

Shape suffixes: B rows, C channels in, D channels out, H x W and h x w grids, N = h * w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hetero_kt.nn.losses.contrast import InfoNCE
from hetero_kt.nn.stages import Layout, Stages, from_map, resized, to_map

HEAD_WIDTH = 32
WINDOW = 7

Owner = Literal["student", "teacher"]


@dataclass(frozen=True)
class Route:
    """Whose stages the fused model borrows."""

    front: Owner
    """Stages 1 to 3."""
    tail: Owner
    """Stage 4 and classifier."""


def route(student: Stages, teacher: Stages) -> Route:
    """Eq. 1: CNN first, MSA/MLP last, whichever of the two teaches. Eq. 2, within one class: student first."""
    if teacher.convolutional and not student.convolutional:
        return Route("teacher", "student")
    return Route("student", "teacher")


class L2G(nn.Module):
    """Patch embedding (a 1x1 convolution from C to D channels and a LayerNorm), then one attention block.

    C * D + 9 * D^2 weights where the block has an MLP of ratio 2 and is followed by a D x D map, which is what the
    appendix's Table 6 counts, at the grid of the receiving stage (14x14 at 224 pixels).

    Args:
        into: layout of the incoming feature, a third stage's.
        out: layout that the receiving last stage expects: its own model's third stage's.
        block: `swin` (window 7, not shifted), `vit`, or `none` for the patch embedding alone.
        width: channels to end with where the receiving stage is left out; 0: those of `out`.
    """

    def __init__(self, into: Layout, out: Layout, block: str = "swin", width: int = 0) -> None:
        super().__init__()
        self.into, self.out = into, out
        self.embed = nn.Conv2d(into.channels, out.channels, 1)
        self.norm = nn.LayerNorm(out.channels)
        self.block: nn.Module | None = None
        heads = _heads(out.channels)
        if block == "swin":
            self.block = SwinTransformerBlock(out.channels, out.grid, heads, window_size=WINDOW, mlp_ratio=2.0)
        elif block == "vit":
            self.block = Block(out.channels, heads, mlp_ratio=2.0, qkv_bias=True)
        self.by_windows = block == "swin"
        self.project = nn.Linear(out.channels, out.channels) if self.block is not None else None
        self.widen = nn.Linear(out.channels, width) if width not in (0, out.channels) else None

    def forward(self, feature: Tensor) -> Tensor:
        """A feature in layout `into` -> one in layout `out` without class tokens."""
        map_BCHW = resized(to_map(feature, self.into).to(self.embed.weight.dtype), self.out.grid)
        x_BhwD = self.norm(self.embed(map_BCHW).permute(0, 2, 3, 1))
        if self.block is not None and self.project is not None:
            if self.by_windows:
                x_BhwD = self.block(x_BhwD)
            else:
                x_BhwD = self.block(x_BhwD.flatten(1, 2)).view(x_BhwD.shape)
            x_BhwD = self.project(x_BhwD)
        if self.widen is not None:
            x_BhwD = self.widen(x_BhwD)
        return from_map(x_BhwD.permute(0, 3, 1, 2), self.out)


def _heads(width: int) -> int:
    """Heads of about 32 channels that divide the width."""
    return next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)


class Fused(nn.Module):
    """What FBT trains beside the student and drops afterwards: the connectors to every teacher, and the temperatures
    and projections of the contrastive terms. Borrowed stages are not in it."""

    def __init__(self, connectors: Mapping[str, L2G], contrasts: Mapping[str, InfoNCE]) -> None:
        super().__init__()
        self.connectors = nn.ModuleDict(connectors)
        self.contrasts = nn.ModuleDict(contrasts)

    def no_weight_decay(self) -> set[str]:
        """timm's optimizers ask: a temperature is no weight."""
        return temperatures(self)

    def forward(self, terms: Mapping[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """`terms` as they are, with the contrastive ones of `pairs`: by name, the pooled features (B, width) of the
        learner and of the teaching side."""
        contrasts = {
            f"{name}/infonce_loss": self.contrasts[name](learning, teaching)
            for name, (learning, teaching) in pairs.items()
        }
        return {**terms, **contrasts}


def temperatures(module: nn.Module) -> set[str]:
    """Names of the learned temperatures in `module`."""
    return {name for name, _ in module.named_parameters() if name.endswith("log_scale")}


def macs(connector: L2G) -> int:
    """Multiply-accumulates of a connector's linear and convolution layers for one picture: their weights, each
    applied at every place of the receiving grid (Table 6's way to count)."""
    places = math.prod(connector.out.grid)
    weights = (m.weight for m in connector.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return places * sum(weight.numel() for weight in weights)
