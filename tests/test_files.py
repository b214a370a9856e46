"""Files appear whole and on the disk, and only regular ones are read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hetero_kt import files


@pytest.fixture
def calls(monkeypatch):
    """What is synchronised and renamed, in order, by the files' names."""
    found: list[tuple[str, str]] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real["fsync"](descriptor)

    def replace(old: Path, new: Path) -> None:
        found.append(("replace", Path(new).name))
        real["replace"](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return found


def test_content_is_on_the_disk_before_its_name_and_the_name_after_it(tmp_path, calls):
    files.write_whole(tmp_path / "result.json", "{}")
    assert calls == [("fsync", "result.json.part"), ("replace", "result.json"), ("fsync", tmp_path.name)]
    assert (tmp_path / "result.json").read_text() == "{}"
    assert os.listdir(tmp_path) == ["result.json"]


def test_every_file_of_a_folder_is_on_the_disk_before_its_name(tmp_path, calls):
    (tmp_path / "part" / "deep").mkdir(parents=True)
    (tmp_path / "part" / "deep" / "a").write_text("a")
    (tmp_path / "part" / "b").write_text("b")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "of an older run").touch()
    files.publish_folder(tmp_path / "part", tmp_path / "whole")
    before = {name for what, name in calls[: calls.index(("replace", "whole"))] if what == "fsync"}
    assert before == {"a", "b", "deep", "part"}
    assert calls[-1] == ("fsync", tmp_path.name)
    assert sorted(os.listdir(tmp_path / "whole")) == ["b", "deep"]
    assert os.listdir(tmp_path) == ["whole"]


@pytest.mark.parametrize("umask", [0o002, 0o027, 0o077])
def test_modes_follow_the_umask_whatever_the_writer_does(tmp_path, umask):
    def save(path: Path) -> None:
        save_file({"a": torch.zeros(3)}, path)
        path.chmod(0o600)

    before = os.umask(umask)
    try:
        files.write_whole(tmp_path / "a.safetensors", save)
        (tmp_path / "part").mkdir()
        save(tmp_path / "part" / "a.safetensors")
        files.publish_folder(tmp_path / "part", tmp_path / "folder")
    finally:
        os.umask(before)
    for file in (tmp_path / "a.safetensors", tmp_path / "folder" / "a.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("old")

    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_whole(file, fails)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_a_link_in_the_unfinished_files_place_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "outside").write_text("precious")
    (tmp_path / "run" / "recipe.yaml.part").symlink_to(tmp_path / "outside")
    files.write_whole(tmp_path / "run" / "recipe.yaml", "name: a")
    assert (tmp_path / "outside").read_text() == "precious"
    assert not (tmp_path / "run" / "recipe.yaml").is_symlink()


def test_only_regular_files_within_a_bound_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    assert files.read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(OSError, match=r"5 bytes, more than the 4"):
        files.read_regular(tmp_path / "file", 4)
    for name in ("fifo", "device", ""):
        with pytest.raises(OSError, match="it is no regular file"):
            files.read_regular(tmp_path / name, 5)
    with pytest.raises(OSError, match="Too many levels"):
        files.read_regular(tmp_path / "loop", 5)
