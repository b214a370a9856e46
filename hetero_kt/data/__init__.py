"""Data sets by name, in memory or as shards, and the loaders that draw batches from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hetero_kt.config import GENERATED, PAIRS, TEXTS, Data, root
from hetero_kt.data import sayings
from hetero_kt.data.cifar import cifar100
from hetero_kt.data.digits import digits
from hetero_kt.data.generated import CLASSES as GENERATED_CLASSES
from hetero_kt.data.generated import generated
from hetero_kt.data.images import ImageSet, chosen
from hetero_kt.data.imdb import ReviewRows, imdb
from hetero_kt.data.loader import Loader
from hetero_kt.data.masked import MaskedRows, pretraining
from hetero_kt.data.mixing import Mixer
from hetero_kt.data.pictures import InMemory, PictureLoader, Source, Unreadable
from hetero_kt.data.shards import Index, Shards, local
from hetero_kt.data.squad import SquadRows, Windows, squad
from hetero_kt.data.tars import Tars, census_and_classes
from hetero_kt.data.text import Rows, TextLoader, Tokenizer, load_tokenizer

__all__ = ["ImageSet", "Loader", "PictureLoader", "Unreadable", "classes", "load", "open_loader"]


def load(config: Data, data_dir: str = "", *, train: bool) -> ImageSet:
    """The pictures to train on, or those to evaluate on.

    `data_dir` is the folder that holds `cifar100/` (see `hetero_kt.data.cifar` for layouts); empty takes the
    environment's HETERO_KT_DATA, then `data`. Splits, subsets and generated pictures are the same in every
    run, whatever its seed, so that runs which differ in it can be compared.

    With `validation` set, evaluation takes that fraction of every class of the training set, and `per_class`
    samples are drawn from what is left.

    Raises ValueError for data that is missing or damaged, and for a subset that it cannot fill.
    """
    return _load(config, data_dir, train).resized(config.image_size)


def open_loader(
    config: Data,
    data_dir: str = "",
    *,
    train: bool,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Loader | PictureLoader | TextLoader | Any:
    """What draws the batches of a data set, for training or for evaluation: `Loader` for the fast pipeline,
    `PictureLoader` for timm's, and one for each kind of texts. Which samples there are is the same in every run, as
    for `load`.

    Raises:
        ValueError: data that is missing or damaged, or settings that do not fit it or each other.
    """
    place = (rank, world, device)
    if config.name in TEXTS:
        return TextLoader(_texts(config, data_dir, train), config.batch, seed, *place)
    if config.name in PAIRS:
        from hetero_kt.data.captions import captions
        from hetero_kt.data.vqa import vqa

        make: Any = vqa if config.name == "vqa" else captions
        tokens = tokenizer(config, data_dir)
        return make(config, root(data_dir), tokens, train=train, seed=seed, rank=rank, world=world, device=device)
    if config.pipeline == "fast":
        if config.name in ("shards", "tars"):
            raise ValueError(f"data {config.name}: the fast pipeline augments in memory: use --data.NAME.pipeline timm")
        images = load(config, data_dir, train=train)
        mix = _mixer(config, images.classes, train, seed, rank, world)
        augment = config.augment if train else ()
        return Loader(images, config.batch, seed, augment, *place, mix, config.augmentations)
    source = _source(config, data_dir, train)
    shown = (config.batch, seed, config.transform, config.image_size)
    how: dict[str, Any] = {
        "workers": config.workers,
        "corrupt": config.corrupt,
        "mixer": _mixer(config, source.classes, train, seed, rank, world),
        "augmentations": config.augmentations,
    }
    if train and isinstance(source, Tars):
        from hetero_kt.data.tarstream import TarLoader

        return TarLoader(source, *shown, *place, shuffle=config.shuffle, **how)
    return PictureLoader(source, *shown, *place, **how)


def classes(config: Data, data_dir: str = "") -> int:
    """Classes of a data set, known before it is read. Raises ValueError for shards without an index, and for tars that
    do not fit."""
    if config.name == "tars":
        return census_and_classes(config, root(data_dir), train=True)[1].classes
    if config.name == "shards":
        return len(Index(folder(config, data_dir) / "train").classes)
    return {"cifar100": 100, "digits": 10, "generated": GENERATED_CLASSES, "imdb": 2}[config.name]


def samples(config: Data, data_dir: str = "") -> int:
    """About how many pictures a data set trains on (classes round on their own), known before it is read. Raises
    ValueError for shards without an index, and for tars that do not fit."""
    if config.name == "tars":
        whole = len(census_and_classes(config, root(data_dir), train=True)[0].table())
    elif config.name == "shards":
        whole = len(Index(folder(config, data_dir) / "train").table())
    else:
        whole = {"cifar100": 50_000, "digits": 1_438, "generated": 1_600}[config.name]
    kept = round(whole * (1 - config.validation))
    return min(kept, config.per_class * classes(config, data_dir)) if config.per_class else kept


def _mixer(config: Data, classes: int, train: bool, seed: int, rank: int, world: int) -> Mixer | None:
    if not train or not (config.mix.mixup or config.mix.cutmix):
        return None
    return Mixer(config.mix, classes, config.batch // world, seed, rank)


def folder(config: Data, data_dir: str) -> Path:
    """Where a data set's shards lie."""
    place = config.folder if os.path.isabs(config.folder) else root(data_dir)
    return local(place, "--data-dir") / local(config.folder, "--data.NAME.folder")


