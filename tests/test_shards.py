"""Shards: what is written, that it goes on after a kill, and what is read when files are damaged."""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hetero_kt import cli, data
from hetero_kt.config import Data
from hetero_kt.data import counter, sharding
from hetero_kt.data.pictures import Damaged
from hetero_kt.data.shards import TABLE, Index, Shards

CLASSES = ("ant", "bee", "cat")


def encoded(number: int, kind: str = "JPEG", size: tuple[int, int] = (24, 18)) -> bytes:
    """Picture `number`, unlike all others."""
    pixels = (counter.bits(number, np.arange(size[0] * size[1] * 3)) >> np.uint64(56)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels.reshape(size[1], size[0], 3)).save(stream, kind)
    return stream.getvalue()


def class_folders(folder: Path, count: int, first: int = 0) -> dict[bytes, int]:
    """A tree of class folders with all three formats in it, and files that are no pictures; contents to labels."""
    contents = {}
    for number in range(first, first + count):
        label, kind = number % 3, ("JPEG", "PNG", "WEBP")[number % 4 % 3]
        place = folder / CLASSES[label] / ("deep" if number % 5 == 0 else ".")
        place.mkdir(parents=True, exist_ok=True)
        contents[encoded(number, kind)] = label
        # ImageNet has a PNG that is called .JPEG, too.
        (place / f"{number}.JPEG").write_bytes(encoded(number, kind))
    (folder / "ant" / "notes.txt").write_text("no picture")
    (folder / "bee" / "trap.pkl").write_bytes(b"no picture")
    return contents


