"""How far rounding may move what a test compares with a plain reference.

A processor, a BLAS or a release of torch adds in another order. How far two sound computations then lie apart depends
on how much the model and its loss amplify rounding, so no tolerance is a number: a test computes its reference again
from inputs that lie one unit in the last place beside the first, sees how far the result moves, and allows `FACTOR`
times that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FACTOR = 32
"""How many times the reference's own movement a result may lie off.

A nudge is one rounding of each input. A computation rounds again in every layer and step, forward and backward, and a
loss may cancel large terms of which the inputs know nothing. References computed with AVX-512 and with SSE kernels lie
up to 4 times the movement apart, and the losses of DKD, which multiply a difference of logarithms by 128, up to 9.
32 leaves room for other kernels, and is far less than what a lost gradient makes or a row that is counted twice.
"""
NUDGES = 2
"""How often the inputs are moved. A part's movement is the largest of many numbers, which is not small by chance."""


class Nudge:
    """Moves each number by one unit in the last place, up or down by `seed`; seed 0 leaves all as it is.

    Zeros stay: every machine has them exactly, and beside them lie a ReLU's other slope and a denormal number.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, values: Tensor) -> Tensor:
        if not self.seed or not values.is_floating_point():
            return values
        up = torch.rand(values.shape, generator=self.generator) < 0.5
        moved = torch.nextafter(values, torch.where(up, torch.inf, -torch.inf).to(values.dtype))
        return torch.where(values == 0, values, moved)

    def modules(self, modules: Iterable[nn.Module]) -> None:
        """Move all parameters, each once."""
        for parameter in dict.fromkeys(p for module in modules for p in module.parameters()):
            parameter.data.copy_(self(parameter.data))


STILL = Nudge(0)


@cache
def result_of(reference: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`reference(*args)`, computed once in a process; not to be changed."""
    return reference(*args, nudge=STILL)


@cache
def movement(reference: Callable[..., dict[str, Any]], *args: Any) -> dict[str, float]:
    """Of each part of `reference(*args, nudge=...)`, how far its numbers move; measured once in a process."""
    still = flat(result_of(reference, *args))
    moved = [flat(reference(*args, nudge=Nudge(seed))) for seed in range(1, NUDGES + 1)]
    return {part: max(difference(other[part], values) for other in moved) for part, values in still.items()}


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], moved: dict[str, float]) -> None:
    """Every part of `theirs` is that of `ours`, as far as rounding goes; a part is a tree of arrays and numbers.

    `moved` is the movement of the reference, or of one of its family.
    """
    mine = flat(ours)
    for part, values in flat(theirs).items():
        allowed = FACTOR * max(moved[part], np.finfo(np.float32).eps * size(values))
        assert mine[part].keys() == values.keys(), part
        for name, value in values.items():
            off = difference({name: mine[part][name]}, {name: value})
            assert off <= allowed, f"{part}{name}: {off:.2g} off, and rounding moves {part} by {allowed:.2g} at most"


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest of all numbers; infinite where whole numbers differ or one is not finite."""
    found = 0.0
    for name, value in theirs.items():
        mine = ours[name]
        assert mine.shape == value.shape, name
        if value.size and value.dtype.kind == "f":
            off = np.abs(mine.astype(np.float64) - value.astype(np.float64)).max()
            found = max(found, float(off) if np.isfinite(off) else np.inf)
        elif not np.array_equal(mine, value):
            return np.inf
    return found


def size(values: dict[str, Any]) -> float:
    """The largest of all numbers that are rounded."""
    return max((float(np.abs(v).max()) for v in values.values() if v.size and v.dtype.kind == "f"), default=0.0)


def flat(parts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each part's arrays by their path. A list of dictionaries, one a step, is a dictionary of lists."""
    return {part: dict(_leaves(tree, "")) for part, tree in parts.items()}


def _leaves(tree: Any, at: str) -> Iterable[tuple[str, Any]]:
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        assert all(one.keys() == tree[0].keys() for one in tree)
        tree = {name: [one[name] for one in tree] for name in tree[0]}
    if isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{at}/{name}")
    else:
        yield at, _array(tree)


def _array(values: Any) -> Any:
    if isinstance(values, list):
        return np.stack([_array(one) for one in values])
    return values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
