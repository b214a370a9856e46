"""Damaged and hostile checkpoints, data.json, notes of starts and files of weights: a sentence, or a sound result."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import damage
import pytest
import tiny
import torch
from damage import RAW_JSON, as_json, damaged, hostile, only_a_sentence, untouched
from hypothesis import strategies as st
from safetensors.torch import save_file

from hetero_kt import folder as folders
from hetero_kt import intent, models
from hetero_kt.distributed import layout
from hetero_kt.distributed.layout import Entry
from hetero_kt.distributed.saved import Saved, SavedModel
from hetero_kt.models import xvlm_weights

PLACE = Path(tempfile.mkdtemp(prefix="fuzz"))
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _cleared() -> Any:
    yield
    shutil.rmtree(PLACE, ignore_errors=True)


def made() -> Path:
    """A checkpoint of two ranks, each with half of a weight, a moment and a tree."""
    place = PLACE / "whole" / "4"
    place.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for rank in range(2):
        weight, moment = (torch.randn(3, generator=GENERATOR) for _ in range(2))
        entries = [
            Entry(weight, "net", "weight", "fc.weight", (2, 3), 3 * rank, 3 * rank + 3),
            Entry(moment, "net", "exp_avg", "fc.weight", (2, 3), 3 * rank, 3 * rank + 3),
        ]
        own = {"models": {"net": {"buffers": {"mean": torch.ones(2)}, "averages": {}}}, "random": {"python": [3, [1]]}}
        trees = {"own": own, **({"shared": {"method": {"step": 4}}} if not rank else {})}
        entries += [entry for kind, tree in trees.items() for entry in layout.leaves(tree, kind)]
        about = {"steps": 4, "samples": 8, "skipped": 0, "rates": [0.1], "updates": 0, "numbers": {}}
        described = {kind: layout.described(tree, kind) for kind, tree in trees.items()}
        files |= layout.write_rank(place, rank, entries, {"models": {"net": about}, **described})
    layout.write_done(place, 2, files)
    return place


WHOLE = made()
CONTENT = {path.name: path.read_bytes() for path in WHOLE.iterdir()}


def read(path: Path) -> dict[str, Any]:
    """All that a resume and an export read."""
    layout.verify(path)
    with Saved(path) as saved:
        model = SavedModel(saved, "net")
        found = {(kind, name): model.whole(kind, name) for _, kind, name in saved.wholes if _ == "net"}
        return {"tensors": found, "trees": [saved.tree("own"), saved.tree("shared")], "buffers": saved.buffers()}


SOUND = read(WHOLE)


def forged(name: str, content: bytes, agrees: bool) -> Path:
    """A copy with another file; with `agrees`, DONE has the checksum of that one, as a forger's has."""
    place = PLACE / "forged" / "4"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for other, own in CONTENT.items():
        (place / other).write_bytes(own)
    (place / name).write_bytes(content)
    if agrees and name != "DONE":
        done = json.loads(CONTENT["DONE"])
        about = {"bytes": len(content), "crc32": layout.checksum(place / name)}
        done["files"][name] = about
        (place / "DONE").write_text(json.dumps(done))
    return place


@damage.fuzz(
    100,
    name=st.sampled_from(sorted(CONTENT)),
    agrees=st.booleans(),
    data=st.data(),
)
def test_a_damaged_checkpoint_is_a_sentence_or_the_checkpoint(name: str, agrees: bool, data: Any) -> None:
    content = data.draw(damaged(CONTENT[name]))
    place = forged(name, content, agrees)
    with untouched(place.parent):
        found = only_a_sentence(lambda: read(place))
    if isinstance(found, dict) and not agrees and name != "DONE":
        tiny.assert_equal(found, SOUND)


@damage.fuzz(80, name=st.sampled_from(("DONE", "rank0.json", "rank1.json")), data=st.data())
def test_a_hostile_index_is_a_sentence(name: str, data: Any) -> None:
    content = as_json(data.draw(hostile(json.loads(CONTENT[name]), RAW_JSON)))
    place = forged(name, content, agrees=True)
    with untouched(place.parent):
        only_a_sentence(lambda: read(place))
        only_a_sentence(lambda: layout.complete(place.parent))
        only_a_sentence(lambda: layout.check_folder(place.parent))


@pytest.mark.parametrize("kind", [kind for kind in damage.SPECIAL if kind != "huge"])
@pytest.mark.parametrize("name", ["DONE", "rank0.json", "rank0.safetensors"])
def test_what_lies_in_a_files_place_is_a_sentence(name: str, kind: str) -> None:
    place = forged("DONE", CONTENT["DONE"], agrees=False)
    damage.make_special(kind, place / name)
    assert isinstance(only_a_sentence(lambda: read(place)), ValueError)


SEEN = {"data": {"all": [{"samples": 8}, {"samples": 4}]}, "zero": {"net": 1}, "teachers": {"t": 5}}


@damage.fuzz(60, tree=hostile(SEEN, RAW_JSON))
def test_a_hostile_data_json_is_a_sentence(tree: Any) -> None:
    recipe = tiny.recipe(PLACE / "recipe")
    (PLACE / "data.json").write_bytes(as_json(tree))
    only_a_sentence(lambda: folders.check_same_data(recipe, SEEN, PLACE, "auto"))


@damage.fuzz(60, tree=hostile({"resume": "never", "opened": False}, RAW_JSON))
def test_a_hostile_note_of_a_start_is_a_sentence(tree: Any) -> None:
    (PLACE / intent.NAME).write_bytes(as_json(tree))
    only_a_sentence(lambda: folders.asked(PLACE))


def weights() -> dict[str, bytes]:
    state = {"fc.weight": torch.ones(4, 3), "fc.bias": torch.zeros(4)}
    save_file(state, PLACE / "weights.safetensors")
    torch.save({"model": state}, PLACE / "weights.pth")
    torch.save(state, PLACE / "old.pth", _use_new_zipfile_serialization=False)
    return {
        path.name: path.read_bytes() for path in (PLACE / n for n in ("weights.safetensors", "weights.pth", "old.pth"))
    }


WEIGHTS = weights()


@damage.fuzz(120, name=st.sampled_from(sorted(WEIGHTS)), data=st.data())
def test_damaged_weights_are_a_sentence_or_finite_tensors(name: str, data: Any) -> None:
    file = PLACE / f"damaged-{name}"
    file.write_bytes(data.draw(damaged(WEIGHTS[name])))
    found = only_a_sentence(lambda: xvlm_weights.read(file, f"init names {file}"))
    if isinstance(found, dict):
        assert all(bool(tensor.isfinite().all()) for tensor in found.values())


@damage.fuzz(60, data=st.data())
def test_damaged_weights_of_a_model_are_a_sentence(data: Any) -> None:
    net = torch.nn.Linear(3, 4)
    save_file(net.state_dict(), PLACE / "net.safetensors")
    file = PLACE / "damaged.safetensors"
    file.write_bytes(data.draw(damaged((PLACE / "net.safetensors").read_bytes())))
    only_a_sentence(lambda: models._load(net, "net", str(file)))
    assert all(bool(parameter.isfinite().all()) for parameter in net.parameters())
