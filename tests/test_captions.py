"""Pictures with captions: what is read of each layout, who sees which, and what is said of bad input."""

import json
from dataclasses import replace

import albums
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_vqa_data import bare, decoded

from hetero_kt.config import Text
from hetero_kt.data import open_loader, sharding
from hetero_kt.data.captions import captions
from hetero_kt.data.pictures import Unreadable
from hetero_kt.data.text import load_tokenizer
from hetero_kt.data.world import vocabulary


def loader(data_dir, rank=0, world=1, *, train=True, seed=3, **changes):
    settings = albums.config("captions", **changes)
    return captions(settings, data_dir, vocabulary(), train=train, seed=seed, rank=rank, world=world)


@pytest.fixture
def coco(tmp_path):
    return albums.set_of_coco(tmp_path / "set")


# ---- what is read


def test_karpathys_split_pairs_pictures_with_their_captions(coco):
    ours = loader(coco)
    assert (ours.images, ours.captions, ours.samples) == (10, 20, 20), "restval is trained on too"
    assert ours.owner.tolist() == [number for number in range(10) for _ in range(2)]
    assert ours.texts[:4] == [*albums.said_of(0), *albums.said_of(1)]
    seen = []
    for step in range(5):
        pictures, ids, mask, groups = ours.batch(step)
        texts = decoded(ids, mask)
        assert albums.shown(pictures) == groups.tolist()
        for text, number in zip(texts, groups.tolist(), strict=True):
            assert text in [bare(said) for said in albums.said_of(number)]
        assert groups.dtype == ids.dtype == torch.int64
        seen += texts
    assert sorted(seen) == sorted(bare(text) for text in ours.texts), "every pair once an epoch"
    held = loader(coco, train=False)
    assert (held.images, held.captions) == (4, 8)
    assert held.texts[0] == albums.said_of(12)[0]


def test_shards_stand_in_for_folders(coco):
    expected = loader(coco).batch(2)
    for part in ("train2014", "val2014"):
        (coco / part).rename(coco / f"{part}-files")
        sharding.write_plain(str(coco / f"{part}-files"), str(coco / part), shard_size="3", quiet=True)
    ours = loader(coco)
    assert all(torch.equal(a, b) for a, b in zip(ours.batch(2), expected, strict=True))
    assert ours.notices() == []


