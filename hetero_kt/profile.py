"""Where a step's time goes: a trace of a few steps, and a table of their parts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, record_function

Part = Literal["data", "teacher", "forward", "backward", "optimizer", "gather", "adapter", "logging"]
MEANINGS: dict[Part, str] = {
    "data": "waiting for the batch",
    "teacher": "frozen teachers",
    "forward": "models and their losses",
    "backward": "gradients, and what DeepSpeed does with them",
    "optimizer": "the models' optimizers",
    "gather": "reading and writing the weights that are exchanged",
    "adapter": "adapters, forward, backward and step; the fused model's connectors, forward",
    "logging": "numbers read back, written, and agreed on",
}
"""In the order of the table. A part within another one counts for itself alone."""
_MARK = "hetero_kt: "


def part(name: Part) -> AbstractContextManager[Any]:
    """What runs inside belongs to this part of a step; costs nothing while nobody takes a profile."""
    return record_function(_MARK + name) if torch.autograd._profiler_enabled() else nullcontext()


@contextmanager
def profiled(folder: Path, wanted: bool) -> Iterator[Callable[[], None]]:
    """Where `wanted`, profile the third to sixth step into `folder`: `profile.json` is for TensorBoard or a browser's
    trace viewer, `profile.txt`, which is printed too, the table.

    Gives what has to be called after each step.
    """
    if not wanted:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(folder / "profile.json"))
        text = table(profile.events() or ()) + profile.key_averages().table("self_cpu_time_total", row_limit=15)
        (folder / "profile.txt").write_text(text)
        print(text, flush=True)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    steps = torch.profiler.schedule(wait=1, warmup=1, active=4, repeat=1)
    with torch.profiler.profile(activities=activities, schedule=steps, on_trace_ready=write) as profile:
        yield profile.step


def times(events: Iterable[Any]) -> tuple[dict[str, tuple[float, float]], int]:
    """Of a profile's events: (part -> milliseconds a step of (host, device), `other` and `step` besides; steps)."""
    host, device = dict.fromkeys(MEANINGS, 0.0), dict.fromkeys(MEANINGS, 0.0)
    steps = {}  # those with a part in them: where a run ends early, the profiler begins one that never comes
    for event in events:
        if not event.name.startswith(_MARK) or not event.cpu_time_total:  # a GPU's timeline repeats the ranges
            continue
        name: Any = event.name.removeprefix(_MARK)
        host[name] += event.cpu_time_total
        device[name] += event.device_time_total
        above = event.cpu_parent
        while above is not None and not above.name.startswith((_MARK, "ProfilerStep")):
            above = above.cpu_parent
        if above is not None and above.name.startswith(_MARK):
            outer: Any = above.name.removeprefix(_MARK)
            host[outer] -= event.cpu_time_total
            device[outer] -= event.device_time_total
        elif above is not None:
            steps[above.id] = above
    whole, whole_device = (sum(getattr(s, f"{at}_time_total") for s in steps.values()) for at in ("cpu", "device"))
    found: dict[str, tuple[float, float]] = {name: (host[name], device[name]) for name in MEANINGS}
    found["other"] = (whole - sum(host.values()), max(0.0, whole_device - sum(device.values())))
    found["step"] = (whole, max(whole_device, sum(device.values())))
    scale = 1e-3 / max(len(steps), 1)
    return {name: (a * scale, b * scale) for name, (a, b) in found.items()}, len(steps)


def table(events: Iterable[Any]) -> str:
    """Milliseconds of each part of a step, and what share of it."""
    found, steps = times(events)
    with_device = any(device for _, device in found.values())
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=f"where a step's time goes (mean of {steps} steps)", title_justify="left")
    drawn.add_column("part")
    for heading in ("ms", "%", *(("ms on the GPU",) if with_device else ())):
        drawn.add_column(heading, justify="right")
    drawn.add_column("")
    total = found["step"][0] or 1.0
    for name, (host, device) in found.items():
        if name in MEANINGS and not host:
            continue
        row = [name, f"{host:.2f}", f"{100 * host / total:.1f}", *([f"{device:.2f}"] if with_device else [])]
        drawn.add_row(*row, MEANINGS.get(name, ""))  # type: ignore[call-overload]
    text = io.StringIO()
    Console(file=text, width=120).print(drawn)
    return text.getvalue()