def parquet(file: Path, count: int, first: int = 0, *, groups: int = 4, **columns) -> dict[bytes, int]:
    contents = {encoded(number): number % 3 for number in range(first, first + count)}
    table = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "label": list(contents.values()),
    } | columns
    pq.write_table(pa.table(table), file, row_group_size=max(1, count // groups))
    return contents


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def everything(labels, classes):
    return np.arange(len(labels))


def opened(folder: Path, corrupt="skip") -> Shards:
    return Shards(Index(folder), everything, corrupt)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An ImageFolder of 60 and 12 pictures."""
    folder = tmp_path_factory.mktemp("tree")
    train, held = class_folders(folder / "train", 60), class_folders(folder / "val", 12, first=100)
    return folder, train, held


@pytest.fixture
def shards(tree, tmp_path):
    """Its shards, of 16 pictures each."""
    sharding.write(str(tree[0]), str(tmp_path / "set"), shard_size="16", quiet=True)
    return tmp_path / "set"


# ---- writing


def test_pictures_come_back_as_they_were_encoded(tree, shards):
    for part, contents in (("train", tree[1]), ("validation", tree[2])):
        source = opened(shards / part)
        assert {source.content(k): int(source.labels[k]) for k in range(len(source.labels))} == contents
        assert Index(shards / part).classes == list(CLASSES)
    picture = opened(shards / "train").picture(0)
    assert picture.mode == "RGB"
    assert picture.size == (24, 18)


def test_webdataset_reads_the_same_pairs(tree, shards):
    urls = sorted(str(file) for file in (shards / "train").glob("*.tar"))
    assert len(urls) == 4
    source, position = opened(shards / "train"), 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        kinds = set(sample) & {"jpg", "png", "webp"}
        assert len(kinds) == 1, "a sample has one picture"
        content = sample[kinds.pop()]
        assert tree[1][content] == int(sample["cls"])
        assert source.content(position) == content
        assert source.labels[position] == int(sample["cls"])
        position += 1
    assert position == 60


def test_the_extension_is_what_the_bytes_are(shards):
    for file in (shards / "train").glob("*.tar"):
        with tarfile.open(file) as tar:
            for entry in tar:
                kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}.get(entry.name.split(".")[1])
                if kind:
                    with Image.open(tar.extractfile(entry)) as picture:
                        assert picture.format == kind


def test_the_index_says_where_every_picture_lies(shards):
    index = Index(shards / "train")
    table, row = index.table(), 0
    for number, shard in enumerate(index.shards):
        file = shards / "train" / shard["name"]
        assert file.stat().st_size == shard["bytes"]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == shard["sha256"]
        with tarfile.open(file) as tar:
            entries = [entry for entry in tar if not entry.name.endswith(".cls")]
        assert len(entries) == shard["samples"]
        for entry in entries:
            assert table[row]["shard"] == number
            assert (table[row]["offset"], table[row]["length"]) == (entry.offset_data, entry.size)
            row += 1
    assert row == len(table) == 60


def test_every_shard_holds_all_classes_and_the_order_is_fixed(tree, shards, tmp_path):
    index = Index(shards / "train")
    for number in range(len(index.shards)):
        labels = index.table()["label"][index.table()["shard"] == number]
        assert set(labels) == {0, 1, 2}
    sharding.write(str(tree[0]), str(tmp_path / "again"), shard_size="16", workers=2, quiet=True)
    assert digest(tmp_path / "again") == digest(shards), "two processes, another time: other bytes"


@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 70), in_bytes=st.booleans())
def test_any_shard_size_keeps_every_picture(tree, tmp_path_factory, size, in_bytes):
    folder = tmp_path_factory.mktemp("sizes")
    sharding.write(str(tree[0] / "val"), str(folder), shard_size=f"{size}KB" if in_bytes else str(size), quiet=True)
    index = Index(folder / "train")
    source = opened(folder / "train")
    assert {source.content(k) for k in range(len(source.labels))} == set(tree[2])
    if in_bytes:
        end = 10240  # tar fills up to whole records
        assert all(s["bytes"] <= max(size * 1000 + 2 * end, 2 * end) for s in index.shards if s["samples"] > 1)
    else:
        assert [s["samples"] for s in index.shards[:-1]] == [size] * (len(index.shards) - 1)
        assert index.shards[-1]["samples"] <= size


def test_parquet(tmp_path):
    train, held = parquet(tmp_path / "a.parquet", 50), parquet(tmp_path / "b.parquet", 10, first=80)
    args = ["shards", str(tmp_path / "a.parquet"), str(tmp_path / "out"), "--shard-size", "20", "--workers", "1"]
    cli.main([*args, "--validation", str(tmp_path / "b.parquet")])
    for part, contents in (("train", train), ("validation", held)):
        source = opened(tmp_path / "out" / part)
        assert {source.content(k): int(source.labels[k]) for k in range(len(source.labels))} == contents
    assert not list((tmp_path / "out").rglob(".unfinished")), "copies stay behind"
    folder = tmp_path / "folder"
    folder.mkdir()
    halves = parquet(folder / "train-0.parquet", 20) | parquet(folder / "train-1.parquet", 20, first=20)
    parquet(folder / "validation.parquet", 10, first=80)
    sharding.write(str(folder), str(tmp_path / "of_folder"), quiet=True)
    source = opened(tmp_path / "of_folder" / "train")
    assert {source.content(k): int(source.labels[k]) for k in range(len(source.labels))} == halves
    assert len(opened(tmp_path / "of_folder" / "validation").labels) == 10


def test_class_names_come_from_the_parquet_file(tmp_path):
    parquet(tmp_path / "a.parquet", 9)
    table = pq.read_table(tmp_path / "a.parquet")
    features = {"label": {"names": ["x", "y", "z", "unused"], "_type": "ClassLabel"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, tmp_path / "named.parquet")
    sharding.write(str(tmp_path / "named.parquet"), str(tmp_path / "out"), quiet=True)
    assert Index(tmp_path / "out" / "train").classes == ["x", "y", "z", "unused"]
    assert data.classes(Data(name="shards", folder="out"), str(tmp_path)) == 4


# ---- going on


def written(folder: Path, source: Path, out: Path) -> int:
    """How many shards were kept."""
    return sum(part.kept for part in sharding.write(str(source), str(out), shard_size="16", quiet=True))


def test_a_finished_folder_is_checked_and_mended(tree, shards):
    before = digest(shards)
    assert written(shards, tree[0], shards) == 5
    first, second, third = (shards / "train" / f"train-00000{k}.tar" for k in range(3))
    changed = second.stat().st_mtime_ns
    first.write_bytes(first.read_bytes()[:-4000])
    content = bytearray(third.read_bytes())
    content[5000] ^= 1
    third.write_bytes(content)
    assert written(shards, tree[0], shards) == 3
    assert digest(shards) == before
    assert second.stat().st_mtime_ns == changed, "a whole shard was written again"
    (shards / "train" / "index.npy").write_bytes(b"torn")
    written(shards, tree[0], shards)
    assert digest(shards) == before


@pytest.mark.parametrize("source", ["tree", "parquet"])
def test_a_run_that_stops_between_shards_goes_on(source, tree, tmp_path, monkeypatch):
    place = tree[0] / "train"
    if source == "parquet":
        place = tmp_path / "a.parquet"
        parquet(place, 60)
    sharding.write(str(place), str(tmp_path / "whole"), shard_size="16", quiet=True)
    real, calls = sharding._write_shard, []

    def stops(job):
        calls.append(job.name)
        if len(calls) == 3:
            (tmp_path / "set" / "train" / job.name).write_bytes(b"torn")
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(sharding, "_write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, place, tmp_path / "set")
    with pytest.raises(ValueError, match=r"holds no index\.json .*let hetero-kt shards write \(or finish\) it"):
        Index(tmp_path / "set" / "train")
    monkeypatch.setattr(sharding, "_write_shard", real)
    assert written(tmp_path, place, tmp_path / "set") == 2
    assert digest(tmp_path / "set") == digest(tmp_path / "whole")


def test_a_killed_process_goes_on(tmp_path):
    source = tmp_path / "a.parquet"
    parquet(source, 600, groups=3)
    command = [sys.executable, "-m", "hetero_kt.cli", "shards", str(source), str(tmp_path / "set"), "--shard-size", "3"]
    process = subprocess.Popen([*command, "--workers", "1"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "set").glob("train/*.tar"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "set" / "train" / "index.json").exists()
    (part,) = sharding.write(str(source), str(tmp_path / "set"), shard_size="3", quiet=True)
    assert 4 <= part.kept < 200
    sharding.write(str(source), str(tmp_path / "whole"), shard_size="3", quiet=True)
    assert digest(tmp_path / "set") == digest(tmp_path / "whole")


def test_other_shards_are_not_overwritten(tree, shards, tmp_path):
    before = digest(shards)
    for source, size in ((tree[0], "17"), (tree[0] / "val", "16")):
        with pytest.raises(ValueError, match="holds shards of another input or of another --shard-size: name another"):
            sharding.write(str(source), str(shards), shard_size=size, quiet=True)
    assert digest(shards) == before
    (tmp_path / "foreign" / "train").mkdir(parents=True)
    (tmp_path / "foreign" / "train" / "imagenet-0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="shards of unknown origin"):
        sharding.write(str(tree[0]), str(tmp_path / "foreign"), quiet=True)


# ---- bad input of the command


def complaint(*args: object) -> str:
    with pytest.raises(ValueError) as error:
        sharding.write(*(str(one) for one in args), quiet=True)
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_bad_input_is_one_sentence(tree, tmp_path):
    out = tmp_path / "out"
    for place in ("pipe:cat x.tar", "s3://bucket/x", "https://example.org/x.parquet", "gs:x"):
        assert "folders of this machine" in complaint(place, out)
        assert "folders of this machine" in complaint(tree[0], place)
    assert "does not exist" in complaint(tmp_path / "nowhere", out)
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    assert "holds no JPEG, PNG or WebP files in class folders" in complaint(tmp_path / "empty", out)
    (tmp_path / "gif" / "ant").mkdir(parents=True)
    (tmp_path / "gif" / "ant" / "a.jpg").write_bytes(b"GIF89a" + bytes(40))
    assert "a.jpg holds a picture that is no JPEG, PNG or WebP" in complaint(tmp_path / "gif", out)
    class_folders(tmp_path / "more" / "train", 6)
    class_folders(tmp_path / "more" / "val", 6)
    (tmp_path / "more" / "val" / "images").mkdir()
    assert "val/images is no class of the training set" in complaint(tmp_path / "more", tmp_path / "out2")
    for size in ("0", "-5", "much", "5XB"):
        with pytest.raises(ValueError, match=r"--shard-size .* is neither samples"):
            sharding.write(str(tree[0]), str(out), shard_size=size, quiet=True)
    with pytest.raises(ValueError, match="--workers 0 is no number"):
        sharding.write(str(tree[0]), str(out), workers=0, quiet=True)
    (tmp_path / "file").write_bytes(b"")
    assert "cannot be used" in complaint(tree[0], tmp_path / "file")


def test_bad_parquet_is_one_sentence(tmp_path):
    out, file = tmp_path / "out", tmp_path / "a.parquet"
    parquet(file, 12)
    file.write_bytes(file.read_bytes()[:-50])
    assert "a.parquet cannot be read" in complaint(file, out)
    parquet(file, 4, image=["a.jpg"] * 4)
    assert "column image holds no encoded pictures" in complaint(file, out)
    parquet(file, 4, label=["a"] * 4)
    assert "column label is no integer" in complaint(file, out)
    pq.write_table(pq.read_table(file).rename_columns(["photo", "label"]), file)
    assert "has no column image or img (it has photo, label)" in complaint(file, out)
    parquet(file, 4, image=[{"bytes": None, "path": "a.jpg"}] * 4, label=[0, 1, 2, 0])
    assert "has no bytes" in complaint(file, out)
    parquet(file, 4, label=[0, 1, -2, 0])
    assert "labels are not 0 to 1" in complaint(file, tmp_path / "out2")
    parquet(file, 4, image=[{"bytes": gif(), "path": None}] * 4)
    assert "a.parquet (row group 3) holds a picture that is no JPEG" in complaint(file, tmp_path / "out3")


# ---- damaged shards, and what is never decoded


def damage(file: Path, at: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def test_missing_and_truncated_shards_are_left_out_by_name(shards):
    folder = shards / "train"
    (folder / "train-000001.tar").unlink()
    os.truncate(folder / "train-000003.tar", 999)
    source = opened(folder)
    assert len(source.labels) == 60 - 16 - 12
    missing, torn = source.notices()
    assert missing == f"{folder}/train-000001.tar is missing: its 16 samples are left out."
    assert torn.startswith(f"{folder}/train-000003.tar has 999 bytes instead of ")
    assert torn.endswith(": its 12 samples are left out.")
    for sample in range(len(source.labels)):
        source.picture(sample)
    with pytest.raises(ValueError, match=r"train-000001\.tar is missing: .* with corrupt skip\.$"):
        opened(folder, "stop")
    for file in folder.glob("*.tar"):
        file.unlink()
    with pytest.raises(ValueError, match=r"has no sample left \(4 of 4 shards are damaged\)\.$"):
        opened(folder)


def test_a_missing_shard_does_not_move_what_is_held_out(shards):
    config = Data(name="shards", folder="set", pipeline="timm", validation=0.2, batch=4, workers=0, image_size=16)

    def places(train: bool) -> set[bytes]:
        loader = data.open_loader(config, str(shards.parent), train=train, seed=0)
        return {loader._source.content(k) for k in range(loader.samples)}

    train, held = places(True), places(False)
    assert len(train) + len(held) == 60
    assert len(held) == 12
    (shards / "train" / "train-000002.tar").unlink()
    assert places(True) < train
    assert places(False) < held


def test_a_flipped_bit_is_found(shards):
    source = opened(shards / "train")
    row = source._table[5]
    damage(shards / "train" / "train-000000.tar", int(row["offset"]) + int(row["length"]) // 2, b"\x55\xaa")
    with pytest.raises(Damaged, match=f"the picture at byte {row['offset']} does not match its checksum"):
        source.picture(5)
    assert source.place(5) == str(shards / "train" / "train-000000.tar")
    source.picture(4)
    source.picture(6)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def forged(folder: Path, entry: str, content: bytes) -> Shards:
    """Shards of one sample, whose picture is entry `entry` with `content`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        info = tarfile.TarInfo(entry)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    import zlib

    table = np.array([(0, 512, len(content), 0, zlib.crc32(content))], TABLE)
    np.save(folder / "index.npy", table)
    index = {
        "format": 1,
        "origin": "",
        "classes": ["a"],
        "rows": {"count": 1, "crc32": zlib.crc32(table.data)},
        "shards": [{"name": "train-000000.tar", "samples": 1, "bytes": (folder / "train-000000.tar").stat().st_size}],
    }
    (folder / "index.json").write_text(json.dumps(index))
    return opened(folder)


def test_pickles_and_other_formats_are_never_decoded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (entry, content) in enumerate(
        [("0.pkl", pickle.dumps(Trap())), ("0.jpg", pickle.dumps(Trap())), ("0.gif", gif())]
    ):
        source = forged(tmp_path / str(number), entry, content)
        with pytest.raises(Damaged, match="cannot be decoded"):
            source.picture(0)
    assert not (tmp_path / "trapped").exists()
    source = forged(tmp_path / "good", "0.jpg", encoded(0))
    assert source.picture(0).size == (24, 18)


def gif() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "GIF")
    return stream.getvalue()


def test_a_bad_index_is_refused_in_one_sentence(shards, tmp_path):
    folder = shards / "train"
    good, rows = json.loads((folder / "index.json").read_text()), (folder / "index.npy").read_bytes()

    def refused(reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as error:
            Index(folder)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(": let hetero-kt shards write it again.")

    for name in ("pipe:touch trapped", "../train-000000.tar", "/etc/passwd", "s3://b/x.tar", "x.pkl", "-x|y.tar"):
        shard = good["shards"][0] | {"name": name}
        (folder / "index.json").write_text(json.dumps(good | {"shards": [shard, *good["shards"][1:]]}))
        refused("which is no shard beside it")
    for text in ("{", "[]", json.dumps(good | {"format": 2}), json.dumps({"format": 1})):
        (folder / "index.json").write_text(text)
        refused("cannot be used")
    (folder / "index.json").write_text(json.dumps(good))
    (folder / "index.npy").write_bytes(rows[:-8] + bytes(8))
    refused("beside it is another one")
    np.save(folder / "index.npy", np.array([Trap()], object), allow_pickle=True)
    refused("cannot be used")
    (folder / "index.npy").unlink()
    refused("cannot be used")
    (folder / "index.npy").write_bytes(rows)
    Index(folder)


def test_remote_folders_are_refused():
    for config, data_dir in (
        (Data(name="shards", folder="pipe:cat"), ""),
        (Data(name="shards", folder="s3://bucket/set"), ""),
        (Data(name="shards", folder="set"), "hf:imagenet"),
    ):
        with pytest.raises(ValueError, match="folders of this machine: name one"):
            data.classes(config, data_dir)


# ---- real data


@pytest.mark.data
def test_tiny_imagenet_becomes_shards_and_batches(real_data, tmp_path):
    source = real_data / "tiny_imagenet30"
    if not source.is_dir():
        pytest.skip("the data folder has no tiny_imagenet30")
    cli.main(["shards", str(source), str(tmp_path / "tiny"), "--shard-size", "1MB", "--workers", "2"])
    config = Data(name="shards", folder="tiny", pipeline="timm", batch=100, workers=2, image_size=64)
    assert data.classes(config, str(tmp_path)) == 30
    train, test = (data.open_loader(config, str(tmp_path), train=part, seed=0) for part in (True, False))
    try:
        assert (train.samples, test.samples, train.steps_per_epoch) == (2400, 750, 24)
        rows = pq.read_table(source / "train.parquet", columns=["image", "label"]).to_pylist()
        content = {(train._source.content(k), int(train._source.labels[k])) for k in range(2400)}
        assert content == {(row["image"]["bytes"], row["label"]) for row in rows}
        pictures, labels = train.batch(0)
        assert pictures.shape == (100, 3, 64, 64)
        assert pictures.mean().abs() < 0.6
        assert 0.7 < pictures.std() < 1.3
        assert len(labels.unique()) > 20
        assert train.throughput()["decoded"] > 100
        labels = [y[w > 0] for _, y, w in test.eval_batches(256)]
        assert torch.bincount(torch.cat(labels)).tolist() == [25] * 30
        assert train.notices() == test.notices() == []
    finally:
        train.close()


def test_a_run_over_a_damaged_picture_ends_in_one_sentence_or_counts_it(tmp_path):
    tree, folder = tmp_path / "tree", tmp_path / "data" / "tiny_imagenet30"
    for part, first in (("train", 0), ("val", 100)):
        class_folders(tree / part, 24, first)
    cli.main(["shards", str(tree), str(folder)])
    shard = folder / "train" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[int(Index(folder / "train").table()["offset"][0]) + 20] ^= 0xFF
    shard.write_bytes(content)
    launcher = Path(__file__).resolve().parents[1] / "launchers" / "imagenet_fbt.py"
    options = ["--data.pictures.workers", "0", "--data-dir", "data", "--data.pictures.batch", "8", "--steps", "3"]
    options += ["--models.teacher.schedule.warmup", "0"]
    command = [sys.executable, str(launcher), "--variant", "tiny_teacher", *options]

    def start(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False)

    stopped = start("--data.pictures.corrupt", "stop")
    assert stopped.returncode == 2, stopped.stderr
    assert shard.name in stopped.stderr.splitlines()[-1]
    assert stopped.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in stopped.stderr
    going_on = start("--resume", "never")
    assert going_on.returncode == 0, going_on.stderr
    assert shard.name in going_on.stdout
