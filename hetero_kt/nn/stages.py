"""Any timm classification model as four stages and a head.

`split` looks at a model and changes nothing; `expose` also lets the model's own forward run in stages, so that
a caller gets the features of every stage, or sends a feature of another model through the last stage.

Why the forward is replaced: ZeRO-3 gathers a module's own parameters only while that module's forward runs.
Class tokens and position embeddings belong to the model itself, so whatever reads them has to run inside the
model's forward. Names, tensors and submodules of the model stay as they are.

Shape suffixes: B pictures, L tokens (prefix tokens first), C channels, H x W the feature's grid, D the width of
the pooled feature, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hetero_kt.evaluate import evaluating
from hetero_kt.messages import first_line

if TYPE_CHECKING:
    from hetero_kt.nn.families import Family, Form

__all__ = ["Layout", "Stages", "expose", "from_map", "resized", "split", "to_map"]


@dataclass(frozen=True)
class Layout:
    """How a feature lies in memory: (B, C, H, W), (B, H, W, C) or (B, prefix + H * W, C)."""

    form: Form
    channels: int
    grid: tuple[int, int]
    """Rows and columns."""
    prefix: int = 0
    """Class and register tokens in front of the patches; NLC only."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row's feature."""
        if self.form == "NCHW":
            return (self.channels, *self.grid)
        if self.form == "NHWC":
            return (*self.grid, self.channels)
        return (self.prefix + self.grid[0] * self.grid[1], self.channels)


def to_map(feature: Tensor, layout: Layout) -> Tensor:
    """Any form -> (B, C, H, W), without prefix tokens; a view where memory order allows one."""
    if layout.form == "NCHW":
        return feature
    if layout.form == "NHWC":
        return feature.permute(0, 3, 1, 2)
    return feature[:, layout.prefix :].transpose(1, 2).unflatten(2, layout.grid)


def from_map(feature_BCHW: Tensor, layout: Layout) -> Tensor:
    """(B, C, H, W) -> the layout's form, without prefix tokens: undoes `to_map` for a prefix of 0."""
    if layout.form == "NCHW":
        return feature_BCHW
    if layout.form == "NHWC":
        return feature_BCHW.permute(0, 2, 3, 1)
    return feature_BCHW.flatten(2).transpose(1, 2)


