"""What moves between two ranks, and what one of them holds: collectives counted, not timed.

    torchrun --nproc-per-node 2 benchmarks/sharding.py

Three questions, at ZeRO-1, 2 and 3: how many bytes does a transfer gather, beside the fewest possible; what do we send
in a step without a transfer, beside the same step of the engines alone; what does DeepSpeed itself move, beside the
textbook. Then, of a teacher at ZeRO-3, the memory that a rank spends on its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import tyro
from deepspeed import DeepSpeedEngine
from measure import Collectives, Figure, peak_memory, report
from torch import Tensor

from hetero_kt import models
from hetero_kt.checks import zero_block
from hetero_kt.config import AdapterConfig, Model, Optim, Schedule, Teacher
from hetero_kt.distributed import launch
from hetero_kt.distributed.learner import Learner, build_learner
from hetero_kt.methods.mergenet import Exchange, MergeNet, Site, Transfer
from hetero_kt.models.teacher import build_teacher
from hetero_kt.nn.reencode import factorise
from hetero_kt.options import without_local_rank
from hetero_kt.tasks import classification

TEXTBOOK = {1: 2, 2: 2, 3: 3}
"""Model sizes through each rank in a step (ZeRO, arXiv 1910.02054, section 7): gradients are scattered and weights
gathered, at stage 3 once more for the backward."""
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    source: str = "cifar:resnet50"
    source_weight: str = "fc.weight"
    target: str = "cifar:mobilenetv2"
    target_weight: str = "blocks.5.2.conv_pwl.weight"
    rank: int = 16
    batch: int = 2
    """Rows per rank: nothing here depends on it."""
    teacher: str = "timm:vit_base_patch16_224"
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Count and print, on the first rank."""
    ranks = launch.start()
    if ranks.world < 2:
        raise SystemExit("start it on two ranks: torchrun --nproc-per-node 2 benchmarks/sharding.py")
    x = torch.randn(bench.batch, 3, 32, 32, device=ranks.device)
    batch = x, torch.randint(100, (bench.batch,), device=ranks.device)
    figures: list[Figure] = []
    for stage in (3, 2, 1):
        figures += _transfers(bench, stage, ranks, batch)
    figures += _teacher(bench, ranks)
    report(f"between {ranks.world} ranks", figures, bench.json)
    dist.destroy_process_group()


def _transfers(bench: Bench, stage: int, ranks: launch.Ranks, batch: Batch) -> list[Figure]:
    figures = []
    for mode in ("factor", "full"):
        learners = _learners(bench, stage, mode, ranks)
        source, target = (learner.engine for learner in learners.values())
        sites = Site(source, bench.source_weight), Site(target, bench.target_weight)
        exchange = Exchange([Transfer(*sites, cycle=4, adapter=AdapterConfig(), name="there")])
        method = MergeNet(learners, exchange, dict.fromkeys(learners, classification.loss))
        batches = dict.fromkeys(learners, batch)
        for step in range(4):
            method.step(step, batches)  # the first has a transfer, and all that is made once is made
        (path,) = exchange.paths
        gathered = exchange.traffic.bytes
        with Collectives() as first:
            method.step(4, batches)
        gathered = exchange.traffic.bytes - gathered
        with Collectives() as between:
            method.step(5, batches)
        with Collectives() as alone:
            _bare(learners, batch)
        n, m = math.prod(path.source.shape), math.prod(path.target.shape)
        fewest = 4 * (n + 2 * m) if stage == 3 else 0
        sizes = "r*M + r*m before, r*m after" if mode == "factor" else "N*M + n*m before, n*m after"
        formula = f"{sizes}: {n:,} + {m:,}, {m:,} values" if stage == 3 else "nothing: every rank has the weights"
        sent = f"in all, a step with the transfer sends {_beyond(first, alone)} beyond the engines'"
        what = f"gathered per transfer, ZeRO-{stage}, {mode}"
        figures.append(Figure(what, gathered, "B", formula, fewest, exact=True, note=sent))
        if mode == "factor":
            ours = between.volume() - alone.volume()
            what = f"ours per step between transfers, ZeRO-{stage}"
            note = "" if between.calls == alone.calls else f"{_beyond(between, alone)} beyond the engines'"
            figures.append(Figure(what, ours, "B", "the same step of the engines alone", 0, exact=True, note=note))
            size = 4 * sum(_values(learner.engine) for learner in learners.values())
            book = f"{TEXTBOOK[stage]} in the textbook (of {size / 2**20:.0f} MiB)"
            what, note = f"DeepSpeed's own per step, ZeRO-{stage}", alone.spoken()
            figures.append(Figure(what, alone.volume() / size, "model sizes", book, note=note))
        for learner in learners.values():
            learner.engine.destroy()
    return figures


