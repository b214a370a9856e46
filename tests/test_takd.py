"""Teachers of teachers, and several teachers at once, in one start of a launcher under --debug."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_launchers import LAUNCHERS, load

from hetero_kt import options, parts
from hetero_kt import run as running
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.folder import run_folder
from hetero_kt.models.teacher import build_teacher

LAUNCHER = next(path for path in LAUNCHERS if path.stem == "cifar_distill")
TAKD = ("--variant", "digits_takd", "--first", "digits_teacher", "digits_assistant")


def resolved(*arguments: str) -> tuple[Any, options.Options, list[Any]]:
    variants = load(LAUNCHER).VARIANTS
    recipe, chosen = options.resolve(variants, arguments)
    return recipe, chosen, options.runs_before(recipe, chosen, variants)


def start(*arguments: str) -> list[str]:
    """All runs of one start, as `main` has them; their folders."""
    recipe, chosen, before = resolved(*arguments)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))
    parts.check_pairs(recipe, {one.name for one in before})
    folders = []
    with tiny.handlers_kept():
        for one in (*before, recipe):
            assert running.run(one, chosen, ranks, StopSignal())
            folders.append(str(run_folder(one)))
    return folders


def taught_by(student: Path, teacher: Path, name: str, weights: str) -> bool:
    """Whether the student's teacher `name` had the weights that `teacher` has left."""
    recipe = tiny_recipe(student)
    given = {"classes": 100, "image_size": 32, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    config = recipe.method.teachers[name]
    known = build_teacher(config, "option", output_dir=recipe.output_dir, **given)
    left = load_file(teacher / "export" / f"{weights}.safetensors")
    assert all(torch.equal(left[key], value) for key, value in known.module.state_dict().items())
    return json.loads((student / "data.json").read_text())["teachers"][name] == known.checksum


def tiny_recipe(folder: Path) -> Any:
    from hetero_kt.config import from_yaml

    return from_yaml((folder / "recipe.yaml").read_text())


def test_teacher_assistant_and_student_learn_one_after_the_other(ranks: Any, tmp_path: Path) -> None:
    teacher, assistant, student = map(Path, ranks(2).run(start, "--debug", *TAKD, "--output-dir", str(tmp_path))[0])
    assert [folder.parts[-3:-1] for folder in (teacher, assistant, student)] == [
        ("digits_distill_teacher_debug", "none"),
        ("digits_distill_assistant_debug", "kd"),
        ("digits_distill_takd_debug", "kd"),
    ]
    assert taught_by(assistant, teacher, "teacher", "teacher")
    assert taught_by(student, assistant, "teacher", "student")


def test_two_teachers_teach_at_once(ranks: Any, tmp_path: Path) -> None:
    names = ("digits_distill_teacher", "digits_distill_assistant")
    chosen = ("--debug", *TAKD, "--teacher", *(f"run:{name}" for name in names), "--output-dir", str(tmp_path))
    teacher, assistant, student = map(Path, ranks(2).run(start, *chosen)[0])
    assert taught_by(student, teacher, "teacher", "teacher")
    assert taught_by(student, assistant, "teacher2", "student")
    losses = {name for line in tiny.lines(student) for name in line if name.endswith("kd_loss")}
    assert losses == {"teacher_to_student/kd_loss", "teacher2_to_student/kd_loss"}


def test_a_teacher_s_teacher_sees_the_student_s_pictures() -> None:
    """What the student is evaluated on, nobody has been trained on."""
    _, _, (teacher, assistant) = resolved(*TAKD, "--data.pictures.validation", "0.2")
    assert [one.data["pictures"].validation for one in (teacher, assistant)] == [0.2, 0.2]
    assert [one.data["pictures"].per_class for one in (teacher, assistant)] == [0, 0], "how many is their own matter"


def test_debug_takes_fresh_teachers_unless_they_come_first() -> None:
    recipe, _, before = resolved("--debug", *TAKD)
    assert recipe.method.teachers["teacher"].init == "run:digits_distill_assistant_debug"
    assert [one.steps for one in before] == [4, 4]
    recipe, _, before = resolved("--debug", *TAKD[:2])
    assert (recipe.method.teachers["teacher"].init, before) == ("random", [])


@pytest.mark.slow
def test_one_command_in_real_processes(tmp_path: Path) -> None:
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*ranks, str(LAUNCHER), "--debug", *TAKD, "--output-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("result.json"))) == 3
