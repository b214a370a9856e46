"""What a step costs, counted instead of timed: collectives, bytes, reads by the host, operator calls, autograd nodes.

What DeepSpeed does by itself is told apart by who called. A CPU has no device to wait for, but its reads are the same
calls that would wait for a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hetero_kt

OURS = str(Path(hetero_kt.__file__).parent)
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")
"""Methods of a tensor that wait for its device."""


@dataclass
class Counts:
    """Of one step."""

    collectives: int = 0
    """That this project starts."""
    bytes: int = 0
    """Of what they give: of a gather, the whole of it."""
    reads: int = 0
    """Of a tensor by the host, that this project asks for."""
    operators: int = 0
    """Calls of ATen in what is watched, a transfer or an objective's terms, but for views."""
    nodes: int = 0
    """Of the graph behind what is watched."""
    deepspeed: int = 0
    """Collectives that DeepSpeed starts by itself."""
    places: list[str] = field(default_factory=list, repr=False)
    """Where each of our collectives and reads was asked for."""


class Counter(TorchDispatchMode):
    """Counts everything while it is entered; `counts` may be swapped for a fresh one at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.watching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._collective(func.__name__, args)
        elif self.watching and not func.is_view:
            self.counts.operators += 1
        return func(*args, **(kwargs or {}))

    def watched(self, function: Callable[..., Any], graph: Callable[[Any], list[Tensor]]) -> Callable[..., Any]:
        """`function`, whose calls' operators are counted, and the nodes behind `graph(its result)`."""

        def counted(*args: Any) -> Any:
            self.watching = True
            result = function(*args)
            self.watching = False
            self.counts.nodes += nodes(graph(result))
            return result

        return counted

    def read(self) -> None:
        caller, place = _caller()
        if caller == "ours":
            self.counts.reads += 1
            self.counts.places.append(place)

    def _collective(self, name: str, args: tuple[Any, ...]) -> None:
        caller, place = _caller()
        if caller == "deepspeed":
            self.counts.deepspeed += 1
            return
        self.counts.collectives += 1
        self.counts.places.append(f"{place}: {name}")
        self.counts.bytes += sum(t.numel() * t.element_size() for t in _tensors(args[0]))


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [t for one in given for t in _tensors(one)] if isinstance(given, list | tuple) else []


def _caller() -> tuple[str, str]:
    """Whose code asked, and where: the innermost frame that is DeepSpeed's or this project's. What `params` asks
    DeepSpeed for is ours."""
    frame: Any = sys._getframe(2)
    whose = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            ours = not whose or Path(file).name == "params.py"
            return "ours" if ours else whose, f"{Path(file).name}, {frame.f_code.co_name}"
        if "/deepspeed/" in file:
            whose = "deepspeed"
        frame = frame.f_back
    return whose, ""


@contextmanager
def counting() -> Iterator[Counter]:
    """Everything that this process does inside is counted."""
    counter = Counter()
    own = vars(Tensor)
    methods = {name: getattr(Tensor, name) for name in READS}
    inherited = [name for name in READS if name not in own]
    busy = False

    def counted(name: str) -> Callable[..., Any]:
        @wraps(methods[name])
        def read(*args: Any, **options: Any) -> Any:
            nonlocal busy
            if busy:  # one read, however it is made of others
                return methods[name](*args, **options)
            counter.read()
            busy = True
            try:
                return methods[name](*args, **options)
            finally:
                busy = False

        return read

    for name in READS:
        setattr(Tensor, name, counted(name))
    try:
        with counter:
            yield counter
    finally:
        for name in READS:
            if name in inherited:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, methods[name])


def nodes(tensors: list[Tensor]) -> int:
    """Nodes of the graph behind tensors."""
    seen: set[Any] = set()
    waiting = [tensor.grad_fn for tensor in tensors]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [below for below, _ in node.next_functions]
    return len(seen)


def versions() -> str:
    """Of the libraries that counts depend on."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "deepspeed", "timm"))
