"""What a checkpoint costs, how long a resume takes, and what ZeRO sends per step beside what it has to.

    python benchmarks/checkpoint.py
    deepspeed --num_accelerators 2 benchmarks/checkpoint.py

One model with AdamW, at each ZeRO stage in turn. A save is begun between two steps as in training, and its files are
written while the steps go on: the stall is what training stood still for, in all, on the slowest rank. DeepSpeed's own
`save_checkpoint`, which returns when everything is written, stands beside it, in turns. A resume is what a start does
with a checkpoint: the checksums of all files, and then the state into an engine that has taken a step.

Bytes are counted at c10d's operators, through which every collective of torch.distributed goes, and are what one rank
sends by ring algorithms: of N bytes over w ranks 2 N (w-1)/w for an all-reduce, N (w-1)/w for the others. In theory
(Rajbhandari et al. 2020, section 7) that is 2 P (w-1)/w per step at stages 1 and 2, reduce-scatter of gradients and
all-gather of weights, and 3 P (w-1)/w at stage 3; `planned` is what `hetero-kt plan` says of DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from measure import Collectives, synchronise
from rich.console import Console
from rich.table import Table

from hetero_kt import models
from hetero_kt.config import Model, Optim, Schedule
from hetero_kt.cost import sent_bytes
from hetero_kt.distributed import checkpoint, launch, layout
from hetero_kt.distributed.checkpoint import Checkpoints, Written
from hetero_kt.distributed.learner import Learner, build_learner
from hetero_kt.options import without_local_rank
from hetero_kt.provenance import own_commit
from hetero_kt.tasks import classification


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    model: str = "cifar:resnet50"
    batch: int = 0
    """Rows per rank; 0 takes 128 on a GPU and 8 on a CPU."""
    stages: tuple[int, ...] = (1, 2, 3)
    turns: int = 5
    """Saves by each way, and resumes, at a stage."""
    steps: int = 4
    """Over which bytes are counted."""
    folder: str = ""
    """Where checkpoints go, on the disk that is to be measured; empty takes the folder for temporary files."""
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    place: list[Any] = [tempfile.mkdtemp(prefix="checkpoint", dir=bench.folder or None) if ranks.first else None]
    dist.broadcast_object_list(place)
    try:
        rows = [at_stage(bench, stage, ranks, Path(place[0]) / str(stage)) for stage in bench.stages]
        dist.barrier()
    finally:
        if ranks.first:
            shutil.rmtree(place[0], ignore_errors=True)
    if ranks.first:
        result = {
            "model": bench.model,
            "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
            "world_size": ranks.world,
            "versions": {name: version(name) for name in ("torch", "deepspeed")},
            "commit": own_commit(),
            "stages": rows,
        }
        table = Table(title=f"{bench.model}, {result['device']}, {ranks.world} rank(s)")
        table.add_column("figure")
        for row in rows:
            table.add_column(f"ZeRO-{row['zero_stage']}", justify="right")
        for name in rows[0]:
            values = [row[name] for row in rows]
            table.add_row(name.replace("_", " "), *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
        Console(width=120).print(table)
        if bench.json:
            Path(bench.json).write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


def at_stage(bench: Bench, stage: int, ranks: launch.Ranks, place: Path) -> dict[str, Any]:
    """Everything at one ZeRO stage."""
    batch = bench.batch or (128 if ranks.device.type == "cuda" else 8)
    x = torch.randn(batch, 3, 32, 32, device=ranks.device)
    y = torch.randint(100, (batch,), device=ranks.device)

    def learner_of() -> Learner:
        launch.seed_everything(0)
        recipe = Model(bench.model, "", optim=Optim("adamw", lr=1e-4), schedule=Schedule("constant"))
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        module = models.build(bench.model, 100).to(ranks.device)
        made = build_learner(module, recipe, zero, rows=batch, steps=1000)
        step(made)
        return made

    def step(one: Learner) -> float:
        began = time.perf_counter()
        one.engine.backward(classification.loss(one.engine, (x, y)))
        one.step()
        synchronise(ranks.device)
        return time.perf_counter() - began

    learner = learner_of()
    step(learner)
    with Collectives() as sent:
        for _ in range(bench.steps):
            step(learner)
    alone = statistics.median(step(learner) for _ in range(bench.turns))

    saving, ours, blocking, beside = Checkpoints(place / "ours", keep=1, device=ranks.device), [], [], []
    for turn in range(bench.turns + 1):  # the first makes the copies in host memory
        saving.save(turn + 1, {"model": learner}, {})
        written: Written | None = None
        while written is None:
            seconds = step(learner)
            written = saving.settle()
            beside.append(seconds)
        synchronise(ranks.device)
        began = time.perf_counter()
        learner.engine.save_checkpoint(str(place / "theirs"), tag=str(turn % 2))
        synchronise(ranks.device)
        if turn:
            ours.append(written)
            blocking.append(time.perf_counter() - began)
    (saved,) = layout.complete(place / "ours")
    size = sum(file.stat().st_size for file in saved.iterdir())
    learner.engine.destroy()

    resumes, fresh = [], learner_of()
    for _ in range(bench.turns):
        synchronise(ranks.device)
        began = time.perf_counter()
        layout.verify(saved, ranks.rank, ranks.world)
        checkpoint.load(saved, {"model": fresh})
        synchronise(ranks.device)
        resumes.append(time.perf_counter() - began)
    count = sum(piece.shape.numel() for piece in fresh.pieces)
    fresh.engine.destroy()
    found = {
        "zero_stage": stage,
        "parameters": count,
        "checkpoint_bytes": size,
        "seconds_per_step": alone,
        "seconds_per_step_while_writing": statistics.median(beside),
        "stall_seconds_per_save": statistics.median(one.stall for one in ours),
        "seconds_written_beside_training": statistics.median(one.writing for one in ours),
        "seconds_of_deepspeeds_save_checkpoint": statistics.median(blocking),
        "seconds_per_resume": statistics.median(resumes),
        "bytes_sent_per_step": sent.volume() * (ranks.world - 1) // ranks.world // bench.steps,
        "bytes_planned": sent_bytes({"stage": stage}, count, count, ranks.world),
        "bytes_in_theory": 4 * count * (3 if stage == 3 else 2) * (ranks.world - 1) // ranks.world,
        "calls_per_step": {name: calls / bench.steps for name, calls in sorted(sent.calls.items())},
        "payload_per_step": {name: size // bench.steps for name, size in sorted(sent.bytes.items())},
    }
    everybody: list[Any] = [None] * ranks.world
    dist.all_gather_object(everybody, found["stall_seconds_per_save"])
    return found | {"stall_seconds_per_save": max(everybody)}  # of the slowest rank


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
