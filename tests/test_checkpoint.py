"""A run that was stopped, by anything, goes on as if it had not been."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import signal
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import Plan

from hetero_kt import data
from hetero_kt.config import Recipe
from hetero_kt.distributed import layout
from hetero_kt.folder import run_folder
from hetero_kt.options import Options


@pytest.mark.parametrize(("stage", "dropout"), [(0, 0.4), (1, 0.0), (1, 0.4), (2, 0.4), (3, 0.4)])
def test_stopped_and_resumed_equals_uninterrupted_to_the_bit(
    ranks: Any, tmp_path: Path, stage: int, dropout: float
) -> None:
    plan = Plan(dropout=dropout)
    whole = tiny.recipe(tmp_path / "whole", stage)
    uninterrupted = tiny.train(ranks(2), whole, Options(), plan)
    assert all(end["moved"] for end in uninterrupted), "BatchNorm's statistics are part of the state"
    assert not torch.equal(*(end["random"]["torch"] for end in uninterrupted)), "each rank has its own random state"

    parts = tiny.recipe(tmp_path / "parts", stage, save_every=1)
    stopped = tiny.train(ranks(2), parts, Options(max_steps=3), plan)
    assert [end["first_step"] for end in stopped] == [0, 0]
    resumed = tiny.train(ranks(2), parts, Options(), plan)
    assert [end["first_step"] for end in resumed] == [3, 3]
    tiny.assert_same_end(resumed, uninterrupted)
    assert tiny.lines(run_folder(parts))[-2:] == tiny.lines(run_folder(whole))[-2:]


def test_saving_and_evaluating_at_every_step_change_nothing(ranks: Any, tmp_path: Path) -> None:
    plan = Plan(dropout=0.4)
    never = tiny.train(ranks(2), tiny.recipe(tmp_path / "never"), Options(), plan)
    always = tiny.recipe(tmp_path / "always", save_every=1, eval_every=1)
    tiny.assert_same_end(tiny.train(ranks(2), always, Options(), plan), never)
    assert [p.name for p in layout.complete(run_folder(always) / "checkpoints")] == ["5", "6"], "two are kept"
    lines = [json.loads(line) for line in (run_folder(always) / "metrics.jsonl").read_text().splitlines()]
    cost = [line for line in lines if "checkpoint_stall_seconds" in line]
    assert [line["step"] for line in cost] == [1, 2, 3, 4, 5, 6]
    assert all(line["checkpoint_stall_seconds"] > 0 and line["checkpoint_write_seconds"] > 0 for line in cost)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_the_run_goes_on(
    ranks: Any, tmp_path: Path, number: int
) -> None:
    whole = tiny.recipe(tmp_path / "whole", eval_every=4)
    uninterrupted = tiny.train(ranks(2), whole)
    parts = tiny.recipe(tmp_path / "parts", eval_every=4)
    folder = run_folder(parts)
    for rank, step in ((1, 3), (0, 4)):  # the first one comes at a step that is evaluated
        stopped = tiny.train(ranks(2), parts, Options(), Plan(signals=((rank, step, number),)))
        assert [end["done"] for end in stopped] == [False, False]
        assert layout.complete(folder / "checkpoints")[-1].name == str(step + 1)
        assert not (folder / "result.json").exists()
    tiny.assert_same_end(tiny.train(ranks(2), parts), uninterrupted)
    assert (folder / "result.json").exists()
    assert tiny.lines(folder) == tiny.lines(run_folder(whole))


def test_a_signal_is_heeded_long_before_the_next_line_of_the_log(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=200, log_every=100)
    stopped = tiny.train(ranks(1), recipe, Options(), Plan(signals=((0, 3, signal.SIGUSR1),)))
    assert not stopped[0]["done"]
    (saved,) = layout.complete(run_folder(recipe) / "checkpoints")
    assert saved.name == "10"
    assert "resnet/loss" in tiny.lines(run_folder(recipe))[-1], "what was measured is not lost"


def test_what_a_kill_leaves_behind_is_passed_over_and_cleared_away(ranks: Any, tmp_path: Path) -> None:
    whole = tiny.recipe(tmp_path / "whole", save_every=2, eval_every=2, log_every=5)
    uninterrupted = tiny.train(ranks(2), whole)
    parts = tiny.recipe(tmp_path / "parts", save_every=2, eval_every=2, log_every=5, keep=3)
    folder = run_folder(parts)
    tiny.train(ranks(2), parts, Options(max_steps=4))
    saved = folder / "checkpoints"
    # a kill while step 6 was saved, one while step 2 was deleted, one while a line was written
    shutil.copytree(saved / "4", saved / "6")
    (saved / "6" / "DONE").unlink()
    (saved / "6" / "rank1.safetensors").write_bytes(b"half")
    (saved / "2" / "DONE").unlink()
    (saved / "2" / "rank0.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "resnet/loss": 1.0}\n{"step": 6, "resn')

    resumed = tiny.train(ranks(2), replace(parts, keep=1))
    assert [end["first_step"] for end in resumed] == [4, 4]
    tiny.assert_same_end(resumed, uninterrupted)
    assert tiny.lines(folder) == tiny.lines(run_folder(whole))
    assert [path.name for path in saved.iterdir()] == ["6"], "torn ones are gone, and so are old ones"


def test_a_run_that_was_killed_after_its_last_checkpoint_still_gets_its_result(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=2)
    folder = run_folder(recipe)
    finished = tiny.train(ranks(2), recipe)
    written, log = (folder / "result.json").read_text(), tiny.lines(folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "export")
    tiny.assert_same_end(tiny.train(ranks(2), recipe), finished)
    assert len(list((folder / "export").iterdir())) == 2
    assert tiny.lines(folder) == log
    assert '"top1"' in written
    assert '"top1"' in (folder / "result.json").read_text()


def test_a_killed_start_that_left_half_a_recipe_cannot_happen(ranks: Any, tmp_path: Path) -> None:
    """The recipe and the log are replaced in one go: what a kill leaves beside them is not read."""
    recipe = tiny.recipe(tmp_path, steps=1)
    folder = run_folder(recipe)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml.part").write_text("name: ti")
    (folder / "metrics.jsonl.part").write_text('{"st')
    assert tiny.train(ranks(1), recipe)[0]["done"]
    assert {"recipe.yaml.part", "metrics.jsonl.part"}.isdisjoint(path.name for path in folder.iterdir())


def test_a_finished_run_is_not_run_again_and_a_stopped_ones_result_does_not_outlive_it(
    ranks: Any, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path, steps=4)
    result = run_folder(recipe) / "result.json"
    tiny.train(ranks(1), recipe, Options(max_steps=2))
    assert result.exists()
    stopped = tiny.train(ranks(1), recipe, Options(), Plan(signals=((0, 2, signal.SIGUSR1),)))[0]
    assert not stopped["done"]
    assert not result.exists(), "it would tell a batch script that nothing is left to do"
    assert tiny.train(ranks(1), recipe)[0]["first_step"] == 3
    assert "first_step" not in tiny.train(ranks(1), recipe)[0]


def test_resume_from_a_path_takes_a_run_or_one_of_its_checkpoints(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path / "first", save_every=2)
    end = tiny.train(ranks(2), recipe)
    folder = run_folder(recipe)
    elsewhere = replace(recipe, output_dir=str(tmp_path / "second"))
    resumed = tiny.train(ranks(2), elsewhere, Options(resume=str(folder / "checkpoints" / "4")))
    assert [one["first_step"] for one in resumed] == [4, 4]
    tiny.assert_same_end(resumed, end)
    elsewhere = replace(recipe, output_dir=str(tmp_path / "third"))
    at_end = tiny.train(ranks(2), elsewhere, Options(resume=str(folder)))
    assert [one["first_step"] for one in at_end] == [6, 6]
    tiny.assert_same_end(at_end, end)


def test_resume_never_begins_again(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=2)
    first = tiny.train(ranks(1), recipe)
    other = replace(recipe, models={k: replace(m, precision="autocast") for k, m in recipe.models.items()})
    again = tiny.train(ranks(1), other, Options(resume="never"))
    assert again[0]["first_step"] == 0
    assert not torch.equal(again[0]["resnet"]["fc.bias"], first[0]["resnet"]["fc.bias"])
    assert [line["step"] for line in tiny.lines(run_folder(recipe))] == [1, 2, 2]


def test_a_checkpoint_knows_its_files_and_a_lost_one_is_named(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=2)
    tiny.train(ranks(2), recipe, Options(max_steps=1))
    (saved,) = layout.complete(run_folder(recipe) / "checkpoints")
    files = json.loads((saved / "DONE").read_text())["files"]
    assert {path.name for path in saved.iterdir()} == {*files, "DONE"}
    for name, about in files.items():
        content = (saved / name).read_bytes()
        assert about == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    (saved / "rank1.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"rank1.safetensors is missing: remove this checkpoint"):
        tiny.train(ranks(2), recipe)


def with_other(base: Recipe, what: str) -> bool:
    """`base` on pictures that are not those of the first run, of which there may be as many."""
    load = data.load

    def changed(config: Any, data_dir: str, *, train: bool) -> Any:
        images = load(config, data_dir, train=train)
        if what == "labels":
            return replace(images, labels=images.labels.flip(0))
        if what == "pictures":
            return replace(images, images=255 - images.images)
        return images.take(torch.arange(len(images)) > 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", changed)
        tiny._train(base, Options(), Plan())
    return True


@pytest.mark.parametrize("what", ["labels", "pictures", "samples"])
def test_another_data_set_is_not_gone_on_with(ranks: Any, tmp_path: Path, what: str) -> None:
    recipe = replace(tiny.recipe(tmp_path, steps=2), data_dir="elsewhere")
    tiny.train(ranks(1), recipe, Options(max_steps=1))
    with pytest.raises(RuntimeError, match=r"UserError: --data-dir elsewhere holds another generated than .*never"):
        ranks(1).run(with_other, recipe, what)
    assert tiny.train(ranks(1), recipe)[0]["first_step"] == 1


def heard(base: Recipe, options: Options) -> tuple[bytes, str]:
    """A run on this rank, and what it has printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        end = tiny._train(base, options, Plan(dropout=0.4))
    return end, out.getvalue()


def test_resume_takes_another_number_of_ranks_and_another_stage(ranks: Any, tmp_path: Path) -> None:
    """The whole of a run: what each part begins with is what the one before ended with."""
    before: dict[str, Any] = {}
    for world, stage, steps in ((2, 3, 2), (1, 1, 3), (2, 2, 4)):
        recipe = tiny.with_average(tiny.recipe(tmp_path, stage, save_every=1, log_every=2))
        found = ranks(world).run(heard, recipe, Options(max_steps=steps))
        ends = [pickle.loads(end) for end, _ in found]
        for end in ends if before else ():
            assert end["first_step"] == steps - 1
            tiny.assert_equal(end["began"], before, f"{world} rank(s) at stage {stage}")
        news = f"was saved on {3 - world} rank(s), and {world} go on: random numbers are drawn afresh"
        assert (news in found[0][1]) == bool(before)
        before = ends[0]["whole"]
    streams = [end["random"]["torch"] for end in ends]
    assert not torch.equal(*streams), "each rank draws its own"
    assert [line["step"] for line in tiny.lines(run_folder(recipe)) if "resnet/loss" in line] == [1, 2, 3, 4]
