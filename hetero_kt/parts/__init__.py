"""What a recipe names, built: models, loaders, engines and the method that moves knowledge between them.

Everything that can be refused is refused on plain modules, before an engine starts: `prepare` first, then
`Prepared.start` makes the engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hetero_kt import data
from hetero_kt.compiler import as_written, check_compiler, forget
from hetero_kt.config import MergeNet, Recipe
from hetero_kt.distributed.launch import Ranks
from hetero_kt.parts.distill import build_objective, check_pairs, prepare_distill
from hetero_kt.parts.mergenet import prepare_mergenet
from hetero_kt.parts.models import build_model, build_models, check_bf16, first_weights, parameters, task, write_model
from hetero_kt.parts.norms import check_rows
from hetero_kt.parts.prepared import Prepared
from hetero_kt.tasks import classification

__all__ = [
    "Prepared",
    "build_loaders",
    "build_model",
    "build_models",
    "build_objective",
    "check_pairs",
    "check_rows",
    "evaluate",
    "evaluate_teachers",
    "first_weights",
    "parameters",
    "prepare",
    "write_model",
]


def prepare(recipe: Recipe, modules: Mapping[str, nn.Module], train: Mapping[str, Any], ranks: Ranks) -> Prepared:
    """The recipe's method between `modules`, which lie on their device. Collective.

    Raises:
        ValueError: one sentence about what does not fit.
    """
    if recipe.compile:
        check_compiler(ranks.device)
        forget()
    check_bf16(recipe, ranks.device)
    check_rows(recipe, modules, ranks.world)
    if isinstance(recipe.method, MergeNet):
        return prepare_mergenet(recipe, recipe.method, modules, ranks)
    return prepare_distill(recipe, recipe.method, modules, train, ranks)


def build_loaders(recipe: Recipe, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
    """Training and evaluation loaders, by the name of the data."""

    def opened(train: bool) -> dict[str, Any]:
        loaders = {}
        for name, config in recipe.data.items():
            try:
                loaders[name] = data.open_loader(
                    config,
                    recipe.data_dir,
                    train=train,
                    seed=recipe.seed,
                    rank=ranks.rank,
                    world=ranks.world,
                    device=ranks.device,
                )
            except ValueError as error:
                raise ValueError(str(error).replace("--data.NAME", f"--data.{name}")) from error
        return loaders

    return opened(train=True), opened(train=False)


def evaluate(recipe: Recipe, name: str, model: nn.Module, loader: Any, ranks: Ranks) -> dict[str, float]:
    """The metrics of the model called `name` over `loader`. Collective."""
    config = recipe.data[recipe.models[name].data]
    chosen = {"k": config.candidates} if config.candidates else {}
    with as_written():
        return task(recipe, name).evaluate(model, loader, ranks.device, **chosen)


def evaluate_teachers(
    recipe: Recipe, prepared: Prepared, test: Mapping[str, Any], ranks: Ranks
) -> dict[str, dict[str, float]]:
    """Each teacher's own metrics on the student's evaluation data. Collective."""
    (model, *_) = recipe.models.values()
    loader = test[model.data]
    teachers = prepared.teachers.items()
    with as_written():
        return {name: classification.evaluate(teacher.logits, loader, ranks.device) for name, teacher in teachers}
