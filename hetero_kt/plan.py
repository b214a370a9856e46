"""What a recipe will cost, said before it is started: parameters, MACs, memory per rank, bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hetero_kt import config, data, models, parts
from hetero_kt.checks import split_site, zero_block
from hetero_kt.config import Data, Distill, MergeNet, Model, Recipe
from hetero_kt.methods.fbt import connect
from hetero_kt.nn import reencode
from hetero_kt.nn.adapter import build_adapter
from hetero_kt.nn.branches import Branches
from hetero_kt.nn.fused import macs as connector_macs
from hetero_kt.nn.fused import route
from hetero_kt.nn.stages import Layout, Stages, split

MOMENTS = {"sgd": 1, "adamw": 2}


@dataclass(frozen=True)
class ModelCost:
    """One model on one of `world` ranks."""

    parameters: int
    macs: int
    """Multiply-accumulates of linear and convolution layers, forward, one sample."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """fp32 master copy and moments."""
    average_bytes: int
    """Of the weights' moving average, in fp32; 0 where the recipe keeps none."""
    sent_bytes: int
    """What ZeRO moves per step and rank: 2 P (w-1)/w at stages 1 and 2, 3 P (w-1)/w at stage 3 (Rajbhandari 2020)."""


def model_cost(module: nn.Module, model: Model, pictures: Data, world: int) -> ModelCost:
    """Cost of `module` (plain, on the CPU) trained as `model` says on `world` ranks; one sample is a picture, a
    text of the greatest length, or one of each."""
    inputs, more = _sample(pictures)
    return _cost(module, _macs(module, *inputs, **more), model, world)


def _cost(module: nn.Module, macs: int, model: Model, world: int) -> ModelCost:
    stage = zero_block(model.zero)["stage"]
    width = 2 if model.precision == "bf16" else 4
    count = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    master = 4 * trained // (world if stage >= 1 else 1)
    moments = master * MOMENTS[model.optim.name]
    return ModelCost(
        parameters=count,
        macs=macs,
        weight_bytes=width * count // (world if stage == 3 else 1),
        gradient_bytes=width * trained // (world if stage >= 2 else 1),
        optimizer_bytes=master + moments if stage else moments,
        average_bytes=master if model.ema else 0,
        sent_bytes=width * (2 * count + trained if stage == 3 else 2 * trained) * (world - 1) // world,
    )


def aside_cost(
    recipe: Recipe, ours: Stages, teachers: Mapping[str, Stages], world: int
) -> tuple[str, ModelCost] | None:
    """Name and cost of what distillation trains beside the student `ours` and drops afterwards, without its operations;
    None where there is nothing.

    Raises:
        ValueError: an objective that does not suit these models.
    """
    assert isinstance(recipe.method, Distill)
    ((_, model),) = recipe.models.items()
    classes = data.classes(recipe.data[model.data], recipe.data_dir)
    # Of a teacher, objectives look at the stages alone until they are called.
    known: Any = {name: SimpleNamespace(stages=stages) for name, stages in teachers.items()}
    objective = parts.build_objective(recipe.method, ours, known, classes)
    if objective.aside is None:
        return None
    return objective.name, _cost(objective.aside, 0, replace(model, ema=0.0), world)


@dataclass(frozen=True)
class TransferCost:
    """One transfer, once per `cycle` steps."""

    source: tuple[int, int]
    target: tuple[int, int]
    adapter: int
    """Parameters of the adapter; it is replicated."""
    gathered_before: int
    """Bytes of fp32 gathered before the step, source and target: under ZeRO-3, and of bf16 weights their masters."""
    gathered_after: int
    """Bytes gathered after the step: the target again."""


def transfer_cost(recipe: Recipe, name: str, modules: dict[str, nn.Module]) -> TransferCost:
    """Cost of the transfer `name`."""
    assert isinstance(recipe.method, MergeNet)
    transfer = recipe.method.transfers[name]
    shapes, gathered = [], []
    for site, rank in transfer.sites():
        model, weight = split_site(site)
        reference = reencode.find_weight(modules[model], weight)
        rows, columns = reference.shape
        shapes.append((rows if transfer.mode == "full" else rank, columns))
        moved = rank * columns if transfer.mode == "factor" else reference.tensor_shape.numel()
        in_pieces = zero_block(recipe.models[model].zero)["stage"] == 3 or recipe.models[model].precision == "bf16"
        gathered.append(4 * moved if in_pieces else 0)
    source, target = shapes
    with torch.device("meta"):
        adapter = build_adapter(transfer.adapter, target, source)
    return TransferCost(source, target, sum(p.numel() for p in adapter.parameters()), sum(gathered), gathered[1])


@dataclass(frozen=True)
class Connection:
    """FBT's connector between one teacher and the student: what Table 6 of the appendix counts."""

    way: str
    """Whose stages it stands between."""
    parameters: int
    macs: int
    """Multiply-accumulates of linear and convolution layers, one picture."""
    branches: int
    """Parameters of OFA's branches for the same student."""
    branch_macs: int


def connection(recipe: Recipe, teacher: str, student: nn.Module) -> Connection:
    """The connector of the recipe's teacher `teacher`, beside OFA's branches.

    Raises:
        ValueError: a model that has no stages.
    """
    assert isinstance(recipe.method, Distill)
    ((_, model),) = recipe.models.items()
    classes = data.classes(recipe.data[model.data], recipe.data_dir)
    return additions(_student(recipe, student), _teacher(recipe, recipe.method, teacher), recipe.method.fbt, classes)


