"""Plain weights from a checkpoint are those that the run itself exports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file

from hetero_kt import cli
from hetero_kt.folder import run_folder
from hetero_kt.options import Options

ALONE = """
import sys, torch, torch.distributed as dist
from hetero_kt import cli
sys.argv = ["hetero-kt", "export", sys.argv[1]]
cli.main()
assert not dist.is_initialized()
assert not torch.cuda.is_initialized()
"""


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_checkpoint_gives_the_run_s_own_export_to_the_bit(
    ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    """Two ranks with BatchNorm statistics of their own, factors, and an average of the weights."""
    base = tiny.recipe(tmp_path, stage, steps=2)
    base = replace(base, models={**base.models, "resnet": replace(base.models["resnet"], ema=0.5)})
    tiny.train(ranks(2), base)
    folder, views = run_folder(base), ("mobilenetv2", "resnet", "resnet_ema")
    own = {view: load_file(folder / "export" / f"{view}.safetensors") for view in views}
    shutil.rmtree(folder / "export")
    if stage == 1:
        subprocess.run([sys.executable, "-c", ALONE, str(folder)], check=True)
    else:
        cli.main(["export", str(folder)])  # whose export is lost
    cli.main(["export", str(folder / "checkpoints" / "2")])
    for place in (folder / "export", folder / "export-2"):
        assert {file.stem for file in place.iterdir()} == set(views)
        for view in views:
            tiny.assert_equal(load_file(place / f"{view}.safetensors"), own[view], view)


def test_a_run_that_is_not_finished_is_exported_as_it_was_last_saved(
    ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tmp_path, steps=4)
    tiny.train(ranks(1), recipe, Options(max_steps=2))
    folder = run_folder(recipe)
    own = load_file(folder / "export" / "resnet.safetensors")
    shutil.rmtree(folder / "export")
    (folder / "result.json").unlink()
    cli.main(["export", str(folder)])
    out, err = capsys.readouterr()
    files = [str(folder / "export" / f"{name}.safetensors") for name in recipe.models]
    assert out.splitlines()[-2:] == files
    assert f"{folder} is not finished: these are its weights of step 2." in err
    tiny.assert_equal(load_file(files[0]), own)


def test_what_cannot_be_exported_is_said_in_one_sentence(
    ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tmp_path, steps=1)
    tiny.train(ranks(1), recipe)
    saved = run_folder(recipe) / "checkpoints" / "1"
    shutil.copytree(saved, tmp_path / "alone" / "1")
    data = saved / "rank0.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"\x07")
    for path, words in (
        (tmp_path / "alone" / "1", "has no recipe.yaml"),
        (saved, "rank0.safetensors is not as it was"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["export", str(path)])
        assert end.value.code == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
