"""Pictures with captions and the loader that draws batches of pairs.

A set's folder holds one of these:

- Karpathy's split as it is published, `dataset_coco.json` or `dataset_flickr8k.json` for example, with the pictures
  below the folder at the paths that it gives (COCO's in `train2014/` and `val2014/`), as files or as shards; where it
  gives names alone, in the folder itself, or in `images/` or `Flicker8k_Dataset/`
- Parquet files `train*.parquet` and `test*.parquet` or `val*.parquet` with the columns `image`, `captions` and
  `image_id` or `filename`

Shape suffixes: B rows of this rank, L tokens of a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hetero_kt.config import Data
from hetero_kt.data import GENERATED, cache
from hetero_kt.data.device import moved
from hetero_kt.data.gallery import (
    Folders,
    Gallery,
    Shown,
    Stamped,
    Tables,
    columns,
    counted,
    examples,
    kept,
    laid_out,
    read_json,
    schema,
    stamped,
    stripped,
    tables,
    without_missing,
)
from hetero_kt.data.order import Order
from hetero_kt.data.pictures import PictureLoader
from hetero_kt.data.shards import local
from hetero_kt.data.text import Sentences, TextLoader, Tokenizer

_PARTS = {True: ("train", "restval"), False: ("test",)}  # of Karpathy's split; restval is trained on by all
_FOLDERS = ("images", "Flicker8k_Dataset", "flickr30k-images")

Described = dict[str, tuple[str, ...]]
"""Captions by their picture's key."""


class CaptionLoader:
    """One rank's share of the global batches of pairs, a picture and one of its captions each, in the order of `Order`.

    A batch is a function of its step. Captions are padded to the longest of the global batch, so that all ranks'
    rows are of one width; where a damaged picture made another pair take a row, what is longer is cut off.

    Attributes:
        images, captions: how many there are.
        owner: number of each caption's picture, (captions,), int64.
        texts: the captions, by number.
    """

    def __init__(
        self,
        described: Described,
        gallery: Gallery,
        tokenizer: Tokenizer,
        config: Data,
        *,
        name: str,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        notices: Sequence[str] = (),
    ) -> None:
        """`notices` tell what was left out before.

        Raises:
            ValueError: no captions, a batch that does not divide over the ranks, or settings that timm refuses.
        """
        keys = list(described)
        self.texts = [caption for captions in described.values() for caption in captions]
        self.owner = np.repeat(np.arange(len(keys)), [len(captions) for captions in described.values()])
        self.images, self.captions = len(keys), len(self.texts)

        def loader(samples: Sequence[str]) -> PictureLoader:
            shown = Shown(name, gallery, samples, black=config.image_size if config.blank else 0)
            settings = (config.transform, config.image_size, rank, world, device)
            return PictureLoader(shown, config.batch, seed, *settings, workers=config.workers, corrupt=config.corrupt)

        self._pairs, self._each = loader([keys[number] for number in self.owner.tolist()]), loader(keys)
        self.name, self.samples, self.classes = name, self.captions, 0
        self.global_batch, self.steps_per_epoch = config.batch, self._pairs.steps_per_epoch
        self.mean, self.std, self.device = self._pairs.mean, self._pairs.std, self._pairs.device
        self._whole = Order(name, self.samples, config.batch, seed)  # of all ranks
        self._sentences = Sentences(self.texts, tokenizer, config.text.length, name)
        self._by_length = TextLoader(self._sentences, world, seed, rank, world, device)
        self._notices = list(notices)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's rows of the global batch of `step`: pictures (B, 3, H, W), ids and mask (B, L), and the numbers
        of the pictures (B,), int64.

        Raises:
            ValueError: a damaged picture, where those are to end the run, or no sound one to replace it.
        """
        pictures, drawn = self._pairs.draw(step)
        samples_B = drawn.numpy()
        ids, mask = self._sentences.take(samples_B, self._sentences.width(self._whole.rows(step)[1]))
        groups = self.owner[samples_B]
        return pictures, moved(ids, self.device), moved(mask, self.device), moved(groups, self.device)

    def eval_pictures(self, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's share of every picture exactly once: pictures (B, 3, H, W), their numbers (B,), int64, and their
        weights (B,).

        Every rank yields equally many batches of equal size, at most `rows` rows each; rows that fill up, and
        pictures that cannot be read, have weight 0, all others 1.

        Raises:
            ValueError: a damaged picture, where those are to end the run.
        """
        return self._each.eval_batches(rows)

    def eval_captions(self, rows: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor, Tensor]]:
        """This rank's share of every caption exactly once, short ones first: ids and mask (B, L), their numbers (B,),
        int64, and their weights (B,).

        Every rank yields equally many batches of equal shape, at most `rows` rows each; rows that fill up have
        weight 0, all others 1.
        """
        for texts, numbers, weight in self._by_length.eval_batches(rows):
            yield (texts[0], texts[1]), numbers, weight

    def fingerprint(self) -> dict[str, Any]:
        """How many pairs there are, and checksums of pictures, captions and tokens."""
        return {
            **self._each.fingerprint(),
            "captions": cache.key("\n".join(self.texts), self.owner.tobytes()),
            **self._sentences.fingerprint(),
        }

    def notices(self) -> list[str]:
        """What was left out on this rank since the start; a sentence each."""
        return list(dict.fromkeys([*self._notices, *self._pairs.notices(), *self._each.notices()]))

    def throughput(self) -> dict[str, float]:
        """See `PictureLoader.throughput`."""
        return self._pairs.throughput()

    def close(self) -> None:
        """End the workers; a later batch starts others."""
        self._pairs.close()


