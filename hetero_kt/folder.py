"""A run's folder: where it is, what in it may go on, what a finished run leaves in it.

<output_dir>/<recipe>/<control>/seed<k>/
    recipe.yaml, data.json     what the run is of; a resume has to agree with both
    metrics.jsonl, tensorboard/, checkpoints/, export/
    lock                       while a job is at work in it
    result.json                written last: it marks a finished run
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetero_kt import data, parts, provenance
from hetero_kt.checks import zero_block
from hetero_kt.config import Recipe, differences, read_recipe, to_yaml
from hetero_kt.distributed import layout
from hetero_kt.distributed.agreement import Unwritable, agreed
from hetero_kt.distributed.launch import Ranks
from hetero_kt.documents import mapping, read_json, whole
from hetero_kt.lock import Lock
from hetero_kt.models.teacher import Frozen
from hetero_kt.options import Options, without_local_rank
from hetero_kt.trainer import Trainer


def run_folder(recipe: Recipe) -> Path:
    """Where this recipe's run lives."""
    return Path(recipe.output_dir) / recipe.name / recipe.method.arm / f"seed{recipe.seed}"


def finished_steps(folder: Path) -> int:
    """Steps of the finished run in `folder`, 0 if there is none.

    Raises:
        ValueError: its result.json is damaged.
    """
    result = folder / "result.json"
    try:
        return whole(mapping(read_json(result), "the file").get("steps"), "steps")
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise ValueError(f"{result} cannot be read ({error}): remove it to go on from the last checkpoint.") from error


def look(recipe: Recipe, options: Options, folder: Path) -> tuple[Path | None, int]:
    """(checkpoint to go on from, steps of a finished run that is not to be repeated).

    Raises:
        ValueError: the folder, or the checkpoint asked for, is of another recipe, or torn.
    """
    start = _find_start(recipe, options, folder)
    return start, finished_steps(folder) if options.resume == "auto" else 0


def _find_start(recipe: Recipe, options: Options, folder: Path) -> Path | None:
    """The checkpoint to go on from, None for a fresh start; it, and what lies in the folder, must be of this recipe."""
    if options.resume == "never":
        return None
    _check_same_recipe(recipe, folder, options.resume)
    path = folder if options.resume == "auto" else Path(options.resume).resolve()
    found = layout.complete(path / "checkpoints")
    if found:
        path = found[-1]
    elif options.resume == "auto":
        return None
    elif not (path / "DONE").exists():
        raise ValueError(f"--resume {path} holds no complete checkpoint: name a run folder or a checkpoint in it.")
    layout.check(path)
    _check_same_recipe(recipe, path.parents[1], options.resume)
    return path


def _check_same_recipe(recipe: Recipe, folder: Path, resume: str) -> None:
    try:
        changed = differences(read_recipe(folder / "recipe.yaml"), recipe)
    except FileNotFoundError:
        return
    if changed:
        raise ValueError(
            f"--resume {resume}: {folder} holds a run of another recipe, which differs in "
            f"{', '.join(changed[:4])}: use another --output-dir, or --resume never to begin again."
        )


def fingerprint(
    recipe: Recipe,
    train: Mapping[str, data.Loader],
    test: Mapping[str, data.Loader],
    teachers: Mapping[str, Frozen],
) -> dict[str, dict[str, Any]]:
    """What a recipe only names: the samples of each data set, the stage in each model's ZeRO file, the weights of each
    teacher, and the files that models' weights begin from."""
    return {
        "data": {name: [train[name].fingerprint(), test[name].fingerprint()] for name in recipe.data},
        "zero": {name: zero_block(model.zero)["stage"] for name, model in recipe.models.items()},
        "teachers": {name: teacher.checksum for name, teacher in teachers.items()},
        "init": parts.first_weights(recipe),
    }