@pytest.mark.parametrize("folder", ["", "images", "Flicker8k_Dataset"])
def test_names_alone_are_looked_for_in_the_usual_folders(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    images = []
    for number in range(6):
        (tmp_path / folder / f"{number}_ab.jpg").write_bytes(albums.encoded(number))
        sentences = albums.said_of(number, 5)
        images.append(
            {"filename": f"{number}_ab.jpg", "split": "test" if number > 3 else "train", "sentences": sentences}
        )
    albums.karpathy(tmp_path, "dataset_flickr8k.json", images)
    ours = loader(tmp_path)
    assert (ours.images, ours.captions) == (4, 20)
    pictures, _, _, groups = ours.batch(0)
    assert albums.shown(pictures) == groups.tolist()
    assert loader(tmp_path, train=False).images == 2


def test_parquet_of_flickr8k_and_of_coco(tmp_path):
    for part, numbers in (("train", range(5)), ("validation", range(5, 6)), ("test", range(6, 9))):
        said = [albums.said_of(number) for number in numbers]
        names = [f"{number}.jpg" for number in numbers]
        albums.parquet(tmp_path / "flickr" / f"{part}.parquet", numbers, filename=names, captions=said)
    ours = loader(tmp_path, folder="flickr")
    assert (ours.images, ours.captions) == (5, 10)
    pictures, _, _, groups = ours.batch(0)
    assert albums.shown(pictures) == groups.tolist()
    held = loader(tmp_path, folder="flickr", train=False)
    assert (held.images, held.texts[0]) == (3, albums.said_of(6)[0]), "the test set, where there is one"
    for part, numbers in (("train", range(5)), ("validation", range(5, 7))):
        said = [albums.said_of(number) if number != 3 else [] for number in numbers]
        albums.parquet(tmp_path / "coco" / f"{part}.parquet", numbers, image_id=list(numbers), captions=said)
    ours = loader(tmp_path, folder="coco")
    assert (ours.images, ours.captions) == (4, 8)
    assert ours.notices() == [f"{tmp_path / 'coco'}: 1 picture without captions left out (3)."]
    pictures, _, _, groups = ours.batch(0)
    assert albums.shown(pictures) == [[0, 1, 2, 4][number] for number in groups.tolist()]
    assert loader(tmp_path, folder="coco", train=False).images == 2


@pytest.mark.data
def test_real_sets_have_the_stated_sizes(real_data):
    tokenizer = load_tokenizer(real_data / "tokenizer")
    sizes = {"flickr8k": ((1000, 5000), (250, 1250)), "coco_vqa_captions": ((241, 1206), (61, 305))}
    for folder, counts in sizes.items():
        for train, expected in zip((True, False), counts, strict=True):
            settings = albums.config("captions", folder=folder, text=Text("tokenizer", length=40))
            ours = captions(settings, real_data, tokenizer, train=train, seed=0)
            assert (ours.images, ours.captions) == expected
            assert all(tensor.isfinite().all() for tensor in ours.batch(0))
    settings = albums.config("captions", folder="flickr8k", validation=0.15)
    held = captions(settings, real_data, tokenizer, train=False, seed=0)
    assert (held.images, held.captions) == (150, 750)


# ---- who sees which


def test_two_ranks_see_what_one_sees_alone(coco):
    alone, pair = loader(coco, batch=6), [loader(coco, rank, 2, batch=6) for rank in range(2)]
    for step in (0, 1, 7, 3):
        whole = alone.batch(step)
        for rank, reader in enumerate(pair):
            for ours, theirs in zip(reader.batch(step), whole, strict=True):
                assert torch.equal(ours, theirs[rank::2]), "widths, too, are those of all ranks"
    assert not torch.equal(loader(coco, batch=6, seed=4).batch(1)[0], alone.batch(1)[0])


@settings(max_examples=8, deadline=None)
@given(world=st.integers(1, 3), rows=st.integers(1, 7))
def test_evaluation_sees_pictures_and_captions_once_and_all_ranks_run_alike(tmp_path_factory, world, rows):
    folder = tmp_path_factory.getbasetemp() / "captions"
    if not folder.exists():
        albums.set_of_coco(folder)
    ranks = [loader(folder, rank, world, train=False, batch=6) for rank in range(world)]
    texts = ranks[0].texts
    pictures_seen, captions_seen = [], []
    for together in zip(*(reader.eval_pictures(rows) for reader in ranks), strict=True):
        assert len({len(pictures) for pictures, _, _ in together}) == 1
        for pictures, numbers, weight in together:
            assert len(pictures) <= rows
            assert [number - 12 for number in albums.shown(pictures)] == numbers.tolist()
            pictures_seen += numbers[weight > 0].tolist()
    for together in zip(*(reader.eval_captions(rows) for reader in ranks), strict=True):
        assert len({tuple(ids.shape) for (ids, _), _, _ in together}) == 1
        for (ids, mask), numbers, weight in together:
            assert len(ids) <= rows
            assert decoded(ids, mask) == [bare(texts[number]) for number in numbers.tolist()]
            captions_seen += numbers[weight > 0].tolist()
    assert sorted(pictures_seen) == list(range(4))
    assert sorted(captions_seen) == list(range(8))


def test_fraction_and_validation_go_by_pictures(coco):
    def texts(**changes):
        return set(loader(coco, **changes).texts)

    some = texts(fraction=0.3)
    assert len(some) == 6, "all captions of a kept picture"
    assert texts(fraction=0.3, seed=9) == some
    held = texts(validation=0.2, train=False)
    assert len(held) == 4
    assert texts(validation=0.2) == texts() - held
    assert len(texts(validation=0.2, fraction=0.5)) == 8
    assert not texts(validation=0.2, fraction=0.5) & held


# ---- bad input


def test_a_truncated_picture_is_replaced_with_its_caption_counted_and_named(coco):
    lost = coco / "train2014" / albums.coco_name("train", 4)
    lost.write_bytes(lost.read_bytes()[:-40])
    ours = loader(coco)
    for step in range(5):
        pictures, ids, mask, groups = ours.batch(step)
        assert albums.shown(pictures) == groups.tolist()
        assert 4 not in groups.tolist()
        for text, number in zip(decoded(ids, mask), groups.tolist(), strict=True):
            assert f"thisis{number}" in text
    (notice,) = ours.notices()
    assert notice.startswith(f"{coco / 'train2014'}: 1 damaged picture left out (COCO_train2014_000000000004.jpg")
    strict = loader(coco, corrupt="stop")
    with pytest.raises(Unreadable, match=r"000000000004\.jpg cannot be decoded"):
        [strict.batch(step) for step in range(5)]


def test_black_pictures_leave_the_captions_as_they_are(coco):
    seen, black = (loader(coco, blank=blank) for blank in (False, True))
    dark = -torch.tensor(black.mean) / torch.tensor(black.std)
    pictures, *others = black.batch(1)
    assert all(torch.equal(a, b) for a, b in zip(others, seen.batch(1)[1:], strict=True))
    ((shown, _, _), *_) = loader(coco, train=False, blank=True).eval_pictures(4)
    for each in (pictures, shown):
        assert torch.allclose(each, dark[:, None, None].expand_as(each), atol=1e-6)
    assert black.fingerprint() != seen.fingerprint()


def test_a_damaged_picture_does_not_count_in_evaluation(coco):
    (coco / "val2014" / albums.coco_name("val", 13)).write_bytes(b"no picture")
    ours = loader(coco, train=False)
    ((_, numbers, weight),) = ours.eval_pictures(4)
    assert dict(zip(numbers.tolist(), weight.tolist(), strict=True)) == {0: 1, 1: 0, 2: 1, 3: 1}
    assert len(ours.notices()) == 1
    assert "1 damaged picture left out" in ours.notices()[0]
    with pytest.raises(Unreadable):
        list(loader(coco, train=False, corrupt="stop").eval_pictures(4))


def test_missing_pictures(coco):
    (coco / "train2014" / albums.coco_name("train", 4)).unlink()
    ours = loader(coco)
    assert (ours.images, ours.captions) == (9, 18)
    assert "lacks 1 picture that its annotations name (train2014/COCO_train2014_000000000004.jpg)" in ours.notices()[0]
    pictures, _, _, groups = ours.batch(0)
    there = [number for number in range(10) if number != 4]
    assert albums.shown(pictures) == [there[number] for number in groups.tolist()]
    with pytest.raises(ValueError, match=r"lacks 1 picture .*000000000004"):
        loader(coco, corrupt="stop")


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("images"), "not laid out as Karpathy's split (no 'images')"),
        (lambda c: c["images"][1].pop("split"), "(no 'split')"),
        (lambda c: c["images"][1].pop("sentences"), "(no 'sentences')"),
        (lambda c: c["images"][1].update(filename=3), "not laid out as Karpathy's split"),
        (lambda c: c["images"][1]["sentences"][0].update(raw=None), "None is no text"),
        (lambda c: c["images"].append(c["images"][0]), "stands in two entries"),
        (lambda c: c["images"][1].update(filepath="../elsewhere"), "is no picture below"),
        (lambda c: [image.update(split="dev") for image in c["images"]], "holds no picture"),
        (lambda c: [image.update(sentences=[]) for image in c["images"]], "holds no picture with captions"),
    ],
)
def test_other_layouts(coco, change, said):
    edit(coco / "dataset_coco.json", change)
    with pytest.raises(ValueError) as error:
        loader(coco)
    assert said in str(error.value)
    assert str(coco) in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_without_a_set_or_with_two(coco, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        with pytest.raises(ValueError, match=r"holds no pictures with captions: name one with dataset_coco\.json"):
            loader(tmp_path, folder=folder)
    (coco / "dataset_flickr8k.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds dataset_coco\.json and dataset_flickr8k\.json"):
        loader(coco)
    (coco / "dataset_coco.json").unlink()
    (coco / "dataset_flickr8k.json").write_text("{")
    with pytest.raises(ValueError, match=r"dataset_flickr8k\.json cannot be read"):
        loader(coco)
    albums.parquet(tmp_path / "empty" / "train.parquet", [0], filename=["a"], text=["b"])
    with pytest.raises(ValueError, match="has no column captions"):
        loader(tmp_path, folder="empty")


# ---- as a run sees it


def test_fingerprints_tell_sets_apart(coco):
    first = loader(coco).fingerprint()
    assert loader(coco, seed=8, batch=2).fingerprint() == first
    assert loader(coco, fraction=0.5).fingerprint() != first
    edit(coco / "dataset_coco.json", lambda c: c["images"][0]["sentences"][0].update(raw="other words"))
    assert loader(coco).fingerprint() != first


def test_runs_open_it_by_name(tmp_path):
    settings = replace(albums.config("captions"), text=Text("generated", length=40), image_size=64)
    ours = open_loader(settings, str(tmp_path), train=False, seed=0)
    assert (ours.name, ours.images, ours.captions, ours.samples) == ("generated", 200, 400, 400)
    assert np.array_equal(ours.owner, np.repeat(np.arange(200), 2))
    ours.close()
