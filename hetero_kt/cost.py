"""What a recipe will cost, before it is started: parameters, MACs, memory per rank, bytes on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hetero_kt import config, data, memory, models, parts
from hetero_kt.checks import split_site, zero_block
from hetero_kt.config import Data, Distill, MergeNet, Model, Recipe
from hetero_kt.evaluate import evaluating
from hetero_kt.methods.fbt import connect
from hetero_kt.models.teacher import sparing
from hetero_kt.nn import reencode
from hetero_kt.nn.adapter import build_adapter
from hetero_kt.nn.branches import Branches
from hetero_kt.nn.fused import macs as connector_macs
from hetero_kt.nn.fused import route
from hetero_kt.nn.losses.memory import Memory
from hetero_kt.nn.stages import Stages, split

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
    buffer_bytes: int
    """Gradients on their way between ranks, and what ZeRO-3 keeps whole for the while."""
    activation_bytes: int
    """What forward keeps for the backward, of one micro-batch."""
    sent_bytes: int
    """What a rank sends per step: see `sent_bytes`."""

    @property
    def state_bytes(self) -> int:
        """All that stays between two steps, and the buffers."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes + self.buffer_bytes


def model_cost(module: nn.Module, model: Model, pictures: Data, world: int) -> ModelCost:
    """Cost of `module` (plain, on the CPU) trained as `model` says on `world` ranks; one sample is a picture, a
    text of the greatest length, or one of each."""
    inputs, more = sample(pictures)
    rows = model.micro_batch or -(-pictures.batch // world)
    kept = rows * memory.activation_bytes(module, lambda count: sample(pictures, count))
    if model.precision != "fp32":
        kept //= 2
    return _cost(module, macs_of(module, *inputs, **more), model, world, kept)


def _cost(module: nn.Module, macs: int, model: Model, world: int, activations: int = 0) -> ModelCost:
    zero = zero_block(model.zero)
    stage, offloaded = zero["stage"], {name for name in ("param", "optimizer") if zero.get(f"offload_{name}")}
    width = 2 if model.precision == "bf16" else 4
    count = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    master = 4 * trained // (world if stage >= 1 else 1)
    moments = master * MOMENTS[model.optim.name]
    optimizer = master + moments if stage else moments
    return ModelCost(
        parameters=count,
        macs=macs,
        weight_bytes=0 if "param" in offloaded else width * count // (world if stage == 3 else 1),
        gradient_bytes=0 if "optimizer" in offloaded else width * trained // (world if stage >= 2 else 1),
        optimizer_bytes=0 if "optimizer" in offloaded else optimizer,
        average_bytes=master if model.ema and "optimizer" not in offloaded else 0,
        buffer_bytes=memory.buffer_bytes(module, zero, width),
        activation_bytes=activations,
        sent_bytes=sent_bytes(zero, count, trained, world, width),
    )


def sent_bytes(zero: Mapping[str, Any], count: int, trained: int, world: int, width: int = 4) -> int:
    """What DeepSpeed lets one of `world` ranks send per step, by ring algorithms.

    P bytes of gradients are reduced to the ranks that own them, and as many of weights gathered: P (w-1)/w each, 2 P at
    stages 1 and 2 (Rajbhandari et al. 2020). DeepSpeed all-reduces the gradients there unless it is told otherwise,
    which sends P more. At stage 3 weights are gathered for forward and again for backward, 3 P in all, unless the whole
    model is within `stage3_max_reuse_distance`: then forward's are kept.

    Args:
        zero: DeepSpeed's block.
        count, trained: all parameters, and those with gradients.
        width: bytes of an element.
    """
    if zero["stage"] == 3:
        kept = int(zero.get("stage3_max_reuse_distance", memory.LIVE)) >= count
        times = (1 if kept else 2) * count + trained
    elif zero["stage"]:
        times = (3 if zero.get("use_multi_rank_bucket_allreduce", True) else 2) * trained
    else:
        times = 2 * trained
    return width * times * (world - 1) // world


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
    parts.check_rows(recipe, {}, world, objective.aside)
    return objective.name, _cost(objective.aside, 0, replace(model, ema=0.0), world)


def crd_bytes(recipe: Recipe) -> int:
    """What CRD's memory of all samples takes on every rank, for one teacher."""
    assert isinstance(recipe.method, Distill)
    ((_, model),) = recipe.models.items()
    return Memory.bytes(data.samples(recipe.data[model.data], recipe.data_dir), recipe.method.crd.width)


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
    """Cost of the transfer `name`.

    Raises:
        ValueError: a weight that is not there, a rank or an adapter that does not fit.
    """
    assert isinstance(recipe.method, MergeNet)
    transfer = recipe.method.transfers[name]
    shapes, gathered = [], []
    for site, rank in transfer.sites():
        model, weight = split_site(site)
        reference = reencode.find_weight(modules[model], weight)
        rows, columns = reference.shape
        if transfer.mode != "full":
            reencode.check_rank(site, reference.shape, rank)
        shapes.append((rows if transfer.mode == "full" else rank, columns))
        moved = rank * columns if transfer.mode == "factor" else reference.tensor_shape.numel()
        in_pieces = zero_block(recipe.models[model].zero)["stage"] == 3 or recipe.models[model].precision == "bf16"
        gathered.append(4 * moved if in_pieces else 0)
    source, target = shapes
    with torch.device("meta"):
        adapter = build_adapter(transfer.adapter, target, source, rows_align=transfer.mode == "full")
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


def additions(ours: Stages, theirs: Stages, settings: config.FBT, classes: int) -> Connection:
    """What FBT and OFA add to the student `ours` of the teacher `theirs`."""
    way = route(ours, theirs)
    ends = {"student": ours, "teacher": theirs}
    connector = connect(ends[way.front], ends[way.tail], settings)
    branches = Branches(ours, classes, width=theirs.width)
    features = [torch.zeros(1, *layout.shape) for layout in ours.layouts]
    return Connection(
        f"{way.front} 1-3 -> L2G -> {way.tail} 4",
        sum(p.numel() for p in connector.parameters()),
        connector_macs(connector),
        sum(p.numel() for p in branches.parameters()),
        macs_of(branches, features),
    )


def student_stages(recipe: Recipe, module: nn.Module) -> Stages:
    ((name, model),) = recipe.models.items()
    return _staged(f"--models.{name}.name", module, recipe.data[model.data].image_size)


def teacher_stages(recipe: Recipe, method: Distill, name: str) -> Stages:
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


def sample(config: Data, rows: int = 1) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """What a model's forward takes in training, for `rows` samples; the answer to a question has four tokens."""
    text = torch.zeros(rows, config.text.length, dtype=torch.long)
    picture = torch.zeros(rows, 3, *[config.image_size] * 2)
    each = torch.arange(rows)
    if config.name == "captions":
        return (picture, text, torch.ones_like(text)), {"negatives": (each, each)}
    if config.name == "vqa":
        answer = torch.ones(rows, 4, dtype=torch.long)
        more = {"answer_ids": answer, "answer_mask": answer, "owner": each}
        return (picture, text, torch.ones_like(text)), more
    return ((text,) if config.name in data.TEXTS else (picture,)), {}


def macs_of(module: nn.Module, *inputs: Any, **more: Any) -> int:
    """Multiply-accumulates of linear and convolution layers in one forward in eval mode."""
    with FlopCounterMode(display=False) as counter, evaluating(module):
        module(*inputs, **more)
    layers = {torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm}
    return sum(flops for kind, flops in counter.get_flop_counts()["Global"].items() if kind in layers) // 2


def teacher_bytes(teacher: config.Teacher, module: nn.Module, world: int) -> int:
    """Weights of a frozen teacher per rank: whole, or its piece and what is whole for the while."""
    count = sum(p.numel() for p in module.parameters())
    if not teacher.zero:
        return 4 * count
    return 4 * (count // world + memory.whole_elements(module, {**sparing(module), **zero_block(teacher.zero)}))
