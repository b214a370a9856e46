"""What a transfer costs as more is transferred: with its sites, with the models that take part, and with the ranks.

    python benchmarks/growth.py                                            starts the ranks itself
    python benchmarks/growth.py --json growth.json --png growth.png
    python benchmarks/growth.py --quick                                    the same path, tiny: times mean nothing

Models are stacks of `depth` layers of w x w weights, each on a DeepSpeed engine of its own. One transfer (gather,
adapt, write; gather again, learn) comes before one step of all of them; it moves whole matrices (`full`) or their
factors of rank r (`factor`). Sites are pairs of layers, from one model into the other; several models stand in a ring,
in which each teaches the next. Every rank has `rows` rows of its own, so that more ranks are a larger batch.

Seconds are the processor's, of the first rank, with one thread: neither other work on the machine counts, nor ranks
that share a core, nor waiting for one another. With a GPU for each rank they are the clock's on the wall. All ranks
begin each part together. Of what is sent, a ring moves (n - 1) / n through each of n ranks.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from deepspeed import DeepSpeedEngine
from measure import Collectives, Figure, Turns, between, report
from rich.console import Console
from rich.table import Table
from scaling import exponent
from torch import nn

from hetero_kt.config import Optim
from hetero_kt.distributed import launch
from hetero_kt.distributed.engine import build_engine
from hetero_kt.methods import mergenet
from hetero_kt.methods.mergenet import Exchange, Site, Transfer
from hetero_kt.nn.reencode import factorise
from hetero_kt.options import without_local_rank

Point = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Options of this benchmark."""

    sites: tuple[int, ...] = (1, 2, 4, 8, 16)
    models: tuple[int, ...] = (2, 3, 4)
    ranks: tuple[int, ...] = (1, 2, 4)
    among: int = 2
    """Ranks on which sites and models grow; must be one of `ranks`."""
    usual: int = 4
    """Sites of each model, where models and ranks grow."""
    depth: int = 16
    """Layers of a model."""
    width: int = 256
    rank: int = 16
    """Of factors."""
    rows: int = 128
    """Of a step, on each rank."""
    stages: tuple[int, ...] = (1, 3)
    cycle: int = 4
    """Steps to one transfer, where shares are told."""
    share: float = 0.05
    """Of the steps' time: what a transfer may cost."""
    turns: int = 3
    quick: bool = False
    """Tiny models, one turn: to see that everything runs."""
    json: str = ""
    """Also write the figures to this file."""
    png: str = ""
    """Also draw them into this one."""
    points: str = ""
    """Given by the benchmark to the ranks that it starts: the file for what they measure."""


TINY: dict[str, Any] = {"sites": (1, 2, 4), "models": (2, 3), "ranks": (1, 2), "usual": 2, "depth": 4, "width": 32}
TINY |= {"rank": 4, "rows": 4, "turns": 1}


def main(bench: Bench, given: Sequence[str]) -> None:
    """Start every number of ranks in turn, then print; or, as one of them, measure."""
    bench = replace(bench, **TINY) if bench.quick else bench
    check(bench)
    if bench.points:
        ranks = launch.start()
        if ranks.device.type == "cpu":
            torch.set_num_threads(1)
        found = measure(bench, ranks)
        if ranks.first:
            Path(bench.points).write_text(json.dumps(found))
        dist.destroy_process_group()
        return
    points: list[Point] = []
    if torch.cuda.device_count() < max(bench.ranks):
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # all of a curve on the same device
    with tempfile.TemporaryDirectory() as folder:
        for number in bench.ranks:
            command, env = between(number)
            file = Path(folder) / f"{number}.json"
            subprocess.run([*command, __file__, *given, "--points", str(file)], env=env, check=True)
            points += json.loads(file.read_text())
    figures = summed_up(points, bench)
    show(points, bench)
    what = {"depth": bench.depth, "width": bench.width, "rank": bench.rank, "rows": bench.rows, "cycle": bench.cycle}
    title = f"a transfer between stacks of {bench.depth} layers of {bench.width} x {bench.width}"
    report(title, figures, bench.json, **what, device=points[0]["device"], ranks=bench.ranks, points=points)
    if bench.png:
        draw(points, bench)


