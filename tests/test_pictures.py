"""The loader that decodes picture by picture: the same batches whoever reads them, timm's own augmentation, damage."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hetero_kt import data
from hetero_kt.config import Data, Mix, Transform
from hetero_kt.data import ImageSet, Loader, counter, pictures, sharding, workers
from hetero_kt.data.mixing import Mixer
from hetero_kt.data.pictures import InMemory, PictureLoader, Unreadable

STRONG = Transform(
    scale=(0.3, 1.0), color_jitter=0.4, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5, crop_fraction=0.9
)


def numbered(size: int, side: int = 12) -> ImageSet:
    """A set whose labels are its row numbers, so that a batch tells which samples it holds."""
    pixels = torch.from_numpy(counter.bits(6, np.arange(size * side * side * 3)) >> np.uint64(56))
    images = pixels.to(torch.uint8).view(size, side, side, 3)
    return ImageSet(images, torch.arange(size), max(size, 1), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "numbered")


def loader(images: ImageSet, batch: int, rank=0, world=1, *, seed=3, transform=STRONG, size=16, **options):
    return PictureLoader(InMemory(images), batch, seed, transform, size, rank, world, **options)


@pytest.fixture(scope="module")
def set_folder(tmp_path_factory):
    """Shards of 48 pictures of 48 classes, 8 to a shard, and of 10 to evaluate on."""
    folder = tmp_path_factory.mktemp("set")
    for part, count in (("train", 48), ("val", 10)):
        images = numbered(count, 20)
        for number in range(48):
            (folder / "tree" / part / f"{number:02d}").mkdir(parents=True)
        for number, image in enumerate(images.images):
            Image.fromarray(image.numpy()).save(folder / "tree" / part / f"{number:02d}" / "0.png")
    sharding.write(str(folder / "tree"), str(folder / "shards"), shard_size="8", quiet=True)
    return folder


def copied(set_folder: Path, place: Path) -> Path:
    """A copy of the shards to damage."""
    for file in (set_folder / "shards").rglob("*.*"):
        target = place / file.relative_to(set_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return place / "shards"


CONFIG = Data(name="shards", folder="shards", pipeline="timm", batch=12, image_size=16, transform=STRONG, workers=0)


def of_shards(folder: Path, rank=0, world=1, *, train=True, seed=3, **changes):
    config = replace(CONFIG, **changes)
    return data.open_loader(config, str(folder), train=train, seed=seed, rank=rank, world=world)


# ---- who reads does not matter


def test_two_ranks_with_two_workers_see_every_sample_once_an_epoch(set_folder):
    readers = [of_shards(set_folder, rank, 2, workers=2) for rank in range(2)]
    alone = of_shards(set_folder)
    assert alone.steps_per_epoch == 4
    try:
        epochs = []
        for epoch in range(2):
            seen = []
            for step in range(4 * epoch, 4 * epoch + 4):
                x, y = alone.batch(step)
                for rank, reader in enumerate(readers):
                    share = reader.batch(step)
                    assert torch.equal(share[0], x[rank::2])
                    assert torch.equal(share[1], y[rank::2])
                    seen += share[1].tolist()
            assert sorted(seen) == list(range(48))
            epochs.append(seen)
        assert epochs[0] != epochs[1], "the second epoch is in the first one's order"
        assert [reader._stream.workers for reader in readers] == [2, 2]
    finally:
        for reader in readers:
            reader.close()


def test_an_epoch_that_is_gone_on_with_on_other_ranks_shows_every_sample_once(set_folder):
    seen = []
    for step, world in ((0, 1), (1, 2), (2, 4), (3, 1)):
        for rank in range(world):
            reader = of_shards(set_folder, rank, world, workers=rank % 2)
            seen += reader.batch(step)[1].tolist()
            reader.close()
    assert sorted(seen) == list(range(48))


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_resume_in_the_middle_gives_the_same_batches(set_folder, count):
    first = of_shards(set_folder)
    expected = [first.batch(step) for step in range(9)]
    resumed = of_shards(set_folder, workers=count)
    try:
        for step in (6, 7, 8, 2, 3):  # any order: the step alone decides
            x, y = resumed.batch(step)
            assert torch.equal(x, expected[step][0])
            assert torch.equal(y, expected[step][1])
        assert not torch.equal(of_shards(set_folder, seed=4).batch(6)[1], expected[6][1])
    finally:
        resumed.close()


@settings(max_examples=15, deadline=None)
@given(size=st.integers(2, 30), rows=st.integers(1, 8), world=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_augmentation_is_a_function_of_seed_epoch_and_sample(size, rows, world, seed):
    images, seen = numbered(size, 6), {}
    for batch in (rows * world, 1):
        ranks = [loader(images, batch, r, world if batch > 1 else 1, seed=seed, size=8) for r in range(world)]
        for step in range(size // batch if batch <= size else 2):
            for rank, one in enumerate(ranks[: world if batch > 1 else 1]):
                epochs, _ = one.order.rows(step)
                for view, label, epoch in zip(*one.batch(step), epochs.tolist(), strict=True):
                    assert rank < world
                    known = seen.setdefault((epoch, int(label)), view)
                    assert torch.equal(known, view)
    views = [view for (epoch, _), view in seen.items() if epoch == 0]
    if len(views) > 1:
        assert not torch.equal(views[0], views[1])


def test_each_epoch_and_seed_augments_anew():
    images = numbered(1)
    views = {loader(images, 1, seed=seed).batch(step)[0].numpy().tobytes() for seed in range(3) for step in range(4)}
    assert len(views) == 12


def test_the_fast_loader_draws_the_same_samples():
    images = numbered(30)
    ours, fast = loader(images, 8), Loader(images, 8, 3, ())
    assert ours.steps_per_epoch == fast.steps_per_epoch
    for step in (0, 2, 5):
        assert torch.equal(ours.batch(step)[1], fast.batch(step)[1])


# ---- the pictures are timm's


def timms(images: ImageSet, training: bool, transform: Transform, size: int):
    made = timm.data.create_transform(
        size,
        is_training=training,
        scale=transform.scale,
        hflip=transform.flip,
        color_jitter=transform.color_jitter or None,
        auto_augment=transform.rand_augment or None,
        re_prob=transform.erasing,
        re_mode="pixel",
        interpolation="bicubic",
        mean=images.mean,
        std=images.std,
        crop_pct=transform.crop_fraction,
    )
    return made


@pytest.mark.parametrize("transform", [Transform(), STRONG, replace(STRONG, rand_augment=""), Transform(erasing=1.0)])
def test_pictures_equal_timms_to_the_bit(transform):
    images = numbered(40, 25)
    ours = loader(images, 40, transform=transform, size=24)
    x, y = ours.batch(1)
    assert x.shape == (40, 3, 24, 24)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last)
    reference, compared = timms(images, True, transform, 24), 0
    for view, label in zip(x, y.tolist(), strict=True):
        key = counter.key(3, 3, 1, label)
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.manual_seed(key)
        try:
            expected = reference(Image.fromarray(images.images[label].numpy()))
        except ValueError:  # Pillow refuses to keep 0 bits
            continue
        assert torch.equal(view, expected)
        compared += 1
    assert compared >= 35
    plain = timms(images, False, transform, 24)
    for pixels, labels, weight in ours.eval_batches(16):
        for view, label in zip(pixels[weight > 0], labels[weight > 0].tolist(), strict=True):
            assert torch.equal(view, plain(Image.fromarray(images.images[label].numpy())))


def test_every_strength_of_every_operation_runs():
    """timm asks Pillow to keep 0 bits of a picture at the largest magnitude, which newer ones refuse."""
    images = numbered(8)
    strongest = loader(images, 8, transform=Transform(rand_augment="rand-m10-n3-inc1"))
    for step in range(40):
        strongest.batch(step)
    black = pictures._posterize(Image.new("RGB", (3, 2), (9, 200, 70)), 0)
    assert np.array(black).sum() == 0
    picture = Image.fromarray(images.images[0].numpy())
    for bits in (1, 4, 8):
        ours = np.array(pictures._posterize(picture, bits))
        assert (ours == np.array(timm.data.auto_augment.posterize(picture, bits))).all()


def test_the_trainers_random_numbers_do_not_move(set_folder):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for count in (0, 2):
        one = of_shards(set_folder, workers=count, mix=Mix(mixup=0.8, cutmix=1.0))
        one.batch(0)
        one.batch(7)
        list(one.eval_batches(20))
        one.close()
    Loader(numbered(8), 4, 0, ("crop", "flip"), mixer=Mixer(Mix(mixup=1.0), 8, 4, 0, 0)).batch(0)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


# ---- mixing


@pytest.mark.parametrize("mix", [Mix(mixup=0.8), Mix(cutmix=1.0), Mix(mixup=0.8, cutmix=1.0, probability=0.5)])
def test_mixing_equals_timms(mix):
    images = numbered(24)
    for rank in range(2):
        mixer = Mixer(mix, 24, 6, 3, rank)
        reference = timm.data.Mixup(
            mix.mixup, mix.cutmix, prob=mix.probability, switch_prob=0.5, label_smoothing=0.0, num_classes=24
        )
        for plain, mixed in (
            (loader(images, 12, rank, 2), loader(images, 12, rank, 2, mixer=mixer)),
            (Loader(images, 12, 3, ("flip",), rank, 2), Loader(images, 12, 3, ("flip",), rank, 2, mixer=mixer)),
        ):
            changed = 0
            for step in range(6):
                (x, y), (x_mixed, y_mixed) = plain.batch(step), mixed.batch(step)
                np.random.seed(counter.key(3, 2, step, rank) & 0xFFFFFFFF)
                x_expected, y_expected = reference(x.clone(), y)
                assert torch.equal(x_mixed, x_expected)
                assert torch.equal(y_mixed, y_expected)
                assert y_mixed.shape == (6, 24)
                torch.testing.assert_close(y_mixed.sum(1), torch.ones(6))
                assert x_mixed.is_contiguous(memory_format=torch.channels_last)
                changed += not torch.equal(x_mixed, x)
            assert 0 < changed < 6 if mix.probability < 1 else changed == 6


def test_ranks_and_steps_mix_differently():
    images = numbered(8)
    drawn = []
    for rank in range(2):
        mixer = Mixer(Mix(mixup=1.0), 8, 4, 0, rank)
        for step in range(2):
            _, y = mixer(torch.zeros(4, 3, 2, 2), images.labels[:4], step)
            drawn.append(y[0].max().item())
    assert len(set(drawn)) == 4


def test_evaluation_is_never_mixed():
    config = Data(name="digits", mix=Mix(mixup=1.0), batch=30)
    for pipeline in ("fast", "timm"):
        test = data.open_loader(replace(config, pipeline=pipeline, workers=0), train=False, seed=0)
        _, y, _ = next(test.eval_batches(8))
        assert y.dtype == torch.int64


# ---- open_loader


@pytest.mark.parametrize("name", ["digits", "generated"])
def test_both_pipelines_have_one_face(name):
    config = Data(name=name, batch=20, per_class=3, workers=0, image_size=16)
    fast, timms_ = (data.open_loader(replace(config, pipeline=p), train=True, seed=0) for p in ("fast", "timm"))
    assert isinstance(fast, Loader)
    assert isinstance(timms_, PictureLoader)
    for one in (fast, timms_):
        x, y = one.batch(0)
        assert x.shape == (20, 3, 16, 16)
        assert one.samples == 3 * one.classes == 3 * data.classes(config)
        assert one.name == name
        assert one.global_batch == len(y) == 20
        assert one.fingerprint()["samples"] == one.samples
        assert one.notices() == []
        one.throughput()
        one.close()
    assert (fast.mean, fast.std) == (timms_.mean, timms_.std)
    assert torch.equal(fast.batch(2)[1], timms_.batch(2)[1])
    assert fast.fingerprint() != data.open_loader(replace(config, per_class=2), train=True, seed=0).fingerprint()


def test_shards_have_imagenets_statistics_and_a_fingerprint(set_folder, tmp_path):
    train, held = of_shards(set_folder), of_shards(set_folder, train=False)
    assert (train.samples, held.samples, train.classes) == (48, 10, 48)
    assert train.mean == timm.data.IMAGENET_DEFAULT_MEAN
    assert train.std == timm.data.IMAGENET_DEFAULT_STD
    assert train.fingerprint() == of_shards(set_folder, 1, 2, seed=9).fingerprint()
    assert train.fingerprint() != held.fingerprint()
    (copied(set_folder, tmp_path) / "train" / "train-000002.tar").unlink()
    assert of_shards(tmp_path).fingerprint() != train.fingerprint()
    assert data.classes(CONFIG, str(set_folder)) == 48


def test_bad_settings_are_refused(set_folder):
    with pytest.raises(ValueError, match=r"use --data\.NAME\.pipeline timm"):
        of_shards(set_folder, pipeline="fast")
    with pytest.raises(ValueError, match="pairs a rank's rows, which are 3 here: use a batch that is even"):
        of_shards(set_folder, 0, 4, mix=Mix(cutmix=1.0))
    with pytest.raises(ValueError, match="batch 12 does not divide over 5 ranks"):
        of_shards(set_folder, 0, 5)
    with pytest.raises(ValueError, match=r"workers -1 is no number"):
        of_shards(set_folder, workers=-1)
    with pytest.raises(ValueError, match="mixup -1"):
        of_shards(set_folder, mix=Mix(mixup=-1.0))
    with pytest.raises(ValueError, match="per-class 2: a class of shards has only 1 samples"):
        of_shards(set_folder, per_class=2)
    for transform, message in (
        (Transform(scale=(0.5, 0.1)), r"transform\.scale"),
        (Transform(scale=(0.0, 1.0)), r"transform\.scale"),
        (Transform(crop_fraction=0.0), r"transform\.crop_fraction 0\.0: use"),
        (Transform(erasing=2.0), r"transform\.erasing 2\.0: use"),
        (Transform(rand_augment="original"), r"rand_augment original is not timm's spelling"),
        (Transform(rand_augment="rand-n2-m9-x1"), r"timm refuses|not timm's spelling"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            of_shards(set_folder, transform=transform)
        assert "\n" not in str(error.value)


# ---- damage


def spoil(folder: Path, part: str, rows: list[int]) -> None:
    """Change a byte inside those rows' pictures."""
    from hetero_kt.data.shards import Index

    index = Index(folder / part)
    for row in rows:
        where = index.table()[row]
        with (folder / part / index.shards[where["shard"]]["name"]).open("r+b") as stream:
            stream.seek(int(where["offset"]) + 60)
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 255]))


