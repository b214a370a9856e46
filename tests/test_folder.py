"""What may lie in a run's folder, what goes of it, and where a start begins that an earlier one was asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from hetero_kt import cli, intent, options, start
from hetero_kt import folder as folders
from hetero_kt.config import Recipe, check_names, read_recipe, to_yaml
from hetero_kt.distributed import layout
from hetero_kt.folder import run_folder
from hetero_kt.options import Options
from hetero_kt.removal import CHECKPOINT, remove_written, strangers
from hetero_kt.run import parts

BAD = ("", ".", "..", "../../x", "/etc", "a/b", "a\\b", "\0", "a\nb", "-a", "_a", "a b", "\u00e9", "\ud800", "a" * 101)


def checkpoint(place: Path, step: int, said: int | None = None) -> Path:
    """A complete checkpoint of one rank, of empty files."""
    saved = place / str(step)
    saved.mkdir(parents=True)
    files = {f"rank0.{end}": {"bytes": 0, "crc32": "00000000"} for end in ("json", "safetensors")}
    for name in files:
        (saved / name).touch()
    done = {"layout": 2, "step": step if said is None else said, "ranks": 1, "files": files}
    (saved / "DONE").write_text(json.dumps(done))
    return saved


def names(place: Path) -> list[str]:
    return [path.name for path in layout.complete(place)]


# --- names ---


@pytest.mark.parametrize("name", BAD)
def test_names_are_plain_words(tmp_path: Path, name: str) -> None:
    base = tiny.recipe(tmp_path)
    model = next(iter(base.models.values()))
    renamed = (
        replace(base, name=name),
        replace(base, models={**base.models, name: model}),
        replace(base, data={**base.data, name: base.data["all"]}),
        replace(base, method=replace(base.method, transfers={name: base.method.transfers["there"]})),
    )
    for recipe in renamed:
        with pytest.raises(ValueError, match=r"is no plain word: use up to 100") as said:
            check_names(recipe)
        assert str(said.value).isprintable()


@pytest.mark.parametrize("recipe", ["to-mobilenetv2", "to_5.2", "resnet50", "0"])
def test_words_that_are_in_use_stay(tmp_path: Path, recipe: str) -> None:
    check_names(replace(tiny.recipe(tmp_path), name=recipe))


def test_export_of_a_strangers_run_touches_nothing_outside_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    run = tmp_path / "run"
    checkpoint(run / "checkpoints", 2)
    base = tiny.recipe(tmp_path / "made")
    tree = yaml.safe_load(to_yaml(base))
    tree["models"][str(precious)] = tree["models"].pop("resnet")
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(run / "checkpoints" / "2")])
    assert end.value.code == 2
    assert "is no plain word" in capsys.readouterr().err
    assert (precious / "thesis.txt").read_text() == "years"
    with pytest.raises(ValueError, match="is no plain word"):
        read_recipe(run / "recipe.yaml")


def test_a_link_in_place_of_the_export_is_not_written_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    checkpoint(run / "checkpoints", 2)
    (run / "recipe.yaml").write_text(to_yaml(tiny.recipe(tmp_path / "made")))
    (run / "export-2").symlink_to(elsewhere)
    with pytest.raises(SystemExit):
        cli.main(["export", str(run / "checkpoints" / "2")])
    assert "export-2" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


# --- removal ---


def test_only_what_was_written_here_is_removed(tmp_path: Path) -> None:
    saved, elsewhere = checkpoint(tmp_path / "checkpoints", 2), checkpoint(tmp_path / "elsewhere", 4)
    (saved / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "4").symlink_to(elsewhere)
    assert strangers(saved, CHECKPOINT) == ["notes.txt"]
    assert not remove_written(saved, CHECKPOINT)
    assert not remove_written(tmp_path / "checkpoints" / "4", CHECKPOINT)
    assert [path.name for path in saved.iterdir()] == ["notes.txt"]
    assert (elsewhere / "DONE").exists()
    layout.prune(tmp_path / "checkpoints", 1)
    assert (elsewhere / "DONE").exists()


# --- checkpoints ---


def test_a_renamed_checkpoint_is_passed_over_refused_and_never_pruned_for(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints"
    for step in (6, 8):
        checkpoint(saved, step)
    checkpoint(saved, 10, said=7)
    assert names(saved) == ["6", "8"]
    with pytest.raises(ValueError, match=r"10 was saved as step 7: give it that name back"):
        layout.check_folder(saved)
    with pytest.raises(ValueError, match=r"10 was saved as step 7"):
        layout.check(saved / "10")
    layout.prune(saved, 2)
    assert names(saved) == ["6", "8"]


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize("place", ["checkpoints/9", "checkpoints", "export", "tensorboard"])
def test_what_is_no_folder_is_refused_before_the_start(tmp_path: Path, place: str, kind: str) -> None:
    recipe = tiny.recipe(tmp_path)
    target = run_folder(recipe) / place
    target.parent.mkdir(parents=True)
    (tmp_path / "there").mkdir()
    target.touch() if kind == "file" else target.symlink_to(tmp_path / "there")
    for resume in ("auto", "never"):
        with pytest.raises(ValueError, match=rf"{place} is a {kind} where .* belongs: move it away"):
            folders.look(recipe, Options(resume=resume), run_folder(recipe))


# --- starts ---


def at(recipe: Recipe, resume: str) -> tuple[str | None, int, str]:
    found, finished, asked = folders.look(recipe, Options(resume=resume), run_folder(recipe))
    return (None if found is None else found.name), finished, asked


def test_what_a_dead_start_was_asked_for_is_what_auto_does(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    folder = run_folder(recipe)
    checkpoint(folder / "checkpoints", 4)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "result.json").write_text('{"steps": 6}')
    assert at(recipe, "auto") == ("4", 6, "auto")
    intent.write(folder, intent.Intent("never"))
    assert at(recipe, "auto") == (None, 0, "never")
    folders.open_folder(recipe, "never", None, folder, {})
    assert not (folder / intent.NAME).exists()
    assert sorted(path.name for path in folder.iterdir()) == ["data.json", "recipe.yaml"]
    assert at(recipe, "auto") == (None, 0, "auto")


def test_going_back_moves_the_abandoned_branch_aside_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tmp_path)
    folder = run_folder(recipe)
    saved = folder / "checkpoints"
    for step in (20, 30, 40):
        checkpoint(saved, step)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    intent.write(folder, intent.Intent(str(saved / "20")))  # a start that died here
    assert at(recipe, "auto")[::2] == ("20", str(saved / "20"))
    folders.open_folder(recipe, str(saved / "20"), saved / "20", folder, {})
    assert names(saved) == ["20"]
    assert names(folder / "abandoned-after-20") == ["30", "40"]
    assert "30, 40 are in abandoned-after-20 now" in capsys.readouterr().out
    checkpoint(saved, 25)
    assert at(recipe, "auto") == ("25", 0, "auto")


def test_a_start_from_another_run_is_remembered_until_the_first_own_checkpoint(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path)
    folder, other = run_folder(recipe), run_folder(replace(recipe, output_dir=str(tmp_path / "other")))
    source = checkpoint(other / "checkpoints", 20)
    checkpoint(folder / "checkpoints", 40)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    folders.open_folder(recipe, str(source), source, folder, {})
    assert at(recipe, "auto") == ("20", 0, str(source))
    checkpoint(folder / "checkpoints", 25)
    assert at(recipe, "auto") == ("25", 0, "auto")


def dies(recipe: Recipe, given: Options, refused: bool) -> str:
    """A start that ends while its models are built."""

    class Killed(BaseException):
        pass

    def ends(*_: Any) -> Any:
        raise ValueError("no such data.") if refused else Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "build_models", ends)
        try:
            tiny._train(recipe, given, tiny.Plan())
        except (ValueError, Killed) as error:
            return type(error).__name__
    return ""


def test_never_survives_a_start_that_died_and_not_one_that_was_refused(ranks: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, steps=2)
    tiny.train(ranks(1), recipe)
    assert ranks(1).run(dies, recipe, Options(resume="never"), True) == ["UserError"]
    assert "first_step" not in tiny.train(ranks(1), recipe)[0], "refused: the finished run stays finished"
    assert ranks(1).run(dies, recipe, Options(resume="never"), False) == ["Killed"]
    assert intent.read(run_folder(recipe)) == intent.Intent("never")
    assert tiny.train(ranks(1), recipe)[0]["first_step"] == 0


def test_a_batch_jobs_first_look_notes_never_before_any_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its ranks may die before they reach the folder, and a restart of it is given `--resume auto`."""
    recipe = tiny.recipe(tmp_path)
    folder = run_folder(recipe)
    checkpoint(folder / "checkpoints", 6)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    (folder / "result.json").write_text('{"steps": 6}')
    variants = {"default": lambda: recipe}
    for resume, told in (("auto", []), ("never", ["--resume never"]), ("auto", ["--resume never"])):
        start._show_unfinished(recipe, Options(resume=resume), variants)
        *lines, count = capsys.readouterr().out.splitlines()
        assert lines == [f"unfinished: {folder} {how}" for how in told]
        assert count == f"unfinished runs: {len(told)}"
    assert at(recipe, "auto") == (None, 0, "never")


def test_a_look_at_a_debug_run_notes_nothing_so_that_a_finished_one_stays_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--debug means --resume never at every start, also at the look that follows the run."""
    recipe = tiny.recipe(tmp_path)
    folder = run_folder(recipe)
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"steps": 6}')
    start._show_unfinished(recipe, Options(resume="never", debug=True), {"default": lambda: recipe})
    assert capsys.readouterr().out == "unfinished runs: 0\n"
    assert intent.read(folder) is None


# --- seeds ---


@pytest.mark.parametrize("seed", [str(2**63), "-1", "1.5", "x", "9" * 5000])
@pytest.mark.parametrize("option", ["--seed", "--seeds"])
def test_what_is_no_seed_is_one_sentence(tmp_path: Path, option: str, seed: str) -> None:
    for given in ([option, seed], [f"{option}={seed}"]):
        with pytest.raises(ValueError, match=option) as said:
            options.resolve({"default": lambda: tiny.recipe(tmp_path)}, given)
        assert len(str(said.value)) < 200
        assert str(said.value).count("\n") == 0
