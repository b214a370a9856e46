"""What shards are written from is known by its content; real folders count once; only regular files are read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_shards import CLASSES, complaint, digest, encoded, opened

from hetero_kt import files
from hetero_kt.data import gallery, sharding
from hetero_kt.data.shards import Index


def sized(number: int) -> bytes:
    """What begins as a JPEG does, of one size for all numbers."""
    return b"\xff\xd8\xff" + number.to_bytes(2, "little") * 300


def class_folders(folder: Path, numbers: range) -> None:
    for number in numbers:
        place = folder / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02d}.jpg").write_bytes(sized(number))


def parquet(file: Path, numbers: range, labels: list[int]) -> None:
    rows = [{"bytes": sized(number)} for number in numbers]
    pq.write_table(pa.table({"image": rows, "label": labels}), file, compression="none")


def write(source: Path, out: Path) -> int:
    """How many shards were kept."""
    return sum(part.kept for part in sharding.write(str(source), str(out), shard_size="4", quiet=True))


def begin(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, stops: int = 3) -> None:
    """A run that is killed when it has written so many shards."""
    real, calls = sharding._write_shard, list[str]()

    def write_shard(job):
        if len(calls) == stops:
            raise KeyboardInterrupt
        calls.append(job.name)
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "_write_shard", write_shard)
        with pytest.raises(KeyboardInterrupt):
            write(source, out)


def unseen(file: Path, content: bytes) -> None:
    """Change a file so that neither its size nor its time tells."""
    before = file.stat()
    assert len(content) == before.st_size
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("kind", ["folders", "parquet: pictures", "parquet: labels"])
def test_an_unfinished_run_keeps_nothing_of_an_input_that_has_changed_since(kind, tmp_path, monkeypatch):
    labels = [number % 3 for number in range(24)]
    source = tmp_path / ("set" if kind == "folders" else "a.parquet")

    def change() -> None:
        if kind == "folders":
            for number in range(24):
                unseen(source / CLASSES[number % 3] / f"{number:02d}.jpg", sized(number + 50))
            return
        before = source.stat()
        if kind == "parquet: pictures":
            parquet(source, range(50, 74), labels)
        else:
            parquet(source, range(24), [(label + 1) % 3 for label in labels])
        assert source.stat().st_size == before.st_size
        os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))

    if kind == "folders":
        class_folders(source, range(24))
    else:
        parquet(source, range(24), labels)
    begin(source, tmp_path / "out", monkeypatch)
    change()
    assert write(source, tmp_path / "out") == 0
    write(source, tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_an_unfinished_run_keeps_the_shards_whose_pictures_are_the_same(tmp_path, monkeypatch):
    class_folders(tmp_path / "set", range(24))
    begin(tmp_path / "set", tmp_path / "out", monkeypatch)
    unseen(tmp_path / "set" / "ant" / "00.jpg", sized(99))
    assert write(tmp_path / "set", tmp_path / "out") in (2, 3), "one picture lies in one shard"
    write(tmp_path / "set", tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_a_finished_folder_of_other_content_is_refused(tmp_path):
    class_folders(tmp_path / "set", range(12))
    write(tmp_path / "set", tmp_path / "out")
    before = digest(tmp_path / "out")
    assert write(tmp_path / "set", tmp_path / "out") == 3
    unseen(tmp_path / "set" / "bee" / "01.jpg", sized(99))
    with pytest.raises(ValueError, match="holds other pictures or labels than the input does now: name another folder"):
        write(tmp_path / "set", tmp_path / "out")
    assert digest(tmp_path / "out") == before


@pytest.mark.parametrize("origin", [b"", b"\0" * 64, b"0123"])
def test_a_torn_note_of_the_origin_does_not_disown_finished_shards(origin, tmp_path, monkeypatch):
    class_folders(tmp_path / "set", range(24))
    begin(tmp_path / "set", tmp_path / "out", monkeypatch)
    (tmp_path / "out" / "train" / ".unfinished" / "origin").write_bytes(origin)
    assert write(tmp_path / "set", tmp_path / "out") == 3


def test_the_origin_is_written_in_one_go(tmp_path, monkeypatch):
    class_folders(tmp_path / "set", range(24))
    begin(tmp_path / "set", tmp_path / "out", monkeypatch)
    real = files.write_whole

    def killed(path, content, part=None):
        if path.name == "origin":
            path.with_name("origin.part").write_bytes(b"")
            raise KeyboardInterrupt
        real(path, content, part)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "set", tmp_path / "out")
    assert write(tmp_path / "set", tmp_path / "out") == 3


@pytest.mark.parametrize("harm", ["json", "npy", "zeros", "fifo", "deep"])
def test_a_damaged_record_is_not_believed(harm, tmp_path, monkeypatch):
    class_folders(tmp_path / "set", range(24))
    begin(tmp_path / "set", tmp_path / "out", monkeypatch)
    record = sorted((tmp_path / "out" / "train" / ".unfinished").glob("*.json"))[0]
    rows = record.with_suffix(".npy")
    if harm == "json":
        record.write_text("{")
    elif harm == "deep":
        record.write_text("[" * 100_000)
    elif harm == "npy":
        rows.write_bytes(rows.read_bytes()[:-3])
    elif harm == "zeros":
        rows.write_bytes(rows.read_bytes()[:-24] + bytes(24))
    else:
        rows.unlink()
        os.mkfifo(rows)
    assert write(tmp_path / "set", tmp_path / "out") == 2
    write(tmp_path / "set", tmp_path / "fresh")
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_everything_that_a_resume_relies_on_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    class_folders(tmp_path / "set", range(8))
    synchronised: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synchronised.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace, renamed = os.replace, []

    def replaced(old, new):
        assert str(old) in synchronised, f"{new} has a name before it has content"
        renamed.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path / "set", tmp_path / "out")
    assert renamed[0] == "origin"
    assert renamed[-2:] == ["index.npy", "index.json"]
    assert {"train-000000.tar", "train-000000.json", "train-000000.npy"} <= set(renamed)


# --- names ---


def test_names_that_differ_have_keys_that_differ(tmp_path):
    import webdataset

    names = ["a.b.png", "a_b.png", "a_b-1.png", "a.jpg", "a.png", "b.c.d.png"]
    (tmp_path / "flat").mkdir()
    for number, name in enumerate(names):
        (tmp_path / "flat" / name).write_bytes(encoded(number))
    sharding.write_plain(str(tmp_path / "flat"), str(tmp_path / "out"), quiet=True)
    assert sorted(Index(tmp_path / "out").names()) == sorted(names)
    (shard,) = (tmp_path / "out").glob("*.tar")
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)]
    assert len(set(keys)) == len(names), keys
    assert {"b_c_d", "a_b-1"} <= set(keys), "a name that collides with none keeps its key"


# --- links and what is no file ---


def pictures(out: Path) -> int:
    return len(opened(out / "train").rows)


def test_links_to_folders_above_do_not_multiply_the_set(tmp_path):
    class_folders(tmp_path / "set" / "train", range(12))
    class_folders(tmp_path / "set" / "val", range(12, 15))
    (tmp_path / "set" / "train" / "ant" / "up").symlink_to("..")
    (tmp_path / "set" / "train" / "bee" / "all").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "train" / "cat" / "outside").symlink_to(tmp_path)
    (tmp_path / "set" / "train" / "cat" / "self").symlink_to(".")
    (tmp_path / "set" / "train" / "loop").symlink_to(".")
    write(tmp_path / "set", tmp_path / "out")
    assert pictures(tmp_path / "out") == 12
    assert Index(tmp_path / "out" / "train").classes == list(CLASSES)


def test_a_folder_that_two_links_lead_to_counts_once(tmp_path):
    class_folders(tmp_path / "set", range(12))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "far.jpg").write_bytes(encoded(50))
    for name in ("one", "two"):
        (tmp_path / "set" / "ant" / name).symlink_to(tmp_path / "disk")
    write(tmp_path / "set", tmp_path / "out")
    assert pictures(tmp_path / "out") == 13
    (tmp_path / "set" / "bee" / "three").symlink_to(tmp_path / "disk")
    said = complaint(tmp_path / "set", tmp_path / "again")
    assert "three leads to a folder of class ant too: remove one of the links" in said


def dead(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def loop(path: Path) -> None:
    path.symlink_to(path.with_name("other" + path.name))
    path.with_name("other" + path.name).symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def large(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(4 * 10**12)


@pytest.mark.parametrize("where", ["ant/x.jpg", "ant/deep", "x"])
@pytest.mark.parametrize("kind", [dead, loop])
def test_links_that_lead_nowhere_are_named(where, kind, tmp_path):
    class_folders(tmp_path / "set", range(3))
    kind(tmp_path / "set" / where)
    said = complaint(tmp_path / "set", tmp_path / "out")
    assert f"{where.rpartition('/')[2]} cannot be read (" in said


@pytest.mark.parametrize("kind", [os.mkfifo, device, large])
def test_what_is_no_picture_file_is_named_and_not_waited_on(kind, tmp_path):
    class_folders(tmp_path / "set", range(3))
    kind(tmp_path / "set" / "ant" / "x.jpg")
    said = complaint(tmp_path / "set", tmp_path / "out")
    assert "x.jpg is no regular file" in said or "x.jpg has 4,000,000,000,000 bytes, more than" in said
    kind(tmp_path / "a.parquet")
    assert "a.parquet cannot be read (" in complaint(tmp_path / "a.parquet", tmp_path / "out")
    (tmp_path / "flat").mkdir()
    kind(tmp_path / "flat" / "x.jpg")
    with pytest.raises(ValueError, match=r"x\.jpg (is no regular file|has 4,000)"):
        sharding.write_plain(str(tmp_path / "flat"), str(tmp_path / "out"), quiet=True)


@pytest.mark.parametrize("kind", [os.mkfifo, device, large])
def test_what_is_no_shard_or_index_is_not_waited_on(kind, tmp_path):
    class_folders(tmp_path / "set", range(12))
    write(tmp_path / "set", tmp_path / "out")
    folder = tmp_path / "out" / "train"
    for name in ("train-000001.tar", "index.npy", "index.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        kind(folder / name)
        if name.endswith(".tar"):
            shards = opened(folder)
            assert len(shards.rows) == 8
            assert "its 4 samples are left out" in shards.notices()[0]
        else:
            with pytest.raises(ValueError, match="let hetero-kt shards write"):
                Index(folder)
        (folder / name).unlink()
        (folder / name).write_bytes(content)
    kind(tmp_path / "x.jpg")
    found = gallery.Folders(tmp_path, ["x.jpg"])
    with pytest.raises(gallery.Damaged, match=r"x\.jpg cannot be read"):
        found.picture("x.jpg")


def test_rows_of_gigabytes_are_refused(tmp_path):
    class_folders(tmp_path / "set", range(4))
    write(tmp_path / "set", tmp_path / "out")
    folder, name = tmp_path / "out" / "train", "train-000000.tar"
    import json
    import zlib

    index = json.loads((folder / "index.json").read_text())
    table = np.array(Index(folder).table())
    os.truncate(folder / name, 4 * 10**12)
    index["shards"][0]["bytes"] = 4 * 10**12
    for offset, length in ((0, 2**32 - 1), (2**64 - 100, 200)):
        table["offset"], table["length"] = offset, length
        np.save(folder / "index.npy", table)
        index["rows"]["crc32"] = zlib.crc32(table.data)
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"has a picture of more than|points behind a shard's end"):
            Index(folder)
