"""Layers that normalise over a batch need more than one value per channel, which a forward of one row may not have."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from hetero_kt import data
from hetero_kt.config import Recipe
from hetero_kt.nn.stages import Layout

ONE_VALUE = ("more than 1 value per channel", "more than 1 spatial element")
"""Of torch's complaints in the first step."""


def check_rows(recipe: Recipe, modules: Mapping[str, nn.Module], world: int, aside: nn.Module | None = None) -> None:
    """Refuse what would normalise one value in a forward in training, found by a forward without data.

    Args:
        modules: of the recipe's models, plain.
        aside: the auxiliary module of a distillation, plain.

    Raises:
        ValueError: one sentence with the option that gives more rows.
    """
    for name, module in modules.items():
        size = recipe.data[recipe.models[name].data].image_size
        _check(recipe, name, name, world, [(module, (3, size, size))])
    if aside is not None:
        ((name, _),) = recipe.models.items()
        _check(recipe, name, f"{recipe.method.arm}'s auxiliary module", world, _features(aside))


def _check(
    recipe: Recipe, name: str, whose: str, world: int, parts: Iterable[tuple[nn.Module, tuple[int, ...]]]
) -> None:
    """Of the model called `name`, or of what is trained beside it: modules, each with the shape of one row."""
    model = recipe.models[name]
    config = recipe.data[model.data]
    share = config.batch // world
    rows = model.micro_batch or share
    if config.name in (*data.TEXTS, *data.PAIRS):  # which have LayerNorms alone
        return
    if not any(_normalises_one_value(part, (rows, *shape)) for part, shape in parts):
        return
    if rows > 1:
        raise ValueError(
            f"--data.{model.data}.image-size {config.image_size} leaves {whose} one place to normalise: use more."
        )
    option, more = f"--models.{name}.micro-batch 1", next((n for n in range(2, share + 1) if share % n == 0), 0)
    if share == 1:
        option, more = f"--data.{model.data}.batch {config.batch}", 2 * world
    raise ValueError(
        f"{option} leaves 1 row in a rank's forward, where {whose} normalises one value per channel: use {more}, or a "
        f"larger --data.{model.data}.image-size."
    )


def _features(aside: nn.Module) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    """The parts that take one feature, with its shape."""
    for part in aside.modules():
        into = getattr(part, "into", None)
        if isinstance(into, Layout):
            yield part, into.shape


def _normalises_one_value(module: nn.Module, shape: tuple[int, ...]) -> bool:
    layers = [part for part in module.modules() if isinstance(part, _BatchNorm | _InstanceNorm | nn.GroupNorm)]
    several = shape[0] > 1  # only InstanceNorm's values are fewer than the rows
    if not any(isinstance(part, _InstanceNorm) for part in layers) and (several or not layers):
        return False
    for device in ("meta", "cpu"):  # the latter for a forward that looks at values
        twin = copy.deepcopy(module).to(device).train()
        parameter: Any = next(twin.parameters(), torch.zeros(0))
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                twin(torch.zeros(shape, device=device, dtype=parameter.dtype))
        except ValueError as error:
            return any(words in str(error) for words in ONE_VALUE)
        except (NotImplementedError, RuntimeError):
            continue
        return False
    return False
