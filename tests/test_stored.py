"""Teachers' logits on disk: the live ones to the bit, computed once by all ranks, refused when damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import timm
import tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_fbt import zero
from test_options import one_sentence

from hetero_kt import checks, data, models, parts
from hetero_kt import run as running
from hetero_kt.config import Data, Mix, Recipe, Teacher
from hetero_kt.distributed.agreement import UserError
from hetero_kt.distributed.launch import Ranks, StopSignal
from hetero_kt.models import stored
from hetero_kt.models.stored import Store, Stored, fill
from hetero_kt.models.teacher import Frozen, build_teacher
from hetero_kt.options import Options

PICTURES = Data("generated", batch=8, per_class=1, augmentations=2)  # 100 samples


def recipe(folder: Path, logits: Any = "stored", objective: Any = "kd", **changes: Any) -> Recipe:
    base = tiny.distillation(folder, objective=objective, data={"all": PICTURES}, steps=3)
    teachers = {name: replace(teacher, logits=logits) for name, teacher in base.method.teachers.items()}
    return replace(base, method=replace(base.method, teachers=teachers), **changes)


def here() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_rank(), torch.device("cpu"))


def teacher_and_loader(pictures: Data, in_pieces: bool = False, name: str = "cifar:resnet_tiny") -> tuple[Frozen, Any]:
    place = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loader = data.open_loader(pictures, train=True, seed=3, rank=place[0], world=place[1])
    torch.manual_seed(1)
    given = {"classes": loader.classes, "image_size": 32, "mean": loader.mean, "std": loader.std}
    teacher = build_teacher(Teacher(name, init="random"), "option", zero=zero(3) if in_pieces else None, **given)
    return teacher, loader


def store_of(folder: str | Path, loader: Any, augmentations: int, **changes: Any) -> Store:
    about = {"teacher": "t"}
    return Store(Path(folder), about, loader.samples, augmentations, loader.classes, **{"shard": 40, **changes})


# --- the live teacher's, to the bit ---


def test_a_run_on_stored_logits_is_the_live_one(ranks: Any, tmp_path: Path) -> None:
    live, kept = (tiny.train(ranks(2), recipe(tmp_path / name, name)) for name in ("live", "stored"))
    tiny.assert_same_end(kept, live)
    assert tiny.lines(tmp_path / "live" / "tiny_distilled" / "kd" / "seed0") == tiny.lines(
        tmp_path / "stored" / "tiny_distilled" / "kd" / "seed0"
    )


FAST = replace(PICTURES, augment=("crop", "flip"))
TIMM = replace(PICTURES, pipeline="timm", workers=0, augmentations=3)
PLAIN = replace(PICTURES, augment=(), augmentations=0)


@pytest.mark.parametrize("pictures", [FAST, TIMM, PLAIN], ids=["fast", "timm", "plain"])
@pytest.mark.parametrize("name", ["cifar:resnet_tiny", "cifar:vit_tiny"])
def test_every_step_reads_what_the_teacher_says(tmp_path: Path, pictures: Any, name: str) -> None:
    """Over several epochs, in which augmentations take turns."""
    teacher, loader = teacher_and_loader(pictures, name=name)
    times = pictures.augmentations or 1
    store = store_of(tmp_path, loader, times)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    with single():
        assert fill(store, teacher, loader, alone, 8, torch.float32) == -(-100 * times // 40)
    kept = Stored(teacher, store, loader)
    for step in (0, 5, 13, 30, 41):
        shown, _ = loader.batch(step)
        kept.begin(step)
        for piece in shown.split(4):
            assert torch.equal(kept.logits(piece), torch.cat([teacher.logits(shown)]).split(4)[kept.used // 4 - 1])


class single:
    """A process group of one, without a pool."""

    def __enter__(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()


# --- by all ranks, once ---


def shares(folder: str, in_pieces: bool) -> dict[str, Any]:
    teacher, loader = teacher_and_loader(replace(PICTURES, augmentations=1), in_pieces)
    teacher.start()
    store = store_of(folder, loader, 1)  # three shards, of 40, 40 and 20 rows
    forwards: list[int] = []
    answer = teacher.logits
    teacher.logits = lambda x: forwards.append(len(x)) or answer(x)  # type: ignore[func-returns-value,method-assign]
    computed = fill(store, teacher, loader, here(), 8, torch.float32)
    again = fill(store, teacher, loader, here(), 8, torch.float32)
    found = {"computed": computed, "again": again, "forwards": forwards}
    asked = [(np.arange(k, k + 4), np.zeros(4, np.int64)) for k in (0, 60)]
    expected = torch.cat([answer(x) for x in loader.augmented(asked)])
    rows = np.array([0, 1, 2, 3, 60, 61, 62, 63])
    found["error"] = float((store.logits(rows, 0 * rows) - expected).abs().max())
    teacher.stop()
    return found


@pytest.mark.parametrize("in_pieces", [False, True])
def test_ranks_share_the_work(ranks: Any, tmp_path: Path, in_pieces: bool) -> None:
    first, second = ranks(2).run(shares, str(tmp_path), in_pieces)
    assert (first["computed"], first["again"]) == (second["computed"], second["again"]) == (3, 0)
    # A teacher in pieces takes everybody along; else a rank without a shard rests.
    assert first["forwards"] == [8] * (10 if in_pieces else 8)
    assert second["forwards"] == [8] * (10 if in_pieces else 5)
    assert max(first["error"], second["error"]) < 1e-5
    files = sorted(path.name for path in next(tmp_path.iterdir()).iterdir())
    assert files == [*(f"0000{i}-of-00003.safetensors" for i in range(3)), "store.json"]


def test_what_a_killed_start_has_left_is_gone_on_with(tmp_path: Path) -> None:
    teacher, loader = teacher_and_loader(PICTURES)
    store = store_of(tmp_path, loader, 2)
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    with single():
        fill(store, teacher, loader, alone, 8, torch.float32)
        first = {i: load_file(store.file(i)) for i in range(store.shards)}
        stamps = {i: store.file(i).stat().st_mtime_ns for i in range(store.shards)}
        store.file(1).unlink()
        store.file(3).unlink()
        (store.folder / "00001-of-00005.safetensors.99.part").write_bytes(b"torn")
        assert store.missing() == [1, 3]
        store.check()
        assert fill(store, teacher, loader, alone, 8, torch.float32) == 2
    for i in range(store.shards):
        torch.testing.assert_close(load_file(store.file(i)), first[i], rtol=0, atol=0)
    kept = (0, 2, 4)
    assert [store.file(i).stat().st_mtime_ns for i in kept] == [stamps[i] for i in kept]


def test_a_start_killed_in_the_middle_of_a_write_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, {}, 10, 1, 3, shard=10)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stored.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write(0, torch.zeros(10, 3))
    assert store.missing() == [0]


def test_the_next_run_reads_what_is_there(ranks: Any, tmp_path: Path) -> None:
    tiny.train(ranks(2), recipe(tmp_path))
    (folder,) = (tmp_path / "teacher_logits").iterdir()
    stamps = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    for objective in ("nkd", "ofa"):
        end = tiny.train(ranks(2), recipe(tmp_path, objective=objective))
        assert [one["done"] for one in end] == [True, True]
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == stamps
    tiny.train(ranks(2), recipe(tmp_path, seed=1))
    assert len(list((tmp_path / "teacher_logits").iterdir())) == 2, "another seed augments otherwise"


# --- keys, and what is refused ---


def key_of(folder: Path, base: Recipe) -> str:
    loader = data.open_loader(base.data["all"], train=True, seed=base.seed)
    given = {"classes": loader.classes, "image_size": 32, "mean": loader.mean, "std": loader.std}
    teacher = build_teacher(base.method.teachers["teacher"], "option", **given)  # type: ignore[union-attr]
    return parts.distill.store_of(base, "teacher", teacher, loader).folder.name


def of_teacher(base: Recipe, **changes: Any) -> Recipe:
    teacher = replace(base.method.teachers["teacher"], **changes)  # type: ignore[union-attr]
    return replace(base, method=replace(base.method, teachers={"teacher": teacher}))


CHANGES: dict[str, Callable[[Recipe], Recipe]] = {
    "seed": lambda base: replace(base, seed=1),
    "augmentation": lambda base: replace(base, data={"all": replace(PICTURES, augment=("flip",))}),
    "how many": lambda base: replace(base, data={"all": replace(PICTURES, augmentations=3)}),
    "samples": lambda base: replace(base, data={"all": replace(PICTURES, per_class=2)}),
    "pipeline": lambda base: replace(base, data={"all": replace(PICTURES, pipeline="timm", workers=0)}),
    "what the teacher sees": lambda base: of_teacher(base, mean=(0.1, 0.2, 0.3)),
    "precision": lambda base: tiny.with_student(base, precision="autocast"),
}


def test_a_key_stands_for_all_that_decides_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = recipe(tmp_path)
    keys = {name: key_of(tmp_path, change(base)) for name, change in CHANGES.items()}
    for library in (torch, timm, PIL):  # another version may draw another picture for the same seed
        with monkeypatch.context() as later:
            later.setattr(library, "__version__", "99.0.0")
            keys[library.__name__] = key_of(tmp_path, base)
    other = tmp_path / "other.safetensors"
    torch.manual_seed(12)
    save_file(models.build("cifar:swin_tiny", 100).state_dict(), other)
    keys["weights"] = key_of(tmp_path, of_teacher(base, init=str(other)))
    keys["itself"] = key_of(tmp_path, base)
    assert len(set(keys.values())) == len(keys), keys
    same = [replace(base, steps=99, name="x"), tiny.with_student(base, name="cifar:vit_tiny")]
    same.append(replace(base, method=replace(base.method, objective="dkd")))
    assert {key_of(tmp_path, one) for one in same} == {keys["itself"]}, (
        "whom it teaches, how and how long does not count"
    )
    still = replace(base, data={"all": replace(PICTURES, augment=(), augmentations=0)})
    assert key_of(tmp_path, still) == key_of(tmp_path, replace(still, seed=1))


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def zeros(file: Path) -> None:
    """What a machine that stopped leaves where the file's size was on the disk and its content was not."""
    file.write_bytes(bytes(file.stat().st_size))


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def foreign(file: Path) -> None:
    save_file(load_file(file), file, {"store": "another", "checksum": "0"})


