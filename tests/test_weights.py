"""Exports carry a checksum that every reader compares, and a run knows the files that its weights begin from."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_report import SAMPLES, recipe, write

from hetero_kt import models, parts, report
from hetero_kt.config import Teacher
from hetero_kt.models import bert, xvlm_weights
from hetero_kt.models.teacher import build_teacher
from hetero_kt.trainer import write_safetensors
from hetero_kt.weights import check, save_tensors

NAME = "cifar:resnet_tiny"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    module = models.build(NAME, 10)
    write_safetensors("a", module, module.state_dict(), tmp_path / "a")
    return tmp_path / "a.safetensors"


def flip(file: Path, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def teacher(file: Path) -> Any:
    given: Any = {"classes": 10, "image_size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return build_teacher(Teacher(NAME, init=str(file)), "--method.teachers.t", **given)


READERS = {
    "teacher": teacher,
    "init": lambda file: models.build(NAME, 10, init=str(file)),
    "bert": lambda file: bert._stored("bert", str(file)),
    "xvlm": lambda file: xvlm_weights.read(file, "xvlm: init names it"),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_export_with_a_flipped_bit_is_refused(reader: str, export: Path) -> None:
    READERS[reader](export)
    flip(export, -5)
    with pytest.raises(ValueError, match=r"^[^\n]+its checksum differs: it has changed since it was exported[^\n]+$"):
        READERS[reader](export)


@pytest.mark.parametrize("reader", READERS)
def test_a_fifo_in_place_of_weights_is_not_waited_on(reader: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is not a file|it is no regular file|does not exist|holds no weights"):
        READERS[reader](tmp_path / "a.safetensors")


def test_weights_of_others_have_no_checksum_and_are_taken(export: Path, tmp_path: Path) -> None:
    save_file(load_file(export), tmp_path / "theirs.safetensors", {"format": "pt"})
    for reader in READERS.values():
        reader(tmp_path / "theirs.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_checksum_covers_names_shapes_and_all_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_tensors({"x": torch.zeros(3, 5, dtype=dtype), "y": torch.zeros((), dtype=dtype)}, file, {"format": "pt"})
    check(file)
    whole = file.read_bytes()
    for damaged in (whole.replace(b'"x"', b'"z"'), whole.replace(b"[3,5]", b"[5,3]"), whole[:-1] + b"\1"):
        assert damaged != whole
        (tmp_path / "b.safetensors").write_bytes(damaged)
        with pytest.raises(OSError, match="its checksum differs"):
            check(tmp_path / "b.safetensors")


def test_a_run_knows_the_files_that_its_weights_begin_from(export: Path, tmp_path: Path) -> None:
    base: Any = tiny.distillation(tmp_path)
    ((name, model),) = base.models.items()
    assert parts.models.first_weights(base) == {}
    begun = replace(base, models={name: replace(model, init=str(export))})
    first = parts.models.first_weights(begun)
    assert list(first[name]) == ["init"]
    assert parts.models.first_weights(begun) == first
    other = models.build(NAME, 10)
    write_safetensors("a", other, other.state_dict(), tmp_path / "a")
    assert parts.models.first_weights(begun) != first


def test_runs_that_began_from_other_files_are_kept_apart(tmp_path: Path) -> None:
    for seed, began in enumerate(("a1", "a1", "b2")):
        write(tmp_path, recipe("none", seed), 50, {"data": SAMPLES, "init": {"cnn": {"init": began}}})
    sheets = report.gather([tmp_path], tables=()).sheets
    assert sorted(line.seeds for sheet in sheets for line in sheet.lines) == [(0, 1), (2,)]