def check(bench: Bench) -> None:
    """Raises SystemExit for options that do not fit together."""
    most = max((*bench.sites, bench.usual))
    if most > bench.depth:
        raise SystemExit(f"{most} sites do not fit into {bench.depth} layers: raise --depth.")
    if bench.among not in bench.ranks:
        raise SystemExit(f"--among {bench.among} is none of --ranks: choose one of {', '.join(map(str, bench.ranks))}.")


# --- measuring, on every rank ---


def kinds(bench: Bench) -> list[tuple[int, str]]:
    """(ZeRO stage, what moves) of what is measured; whole matrices at the highest stage alone."""
    return [*((stage, "factor") for stage in bench.stages), (max(bench.stages), "full")]


def measure(bench: Bench, ranks: launch.Ranks) -> list[Point]:
    """All points of this number of ranks. Collective."""
    points = []
    for stage, mode in kinds(bench):
        grow = ranks.world == bench.among
        wanted = [(2, sites, False) for sites in sorted({bench.usual, *(bench.sites if grow else ())})]
        if grow and mode == "factor":
            wanted += [(models, bench.usual, True) for models in bench.models]
        engines = [_engine(bench, stage, mode, seed, ranks) for seed in range(max(models for models, *_ in wanted))]
        sides = [_Side(engines[:models], sites, ring) for models, sites, ring in wanted]
        x = torch.randn(bench.rows, bench.width, device=ranks.device)
        for turn in range(-2, bench.turns):  # ZeRO-3 learns its order in the first, the second is counted
            for side in sides if turn % 2 else reversed(sides):
                side.cycle(x, turn)
        where = {"stage": stage, "mode": mode, "ranks": ranks.world, "device": ranks.device.type}
        points += [where | side.point() for side in sides]
        for engine in engines:
            engine.destroy()
    return points


def _engine(bench: Bench, stage: int, mode: str, seed: int, ranks: launch.Ranks) -> DeepSpeedEngine:
    launch.seed_everything(seed)
    layers = [nn.Sequential(nn.Linear(bench.width, bench.width, bias=False), nn.GELU()) for _ in range(bench.depth)]
    model = nn.Sequential(*layers)
    for layer in range(bench.depth if mode == "factor" else 0):
        factorise(model, f"{layer}.0.weight", bench.rank)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    return build_engine(model.to(ranks.device), optim=Optim("adamw", lr=1e-4), zero=zero, micro_batch=bench.rows)


class _Side:
    """So many sites of each engine: the first teaches the second, or each the next one in a ring."""

    def __init__(self, engines: Sequence[DeepSpeedEngine], sites: int, ring: bool) -> None:
        self.engines, self.sites, self.ring = engines, sites, ring
        pupils = [*engines[1:], engines[0]] if ring else engines[1:]
        pairs = zip(engines, pupils, strict=False)
        weights = [f"{layer}.0.weight" for layer in range(sites)]
        self.exchange = Exchange([Transfer(Site(a, w), Site(b, w), cycle=1) for a, b in pairs for w in weights])
        self.ours, self.theirs = Collectives(), Collectives()
        self.seconds: dict[str, list[float]] = {}
        """By part, one a turn."""

    def cycle(self, x: torch.Tensor, turn: int) -> None:
        """One transfer and one step."""
        self.exchange.step = 1  # not one of those with a measurement of sensitivity
        if turn == -1:
            with self.ours:
                self.exchange.propose()
            with self.theirs:
                self.step(x)
            with self.ours:
                self.exchange.learn()
            return
        turns = Turns(x.device)
        with in_parts(turns):
            self.exchange.propose()
            turns.start()
            self.step(x)
            turns.stop("step")
            self.exchange.learn()
        seconds = turns.wall if x.is_cuda else turns.processor
        wall = {f"{part} on the wall": times for part, times in turns.wall.items()}
        for part, times in {**seconds, **wall}.items() if turn >= 0 else ():
            self.seconds.setdefault(part, []).append(sum(times))

    def step(self, x: torch.Tensor) -> None:
        for engine in self.engines:
            engine.backward(engine(x).square().mean())
        for engine in self.engines:
            engine.step()

    def point(self) -> Point:
        medians = {part: statistics.median(times) for part, times in self.seconds.items()}
        passed = 1 - 1 / dist.get_world_size()
        return {
            "models": len(self.engines),
            "sites": self.sites,
            "ring": self.ring,
            "transfers": len(self.exchange.paths),
            "transfer": medians["gather"] + medians["adapter"],
            **medians,
            "calls": dict(self.ours.calls),
            "held": dict(self.ours.bytes),
            "sent": passed * self.ours.volume(),
            "engines send": passed * self.theirs.volume(),
        }


