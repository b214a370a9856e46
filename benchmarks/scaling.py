"""What a transfer costs as matrices grow: time and memory against width and rank, with fitted exponents.

    python benchmarks/scaling.py                          widths 64 to 8192, as far as the time allows
    python benchmarks/scaling.py --minutes 15 --json scaling.json --png scaling.png

One transfer (read, adapt, write; read again, learn) between two layers of w x w weights, of the whole matrices (`full`)
or of factors of rank r (`factor`). Beside it stands one step of such a layer alone: forward, backward and optimizer on
`rows` rows. The exponent p of cost ~ w^p is fitted by least squares on logarithms, from `fitted_from` on, where what is
there at any width no longer shows. A factor's adapter does not read B, so that r x w matrices stand for it.

On a CPU one thread works, and seconds are the processor's: what other work on the machine delays does not count.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from hetero_kt.config import Optim
from hetero_kt.distributed import launch
from hetero_kt.methods.mergenet import Exchange, Site, Transfer
from hetero_kt.optimizer import build_optimizer
from hetero_kt.options import without_local_rank


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    ranks: tuple[int, ...] = (4, 16, 64)
    """Of factors; the whole matrix is measured besides."""
    rows: int = 512
    """Of the layer's step: pictures, or words."""
    cycle: int = 4
    """Steps to one transfer, where shares are told."""
    share: float = 0.05
    """Of a step's time: what a transfer may cost."""
    turns: int = 3
    minutes: float = 3.5
    """A point that would not be done by then is left out, and one that would take more than half of the memory."""
    fitted_from: int = 512
    json: str = ""
    """Also write the figures to this file."""
    png: str = ""
    """Also draw them into this one."""


def main(bench: Bench) -> None:
    """Measure and print, on the first rank."""
    ranks = launch.start()
    if ranks.device.type == "cpu":
        torch.set_num_threads(1)
    curves = {"step": None, **{f"factor {rank}": rank for rank in bench.ranks}, "full": 0}
    points: dict[str, list[dict[str, float]]] = {name: [] for name in curves}
    began = time.monotonic()
    for width in bench.widths:
        for name, rank in curves.items():
            if rank and rank > width:
                continue
            left = 60 * bench.minutes - (time.monotonic() - began)
            if points[name] and (_expected(points[name], width, bench) > left or not _fits(points[name], width, ranks)):
                continue
            launch.seed_everything(0)
            build = step_of if rank is None else transfer_of
            points[name].append({"width": width, **measure(build(bench, width, rank or width), bench, ranks)})
    result = {
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
        "rows": bench.rows,
        "cycle": bench.cycle,
        "fitted_from": bench.fitted_from,
        "points": points,
        "exponents": {
            name: {what: exponent(of, what, bench.fitted_from) for what in ("seconds", "bytes")}
            for name, of in points.items()
        },
        "layers_for_share": {name: layers(points, name, bench) for name in points if name != "step"},
        "factor_cheaper_from": {name: cheaper(points[name], points["full"]) for name in points if "factor" in name},
    }
    if ranks.first:
        show(result, bench)
        if bench.json:
            Path(bench.json).write_text(json.dumps(result, indent=1) + "\n")
        if bench.png:
            draw(result, Path(bench.png))
    dist.destroy_process_group()


def step_of(bench: Bench, width: int, _: int) -> Callable[[torch.device], Callable[[], Any]]:
    """One step of the layer alone."""

    def build(device: torch.device) -> Callable[[], Any]:
        layer = nn.Linear(width, width, bias=False, device=device)
        optimizer = build_optimizer(layer, Optim("adamw", lr=1e-4))
        x = torch.randn(bench.rows, width, device=device, requires_grad=True)  # a layer hands a gradient on

        def step() -> None:
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return build


def transfer_of(bench: Bench, width: int, rank: int) -> Callable[[torch.device], Callable[[], Any]]:
    """One transfer between matrices of rank x width."""

    def build(device: torch.device) -> Callable[[], Any]:
        source, target = (nn.Linear(width, rank, bias=False, device=device) for _ in range(2))
        exchange = Exchange([Transfer(Site(source, "weight"), Site(target, "weight"), cycle=1)])

        def transfer() -> None:
            exchange.step = 1  # not one of those with a measurement of sensitivity
            exchange.propose()
            exchange.learn()

        return transfer

    return build


