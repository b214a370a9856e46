"""What goes wrong while a checkpoint is written or read: the last one stays whole, and one sentence says what to do."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from small import Convolutions, batch, loss, zero
from torch import nn

from hetero_kt import folder as folders
from hetero_kt import log, trainer
from hetero_kt.config import Model, Optim, Schedule
from hetero_kt.distributed import checkpoint, layout
from hetero_kt.distributed.agreement import Unwritable, UserError
from hetero_kt.distributed.checkpoint import Checkpoints
from hetero_kt.distributed.learner import Learner, build_learner
from hetero_kt.distributed.saved import Saved, SavedModel
from hetero_kt.folder import run_folder
from hetero_kt.options import Options

CPU = torch.device("cpu")


def learner_of(model: nn.Module | None = None, stage: int = 1) -> Learner:
    torch.manual_seed(0)
    recipe = Model("small", data="", optim=Optim("adamw", lr=1e-2), schedule=Schedule())
    return build_learner(model or Convolutions(), recipe, zero(stage), rows=4, steps=20)


def step(learner: Learner) -> None:
    learner.engine.backward(loss(learner.engine, batch(0)))
    learner.step()


class Killed(BaseException):
    """What a SIGKILL would be."""


@contextmanager
def ends_at(number: int, end: Callable[[], BaseException]) -> Iterator[list[str]]:
    """The `number`-th call of anything that changes files, from 0 on, does not happen, and none after it."""
    calls: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            calls.append(name)
            if len(calls) > number:
                raise end()
            return real(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "save_file", watched("save_file", layout.save_file))
        patch.setattr(Path, "write_text", watched("write_text", Path.write_text))
        patch.setattr(Path, "unlink", watched("unlink", Path.unlink))
        patch.setattr(Path, "mkdir", watched("mkdir", Path.mkdir))
        patch.setattr(os, "fsync", watched("fsync", os.fsync))
        patch.setattr(os, "replace", watched("replace", os.replace))
        patch.setattr(shutil, "rmtree", watched("rmtree", shutil.rmtree))
        patch.setattr(threading, "excepthook", lambda _: None)
        yield calls


def killed_everywhere(folder: str) -> tuple[int, list[str]]:
    """Saves step 2 beside step 1, killed at each change of a file in turn; after each, what is there."""
    learner, wrong = learner_of(), []
    step(learner)
    for number in itertools.count():
        place = Path(folder) / str(number)
        first = Checkpoints(place, keep=1, device=CPU)
        first.save(1, {"one": learner}, {})
        first.finish()
        done = False
        try:
            with ends_at(number, Killed) as calls:
                first.save(2, {"one": learner}, {})
                first.finish()
                done = len(calls) <= number
        except (Killed, UserError):
            pass
        whole = layout.complete(place)
        for path in whole:
            try:
                layout.verify(path)
            except ValueError as error:
                wrong.append(f"{number}: {error}")
        if not whole:
            wrong.append(f"{number}: nothing is left")
        after = Checkpoints(place, keep=1, device=CPU)  # whoever comes next clears up
        after.save(3, {"one": learner}, {})
        after.finish()
        if [path.name for path in place.iterdir()] != ["3"]:
            wrong.append(f"{number}: {sorted(place.iterdir())} after the next one")
        if done:
            return number, wrong


def test_a_kill_at_any_change_of_a_file_leaves_a_whole_checkpoint(ranks: Any, tmp_path: Path) -> None:
    ((number, wrong),) = ranks(1).run(killed_everywhere, str(tmp_path))
    assert number >= 10, "there are as many moments at least"
    assert not wrong


def full(base: Any, after: int, number: int) -> tuple[str, int]:
    """A run whose second rank finds the disk full at its second checkpoint; what ended it, and after how many steps."""
    real = layout.save_file

    def no_space(tensors: Any, file: Path) -> None:
        if file.parent.name == str(after) and dist.get_rank() == 1:
            raise OSError(number, os.strerror(number), str(file))
        real(tensors, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "save_file", no_space)
        try:
            tiny._train(base, Options(), tiny.Plan())
        except UserError as error:
            return str(error), len(tiny.lines(run_folder(base)))
    return "", 0


def test_a_full_disk_ends_all_ranks_with_one_sentence_and_the_last_checkpoint_is_whole(
    ranks: Any, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path, steps=200, save_every=2, keep=2, eval_every=0)
    recipe = replace(recipe, models={k: replace(m, ema=0.0) for k, m in recipe.models.items()})
    (one, steps), (other, _) = ranks(2).run(full, recipe, 4, errno.ENOSPC)
    assert one == other
    assert one.startswith("rank 1: the checkpoint ")
    assert "cannot be written (No space left on device): make room" in one
    assert steps < 12, "at once, not at the end"
    folder = run_folder(recipe)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"], "what was begun makes room"
    layout.verify(folder / "checkpoints" / "2")
    assert not (folder / "lock").exists()
    assert [end["first_step"] for end in tiny.train(ranks(2), recipe, Options(max_steps=4))] == [2, 2]


def unwritable(folder: str) -> str:
    learner, place = learner_of(), Path(folder) / "checkpoints"
    place.write_text("a file")
    try:
        Checkpoints(place, keep=1, device=CPU).save(1, {"one": learner}, {})
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_that_cannot_be_written_is_said_before_training_goes_on(ranks: Any, tmp_path: Path) -> None:
    one, other = ranks(2).run(unwritable, str(tmp_path))
    assert one == other
    assert f"the checkpoint {tmp_path}/checkpoints/1 cannot be written (Not a directory)" in one


def slow(folder: str) -> list[Any]:
    """Trains on while the second rank still writes; what is complete at each look, and what the checkpoint holds."""
    learner, place, may_go_on = learner_of(), Path(folder), threading.Event()
    real = layout.save_file

    def waits(tensors: Any, file: Path) -> None:
        assert dist.get_rank() == 0 or may_go_on.wait(60)
        real(tensors, file)

    step(learner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "save_file", waits)
        before = {piece.name: piece.master().clone() for piece in learner.pieces}
        saving = Checkpoints(place, keep=1, device=CPU)
        saving.save(1, {"one": learner}, {})
        looks = []
        for _ in range(3):
            step(learner)
            looks.append((saving.settle(), layout.complete(place)))
        time.sleep(1)  # longer than a busy machine takes for the little that is waited for
        may_go_on.set()
        saving._writing.join()  # type: ignore[union-attr]
        dist.barrier()
        written = saving.settle()
    with Saved(place / "1") as saved:
        held = SavedModel(saved, "one")
        same = all(torch.equal(held.read("weight", p.name, p.start, p.stop), before[p.name]) for p in learner.pieces)
    moved = any(not torch.equal(p.master(), before[p.name]) for p in learner.pieces)
    assert written is not None
    return [looks, same, moved, written.step, 0 <= written.stall < written.writing]


def test_training_goes_on_while_files_are_written_and_they_hold_the_step_of_the_save(
    ranks: Any, tmp_path: Path
) -> None:
    for looks, same, moved, at, stalled_less in ranks(2).run(slow, str(tmp_path)):
        assert looks == [(None, [])] * 3
        assert same
        assert moved
        assert at == 1
        assert stalled_less


def slowly_removed(folder: str) -> list[Any]:
    """Trains on while an old checkpoint is still being removed; what is complete meanwhile and afterwards."""
    learner, place, removing, may_go_on = learner_of(), Path(folder), threading.Event(), threading.Event()
    real = shutil.rmtree

    def waits(path: Any, *args: Any, **more: Any) -> None:
        if threading.current_thread().name == "pruning":
            removing.set()
            assert may_go_on.wait(60)
        real(path, *args, **more)

    step(learner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", waits)
        saving = Checkpoints(place, keep=1, device=CPU)
        saving.save(1, {"one": learner}, {})
        saving.finish()
        saving.save(2, {"one": learner}, {})
        while (written := saving.settle()) is None:
            step(learner)
        assert removing.wait(60)
        meanwhile = sorted(path.name for path in place.iterdir()), [path.name for path in layout.complete(place)]
        may_go_on.set()
        saving.finish()
    return [written.step, *meanwhile, [path.name for path in place.iterdir()]]


def test_training_does_not_wait_for_old_checkpoints_to_be_removed(ranks: Any, tmp_path: Path) -> None:
    assert ranks(1).run(slowly_removed, str(tmp_path)) == [[2, ["1", "2"], ["2"], ["2"]]]


# --- reading ---


def saved_once(folder: str, stage: int = 1) -> None:
    learner = learner_of(stage=stage)
    step(learner)
    saving = Checkpoints(Path(folder), keep=1, device=CPU)
    saving.save(1, {"one": learner}, {"note": [1, 2]})
    saving.finish()


def loaded(folder: str, other: bool) -> str:
    model = nn.Sequential(nn.Conv2d(3, 7, 5), nn.Flatten(), nn.Linear(7 * 16, 10)) if other else None
    try:
        checkpoint.load(Path(folder) / "1", {"one": learner_of(model)})
    except UserError as error:
        return str(error)
    return ""


def sign_again(saved: Path) -> None:
    """DONE as someone would write it who has changed the files."""
    done = json.loads((saved / "DONE").read_text())
    for name in done["files"]:
        content = (saved / name).read_bytes()
        done["files"][name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    (saved / "DONE").write_text(json.dumps(done))


class Runs:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.file, "w")


def of_another_size(saved: Path) -> None:
    index = json.loads((saved / "rank0.json").read_text())
    entry = index["tensors"]["one/exp_avg/fc.weight"]
    entry["range"], entry["shape"] = [0, 10**12], [10**12]
    (saved / "rank0.json").write_text(json.dumps(index))


def of_a_strange_file(saved: Path) -> None:
    index = json.loads((saved / "rank0.json").read_text())
    index["own"] = {"dict": [["models", {"tensor": "../../etc/passwd"}]]}
    (saved / "rank0.json").write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another model's": (lambda saved: None, "holds one's "),
    "pickle": (
        lambda saved: (saved / "rank0.safetensors").write_bytes(pickle.dumps(Runs(saved.parent / "executed"))),
        "rank0.safetensors cannot be read as safetensors",
    ),
    "pickle of torch": (
        lambda saved: torch.save({"x": Runs(saved.parent / "executed")}, saved / "rank0.safetensors"),
        "rank0.safetensors cannot be read as safetensors",
    ),
    "pickle in the index": (
        lambda saved: (saved / "rank0.json").write_bytes(pickle.dumps(Runs(saved.parent / "executed"))),
        "rank0.json cannot be read",
    ),
    "index cut": (lambda saved: (saved / "rank0.json").write_text('{"tensors": {'), "rank0.json cannot be read"),
    "index of a rank only": (
        lambda saved: shutil.copy(saved / "rank0.json", saved / "rank1.json"),
        "does not hold all of one's",
    ),
    "size": (of_another_size, "another size than its index says"),
    "tree": (of_a_strange_file, "cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_forged_or_foreign_checkpoint_runs_nothing_and_is_named(ranks: Any, tmp_path: Path, case: str) -> None:
    """Even where its checksums fit."""
    both = case == "index of a rank only"
    ranks(2 if both else 1).run(saved_once, str(tmp_path))
    damage, words = DAMAGE[case]
    damage(tmp_path / "1")
    sign_again(tmp_path / "1")
    for said in ranks(2 if both else 1).run(loaded, str(tmp_path), case == "another model's"):
        assert words in said, said
        assert str(tmp_path / "1") in said
        assert "remove this checkpoint" in said or "--resume never" in said
    assert not (tmp_path / "executed").exists()


def test_every_file_is_checked_by_one_of_the_ranks_that_read(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(saved_once, str(tmp_path))
    files = sorted(path for path in (tmp_path / "1").iterdir() if path.name != "DONE")
    assert len(files) == 4
    for i, file in enumerate(files):
        good = file.read_bytes()
        middle = len(good) // 2
        file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        for rank in range(3):
            if i % 3 == rank:
                with pytest.raises(ValueError, match=f"{file.name} is not as it was saved .* remove this checkpoint"):
                    layout.verify(tmp_path / "1", rank, 3)
            else:
                layout.verify(tmp_path / "1", rank, 3)
        file.write_bytes(good)
    layout.verify(tmp_path / "1")


def without_room(base: Any, name: str) -> str:
    """A run whose log, export or result does not fit on the disk; what ends it."""

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if name == "metrics.jsonl":
            patch.setattr(log, "write_whole", no_space)
        if name == "tensorboard":
            patch.setattr(log, "SummaryWriter", no_space)
        if name == "tensorboard, later":
            patch.setattr(log.SummaryWriter, "add_scalar", no_space)
        if name == "export/resnet":
            patch.setattr(trainer, "save_tensors", no_space)
        if name == "result.json":
            write = folders.write_whole
            patch.setattr(folders, "write_whole", lambda p, t: no_space() if p.name == name else write(p, t))
        try:
            tiny._train(base, Options(), tiny.Plan())
        except (Unwritable, UserError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize("name", ["tensorboard", "tensorboard, later", "metrics.jsonl", "export/resnet", "result.json"])
def test_what_the_first_rank_alone_writes_ends_it_with_a_sentence_too(ranks: Any, tmp_path: Path, name: str) -> None:
    recipe = tiny.recipe(tmp_path, steps=2, save_every=1)
    (said,) = ranks(1).run(without_room, recipe, name)
    folder = run_folder(recipe)
    file = folder / name.removesuffix(", later")
    assert said.startswith(f"{file} cannot be written (No space left on device): make room")
    assert not (folder / "lock").exists()
    assert tiny.train(ranks(1), recipe)[0]["done"], "with room it goes on"
