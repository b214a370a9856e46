"""The generators of damage give what they promise, and what may come out of a reader is judged rightly."""

from __future__ import annotations

import json
import os
import stat
import time
from typing import Any

import damage
import pytest
import yaml


@pytest.mark.parametrize(
    "error", [KeyError("a"), RecursionError("deep"), ValueError("two\nlines"), ValueError("\x1b[2J"), ValueError("")]
)
def test_anything_but_a_sentence_fails(error):
    def call() -> None:
        raise error

    with pytest.raises((AssertionError, KeyError, RecursionError)):
        damage.only_a_sentence(call)


def test_a_librarys_own_error_is_no_sentence():
    with pytest.raises(AssertionError, match="JSONDecodeError"):
        damage.only_a_sentence(lambda: json.loads("{"))
    with pytest.raises(AssertionError, match="UnicodeDecodeError"):
        damage.only_a_sentence(lambda: b"\xff".decode())


def test_a_sentence_and_a_result_come_back():
    assert damage.only_a_sentence(lambda: 3) == 3

    def refuses() -> None:
        raise ValueError("recipe.yaml is empty: print one with --print.")

    assert isinstance(damage.only_a_sentence(refuses), ValueError)


def test_what_takes_too_long_fails(monkeypatch):
    monkeypatch.setattr(damage, "SECONDS", 0.05)
    with pytest.raises(AssertionError, match="took more than"):
        damage.only_a_sentence(lambda: time.sleep(5))


def test_a_write_in_the_folder_is_seen(tmp_path):
    (tmp_path / "a").write_text("a")
    with damage.untouched(tmp_path):
        (tmp_path / "a").read_text()
    with pytest.raises(AssertionError), damage.untouched(tmp_path):
        (tmp_path / "a").write_text("b")


VALID = {"steps": 10, "metrics": {"cnn": {"top1": 50.0}}, "names": ["a", "b"]}


@damage.fuzz(25, tree=damage.hostile(VALID))
def test_hostile_documents_can_be_written(tree: Any):
    assert isinstance(damage.as_json(tree), bytes)
    assert isinstance(damage.as_yaml(tree), bytes)


@damage.fuzz(20, data=damage.damaged(b"a valid file", b"another one"))
def test_damaged_files_are_bytes(data: bytes):
    assert isinstance(data, bytes)


def test_an_undamaged_document_is_written_as_it_is():
    assert json.loads(damage.as_json(VALID)) == VALID
    assert yaml.safe_load(damage.as_yaml(VALID)) == VALID


@pytest.mark.parametrize("kind", damage.SPECIAL)
def test_special_files_are_made(tmp_path, kind):
    path = damage.make_special(kind, tmp_path / "file")
    assert stat.S_IFMT(os.lstat(path).st_mode)
