"""Data sets and the loader: who sees which sample, when, and how it was changed."""

import io
import os
import pickle
import shutil
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hetero_kt import data
from hetero_kt.config import Data
from hetero_kt.data import ImageSet, Loader, counter
from hetero_kt.data.images import draw_per_class
from hetero_kt.data.loader import _turn_table as turn_table


def numbered(size: int, side: int = 4) -> ImageSet:
    """A set whose labels are its row numbers, so that a batch tells which samples it holds."""
    pixels = torch.from_numpy(counter.bits(5, np.arange(size * side * side * 3)) >> np.uint64(56))
    images = pixels.to(torch.uint8).view(size, side, side, 3)
    return ImageSet(images, torch.arange(size), max(size, 1), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "numbered")


def shown(loader: Loader, x: torch.Tensor) -> torch.Tensor:
    """Pixels 0 to 255 (B, H, W, C) behind a normalised batch."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (loader.images.mean, loader.images.std))
    return (255 * (x * std + mean)).round().permute(0, 2, 3, 1)


# ---- the counter-based generator


def test_the_mixing_function_is_splitmix64s():
    # First outputs of SplitMix64 seeded with 1234567 (the generator's published test values).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert counter.bits(1234567, np.arange(3)).tolist() == expected


def test_draws_are_even():
    random = counter.bits(counter.key(1, 2), np.arange(90_000))
    for first, width in ((0, 16), (16, 16), (33, 24)):
        times = np.bincount(counter.below(random, 9, first=first, width=width), minlength=9)
        assert len(times) == 9
        assert np.abs(times - 10_000).max() < 400  # 4 standard deviations
    assert len({counter.key(0, 1), counter.key(1, 0), counter.key(0, 0, 1), counter.key(0, 1, 0)}) == 4


# ---- order


@pytest.mark.parametrize("world", [1, 2, 4])
def test_an_epoch_shows_every_sample_once(world):
    loaders = [Loader(numbered(64), 16, 3, (), rank, world) for rank in range(world)]
    assert loaders[0].steps_per_epoch == 4
    epochs = []
    for epoch in range(2):
        seen = [loader.batch(4 * epoch + k)[1] for k in range(4) for loader in loaders]
        assert torch.cat(seen).sort().values.tolist() == list(range(64))
        epochs.append(torch.cat(seen).tolist())
    assert epochs[0] != epochs[1], "the second epoch is in the first one's order"


def test_an_epoch_that_is_gone_on_with_on_other_ranks_shows_every_sample_once():
    images = numbered(64)
    seen = []
    for step, world in enumerate((1, 2, 4, 1)):
        seen += [Loader(images, 16, 3, (), rank, world).batch(step)[1] for rank in range(world)]
    assert torch.cat(seen).sort().values.tolist() == list(range(64))


def test_the_short_last_batch_is_left_out():
    loader = Loader(numbered(50), 16, 0, ())
    assert loader.steps_per_epoch == 3
    seen = torch.cat([loader.batch(k)[1] for k in range(3)]).tolist()
    assert len(set(seen)) == 48
    again = torch.cat([loader.batch(k)[1] for k in range(3, 6)]).tolist()
    assert len(set(again)) == 48


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 20), batch=st.integers(1, 64), seed=st.integers(0, 2**31))
def test_a_small_set_repeats_whole_permutations(size, batch, seed):
    loader = Loader(numbered(size, side=1), batch, seed, ())
    steps = -(-3 * size // batch)
    if batch <= size:
        steps = loader.steps_per_epoch
        stream = torch.cat([loader.batch(k)[1] for k in range(steps)]).tolist()
        assert len(set(stream)) == len(stream)
        return
    stream = torch.cat([loader.batch(k)[1] for k in range(steps)]).tolist()
    for first in range(0, len(stream) - size + 1, size):
        assert sorted(stream[first : first + size]) == list(range(size))


def test_a_batch_depends_on_its_step_alone():
    images = numbered(40)
    forwards = Loader(images, 8, 1, ("crop", "flip"))
    first = [forwards.batch(k) for k in range(12)]
    backwards = Loader(images, 8, 1, ("crop", "flip"))
    for k in reversed(range(12)):
        x, y = backwards.batch(k)
        assert torch.equal(x, first[k][0])
        assert torch.equal(y, first[k][1])
    other = Loader(images, 8, 2, ("crop", "flip"))
    assert not torch.equal(other.batch(0)[1], first[0][1])


@pytest.mark.parametrize("size", [100, 10])  # a set larger and one smaller than the batch
def test_two_ranks_see_one_ranks_batch(size):
    images = numbered(size, side=32)
    augment = ("crop", "flip", "rotate")
    alone = Loader(images, 16, 7, augment)
    ranks = [Loader(images, 16, 7, augment, rank, 2) for rank in range(2)]
    for step in (0, 1, 9):
        x, y = alone.batch(step)
        for rank, loader in enumerate(ranks):
            share = loader.batch(step)
            assert torch.equal(share[0], x[rank::2])
            assert torch.equal(share[1], y[rank::2])


# ---- what a batch looks like


def test_pictures_are_normalised_and_channels_last():
    images = numbered(30)
    loader = Loader(images, 10, 0, ())
    x, y = loader.batch(0)
    assert x.shape == (10, 3, 4, 4)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last)
    pixels = images.images[y].permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (images.mean, images.std))
    torch.testing.assert_close(x.double(), (pixels - mean) / std, atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def one_picture():
    pixels = np.arange(32 * 32 * 3).reshape(1, 32, 32, 3) % 251 + 1  # no pixel is black
    images = torch.from_numpy(pixels).to(torch.uint8)
    return ImageSet(images, torch.zeros(1, dtype=torch.int64), 1, (0.5,) * 3, (0.25,) * 3, "one")


def test_crop_and_flip_move_pixels(one_picture):
    loader = Loader(one_picture, 256, 0, ("crop", "flip"))
    picture = one_picture.images[0].float()
    padded = torch.zeros(40, 40, 3)
    padded[4:36, 4:36] = picture
    possible = {}
    for down in range(9):
        for right in range(9):
            crop = padded[down : down + 32, right : right + 32]
            possible[crop.numpy().tobytes()] = (down, right, False)
            possible[crop.flip(1).contiguous().numpy().tobytes()] = (down, right, True)
    drawn = [possible[view.contiguous().numpy().tobytes()] for view in shown(loader, loader.batch(0)[0])]
    assert {down for down, _, _ in drawn} == set(range(9))
    assert {right for _, right, _ in drawn} == set(range(9))
    assert 90 < sum(mirrored for _, _, mirrored in drawn) < 166


def test_rotation_turns_about_the_centre():
    from torchvision.transforms.functional import InterpolationMode, rotate

    side = 33  # odd, so that the centre is a pixel
    pixels = torch.arange(side * side).view(side, side)
    table = turn_table(side, side)
    assert (table[150] == pixels.flatten().numpy()).all(), "the middle angle is 0"
    for row, degrees in ((0, -15), (300, 15), (250, 10)):
        ours = torch.from_numpy(table[row]).view(side, side)
        theirs = rotate((pixels + 1)[None].double(), -degrees, InterpolationMode.NEAREST)[0].long() - 1
        theirs[theirs < 0] = side * side
        same = (ours == theirs).double().mean()
        mirrored = (ours == rotate((pixels + 1)[None].double(), degrees)[0].long() - 1).double().mean()
        assert same > 0.99, f"{same:.3f} of the pixels at {degrees} degrees"
        assert mirrored < 0.5


def test_one_augmentation_does_not_change_another(one_picture):
    plain = Loader(one_picture, 64, 0, ())
    x = shown(plain, plain.batch(0)[0])
    assert (x == one_picture.images.float()).all()
    only_flip = Loader(one_picture, 64, 0, ("flip",))
    views = shown(only_flip, only_flip.batch(0)[0])
    straight = (views == one_picture.images[0]).flatten(1).all(1)
    mirrored = (views == one_picture.images[0].flip(1)).flatten(1).all(1)
    assert (straight ^ mirrored).all()
    turned = Loader(one_picture, 64, 0, ("rotate",))
    views = shown(turned, turned.batch(0)[0])
    assert len({view.numpy().tobytes() for view in views}) > 40
    assert 0.7 < (views > 0).double().mean() < 1, "corners that turn in are black"


@pytest.mark.gpu
def test_a_gpu_shows_the_same_pictures():
    images = numbered(64, side=32)
    for augment in ((), ("crop", "flip", "rotate")):
        on_cpu, on_gpu = (Loader(images, 32, 0, augment, device=device) for device in ("cpu", "cuda"))
        for step in range(3):
            (x, y), (x_gpu, y_gpu) = on_cpu.batch(step), on_gpu.batch(step)
            assert x_gpu.is_cuda
            assert y_gpu.is_cuda
            assert torch.equal(y, y_gpu.cpu())
            torch.testing.assert_close(x, x_gpu.cpu(), atol=1e-6, rtol=1e-6)
    weights = [weight for _, _, weight in on_gpu.eval_batches(40)]
    assert torch.cat(weights).sum().item() == 64


def test_augmentation_is_fast_enough():
    images = numbered(512, side=32)
    rates = []
    for augment in (("crop", "flip"), ("crop", "flip", "rotate")):
        loader = Loader(images, 128, 0, augment)
        loader.batch(0)
        started = time.process_time()
        for step in range(20):
            loader.batch(step)
        rates.append(20 * 128 / (time.process_time() - started))
    assert min(rates) > 10_000, rates  # pictures per second of one core; some ten times as many are usual


def test_a_fingerprint_tells_sets_apart():
    images = numbered(300)
    fingerprint = Loader(images, 8, 0, ("flip",)).fingerprint()
    assert fingerprint == Loader(images, 4, 5, (), 1, 2).fingerprint()
    assert set(fingerprint) == {"samples", "labels", "pictures"}
    other = replace(images, labels=images.labels.flip(0))
    repainted = replace(images, images=images.images.roll(1, 0))
    fewer = images.take(torch.arange(299))
    assert all(Loader(one, 8, 0, ()).fingerprint() != fingerprint for one in (other, repainted, fewer))


# ---- evaluation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 70), world=st.integers(1, 6), batch=st.integers(1, 40))
def test_evaluation_shows_every_sample_once(size, world, batch):
    images = numbered(size, side=1)
    seen, shapes = [], []
    for rank in range(world):
        loader = Loader(images, world, 0, ("flip",), rank, world)
        batches = list(loader.eval_batches(batch))
        shapes.append([len(y) for _, y, _ in batches])
        for x, y, weight in batches:
            assert set(weight.tolist()) <= {0.0, 1.0}
            seen += y[weight > 0].tolist()
            torch.testing.assert_close(shown(loader, x), images.images[y].float())
    assert sorted(seen) == list(range(size))
    assert all(shape == shapes[0] for shape in shapes), "ranks would run different forwards"
    assert len(set(shapes[0])) == 1
    assert shapes[0][0] <= batch


# ---- sets


def test_generated_pictures_are_fixed_and_learnable():
    train, test = (data.load(Data(name="generated"), train=part) for part in (True, False))
    assert train.images.shape == (1600, 32, 32, 3)
    assert train.classes == 100
    assert (train.mean, train.std) == (test.mean, test.std)
    assert counter.key(*train.images[:3].flatten().tolist()) == 1046066697525516381, "it changed"
    # The mean picture of each training class is enough to tell the classes of the test set apart.
    means = train.images.double().view(16, 100, -1).mean(0)
    nearest = torch.cdist(test.images.double().flatten(1), means).argmin(1)
    assert (nearest == test.labels).double().mean() > 0.95


def test_digits_are_split_once_and_evenly():
    train, test = (data.load(Data(name="digits"), train=part) for part in (True, False))
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (32, 32, 3)
    counts = torch.bincount(train.labels) + torch.bincount(test.labels)
    torch.testing.assert_close(torch.bincount(test.labels) / counts, torch.full((10,), 0.2), atol=0.004, rtol=0)
    own = {picture.numpy().tobytes() for picture in train.images}
    assert sum(picture.numpy().tobytes() in own for picture in test.images) == 0


def test_per_class_keeps_the_same_few_of_each():
    five, ten = (data.load(Data(name="digits", per_class=k), train=True) for k in (5, 10))
    assert torch.bincount(five.labels).tolist() == [5] * 10
    larger = {picture.numpy().tobytes() for picture in ten.images}
    assert all(picture.numpy().tobytes() in larger for picture in five.images)
    assert len(data.load(Data(name="digits", per_class=5), train=False)) == 359
    assert len(Loader(five, 64, 0, ()).batch(0)[1]) == 64
    with pytest.raises(
        ValueError, match=r"--data.NAME.per-class 500: a class of digits has only 139 samples: use at most 139"
    ):
        data.load(Data(name="digits", per_class=500), train=True)


def test_validation_is_held_out_of_the_training_set():
    everything = data.load(Data(name="generated"), train=True)
    train, held_out = (data.load(Data(name="generated", validation=0.25), train=part) for part in (True, False))
    assert len(train) == 1200
    assert torch.bincount(held_out.labels).tolist() == [4] * 100
    whole = {picture.numpy().tobytes() for picture in everything.images}
    parts = [{picture.numpy().tobytes() for picture in part.images} for part in (train, held_out)]
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]
    few = Data(name="generated", validation=0.25, per_class=2)
    assert torch.equal(data.load(few, train=False).images, held_out.images)
    assert {picture.numpy().tobytes() for picture in data.load(few, train=True).images} <= parts[0]
    with pytest.raises(ValueError, match=r"validation 0\.001 leaves nothing"):
        data.load(Data(name="generated", validation=0.001), train=False)


def test_image_size_resizes():
    small = data.load(Data(name="generated", image_size=16), train=False)
    assert small.images.shape == (200, 16, 16, 3)
    assert small.images.dtype == torch.uint8
    large = data.load(Data(name="digits", image_size=48), train=False)
    assert large.images.shape[1:3] == (48, 48)
    assert Loader(large, 4, 0, ("crop", "flip", "rotate")).batch(0)[0].shape == (4, 3, 48, 48)


def test_draws_per_class_follow_the_counts():
    labels = torch.arange(40) % 4
    chosen = draw_per_class(labels, torch.tensor([0, 1, 5, 10]), 3)
    assert torch.bincount(labels[chosen], minlength=4).tolist() == [0, 1, 5, 10]


def test_bad_loaders_are_refused():
    images = numbered(8)
    with pytest.raises(ValueError, match="batch 9 does not divide over 2 ranks: use a multiple of 2"):
        Loader(images, 9, 0, (), 0, 2)
    with pytest.raises(ValueError, match="augment 'flop' is unknown: use any of crop, flip, rotate"):
        Loader(images, 8, 0, ("flop",))
    with pytest.raises(ValueError, match="no samples"):
        Loader(numbered(0), 8, 0, ())


# ---- CIFAR-100 in its layouts


def encoded(picture: np.ndarray) -> dict:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture(scope="module")
def pictures():
    images = (counter.bits(1, np.arange(6 * 3072)) >> np.uint64(56)).astype(np.uint8).reshape(6, 32, 32, 3)
    return images, np.array([0, 99, 7, 7, 50, 3])


def write_parquet(folder, pictures, image="img", label="fine_label"):
    images, labels = pictures
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        table = pa.table({image: [encoded(picture) for picture in images], label: labels})
        pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


def assert_same(found: ImageSet, pictures) -> None:
    assert torch.equal(found.images, torch.from_numpy(pictures[0]))
    assert torch.equal(found.labels, torch.from_numpy(pictures[1]))
    assert found.classes == 100


@pytest.mark.parametrize("place", ["cifar100", "cifar100/cifar100", "."])
def test_parquet(place, tmp_path, pictures):
    write_parquet(tmp_path / place, pictures)
    for part in (True, False):
        assert_same(data.load(Data(), str(tmp_path), train=part), pictures)


def test_the_environment_names_the_folder(tmp_path, pictures, monkeypatch):
    write_parquet(tmp_path / "cifar100", pictures, image="image", label="label")
    monkeypatch.setenv("HETERO_KT_DATA", str(tmp_path))
    assert_same(data.load(Data(), train=True), pictures)


def test_the_authors_layouts(tmp_path, pictures):
    planes = pictures[0].transpose(0, 3, 1, 2).reshape(6, -1)
    python = tmp_path / "a" / "cifar-100-python"
    python.mkdir(parents=True)
    (python / "train").write_bytes(
        pickle.dumps({b"data": planes, b"fine_labels": pictures[1].tolist(), b"coarse_labels": [0] * 6}, protocol=4)
    )
    assert_same(data.load(Data(), str(tmp_path / "a"), train=True), pictures)
    binary = tmp_path / "b" / "cifar-100-binary"
    binary.mkdir(parents=True)
    rows = np.concatenate([np.zeros((6, 1)), pictures[1][:, None], planes], axis=1).astype(np.uint8)
    rows.tofile(binary / "test.bin")
    assert_same(data.load(Data(), str(tmp_path / "b"), train=False), pictures)
    (binary / "test.bin").write_bytes(rows.tobytes()[:-5])
    with pytest.raises(ValueError, match=r"test\.bin cannot be read .*whole rows.*--data-dir"):
        data.load(Data(), str(tmp_path / "b"), train=False)


class Trap:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_a_pickle_cannot_run_code(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "train").write_bytes(pickle.dumps({b"data": Trap()}))
    with pytest.raises(ValueError, match=r"it names (posix|nt)\.system, which CIFAR-100 does not need"):
        data.load(Data(), str(tmp_path), train=True)


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "--data-dir" in text
    return text


def test_a_missing_folder_names_the_option(tmp_path):
    with pytest.raises(ValueError, match="holds no CIFAR-100 train set") as error:
        data.load(Data(), str(tmp_path / "nowhere"), train=True)
    assert str(tmp_path / "nowhere") in one_sentence(error)


def test_a_truncated_file_is_named(tmp_path, pictures):
    write_parquet(tmp_path / "cifar100", pictures)
    file = tmp_path / "cifar100" / "test-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="cannot be read") as error:
        data.load(Data(), str(tmp_path), train=False)
    assert str(file) in one_sentence(error)


def test_a_damaged_picture_is_named(tmp_path, pictures):
    folder = tmp_path / "cifar100"
    folder.mkdir()
    rows = [encoded(picture) for picture in pictures[0]]
    rows[4]["bytes"] = rows[4]["bytes"][:60]
    pq.write_table(pa.table({"img": rows, "fine_label": pictures[1]}), folder / "train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet, row 4, cannot be read") as error:
        data.load(Data(), str(tmp_path), train=True)
    one_sentence(error)


def test_other_columns_labels_and_sizes_are_refused(tmp_path, pictures):
    images, labels = pictures
    for name, kwargs, message in (
        ("column", {"image": "photo"}, r"has no column img or image \(it has photo, fine_label\)"),
        ("label", {"label": "answer"}, "has no column fine_label or label"),
    ):
        write_parquet(tmp_path / name, pictures, **kwargs)
        with pytest.raises(ValueError, match=message) as error:
            data.load(Data(), str(tmp_path / name), train=True)
        one_sentence(error)
    write_parquet(tmp_path / "labels", (images, labels + 1))
    with pytest.raises(ValueError, match=r"labels .* are not 0 to 99") as error:
        data.load(Data(), str(tmp_path / "labels"), train=True)
    one_sentence(error)
    write_parquet(tmp_path / "sizes", (images[:, :1, :1], labels))
    with pytest.raises(ValueError, match="row 0, is 1x1 pixels, not 32x32") as error:
        data.load(Data(), str(tmp_path / "sizes"), train=True)
    one_sentence(error)
    folder = tmp_path / "plain"
    folder.mkdir()
    pq.write_table(pa.table({"img": ["a.png"] * 6, "fine_label": labels}), folder / "train.parquet")
    with pytest.raises(ValueError, match="column img holds no encoded pictures") as error:
        data.load(Data(), str(folder), train=True)
    one_sentence(error)


def test_the_datasets_library(tmp_path, pictures, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "local", pictures)
    assert_same(data.load(Data(), f"hf:{tmp_path / 'local'}", train=True), pictures)
    with pytest.raises(ValueError, match=r"--data-dir hf:.*nothing cannot be loaded") as error:
        data.load(Data(), f"hf:{tmp_path / 'nothing'}", train=True)
    one_sentence(error)


def test_a_changed_file_is_read_again(tmp_path, pictures):
    images, labels = pictures
    write_parquet(tmp_path, pictures)
    assert_same(data.load(Data(), str(tmp_path), train=True), pictures)
    write_parquet(tmp_path, (images[:4], labels[:4]))
    assert len(data.load(Data(), str(tmp_path), train=True)) == 4


@pytest.mark.data
def test_real_cifar100_slice(real_data, tmp_path):
    mini = real_data / "mini"
    if not (mini / "cifar100").is_dir():
        pytest.skip("the data folder has no mini/cifar100")
    train, test = (data.load(Data(), str(mini), train=part) for part in (True, False))
    assert (len(train), len(test)) == (600, 300)
    assert train.labels.unique().numel() == 100
    shutil.copy(mini / "cifar100" / "train.parquet", tmp_path / "train.parquet")
    assert torch.equal(data.load(Data(), str(tmp_path), train=True).images, train.images)
    x, _ = Loader(train, 128, 0, ("crop", "flip", "rotate")).batch(0)
    assert x.mean().abs() < 0.5
    assert 0.8 < x.std() < 1.3


@pytest.mark.data
def test_real_cifar100_test_set(real_data):
    if not (real_data / "cifar100").is_dir():
        pytest.skip("the data folder has no cifar100")
    test = data.load(Data(), str(real_data), train=False)
    counts = torch.bincount(test.labels)
    assert len(counts) == 100
    assert (counts == counts[0]).all()
    pixels = test.images.double() / 255
    torch.testing.assert_close(pixels.mean((0, 1, 2)), torch.tensor(test.mean, dtype=torch.float64), atol=0.01, rtol=0)
