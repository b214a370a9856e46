"""Where the four stages of each family of timm's classification models lie.

One rule per timm class, none per model name. A rule names the modules in front of the blocks (the stem), the
modules that hold the blocks and those behind the last block, and adds what some families do between them:
class tokens and position embeddings, a relative position bias that all blocks share, two heads.

Shape suffixes: B pictures, L tokens (prefix tokens first), C channels, H x W the feature's grid, D the width of
the pooled feature, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from timm.models.beit import Beit
from timm.models.byobnet import ByobNet
from timm.models.convnext import ConvNeXt
from timm.models.cspnet import CspNet
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.fastvit import FastVit
from timm.models.hgnet import HighPerfGpuNet
from timm.models.maxxvit import ConvNeXtBlock, MaxxVit, MbConvBlock
from timm.models.metaformer import MetaFormer, Pooling, SepConv
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Form = Literal["NCHW", "NHWC", "NLC"]
Parts = list[list[nn.Module]]


@dataclass(frozen=True)
class Family:
    """A hierarchical model whose stages are modules of their own, in one container or under names.

    Down-sampling stands first in the stage that it feeds, as timm builds it. In a container stages end where
    `feature_info` says that a resolution ends; of more than four resolutions the first ones are stage 1.
    """

    stem: tuple[str, ...]
    """Modules in front of the blocks; they belong to stage 1."""
    blocks: str | tuple[str, ...]
    close: tuple[str, ...] = ()
    """Modules between the last block and the model's own `forward_head`."""
    form: Form = "NCHW"
    local: bool = True
    """Stage 3 is convolutional, or as local as a convolution."""

    def convolutional(self, model: nn.Module) -> bool:
        return self.local

    def parts(self, model: nn.Module) -> Parts:
        """The modules of the four stages, in the order in which they run.

        Raises ValueError for a model with too few of them.
        """
        stem = [model.get_submodule(name) for name in self.stem]
        first, *others = self.groups(model)
        return [stem + first, *others]

    def groups(self, model: Any) -> Parts:
        if not isinstance(self.blocks, str):
            return [[model.get_submodule(name)] for name in self.blocks]
        modules = list(model.get_submodule(self.blocks).children())
        taps = [info["module"] for info in model.feature_info]
        ends = [end for end in range(1, len(modules)) if f"{self.blocks}.{end - 1}" in taps]
        groups = [modules[start:end] for start, end in pairwise([0, *ends, len(modules)])]
        if len(groups) < 4:
            raise ValueError(f"{len(groups)} stages are too few: four are needed")
        return _last_four(groups)

    def embed(self, model: Any, x: Tensor) -> Tensor:
        """What the model does to pictures with parameters of its own, before the stem's modules."""
        return x

    def run(self, model: Any, part: Sequence[nn.Module], x: Tensor) -> Tensor:
        for module in part:
            x = module(x)
        return x

    def prefix(self, model: Any) -> list[Tensor]:
        """Class and register tokens (1, n, C), in the model's order."""
        return []

    def head(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 4's feature -> (pooled (B, D), logits (B, K))."""
        for name in self.close:
            x = model.get_submodule(name)(x)
        # In every family the last thing before the classifier is the head's dropout, so that both results
        # come from one draw of it.
        pooled_BD = model.forward_head(x, pre_logits=True)
        classifier = model.get_classifier()
        if isinstance(classifier, nn.Conv2d):
            return pooled_BD, classifier(pooled_BD[:, :, None, None]).flatten(1)
        return pooled_BD, classifier(pooled_BD)


class _ByFeatureInfo(Family):
    """Blocks in more groups than resolutions: stages end where timm's `feature_info` says a resolution ends."""

    def groups(self, model: Any) -> Parts:
        ends = [0, *(info["stage"] for info in model.feature_info if info["stage"] > 0)]  # 0 is the stem
        groups = [
            [block for sequence in model.blocks[start:end] for block in sequence] for start, end in pairwise(ends)
        ]
        groups = _last_four(groups)
        while len(groups) < 4:
            # The deepest of the longest groups becomes two.
            longest = max(range(len(groups)), key=lambda i: (len(groups[i]), i))
            if len(groups[longest]) < 2:
                raise ValueError(f"{sum(map(len, groups))} blocks are too few: four are needed")
            groups[longest : longest + 1] = evenly(groups[longest], 2)
        return groups


class _Isotropic(Family):
    """One resolution: the blocks in four parts, as even as possible."""

    def groups(self, model: nn.Module) -> Parts:
        assert isinstance(self.blocks, str)
        blocks = list(model.get_submodule(self.blocks).children())
        if len(blocks) < 4:
            raise ValueError(f"{len(blocks)} blocks are too few: four are needed")
        return evenly(blocks, 4)


class _VisionTransformer(_Isotropic):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        x_BLC = model._pos_embed(model.patch_embed(x))  # tokens and positions, and their dropout
        return model.norm_pre(model.patch_drop(x_BLC))

    def prefix(self, model: Any) -> list[Tensor]:
        return [token for token in (model.cls_token, model.reg_token) if token is not None]

    def groups(self, model: Any) -> Parts:
        if not isinstance(model.patch_drop, nn.Identity):
            raise ValueError("patch_drop_rate takes tokens out of the grid: set it to 0")
        return super().groups(model)


class _DistilledTransformer(_VisionTransformer):
    """Class and distillation token, each with its classifier: pooled and logits are the means of the two."""

    def groups(self, model: Any) -> Parts:
        if model.distilled_training:
            raise ValueError("distilled_training makes it answer with two logits: set it off")
        return super().groups(model)

    def prefix(self, model: Any) -> list[Tensor]:
        return [model.cls_token, model.dist_token]

    def head(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x_BLC = model.norm(x)
        token_BD, distilled_BD = model.head_drop(x_BLC[:, 0]), model.head_drop(x_BLC[:, 1])
        logits_BK = (model.head(token_BD) + model.head_dist(distilled_BD)) / 2
        return (token_BD + distilled_BD) / 2, logits_BK


class _Beit(_Isotropic):
    def embed(self, model: Any, x: Tensor) -> Tensor:
        x_BLC = model.patch_embed(x)
        x_BLC = torch.cat((model.cls_token.expand(x_BLC.shape[0], -1, -1), x_BLC), dim=1)
        if model.pos_embed is not None:
            x_BLC = x_BLC + model.pos_embed
        return model.pos_drop(x_BLC)

    def run(self, model: Any, part: Sequence[nn.Module], x: Tensor) -> Tensor:
        # Once per stage: a stage runs alone, too. It changes the bias's gradient by rounding only.
        shared = model.rel_pos_bias() if model.rel_pos_bias is not None else None
        for block in part:
            x = block(x, shared_rel_pos_bias=shared)
        return x

    def prefix(self, model: Any) -> list[Tensor]:
        return [model.cls_token]


class _MetaFormer(Family):
    """The token mixer of stage 3 decides: PoolFormer and ConvFormer are local there, CAFormer attends."""

    def convolutional(self, model: Any) -> bool:
        return any(isinstance(module, (Pooling, SepConv)) for module in model.stages[2].modules())


class _MaxxVit(Family):
    """CoAtNet and CoAtNeXt attend in stages 3 and 4, MaxViT in every block."""

    def convolutional(self, model: Any) -> bool:
        return all(isinstance(block, (MbConvBlock, ConvNeXtBlock)) for block in model.stages[2].blocks)


FAMILIES: dict[type[nn.Module], Family] = {
    ResNet: Family(("conv1", "bn1", "act1", "maxpool"), ("layer1", "layer2", "layer3", "layer4")),
    EfficientNet: _ByFeatureInfo(("conv_stem", "bn1"), "blocks", ("conv_head", "bn2")),
    MobileNetV3: _ByFeatureInfo(("conv_stem", "bn1"), "blocks"),
    RegNet: Family(("stem",), ("s1", "s2", "s3", "s4"), ("final_conv",)),
    ConvNeXt: Family(("stem",), "stages", ("norm_pre",)),
    FastVit: Family(("stem",), "stages", ("final_conv",)),
    ResNetV2: Family(("stem",), "stages", ("norm",)),
    ByobNet: Family(("stem",), "stages", ("final_conv",)),
    CspNet: Family(("stem",), "stages"),
    HighPerfGpuNet: Family(("stem",), "stages"),
    SwinTransformer: Family(("patch_embed",), "layers", ("norm",), form="NHWC", local=False),
    SwinTransformerV2: Family(("patch_embed",), "layers", ("norm",), form="NHWC", local=False),
    # The distilled form is a VisionTransformer too, so it has to be looked up first.
    VisionTransformerDistilled: _DistilledTransformer((), "blocks", form="NLC", local=False),
    VisionTransformer: _VisionTransformer((), "blocks", ("norm",), form="NLC", local=False),
    Beit: _Beit((), "blocks", ("norm",), form="NLC", local=False),
    MlpMixer: _Isotropic(("stem",), "blocks", ("norm",), form="NLC", local=False),
    MetaFormer: _MetaFormer(("stem",), "stages"),
    MaxxVit: _MaxxVit(("stem",), "stages", ("norm",)),
}
"""timm's class -> its rule; the first class that a model is an instance of counts."""


def family_of(model: nn.Module) -> Family:
    """Raises ValueError, with the families that there are, for a model of none of them."""
    for kind, family in FAMILIES.items():
        if isinstance(model, kind):
            return family
    known = ", ".join(kind.__name__ for kind in FAMILIES)
    raise ValueError(f"its class is none of timm's {known}")


def _last_four(groups: Parts) -> Parts:
    """All but the last three groups in one, where there are more than four."""
    return [[module for group in groups[:-3] for module in group], *groups[-3:]] if len(groups) > 4 else groups


def evenly(blocks: list[nn.Module], count: int) -> Parts:
    """Neighbouring blocks in `count` parts that differ by at most one block, the longer ones first."""
    short, longer = divmod(len(blocks), count)
    ends = [short * k + min(k, longer) for k in range(count + 1)]
    return [blocks[start:end] for start, end in pairwise(ends)]
