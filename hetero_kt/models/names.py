"""The names of models, at hand without importing timm or torch, which takes seconds.

A misspelt name is answered at once this way. timm's own registry is asked where timm has been imported already, and for
published weights that its source does not spell out.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

CIFAR = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "mobilenetv2",
    "resnet_small",
    "resnet_tiny",
    "mobilenetv2_small",
    "mobilenetv2_tiny",
    "vit_small",
    "vit_tiny",
    "mixer_small",
    "mixer_tiny",
    "resmlp_small",
    "resmlp_tiny",
    "swin_small",
    "swin_tiny",
    "convnext_small",
    "convnext_tiny",
)
"""The models of `hetero_kt.models.cifar`."""

SWIN = ("swin_nano_patch4_window7_224", "swin_pico_patch4_window7_224")
"""The models that `hetero_kt.models.swin` adds to timm's."""

XVLMS = {
    "xvlm:tiny": ("blocks.1", 1),
    "xvlm:mini": ("blocks.3", 1),
    "xvlm:small": ("blocks.5", 2),
    "xvlm:base": ("layers.3.blocks.1", 5),
}
"""Models that see images and read texts, each with its last vision layer and its last layer that reads text alone."""


def known() -> list[str]:
    """Every name that `hetero_kt.models.build` takes, with its family in front; timm's with and without the tag of
    published weights."""
    return [*(f"cifar:{name}" for name in CIFAR), *(f"timm:{name}" for name in sorted(_timm()))]


def is_known(name: str) -> bool:
    """Whether `hetero_kt.models.build` takes `name`."""
    family, _, rest = name.partition(":")
    if family == "cifar":
        return rest in CIFAR
    if family != "timm":
        return False
    if rest in _timm():
        return True
    # A tag may be put together by timm's code. Its registry knows.
    return rest.partition(".")[0] in _timm() and "." in rest and rest in _registry()


def modality_values(name: str) -> tuple[str, str]:
    """Names of an X-VLM's value projections of its last vision layer, and of its last layer that reads text alone.

    Raises ValueError for another model's name.
    """
    if name not in XVLMS:
        raise ValueError(f"{name} is no X-VLM: use {', '.join(XVLMS)}")
    block, layer = XVLMS[name]
    return (
        f"vision_encoder.{block}.attn.qkv.weight[v]",
        f"text_encoder.encoder.layer.{layer}.attention.self.value.weight",
    )


def _timm() -> frozenset[str]:
    # Models that a user has registered are in timm's registry alone.
    return _registry() if "timm" in sys.modules else _source()


def _registry() -> frozenset[str]:
    import timm

    return frozenset([*timm.list_models(), *timm.list_pretrained(), *SWIN])


_REGISTERED = re.compile(r"^@register_model\s*\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
_PUBLISHED = re.compile(r"""^\s*['"]([a-z0-9_]+\.(?!untrained)[A-Za-z0-9_]+)['"]\s*:""", re.MULTILINE)


@cache
def _source() -> frozenset[str]:
    """The names that timm's source registers, and the published weights that it spells out."""
    spec = find_spec("timm")
    folder = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    names = set(SWIN)
    for file in sorted(folder.glob("models/*.py")) if folder else ():
        text = file.read_text(encoding="utf-8")
        names.update(_REGISTERED.findall(text), _PUBLISHED.findall(text))
    return frozenset(names)