def measure(build: Callable[[torch.device], Callable[[], Any]], bench: Bench, ranks: launch.Ranks) -> dict[str, float]:
    """Median seconds, and bytes at the peak above what is there before."""
    work = build(ranks.device)
    with Peak(ranks.device) as peak:
        times = [_timed(work, ranks.device)]
    if times[0] < 3:  # what is first made counts for little in a longer one
        times = [_timed(work, ranks.device) for _ in range(bench.turns)]
    return {"seconds": statistics.median(times), "bytes": float(peak.bytes)}


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class Peak:
    """Most memory in use inside, above what was in use at the start: of the GPU, or of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return self
        _trim()
        self.before, self.ended = _resident(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(0.002):
            self.bytes = max(self.bytes, _resident() - self.before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _trim() -> None:
    """Give freed memory back, so that the next peak is seen."""
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)


def _expected(points: Sequence[dict[str, float]], width: int, bench: Bench) -> float:
    """Seconds of a point, from the one before."""
    one = points[-1]["seconds"] * (width / points[-1]["width"]) ** 2.2
    return one if one > 3 else one * (1 + bench.turns)


def _fits(points: Sequence[dict[str, float]], width: int, ranks: launch.Ranks) -> bool:
    if ranks.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return points[-1]["bytes"] * (width / points[-1]["width"]) ** 2 < free / 2


def exponent(points: Sequence[dict[str, Any]], what: str, first: int, along: str = "width") -> float | None:
    """p of what ~ width^p, by least squares on logarithms; None with fewer than three points."""
    used = [(p[along], p[what]) for p in points if p[along] >= first and p[what] > 0]
    if len(used) < 3:
        return None
    sizes, values = (np.log(np.array(column)) for column in zip(*used, strict=True))
    return float(np.polyfit(sizes, values, 1)[0])


def layers(points: dict[str, list[dict[str, float]]], name: str, bench: Bench) -> dict[int, int]:
    """Width -> layers of that width in the models, together, from which on one transfer in a cycle costs no more than
    the share of the steps."""
    steps = {p["width"]: p["seconds"] for p in points["step"]}
    return {
        int(p["width"]): math.ceil(p["seconds"] / (bench.share * bench.cycle * steps[p["width"]]))
        for p in points[name]
        if p["width"] in steps
    }


def cheaper(factor: Sequence[dict[str, float]], full: Sequence[dict[str, float]]) -> int | None:
    """The first width from which on a factor's transfer is cheaper than the whole matrix's; None where none is."""
    whole = {p["width"]: p["seconds"] for p in full}
    found = None
    for point in reversed([p for p in factor if p["width"] in whole]):
        if point["seconds"] >= whole[point["width"]]:
            break
        found = int(point["width"])
    return found


def show(result: dict[str, Any], bench: Bench) -> None:
    """Tables: seconds and memory, then exponents and crossovers."""
    console = Console(width=120)
    for what, unit, scale in (("seconds", "ms", 1e3), ("bytes", "MB", 1e-6)):
        table = Table(title=f"{what} of one transfer ({unit}), {result['device']}")
        table.add_column("width", justify="right")
        for name in result["points"]:
            table.add_column(name, justify="right")
        for width in bench.widths:
            found = {name: [p for p in of if p["width"] == width] for name, of in result["points"].items()}
            table.add_row(str(width), *(f"{scale * of[0][what]:.2f}" if of else "" for of in found.values()))
        fitted = [result["exponents"][name][what] for name in result["points"]]
        table.add_row("exponent", *("" if p is None else f"{p:.2f}" for p in fitted))
        console.print(table)
    for name, found in result["layers_for_share"].items():
        text = ", ".join(f"{count} at {width}" for width, count in found.items())
        limit = f"{100 * bench.share:.0f} % of {bench.cycle} steps of {bench.rows} rows"
        console.print(f"{name}: a transfer costs {limit} in models of so many layers together: {text}")
    for name, width in result["factor_cheaper_from"].items():
        console.print(f"{name} is cheaper than full from width {width} on")


def draw(result: dict[str, Any], path: Path) -> None:
    """Both quantities over the width, on logarithms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, what, scale, label in zip(
        axes, ("seconds", "bytes"), (1.0, 1e-6), ("seconds", "MB at the peak"), strict=True
    ):
        for name, points in result["points"].items():
            seen = [(p["width"], scale * p[what]) for p in points if p[what] > 0]
            if seen:
                fitted = result["exponents"][name][what]
                dashes = ":" if name == "step" else "-"
                told = name if fitted is None else f"{name}, exponent {fitted:.2f}"
                axis.loglog(*zip(*seen, strict=True), dashes, marker="o", markersize=3, label=told)
        axis.set_xlabel("width of the matrix")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"One transfer, and one step of the layer alone ({result['rows']} rows), {result['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    import sys

    main(tyro.cli(Bench, args=without_local_rank(sys.argv[1:])))
