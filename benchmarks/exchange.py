"""What a transfer costs: time beside the same step without it, bytes beside the fewest possible.

    python benchmarks/exchange.py                                   one process, ZeRO-1
    deepspeed --num_accelerators 2 benchmarks/exchange.py --stage 3  two ranks, ZeRO-3: bytes too

Both sides of the ratio are measured in one run, in turns, on the same engines: `cycle` steps with one mutual transfer,
then `cycle` steps without. Times are means over the turns, of which one in ten has a measurement of source sensitivity,
as in training; the ratio of the medians stands beside theirs.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table

from hetero_kt import models
from hetero_kt.config import Optim
from hetero_kt.distributed import launch
from hetero_kt.distributed.engine import build_engine
from hetero_kt.methods.mergenet import Exchange, Site, Transfer
from hetero_kt.nn.adapter import AdapterConfig
from hetero_kt.nn.reencode import factorise
from hetero_kt.options import without_local_rank
from hetero_kt.tasks import classification


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
    turns: int = 10
    stage: int = 1
    rank: int = 16
    width: Literal["compact", "published"] = "compact"
    json: str = ""
    """Also write the figures to this file."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    rows = bench.batch or (128 if ranks.device.type == "cuda" else 16)
    names = (bench.source, bench.target)
    weights = (bench.source_weights, bench.target_weights)
    launch.seed_everything(0)
    modules = [models.build(name, 100) for name in names]
    for module, pair in zip(modules, weights, strict=True):
        for weight in pair:
            factorise(module, weight, bench.rank)
    zero = {"stage": bench.stage, "stage3_param_persistence_threshold": 0}
    optim = Optim(lr=1e-3)
    source, target = (build_engine(m.to(ranks.device), optim=optim, zero=zero, micro_batch=rows) for m in modules)
    adapter = AdapterConfig(width=bench.width)
    sites = (
        (Site(source, bench.source_weights[0]), Site(target, bench.target_weights[0])),
        (Site(target, bench.target_weights[1]), Site(source, bench.source_weights[1])),
    )
    exchange = Exchange([Transfer(a, b, 1, adapter, name=str(i)) for i, (a, b) in enumerate(sites)])
    x = torch.randn(rows, 3, 32, 32, device=ranks.device)
    y = torch.randint(100, (rows,), device=ranks.device)

    def turn(transfer: bool) -> float:
        """Seconds of `cycle` steps, the first with a transfer."""
        synchronise(ranks.device)
        started = time.perf_counter()
        for step in range(bench.cycle):
            due = transfer and step == 0
            if due:
                exchange.propose()
            for engine in (source, target):
                engine.backward(classification.loss(engine, (x, y)))
            if due:
                exchange.observe()
            for engine in (source, target):
                engine.step()
            if due:
                exchange.learn()
        synchronise(ranks.device)
        return time.perf_counter() - started

    turn(True), turn(False)  # warm up
    exchange.traffic.gathers = exchange.traffic.bytes = 0
    timed = [(turn(True), turn(False)) for _ in range(bench.turns)]
    with_transfer, without = (statistics.mean(side) for side in zip(*timed, strict=True))
    medians = [statistics.median(side) for side in zip(*timed, strict=True)]
    sides = [path.target.shape for path in exchange.paths] + [path.source.shape for path in exchange.paths]
    sizes = [4 * n * m for n, m in sides]
    before, after = sum(sizes), sum(sizes[: len(exchange.paths)])
    sharded = bench.stage == 3
    result = {
        "pair": list(names),
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "world_size": ranks.world,
        "zero_stage": bench.stage,
        "rows_per_rank": rows,
        "cycle": bench.cycle,
        "adapter_width": bench.width,
        "adapter_parameters": [a.num_parameters() for a in exchange.adapters().values()],
        "seconds_per_step_with_transfer": with_transfer / bench.cycle,
        "seconds_per_step_without": without / bench.cycle,
        "ratio": with_transfer / without,
        "ratio_of_medians": medians[0] / medians[1],
        "bytes_gathered_per_transfer": exchange.traffic.bytes // bench.turns,
        "fewest_bytes": before + after if sharded else 0,
        "gathers_per_transfer": exchange.traffic.gathers / bench.turns,
    }
    if ranks.first:
        table = Table(title=f"mutual transfer, {' <-> '.join(names)}, {result['device']}, {ranks.world} rank(s)")
        table.add_column("figure")
        table.add_column("value", justify="right")
        for name, value in result.items():
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
        Console(width=120).print(table)
        if bench.json:
            Path(bench.json).write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


def synchronise(device: torch.device) -> None:
    """Wait for the device and for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