def check_same_everywhere(ours: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare `fingerprint` over the ranks, whose nodes may have copies of their own. Collective.

    Raises:
        ValueError: this rank sees other samples or teachers than the first.
    """
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, ours)
    for kind, entries in ours.items():
        for name in entries:
            if entries[name] != everybody[0][kind][name]:
                what = {"data": "another --data", "teachers": "another --method.teachers"}.get(kind, "another --models")
                raise ValueError(f"{what}.{name} lies here than on rank 0: give all nodes the same copy.")


def check_same_data(recipe: Recipe, ours: Mapping[str, Mapping[str, Any]], folder: Path, resume: str) -> None:
    """Compare `fingerprint` with the one in the folder that a run goes on from. Its ZeRO stages may be others.

    Raises:
        ValueError: other samples, or another teacher.
    """
    file = folder / "data.json"
    try:
        theirs = mapping(read_json(file), "the file")
        changed = [
            (kind, name)
            for kind in ("data", "teachers", "init")
            for name in ours[kind]
            if mapping(theirs.get(kind, ours[kind]), kind)[name] != ours[kind][name]
        ]
    except FileNotFoundError:
        return
    except (ValueError, KeyError) as error:
        raise ValueError(f"--resume {resume}: {file} cannot be read: remove it to go on unchecked.") from error
    for kind, name in changed:
        if kind == "data":
            raise ValueError(
                f"--data-dir {recipe.data_dir} holds another {recipe.data[name].name} than {folder} was trained on: "
                "name that one's, or use --resume never to begin again."
            )
        if kind == "init":
            raise ValueError(
                f"--models.{name} begins from other files than the run in {folder} did: put those back, or use "
                "--resume never to begin again."
            )
        raise ValueError(
            f"--method.teachers.{name} has other weights than the teacher that {folder} was trained with: name "
            "that one's, or use --resume never to begin again."
        )


@contextmanager
def owned(recipe: Recipe, folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, no other job works in the folder, which exists. Collective.

    Raises:
        UserError: another job does, or the folder cannot be written.
    """
    lock = Lock(folder)
    with agreed():
        if ranks.first:
            try:
                lock.take()
            except OSError as error:
                raise ValueError(_cannot_write(recipe, error)) from error
    try:
        yield
    finally:
        if ranks.first:
            lock.release()


def open_folder(recipe: Recipe, options: Options, folder: Path, seen_data: Mapping[str, Any]) -> None:
    """Make the folder this run's; with --resume never what lay in it goes.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        _clear_and_sign(recipe, options, folder)
        _write_whole(folder / "data.json", json.dumps(seen_data, indent=1) + "\n")
    except OSError as error:
        raise ValueError(_cannot_write(recipe, error)) from error


def _cannot_write(recipe: Recipe, error: OSError) -> str:
    return f"--output-dir {recipe.output_dir} cannot be written ({error.strerror}: {error.filename}): name another."


def _clear_and_sign(recipe: Recipe, options: Options, folder: Path) -> None:
    if options.resume == "never":
        for name in ("checkpoints", "tensorboard", "export"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # of a shorter run: it would mark this one as finished
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / "recipe.yaml", to_yaml(recipe))


def _write_whole(path: Path, text: str) -> None:
    """`text` in `path` in one go: a kill leaves the old file or the new one."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def write_result(recipe: Recipe, folder: Path, trainer: Trainer, measured: Mapping[str, Any]) -> None:
    """`result.json`, written last: it marks a finished run."""
    result = {
        "recipe": recipe.name,
        "control": recipe.method.arm,
        "seed": recipe.seed,
        "steps": trainer.step,
        "metrics": trainer.metrics,
        "world_size": trainer.ranks.world,
        "device": torch.cuda.get_device_name() if trainer.ranks.device.type == "cuda" else "cpu",
        "zero_stage": {name: zero_block(model.zero)["stage"] for name, model in recipe.models.items()},
        "versions": provenance.versions(),
        "commit": provenance.own_commit(),
        "user_commit": provenance.user_commit(),
        "command": " ".join([Path(sys.executable).name, sys.argv[0], *without_local_rank(sys.argv[1:])]),
        **measured,
    }
    try:
        _write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise Unwritable(folder / "result.json", error) from error