@pytest.mark.parametrize("count", [0, 2])
def test_damaged_samples_are_replaced_counted_and_named(set_folder, tmp_path, count):
    folder = copied(set_folder, tmp_path)
    spoil(folder, "train", [3, 4, 20])
    sound, hurt = of_shards(set_folder), of_shards(tmp_path, workers=count)
    try:
        bad = {int(sound._source.labels[row]) for row in (3, 4, 20)}
        for step in range(4):
            (x, y), (x_hurt, y_hurt) = sound.batch(step), hurt.batch(step)
            same = torch.tensor([label not in bad for label in y.tolist()])
            assert torch.equal(x[same], x_hurt[same])
            assert torch.equal(y[same], y_hurt[same])
            assert not set(y_hurt.tolist()) & bad
            assert torch.equal(y_hurt, of_shards(tmp_path).batch(step)[1]), "the replacement is another one"
        first, second = hurt.notices()
        assert first.startswith(f"{folder}/train/train-000000.tar: 2 damaged pictures left out (the picture at byte ")
        assert second.startswith(f"{folder}/train/train-000002.tar: 1 damaged picture left out (")
        assert "does not match its checksum" in first
    finally:
        hurt.close()


@pytest.mark.parametrize("count", [0, 2])
def test_a_damaged_sample_can_stop_the_run(set_folder, tmp_path, count):
    folder = copied(set_folder, tmp_path)
    spoil(folder, "train", [11])
    stops = of_shards(tmp_path, corrupt="stop", workers=count)
    try:
        with pytest.raises(ValueError, match=r"train-000001\.tar: the picture at byte \d+ does not match") as error:
            [stops.batch(step) for step in range(4)]
        assert str(error.value).endswith("or leave damaged pictures out with corrupt skip.")
        assert "\n" not in str(error.value)
    finally:
        stops.close()


