"""How every benchmark measures: sides in turns, collectives and memory counted, figures beside floor, peer and aim.

A benchmark is a script with `main(options)` that ends in `report(...)`: a table on the first rank and, with `--json`,
a file. `bench.py` runs all of them and puts their figures into one table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hetero_kt.provenance import own_commit


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    what: str
    value: float
    unit: str
    """`x` for a ratio; `B`, `MB`, `ms`, `s`, ..."""
    beside: str
    """The floor or the peer that it stands beside, with that one's own figure."""
    aim: float | None = None
    """None: reported only."""
    exact: bool = False
    """The aim is a value to be met, and not a bound from above."""
    low: float | None = None
    high: float | None = None
    """Quartiles of the turns."""
    wall: float | None = None
    """Of a ratio of processor times, the same ratio by the clock on the wall."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where there is no aim, or nothing was measured."""
        if self.aim is None or self.value != self.value:
            return None
        return self.value == self.aim if self.exact else self.value <= self.aim


def absent(what: str, beside: str, aim: float | None, note: str) -> Figure:
    """A row that this machine cannot fill."""
    return Figure(what, float("nan"), "", beside, aim, note=note)


# --- times ---


class Turns:
    """Seconds of several sides that take turns, so that whatever slows the machine slows all of them.

    On a CPU they are the processor's, of all threads of this process: what other work on the machine delays does not
    count. On a GPU, between ranks, and where other processes work (`elsewhere`), they are the clock's on the wall.
    """

    def __init__(self, device: torch.device, elsewhere: bool = False) -> None:
        self.device = device
        self.wall: dict[str, list[float]] = {}
        """By side, one a turn."""
        self.processor: dict[str, list[float]] = {}
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        self.seconds = self.processor if alone and device.type == "cpu" and not elsewhere else self.wall
        self._wall = self._busy = 0.0

    def take(self, sides: Mapping[str, Callable[[], Any]], turns: int, warm: int = 1) -> Turns:
        """Every side `warm` times, then `turns` times; the order is turned round each time. Collective."""
        for turn in range(-warm, turns):
            order = list(sides.items())
            for name, work in order if turn % 2 == 0 else reversed(order):
                self.start()
                work()
                self.stop(name, counts=turn >= 0)
        return self

    def start(self) -> None:
        """From here on the clock runs."""
        synchronise(self.device)
        self._wall, self._busy = time.perf_counter(), time.process_time()

    def stop(self, side: str, counts: bool = True) -> None:
        """What has run since `start` was a turn of `side`."""
        synchronise(self.device)
        if counts:
            self.wall.setdefault(side, []).append(time.perf_counter() - self._wall)
            self.processor.setdefault(side, []).append(time.process_time() - self._busy)

    def median(self, side: str) -> float:
        return statistics.median(self.seconds[side])

    def ratio(self, what: str, side: str, floor: str, beside: str, aim: float | None = None, note: str = "") -> Figure:
        """The median over the turns of one side's time over another's in the same turn, with its quartiles."""
        low, middle, high = _quartiles(self.seconds[side], self.seconds[floor])
        wall = None if self.seconds is self.wall else _quartiles(self.wall[side], self.wall[floor])[1]
        beside = f"{beside}, {spoken(self.median(floor))}"
        return Figure(what, middle, "x", beside, aim, low=low, high=high, wall=wall, note=note)

    def raw(self) -> dict[str, dict[str, list[float]]]:
        """Every turn's seconds."""
        return {"wall": self.wall, "processor": self.processor}