def additions(ours: Stages, theirs: Stages, settings: config.FBT, classes: int) -> Connection:
    """What FBT and OFA add to the student `ours` of the teacher `theirs`."""
    way = route(ours, theirs)
    ends = {"student": ours, "teacher": theirs}
    connector = connect(ends[way.front], ends[way.tail], settings)
    branches = Branches(ours, classes, width=theirs.width)
    features = [torch.zeros(1, *_shape(layout)) for layout in ours.layouts]
    return Connection(
        f"{way.front} 1-3 -> L2G -> {way.tail} 4",
        sum(p.numel() for p in connector.parameters()),
        connector_macs(connector),
        sum(p.numel() for p in branches.parameters()),
        _macs(branches, features),
    )


def _student(recipe: Recipe, module: nn.Module) -> Stages:
    ((name, model),) = recipe.models.items()
    return _staged(f"--models.{name}.name", module, recipe.data[model.data].image_size)


def _teacher(recipe: Recipe, method: Distill, name: str) -> Stages:
    ((_, model),) = recipe.models.items()
    pictures, teacher = recipe.data[model.data], method.teachers[name]
    size = teacher.image_size or pictures.image_size
    module = models.build(teacher.name, data.classes(pictures, recipe.data_dir), image_size=size)
    return _staged(f"--method.teachers.{name}.name", module, size)


def _staged(option: str, module: nn.Module, size: int) -> Stages:
    try:
        return split(module, size)
    except ValueError as error:
        raise ValueError(f"{option}: {error}.") from error


def _shape(layout: Layout) -> tuple[int, ...]:
    if layout.form == "NCHW":
        return (layout.channels, *layout.grid)
    if layout.form == "NHWC":
        return (*layout.grid, layout.channels)
    return (layout.prefix + layout.grid[0] * layout.grid[1], layout.channels)


def _sample(config: Data) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """What a model's forward takes in training, for one sample; the answer to a question has four tokens."""
    text, picture = torch.zeros(1, config.text.length, dtype=torch.long), torch.zeros(1, 3, *[config.image_size] * 2)
    first = torch.zeros(1, dtype=torch.long)
    if config.name == "captions":
        return (picture, text, torch.ones_like(text)), {"negatives": (first, first)}
    if config.name == "vqa":
        answer = torch.ones(1, 4, dtype=torch.long)
        more = {"answer_ids": answer, "answer_mask": answer, "owner": first}
        return (picture, text, torch.ones_like(text)), more
    return ((text,) if config.name in data.TEXTS else (picture,)), {}


def _macs(module: nn.Module, *inputs: Any, **more: Any) -> int:
    """Multiply-accumulates of linear and convolution layers in one forward in eval mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **more)
    for part, training in modes:
        part.training = training
    layers = {torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm}
    return sum(flops for kind, flops in counter.get_flop_counts()["Global"].items() if kind in layers) // 2


def show(recipe: Recipe, world: int) -> None:
    """Print the plan of `recipe` on `world` ranks; nothing is started and no data set is decoded."""
    modules = {
        name: parts.build_model(
            replace(m, init="", pretrained=False, xvlm=config.XVLM()), recipe.data[m.data], recipe.data_dir
        )
        for name, m in recipe.models.items()
    }
    console = Console(highlight=False, width=120)
    method, aside, tables = recipe.method, None, []
    if isinstance(method, MergeNet):
        if method.transfers:
            tables.append(_transfers_table(recipe, method, modules))
    elif method.objective != "none":  # else no teacher is there
        ((_, student),) = modules.items()
        ours = _student(recipe, student)
        teachers = {name: _teacher(recipe, method, name) for name in method.teachers} if method.taught else {}
        aside = aside_cost(recipe, ours, teachers, world)
        if teachers:
            tables.append(_teachers_table(recipe, method, teachers, world))
        # The other objectives add neither, and Table 6 compares these two.
        if method.objective in ("fbt", "ofa"):
            tables.append(_additions_table(recipe, method, ours, teachers))
    for table in (_models_table(recipe, modules, world, aside), *tables):
        console.print(table)


def _models_table(
    recipe: Recipe, modules: dict[str, nn.Module], world: int, aside: tuple[str, ModelCost] | None
) -> Table:
    averaged = any(model.ema for model in recipe.models.values())
    headings = ["model", "ZeRO", "parameters", "MACs / sample", "weights", "gradients", "optimizer"]
    table = Table(title=f"{recipe.name} on {world} rank(s): memory per rank without activations")
    for heading in (*headings, *(["average"] if averaged else []), "sent / step"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = [
        (name, model, model_cost(modules[name], model, recipe.data[model.data], world))
        for name, model in recipe.models.items()
    ]
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
            *(_bytes(b) for b in (*memory, cost.sent_bytes)),
        )
    return table


def _transfers_table(recipe: Recipe, method: MergeNet, modules: dict[str, nn.Module]) -> Table:
    table = Table(title="transfers: bytes gathered each time")
    for heading in ("transfer", "cycle", "source", "target", "adapter", "before the step", "after it"):
        table.add_column(heading, justify="left" if heading == "transfer" else "right")
    for name, transfer in method.transfers.items():
        path = transfer_cost(recipe, name, modules)
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
            _billions(_macs(module, torch.zeros(1, 3, size, size))),
            _bytes(4 * count / (world if teacher.zero else 1)),
        )
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
