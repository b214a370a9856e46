"""Tars that others have written for webdataset: what is in them, who sees what, what is refused."""

import io
import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shards import encoded
from webdataset import TarWriter

from hetero_kt import data
from hetero_kt.checks import check
from hetero_kt.config import Data, Distill, Mix, Model, Recipe, Transform
from hetero_kt.data import cache, census, sharding
from hetero_kt.data.pictures import Unreadable
from hetero_kt.data.tarstream import LaneOrder
from hetero_kt.debug import shrink
from hetero_kt.nn.stages import nn
from hetero_kt.tasks import classification

TRAIN, TEST = (11, 5, 14), (9, 4)
"""Pictures in each tar: none divides by ranks or batches."""


def sample(number: int, **entries) -> dict:
    """Picture `number` under webdataset's names, of class number % 3."""
    kind = ("JPEG", "PNG", "WEBP")[number % 4 % 3]
    entry = {"JPEG": ("jpg", "jpeg")[number % 2], "PNG": "png", "WEBP": "webp"}[kind]
    labels = entries or {"cls": number % 3}
    return {"__key__": f"n{number % 3}/{number:05d}", entry: encoded(number, kind), **labels}


def write(file: Path, *samples: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(file)) as writer:
        for one in samples:
            writer.write(one)
    return file


