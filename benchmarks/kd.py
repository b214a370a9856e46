"""A step of plain distillation here, in torchdistill and in timm: the same pair, the same loss, the same batch.

    python benchmarks/kd.py
    pip install torchdistill            the peer is optional: `pip install -e '.[bench]'`

The loss is the labels' cross-entropy and the softened probabilities at temperature 4, with equal weights; the optimizer
is SGD with momentum. The peers train a plain module, as they do on one device. Ours is a DeepSpeed engine: at stage 0,
where nothing is sharded either, and at stage 1, whose own copies of gradients and weights then stand in the ratio.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import tyro
from measure import Figure, Turns, absent, report
from torch import Tensor, nn

from hetero_kt import config, models
from hetero_kt.config import Model, Optim, Schedule, Teacher
from hetero_kt.distributed import launch
from hetero_kt.distributed.learner import build_learner
from hetero_kt.methods import distill, objectives
from hetero_kt.models.teacher import build_teacher
from hetero_kt.nn.stages import expose
from hetero_kt.options import without_local_rank

STAGES = {0: 1.0, 1: None}
"""The aim of each."""
CLASSES, TEMPERATURE, OPTIM = 1000, 4.0, Optim("sgd", lr=1e-4)


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    student: str = "resnet18"
    teacher: str = "deit_tiny_patch16_224"
    batch: int = 0
    """Rows; 0 takes 128 on a GPU and 16 on a CPU."""
    turns: int = 7
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print."""
    ranks = launch.start()
    rows = bench.batch or (128 if ranks.device.type == "cuda" else 16)
    launch.seed_everything(0)
    student = models.build(f"timm:{bench.student}", CLASSES, image_size=224).to(ranks.device)
    taught = models.build(f"timm:{bench.teacher}", CLASSES, image_size=224).to(ranks.device).eval()
    x = torch.randn(rows, 3, 224, 224, device=ranks.device).contiguous(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, (rows,), device=ranks.device)

    peers = {"torchdistill": _torchdistill, "timm": _timm}
    sides: dict[str, Callable[[], Any]] = {}
    missing = {}
    for name, made in peers.items():
        try:
            sides[name] = made(copy.deepcopy(student), copy.deepcopy(taught), x, y)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    for stage in STAGES:
        sides[f"ZeRO-{stage}"] = _ours(bench, copy.deepcopy(student), x, y, stage, ranks)
    turns = Turns(ranks.device).take(sides, bench.turns, warm=2)
    figures: list[Figure] = []
    pair = f"{bench.student} <- {bench.teacher.partition('_patch')[0]}"
    for stage, aim in STAGES.items():
        for name in peers:
            what = f"KD step at ZeRO-{stage} beside {name}'s, {pair}"
            if name in missing:
                figures.append(absent(what, name, aim, missing[name]))
            else:
                beside = f"{name} {version(name)}, {rows} rows"
                figures.append(turns.ratio(what, f"ZeRO-{stage}", name, beside, aim))
    report("distillation", figures, bench.json, seconds=turns.raw())
    dist.destroy_process_group()


def _ours(bench: Bench, student: nn.Module, x: Tensor, y: Tensor, stage: int, ranks: launch.Ranks) -> Callable[[], Any]:
    unit = (1.0, 1.0, 1.0)
    teacher = build_teacher(
        Teacher(f"timm:{bench.teacher}", init="random"),
        "--teacher",
        classes=CLASSES,
        image_size=224,
        mean=unit,
        std=unit,
        device=ranks.device,
    )
    teacher.start()
    expose(student, 224)
    model = Model(bench.student, "", optim=OPTIM, schedule=Schedule("constant"))
    learner = build_learner(student, model, {"stage": stage}, rows=len(x), steps=1)
    method = distill.Distillation(
        {"student": learner}, objectives.KD(config.KD(temperature=TEMPERATURE), {"teacher": teacher})
    )
    return lambda: method.step(0, {"student": (x, y)})


def _torchdistill(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Its box, which is what its own training loop calls for every batch."""
    from torchdistill.common.constant import def_logger
    from torchdistill.core.distillation import DistillationBox

    def_logger.setLevel(logging.WARNING)
    ends = {f"{side}_module_{what}": value for side in ("student", "teacher") for what, value in _OUTPUT.items()}
    loss = {"key": "KDLoss", "kwargs": {**ends, "temperature": TEMPERATURE, "alpha": 1.0, "beta": 1.0}}
    settings = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": _sgd()},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}}},
    }
    box = DistillationBox(teacher, student, {}, settings, x.device, None, False, 1)
    box.student_model.train()
    box.teacher_model.eval()
    return lambda: box.post_forward_process(box.forward_process(x, y))


_OUTPUT = {"path": ".", "io": "output"}


def _timm(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Its task, in the steps of its own training script."""
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        student,
        teacher,
        nn.CrossEntropyLoss(),
        distill_loss_weight=1.0,
        temperature=TEMPERATURE,
        device=x.device,
        verbose=False,
    ).train()
    optimizer = torch.optim.SGD(student.parameters(), **_sgd())

    def step() -> None:
        task(x, y)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _sgd() -> dict[str, float]:
    return {"lr": OPTIM.lr, "momentum": OPTIM.momentum, "weight_decay": OPTIM.weight_decay}


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
