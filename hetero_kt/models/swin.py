"""Swin-N and Swin-P, small Swin Transformers that heterogeneous distillation is compared on (Hao et al. 2023), as
models of timm's registry: two blocks a stage, 64 and 48 channels in the first one."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer

_CONFIG = {"url": "", "num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True}
default_cfgs = generate_default_cfgs({f"swin_{size}_patch4_window7_224": _CONFIG for size in ("nano", "pico")})
"""timm looks here for what it has to know of a module's models."""


def _build(width: int, pretrained: bool, **options: Any) -> SwinTransformer:
    if pretrained:
        raise ValueError("there are no published weights")
    of_the_hub = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    options = {key: value for key, value in options.items() if key not in of_the_hub}
    return SwinTransformer(embed_dim=width, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), **options)


def swin_nano_patch4_window7_224(pretrained: bool = False, **options: Any) -> SwinTransformer:
    """Swin-N: 64, 128, 256 and 512 channels."""
    return _build(64, pretrained, **options)


def swin_pico_patch4_window7_224(pretrained: bool = False, **options: Any) -> SwinTransformer:
    """Swin-P: 48, 96, 192 and 384 channels."""
    return _build(48, pretrained, **options)


def register() -> None:
    """Make them known to timm, once."""
    for model in (swin_nano_patch4_window7_224, swin_pico_patch4_window7_224):
        if not timm.is_model(model.__name__):
            register_model(model)
