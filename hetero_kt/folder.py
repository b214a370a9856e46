"""A run's folder: where it is, what in it may go on, what a finished run leaves in it.

<output_dir>/<recipe>/<control>/seed<k>/
    recipe.yaml, data.json     what the run is of; a resume has to agree with both
    metrics.jsonl, tensorboard/, checkpoints/, export/
    lock                       while a job is at work in it
    start.json                 while --resume never or PATH has been asked for and not been done (`intent`)
    abandoned-after-<step>/    checkpoints of a branch that was left by going back
    result.json                written last: it marks a finished run
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hetero_kt import data, intent, parts, provenance
from hetero_kt.checks import zero_block
from hetero_kt.config import Recipe, differences, read_recipe, to_yaml
from hetero_kt.distributed import layout
from hetero_kt.distributed.agreement import Unwritable, UserError, agreed
from hetero_kt.distributed.launch import Ranks
from hetero_kt.documents import mapping, read_json, whole
from hetero_kt.files import sync, write_whole
from hetero_kt.intent import Intent
from hetero_kt.lock import Lock
from hetero_kt.models.teacher import Frozen
from hetero_kt.options import Options, without_local_rank
from hetero_kt.removal import CHECKPOINT, EXPORT, EXPORT_FOLDER, TENSORBOARD, is_folder, remove_written
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


def look(recipe: Recipe, options: Options, folder: Path) -> tuple[Path | None, int, str]:
    """(checkpoint to go on from, steps of a finished run that is not to be repeated, what `--resume` stands for).

    The last is the option's value, or under `auto` what an earlier start was asked for and has not done.

    Raises:
        ValueError: the folder, or the checkpoint asked for, is of another recipe, or torn; or something else lies where
            the run would write.
    """
    resume = asked(folder) if options.resume == "auto" else options.resume
    _check_places(folder, resume)
    start = _find_start(recipe, resume, folder)
    return start, finished_steps(folder) if resume == "auto" else 0, resume


def asked(folder: Path) -> str:
    """What `--resume auto` stands for: itself, or what an earlier start was asked for and has not done.

    Raises:
        ValueError: the note of it is damaged.
    """
    note = intent.read(folder)
    if note is None or (note.opened and layout.complete(folder / "checkpoints")):
        return "auto"
    return note.resume


def _check_places(folder: Path, resume: str) -> None:
    """Refuse a file or a link in the place of a run's folder, before hours of training end at it."""
    for name in ("checkpoints", "tensorboard", "export"):
        place = folder / name
        if (place.exists() or place.is_symlink()) and not is_folder(place):
            kind = "link" if place.is_symlink() else "file"
            raise ValueError(f"{place} is a {kind} where a folder of the run belongs: move it away.")
    layout.check_folder(folder / "checkpoints", renamed=resume != "never")


def _find_start(recipe: Recipe, resume: str, folder: Path) -> Path | None:
    """The checkpoint to go on from, None for a fresh start; it, and what lies in the folder, must be of this recipe."""
    if resume == "never":
        return None
    _check_same_recipe(recipe, folder, resume)
    path = folder if resume == "auto" else Path(resume).resolve()
    found = layout.complete(path / "checkpoints")
    if found:
        path = found[-1]
    elif resume == "auto":
        return None
    elif not (path / "DONE").exists():
        raise ValueError(f"--resume {path} holds no complete checkpoint: name a run folder or a checkpoint in it.")
    layout.check(path)
    _check_same_recipe(recipe, path.parents[1], resume)
    return path


def note_intent(folder: Path, resume: str) -> None:
    """Note what is to be started in a folder, before any rank is; nothing where there is no run to be taken for it.

    Raises:
        ValueError: a job is at work in the folder, or it cannot be written.
    """
    if resume == "never" and not folder.is_dir():
        return
    lock = Lock(folder)
    try:
        lock.take()
        try:
            intent.write(folder, Intent(resume if resume == "never" else str(Path(resume).resolve())))
        finally:
            lock.release()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): name another --output-dir.") from error