def shorter(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def told(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        note = file.parent / "store.json"
        note.write_text(json.dumps(json.loads(note.read_text()) | change({})))

    return write


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flipped, "is damaged (its checksum differs)"),
        (shorter, "is damaged"),
        (foreign, "is of another store"),
        (told(lambda _: {"teacher": "another"}), "tells of another teacher"),
        (lambda file: (file.parent / "store.json").write_text("{"), "cannot be read"),
        (lambda file: (file.parent / "store.json").write_text("[" * 100_000), "cannot be read"),
        (zeros, "is damaged"),
        (fifo, "is damaged (it is no regular file"),
    ],
)
def test_a_damaged_store_is_refused_by_name(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    store = Store(tmp_path, {"teacher": "t"}, 12, 1, 3, shard=5)
    store.sign()
    for i in range(3):
        store.write(i, torch.randn(len(store.rows(i)[0]), 3))
    store.check()
    damage(store.file(1))
    with pytest.raises(ValueError, match="remove") as error:
        store.check()
    assert said in str(error.value)
    assert str(store.folder) in str(error.value)
    assert one_sentence(str(error.value))
    if damage is flipped:
        store.check(rank=0, world=2)  # that shard is the other rank's to look at


def refused(base: Recipe) -> str:
    torch.manual_seed(0)
    with tiny.handlers_kept(), pytest.raises(UserError) as error:
        running.run(base, Options(), here(), StopSignal())
    return str(error.value)


def lost(folder: str, pictures: Data) -> tuple[str, int]:
    """What is said of a teacher whose answers are NaN, and how many shards it has left."""
    teacher, loader = teacher_and_loader(pictures)
    store = store_of(folder, loader, 1)
    with torch.no_grad():
        next(iter(teacher.module.parameters())).fill_(torch.nan)
    try:
        fill(store, teacher, loader, here(), 8, torch.float32)
    except ValueError as error:
        return str(error), store.shards - len(store.missing())
    return "", 0


def test_logits_that_are_not_finite_are_not_stored(ranks: Any, tmp_path: Path) -> None:
    ((said, kept),) = ranks(1).run(lost, str(tmp_path), Data("generated", batch=8, augment=()))
    assert "are not finite" in said
    assert kept == 0


def test_shards_and_their_note_are_on_the_disk_before_their_names(tmp_path: Path, monkeypatch: Any) -> None:
    synchronised: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace_ = os.replace

    def replaced(old: Path, new: Path) -> None:
        assert synchronised[-1] == str(old)
        replace_(old, new)

    monkeypatch.setattr(os, "replace", replaced)
    store = Store(tmp_path, {}, 10, 1, 3, shard=10)
    store.sign()
    store.write(0, torch.zeros(10, 3))
    assert synchronised[-1] == str(store.folder)
    store.check()


@pytest.mark.slow
def test_a_run_refuses_it_on_all_ranks(ranks: Any, tmp_path: Path) -> None:
    base = recipe(tmp_path)
    tiny.train(ranks(2), base)
    (file,) = (tmp_path / "teacher_logits").rglob("*.safetensors")
    flipped(file)
    again = replace(base, name="again")
    for said in ranks(2).run(refused, again):
        assert str(file) in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda base: replace(base, method=replace(base.method, objective="fitnet")),
            "needs the teacher's features too",
        ),
        (lambda base: replace(base, method=replace(base.method, objective="fbt")), "needs the teacher's features too"),
        (lambda base: replace(base, data={"all": replace(PICTURES, mix=Mix(mixup=0.8))}), "no two batches mix"),
        (lambda base: replace(base, data={"all": replace(PICTURES, augmentations=0)}), "--data.all.augmentations 8"),
        (lambda base: replace(base, data={"all": replace(TIMM, augmentations=0)}), "--data.all.augmentations 8"),
    ],
)
def test_what_does_not_repeat_cannot_be_stored(tmp_path: Path, change: Any, said: str) -> None:
    base = recipe(tmp_path)
    checks.check(base)
    with pytest.raises(ValueError, match=r"--method.teachers.teacher.logits stored") as error:
        checks.check(change(base))
    assert said in str(error.value)
    assert one_sentence(str(error.value))


def test_augmentations_take_turns() -> None:
    for pictures in (FAST, replace(TIMM, augmentations=2)):
        loader = data.open_loader(pictures, train=True, seed=3)
        samples = np.arange(8)
        epochs = [torch.stack(list(loader.augmented([(samples, np.full(8, k % 2))]))) for k in range(3)]
        assert torch.equal(epochs[0], epochs[2])
        assert not torch.equal(epochs[0], epochs[1])
        seen: dict[tuple[int, int], torch.Tensor] = {}
        for step in range(4 * loader.steps_per_epoch):
            shown, _ = loader.batch(step)
            for sample, augmentation, picture in zip(*loader.drawn(step), shown, strict=True):
                assert augmentation == step // loader.steps_per_epoch % 2
                assert torch.equal(seen.setdefault((sample, augmentation), picture), picture)
