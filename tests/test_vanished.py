"""Data that goes while a run trains on it: one sentence, the end of all ranks, and the last checkpoint as it was."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torture
from PIL import Image

from hetero_kt.config import Data, Recipe
from hetero_kt.data import sharding
from hetero_kt.distributed import layout
from hetero_kt.folder import run_folder

STEPS = 30


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 48 pictures of six classes, and of twelve to evaluate on."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, count in (("train", 48), ("val", 12)):
        for number in range(count):
            place = folder / "tree" / part / f"class{number % 6}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.png")
    sharding.write(str(folder / "tree"), str(folder / "shards"), shard_size="16", quiet=True)
    return folder / "shards"


def recipe(folder: Path, shards: Path, workers: int) -> Recipe:
    """A run that saves every fourth step and evaluates at its end."""
    pictures = Data("shards", folder=str(shards), pipeline="timm", batch=8, image_size=32, workers=workers)
    made = tiny.recipe(folder, steps=STEPS, save_every=4, log_every=1, control="none")
    return replace(made, data={"all": pictures})


def deleted(shards: Path) -> None:
    shutil.rmtree(shards)


def cut_off(shards: Path) -> None:
    for file in shards.rglob("*.tar"):
        file.open("r+b").truncate(100)


@pytest.mark.parametrize(
    ("happens", "workers", "words"),
    [
        (deleted, 0, "not one sample can be read any more"),
        pytest.param(cut_off, 0, "32 samples one after the other cannot be read", marks=pytest.mark.slow),
        pytest.param(cut_off, 1, "32 samples one after the other cannot be read", marks=pytest.mark.slow),
        pytest.param(deleted, 1, "the processes that read it have died", marks=pytest.mark.slow),
    ],
)
def test_shards_that_go_end_all_ranks_with_a_sentence_and_cost_no_checkpoint(
    tmp_path: Path, shards: Path, happens: Any, workers: int, words: str
) -> None:
    place = tmp_path / "shards"
    shutil.copytree(shards, place)
    one = recipe(tmp_path / "runs", place, workers)
    folder = run_folder(one)
    with torture.Job(one) as job:
        deadline = time.monotonic() + 90
        while len(torture.lines(folder)) < 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        happens(place)
        job.wait(60)
        assert all(code > 0 for code in job.codes()), job.said()
        said = job.log.read_text()
    (sentence, *_) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert words in sentence, said
    assert str(place) in sentence
    assert "start the same command again" in sentence
    assert not (folder / "result.json").exists()
    saved = layout.complete(folder / "checkpoints")
    assert saved
    for path in saved:
        layout.verify(path)

    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(shards, place)
    with torture.Job(one) as job:
        job.wait(90)
        assert job.codes() == [0, 0], job.said()
        assert f"from step {saved[-1].name}" in job.log.read_text()
    assert (folder / "result.json").exists()