@contextmanager
def noted(folder: Path, given: str, start_from: Path | None, ranks: Ranks) -> Iterator[None]:
    """Inside, the folder says what this start was asked for, so that one which dies is not taken for `--resume auto`.
    A start that is refused before the folder was made ready takes it back. Collective.

    Args:
        given: the option's own value.
        start_from: the checkpoint that it stands for.

    Raises:
        UserError: the folder cannot be written.
    """
    ours = Intent("never" if start_from is None else str(start_from.resolve()))
    writes = ranks.first and given != "auto"
    before = None
    with agreed():
        if writes:
            with contextlib.suppress(ValueError):  # a damaged note goes
                before = intent.read(folder)
            try:
                intent.write(folder, ours)
            except OSError as error:
                raise ValueError(
                    f"{folder} cannot be written ({error.strerror}): name another --output-dir."
                ) from error
    try:
        yield
    except UserError:
        if writes and intent.read(folder) == ours:
            with contextlib.suppress(OSError):
                intent.clear(folder) if before is None else intent.write(folder, before)
        raise


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


def open_folder(
    recipe: Recipe, resume: str, start_from: Path | None, folder: Path, seen_data: Mapping[str, Any]
) -> None:
    """Make the folder this run's. With --resume never what lay in it goes; a checkpoint that does not lead to
    `start_from` is moved aside, and that is said. Any part of it may be done again by the next start.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)  # of a shorter run: it would mark this one as finished
        if resume == "never":
            _clear(folder)
        elif start_from is not None:
            _set_aside(folder, start_from)
        write_whole(folder / "recipe.yaml", to_yaml(recipe))
        write_whole(folder / "data.json", json.dumps(seen_data, indent=1) + "\n")
        if resume != "auto":
            own = start_from is None or _is_own(folder, start_from)
            intent.clear(folder) if own else intent.write(folder, Intent(str(start_from), opened=True))
    except OSError as error:
        raise ValueError(_cannot_write(recipe, error)) from error


def _is_own(folder: Path, checkpoint: Path) -> bool:
    return checkpoint.resolve().parent == (folder / "checkpoints").resolve()


def _clear(folder: Path) -> None:
    """Remove what an earlier run has written; what else lies there stays."""
    saved = folder / "checkpoints"
    for path in layout.steps(saved):
        (path / "DONE").unlink(missing_ok=True)
        remove_written(path, CHECKPOINT)
    remove_written(saved, ())
    remove_written(folder / "tensorboard", TENSORBOARD)
    export = folder / "export"
    for path in export.iterdir() if is_folder(export) else ():
        remove_written(path, EXPORT_FOLDER)
    remove_written(export, EXPORT)
    (folder / "metrics.jsonl").unlink(missing_ok=True)


def _set_aside(folder: Path, start_from: Path) -> None:
    """Move checkpoints that do not lead to `start_from` out of the way of later starts."""
    step, own = int(start_from.name), _is_own(folder, start_from)
    left = [path for path in layout.steps(folder / "checkpoints") if not own or int(path.name) > step]
    log = folder / "metrics.jsonl"
    others = [log] if not own and log.is_file() and not log.is_symlink() else []
    if not (left or others):
        return
    place, number = folder / f"abandoned-after-{step}", 1
    while place.exists() or place.is_symlink():
        number += 1
        place = folder / f"abandoned-after-{step}-{number}"
    place.mkdir()
    for path in (*reversed(left), *others):
        # A log that keeps its name would count as another run's.
        os.rename(path, place / (path.name if path in left else f"{path.name}.old"))
    for parent in (folder / "checkpoints", place, folder):
        if parent.is_dir():
            sync(parent)
    if left:
        names = ", ".join(path.name for path in left)
        print(f"{folder} goes on from {start_from}: its checkpoints {names} are in {place.name} now", flush=True)


def _cannot_write(recipe: Recipe, error: OSError) -> str:
    return f"--output-dir {recipe.output_dir} cannot be written ({error.strerror}: {error.filename}): name another."


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
        write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise Unwritable(folder / "result.json", error) from error