def test_a_set_without_sound_pictures_stops_the_run(set_folder, tmp_path):
    folder = copied(set_folder, tmp_path)
    for file in (folder / "train").glob("*.tar"):
        file.write_bytes(b"\x07" * file.stat().st_size)  # garbage of the right size
    with pytest.raises(ValueError, match="32 samples one after the other cannot be read"):
        of_shards(tmp_path).batch(0)


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_sees_every_sample_once_and_not_the_damaged(set_folder, tmp_path, count, world):
    folder = copied(set_folder, tmp_path)
    spoil(folder, "validation", [0, 7])
    bad = {int(of_shards(set_folder, train=False)._source.labels[row]) for row in (0, 7)}
    for place, expected in ((set_folder, set(range(10))), (tmp_path, set(range(10)) - bad)):
        seen, shapes, named = Counter(), [], 0
        for rank in range(world):
            one = of_shards(place, rank, world, train=False, workers=count)
            batches = list(one.eval_batches(4))
            shapes.append([x.shape for x, _, _ in batches])
            for x, y, weight in batches:
                assert x.shape[0] == y.shape[0] == weight.shape[0] <= 4
                assert set(weight.tolist()) <= {0.0, 1.0}
                assert x.isfinite().all()
                seen.update(y[weight > 0].tolist())
            named += len(one.notices())
        assert seen == dict.fromkeys(expected, 1)
        assert all(shape == shapes[0] for shape in shapes), "ranks would run different forwards"
        assert bool(named) == (place == tmp_path)


