"""The plan of a recipe, as tables: what `--plan` and `hetero-kt plan` print."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from hetero_kt import data, parts
from hetero_kt.checks import zero_block
from hetero_kt.config import XVLM, Data, Distill, MergeNet, Recipe
from hetero_kt.cost import (
    ModelCost,
    TransferCost,
    additions,
    aside_cost,
    crd_bytes,
    macs_of,
    model_cost,
    student_stages,
    teacher_bytes,
    teacher_stages,
    transfer_cost,
)
from hetero_kt.data import census
from hetero_kt.data.shards import INDEX, write_stand_in
from hetero_kt.nn.stages import Stages, expose

ADAPTER_BYTES = 16
"""Of a parameter: its value, gradient and AdamW's two moments; adapters are whole on every rank."""


IMAGENET_CLASSES, IMAGENET_SAMPLES = 1000, 1_281_167
"""What shards that are not there yet are taken for."""


def show(recipe: Recipe, world: int, memory: float = 0.0) -> None:
    """Print the plan of `recipe` on `world` ranks; nothing is started and no data set is decoded.

    Args:
        memory: of one GPU, in GiB, to compare with; 0 takes this machine's where it has any.
    """
    with tempfile.TemporaryDirectory() as place:
        _show(_with_shards(recipe, Path(place)), world, memory)


def _with_shards(recipe: Recipe, place: Path) -> Recipe:
    """`recipe` with an index in `place` for shards that nobody has written yet."""
    missing = [name for name, one in recipe.data.items() if not _there(one, recipe.data_dir)]
    if not missing:
        return recipe
    write_stand_in(place / "train", IMAGENET_CLASSES, IMAGENET_SAMPLES)
    print(
        f"The pictures of {', '.join(missing)} are not there: planned for ImageNet-1K's {IMAGENET_CLASSES:,} classes "
        f"and {IMAGENET_SAMPLES:,} pictures."
    )
    stood_in = {name: replace(recipe.data[name], name="shards", folder=str(place)) for name in missing}
    return replace(recipe, data={**recipe.data, **stood_in})


def _there(one: Data, data_dir: str) -> bool:
    if one.name == "tars":
        return census.listed(one.folder, data.root(data_dir), "--data.NAME.folder")[0].exists()
    return one.name != "shards" or (data.folder(one, data_dir) / "train" / INDEX).exists()


def _show(recipe: Recipe, world: int, memory: float) -> None:
    modules = {
        name: parts.build_model(
            replace(m, init="", pretrained=False, xvlm=XVLM()), recipe.data[m.data], recipe.data_dir
        )
        for name, m in recipe.models.items()
    }
    parts.check_rows(recipe, modules, world)
    console = Console(highlight=False, width=140)
    method, aside, tables = recipe.method, None, []
    teachers: Mapping[str, Stages] = {}
    added = 0
    if isinstance(method, MergeNet):
        if method.transfers and method.control != "sharing":  # which has no adapters
            paths = {name: _transfer(recipe, name, modules) for name in method.transfers}
            tables.append(_transfers_table(method, paths))
            added = sum(ADAPTER_BYTES * path.adapter for path in paths.values())
    elif method.objective != "none":  # else no teacher is there
        ((name, student),) = modules.items()
        ours = student_stages(recipe, student)
        if recipe.models[name].checkpointing:
            expose(student, recipe.data[recipe.models[name].data].image_size).checkpointing = True
        teachers = {name: teacher_stages(recipe, method, name) for name in method.teachers} if method.taught else {}
        aside = aside_cost(recipe, ours, teachers, world)
        if teachers:
            tables.append(_teachers_table(recipe, method, teachers, world))
            added = sum(teacher_bytes(method.teachers[name], one.model, world) for name, one in teachers.items())
        if method.objective == "crd":
            tables.append(_memory_table(recipe, method))
            added += len(teachers) * crd_bytes(recipe)
        # The other objectives add neither, and Table 6 compares these two.
        if method.objective in ("fbt", "ofa"):
            tables.append(_additions_table(recipe, method, ours, teachers))
    costs = {
        name: model_cost(modules[name], model, recipe.data[model.data], world) for name, model in recipe.models.items()
    }
    for table in (_models_table(recipe, costs, world, aside), *tables):
        console.print(table)
    for line in _together(recipe, [*costs.values(), *([aside[1]] if aside else [])], added, memory):
        console.print(line)


