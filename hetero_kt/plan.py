"""What a recipe will cost, said before it is started: parameters, MACs, memory per rank, bytes on the wire."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hetero_kt import data, models
from hetero_kt.checks import split_site, zero_block
from hetero_kt.config import Model, Recipe
from hetero_kt.nn import reencode
from hetero_kt.nn.adapter import build_adapter

MOMENTS = {"sgd": 1, "adamw": 2}


@dataclass(frozen=True)
class ModelCost:
    """One model on one of `world` ranks."""

    parameters: int
    macs: int
    """Multiply-accumulates of linear and convolution layers, forward, one picture."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    """fp32 master copy and moments."""
    sent_bytes: int
    """What ZeRO moves per step and rank: 2 P (w-1)/w at stages 1 and 2, 3 P (w-1)/w at stage 3 (Rajbhandari 2020)."""


def model_cost(module: nn.Module, model: Model, image_size: int, world: int) -> ModelCost:
    """Cost of `module` (plain, on the CPU) trained as `model` says on `world` ranks."""
    stage = zero_block(model.zero)["stage"]
    width = 2 if model.precision == "bf16" else 4
    count = sum(p.numel() for p in module.parameters())
    was_training = module.training
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(1, 3, image_size, image_size))
    module.train(was_training)
    states = 4 * count * (1 + MOMENTS[model.optim.name])
    return ModelCost(
        parameters=count,
        macs=counter.get_total_flops() // 2,
        weight_bytes=width * count // (world if stage == 3 else 1),
        gradient_bytes=width * count // (world if stage >= 2 else 1),
        optimizer_bytes=states // (world if stage >= 1 else 1) if stage else states - 4 * count,
        sent_bytes=width * count * (3 if stage == 3 else 2) * (world - 1) // world,
    )


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


def show(recipe: Recipe, world: int) -> None:
    """Print the plan of `recipe` on `world` ranks; nothing is started and no data set is decoded."""
    modules = {
        name: models.build(m.name, data.classes(recipe.data[m.data]), image_size=recipe.data[m.data].image_size)
        for name, m in recipe.models.items()
    }
    console = Console(highlight=False, width=110)
    table = Table(title=f"{recipe.name} on {world} rank(s): memory per rank without activations")
    for heading in (
        "model",
        "ZeRO",
        "parameters",
        "MACs / picture",
        "weights",
        "gradients",
        "optimizer",
        "sent / step",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, model in recipe.models.items():
        cost = model_cost(modules[name], model, recipe.data[model.data].image_size, world)
        table.add_row(
            name,
            str(zero_block(model.zero)["stage"]),
            f"{cost.parameters / 1e6:.2f}M",
            f"{cost.macs / 1e9:.3f}G",
            *(_bytes(b) for b in (cost.weight_bytes, cost.gradient_bytes, cost.optimizer_bytes, cost.sent_bytes)),
        )
    console.print(table)
    table = Table(title="transfers: bytes gathered each time")
    for heading in ("transfer", "cycle", "source", "target", "adapter", "before the step", "after it"):
        table.add_column(heading, justify="left" if heading == "transfer" else "right")
    for name, transfer in recipe.method.transfers.items():
        path = transfer_cost(recipe, name, modules)
        table.add_row(
            name,
            str(transfer.cycle),
            "x".join(map(str, path.source)),
            "x".join(map(str, path.target)),
            f"{path.adapter / 1e6:.2f}M",
            _bytes(path.gathered_before),
            _bytes(path.gathered_after),
        )
    console.print(table)


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"