def captions(
    config: Data,
    data_dir: str | Path,
    tokenizer: Tokenizer,
    *,
    train: bool,
    seed: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> CaptionLoader:
    """The pairs to train on, or those to evaluate on, of the set in `config.folder` below `data_dir`.

    Evaluation takes Karpathy's test part, of Parquet files the test set (or where there is none, the validation set),
    and with `config.validation` that fraction of the training pictures. Pictures without captions are left out; so
    are missing ones, unless those are to end the run.

    Raises:
        ValueError: data that is missing, damaged or laid out differently, or settings that do not fit it.
    """
    of_training = train or config.validation > 0
    part = _part(config, data_dir, train=of_training)
    described = {key: said for key, captions in part.described.items() if (said := tuple(filter(None, captions)))}
    if not described:
        raise ValueError(f"{part.name} holds no picture with captions: name another folder with --data.NAME.folder")
    notices = []
    if lost := [key for key in part.described if key not in described]:
        notices.append(f"{part.name}: {counted(len(lost), 'picture')} without captions left out ({examples(lost)}).")
    if of_training:
        images = kept(described, config.validation, config.fraction, train=train)
        described = {key: captions for key, captions in described.items() if key in images}
    gallery = part.open(list(described))
    there, missing = without_missing(list(described), gallery, part.name, config.corrupt)
    return CaptionLoader(
        {key: captions for key, captions in described.items() if key in there},
        gallery,
        tokenizer,
        config,
        name=part.name,
        seed=seed,
        rank=rank,
        world=world,
        device=device,
        notices=notices + missing,
    )


@dataclass(frozen=True)
class _Part:
    """One part of a set as it is written."""

    name: str
    described: Described
    open: Callable[[Sequence[str]], Gallery]
    """Its pictures, given the keys that are wanted."""


def _part(config: Data, data_dir: str | Path, *, train: bool) -> _Part:
    if config.text.tokenizer == GENERATED:
        from hetero_kt.data import world

        return _Part(GENERATED, world.captions(train), lambda keys: world.World(train))
    folder = local(data_dir, "--data-dir") / local(config.folder, "--data.NAME.folder")
    if files := sorted(folder.glob("dataset_*.json")):
        if len(files) > 1:
            raise ValueError(f"{folder} holds {files[0].name} and {files[1].name}: leave one of them there")
        described = _karpathy(stamped(files[0]), _PARTS[train])
        place = next((folder / name for name in _FOLDERS if (folder / name).is_dir()), folder)
        return _Part(str(folder), described, lambda keys: Folders(place, keys, config.corrupt))
    if found := tables(folder, train=train):
        of_files = [_from_parquet(stamped(file)) for file in found]
        every = [key for keys, _ in of_files for key in keys]
        described = {key: said for keys, texts in of_files for key, said in zip(keys, texts, strict=True)}
        return _Part(str(folder), described, lambda keys: Tables(found, every))
    raise ValueError(
        f"{folder} holds no pictures with captions: name one with dataset_coco.json, or with"
        f" {'train' if train else 'test or validation'}*.parquet, with --data-dir and --data.NAME.folder"
    )


# --- files ---


@lru_cache(maxsize=2)
def _karpathy(file: Stamped, parts: tuple[str, ...]) -> Described:
    """The captions of these parts by the paths of their pictures, in the order of the file."""
    described: Described = {}
    with laid_out(file[0], "Karpathy's split"):
        for entry in read_json(file[0])["images"]:
            if entry["split"] not in parts:
                continue
            key = "/".join(filter(None, (entry.get("filepath"), entry["filename"])))
            if key in described:
                raise ValueError(f"{key} stands in two entries")
            described[key] = tuple(stripped(sentence["raw"]) for sentence in entry["sentences"])
    return described


@lru_cache(maxsize=64)
def _from_parquet(file: Stamped) -> tuple[list[str], list[tuple[str, ...]]]:
    """Key and captions of each row."""
    key = "filename" if "filename" in schema(file[0]) else "image_id"
    rows = columns(file[0], [key, "captions"]).to_pylist()
    with laid_out(file[0], "pictures with captions"):
        return [str(row[key]) for row in rows], [
            tuple(stripped(said) for said in row["captions"] or ()) for row in rows
        ]