def _learners(bench: Bench, stage: int, mode: str, ranks: launch.Ranks) -> dict[str, Learner]:
    launch.seed_everything(0)
    learners = {}
    for name, weight in ((bench.source, bench.source_weight), (bench.target, bench.target_weight)):
        module = models.build(name, 100)
        if mode == "factor":
            factorise(module, weight, bench.rank)
        model = Model(name, "", optim=Optim(lr=1e-4), schedule=Schedule("constant"))
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        learners[name] = build_learner(module.to(ranks.device), model, zero, rows=bench.batch, steps=1_000_000)
    return learners


def _bare(learners: dict[str, Learner], batch: Batch) -> None:
    """A step of the engines, as one writes it without us."""
    engines: list[DeepSpeedEngine] = [learner.engine for learner in learners.values()]
    for engine in engines:
        engine.backward(classification.loss(engine, batch))
    for engine in engines:
        engine.step()


def _beyond(ours: Collectives, theirs: Collectives) -> str:
    """What the one counted more than the other."""
    more = {name: calls - theirs.calls[name] for name, calls in ours.calls.items() if calls > theirs.calls[name]}
    return ", ".join(f"{n} {name} of {ours.bytes[name] - theirs.bytes[name]:,} B" for name, n in more.items()) or "none"


def _values(engine: DeepSpeedEngine) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())


def _teacher(bench: Bench, ranks: launch.Ranks) -> list[Figure]:
    """Weights' memory of a teacher in pieces: its share, and what a forward gathers beyond a whole teacher's."""
    unit = (1.0, 1.0, 1.0)
    x = torch.randn(1, 3, 224, 224, device=ranks.device)
    peaks = {}
    for where, zero in (("whole", None), ("pieces", zero_block("ds_configs/zero3_frozen.json"))):
        launch.seed_everything(0)
        teacher = build_teacher(
            Teacher(bench.teacher, init="random"),
            "--teacher",
            classes=1000,
            image_size=224,
            mean=unit,
            std=unit,
            zero=zero,
            device=ranks.device,
        )
        teacher.start()
        teacher.logits(x)  # DeepSpeed records in which order layers are used
        teacher.logits(x)
        with peak_memory(ranks.device) as peak:
            teacher.logits(x)
        peaks[where] = peak.bytes
        held = sum(_held(p) for p in teacher.module.parameters())
        teacher.stop()
    whole = 4 * sum(getattr(p, "ds_numel", p.numel()) for p in teacher.module.parameters())
    layer = 4 * max(_block(child) for child in teacher.module.modules() if child is not teacher.module)
    measured = held + peaks["pieces"] - peaks["whole"]
    floor = whole / ranks.world + layer
    mib = 2**20
    note = f"a rank holds {held / mib:.0f} MiB, a forward gathers {(peaks['pieces'] - peaks['whole']) / mib:.0f} MiB"
    beside = f"parameters / {ranks.world} + one layer, {floor / mib:.0f} MiB"
    what = f"weights' peak per rank, ZeRO-3 teacher {bench.teacher.partition(':')[2].partition('_patch')[0]}"
    return [Figure(what, measured / floor, "x", beside, 1.2, note=note)]


def _held(parameter: Any) -> int:
    """Bytes of a parameter that this rank keeps."""
    own: Tensor = getattr(parameter, "ds_tensor", parameter)
    whole = parameter.numel() * parameter.element_size() if own is not parameter else 0
    return own.numel() * own.element_size() + whole


def _block(module: torch.nn.Module) -> int:
    """Values of a transformer's block, or of a convolutional stage's; 0 for anything else."""
    named: Callable[[str], bool] = lambda name: name.endswith("Block") or name.endswith("Bottleneck")  # noqa: E731
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters()) if named(type(module).__name__) else 0


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
