"""Every file that a run leaves has the mode that the umask gives: who may read its log may read its weights."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hetero_kt import trainer
from hetero_kt.distributed import layout
from hetero_kt.files import write_named
from hetero_kt.models import bert


@pytest.fixture(params=[0o022, 0o077], ids=["022", "077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def _checkpoint(folder: Path) -> None:
    folder.mkdir()
    entry = layout.Entry(torch.zeros(3), "cnn", "weight", "a", (3,), 0, 3)
    layout.write_done(folder, 1, layout.write_rank(folder, 0, [entry], {}))


def _bert(folder: Path) -> None:
    model, _ = bert.build("bert:1x32", "masked_lm", vocabulary=100)
    bert.save(model, model.state_dict(), folder)
    bert.save(model, model.state_dict(), folder)  # in place of an older one


def _weights(folder: Path) -> None:
    folder.mkdir()
    trainer.write_safetensors("cnn", torch.nn.Identity(), {"a": torch.zeros(3)}, folder / "cnn")


def _named(folder: Path) -> None:
    write_named(folder / "report.html", "new")
    write_named(folder / "report.html", "newer")


@pytest.mark.parametrize("writes", [_checkpoint, _bert, _weights, _named])
def test_modes_follow_the_umask(tmp_path, umask, writes):
    writes(tmp_path / "7")
    files = [file for file in (tmp_path / "7").rglob("*") if file.is_file()]
    assert files
    assert {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in files} == {
        file.name: oct(0o666 & ~umask) for file in files
    }