def _together(recipe: Recipe, costs: Sequence[ModelCost], added: int, memory: float) -> Iterator[str]:
    """What a rank needs in all, and whether a GPU has that."""
    kept = [cost.activation_bytes for cost in costs]
    # Models of MergeNet take their steps one after the other; a distillation has all on one graph.
    activations = max(kept) if isinstance(recipe.method, MergeNet) else sum(kept)
    total = sum(cost.state_bytes for cost in costs) + added + activations
    yield (
        f"Together {_bytes(total)} per rank, {_bytes(activations)} of it activations of one micro-batch; without the "
        "working space of single operations and the CUDA context, about 1 to 2 GiB."
    )
    if not memory and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if memory and total > memory * 2**30:
        yield (
            f"It will not fit into {memory:.0f} GiB: a smaller --models.NAME.micro-batch, a higher ZeRO stage "
            "(--zero-config), more ranks, or --models.NAME.checkpointing where there is that."
        )
    elif memory:
        yield f"It fits into {memory:.0f} GiB, with {_bytes(memory * 2**30 - total)} to spare."


def _models_table(
    recipe: Recipe, costs: Mapping[str, ModelCost], world: int, aside: tuple[str, ModelCost] | None
) -> Table:
    averaged = any(model.ema for model in recipe.models.values())
    headings = ["model", "ZeRO", "parameters", "MACs / sample", "weights", "gradients", "optimizer"]
    headings += [*(["average"] if averaged else []), "buffers", "activations", "sent / step"]
    table = Table(title=f"{recipe.name} on {world} rank(s): memory per rank")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = [(name, recipe.models[name], cost) for name, cost in costs.items()]
    if aside is not None:
        ((_, model),) = recipe.models.items()
        rows.append((f"{aside[0]} (aside)", model, aside[1]))
    for name, model, cost in rows:
        memory = [cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes]
        if averaged:
            memory.append(cost.average_bytes)
        table.add_row(
            name,
            str(zero_block(model.zero)["stage"]),
            _millions(cost.parameters),
            _billions(cost.macs) if cost.macs else "",
            *(_bytes(b) for b in (*memory, cost.buffer_bytes, cost.activation_bytes, cost.sent_bytes)),
        )
    return table


def _transfer(recipe: Recipe, name: str, modules: dict[str, nn.Module]) -> TransferCost:
    try:
        return transfer_cost(recipe, name, modules)
    except ValueError as error:
        raise ValueError(f"--method.transfers.{name}: {error}") from error


def _transfers_table(method: MergeNet, paths: Mapping[str, TransferCost]) -> Table:
    table = Table(title="transfers: bytes gathered each time")
    for heading in ("transfer", "cycle", "source", "target", "adapter", "before the step", "after it"):
        table.add_column(heading, justify="left" if heading == "transfer" else "right")
    for name, transfer in method.transfers.items():
        path = paths[name]
        table.add_row(
            name,
            str(transfer.cycle),
            "x".join(map(str, path.source)),
            "x".join(map(str, path.target)),
            _millions(path.adapter),
            _bytes(path.gathered_before),
            _bytes(path.gathered_after),
        )
    return table


def _teachers_table(recipe: Recipe, method: Distill, teachers: Mapping[str, Stages], world: int) -> Table:
    ((_, model),) = recipe.models.items()
    table = Table(title="frozen teachers: no gradients, no optimizer")
    for heading in ("teacher", "kept", "parameters", "MACs / sample", "weights"):
        table.add_column(heading, justify="left" if heading in ("teacher", "kept") else "right")
    for name, teacher in method.teachers.items():
        size = teacher.image_size or recipe.data[model.data].image_size
        module = teachers[name].model
        count = sum(p.numel() for p in module.parameters())
        table.add_row(
            name,
            "in pieces" if teacher.zero else "whole",
            _millions(count),
            _billions(macs_of(module, torch.zeros(1, 3, size, size))),
            _bytes(teacher_bytes(teacher, module, world)),
        )
    return table


def _memory_table(recipe: Recipe, method: Distill) -> Table:
    table = Table(title="CRD's memory: every sample's two embeddings, whole on every rank")
    for heading in ("teacher", "memory"):
        table.add_column(heading, justify="left" if heading == "teacher" else "right")
    for name in method.teachers:
        table.add_row(name, _bytes(crd_bytes(recipe)))
    return table


def _additions_table(recipe: Recipe, method: Distill, ours: Stages, teachers: Mapping[str, Stages]) -> Table:
    ((_, model),) = recipe.models.items()
    classes = data.classes(recipe.data[model.data], recipe.data_dir)
    table = Table(title="what training adds to the student, and drops afterwards (appendix, Table 6)")
    for heading in ("teacher", "fused model", "L2G", "MACs", "OFA's branches", "their MACs"):
        table.add_column(heading, justify="left" if heading in ("teacher", "fused model") else "right")
    for name, theirs in teachers.items():
        found = additions(ours, theirs, method.fbt, classes)
        table.add_row(
            name,
            found.way,
            _millions(found.parameters),
            _billions(found.macs),
            _millions(found.branches),
            _billions(found.branch_macs),
        )
    return table


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f}M"


def _billions(number: int) -> str:
    return f"{number / 1e9:.3f}G"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
