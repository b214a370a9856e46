"""What a transfer costs as more is transferred: with its sites, with the models that take part, and with the ranks.

    python benchmarks/growth.py                                            starts the ranks itself
    python benchmarks/growth.py --json growth.json --png growth.png
    python benchmarks/growth.py --quick                                    the same path, tiny: times mean nothing

Models are stacks of `depth` layers of w x w weights, each on a DeepSpeed engine of its own. One transfer (gather, adapt,
write; gather again, learn) comes before one step of all of them; it moves whole matrices (`full`) or their factors of
rank r (`factor`). Sites are pairs of layers, from the one model into the other; several models stand in a ring, in which
each teaches the next. Every rank has `rows` rows of its own, so that more ranks are a larger batch.

Seconds are the processor's, of the first rank, with one thread (on GPUs: the clock's on the wall): neither other work on
the machine counts, nor ranks that share a core, nor waiting for one another. All ranks begin each part together. Of what
is sent, a ring moves (n - 1) / n through each of n ranks. A GPU is used where there is one for each rank.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
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

MODES = ("factor", "full")
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
    rows: int = 512
    """Of a step, on each rank."""
    stages: tuple[int, ...] = (1, 3)
    cycle: int = 4
    """Steps to one transfer, where shares are told."""
    share: float = 0.05
    """Of the steps' time: what a transfer may cost."""
    turns: int = 5
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
    for number in bench.ranks:
        command, env = between(number)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "points.json"
            subprocess.run([*command, __file__, *given, "--points", str(file)], env=env, check=True)
            points += json.loads(file.read_text())
    figures = summed_up(points, bench)
    show(points, bench)
    cores = os.cpu_count()
    what = {"depth": bench.depth, "width": bench.width, "rank": bench.rank, "rows": bench.rows, "cycle": bench.cycle}
    title = f"a transfer between stacks of {bench.depth} layers of {bench.width} x {bench.width}, {cores} cores"
    report(title, figures, bench.json, **what, ranks=bench.ranks, points=points)
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