# ---- workers


def test_lost_workers_cost_no_batch(set_folder):
    one, expected = of_shards(set_folder, workers=2), of_shards(set_folder)
    try:
        for step in range(6):
            assert torch.equal(one.batch(step)[0], expected.batch(step)[0])
            if step == 1:
                for worker in one._stream._results._workers:
                    os.kill(worker.pid, signal.SIGKILL)
                time.sleep(0.1)
            if step == 3:  # the signals of a batch system go to all processes
                for worker in one._stream._results._workers:
                    os.kill(worker.pid, signal.SIGUSR1)
                os.kill(forkserver._forkserver._forkserver_pid, signal.SIGUSR1)
        assert one.notices() == [f"{one.name}: the worker processes were killed and started again 1 times."]
    finally:
        one.close()


class Failing(InMemory):
    def picture(self, sample: int) -> Image.Image:
        raise RuntimeError("a bug")


def test_an_error_in_a_worker_is_raised_and_not_tried_again():
    one = PictureLoader(Failing(numbered(4)), 4, 0, Transform(), 8, workers=1)
    with pytest.raises(RuntimeError, match="a bug"):
        one.batch(0)
    assert one._stream.restarts == 0
    one.close()


def test_workers_do_not_import_the_main_module(set_folder, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/nowhere/launcher.py", raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    one = of_shards(set_folder, workers=1)
    one.batch(0)
    one.close()
    assert sys.modules["__main__"].__file__ == "/nowhere/launcher.py"


def test_without_processes_or_shared_memory_the_trainer_decodes(set_folder, monkeypatch):
    assert workers.usable(4, 1000) == 4
    assert workers.usable(0, 1000) == 0
    assert workers.usable(4, 2**50) == 0
    one, expected = of_shards(set_folder, workers=2), of_shards(set_folder).batch(3)
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert torch.equal(one.batch(3)[0], expected[0])
    assert one._stream.workers == 0
    one.close()


def test_throughput_is_counted_since_the_last_call(set_folder):
    for count in (0, 2):
        one = of_shards(set_folder, workers=count)
        assert one.throughput() == {}
        for step in range(3):
            one.batch(step)
        measured = one.throughput()
        assert measured["decoded"] > 50
        assert measured["waiting"] > 0
        assert one.throughput() == {}
        one.close()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 2])
def test_a_gpu_gets_the_same_batches(count):
    images = numbered(32)
    on_cpu, on_gpu = loader(images, 8), loader(images, 8, workers=count, device="cuda")
    for step in range(5):
        (x, y), (x_gpu, y_gpu) = on_cpu.batch(step), on_gpu.batch(step)
        assert x_gpu.is_cuda
        assert x_gpu.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, x_gpu.cpu())
        assert torch.equal(y, y_gpu.cpu())
    assert sum(weight.sum().item() for _, _, weight in on_gpu.eval_batches(10)) == 32
    on_gpu.close()


def test_workers_that_die_before_training_end_the_run_with_a_sentence_too(monkeypatch):
    """Where a teacher's logits are stored first."""

    def dies(stream):
        raise workers.Lost("a worker exited unexpectedly")

    monkeypatch.setattr(pictures.Stream, "__next__", dies)
    wanted = [(np.arange(4), np.zeros(4, np.int64))]
    with pytest.raises(Unreadable, match=r"^numbered: the processes that read it have died \(a worker exited"):
        list(loader(numbered(8), 4).augmented(wanted))