def write_set(folder: Path, labelled=lambda number: {}) -> None:
    numbers = iter(range(1000))
    for part, counts in (("train", TRAIN), ("val", TEST)):
        for k, count in enumerate(counts):
            samples = [sample(n, **labelled(n)) for n in (next(numbers) for _ in range(count))]
            write(folder / f"{part}-{k:04d}.tar", *samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tars")
    write_set(place)
    return place


CONFIG = Data(
    "tars",
    folder="train-{0000..0002}.tar",
    test="val-{0000..0001}.tar",
    pipeline="timm",
    batch=8,
    image_size=16,
    transform=Transform(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25),
    workers=0,
    shuffle=4,
)


def opened(place, rank=0, world=1, *, train=True, seed=3, **changes):
    return data.open_loader(replace(CONFIG, **changes), str(place), train=train, seed=seed, rank=rank, world=world)


def refused(place, **changes) -> str:
    with pytest.raises(ValueError) as caught:
        opened(place, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- who sees what


@settings(max_examples=60, deadline=None)
@given(
    tars=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    world=st.sampled_from([1, 2, 3]),
    lanes=st.integers(1, 4),
    share=st.integers(1, 5),
    shuffle=st.integers(0, 20),
    epoch=st.integers(0, 3),
)
def test_every_picture_comes_once_an_epoch_over_ranks_and_workers_whatever_the_tars(
    tars, world, lanes, share, shuffle, epoch
):
    tar_S, batch = np.repeat(np.arange(len(tars)), tars), world * share
    if batch > len(tar_S):
        with pytest.raises(ValueError, match=f"{len(tar_S)} pictures, fewer than a batch of {batch}"):
            LaneOrder("x", tar_S, batch, 1, 0, world, lanes=lanes, shuffle=shuffle)
        return
    orders = [LaneOrder("x", tar_S, batch, 1, rank, world, lanes=lanes, shuffle=shuffle) for rank in range(world)]
    steps = orders[0].steps_per_epoch
    assert steps == len(tar_S) // batch
    seen: list[int] = []
    for order in orders:
        for step in range(epoch * steps, (epoch + 1) * steps):
            epochs, samples = order.rows(step)
            assert len(samples) == share, "every rank has the same number of batches of the same size"
            assert (epochs == epoch).all()
            seen += samples.tolist()
    assert len(set(seen)) == len(seen) == steps * batch
    assert set(seen) <= set(range(len(tar_S)))


def test_each_worker_reads_whole_tars_one_after_the_other_and_epochs_differ():
    tar_S = np.repeat(np.arange(8), 10)
    orders = [LaneOrder("x", tar_S, 8, 1, rank, 2, lanes=2, shuffle=5) for rank in range(2)]
    read = [order.read(0, lane).tolist() for order in orders for lane in range(2)]
    assert sum(len({s // 10 for s in one}) for one in read) == 8, "20 samples each: no tar is opened twice"
    assert all(np.diff([s for s in one if s // 10 == one[0] // 10]).tolist() == [1] * 9 for one in read)
    assert orders[0].read(1, 0).tolist() != read[0]
    assert orders[0].drawn(0, 0).tolist() != read[0]
    assert sorted(orders[0].drawn(0, 0).tolist()) == sorted(read[0])


@pytest.mark.parametrize(("workers", "resumes"), [(0, (1, 2, 3, 7)), (2, (4,))])
def test_a_resumed_run_goes_on_with_the_very_next_batch(folder, workers, resumes):
    first = opened(folder, 1, 2, workers=workers, mix=Mix(mixup=0.8))
    expected = [first.batch(step) for step in range(9)]  # three an epoch
    for step in resumes:
        resumed = opened(folder, 1, 2, workers=workers, mix=Mix(mixup=0.8))
        for at in (step, step + 1):
            pictures, labels = resumed.batch(at)
            assert torch.equal(pictures, expected[at][0])
            assert torch.equal(labels, expected[at][1])
        resumed.close()
    first.close()


def test_a_resumed_run_opens_no_tar_whose_pictures_were_all_seen(folder, monkeypatch):
    loader = opened(folder, shuffle=0, batch=6)
    order = loader.order.read(0, 0)
    tars = loader._source.tar[order]
    whole = next(step for step in range(5) if tars[step * 6] != tars[0])
    asked = []
    entries = type(loader._source).entries

    def noted(source, tar, first, last):
        asked.append((tar, first))
        return entries(source, tar, first, last)

    monkeypatch.setattr(type(loader._source), "entries", noted)
    loader.batch(whole)
    assert asked == [(tars[whole * 6], order[whole * 6])], "it begins within the tar where it stood"


def test_pictures_labels_and_augmentations_are_those_of_our_own_shards(tmp_path):
    """The same pictures, written by `hetero-kt shards` and read as our own, or as anybody's tars."""
    for number in range(30):
        place = tmp_path / "tree" / "train" / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.JPEG").write_bytes(encoded(number, ("JPEG", "PNG")[number % 2]))
        (tmp_path / "tree" / "val" / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / "val" / f"class{number % 3}" / f"{number}.JPEG").write_bytes(encoded(100 + number))
    sharding.write(str(tmp_path / "tree"), str(tmp_path / "own"), shard_size="11", quiet=True)
    own = replace(CONFIG, name="shards", folder="own", test="", shuffle=1000)
    named = {"folder": "own/train/train-{000000..000002}.tar", "test": "own/validation/validation-{000000..000002}.tar"}

    def both(train):
        ours = data.open_loader(own, str(tmp_path), train=train, seed=3)
        return ours, opened(tmp_path, train=train, **named)

    ours, tars = both(True)
    assert (ours.samples, ours.classes) == (tars.samples, tars.classes) == (30, 3)
    assert torch.equal(ours.labels, tars.labels)
    augmented = ours.augmented([tars.drawn(step) for step in range(3)])
    for step, expected in enumerate(augmented):
        pictures, labels = tars.batch(step)
        assert torch.equal(pictures, expected)
        assert torch.equal(labels, ours.labels[tars.drawn(step)[0]])
    ours, tars = both(False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    assert classification.evaluate(model, ours, "cpu") == classification.evaluate(model, tars, "cpu")
    assert data.samples(replace(CONFIG, **named), str(tmp_path)) == 30


def counted_on_a_rank(folder: str) -> tuple[list[int], list[int], float, dict]:
    """Training pictures of two epochs, evaluation's weights, and a metric over all ranks."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    train, test = opened(folder, rank, world), opened(folder, rank, world, train=False)
    trained = [int(s) for step in range(2 * train.steps_per_epoch) for s in train.drawn(step)[0]]
    for step in range(2):
        train.batch(step)
    batches = list(test.eval_batches(3))
    weights = [int(weight.sum()) for *_, weight in batches]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    return trained, weights, test.samples, classification.evaluate(model, test, "cpu", rows=3)


def test_two_ranks_train_on_each_picture_once_an_epoch_and_evaluate_each_once(ranks, folder):
    (trained, weights, samples, metrics), (others, more, _, same) = ranks(2).run(counted_on_a_rank, str(folder))
    per_epoch = sum(TRAIN) // 8 * 8
    for epoch in range(2):
        half = slice(epoch * per_epoch // 2, (epoch + 1) * per_epoch // 2)
        assert len(set(trained[half]) | set(others[half])) == per_epoch
    assert len(weights) == len(more)
    assert sum(weights) + sum(more) == samples == sum(TEST)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    alone = classification.evaluate(model, opened(folder, train=False), "cpu")
    assert metrics == same == pytest.approx(alone)


def test_a_held_out_part_and_a_subset_are_read_from_the_same_tars(folder):
    train = opened(folder, test="", validation=0.2, per_class=7)
    held = opened(folder, test="", validation=0.2, train=False)
    assert (train.samples, held.samples) == (21, 6)
    assert not set(train._source.rows.tolist()) & set(held._source.rows.tolist())
    pictures, labels = train.batch(1)
    assert torch.equal(labels, train.labels[train.drawn(1)[0]])
    alone = next(train.augmented([train.drawn(1)]))
    assert torch.equal(pictures, alone)


def test_the_fingerprint_knows_names_sizes_members_and_labels(tmp_path):
    write_set(tmp_path / "a")
    write_set(tmp_path / "b")
    base = opened(tmp_path / "a").fingerprint()
    assert opened(tmp_path / "b", 1, 2, seed=9).fingerprint() == base
    write(tmp_path / "b" / "train-0001.tar", *(sample(n, cls=n % 2) for n in range(11, 16)))
    assert opened(tmp_path / "b").fingerprint() != base, "other labels, the same bytes in all"
    os.rename(tmp_path / "a" / "train-0002.tar", tmp_path / "a" / "last.tar")
    assert opened(tmp_path / "a", folder="train-{0000..0001}.tar::last.tar").fingerprint() != base


# ---- labels


@pytest.mark.parametrize(
    ("entries", "settings", "classes", "labels"),
    [
        (lambda n: {"json": {"label": n % 3, "w": 1}}, {}, 3, [0, 1, 2]),
        (lambda n: {"json": {"y": str(n % 3)}}, {"label": "json:y"}, 3, [0, 1, 2]),
        (lambda n: {"txt": f"{('dog', 'ant', 'cat')[n % 3]}\n"}, {}, 3, [2, 0, 1]),
        (lambda n: {"json": {"name": ("dog", "ant", "cat")[n % 3]}}, {"label": "json:name"}, 3, [2, 0, 1]),
        (lambda n: {"txt": ("dog", "ant", "cat")[n % 3]}, {"classes": "names.txt"}, 4, [1, 3, 0]),
        (lambda n: {"txt": ("dog", "ant", "cat")[n % 3]}, {"classes": "numbers.json"}, 6, [5, 0, 2]),
        (lambda n: {"cls": n % 3, "txt": "a caption"}, {"classes": "1000"}, 1000, [0, 1, 2]),
    ],
)
def test_labels_come_from_cls_a_field_of_json_or_names(tmp_path, entries, settings, classes, labels):
    write_set(tmp_path, entries)
    (tmp_path / "names.txt").write_text("cat\ndog\nbee\nant\n")
    (tmp_path / "numbers.json").write_text(json.dumps({"dog": 5, "ant": 0, "cat": 2}))
    loader = opened(tmp_path, **settings)
    assert loader.classes == classes == data.classes(replace(CONFIG, **settings), str(tmp_path))
    assert loader.labels[:3].tolist() == labels
    assert opened(tmp_path, train=False, **settings).samples == sum(TEST)


def test_labels_that_are_no_classes_are_refused_with_file_and_picture(folder, tmp_path):
    message = refused(folder, classes="2")
    assert "labels must be 0 to 1 (by --data.NAME.classes 2): " in message
    assert "train-0000.tar: n2/00002.webp has the label '2'" in message
    write_set(tmp_path, lambda n: {"cls": "two" if n == 7 else "-1" if n == 12 else n % 3})
    message = refused(tmp_path)
    assert "train-0000.tar: n1/00007.jpeg has the label 'two'; " in message, "all at once"
    assert "train-0001.tar: n0/00012.jpg has the label '-1'" in message
    write_set(tmp_path, lambda n: {"txt": "new" if n == 31 else ("dog", "cat")[n % 2]})
    assert "val-0000.tar: n1/00031.jpeg has the label 'new'" in refused(tmp_path, train=False)
    assert "names.txt cannot be used" in refused(tmp_path, classes="names.txt")
    (tmp_path / "names.txt").write_text('{"dog": -4}')
    assert "dog has -4 for a number" in refused(tmp_path, classes="names.txt")
    assert "--data.NAME.classes 0 is out of range" in refused(tmp_path, classes="0")


# ---- what is refused


def test_all_tars_that_do_not_fit_are_named_at_once_each_with_its_mend(folder, tmp_path):
    write_set(tmp_path)
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "fifo.tar")
    message = refused(tmp_path, folder="train-{0000..0004}.tar::folder.tar::fifo.tar")
    assert message.startswith("--data.NAME.folder: 4 of 7 tars do not fit: ")
    for part in (
        "train-0003.tar is missing; ",
        "train-0004.tar is missing; ",
        "folder.tar is a folder",
        "fifo.tar cannot be used",
    ):
        assert part in message

    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("no tar at all " * 100)
    (tmp_path / "packed.tar").write_bytes(b"\x1f\x8b\x08" + bytes(600))
    write(tmp_path / "nothing.tar")
    write(tmp_path / "bare.tar", *({"__key__": str(n), "jpg": encoded(n), "txt": "a"} for n in range(5)))
    write(tmp_path / "apart.tar", {"__key__": "a", "jpg": encoded(1)}, {"__key__": "b", "cls": 1})
    write(tmp_path / "dotted.tar", {"__key__": "img", "v2.jpg": encoded(1), "cls": 1})
    write(tmp_path / "two.tar", {"__key__": "a", "jpg": encoded(1), "png": encoded(1, "PNG"), "cls": 1})
    names = ("empty", "text", "packed", "nothing", "bare", "apart", "dotted", "two")
    message = refused(tmp_path, folder=f"train-0000.tar::{{{','.join(names)}}}.tar")
    assert "8 of 9 tars do not fit" in message
    for part in (
        "empty.tar is empty: write it again, or leave it out",
        "text.tar is no tar, or damaged (",
        "packed.tar is compressed: unpack it",
        "nothing.tar holds no picture (it has no entries)",
        "bare.tar: 0.jpg has no label (.cls), and only .txt beside it: say where labels are",
        "(and 4 alike)",
        "apart.tar: a.jpg has no label (.cls), and nothing beside it",
        "b.cls has no picture beside it: the entries of a key must lie together",
        "dotted.tar: img.cls has no picture beside it",
    ):
        assert part in message
    assert "and 1 more" in message
    assert "a has two pictures, .jpg and .png" in refused(tmp_path, folder="two.tar")


def test_json_labels_that_cannot_be_read_are_refused(tmp_path):
    for broken, reason in (
        ({"other": 1}, "n1/00001.json has no field label, but other: name it with"),
        ({"label": [1]}, "n1/00001.json says [1], which is neither a number nor a name"),
        ({"label": True}, "neither a number nor a name"),
        ({"label": 1.5}, "neither a number nor a name"),
        (b"{", "n1/00001.json cannot be read (it is not JSON "),
        (b"[" * 100_000, "n1/00001.json cannot be read (it is nested deeper"),
        ({"label": "word " * 1000}, "a text of 4,999 characters"),
        ({"other\x1b[2J": 1}, "but other\\x1b[2J: name it with"),
        (b"x" * 2**21, "n1/00001.json has 2,097,152 bytes, no label"),
    ):
        write_set(tmp_path, lambda n, broken=broken: {"json": broken if n == 1 else {"label": n % 3}})
        assert reason in refused(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("pipe:cat train-0000.tar", "are read from and written to folders of this machine"),
        ("train-0000.tar::pipe:touch executed", "folders of this machine"),
        ("https://example.org/{0..3}.tar", "folders of this machine"),
        ("{s3,gs}://bucket/0.tar", "folders of this machine"),
        ("train-{0..9999999999}.tar", "more than 1,000,000 tars"),
        ("{00..99}/{00..99}/{000..999}.tar", "more than 1,000,000 tars"),
        ("${NOBODY_SET_THIS}.tar", "cannot be read (missing environment variable wds_WDS_NOBODY_SET_THIS)"),
        ("train-{0000..0001}.tar::train-0001.tar", "train-0001.tar more than once"),
    ],
)
def test_commands_addresses_and_senseless_patterns_are_refused(folder, monkeypatch, tmp_path, pattern, says):
    monkeypatch.chdir(tmp_path)
    assert says in refused(folder, folder=pattern)
    assert says in refused(folder, test=pattern, train=False)
    assert not list(tmp_path.iterdir())


def test_nothing_but_pictures_and_labels_is_read(tmp_path):
    """Neither other entries, nor links, nor what webdataset takes for its own notes."""
    write_set(tmp_path)
    with tarfile.open(tmp_path / "train-0001.tar", "a") as tar:
        for name in ("n9/99999.pkl", "__notes__", "n9/README"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"\x80\x04K."))
        link = tarfile.TarInfo("n9/99998.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert opened(tmp_path).samples == sum(TRAIN)
    loader = opened(tmp_path)
    for step in range(loader.steps_per_epoch):
        loader.batch(step)
    assert loader.notices() == []


def test_settings_that_show_a_mistake_are_refused_before_a_tar_is_looked_at():
    def recipe(**changes):
        model = {"model": Model("cifar:resnet_tiny", "pictures")}
        return Recipe("x", model, {"pictures": replace(CONFIG, **changes)}, Distill({}, "none"), steps=1)

    check(recipe())
    for changes, says in (
        ({"folder": ""}, "pictures.folder names no tars"),
        ({"test": ""}, "pictures.test names no tars to evaluate on"),
        ({"validation": 0.1}, "both say what is evaluated on"),
        ({"label": "label"}, "pictures.label label is no entry"),
        ({"shuffle": -1}, "pictures.shuffle -1 is no number"),
        ({"pipeline": "fast"}, "use timm for tars"),
        ({"name": "shards"}, "pictures.test is for tars only"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            check(recipe(**changes))
    check(shrink(recipe(label="json:y", classes="7")))
    assert "30 pictures, fewer than a batch of 64" in refused_batch()


def refused_batch() -> str:
    with pytest.raises(ValueError) as caught:
        LaneOrder("x", np.zeros(30, int), 64, 1)
    return str(caught.value)


# ---- damage


def torn(file: Path, end: int) -> None:
    with file.open("r+b") as stream:
        stream.truncate(end)


def test_a_torn_tar_is_used_as_far_as_it_is_whole_or_ends_the_run(tmp_path):
    write_set(tmp_path)
    whole = (tmp_path / "train-0002.tar").stat().st_size
    torn(tmp_path / "train-0002.tar", whole // 2)
    loader = opened(tmp_path)
    assert sum(TRAIN[:2]) < loader.samples < sum(TRAIN)
    (notice,) = loader.notices()
    assert re.search(
        r"train-0002.tar is not whole \(it ends, or is damaged, behind n\d/\d+.*\): what comes before", notice
    )
    loader.batch(0)
    assert "is not whole (it ends" in refused(tmp_path, corrupt="stop")
    write_set(tmp_path)
    with (tmp_path / "train-0000.tar").open("r+b") as stream:
        stream.seek(-10240 - 512 * 8, os.SEEK_END)
        stream.write(b"\xff" * 512 * 4)
    assert "is not whole" in opened(tmp_path).notices()[0], "damage within is not taken for the end"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_replaced_and_named_or_ends_the_run(tmp_path, workers):
    write_set(tmp_path)
    write(tmp_path / "train-0001.tar", *(sample(n) for n in range(11, 15)), {"__key__": "bad", "jpg": b"no", "cls": 1})
    loader = opened(tmp_path, workers=workers)
    for step in range(loader.steps_per_epoch):
        pictures, labels = loader.batch(step)
        assert torch.isfinite(pictures).all()
        assert labels.max() < 3
    (notice,) = loader.notices()
    assert "train-0001.tar: 1 damaged picture left out (bad.jpg: the picture cannot be decoded" in notice
    loader.close()
    stopping = opened(tmp_path, workers=workers, corrupt="stop")
    message = r"train-0001.tar: bad.jpg: the picture cannot be decoded"
    with pytest.raises(Unreadable, match=message):
        list(map(stopping.batch, range(stopping.steps_per_epoch)))
    stopping.close()


def test_a_tar_that_changes_under_a_run_gives_no_picture_with_another_ones_label(tmp_path):
    write_set(tmp_path)
    loader, test = opened(tmp_path), opened(tmp_path, train=False)
    renamed = ({**sample(n), "__key__": f"n{n % 3}/{n + 500:05d}"} for n in range(11))
    write(tmp_path / "train-0000.tar", *renamed)  # sound pictures in the same places
    torn(tmp_path / "train-0002.tar", 2000)
    os.remove(tmp_path / "val-0001.tar")
    for step in range(loader.steps_per_epoch):
        loader.batch(step)
    notices = " ".join(loader.notices())
    assert re.search(r"train-0000.tar: \d+ damaged pictures left out \([^)]*is another one", notices)
    assert "is another one than when the headers were looked at" in notices
    assert "train-0002.tar: " in notices
    assert sum(int(weight.sum()) for *_, weight in test.eval_batches(4)) == TEST[0]
    assert "val-0001.tar: " in test.notices()[0]


def test_the_look_at_the_headers_is_kept_and_made_again_when_a_tar_changes(tmp_path, monkeypatch):
    write_set(tmp_path)
    opened(tmp_path)
    looks = Counter()
    scan = census._scan
    monkeypatch.setattr(census, "_scan", lambda job: looks.update([Path(job[0]).name]) or scan(job))
    opened(tmp_path)
    assert not looks
    write(tmp_path / "train-0001.tar", *(sample(n) for n in range(700, 704)))
    assert opened(tmp_path).samples == sum(TRAIN) - 1
    assert looks["train-0001.tar"] == 1
    monkeypatch.setenv("HETERO_KT_CACHE", str(tmp_path / "other"))
    assert cache.default_folder() == tmp_path / "other"
    assert opened(tmp_path).samples == sum(TRAIN) - 1