def _source(config: Data, data_dir: str, train: bool) -> Source:
    if config.name not in ("shards", "tars"):
        return InMemory(_load(config, data_dir, train))

    def choose(labels: np.ndarray, classes: int) -> np.ndarray:
        return _rows(torch.from_numpy(labels), classes, config, train).numpy()

    if config.name == "tars":
        return Tars(config, root(data_dir), choose, train=train)
    index = Index(folder(config, data_dir) / "train")
    if not train and config.validation == 0:
        train_classes, index = index.classes, Index(folder(config, data_dir) / "validation")
        if index.classes != train_classes:
            raise ValueError(f"{index.folder} has other classes than the training set beside it: write both in one go.")
    return Shards(index, choose, config.corrupt)


def tokenizer(config: Data, data_dir: str = "") -> Tokenizer:
    """The tokenizer of a set of texts or pairs. Raises ValueError where there is none."""
    if config.text.tokenizer == GENERATED:
        if config.name in PAIRS:
            from hetero_kt.data import world

            return world.vocabulary()
        return sayings.vocabulary()
    below = Path(root(data_dir)) / config.text.tokenizer
    try:
        return load_tokenizer(config.text.tokenizer if Path(config.text.tokenizer).exists() else below)
    except ValueError as error:
        raise ValueError(f"--data.NAME.text.tokenizer {config.text.tokenizer} (or --data-dir): {error}.") from error


def _texts(config: Data, data_dir: str, train: bool) -> Rows:
    folder = root(data_dir)
    tokens, text = tokenizer(config, data_dir), config.text
    made_up = text.tokenizer == GENERATED
    if config.name == "squad":
        windows = Windows(text.length, text.stride, text.question)
        if made_up:
            return SquadRows(sayings.questions(train), tokens, windows, name=GENERATED, train=train)
        return squad(folder, tokens, windows, train=train, validation=config.validation)
    if config.name == "imdb":
        if made_up:
            return ReviewRows(*sayings.reviews(train), tokens, text.length, name=GENERATED)
        return imdb(folder, tokens, text.length, train=train, validation=config.validation, per_class=config.per_class)
    if made_up:
        return MaskedRows(sayings.plain(True), tokens, text.length, train=train, name=GENERATED)
    return pretraining(folder, tokens, text.length, train=train)


def _load(config: Data, data_dir: str, train: bool) -> ImageSet:
    images = _read(config, data_dir, train or config.validation > 0)
    rows = _rows(images.labels, images.classes, config, train)
    return images if len(rows) == len(images) else images.take(rows)  # all of them are not copied


def _read(config: Data, data_dir: str, train: bool) -> ImageSet:
    if config.name == "digits":
        return digits(train)
    if config.name == "generated":
        return generated(train)
    if config.name in ("shards", "tars"):
        raise ValueError(f"data {config.name}: they are not read into memory: use open_loader")
    return cifar100(root(data_dir), train)


def _rows(labels: torch.Tensor, classes: int, config: Data, train: bool) -> torch.Tensor:
    return chosen(labels, classes, config.name, validation=config.validation, per_class=config.per_class, train=train)
