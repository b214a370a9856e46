"""What FBT costs: its step beside the floor of any distillation and beside OFA's, its memory, and what it adds.

    python benchmarks/fbt.py                                   the three pairs of the appendix's Table 6
    python benchmarks/fbt.py --pairs resnet18:swin_tiny_patch4_window7_224

The floor is the teacher's forward and the student's step alone. All steps are measured in one run, in turns, on the
same student engine with the same batch. Memory is the peak of two steps, with all that is trained aside and its
optimizer, beyond what student and teacher hold anyway; its floor is subtracted. Parameters and multiply-accumulates
(of linear and convolution layers, one picture of 224 pixels) are those of training only: connector, branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import tyro
from measure import Figure, Turns, peak_memory, report

from hetero_kt import config, models
from hetero_kt.config import Model, Optim, Schedule, Teacher
from hetero_kt.cost import additions
from hetero_kt.distributed import launch
from hetero_kt.distributed.learner import Learner, build_learner
from hetero_kt.methods import distill, objectives
from hetero_kt.methods.fbt import FBT
from hetero_kt.models.teacher import build_teacher
from hetero_kt.nn.stages import expose
from hetero_kt.options import without_local_rank

CLASSES = 1000
PUBLISHED = {
    "resnet18:deit_tiny_patch16_224": "0.39M, 0.07G",
    "deit_tiny_patch16_224:resnet50": "0.54M, 0.10G",
    "resmlp_12_224:convnext_tiny": "1.48M, 0.29G",
}
"""Appendix, Table 6: what FBT adds, by student:teacher."""
AIM = 1.25


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    pairs: tuple[str, ...] = tuple(PUBLISHED)
    """student:teacher, timm's names."""
    batch: int = 0
    """Rows per rank; 0 takes 128 on a GPU and 4 on a CPU."""
    turns: int = 5
    stage: int = 1
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    figures: list[Figure] = []
    details = {}
    for pair in bench.pairs:
        found, details[pair] = measure(bench, pair, ranks)
        figures += found
    report(f"FBT, ZeRO-{bench.stage}, {ranks.world} rank(s)", figures, bench.json, pairs=details)
    dist.destroy_process_group()


def measure(bench: Bench, pair: str, ranks: launch.Ranks) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of one pair, and what is behind them."""
    student_name, teacher_name = (f"timm:{name}" for name in pair.split(":"))
    gpu = ranks.device.type == "cuda"
    rows = bench.batch or (128 if gpu else 4)
    launch.seed_everything(0)
    student = models.build(student_name, CLASSES, image_size=224).to(ranks.device)
    stages = expose(student, 224)
    unit = (1.0, 1.0, 1.0)
    teacher = build_teacher(
        Teacher(teacher_name, init="random"),
        "--teacher",
        classes=CLASSES,
        image_size=224,
        mean=unit,
        std=unit,
        device=ranks.device,
        autocast=gpu,
    )
    teacher.start()
    teachers = {"teacher": teacher}
    model = Model(
        student_name,
        "",
        optim=Optim("adamw", lr=1e-6),
        schedule=Schedule("constant"),
        precision="autocast" if gpu else "fp32",
    )

    def learner(module: torch.nn.Module) -> Learner:
        return build_learner(module.to(ranks.device), model, {"stage": bench.stage}, rows=rows, steps=1)

    one = learner(student)
    x = torch.randn(rows, 3, 224, 224, device=ranks.device).contiguous(memory_format=torch.channels_last)
    batches = {"student": (x, torch.randint(CLASSES, (rows,), device=ranks.device))}
    asides: list[Learner] = []

    def stepping(objective: objectives.Objective) -> Callable[[], Any]:
        aside = {objective.name: learner(objective.aside)} if objective.aside is not None else {}
        asides.extend(aside.values())
        method = distill.Distillation({"student": one, **aside}, objective)
        return lambda: method.step(0, batches)

    alone = stepping(objectives.Alone())
    alone()  # the student's moments
    arms: dict[str, Callable[[], Callable[[], Any]]] = {
        "floor": lambda: lambda: (teacher.logits(x), alone()),
        "kd": lambda: stepping(objectives.KD(config.KD(), teachers)),
        "ofa": lambda: stepping(objectives.OFA(config.OFA(), stages, teachers, CLASSES)),
        "fbt": lambda: stepping(FBT(config.FBT(), stages, teachers)),
    }
    steps, peaks = {}, {}
    for arm, made in arms.items():
        with peak_memory(ranks.device) as peak:
            steps[arm] = made()
            steps[arm]()
            steps[arm]()
        peaks[arm] = peak.bytes
    turns = Turns(ranks.device).take(steps, bench.turns)
    added = additions(stages, teacher.stages, config.FBT(), CLASSES)
    for each in (one, *asides):
        each.engine.destroy()

    said = " <- ".join(name.partition("_patch")[0] for name in pair.split(":"))
    ours, theirs = (peaks[arm] - peaks["floor"] for arm in ("fbt", "ofa"))
    adds = f"adds {added.parameters / 1e6:.2f}M, {added.macs / 1e9:.2f}G (Table 6: {PUBLISHED.get(pair, 'not there')})"
    figures = [
        turns.ratio(
            f"FBT step, {said}", "fbt", "floor", f"teacher forward + student step, {rows} rows", AIM, f"FBT {adds}"
        ),
        turns.ratio(f"FBT step beside OFA's, {said}", "fbt", "ofa", f"OFA step, {rows} rows", 1.0),
        Figure(
            f"FBT extra memory, {said}",
            ours / theirs if theirs > 0 else float("nan"),
            "x",
            f"OFA's extra memory, {theirs / 2**20:.0f} MiB",
            1.0,
            note=f"{ours / 2**20:.0f} MiB beyond the floor's peak, OFA's branches {added.branches / 1e6:.2f}M",
        ),
    ]
    return figures, {"rows": rows, "seconds": turns.raw(), "peak_bytes": peaks}


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
