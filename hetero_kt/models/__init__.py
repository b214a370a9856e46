"""Models by name, and the names of their weights that the experiments exchange.

`timm:NAME` is any model of timm; `cifar:NAME` is a form of one for 32x32 pictures (`hetero_kt.models.cifar`).
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_kt.messages import first_line
from hetero_kt.models.names import CIFAR, XVLMS, is_known, known, modality_values
from hetero_kt.weights import check

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["XVLMS", "build", "classifier", "irb_projection", "is_known", "known", "modality_values"]


def build(name: str, classes: int, *, pretrained: bool = False, image_size: int = 32, init: str = "") -> nn.Module:
    """Build a model with a classifier of `classes` outputs, initialised from torch's global generator.

    The model maps pictures (B, 3, H, W) to logits (B, classes). `image_size` matters only to models with a
    fixed input size (vision transformers, for example). `init` is a safetensors file with exactly the
    model's tensors.

    Raises ValueError for an unknown name, weights that are not published or cannot be fetched, and a file
    that is missing or does not fit.
    """
    if classes < 1:
        raise ValueError(f"classes is {classes}: a classifier needs at least 1")
    if pretrained and init:
        raise ValueError(f"{name}: pretrained and init both say where to start: set one of them")
    family, _, rest = name.partition(":")
    from hetero_kt.models import cifar, swin

    swin.register()
    if not is_known(name):
        raise ValueError(_unknown(name))
    if family == "cifar":
        if pretrained:
            raise ValueError(
                f"{name} has no published weights: name a timm: model that has, or a file or run with its own"
            )
        model = cifar.MODELS[rest](classes)
    else:
        model = _build_timm(rest, classes, pretrained, image_size)
    if init:
        _load(model, name, init)
    return model


def classifier(model: nn.Module) -> str:
    """Name of the weight (classes x features) of a timm model's classifier, for example `fc.weight`.

    Raises ValueError where the model has no single linear classifier.
    """
    from torch import nn

    get_classifier: Any = getattr(model, "get_classifier", None)
    head = get_classifier() if get_classifier else None
    if isinstance(head, nn.Linear):
        for name, module in model.named_modules():
            if module is head:
                return f"{name}.weight"
    raise ValueError(f"{type(model).__name__} has no single linear classifier: name the weight yourself")


def irb_projection(model: nn.Module, k: int) -> str:
    """Name of the last 1x1 convolution's weight of a timm MobileNetV2's k-th inverted residual block.

    Blocks count from 1, the first one (without expansion) included: MobileNetV2 has 17, and the projections
    of IRB-4, 8, 12 and 16 in MergeNet's Table 5 are 32x144, 64x384, 96x576 and 160x960.

    Raises ValueError where the model has no such block.
    """
    from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual

    projections = []
    for name, module in model.named_modules():
        if isinstance(module, InvertedResidual):
            projections.append(f"{name}.conv_pwl.weight")
        elif isinstance(module, DepthwiseSeparableConv):
            projections.append(f"{name}.conv_pw.weight")
    if not 1 <= k <= len(projections):
        blocks = f"its blocks are 1 to {len(projections)}" if projections else "it has no inverted residual blocks"
        raise ValueError(f"{type(model).__name__} has no inverted residual block {k}: {blocks}")
    return projections[k - 1]


def _unknown(name: str) -> str:
    near = get_close_matches(name, known(), n=3, cutoff=0.5)
    if ":" not in name:  # the family was forgotten
        near = [f"{family}:{name}" for family in ("cifar", "timm") if is_known(f"{family}:{name}")] or near
    if not near:
        near = [f"cifar:{model}" for model in CIFAR]
    return f"no model is called {name!r}: use timm:NAME or cifar:NAME (nearest: {', '.join(near)})"


def _build_timm(name: str, classes: int, pretrained: bool, image_size: int) -> nn.Module:
    import timm

    options: dict[str, Any] = {}
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if published is not None and published.fixed_input_size:
        options["img_size"] = image_size
    if pretrained and not timm.is_model_pretrained(name):
        raise ValueError(f"timm:{name} has no published weights: name another model, or a file or run with its own")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **options)
    except Exception as error:
        if not pretrained:
            raise ValueError(
                f"timm:{name} cannot be built for pictures of {image_size} pixels ({first_line(error)}):"
                f" change image_size or the model"
            ) from error
        # Never random weights instead: the run would look right and be wrong.
        raise ValueError(
            f"timm:{name}: its published weights could not be fetched ({first_line(error)}):"
            f" put them into the hub's cache, or give a safetensors file as init"
        ) from error


def _load(model: nn.Module, name: str, path: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from hetero_kt.nn.soundness import ODD, check_finite, infinite

    if not Path(path).is_file():
        raise ValueError(f"{name}: init names {path}, which is not a file: give an exported .safetensors file")
    try:
        check(path)
        tensors = load_file(path)
    except (SafetensorError, OSError, *ODD) as error:
        raise ValueError(
            f"{name}: init names {path}, which cannot be read as safetensors ({first_line(error)}): export it again"
        ) from error
    wrong = _misfits(model, tensors)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{name}: init names {path}, which is another model's ({wrong[0]}{more}): give its own file")
    masks = infinite(dict(model.named_buffers()))
    check_finite({key: tensors[key] for key in tensors if key not in masks}, f"{name}: init names {path}")
    model.load_state_dict(tensors)


def _misfits(model: nn.Module, tensors: dict[str, torch.Tensor]) -> list[str]:
    own = model.state_dict()
    wrong = [f"{key} is missing" for key in own if key not in tensors]
    wrong += [f"{key} is unknown" for key in tensors if key not in own]
    for key in own:
        if key not in tensors:
            continue
        has, needs = tuple(tensors[key].shape), tuple(own[key].shape)
        if has != needs:
            wrong.append(f"{key} is {'x'.join(map(str, has))}, not {'x'.join(map(str, needs))}")
    return wrong
