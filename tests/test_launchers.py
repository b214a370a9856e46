"""Every variant of every launcher: a recipe that passes the checks, names weights that exist, and shrinks."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from hetero_kt import checks, options
from hetero_kt.config import Distill, Recipe
from hetero_kt.models import bert, build, modality_values, xvlm
from hetero_kt.nn.reencode import find_weight

LAUNCHERS = sorted((Path(__file__).parents[1] / "launchers").glob("[!_]*.py"))


@cache
def load(launcher: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(launcher.stem, launcher)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HUB = {"hf:bert-base-uncased": "bert:12x768", "hf:distilbert-base-uncased": "distilbert:6x768"}
"""Models of the hub, and fresh ones of the same shapes."""


SIDES = {"xvlm:base": 384, "xvlm:small": 384}


@cache
def model(name: str, data: str) -> nn.Module:
    if data in checks.PAIRS:
        with torch.device("meta"):
            return xvlm.build(name, xvlm.TASKS[data], vocabulary=100, image_size=SIDES.get(name, 64))[0]
    if data in checks.TEXTS:
        return bert.build(HUB.get(name, name), bert.TASKS[data], vocabulary=100)[0]
    with torch.device("meta"):  # shapes are enough
        return build(name, 100 if data in ("cifar100", "generated") else 10)


def shapes(recipe: Recipe, site: str) -> tuple[int, int]:
    name, weight = checks.split_site(site)
    chosen = recipe.models[name]
    return find_weight(model(chosen.name, recipe.data[chosen.data].name), weight).shape


CASES = [
    pytest.param(launcher, variant, id=f"{launcher.stem}-{variant}")
    for launcher in LAUNCHERS
    for variant in load(launcher).VARIANTS
]


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(("launcher", "variant"), CASES)
def test_variant(launcher: Path, variant: str, debug: bool) -> None:
    variants: Mapping[str, options.Variants] = load(launcher).VARIANTS
    arguments = ["--variant", variant, *(["--debug"] if debug else [])]
    recipe, chosen = options.resolve(variants, arguments)  # type: ignore[arg-type]
    assert chosen.variant == variant
    if isinstance(recipe.method, Distill):
        named = {teacher.init.removeprefix("run:") for teacher in recipe.method.teachers.values()}
        made = {make().name for make in load(launcher).VARIANTS.values()}
        assert debug or named <= {"", *made}, "every teacher that a recipe names as a run is a variant too"
        return
    for transfer in recipe.method.transfers.values():
        source, target = shapes(recipe, transfer.source), shapes(recipe, transfer.target)
        if transfer.mode != "full":
            assert transfer.rank <= min(target)
            assert (transfer.source_rank or transfer.rank) <= min(source)
        if transfer.adapter.kind == "aligned":
            assert source[0] == target[0]


def test_gpu_is_default_in_eight_epochs_of_autocast() -> None:
    module = load(next(launcher for launcher in LAUNCHERS if launcher.stem == "cifar_mergenet"))
    short, whole = module.VARIANTS["gpu"](), module.VARIANTS["default"]()
    assert short.steps == 8 * module.EPOCH
    assert {model.precision for model in short.models.values()} == {"autocast"}
    assert all(model.schedule.name == "cosine" and model.schedule.warmup for model in short.models.values())
    assert short.method == whole.method
    assert {t.target.partition(":")[0] for t in short.method.transfers.values()} == set(short.models), "mutual"


def test_run_folders_of_variants_are_apart() -> None:
    names = [make().name for launcher in LAUNCHERS for make in load(launcher).VARIANTS.values()]
    assert len(set(names)) == len(names)


def test_an_epoch_is_as_many_steps_as_the_loader_makes_of_it() -> None:
    """So that the last evaluation is the end."""
    for launcher in LAUNCHERS:
        for make in load(launcher).VARIANTS.values():
            recipe = make()
            if any(data.name == "cifar100" and not data.per_class for data in recipe.data.values()):
                (batch,) = {data.batch for data in recipe.data.values() if data.name == "cifar100"}
                epochs = {getattr(load(launcher), "EPOCH", 0), getattr(load(launcher), "TOKENS_EPOCH", 0)}
                assert batch == 64 or 50_000 // batch in epochs
                assert recipe.steps % recipe.eval_every == 0


@pytest.mark.parametrize(
    ("variant", "shape"),
    [("irb4", (32, 144)), ("irb8", (64, 384)), ("irb12", (96, 576)), ("irb16", (160, 960))],
)
def test_self_transfer_writes_the_blocks_of_table_5(variant: str, shape: tuple[int, int]) -> None:
    launcher = next(launcher for launcher in LAUNCHERS if launcher.stem == "self_transfer")
    recipe = load(launcher).VARIANTS[variant]()
    (transfer,) = recipe.method.transfers.values()
    assert shapes(recipe, transfer.target) == shape
    assert shapes(recipe, transfer.source) == (100, 1280)


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.stem)
def test_docstring_has_what_a_reader_needs(launcher: Path) -> None:
    text = load(launcher).__doc__
    for needed in ("Table", "deepspeed launchers/", "Hardware:", "Expected:"):
        assert needed in text


@pytest.mark.parametrize("name", xvlm.known())
def test_the_values_of_both_modalities_are_in_the_model(name: str) -> None:
    """Of the last vision layer, and of the last layer without cross-attention."""
    built = model(name, "vqa")
    vision, text = modality_values(name)
    assert find_weight(built, vision).shape[0] == find_weight(built, vision).shape[1]
    names = [key for key, _ in built.named_parameters()]
    layers = [int(key.split(".")[3]) for key in names if "text_encoder.encoder.layer" in key and "cross" in key]
    assert f"layer.{min(layers) - 1}." in text
    blocks = [key for key in names if key.startswith("vision_encoder.") and key.endswith("attn.qkv.weight")]
    assert blocks[-1] == vision.removesuffix("[v]")
