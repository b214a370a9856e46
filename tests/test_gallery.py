"""Where pictures lie: files, shards and Parquet; which of them a run uses; what happens where they are missing."""

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import albums
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hetero_kt.config import Transform
from hetero_kt.data import inputs, sharding
from hetero_kt.data.gallery import Folders, Shown, Tables, kept, read_json, without_missing
from hetero_kt.data.pictures import Damaged, PictureLoader
from hetero_kt.data.shards import Index

KEYS = [f"train2014/{albums.coco_name('train', number)}" for number in range(7)]


@pytest.fixture
def files(tmp_path):
    albums.coco_pictures(tmp_path / "files", "train", range(7))
    return tmp_path / "files"


@pytest.fixture
def shards(files, tmp_path):
    written = sharding.write_plain(
        str(files / "train2014"), str(tmp_path / "shards" / "train2014"), shard_size="3", quiet=True
    )
    assert (written.pictures, written.shards) == (7, 3)
    return tmp_path / "shards"


def red(picture: Image.Image) -> int:
    return round((np.asarray(picture)[0, 0, 0] - 10) / 10)


# ---- where they lie


def test_files_and_shards_of_them_show_the_same_pictures(files, shards):
    of_files, of_shards = Folders(files, KEYS), Folders(shards, KEYS)
    for number, key in enumerate(KEYS):
        assert key in of_files
        assert key in of_shards
        assert red(of_files.picture(key)) == red(of_shards.picture(key)) == number
        assert np.array_equal(of_files.picture(key), of_shards.picture(key))
    assert of_files.place(KEYS[0]) == str(files / "train2014")
    assert Path(of_shards.place(KEYS[0])).parent == shards / "train2014"
    assert "train2014/other.jpg" not in of_files
    assert "train2014/other.jpg" not in of_shards
    assert "other/other.jpg" not in of_files
    assert of_shards.fingerprint() != of_files.fingerprint()


def test_shards_of_a_plain_folder_are_the_same_every_time(files, shards, tmp_path):
    """And webdataset finds the pictures in them under their names."""
    import webdataset

    again = tmp_path / "again" / "train2014"
    sharding.write_plain(str(files / "train2014"), str(again), shard_size="3", quiet=True)
    for file in (shards / "train2014").iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()
    tars = sorted(str(file) for file in (shards / "train2014").glob("*.tar"))
    found = {sample["__key__"]: sample for sample in webdataset.WebDataset(tars, shardshuffle=False)}
    assert {f"{key}.jpg" for key in found} == {key.partition("/")[2] for key in KEYS}
    assert all(set(sample) == {"__key__", "__url__", "jpg", "__local_path__"} for sample in found.values())
    assert sharding.write_plain(str(files / "train2014"), str(again), shard_size="3", quiet=True).kept == 3


