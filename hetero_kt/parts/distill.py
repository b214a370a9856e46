"""A recipe's student, its teachers, and the objective between them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import timm
import torch
from torch import nn

from hetero_kt import data, models
from hetero_kt.checks import zero_block
from hetero_kt.compiler import compile_chosen
from hetero_kt.config import Data, Distill, Recipe
from hetero_kt.distributed.launch import Ranks
from hetero_kt.methods import Method, distill, objectives
from hetero_kt.methods.fbt import FBT
from hetero_kt.models.stored import Store, Stored
from hetero_kt.models.stored import fill as fill_store
from hetero_kt.models.teacher import RANDOM, Frozen, build_teacher, weights_of
from hetero_kt.nn.stages import Stages, expose, split
from hetero_kt.parts.models import check_precision, learner_of, parameters, seed_by_name
from hetero_kt.parts.norms import check_rows
from hetero_kt.parts.prepared import Prepared


def prepare_distill(
    recipe: Recipe, method: Distill, modules: Mapping[str, nn.Module], train: Mapping[str, Any], ranks: Ranks
) -> Prepared:
    """The student cut into stages, its teachers frozen, and the objective between them."""
    ((name, module),) = modules.items()
    model = recipe.models[name]
    pictures = recipe.data[model.data]
    try:
        stages = expose(module, pictures.image_size)
    except ValueError as error:
        raise ValueError(f"--models.{name}.name {model.name}: {error}.") from error
    stages.checkpointing = model.checkpointing
    teachers = {}
    loader = train[model.data]
    if method.taught:
        for teacher, config in method.teachers.items():
            teachers[teacher] = build_teacher(
                config,
                f"--method.teachers.{teacher}",
                classes=loader.classes,
                image_size=pictures.image_size,
                mean=loader.mean,
                std=loader.std,
                output_dir=recipe.output_dir,
                zero=zero_block(config.zero) if config.zero else None,
                device=ranks.device,
                autocast=model.precision != "fp32",
            )
    stored = {
        key: Stored(teacher, store_of(recipe, key, teacher, loader), loader)
        for key, teacher in teachers.items()
        if method.teachers[key].logits == "stored"
    }
    for one in stored.values():
        one.store.check(ranks.rank, ranks.world)
    seed_by_name(recipe, method.objective)
    objective = build_objective(
        method,
        stages,
        teachers | stored,
        loader.classes,
        steps=recipe.budget(name),
        seed=recipe.seed,
        drawn=objectives.Drawn(loader.order, loader.labels, recipe.seed),
        device=ranks.device,
    )
    aside = objective.aside.to(ranks.device) if objective.aside is not None else None
    if aside is not None:
        check_precision(f"--models.{name}.precision", model.precision, aside, f"{method.objective}'s {objective.name}")
        check_rows(recipe, {}, ranks.world, aside)

    def fill() -> None:
        rows = model.micro_batch or pictures.batch // ranks.world
        dtype = next(module.parameters()).dtype if model.precision != "bf16" else torch.bfloat16
        for key, one in stored.items():
            one.live.start()
            started = time.perf_counter()
            shards = fill_store(one.store, one.live, loader, ranks, rows, dtype)
            if ranks.first and shards:
                took = time.perf_counter() - started
                print(f"{key}: {shards} shards of logits computed in {took:.0f} s", flush=True)

    def start() -> Method:
        learners = {name: learner_of(recipe, name, module, ranks)}
        if aside is not None:
            learners[objective.name] = learner_of(recipe, name, aside, ranks, kept=False)
        for teacher in teachers.values():
            teacher.start()
        compile_chosen({**modules, **{name: teacher.module for name, teacher in teachers.items()}}, recipe.compile)
        return distill.Distillation(
            learners,
            objective,
            label_smoothing=model.label_smoothing,
            label_weight=method.label_weight,
            stored=list(stored.values()),
        )

    added = {objective.name: parameters(aside)} if aside is not None else {}
    return Prepared(added, teachers, start, fill)


def store_of(recipe: Recipe, name: str, teacher: Frozen, loader: Any) -> Store:
    """Where the logits of the teacher `name` are kept, and what they depend on."""
    assert isinstance(recipe.method, Distill)
    ((_, model),) = recipe.models.items()
    pictures, config = recipe.data[model.data], recipe.method.teachers[name]
    transform: Any = list(pictures.augment) if pictures.pipeline == "fast" else dataclasses.asdict(pictures.transform)
    about = {
        "teacher": config.name,
        "weights": teacher.checksum,
        "teacher sees": [teacher.image_size, teacher.scale.flatten().tolist(), teacher.shift.flatten().tolist()],
        "data": pictures.name,
        "set": loader.fingerprint(),
        "pictures": [pictures.pipeline, pictures.image_size, list(loader.mean), list(loader.std), transform],
        "seed": recipe.seed if transform else 0,
        "precision": model.precision,
        # another version may draw another picture for the same seed
        "versions": {library.__name__: library.__version__ for library in (torch, timm, PIL)},
    }
    root = Path(recipe.output_dir) / "teacher_logits"
    return Store(root, about, loader.samples, pictures.augmentations or 1, loader.classes)


def check_pairs(recipe: Recipe, made_before: set[str], world: int = 1) -> None:
    """Refuse, before anything trains, models without stages, pairs that an objective does not suit, a student with too
    few rows for its BatchNorm, and teachers whose weights will not be there.

    Args:
        made_before: recipes that will have run by then.

    Raises:
        ValueError: one sentence about the model or its weights.
    """
    method = recipe.method
    if not isinstance(method, Distill) or method.objective == "none":
        return
    ((name, model),) = recipe.models.items()
    pictures = recipe.data[model.data]
    staged = [_split(f"--models.{name}.name", model.name, pictures, recipe.data_dir, pictures.image_size)]
    check_rows(recipe, {name: staged[0].model}, world)
    for teacher, config in method.teachers.items() if method.taught else ():
        option = f"--method.teachers.{teacher}"
        size = config.image_size or pictures.image_size
        staged.append(_split(f"{option}.name", config.name, pictures, recipe.data_dir, size))
        if config.init not in ("", RANDOM) and config.init.removeprefix("run:") not in made_before:
            weights_of(config.init, f"{option}.init", recipe.output_dir)
    if method.objective == "fcfd":
        objectives.check_cnns(method.fcfd, *staged)


def _split(option: str, name: str, pictures: Data, data_dir: str, size: int) -> Stages:
    classes = data.classes(pictures, data_dir)  # what is wrong with the data is not the model's fault
    try:
        return split(models.build(name, classes, image_size=size), size)
    except ValueError as error:
        raise ValueError(f"{option} {name}: {str(error).rstrip('.')}.") from error


class _Around(NamedTuple):
    """What an objective is built between."""

    student: Stages
    teachers: objectives.Teachers
    classes: int
    steps: int
    seed: int
    drawn: objectives.Drawn | None
    device: torch.device | str


OBJECTIVES: dict[str, Callable[[Distill, _Around], objectives.Objective]] = {
    "none": lambda method, around: objectives.Alone(),
    "kd": lambda method, around: objectives.KD(method.kd, around.teachers),
    "rkd": lambda method, around: objectives.RKD(method.rkd, around.teachers),
    "dkd": lambda method, around: objectives.DKD(method.dkd, around.teachers, around.steps),
    "nkd": lambda method, around: objectives.NKD(method.nkd, around.teachers),
    "tfkd": lambda method, around: objectives.TfKD(method.tfkd, around.teachers),
    "uskd": lambda method, around: objectives.USKD(method.uskd, around.student, around.classes),
    "crd": lambda method, around: objectives.CRD(
        method.crd, around.student, around.teachers, around.drawn, around.device
    ),
    "ofa": lambda method, around: objectives.OFA(method.ofa, around.student, around.teachers, around.classes),
    "fitnet": lambda method, around: objectives.FitNet(method.fitnet, around.student, around.teachers),
    "fcfd": lambda method, around: objectives.FCFD(
        method.fcfd, around.student, around.teachers, around.steps, around.seed
    ),
    "fbt": lambda method, around: FBT(method.fbt, around.student, around.teachers, method.kd.temperature),
}
"""Of the recipe's `objective`: its settings, and what it stands between -> itself."""


def build_objective(
    method: Distill,
    student: Stages,
    teachers: objectives.Teachers,
    classes: int,
    *,
    steps: int = 0,
    seed: int = 0,
    drawn: objectives.Drawn | None = None,
    device: torch.device | str = "cpu",
) -> objectives.Objective:
    """The recipe's objective; without `steps` and `drawn`, one to look at only."""
    return OBJECTIVES[method.objective](method, _Around(student, teachers, classes, steps, seed, drawn, device))
