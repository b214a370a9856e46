"""JSON and YAML of strangers: a document, or one sentence on what is wrong with it."""

from __future__ import annotations

import io
import json
from typing import Any

import damage
import pytest
import yaml

from hetero_kt import config, documents
from hetero_kt.messages import printable, shown


@pytest.mark.parametrize("raw", damage.RAW_JSON)
def test_json_is_read_or_refused_in_a_sentence(raw):
    damage.only_a_sentence(lambda: documents.parse_json(b'{"a": %s}' % raw.encode()))


@pytest.mark.parametrize("raw", damage.RAW_YAML)
def test_yaml_is_read_or_refused_in_a_sentence(raw):
    damage.only_a_sentence(lambda: documents.parse_yaml(f"a: {raw}\n"))


def test_what_an_alias_stands_for_is_never_built():
    with pytest.raises(ValueError, match="anchors or aliases"):
        documents.parse_yaml(damage.bomb().decode())


@pytest.mark.parametrize("tag", ["!!bool foo", "!!python/object/apply:os.system ['touch executed']", "!x y", "! y"])
def test_no_tag_is_looked_at(tag):
    with pytest.raises(ValueError, match="tags are not read"):
        documents.parse_yaml(f"a: {tag}")


@pytest.mark.parametrize("depth", [documents.DEPTH, documents.DEPTH + 1, 50_000])
def test_nesting_has_a_bound(depth):
    for parse in (documents.parse_json, documents.parse_yaml):
        if depth <= documents.DEPTH:
            assert parse("[" * depth + "]" * depth) is not None
        else:
            with pytest.raises(ValueError, match="nested deeper than 50"):
                parse("[" * depth + "]" * depth)


@pytest.mark.parametrize("kind", damage.SPECIAL)
def test_what_is_no_file_is_neither_waited_on_nor_read(tmp_path, kind):
    path = damage.make_special(kind, tmp_path / "a")
    for read in (documents.read_json, documents.read_yaml):
        found = damage.only_a_sentence(lambda read=read: read(path), errors=(ValueError, FileNotFoundError))
        assert (type(found) is FileNotFoundError) == (kind == "dangling")
        if kind not in ("dangling", "empty"):
            assert isinstance(found, ValueError)


def test_what_is_not_utf_8_is_said(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": "\xff"}')
    for read in (documents.read_json, documents.read_yaml):
        with pytest.raises(ValueError, match="it is not UTF-8"):
            read(tmp_path / "a")


def test_lines_come_one_by_one_and_damaged_ones_without_an_object():
    long = b'{"a": "' + b"x" * documents.LINE + b'"}\n'
    content = b'{"a": 1}\n[1]\n{"a"\n' + long + b'{"a": 2}\n{"a": 3'
    found = list(documents.json_lines(io.BytesIO(content)))
    assert b"".join(line for line, _ in found) == content
    assert [entry for _, entry in found if entry] == [{"a": 1}, {"a": 2}]
    assert max(len(line) for line, _ in found) <= documents.LINE


@pytest.mark.parametrize("value", [True, "1", 1.0, None, -1, 2**53 + 1, 10**400, [1]])
def test_what_is_no_whole_number_is_said(value):
    found = damage.only_a_sentence(lambda: documents.whole(value, "steps"))
    assert str(found).startswith("steps is ")


@pytest.mark.parametrize("name", damage.NAMES)
def test_what_is_printed_moves_no_cursor(name):
    assert printable(name).isprintable()
    printable(name).encode()
    assert shown(name).isprintable()


def test_what_can_be_printed_stays_as_it_is():
    for text in ("Größe 5 %", "日本語　x", "é", "a b", "😀"):
        assert printable(text) == text


# --- recipes ---


def _recipe() -> config.Recipe:
    return config.Recipe(
        name="toy",
        models={"cnn": config.Model("cifar:resnet_tiny", data="pictures")},
        data={"pictures": config.Data("digits")},
        method=config.MergeNet({}, "none"),
        steps=20,
    )


TREE: dict[str, Any] = yaml.safe_load(config.to_yaml(_recipe()))


@damage.fuzz(40, tree=damage.hostile(TREE, damage.RAW_YAML))
def test_a_hostile_recipe_is_a_recipe_or_a_sentence(tree: Any):
    text = damage.as_yaml(tree).decode("utf-8", "replace")
    found = damage.only_a_sentence(lambda: config.from_yaml(text))
    assert isinstance(found, config.Recipe | ValueError)


def test_a_recipe_that_is_huge_is_refused_by_its_size(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"#" * (documents.MOST_YAML + 1))
    with pytest.raises(ValueError, match="more than the 131,072 that are read"):
        config.read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("value", ["1" * 400, "fast", "2001-01-01", "[1]", "null"])
def test_a_rate_that_is_no_number_is_refused(value):
    text = config.to_yaml(_recipe()).replace("lr: 0.1", f"lr: {value}")
    assert text != config.to_yaml(_recipe())
    with pytest.raises(ValueError, match=r"models\.cnn\.optim\.lr is"):
        config.from_yaml(text)


def test_what_json_says_twice_or_of_nan_is_still_json():
    assert documents.parse_json('{"a": 1, "a": 2}') == {"a": 2}
    assert json.loads("NaN") != documents.parse_json("NaN")