def test_plain_folders_are_told_from_class_folders(files, tmp_path):
    assert inputs.is_plain(str(files / "train2014"))
    assert not inputs.is_plain(str(files))
    with pytest.raises(ValueError, match=r"holds no JPEG, PNG or WebP files"):
        sharding.write_plain(str(files), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="does not exist"):
        sharding.write_plain(str(files / "nowhere"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="folders of this machine"):
        sharding.write_plain("pipe:cat x", str(tmp_path / "out"))


def test_pictures_beside_folders_with_pictures_are_neither_plain_nor_class_folders(files):
    """Whichever was meant, the others would be dropped without a word."""
    Image.new("RGB", (8, 8)).save(files / "stray.png")
    with pytest.raises(ValueError, match=r"files holds pictures itself \(stray\.png\) and in folders \(train2014\): "):
        inputs.is_plain(str(files))
    _made(files / "train2014" / "notes")
    (files / "train2014" / "notes" / "a.txt").write_text("no picture")
    assert inputs.is_plain(str(files / "train2014")), "folders without pictures do not matter"


@pytest.mark.parametrize("name", ["my pics", "Gemälde", ".hidden", "train2014"])
def test_shards_of_a_plain_folder_can_be_read_whatever_their_folder_is_called(files, tmp_path, name):
    sharding.write_plain(str(files / "train2014"), str(tmp_path / name), shard_size="4", quiet=True)
    assert sorted(file.name for file in (tmp_path / name).glob("*.tar")) == [f"pictures-00000{k}.tar" for k in (0, 1)]
    keys = [f"{name}/{Path(key).name}" for key in KEYS]
    assert [red(Folders(tmp_path, keys).picture(key)) for key in keys] == list(range(7))


def test_shards_without_their_names_are_refused(shards, tmp_path):
    names = shards / "train2014" / "names.json"
    names.write_text(names.read_text().replace("0000", "0001", 1))
    with pytest.raises(ValueError, match=r"names\.json cannot be used \(it is another one\)"):
        Folders(shards, KEYS)
    names.unlink()
    with pytest.raises(ValueError, match=r"names\.json cannot be used \(No such file"):
        Folders(shards, KEYS)
    Image.new("RGB", (8, 8)).save(_made(tmp_path / "tree" / "ant") / "0.png")
    sharding.write(str(tmp_path / "tree"), str(tmp_path / "labelled"), quiet=True)
    with pytest.raises(ValueError, match="labelled pictures without names"):
        Index(tmp_path / "labelled" / "train").names()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_torn_shard_takes_its_pictures_with_it(shards):
    torn = shards / "train2014" / "pictures-000001.tar"
    torn.write_bytes(torn.read_bytes()[:-512])
    gallery = Folders(shards, KEYS)
    there, notices = without_missing(KEYS, gallery, "set", "skip")
    assert len(there) == 4
    assert len(notices) == 1
    assert "lacks 3 pictures" in notices[0]
    assert any("is torn" in notice or "bytes instead of" in notice for notice in gallery.notices())
    for key in there:  # those of the other shards are still found under their own names
        assert red(gallery.picture(key)) == KEYS.index(key)
    with pytest.raises(ValueError, match="bytes instead of"):
        Folders(shards, KEYS, "stop")


@pytest.mark.parametrize("key", ["../secret.jpg", "/etc/secret.jpg", "train2014/../../secret.jpg"])
def test_keys_do_not_lead_out_of_the_folder(tmp_path, key):
    with pytest.raises(ValueError, match="is no picture below"):
        Folders(tmp_path, [key])


def test_parquet_shows_its_rows_and_lays_their_bytes_out_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HETERO_KT_CACHE", str(tmp_path / "cache"))
    parts = [tmp_path / "train-0.parquet", tmp_path / "train-1.parquet"]
    albums.parquet(parts[0], range(5))
    albums.parquet(parts[1], range(5, 9))
    keys = [f"k{number}" for number in range(9)]
    tables = Tables(parts, keys)
    assert [red(tables.picture(key)) for key in keys] == list(range(9))
    assert [tables.place(key) for key in keys] == [str(parts[0])] * 5 + [str(parts[1])] * 4
    assert "k9" not in tables
    assert isinstance(tables._bytes, np.memmap), "each rank and worker would hold the pictures in memory"
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")}
    assert Tables(parts, keys).fingerprint() == tables.fingerprint()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.npy")} == written
    albums.parquet(parts[1], range(6, 10))
    changed = Tables(parts, keys)
    assert red(changed.picture("k5")) == 6
    assert changed.fingerprint() != tables.fingerprint()


def test_parquet_goes_to_a_worker_without_its_pictures(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "train.parquet"
    albums.parquet(file, range(6), noise=[rng.bytes(100_000) for _ in range(6)])
    tables = Tables([file], [str(k) for k in range(6)])
    sent = bytes(ForkingPickler.dumps(Shown("set", tables, ["0", "3"])))
    assert len(sent) < 4_000
    assert red(pickle.loads(sent).picture(1)) == 3


def test_parquet_with_a_picture_twice_or_without_bytes(tmp_path):
    file = tmp_path / "train.parquet"
    albums.parquet(file, range(3))
    with pytest.raises(ValueError, match="picture b stands in two rows"):
        Tables([file], ["a", "b", "b"])
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [{"bytes": albums.encoded(0)}, {"bytes": None}]}), file)
    tables = Tables([file], ["a", "b"])
    assert red(tables.picture("a")) == 0
    with pytest.raises(Damaged, match="picture b cannot be decoded"):
        tables.picture("b")


