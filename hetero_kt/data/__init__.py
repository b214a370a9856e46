"""Data sets by name, in memory, and the loader that draws batches from them."""

from __future__ import annotations

import os

import torch

from hetero_kt.config import Data
from hetero_kt.data import counter
from hetero_kt.data.cifar import cifar100
from hetero_kt.data.digits import digits
from hetero_kt.data.generated import CLASSES as GENERATED_CLASSES
from hetero_kt.data.generated import generated
from hetero_kt.data.images import ImageSet, class_counts, draw_per_class
from hetero_kt.data.loader import Loader

__all__ = ["ImageSet", "Loader", "classes", "load"]

_VALIDATION, _SUBSET = (counter.key(0, part) for part in (0, 1))


def load(config: Data, data_dir: str = "", *, train: bool) -> ImageSet:
    """The pictures to train on, or those to evaluate on.

    `data_dir` is the folder that holds `cifar100/` (see `hetero_kt.data.cifar` for layouts); empty takes the
    environment's HETERO_KT_DATA, then `data`. Splits, subsets and generated pictures are the same in every
    run, whatever its seed, so that runs which differ in it can be compared.

    With `validation` set, evaluation takes that fraction of every class of the training set, and `per_class`
    samples are drawn from what is left.

    Raises ValueError for data that is missing or damaged, and for a subset that it cannot fill.
    """
    validating = config.validation > 0
    images = _read(config, data_dir, train or validating)
    if validating:
        held_out = _held_out(images, config)
        images = images.take(~held_out if train else held_out)
    if train and config.per_class:
        fewest = int(class_counts(images).min())
        if config.per_class > fewest:
            raise ValueError(
                f"data {config.name}: per_class is {config.per_class}, but a class has only {fewest} samples:"
                f" use at most {fewest}, or 0 for all"
            )
        wanted = torch.full((images.classes,), config.per_class)
        images = images.take(draw_per_class(images.labels, wanted, _SUBSET))
    return images.resized(config.image_size)


def classes(config: Data) -> int:
    """Classes of a data set, known before it is read."""
    return {"cifar100": 100, "digits": 10, "generated": GENERATED_CLASSES}[config.name]


def _read(config: Data, data_dir: str, train: bool) -> ImageSet:
    if config.name == "digits":
        return digits(train)
    if config.name == "generated":
        return generated(train)
    return cifar100(data_dir or os.environ.get("HETERO_KT_DATA") or "data", train)


def _held_out(images: ImageSet, config: Data) -> torch.Tensor:
    counts = (class_counts(images) * config.validation).round().long()
    if not 0 < int(counts.sum()) < len(images):
        raise ValueError(
            f"data {config.name}: validation {config.validation} leaves nothing to train or to evaluate on:"
            f" use 0.1, for example"
        )
    return draw_per_class(images.labels, counts, _VALIDATION)
