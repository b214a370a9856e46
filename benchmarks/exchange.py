"""What a mutual transfer costs: the time of a step beside the same step without it, at both adapter widths.

    python benchmarks/exchange.py                                    one process, ZeRO-1
    deepspeed --num_accelerators 2 benchmarks/exchange.py --stage 3  two ranks, ZeRO-3

All sides are measured in one run, in turns, on the same engines: `cycle` steps with one transfer each way, the same
with the published adapter width, and `cycle` steps without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from measure import Turns, report

from hetero_kt import models
from hetero_kt.config import AdapterConfig, Model, Optim, Schedule
from hetero_kt.distributed import launch
from hetero_kt.distributed.learner import build_learner
from hetero_kt.methods.mergenet import Exchange, MergeNet, Site, Transfer
from hetero_kt.nn.reencode import factorise
from hetero_kt.options import without_local_rank
from hetero_kt.tasks import classification

AIMS = {"cpu": 1.05, "cuda": 1.03}
WIDTHS: tuple[Literal["compact", "published"], ...] = ("compact", "published")


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark; the defaults are the pair of MergeNet's Table 1."""

    source: str = "cifar:resnet50"
    target: str = "cifar:mobilenetv2"
    source_weights: tuple[str, str] = ("fc.weight", "layer4.0.conv1.weight")
    """Read by the one direction, written by the other."""
    target_weights: tuple[str, str] = ("blocks.5.2.conv_pwl.weight", "classifier.weight")
    """Written by the one direction, read by the other."""
    batch: int = 0
    """Rows per rank; 0 takes 128 on a GPU and 16 on a CPU."""
    cycle: int = 4
    turns: int = 5
    stage: int = 1
    rank: int = 16
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    gpu = ranks.device.type == "cuda"
    rows = bench.batch or (128 if gpu else 16)
    weights = {bench.source: bench.source_weights, bench.target: bench.target_weights}
    launch.seed_everything(0)
    learners, losses = {}, {}
    for name, pair in weights.items():
        module = models.build(name, 100)
        for weight in pair:
            factorise(module, weight, bench.rank)
        model = Model(name, "", optim=Optim(lr=1e-3), schedule=Schedule("constant"))
        zero = {"stage": bench.stage, "stage3_param_persistence_threshold": 0}
        learners[name] = build_learner(module.to(ranks.device), model, zero, rows=rows, steps=1_000_000)
        losses[name] = classification.loss
    source, target = (learner.engine for learner in learners.values())
    there = Site(source, bench.source_weights[0]), Site(target, bench.target_weights[0])
    back = Site(target, bench.target_weights[1]), Site(source, bench.source_weights[1])

    def method(width: Literal["compact", "published"]) -> MergeNet:
        adapter = AdapterConfig(width=width)
        transfers = [Transfer(*sites, bench.cycle, adapter, name=str(i)) for i, sites in enumerate((there, back))]
        return MergeNet(learners, Exchange(transfers), losses)

    methods = {width: method(width) for width in WIDTHS} | {"without": MergeNet(learners, Exchange([]), losses)}
    x = torch.randn(rows, 3, 32, 32, device=ranks.device).contiguous(memory_format=torch.channels_last)
    batch = x, torch.randint(100, (rows,), device=ranks.device)

    def cycle(one: MergeNet) -> Callable[[], None]:
        def steps() -> None:
            for step in range(bench.cycle):
                one.step(step, dict.fromkeys(learners, batch))

        return steps

    turns = Turns(ranks.device).take({side: cycle(one) for side, one in methods.items()}, bench.turns)
    pair = " <-> ".join(name.partition(":")[2] for name in weights)
    figures = []
    for width in WIDTHS:
        adapters = methods[width].exchange.adapters().values()
        counts = " + ".join(f"{adapter.num_parameters() / 1e6:.2f}M" for adapter in adapters)
        figures.append(
            turns.ratio(
                f"MergeNet step, {width} adapter, {pair}",
                width,
                "without",
                f"{bench.cycle} steps without transfer, {rows} rows",
                AIMS[ranks.device.type] if width == "compact" else None,
                note=f"mutual, a transfer each way every {bench.cycle} steps, adapters of {counts} parameters",
            )
        )
    shape = {"pair": list(weights), "rows": rows, "cycle": bench.cycle, "stage": bench.stage}
    report(f"transfer, ZeRO-{bench.stage}, {ranks.world} rank(s)", figures, bench.json, seconds=turns.raw(), **shape)
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
