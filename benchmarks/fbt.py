"""What FBT costs: its step beside the floor of any distillation, and what it adds beside OFA's branches and the paper.

    python benchmarks/fbt.py                                   the three pairs of the appendix's Table 6
    python benchmarks/fbt.py --pairs resnet18:swin_tiny_patch4_window7_224

The floor is the teacher's forward and the student's step alone. All steps are measured in one run, in turns, on the
same student engine with the same batch; times are medians over the turns. On a GPU the peak memory of each is there
too. Parameters and multiply-accumulates (of linear and convolution layers, one picture of 224 pixels) are those of
training only: connector, branches.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

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
    "resnet18:deit_tiny_patch16_224": ("0.39M", "0.07G"),
    "deit_tiny_patch16_224:resnet50": ("0.54M", "0.10G"),
    "resmlp_12_224:convnext_tiny": ("1.48M", "0.29G"),
}
"""Appendix, Table 6: what FBT adds, by student:teacher."""
ARMS = ("floor", "kd", "ofa", "fbt")


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    pairs: tuple[str, ...] = tuple(PUBLISHED)
    """student:teacher, timm's names."""
    batch: int = 0
    """Rows per rank; 0 takes 128 on a GPU and 4 on a CPU."""
    turns: int = 7
    stage: int = 1
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    table = Table(title=f"one step, over the teacher's forward and the student's step alone ({ranks.world} rank(s))")
    for heading in ("student <- teacher", "floor", "kd", "ofa", "fbt", "added by fbt", "Table 6", "added by ofa"):
        table.add_column(heading, justify="left" if "<-" in heading else "right")
    figures = []
    for pair in bench.pairs:
        found = measure(bench, pair, ranks)
        figures.append(found)
        seconds, added = found["seconds"], found["added"]
        ratios = [f"{seconds[arm] / seconds['floor']:.2f}" for arm in ARMS[1:]]
        table.add_row(
            " <- ".join(name.partition("_patch")[0] for name in pair.split(":")),
            f"{1000 * seconds['floor']:.0f} ms",
            *ratios,
            f"{added['fbt'][0] / 1e6:.2f}M {added['fbt'][1] / 1e9:.2f}G",
            " ".join(PUBLISHED.get(pair, ("", ""))),
            f"{added['ofa'][0] / 1e6:.2f}M {added['ofa'][1] / 1e9:.2f}G",
        )
    if ranks.first:
        Console(width=140).print(table)
        for found in figures:
            if found["peak_bytes"]:
                peaks = ", ".join(f"{arm} {size / 2**30:.2f} GiB" for arm, size in found["peak_bytes"].items())
                print(f"{found['pair']}: peak memory {peaks}")
        if bench.json:
            where = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
            Path(bench.json).write_text(json.dumps({"device": where, "world": ranks.world, "pairs": figures}, indent=1))
    dist.destroy_process_group()


def measure(bench: Bench, pair: str, ranks: launch.Ranks) -> dict[str, Any]:
    """Seconds, peak memory and additions of one pair."""
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
    steps: dict[str, Callable[[], Any]] = {}
    taught: dict[str, objectives.Objective] = {
        "floor": objectives.Alone(),
        "kd": objectives.KD(config.KD(), teachers),
        "ofa": objectives.OFA(config.OFA(), stages, teachers, CLASSES),
        "fbt": FBT(config.FBT(), stages, teachers),
    }
    learners = [one]
    for arm, objective in taught.items():
        aside = {objective.name: learner(objective.aside)} if objective.aside is not None else {}
        learners += aside.values()
        method = distill.Distillation({"student": one, **aside}, objective)
        steps[arm] = lambda method=method: method.step(0, batches)
    alone = steps["floor"]
    steps["floor"] = lambda: (teacher.logits(x), alone())

    seconds: dict[str, list[float]] = {arm: [] for arm in steps}
    peaks: dict[str, int] = {}
    for turn in range(bench.turns + 1):
        for arm, step in steps.items():
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            step()
            if gpu:
                torch.cuda.synchronize()
                peaks[arm] = torch.cuda.max_memory_allocated()
            if turn:  # the first one allocates
                seconds[arm].append(time.perf_counter() - started)
    added = additions(stages, teacher.stages, config.FBT(), CLASSES)
    for each in learners:
        each.engine.destroy()
    return {
        "pair": pair,
        "rows": rows,
        "seconds": {arm: statistics.median(times) for arm, times in seconds.items()},
        "peak_bytes": peaks,
        "added": {
            "fbt": (added.parameters, added.macs),
            "ofa": (added.branches, added.branch_macs),
        },
    }


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
