"""Image models for 32x32 pictures, built from timm's own classes.

The full-size forms of ResNet and MobileNetV2 keep early resolution: a 3x3 stem of stride 1, and no pooling
(ResNet) or no second down-sampling (MobileNetV2) behind it, so that the last map of a 32x32 picture is 4x4.
Parameter names and shapes are timm's, except the ResNets' stem (3x3 instead of 7x7).

The `small` and `tiny` forms are shallow and halve the picture in the stem (attention and MLP models cut it into
patches of 4x4, Swin and ConvNeXt of 2x2): they train at a thousand pictures per second or more on one CPU core.
`small` is for experiments on CIFAR-100, `tiny` for digits, tests and debugging.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def _resnet(classes: int, timm_name: str) -> nn.Module:
    model: Any = timm.create_model(timm_name, num_classes=classes)
    model.conv1 = _stem(64, stride=1)
    model.maxpool = nn.Identity()
    return model


def _mobilenetv2(classes: int) -> nn.Module:
    model: Any = timm.create_model("mobilenetv2_100", num_classes=classes)
    model.conv_stem.stride = (1, 1)
    model.blocks[1][0].conv_dw.stride = (1, 1)
    return model


def _shallow_resnet(
    classes: int, channels: tuple[int, int, int, int], layers: tuple[int, int, int, int] = (1, 1, 1, 1)
) -> nn.Module:
    """Basic residual blocks behind a stem that is as wide as the first stage and halves the picture."""
    build: Any = ResNet  # its annotation asks for an instance of a block, its code for the class
    model = build(BasicBlock, layers, num_classes=classes, channels=channels)
    # timm's plain stem is always 64 wide, which at this size would cost more than all the blocks.
    model.conv1 = _stem(channels[0], stride=2)
    model.bn1 = nn.BatchNorm2d(channels[0])
    model.maxpool = nn.Identity()
    first = BasicBlock(channels[0], channels[0])
    for conv in (first.conv1, first.conv2):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    first.zero_init_last()
    model.layer1[0] = first
    return model


def _shallow_mobilenetv2(classes: int, stages: Sequence[str], stem: int, features: int) -> nn.Module:
    """Inverted residual blocks, as timm's architecture strings, behind a stem that halves the picture."""
    return EfficientNet(
        decode_arch_def([[stage] for stage in stages]),
        num_classes=classes,
        num_features=features,
        stem_size=stem,
        fix_stem=True,
        act_layer=nn.ReLU6,
    )


def _vit(classes: int, width: int, depth: int) -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=4, num_classes=classes, embed_dim=width, depth=depth, num_heads=width // 32, mlp_ratio=2
    )


def _mixer(classes: int, width: int, depth: int) -> nn.Module:
    return MlpMixer(classes, img_size=32, patch_size=4, num_blocks=depth, embed_dim=width, mlp_ratio=(0.5, 2.0))


def _resmlp(classes: int, width: int, depth: int) -> nn.Module:
    block: Any = partial(ResBlock, init_values=0.1)
    return MlpMixer(
        classes,
        img_size=32,
        patch_size=4,
        num_blocks=depth,
        embed_dim=width,
        mlp_ratio=2,
        block_layer=block,
        norm_layer=Affine,
    )


def _swin(classes: int, width: int, depths: tuple[int, int, int, int]) -> nn.Module:
    heads = tuple(max(1, width * 2**i // 32) for i in range(4))
    return SwinTransformer(
        img_size=32,
        patch_size=2,
        num_classes=classes,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        window_size=4,
        mlp_ratio=2,
    )


def _convnext(classes: int, width: int, depths: tuple[int, int, int, int]) -> nn.Module:
    widths = (width, 2 * width, 4 * width, 8 * width)
    return ConvNeXt(num_classes=classes, patch_size=2, depths=depths, dims=widths)


def _stem(width: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(3, width, kernel_size=3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": partial(_resnet, timm_name="resnet18"),
    "resnet34": partial(_resnet, timm_name="resnet34"),
    "resnet50": partial(_resnet, timm_name="resnet50"),
    "resnet101": partial(_resnet, timm_name="resnet101"),
    "resnet152": partial(_resnet, timm_name="resnet152"),
    "mobilenetv2": _mobilenetv2,
    "resnet_small": partial(_shallow_resnet, channels=(24, 48, 96, 192)),
    "resnet_tiny": partial(_shallow_resnet, channels=(16, 24, 48, 96)),
    "mobilenetv2_small": partial(
        _shallow_mobilenetv2,
        stages=("ds_r1_k3_s1_c16", "ir_r2_k3_s2_e4_c32", "ir_r3_k3_s2_e4_c64", "ir_r2_k3_s1_e4_c96"),
        stem=16,
        features=512,
    ),
    "mobilenetv2_tiny": partial(
        _shallow_mobilenetv2,
        stages=("ds_r1_k3_s1_c16", "ir_r2_k3_s2_e3_c24", "ir_r2_k3_s2_e3_c48"),
        stem=16,
        features=256,
    ),
    "vit_small": partial(_vit, width=96, depth=6),
    "vit_tiny": partial(_vit, width=64, depth=4),
    "mixer_small": partial(_mixer, width=96, depth=6),
    "mixer_tiny": partial(_mixer, width=64, depth=4),
    "resmlp_small": partial(_resmlp, width=96, depth=6),
    "resmlp_tiny": partial(_resmlp, width=64, depth=4),
    "swin_small": partial(_swin, width=32, depths=(1, 1, 2, 1)),
    "swin_tiny": partial(_swin, width=16, depths=(1, 1, 1, 1)),
    "convnext_small": partial(_convnext, width=24, depths=(1, 1, 2, 1)),
    "convnext_tiny": partial(_convnext, width=16, depths=(1, 1, 1, 1)),
}
"""What `cifar:NAME` builds, as functions of the number of classes."""