def resized(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, H, W) on another grid: averaged where that shrinks, interpolated where it grows, else as it is."""
    rows, columns = map_BCHW.shape[2:]
    if (rows, columns) == grid:
        return map_BCHW
    if rows % grid[0] == 0 and columns % grid[1] == 0:
        # The same, with a backward that is deterministic on GPUs.
        return F.avg_pool2d(map_BCHW, (rows // grid[0], columns // grid[1]))
    if grid[0] <= rows and grid[1] <= columns:
        return F.adaptive_avg_pool2d(map_BCHW, grid)
    return F.interpolate(map_BCHW, grid, mode="bilinear")


class Stages:
    """The four stages and the head of a model: refers to its modules, and neither registers nor copies them.

    Running all four stages and the head is the model's own forward, to the bit: in eval mode, and in training
    mode from the same random state. A deep copy of an exposed model runs in its own stages.
    """

    def __init__(self, model: nn.Module, family: Family, image_size: int) -> None:
        self.model = model
        self.checkpointing = False
        """Keep only what goes in and out of each stage while training, and compute the rest again backward."""
        self._family = family
        self._parts = family.parts(model)
        self.convolutional = family.convolutional(model)
        """Stage 3 works on neighbourhoods, as a convolution does: the model counts as a CNN."""
        features, pooled_BD = self._probe(image_size)
        prefix = sum(token.shape[1] for token in family.prefix(model))
        first, second, third, fourth = (_layout(feature, family.form, prefix) for feature in features)
        self.layouts: tuple[Layout, Layout, Layout, Layout] = (first, second, third, fourth)
        """Of what stages 1 to 4 give, for pictures of the size that the model was split for."""
        self.width = pooled_BD.shape[1]
        """Of the pooled feature."""
        self.rectified = tuple(bool((feature >= 0).all()) for feature in features)
        """Whether stages 1 to 4 end in a ReLU: the probe's features have no negative number."""

    def stage(self, k: int, x: Tensor) -> Tensor:
        """Run stage k = 1 .. 4, from pictures (B, 3, H, W) or a feature in the layout of the stage before.

        A feature that comes from elsewhere needs the model's prefix tokens: see `with_prefix`.
        """
        if k == 1:
            x = self._family.embed(self.model, x)
        part = self._parts[k - 1]
        if not (self.checkpointing and self.model.training and torch.is_grad_enabled()):
            return self._family.run(self.model, part, x)

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), _statistics_kept(part)

        return checkpoint(self._family.run, self.model, part, x, use_reentrant=False, context_fn=contexts)

    def head(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 4's feature -> (pooled (B, width), logits (B, K)): what the classifier reads, and its answer."""
        return self._family.head(self.model, x)

    def with_prefix(self, patches_NLC: Tensor) -> Tensor:
        """Put the model's class and register tokens in front; identity for models that have none.

        The tokens are the learned ones, without the position embedding that stage 1 may add to them.
        """
        tokens = self._family.prefix(self.model)
        if not tokens:
            return patches_NLC
        return torch.cat([*(token.expand(len(patches_NLC), -1, -1) for token in tokens), patches_NLC], dim=1)

    def forward(
        self,
        x: Tensor | None = None,
        *,
        features: bool = False,
        tail: Tensor | Sequence[Tensor] | None = None,
        after: int | Sequence[int] = 3,
    ) -> Any:
        """What an exposed model's own forward does.

        `model(x)` gives logits. With `features` it gives a dict: "stages" (the four features), "pooled",
        "logits". With `tail`, a feature in the layout of stage `after` = 1 .. 4 without prefix tokens, that one goes
        through the later stages and the head too: "tail_stages" (those stages' features), "tail_pooled" and
        "tail_logits" are in the dict, alone where there is no `x`. Several tails, each with an `after` of its own or
        all with one, go through one after the other, and all three are lists; BatchNorm statistics do not see any of
        them. A tail in stage 4's layout goes straight to the head.
        """
        assert x is not None or tail is not None, "a model needs pictures, a tail or both"
        answer: dict[str, Any] = {}
        if x is not None:
            maps = []
            for k in (1, 2, 3, 4):
                x = self.stage(k, x)
                maps.append(x)
            pooled_BD, logits_BK = self.head(x)
            if not features and tail is None:
                return logits_BK
            answer = {"stages": maps, "pooled": pooled_BD, "logits": logits_BK}
        if tail is not None:
            tails = [tail] if isinstance(tail, Tensor) else list(tail)
            begins = [after] * len(tails) if isinstance(after, int) else list(after)
            # Another model's features leave no trace in the statistics that this model is evaluated with.
            with _statistics_kept([self.model]) if self.model.training else nullcontext():
                ends = [self._end(one, begin) for one, begin in zip(tails, begins, strict=True)]
            for i, name in enumerate(("tail_stages", "tail_pooled", "tail_logits")):
                found = [end[i] for end in ends]
                answer[name] = found[0] if isinstance(tail, Tensor) else found
        return answer

    def _end(self, x: Tensor, after: int) -> tuple[list[Tensor], Tensor, Tensor]:
        maps = []
        if after < 4:
            x = self.with_prefix(x)
        for k in range(after + 1, 5):
            x = self.stage(k, x)
            maps.append(x)
        return maps, *self.head(x)

    def _probe(self, image_size: int) -> tuple[list[Tensor], Tensor]:
        """The features and the pooled feature of a picture; checks that stages and model agree on it."""
        parameter = next(self.model.parameters())
        ramp = torch.linspace(-1, 1, 3 * image_size**2, device=parameter.device, dtype=parameter.dtype)
        x = ramp.view(1, 3, image_size, image_size)
        with evaluating(self.model):
            expected_BK = self.model(x)
            answer = self.forward(x, features=True)
        if answer["pooled"].ndim != 2 or expected_BK.ndim != 2:
            raise ValueError("it does not pool its features: build it with a global_pool")
        if not torch.allclose(answer["logits"], expected_BK, equal_nan=True):
            raise ValueError("its own forward does more than its family's")
        return answer["stages"], answer["pooled"]


def split(model: nn.Module, image_size: int) -> Stages:
    """The stages of a model, for square pictures of `image_size` pixels.

    Runs one picture through the model, in eval mode; modes, statistics and random state stay as they
    are. Do it before a model is partitioned.

    Raises ValueError for a model whose family is unknown, one with fewer than four stages or blocks, one without
    a classifier and one that does not take pictures of this size.
    """
    name = type(model).__name__
    if not getattr(model, "num_classes", 1):
        raise ValueError(f"{name} cannot be split into stages: it has no classifier, so build it with num_classes")
    try:
        from hetero_kt.nn.families import family_of  # timm, which takes seconds to import

        family = family_of(model)
        return Stages(model, family, image_size)
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = first_line(error)
        raise ValueError(f"{name} cannot be split into stages for pictures of {image_size} pixels: {reason}") from error


def expose(model: nn.Module, image_size: int) -> Stages:
    """As `split`, and from now on the model's own forward also runs in stages: see `Stages.forward`.

    `model(x)` stays what it was. Names, tensors and submodules stay too, so that a state dict fits before and
    after, and the model may be put into an engine, or be copied, as any other.
    """
    stages = split(model, image_size)
    # A bound method, no closure: `copy.deepcopy` of the model then copies the stages with it.
    model.forward = stages.forward  # type: ignore[method-assign]
    return stages


def _layout(feature: Tensor, form: Form, prefix: int) -> Layout:
    if form == "NCHW":
        _, channels, rows, columns = feature.shape
    elif form == "NHWC":
        _, rows, columns, channels = feature.shape
    else:
        _, length, channels = feature.shape
        rows = columns = math.isqrt(length - prefix)
        if rows * columns != length - prefix:
            raise ValueError(f"its {length - prefix} patches are no square grid")
    return Layout(form, channels, (rows, columns), prefix)


@contextmanager
def _statistics_kept(part: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norms normalise as in training and leave their running statistics alone.

    The statistics stay where they are, with a momentum of 0: without them a recomputation would keep fewer
    tensors than the first pass did, which checkpointing refuses.
    """
    norms = [m for module in part for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    with ExitStack() as stack:
        for norm, momentum, batches in before:
            stack.callback(_set_statistics, norm, momentum, batches)
            _set_statistics(norm, 0.0, None)
        yield


def _set_statistics(norm: Any, momentum: float | None, batches: Tensor | None) -> None:
    norm.momentum, norm.num_batches_tracked = momentum, batches