@contextmanager
def in_parts(turns: Turns) -> Iterator[None]:
    """Inside, the parts that a transfer is made of are timed, each from where all ranks have come to it."""

    @contextmanager
    def part(name: str) -> Iterator[None]:
        turns.start()
        yield
        turns.stop(name)

    was = mergenet.part
    mergenet.part = part  # type: ignore[assignment]
    try:
        yield
    finally:
        mergenet.part = was


# --- what comes out ---


def expected(point: Point, bench: Bench) -> tuple[dict[str, int], dict[str, int]]:
    """(calls, bytes that every rank holds afterwards) of one transfer, by the collective's name: at ZeRO-3 a gather of
    every weight that takes part before the step and one of the targets after it; between ranks, the first one's
    proposals with a verdict on each; nothing else."""
    values = bench.width * (bench.rank if point["mode"] == "factor" else bench.width)
    calls, held = {}, {}
    if point["stage"] == 3:
        read = point["models"] * point["sites"] + point["transfers"]
        calls["allgather"], held["allgather"] = 2, 4 * values * read
    if point["ranks"] > 1:
        calls["broadcast"], held["broadcast"] = 1, 4 * (values + 1) * point["transfers"]
    return calls, held


def layers(point: Point, bench: Bench) -> int:
    """Layers of all models together, to each transfer between two of them, with which transfers in a cycle cost no more
    than the share of its steps."""
    layer = point["step"] / (point["models"] * bench.depth)
    return math.ceil(point["transfer"] / point["transfers"] / (bench.share * bench.cycle * layer))


def curves(points: Sequence[Point], study: str, bench: Bench) -> dict[str, list[Point]]:
    """Every curve of a study that there is, by its name."""
    belongs: dict[str, Callable[[Point], bool]] = {
        "sites": lambda p: not p["ring"] and p["ranks"] == bench.among,
        "models": lambda p: p["ring"],
        "ranks": lambda p: not p["ring"] and p["sites"] == bench.usual,
    }
    found: dict[str, list[Point]] = {}
    for point in filter(belongs[study], points):
        found.setdefault(f"ZeRO-{point['stage']} {point['mode']}", []).append(point)
    return found