def test_parquet_that_is_damaged_inside_is_named_and_not_the_cache(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "train.parquet"
    pictures = [{"bytes": albums.encoded(number)} for number in range(64)]
    pq.write_table(pa.table({"image": pictures}), file)
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    content = bytearray(file.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 16] = b"\xff" * 16  # the page's header
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*train\.parquet cannot be read \([^\n]*fetch it again[^\n]*$"):
        Tables([file], [str(number) for number in range(64)])


def test_files_that_are_laid_out_otherwise_are_one_sentence(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, nested = tmp_path / "train.parquet", tmp_path / "nested.json"
    pq.write_table(pa.table({"photo": [1]}), table)
    with pytest.raises(ValueError, match=r"^[^\n]*train\.parquet has no column image \(it has photo\): [^\n]*$"):
        Tables([table], ["a"])
    nested.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match=r"^[^\n]*nested\.json cannot be read \([^\n]*$"):
        read_json(nested)


def test_black_pictures_are_shown_without_a_look_at_the_gallery(files):
    keys = [KEYS[0], KEYS[3]]
    gallery = Folders(files, KEYS)
    seen = Shown("set", gallery, keys)
    (files / KEYS[0]).unlink()
    black = Shown("set", gallery, keys, black=16)
    assert black.picture(0).size == (16, 16)
    assert black.picture(1).mode == "RGB"
    assert black.picture(1).getextrema() == ((0, 0),) * 3
    assert black.fingerprint() != seen.fingerprint() == Shown("set", gallery, keys).fingerprint()


def test_a_lost_or_truncated_file_is_damage(files):
    gallery = Folders(files, KEYS)
    (files / KEYS[2]).write_bytes((files / KEYS[2]).read_bytes()[:-40])
    (files / KEYS[3]).unlink()
    with pytest.raises(Damaged, match=r"000000000002\.jpg cannot be decoded"):
        gallery.picture(KEYS[2])
    with pytest.raises(Damaged, match=r"000000000003\.jpg cannot be read \(No such file"):
        gallery.picture(KEYS[3])


def test_a_damaged_picture_that_many_samples_show_counts_once(files):
    (files / KEYS[2]).write_bytes(b"")
    shown = Shown("set", Folders(files, KEYS), [KEYS[2], KEYS[1], KEYS[2], KEYS[2]])
    loader = PictureLoader(shown, 4, 0, albums.PLAIN, 16)
    _, drawn = loader.draw(0)
    assert drawn.tolist() == [1, 1, 1, 1], "another sample stands in, and the labels say so"
    assert loader.notices() == [
        f"{files / 'train2014'}: 1 damaged picture left out (COCO_train2014_000000000002.jpg cannot be decoded"
        " (UnidentifiedImageError))."
    ]


def test_squash_shows_all_of_a_picture_and_cropping_its_middle(tmp_path):
    picture = Image.new("RGB", (60, 20))
    picture.paste((250, 0, 0), (0, 0, 10, 20))
    picture.paste((0, 0, 250), (50, 0, 60, 20))
    _made(tmp_path / "folder")
    picture.save(tmp_path / "folder" / "a.png")
    shown = Shown("set", Folders(tmp_path, ["folder/a.png"]), ["folder/a.png"])
    seen = {}
    for squash in (True, False):
        loader = PictureLoader(shown, 1, 0, Transform(squash=squash), 24)
        ((pictures, _, _),) = loader.eval_batches(1)
        assert pictures.shape == (1, 3, 24, 24)
        seen[squash] = pictures[0, :, 12] * 0.27 + 0.45  # close to what it was
    assert seen[True][0, 0] > 0.8
    assert seen[True][2, -1] > 0.8
    assert seen[False].max() < 0.3


# ---- which of them


@given(size=st.integers(4, 60), validation=st.floats(0.25, 0.6), fraction=st.floats(0.3, 1.0))
def test_shares_are_disjoint_the_same_in_every_order_and_grow(size, validation, fraction):
    keys = [f"p{number}" for number in range(size)]
    train = kept(keys, validation, fraction, train=True)
    held = kept(keys, validation, fraction, train=False)
    assert not train & held
    assert len(held) == round(validation * size)
    assert len(train) == round(fraction * (size - len(held)))
    assert kept([*reversed(keys), *keys], validation, fraction, train=True) == train
    assert train <= kept(keys, validation, 1.0, train=True)
    assert kept(keys, validation, 1.0, train=True) | held == set(keys)


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="leave none to evaluate on"):
        kept(["a", "b"], 0.1, 1.0, train=False)
    with pytest.raises(ValueError, match="leave none to train on"):
        kept(["a", "b"], 0.0, 0.1, train=True)


# ---- missing ones


def test_missing_pictures_are_left_out_and_named_or_end_the_run(files):
    (files / KEYS[1]).unlink()
    gallery = Folders(files, KEYS)
    there, notices = without_missing([*KEYS, KEYS[1]], gallery, files, "skip")
    assert there == set(KEYS) - {KEYS[1]}
    assert notices == [
        f"{files} lacks 1 picture that its annotations name (train2014/COCO_train2014_000000000001.jpg): they are"
        " left out."
    ]
    with pytest.raises(ValueError, match=r"lacks 1 picture .* fetch them, or go on without"):
        without_missing(KEYS, gallery, files, "stop")
    with pytest.raises(ValueError, match="lacks 2 pictures"):
        without_missing(["val2014/a.jpg", "val2014/b.jpg"], gallery, files, "skip")
    assert without_missing([KEYS[0]], gallery, files, "stop") == ({KEYS[0]}, [])
