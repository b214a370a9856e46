"""What reading pictures costs beside the least that reads them: CIFAR beside a loop that only decodes, shards beside
webdataset and timm's transforms.

    python benchmarks/pipeline.py

Pictures are made up and written to a temporary folder: 32 pixels as PNG in Parquet, 500x375 as JPEG in shards. All
sides work in this process, without workers, so that their times are what a picture costs a core.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
import webdataset
from measure import Figure, Turns, report
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from hetero_kt import data
from hetero_kt.config import Data, Transform
from hetero_kt.data import sharding

AIM = 1.1
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    small: int = 5_000
    """Pictures of CIFAR's size."""
    large: int = 256
    """Pictures of ImageNet's size."""
    batch: int = 32
    turns: int = 7
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        found = [*_cifar(bench, Path(folder)), *_shards(bench, Path(folder))]
    report("input pipeline, one process", [figure for figure, _ in found], bench.json, seconds=[t for _, t in found])


def _cifar(bench: Bench, folder: Path) -> Iterator[tuple[Figure, dict[str, Any]]]:
    place = folder / "cifar100"
    place.mkdir()
    pictures = [{"bytes": _encoded(i, 32, 32, "PNG")} for i in range(bench.small)]
    labels = [i % 100 for i in range(bench.small)]
    file = place / "train.parquet"
    pq.write_table(pa.table({"img": pictures, "fine_label": labels}), file)
    config = Data("cifar100", batch=bench.batch)

    def ours() -> Any:
        os.utime(file)  # what has been read is kept, as long as its file is the same
        return data.load(config, str(folder), train=True)

    def bare() -> None:
        for row in pq.read_table(file)["img"].to_pylist():
            np.asarray(Image.open(io.BytesIO(row["bytes"])))

    turns = Turns(CPU).take({"ours": ours, "bare": bare}, bench.turns)
    beside = f"a loop that only decodes, {bench.small} pictures"
    yield turns.ratio("CIFAR-100 from Parquet into memory", "ours", "bare", beside, AIM), turns.raw()

    loader = data.open_loader(config, str(folder), train=True, seed=0)
    batches = bench.small // bench.batch

    def epoch() -> None:
        for step in range(batches):
            loader.batch(step)

    turns = Turns(CPU).take({"ours": epoch, "bare": bare}, bench.turns)
    what = "CIFAR-100 from memory: an epoch, cropped, mirrored, turned"
    yield turns.ratio(what, "ours", "bare", beside, AIM), turns.raw()


def _shards(bench: Bench, folder: Path) -> Iterator[tuple[Figure, dict[str, Any]]]:
    for part, count in (("train", bench.large), ("val", 2)):
        for i in range(count):
            file = folder / "pictures" / part / f"class{i % 2}" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(_encoded(i, 500, 375, "JPEG"))
    sharding.write(str(folder / "pictures"), str(folder / "shards"), shard_size="64", quiet=True)
    transform = Transform()
    config = Data(
        "shards", batch=bench.batch, folder="shards", pipeline="timm", transform=transform, workers=0, image_size=224
    )
    loader = data.open_loader(config, str(folder), train=True, seed=0)
    batches = bench.large // bench.batch
    done = [0]

    def ours() -> None:
        for step in range(done[0], done[0] + batches):
            loader.batch(step)
        done[0] += batches

    bare = _webdataset(sorted(map(str, (folder / "shards" / "train").glob("*.tar"))), bench.batch, transform)
    turns = Turns(CPU).take({"ours": ours, "bare": lambda: [None for _ in bare()]}, bench.turns)
    loader.close()
    beside = f"webdataset and timm's transforms, {bench.large} pictures"
    yield turns.ratio("ImageNet-like shards, cropped to 224", "ours", "bare", beside, AIM), turns.raw()


def _webdataset(shards: list[str], batch: int, transform: Transform) -> Callable[[], Any]:
    """One epoch as webdataset's own documentation reads it."""
    steps = create_transform(
        224,
        is_training=True,
        scale=transform.scale,
        hflip=transform.flip,
        color_jitter=None,  # type: ignore[arg-type]
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
    )
    warnings.filterwarnings("ignore", module="webdataset")
    read = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(100).decode("pil")
    rows = read.to_tuple("jpg", "cls").map_tuple(lambda picture: steps(picture.convert("RGB")), int)
    return lambda: rows.batched(batch)


def _encoded(seed: int, width: int, height: int, form: str) -> bytes:
    """A made-up picture: coloured clouds with a little noise, as hard to encode as a photograph."""
    draw = np.random.default_rng(seed)
    clouds = Image.fromarray(draw.integers(0, 256, (8, 8, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = draw.normal(0, 12, (height, width, 3))
    pixels = np.clip(np.asarray(clouds) + grain, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **({"quality": 85} if form == "JPEG" else {}))
    return stream.getvalue()


if __name__ == "__main__":
    main(tyro.cli(Bench))