def measure(bench: Bench, ranks: launch.Ranks) -> list[Point]:
    """All points of this number of ranks. Collective."""
    points = []
    for stage in bench.stages:
        for mode in MODES:
            grown = ranks.world == bench.among
            wanted = [("sites", 2, sites) for sites in (bench.sites if grown else ())]
            wanted += [("models", models, bench.usual) for models in (bench.models if grown and mode == "factor" else ())]
            wanted += [("ranks", 2, bench.usual)]
            engines = [_engine(bench, stage, mode, seed, ranks) for seed in range(max(m for _, m, _ in wanted))]
            sides = [_Side(study, engines[:models], sites) for study, models, sites in wanted]
            x = torch.randn(bench.rows, bench.width, device=ranks.device)
            for turn in range(-2, bench.turns):  # ZeRO-3 learns its order in the first, the second is counted
                for side in sides if turn % 2 else reversed(sides):
                    side.cycle(x, counts=turn == -1, timed=turn >= 0)
            common = {"stage": stage, "mode": mode, "ranks": ranks.world, "device": ranks.device.type}
            points += [common | side.point() for side in sides]
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
    """So many sites between so many engines: two teach one way, more in a ring."""

    def __init__(self, study: str, engines: Sequence[DeepSpeedEngine], sites: int) -> None:
        self.study, self.engines, self.sites = study, engines, sites
        # A ring of two is both ways; where only sites or ranks grow, knowledge goes one way.
        pupils = [*engines[1:], engines[0]] if study == "models" else engines[1:]
        weights = [f"{layer}.0.weight" for layer in range(sites)]
        pairs = [(Site(a, w), Site(b, w)) for a, b in zip(engines, pupils, strict=False) for w in weights]
        self.exchange = Exchange([Transfer(source, target, cycle=1) for source, target in pairs])
        self.ours, self.theirs = Collectives(), Collectives()
        self.seconds: dict[str, list[float]] = {}
        self.wall: dict[str, list[float]] = {}

    def cycle(self, x: torch.Tensor, counts: bool, timed: bool) -> None:
        """One transfer and one step."""
        self.exchange.step = 1  # not one of those with a measurement of sensitivity
        if counts:
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
        if timed:
            seconds = turns.wall if x.is_cuda else turns.processor
            for found, kept in ((seconds, self.seconds), (turns.wall, self.wall)):
                for name, times in found.items():
                    kept.setdefault(name, []).append(sum(times))

    def step(self, x: torch.Tensor) -> None:
        for engine in self.engines:
            engine.backward(engine(x).square().mean())
        for engine in self.engines:
            engine.step()

    def point(self) -> Point:
        ring = (dist.get_world_size() - 1) / dist.get_world_size()
        medians = {name: statistics.median(times) for name, times in self.seconds.items()}
        wall = {f"{name}_wall": statistics.median(times) for name, times in self.wall.items()}
        return {
            "study": self.study,
            "models": len(self.engines),
            "sites": self.sites,
            "transfers": len(self.exchange.paths),
            **medians,
            **wall,
            "transfer": medians["gather"] + medians["adapter"],
            "calls": dict(self.ours.calls),
            "held": dict(self.ours.bytes),
            "sent": ring * self.ours.volume(),
            "engines_send": ring * self.theirs.volume(),
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
    every weight that takes part before the step and one of the targets after it; between ranks, the first one's proposals
    with a verdict on each; nothing else."""
    values = bench.width * (bench.rank if point["mode"] == "factor" else bench.width)
    calls, held = {}, {}
    if point["stage"] == 3:
        read = point["models"] * point["sites"] + point["transfers"]
        calls["allgather"], held["allgather"] = 2, 4 * values * read
    if point["ranks"] > 1:
        calls["broadcast"], held["broadcast"] = 1, 4 * (values + 1) * point["transfers"]
    return calls, held


def layers(point: Point, bench: Bench) -> int:
    """Layers of the models, for each site, with which a transfer in a cycle costs no more than the share of its steps."""
    layer = point["step"] / (point["models"] * bench.depth)
    return math.ceil(point["transfer"] / point["transfers"] / (bench.share * bench.cycle * layer))


def of(points: Sequence[Point], study: str, stage: int, mode: str) -> list[Point]:
    """One curve."""
    return [p for p in points if (p["study"], p["stage"], p["mode"]) == (study, stage, mode)]


def curves(points: Sequence[Point], study: str, bench: Bench) -> dict[str, list[Point]]:
    """Every curve of a study that there is, by its name."""
    found = {f"ZeRO-{s} {mode}": of(points, study, s, mode) for mode in MODES for s in bench.stages}
    return {name: curve for name, curve in found.items() if curve}


def summed_up(points: Sequence[Point], bench: Bench) -> list[Figure]:
    """Counts beside what they should be, exponents, and crossovers."""
    odd = [p for p in points if (p["calls"], p["held"]) != expected(p, bench)]
    names = ", ".join(f"{p['study']} ZeRO-{p['stage']} {p['mode']} {p['sites']}" for p in odd)
    beside = "2 gathers at ZeRO-3, 1 broadcast between ranks, their bytes"
    figures = [Figure(f"of {len(points)} points, with other counts", len(odd), "", beside, 0, exact=True, note=names)]
    for study in ("sites", "models"):
        for name, curve in curves(points, study, bench).items():
            for what in ("transfer", "gather", "adapter"):
                power = exponent(curve, what, 1, along=study)
                if power is not None:
                    at = f"{study} {curve[0][study]} to {curve[-1][study]}"
                    figures.append(Figure(f"{what}'s time ~ {study}^p, {name}", power, "", at))
    for name, curve in curves(points, "sites", bench).items():
        led = next((p["sites"] for p in curve if p["adapter"] > p["gather"]), None)
        note = "never" if led is None else ""
        figures.append(Figure(f"adapters above gathers, {name}", led or math.nan, "sites", "and more", note=note))
        told = f"{100 * bench.share:.0f} % of {bench.cycle} steps of {bench.rows} rows"
        figures.append(Figure(f"layers for each site, {name}", layers(curve[-1], bench), "", told))
    return figures


def show(points: Sequence[Point], bench: Bench) -> None:
    """A table for each study."""
    console = Console(width=150)
    for study in ("sites", "models", "ranks"):
        where = "" if study == "ranks" else f", {bench.among} ranks"
        table = Table(title=f"one transfer as {study} grow{where}", title_justify="left")
        headings = (study, "transfer ms", "gather", "adapter", "on the wall", "steps' %", "layers a site")
        for heading in ("", *headings, "collectives", "held after", "sent a rank", "engines' %"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, curve in curves(points, study, bench).items():
            for p in curve:
                table.add_row(name, *cells(p, study, bench))
            table.add_section()
        console.print(table)
    if max(bench.ranks) > (os.cpu_count() or 1) and {p["device"] for p in points} == {"cpu"}:
        console.print(f"More ranks than cores ({os.cpu_count()}) take turns on them: on the wall, that is what shows.")


def cells(p: Point, study: str, bench: Bench) -> list[str]:
    """A point as a row of its table."""
    share = 100 * p["transfer"] / (bench.cycle * p["step"])
    calls = ", ".join(f"{n} {name}" for name, n in sorted(p["calls"].items())) or "none"
    sent = 100 * p["sent"] / (bench.cycle * p["engines_send"]) if p["engines_send"] else 0.0
    wall = p["gather_wall"] + p["adapter_wall"]
    times = [f"{1e3 * seconds:.2f}" for seconds in (p["transfer"], p["gather"], p["adapter"], wall)]
    held = f"{sum(p['held'].values()):,} B"
    return [str(p[study]), *times, f"{share:.1f}", str(layers(p, bench)), calls, held, f"{p['sent']:,.0f} B", f"{sent:.1f}"]


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
