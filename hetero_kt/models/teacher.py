"""Frozen teachers: where their weights come from, and how they see the student's pictures.

Shape suffixes: B rows, C channels, H x W pixels.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_kt.config import Teacher, read_recipe
from hetero_kt.distributed import load_deepspeed
from hetero_kt.documents import mapping, read_json, whole
from hetero_kt.models import build
from hetero_kt.nn.stages import Stages, expose
from hetero_kt.profile import part

RANDOM = "random"
"""As a teacher's `init`: no weights but fresh ones, to try things out."""
RUN = "run:"


class Frozen:
    """A teacher: no gradients for its parameters, always in eval mode, never in an optimizer or a checkpoint.

    Args:
        mean, std: of the pictures that it is given; it takes them back and applies its own.
        own_mean, own_std: what it was trained with.
        image_size: pixels that it was built for; pictures of another size are resized (bicubic).
        zero: DeepSpeed's block of stage 3 to keep it in pieces over the ranks; None keeps a whole copy on each.
        autocast: compute in bf16.
    """

    def __init__(
        self,
        module: nn.Module,
        stages: Stages,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        own_mean: tuple[float, ...],
        own_std: tuple[float, ...],
        image_size: int,
        zero: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        autocast: bool = False,
    ) -> None:
        self.module, self.stages = module.requires_grad_(False).eval(), stages
        self.image_size, self.zero, self.device, self.autocast = image_size, zero, torch.device(device), autocast
        self.engine: Any = None
        given = [torch.tensor(values).view(1, -1, 1, 1).to(device) for values in (mean, std)]
        own = [torch.tensor(values).view(1, -1, 1, 1).to(device) for values in (own_mean, own_std)]
        self.same = (tuple(mean), tuple(std)) == (tuple(own_mean), tuple(own_std))
        self.scale, self.shift = given[1] / own[1], (given[0] - own[0]) / own[1]

    @cached_property
    def checksum(self) -> int:
        """Of its weights and buffers as they are before `start`: they never change."""
        total = 0
        for name, tensor in self.module.state_dict().items():
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            total = zlib.crc32(plain.numpy().tobytes(), zlib.crc32(name.encode(), total))
        return total

    def start(self) -> None:
        """Take its place on the device, or over the ranks, unless it has. Collective."""
        if self.zero is None:
            # As pictures come from workers: no convolution turns its input. In pieces, weights have no layout.
            self.module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            return
        if self.engine is not None:
            return
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {**sparing(self.module), **self.zero},
            "steps_per_print": 1_000_000_000,
        }
        # Called as a module, not as an engine: an engine without an optimizer refuses to be part of a backward.
        self.engine, *_ = load_deepspeed().initialize(model=self.module, config=config)

    def stop(self) -> None:
        """Give its engine back, if it has one."""
        if self.engine is not None:
            self.engine.destroy()

    def see(self, pictures_BCHW: Tensor) -> Tensor:
        """The pictures with its own normalisation and size."""
        if not self.same:
            pictures_BCHW = torch.addcmul(self.shift, pictures_BCHW, self.scale)
        if pictures_BCHW.shape[-1] != self.image_size:
            shrinks = self.image_size < pictures_BCHW.shape[-1]
            size = (self.image_size, self.image_size)
            pictures_BCHW = F.interpolate(pictures_BCHW, size, mode="bicubic", antialias=shrinks)
        return pictures_BCHW

    @torch.no_grad()
    def __call__(self, pictures_BCHW: Tensor) -> dict[str, Any]:
        """`stages` (its four features), `pooled` and `logits` of the student's pictures."""
        with part("teacher"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(self.see(pictures_BCHW), features=True)

    @torch.no_grad()
    def logits(self, pictures_BCHW: Tensor) -> Tensor:
        """Its answers (B, K) alone."""
        with part("teacher"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(self.see(pictures_BCHW))

    def finish(self, feature: Tensor | Sequence[Tensor], after: int | Sequence[int] = 3) -> dict[str, Any]:
        """`tail_stages`, `tail_pooled` and `tail_logits` of its stages behind `after` and its classifier, from
        `feature`, through which gradients flow; see `Stages.forward`."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(tail=feature, after=after)


def sparing(module: nn.Module) -> dict[str, Any]:
    """Of a ZeRO-3 block, unless it says otherwise: DeepSpeed's own bounds would gather most models whole. Here one
    layer is gathered ahead of the one that computes, and none stays."""
    largest = max(parameter.numel() for parameter in module.parameters())
    return {
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": 0,
    }


def build_teacher(
    config: Teacher,
    option: str,
    *,
    classes: int,
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    output_dir: str = "runs",
    zero: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    autocast: bool = False,
) -> Frozen:
    """The teacher of `config` with its weights; `image_size`, `mean` and `std` are the student's pictures'.

    Args:
        option: what a complaint is about, `--method.teachers.NAME`.

    Raises:
        ValueError: no or missing weights, weights for other classes or of another model, a model without stages.
    """
    size = config.image_size or image_size
    if not (config.init or config.pretrained):
        raise ValueError(
            f"{option} has no weights: name a safetensors file, a run's folder or run:RECIPE as {option}.init, "
            f"or give {option}.pretrained."
        )
    file = "" if config.init in ("", RANDOM) else str(weights_of(config.init, f"{option}.init", output_dir))
    try:
        module = build(config.name, classes, image_size=size, init=file, pretrained=config.pretrained)
    except ValueError as error:
        raise ValueError(f"{option}: {error}.") from error
    published: Any = getattr(module, "pretrained_cfg", None) or {}
    if config.pretrained and published.get("num_classes") != classes:
        raise ValueError(
            f"{option}.pretrained: the published weights of {config.name} tell {published.get('num_classes')} classes "
            f"apart and the data has {classes}: train it on the data first, and name that run as {option}.init."
        )
    try:
        stages = expose(module, size)
    except ValueError as error:
        raise ValueError(f"{option}.name {config.name}: {error}.") from error
    own_mean = config.mean or (tuple(published.get("mean", mean)) if config.pretrained else mean)
    own_std = config.std or (tuple(published.get("std", std)) if config.pretrained else std)
    return Frozen(
        module,
        stages,
        mean=mean,
        std=std,
        own_mean=own_mean,
        own_std=own_std,
        image_size=size,
        zero=zero,
        device=device,
        autocast=autocast,
    )


def weights_of(init: str, option: str, output_dir: str = "runs") -> Path:
    """The safetensors file that `init` stands for: itself, or the one export of a run.

    Raises:
        ValueError: it does not exist, the run has not finished, or there are several to choose from.
    """
    path = Path(output_dir) / init.removeprefix(RUN) if init.startswith(RUN) else Path(init)
    if path.is_file():
        return path
    if not path.is_dir():
        how = " (--first VARIANT does so in the same start)" if init.startswith(RUN) else ""
        raise ValueError(
            f"{option} {init} names {path}, which does not exist: train that model first{how}, or name another file."
        )
    found = sorted([*path.rglob("export/*.safetensors"), *path.rglob("export/*/model.safetensors")])
    found = [file for file in found if _finished(next(p for p in file.parents if p.name == "export").parent)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise ValueError(f"{option} {init}: no run in {path} has finished: let it end first.")
    raise ValueError(f"{option} {init}: {path} holds {len(found)} models: name one, {found[0]} for example.")


def _finished(run: Path) -> bool:
    """Whether a run has come to the end of its recipe: one that --max-steps has cut short exports too. A folder without
    a recipe is no run, and its owner knows."""
    try:
        wanted = read_recipe(run / "recipe.yaml").steps
    except FileNotFoundError:
        return True
    result = run / "result.json"
    try:
        return whole(mapping(read_json(result), "the file").get("steps"), "steps") >= wanted
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise ValueError(f"{result} cannot be read ({error}): restore it, or name another run.") from error