def summed_up(points: Sequence[Point], bench: Bench) -> list[Figure]:
    """Counts beside what they should be, exponents, crossovers."""
    odd = [p for p in points if (p["calls"], p["held"]) != expected(p, bench)]
    told = ", ".join(f"{p['calls']} of {p['held']} B at ZeRO-{p['stage']} {p['mode']}, {p['sites']} sites" for p in odd)
    beside = "2 gathers at ZeRO-3, 1 broadcast between ranks"
    figures = [Figure(f"points of {len(points)} with other counts", len(odd), "", beside, 0, exact=True, note=told)]
    for study in ("sites", "models"):
        for name, curve in curves(points, study, bench).items():
            powers = {what: exponent(curve, what, 1, along=study) for what in ("transfer", "gather", "adapter")}
            if powers["transfer"] is not None:
                parts = f"gathers {powers['gather']:.2f}, adapters {powers['adapter']:.2f}"
                what = f"p of a transfer's time ~ {study}^p, {name}"
                figures.append(
                    Figure(what, powers["transfer"], "", f"{parts}, {curve[0][study]} to {curve[-1][study]}")
                )
    for name, curve in curves(points, "sites", bench).items():
        led = next((p["sites"] for p in curve if p["adapter"] > p["gather"]), math.nan)
        figures.append(Figure(f"adapters take longer than gathers from, {name}", led, "site(s)", "time of either"))
    for name, curve in curves(points, "sites", bench).items():
        first, last = curve[0], curve[-1]
        what = f"layers to a site, {last['sites']} sites, {name}"
        beside = f"{100 * bench.share:.0f} % of {bench.cycle} steps; at {first['sites']} site(s) {layers(first, bench)}"
        figures.append(Figure(what, layers(last, bench), "", beside))
    return figures


def show(points: Sequence[Point], bench: Bench) -> None:
    """A table for each study."""
    console = Console(width=150)
    for study in ("sites", "models", "ranks"):
        rest = {"sites": "one model teaches another", "models": f"a ring, {bench.usual} sites each"}
        rest["ranks"] = f"one model teaches another at {bench.usual} sites"
        on = "" if study == "ranks" else f", {bench.among} ranks"
        table = Table(title=f"one transfer as {study} grow: {rest[study]}{on}", title_justify="left")
        times = ("transfer ms", "gathers", "adapters", "% of steps", "layers to a site")
        for heading in ("", study, *times, "gathers + broadcasts", "held after B", "sent a rank B", "% of engines'"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
        for name, curve in curves(points, study, bench).items():
            for point in curve:
                table.add_row(name, *cells(point, study, bench))
            table.add_section()
        console.print(table)
    cores = os.cpu_count() or 1
    if max(bench.ranks) > cores and points[0]["device"] == "cpu":
        console.print(
            f"More ranks than {cores} cores take turns: ms are one rank's own work, and not what one waits for."
        )


def cells(p: Point, study: str, bench: Bench) -> list[str]:
    """A point as a row of its table."""
    times = [f"{1e3 * p[part]:.2f}" for part in ("transfer", "gather", "adapter")]
    share = 100 * p["transfer"] / (bench.cycle * p["step"])
    calls = " + ".join(str(p["calls"].get(name, 0)) for name in ("allgather", "broadcast"))
    sent = f"{100 * p['sent'] / (bench.cycle * p['engines send']):.2f}" if p["engines send"] else ""
    moved = f"{sum(p['held'].values()):,}", f"{p['sent']:,.0f}", sent
    return [str(p[study]), *times, f"{share:.1f}", str(layers(p, bench)), calls, *moved]


def draw(points: Sequence[Point], bench: Bench) -> None:
    """Each study's transfers over what grows, on logarithms, gathers dotted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True)
    for axis, study in zip(axes, ("sites", "models", "ranks"), strict=True):
        for name, curve in curves(points, study, bench).items():
            sizes = [p[study] for p in curve]
            (line,) = axis.loglog(sizes, [1e3 * p["transfer"] for p in curve], "-o", markersize=3, label=name)
            axis.loglog(sizes, [1e3 * p["gather"] for p in curve], ":", color=line.get_color())
            axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel(study)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("ms of one transfer; dotted: its gathers")
    figure.suptitle(f"One transfer between stacks of {bench.depth} layers, {bench.width} x {bench.width}")
    figure.tight_layout()
    figure.savefig(bench.png, dpi=130)


if __name__ == "__main__":
    import sys

    arguments = without_local_rank(sys.argv[1:])
    main(tyro.cli(Bench, args=arguments), arguments)