def _quartiles(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return low, middle, high


def synchronise(device: torch.device) -> None:
    """Wait for the device and, where there are any, for all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def between(ranks: int) -> tuple[list[str], dict[str, str]]:
    """What starts a script on so many ranks of this machine, and their environment: on its GPUs where there are enough,
    else on the CPU. One rank is a plain process."""
    env = dict(os.environ)
    env["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    if ranks == 1:
        return [sys.executable], env
    if torch.cuda.device_count() < ranks:
        env |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)], env


# --- collectives ---


@dataclass
class Collectives(TorchDispatchMode):
    """Counts what goes through torch.distributed while it is active, whoever sends it.

    `calls` and `bytes` are by the collective's name; bytes are those of its largest tensor, or list of tensors: what
    every rank holds afterwards of a gather, or has put in before a reduction.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d" and name not in ("barrier", "monitored_barrier_"):
            name = name.strip("_").removesuffix("_base")
            sizes = [sum(t.numel() * t.element_size() for t in tree_leaves(a) if isinstance(t, Tensor)) for a in args]
            self.calls[name] += 1
            self.bytes[name] += max(sizes)
        return function(*args, **(kwargs or {}))

    def volume(self) -> int:
        """Bytes that a ring moves through each rank: an all-reduce reduces and gathers, hence counts twice."""
        return sum(size * (2 if name == "allreduce" else 1) for name, size in self.bytes.items())

    def spoken(self) -> str:
        """`2 allgather 466944 B, ...`, or `none`."""
        return ", ".join(f"{n} {name} {self.bytes[name]} B" for name, n in sorted(self.calls.items())) or "none"


# --- memory ---


@dataclass
class Peak:
    """Most memory that was held at once beyond what was held before, as torch's allocators count it."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """The peak within. On a GPU the caching allocator's own counter; on a CPU torch's profiler, which sees every
    allocation of a tensor, but not the scratch memory that a library takes for itself."""
    found = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.bytes = torch.cuda.max_memory_allocated() - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        yield found
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        found.bytes = max(found.bytes, held)


# --- tables ---


def about() -> dict[str, Any]:
    """Machine, versions and commit."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "timm", "webdataset")},
        "commit": own_commit(),
    }


def report(title: str, figures: Sequence[Figure], file: str = "", **details: Any) -> None:
    """The table on the first rank, and `file` as JSON with whatever else was measured."""
    if dist.is_initialized() and dist.get_rank():
        return
    show(title, figures)
    if file:
        content = {**about(), "title": title, "figures": [dataclasses.asdict(f) for f in figures], **details}
        Path(file).write_text(json.dumps(_plain(content), indent=1) + "\n")


def show(title: str, figures: Sequence[Figure], file: TextIO | None = None) -> None:
    """Print the figures as a table, to `file` if it is given."""
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "value", "quartiles", "on the wall", "beside", "aim", ""):
        table.add_column(heading, justify="left" if heading in ("figure", "beside", "") else "right")
    for one in figures:
        table.add_row(*cells(one))
    console = Console(width=150, file=file)
    console.print(table)
    for one in figures:
        if one.note:
            console.print(f"  {one.what}: {one.note}", highlight=False)


def cells(one: Figure) -> tuple[str, ...]:
    """A figure as the table's cells."""
    quartiles = "" if one.low is None or one.high is None else f"{one.low:.2f} to {one.high:.2f}"
    wall = "" if one.wall is None else f"{one.wall:.2f}"
    aim = "" if one.aim is None else f"{'' if one.exact else '<= '}{number(one.aim, one.unit)}"
    verdict = {None: "", True: "met", False: "missed"}[one.met]
    value = "not measured" if one.value != one.value else f"{number(one.value, one.unit)} {one.unit}".rstrip()
    return one.what, value, quartiles, wall, one.beside, aim, verdict


def number(value: float, unit: str) -> str:
    """With as many digits as say something."""
    if unit == "x" or value != int(value):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{int(value):,}"


def spoken(seconds: float) -> str:
    """A time as one says it."""
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def read(file: str | Path) -> tuple[list[Figure], dict[str, Any]]:
    """The figures of a benchmark's file, and all that stands beside them."""
    content = json.loads(Path(file).read_text())
    rows = [{k: float("nan") if k == "value" and v is None else v for k, v in f.items()} for f in content["figures"]]
    return [Figure(**row) for row in rows], content


def draw(figures: Sequence[Figure], file: str | Path, title: str) -> None:
    """A PNG of all ratios: the value with its quartiles, and the aim as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios = [f for f in figures if f.unit == "x" and f.value == f.value][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.34 * max(1, len(ratios))), layout="constrained")
    colours = {True: "#2b7a4b", False: "#b5483a", None: "#6a7480"}
    for row, one in enumerate(ratios):
        axes.barh(row, one.value, height=0.6, color=colours[one.met])
        if one.low is not None and one.high is not None:
            axes.plot([one.low, one.high], [row, row], color="black", linewidth=1.2)
        if one.aim is not None:
            axes.plot([one.aim, one.aim], [row - 0.42, row + 0.42], color="black", linestyle=":", linewidth=1.6)
        axes.text(max(one.value, one.high or 0.0, one.aim or 0.0), row, f"  {one.value:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(ratios)), [one.what for one in ratios], fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.set_xlabel("over floor or peer; dotted: the aim; green: met, red: missed, grey: no aim; line: quartiles")
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.08)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and value != value else value
